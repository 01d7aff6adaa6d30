"""Recovery in which Hard Concrete gates may still move the masks.

Gates start from the supports that a one-shot method found. A weight that it pruned
starts from its dense value, because a gate learns nothing from a weight that is zero.
For a first share of the budget gates and weights move together, then the gates harden
to exactly n of m and the rest of the budget trains the weights under fixed masks.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

import flexhinm_jax as fh
from flexhinm_jax.models.encoder import EncoderConfig
from flexhinm_jax.ops.gates import Relaxation
from flexhinm_jax.pruning import prune
from train import mask_optimizers, recovery
from train.packing import Rows
from train.recovery import Budget, Recovery
from train.teacher import Recipe, Targets, loss_of


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
    optimizer: mask_optimizers.Name = "relative"
    start: float = 0.5
    temperature: tuple[float, float] = (0.5, 0.1)
    count_weight: float = 1.0
    sparsity_weight: float = 0.0
    relaxation: Relaxation = "expected"

    def __post_init__(self):
        """Validates the fields."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be in (0, 1]")
        mask_optimizers.check(self.optimizer)
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


class GatedRecovery(Recovery):
    """A run whose masks move first.

    Attributes:
      moved: fraction of the kept weights of the start that hardening exchanged; None
        before.
    """

    def __init__(
        self,
        dense: Mapping[str, Any],
        start: prune.Pruned,
        pattern: fh.Pattern,
        token_lists: Sequence[Sequence[int]],
        config: EncoderConfig,
        recipe: Recipe,
        budget: Budget,
        gates: Gates,
    ):
        """Sets up a run and starts its clock; see `Recovery`."""
        keep = fh.keep_tree(start.plans, start.params, start.uses)
        super().__init__(dense, start.params, keep, token_lists, config, recipe, budget)
        self._gates, self._keep = gates, keep
        self._method = gates.method(pattern)
        self._uses = start.uses
        moving = {name: dense[name] for name in self.progress.student}
        states, student = fh.adopt(self._method, start.plans, moving, self._uses)
        tx = recovery.optimizer(recipe)
        mask_tx = mask_optimizers.make(gates.optimizer, gates.rate)

        def loss_fn(student: Any, fixed: Any, rows: Rows, targets: Targets) -> Any:
            params = {**fixed, **student}
            return loss_of(params, rows, targets, config, recipe)

        self.training = fh.init_training(
            self._method,
            student,
            self._uses,
            states,
            tx,
            key=jax.random.key(recipe.seed),
            mask_tx=mask_tx,
        )
        self._gated_step = fh.make_step(
            self._method, loss_fn, tx, self._uses, mask_tx=mask_tx
        )
        self.moved: float | None = None

    def tree(self) -> dict[str, Any]:
        """The gates too; `moved` is -1 while they are open."""
        training = self.training
        if self.moved is not None:
            now = self.progress
            training = dataclasses.replace(
                training, params=now.student, opt_state=now.opt_state
            )
        return {
            "training": training,
            "step": np.asarray(self.progress.step, np.int64),
            "spent": np.asarray(self.progress.spent, np.float64),
            "moved": np.asarray(-1.0 if self.moved is None else self.moved, np.float64),
        }

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Continues where `tree` was taken."""
        self.training = tree["training"]
        moved = float(tree["moved"])
        self.moved = None if moved < 0 else moved
        params, opt_state = self.training.params, self.training.opt_state
        super().restore({**tree, "student": params, "opt_state": opt_state})

    def plans(self) -> dict[str, Any]:
        """The hard plans with the weights as they are now."""
        if self.moved is None:
            self._harden()
        student = self.progress.student
        return fh.decide(self._method, self.training.states, student, self._uses)

    def advance(
        self, rows: Rows, targets: Targets, rate: float, part: float
    ) -> dict[str, Array]:
        """One step; hardens when the share of the gates is over."""
        if self.moved is None and part < self._gates.share:
            training = dataclasses.replace(
                self.training, opt_state=recovery.at_rate(self.training.opt_state, rate)
            )
            self.training, found = self._gated_step(
                training.at(part / self._gates.share), self.fixed, rows, targets
            )
            return found
        if self.moved is None:
            self._harden()
        return super().advance(rows, targets, rate, part)

    def _harden(self) -> None:
        """Closes the gates; from here on the masks are fixed."""
        self.training = fh.harden(self._method, self.training, self._uses)
        self.progress.student = dict(self.training.params)
        self.progress.opt_state = self.training.opt_state
        masks = self.training.opt_state.keep
        kept = [(self._keep[k], m) for k, m in masks.items() if m is not None]
        lost = sum(int(np.sum(np.asarray(a) & ~np.asarray(b))) for a, b in kept)
        self.moved = lost / sum(int(np.sum(np.asarray(a))) for a, _ in kept)

    def params(self) -> dict[str, Array]:
        """All parameters of the student, with zeros in place."""
        if self.moved is None:
            self._harden()
        return super().params()
