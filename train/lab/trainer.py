"""Dense training, then pruning and training on, for any task and recipe.

Runs of one trainer share their compiled steps: one for all fixed masks, whatever chose
them, because only `keep` differs and that is data, and one per kind of learned masks.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

import flexhinm_jax as fh
from flexhinm_jax.io import checkpoints
from flexhinm_jax.io.checkpoints import Checkpoints
from train.lab import optimizers, results
from train.lab.recipes import Recipe
from train.lab.tasks import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What every program is told; subclasses add the model.

    Attributes:
      name: names the folder of the results.
      rules: (regex of leaf paths, pattern or "skip"), as in `fh.discover`.
      vector_size: rows of a tile of HiNM and FlexHiNM.
      dense_steps: steps of the dense model, before any pruning.
      steps: steps after it, the same for every recipe.
      batch_size: examples of a batch, per seed.
      learning_rate: peak of the dense training: warm-up, then cosine to a tenth.
      prune_rate: peak of the steps after it.
      weight_decay: of AdamW.
      clip: largest norm of the gradient of one seed.
      every: steps between two records.
    """

    name: str
    rules: tuple[tuple[str, Any], ...] = ()
    vector_size: int = 32
    dense_steps: int = 600
    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 2e-3
    prune_rate: float = 2e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    every: int = 50

    def before_pruning(self) -> "Config":
        """The same with everything that the dense model does not depend on left out."""
        return dataclasses.replace(
            self, name="", rules=(), vector_size=1, steps=1, prune_rate=0.0, every=1
        )

    def optimizer(
        self, peak: float, steps: int, lanes: int
    ) -> optax.GradientTransformation:
        """AdamW with a gradient that is clipped lane by lane."""
        warm = max(1, steps // 20)
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warm, steps, 0.1 * peak)
        # The loss is the mean over lanes, so that of one lane has 1 / lanes of it.
        return optax.chain(
            optimizers.lanewise(optax.clip_by_global_norm(self.clip / lanes)),
            optax.adamw(rate, b2=0.98, weight_decay=self.weight_decay),
        )


class Trainer:
    """A task under a configuration, with its compiled steps."""

    def __init__(self, task: Task, config: Config):
        """Prepares the steps; nothing is compiled yet."""
        self.task, self.config = task, config
        self.tx = config.optimizer(config.prune_rate, config.steps, task.lanes)
        self.steps: dict[Any, Any] = {}

    def dense(self, folder: Path | None = None) -> Any:
        """The trained dense model, read from `folder` if it was trained before.

        Args:
          folder: where metrics and checkpoint go; None keeps neither.

        Raises:
          NotFinite: a loss or gradient is not finite.
        """
        task, config = self.task, self.config
        told = {"data": task.digest, "config": repr(config.before_pruning())}
        saved = None if folder is None else folder / "dense"
        if saved is not None and saved.exists():
            try:
                return checkpoints.restore(saved, task.params, told)
            except ValueError:
                pass  # of another configuration: trained anew below
        tx = config.optimizer(config.learning_rate, config.dense_steps, task.lanes)
        path = None if folder is None else folder / "dense.jsonl"
        run = self._plain(task.params, tx, config.dense_steps)
        results.follow(run, path, "dense", config.dense_steps)
        params = run.now().params
        if saved is not None:
            checkpoints.save(saved, params, told, overwrite=True)
        return params

    def prune(
        self,
        recipe: Recipe,
        sparsity: float,
        params: Any,
        key: jax.Array,
        path: Path | None = None,
        saves: Checkpoints | None = None,
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Prunes as the recipe says and trains on.

        Args:
          recipe: what to do.
          sparsity: fraction of the prunable weights that are zero in the end.
          params: the dense model; not changed.
          key: PRNG key, consumed.
          path: JSONL file for the records, or None.
          saves: where checkpoints are kept; None keeps none. A run that is stopped and
            resumed ends with the same bits as one that is not.

        Returns:
          Parameters with exact zeros, and the records.

        Raises:
          NotFinite: a loss or gradient is not finite.
          ValueError: checkpoints of another run, or damaged ones.
        """
        told = {"data": self.task.digest, "config": repr(self.config)}
        told |= {"recipe": repr(recipe), "sparsity": sparsity}
        title, steps = recipe.title, self.config.steps
        if recipe.method is None:
            run = self._plain(params, self.tx, steps, saves=saves, config=told)
        else:
            title = f"{title} {sparsity}"
            stages, finish = recipe.stages_of(steps, sparsity)
            run = fh.gradual(
                recipe.method,
                self.task.loss_fn,
                params,
                self.task.uses,
                self._batch_at,
                stages,
                self.tx,
                key=key,
                mask_tx=recipe.mask_tx(),
                log_every=self.config.every,
                checkpoints=saves,
                config=told,
                finish=finish,
                make_step=self._maker(recipe),
            )
        records = results.follow(run, path, title, steps)
        return run.now().params, records

    def _batch_at(self, step: int) -> tuple[Any]:
        return (self.task.batch_at(step),)

    def _plain(
        self, params: Any, tx: optax.GradientTransformation, steps: int, **options: Any
    ) -> fh.Run:
        """A run of weights that are all kept."""
        keep = jax.tree.map(lambda _: None, params)
        start = fh.Training.under(keep, params, tx, key=jax.random.key(0))
        step = fh.make_step(None, self.task.loss_fn, tx, None)
        every = self.config.every
        return fh.Run(
            start, [fh.Phase(step, steps)], self._batch_at, every=every, **options
        )

    def _maker(self, recipe: Recipe) -> Callable[..., Any]:
        """`fh.make_step` that remembers: schedules alone do not make another step."""
        same = dataclasses.replace(recipe, title="", stages=1, pruning=1.0)

        def make(method: Any, *parts: Any, **options: Any) -> Any:
            name = None if method is None else same
            if name not in self.steps:
                self.steps[name] = fh.make_step(method, *parts, **options)
            return self.steps[name]

        return make
