"""Recovering a pruned encoder from its teacher, until a budget is spent.

All weights, biases and norms of the layers move, the embeddings stay; pruned weights
stay exactly zero. Hard Concrete gates may move the masks first: they start from the
supports that a one-shot method chose, a weight that it pruned from its dense value,
because a gate learns nothing from a weight that is zero. For a first share of the
budget gates and weights move together, then the gates harden to exactly n of m and the
rest of the budget trains the weights under fixed masks.

The learning rate follows the spent fraction of the budget, so that it always reaches
its end.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import flexhinm_jax as fh
from flexhinm_jax.io.checkpoints import Checkpoints
from flexhinm_jax.models.encoder import EncoderConfig
from flexhinm_jax.ops.gates import Relaxation
from flexhinm_jax.tracing import views
from flexhinm_jax.training.phases import At, Row
from train.lab import optimizers
from train.lab.packing import Rows
from train.lab.teacher import Recipe, Sentences, Targets, Teacher, loss_of


@dataclasses.dataclass(frozen=True)
class Gates:
    """How gates are trained; by default as did best, see train/LOG.md.

    Attributes:
      share: fraction of the budget in which gates move, in (0, 1].
      rate: learning rate of log_alpha.
      optimizer: of log_alpha.
      start: log_alpha of kept weights at the beginning, minus that of pruned ones.
      temperature: first and last.
      count_weight: weight of the count term at the end of the share.
      sparsity_weight: weight of the mean gate.
      relaxation: what training sees, see `fh.HardConcrete`.
    """

    share: float = 0.3
    rate: float = 0.003
    optimizer: optimizers.Name = "relative"
    start: float = 0.5
    temperature: tuple[float, float] = (0.5, 0.1)
    count_weight: float = 1.0
    sparsity_weight: float = 0.0
    relaxation: Relaxation = "expected"

    def __post_init__(self):
        """Validates the fields."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be in (0, 1]")
        optimizers.check(self.optimizer)
        self.method(fh.NM(2, 4))  # validates the rest

    def method(self, pattern: fh.Pattern) -> fh.HardConcrete:
        """The method for a pattern."""
        return fh.HardConcrete(
            pattern,
            temperature=self.temperature,
            start=self.start,
            count_weight=self.count_weight,
            sparsity_weight=self.sparsity_weight,
            relaxation=self.relaxation,
        )


