"""Learns masks of frozen weights until a budget is spent.

The loop of `flexhinm_jax.fit` for programs that count time: schedules and learning rate
follow the spent fraction of the budget, so they always reach their end, and the hard
masks that validate best are kept, the first ones among them. A run whose budget counts
steps is reproducible to the bit, also when it was killed and resumed in between.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flexhinm_jax as fh
from flexhinm_jax.io.checkpoints import Checkpoints
from flexhinm_jax.ops import gates
from flexhinm_jax.training import model_gates
from flexhinm_jax.types import State, Uses
from train import mask_optimizers
from train.recovery import Budget, at_rate


@dataclasses.dataclass(frozen=True)
class Learner:
    """A learned method and how it is trained.

    Attributes:
      method: the method; its pattern is that of the row.
      rate: peak of the learning rate: linear warm-up, then cosine to `last` of it.
      optimizer: of what is learned.
      b1: decay of the first moment, not for "sgd".
      b2: decay of Adam's second moment.
      warmup: fraction of the budget.
      last: fraction of the peak at the end.
      looks: how often the hard masks are validated in the whole run.
    """

    method: fh.Method
    rate: float
    optimizer: mask_optimizers.Name = "adam"
    b1: float = 0.9
    b2: float = 0.95
    warmup: float = 0.02
    last: float = 0.1
    looks: int = 20

    def __post_init__(self):
        """Validates the fields."""
        mask_optimizers.check(self.optimizer)
        if not 0 < self.rate < math.inf or self.looks < 1:
            raise ValueError(
                f"rate={self.rate}, looks={self.looks}: need a positive rate and at "
                "least one look"
            )

    def tx(self) -> optax.GradientTransformation:
        """The optimiser; its learning rate is set in its state before every step."""

        @optax.inject_hyperparams
        def made(learning_rate: Any) -> optax.GradientTransformation:
            return mask_optimizers.make(self.optimizer, learning_rate, self.b1, self.b2)

        return made(learning_rate=0.0)

    def rate_at(self, progress: float) -> float:
        """The learning rate when a fraction `progress` of the budget is spent."""
        if progress < self.warmup:
            return self.rate * (progress / self.warmup)
        part = min(1.0, (progress - self.warmup) / (1 - self.warmup))
        wave = 0.5 * (1 + math.cos(math.pi * part))
        return self.rate * (self.last + (1 - self.last) * wave)


class Learning:
    """A run: states of a method, the loss of a model, and a budget."""

    def __init__(
        self,
        learner: Learner,
        states: Mapping[str, State],
        params: Any,
        uses: Uses,
        loss_fn: Callable[..., Any],
        batch_at: Callable[[int], tuple],
        validate: Callable[[Any], float],
        budget: Budget,
        *,
        key: jax.Array,
        most: int | None = None,
        began: float | None = None,
    ):
        """Validates the first masks and compiles nothing else yet.

        Args:
          learner: what learns, and how.
          states: from `solve`.
          params: the dense parameters.
          uses: from `discover`.
          loss_fn: (params, *batch) -> (f32[], metrics), lower is better.
          batch_at: step -> batch.
          validate: parameters under hard masks -> number, lower is better.
          budget: how long.
          key: consumed.
          most: steps at most, whatever the budget is.
          began: when the budget's clock started; None for now.
        """
        self.learner, self.budget, self.most = learner, budget, most
        self._began = budget.clock() if began is None else began
        self._params, self._uses = params, uses
        self._batch_at, self._validate = batch_at, validate
        method: Any = learner.method
        tx = learner.tx()
        self.training = fh.init_training(
            method, params, uses, states, None, key=key, mask_tx=tx
        )
        self._step = fh.make_step(method, loss_fn, None, uses, mask_tx=tx)

        @jax.jit
        def hard(states: Any, params: Any) -> Any:
            settled = model_gates.harden(method, states, params, uses)
            plans = fh.decide(method, settled, params, uses)
            return settled, fh.densify(plans, params, uses)

        self._hard = hard
        self.step, self.spent, self._looked = 0, 0.0, 0.0
        self.best, sparse = hard(dict(states), params)
        self.first = self.lowest = float(validate(sparse))

    def progress(self) -> float:
        """The spent fraction."""
        part = self.budget.progress(self.step, self.spent)
        return part if self.most is None else max(part, self.step / self.most)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of what is learned, of its gradient and of the optimiser's state."""
        size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
        learned = size([s.learned for s in self.training.states.values()])
        return {
            "learned": learned,
            "gradient": learned,
            "optimizer": size(self.training.learned_opt),
        }

    def run(self) -> Iterator[dict[str, Any]]:
        """Runs until the budget is spent; yields the figures of every step.

        "value" is there after a look at the hard masks.
        """
        while (part := self.progress()) < 1:
            now = self.training.at(part)
            rate = self.learner.rate_at(part)
            now = dataclasses.replace(now, learned_opt=at_rate(now.learned_opt, rate))
            self.training, found = self._step(now, *self._batch_at(self.step))
            figures = {name: float(x) for name, x in found.items()}
            self.step += 1
            self.spent = self.budget.clock() - self._began
            after = self.progress()
            if after >= 1 or after - self._looked >= 1 / self.learner.looks:
                figures["value"] = self.look()
                self._looked = after
                self.spent = self.budget.clock() - self._began
            yield {"progress": part, "rate": rate, **figures}

    def look(self) -> float:
        """Validates the hard masks now and keeps them if they are the best."""
        settled, sparse = self._hard(self.training.states, self._params)
        value = float(self._validate(sparse))
        if value < self.lowest:
            self.lowest = value
            # copied, because a step gives the memory of its argument away
            self.best = jax.tree.map(lambda x: jnp.array(x, copy=True), settled)
        return value

    def plans(self) -> dict[str, Any]:
        """The plans of the best masks."""
        method = self.learner.method
        return fh.decide(method, self.best, self._params, self._uses)

    def tree(self) -> dict[str, Any]:
        """Everything that a checkpoint holds."""
        return {
            "training": self.training,
            "best": self.best,
            "step": np.asarray(self.step, np.int64),
            "spent": np.asarray(self.spent, np.float64),
            "looked": np.asarray(self._looked, np.float64),
            "lowest": np.asarray(self.lowest, np.float64),
        }

    def save(self, folder: Path, told: Mapping[str, Any]) -> None:
        """Adds a checkpoint, and drops all but the last two."""
        Checkpoints(folder).save(self.step, self.tree(), dict(told))

    def restore(self, folder: Path, told: Mapping[str, Any]) -> bool:
        """Goes on from the last whole checkpoint; False where there is none.

        Raises:
          ValueError: a checkpoint of another run.
        """
        saves = Checkpoints(folder, resume="older")
        found = saves.load(lambda _: self.tree(), dict(told))
        if found is None:
            return False
        tree = found[1]
        self.training, self.best = tree["training"], tree["best"]
        self.step, self.spent = int(tree["step"]), float(tree["spent"])
        self._looked, self.lowest = float(tree["looked"]), float(tree["lowest"])
        self._began = self.budget.clock() - self.spent
        return True