def moving(params: Mapping[str, Any]) -> list[str]:
    """Names of the parameters that are trained: those of the layers."""
    return [name for name in params if name.startswith("encoder.layer.")]


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Adam, whose learning rate is set in its state before every step."""

    @optax.inject_hyperparams
    def adam(learning_rate: Array) -> optax.GradientTransformation:
        def scale(updates: Any, _: Any) -> Any:
            vectors = recipe.vector_rate * learning_rate
            rates = {True: -vectors, False: -learning_rate}
            return jax.tree.map(lambda u: rates[u.ndim == 1] * u, updates)

        moments = optax.scale_by_adam(b1=recipe.b1, b2=recipe.b2)
        return optax.chain(moments, optax.stateless(scale))

    return adam(learning_rate=0.0)


@functools.lru_cache(maxsize=4)
def _compiled(
    config: EncoderConfig, recipe: Recipe
) -> tuple[optax.GradientTransformation, Callable[..., Any], Callable[..., Any]]:
    """Optimiser, loss and the step under fixed masks: one for equal runs."""
    tx = optimizer(recipe)

    def loss_fn(student: Any, fixed: Any, rows: Rows, targets: Targets) -> Any:
        return loss_of({**fixed, **student}, rows, targets, config, recipe)

    return tx, loss_fn, fh.make_step(None, loss_fn, tx, None)


class Recovery(fh.Run):
    """A run: the pruned model, its teacher, the text and the budget.

    Attributes:
      sentences: the packed text.
      fixed: the parameters that stay.
      moved: fraction of the kept weights of the start that hardening exchanged; None
        before, and without gates.
    """

    def __init__(
        self,
        dense: Mapping[str, Any],
        start: Any,
        token_lists: Sequence[Sequence[int]],
        config: EncoderConfig,
        recipe: Recipe,
        duration: fh.Duration,
        gates: tuple[Gates, fh.Pattern] | None = None,
        *,
        saves: Checkpoints | None = None,
        told: Any = None,
    ):
        """Sets up a run and starts its clock.

        Args:
          dense: the teacher.
          start: the pruned model, with `params`, `plans` and `uses`.
          token_lists: the sentences.
          config: sizes.
          recipe: how.
          duration: how long, teacher and compilation included.
          gates: how they are trained, and the pattern; None fixes the masks.
          saves: where checkpoints go; None for nowhere.
          told: what must be equal to continue from one.

        Raises:
          ValueError: too few sentences.
        """
        began = duration.clock()
        self._recipe, self._from, self._gates = recipe, start, gates
        self.sentences = Sentences(token_lists, recipe)
        names = moving(start.params)
        self.fixed = {
            k: jnp.asarray(v) for k, v in start.params.items() if k not in names
        }
        self._teacher = Teacher(jax.tree.map(jnp.asarray, dict(dense)), config, recipe)
        self._tx, loss_fn, fixed_step = _compiled(config, recipe)
        self._keep = fh.keep_tree(start.plans, start.params, start.uses)
        key = jax.random.key(recipe.seed)
        if gates is None:
            student = {name: start.params[name] for name in names}
            keep = {name: self._keep[name] for name in names}
            first = fh.Training.under(keep, student, self._tx, key=key)
            phases = [fh.Phase(fixed_step, 1)]
        else:
            student = {name: dense[name] for name in names}
            first, phases = self._gated(*gates, student, loss_fn, fixed_step, key)
        super().__init__(
            first,
            phases,
            self._batch,
            duration,
            before=self._at_rate,
            saves=saves,
            config=told,
            every=1,
        )
        self.spent = duration.clock() - began

    def _gated(self, gates, pattern, student, loss_fn, fixed_step, key):
        self._method, uses = gates.method(pattern), self._from.uses
        states, student = fh.adopt(self._method, self._from.plans, student, uses)
        mask_tx = optimizers.make(gates.optimizer, gates.rate)
        first = fh.init_training(
            self._method, student, uses, states, self._tx, key=key, mask_tx=mask_tx
        )
        step = fh.make_step(self._method, loss_fn, self._tx, uses, mask_tx=mask_tx)
        phases = [
            fh.Phase(step, gates.share, end=self._harden),
            fh.Phase(fixed_step, 1 - gates.share),
        ]
        return first, phases if gates.share < 1 else phases[:1]

    def _harden(self, training: fh.Training) -> tuple[fh.Training, Row]:
        """Closes the gates; from here on the masks are fixed."""
        training = fh.harden(self._method, training, self._from.uses)
        masks = training.opt_state.keep
        kept = [(self._keep[k], m) for k, m in masks.items() if m is not None]
        lost = sum(int(np.sum(np.asarray(a) & ~np.asarray(b))) for a, b in kept)
        return training, {"moved": lost / sum(int(np.sum(a)) for a, _ in kept)}

    def _batch(self, step: int) -> tuple[Any, ...]:
        number = self.sentences.number(step)
        rows = self.sentences.batch(number)
        return self.fixed, rows, self._teacher(number, rows)

    def _at_rate(self, training: fh.Training, at: At) -> fh.Training:
        opt = optimizers.at_rate(training.opt_state, self._recipe.rate(at.progress))
        return dataclasses.replace(training, opt_state=opt)

    @property
    def moved(self) -> float | None:
        """See the class."""
        return next((row["moved"] for row in self.rows if "moved" in row), None)

    def figures(self, row: Row) -> dict[str, Any]:
        """Of a row: seconds spent, learning rate, sentences of its step."""
        rows = self.sentences.batch(self.sentences.number(row["step"] - 1))
        return {
            "spent": self.spent,
            "rate": self._recipe.rate(row["progress"]),
            "sentences": int(np.sum(rows.lists >= 0)),
        }

    def params(self) -> dict[str, Array]:
        """All parameters of the student."""
        return {**self.fixed, **self.now().params}

    def plans(self) -> dict[str, Any]:
        """The hard plans with the weights as they are now."""
        now, uses = self.now(), self._from.uses
        if self._gates is not None:
            return fh.decide(self._method, now.states, now.params, uses)
        return {
            path: dataclasses.replace(
                plan,
                weight=views.matrix(now.params[path], uses.leaves[path].layout),
                bias=None,
            )
            for path, plan in self._from.plans.items()
        }