def started_at(
    method: fh.Method, states: Mapping[str, State], keeps: Mapping[str, Any]
) -> dict[str, State]:
    """The states of a learned n:m method, with given masks as their start.

    Args:
      method: MaskLLM, MaskPro or Patch in natural order; the tiles of Patch stay.
      states: from `solve`.
      keeps: path -> bool[*stack, o, i], n of every m.

    Raises:
      ValueError: a method that has no masks to start from.
    """
    if not isinstance(method, fh.MaskLLM | fh.MaskPro | fh.Patch):
        raise ValueError(
            f"{type(method).__name__} does not start from masks; leave 'START>' out"
        )
    return {path: _started(method, s, keeps[path]) for path, s in states.items()}


def _started(method: Any, state: State, keep: Any) -> State:
    keep, fixed, learned = jnp.asarray(keep), dict(state.fixed), dict(state.learned)
    if isinstance(method, fh.Patch):
        fixed["inner"], n, m = keep, method.tiles.n, method.tiles.m
    else:
        support = fixed["support"]
        fixed["support"] = dataclasses.replace(support, keep=keep)
        n, m = support.regions.n, support.regions.m
    if "logits" in learned:
        grouped = keep.reshape(*keep.shape[:-1], -1, m)
        if isinstance(method, fh.MaskPro):
            logits = method.start * grouped.astype(jnp.float32)
        else:
            logits = gates.initial_logits(
                grouped,
                n=n,
                m=m,
                parameters=getattr(method, "parameters", "patterns"),
                prior=method.start / method.scale[0],
            )
        learned["logits"] = logits.reshape(learned["logits"].shape)
    return dataclasses.replace(state, learned=learned, fixed=fixed)
