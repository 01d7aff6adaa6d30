"""Recovering a pruned encoder from its teacher, until a budget is spent.

All weights, biases and norms of the layers move, the embeddings stay; pruned weights
stay exactly zero.

A run ends after a number of steps or when its time is spent. In the first case it is
reproducible to the last bit, also when it was killed and resumed in between; in the
second the learning rate follows the clock, so that it always reaches its end.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import flexhinm_jax as fh
from flexhinm_jax.models.encoder import EncoderConfig
from train.packing import Rows
from train.teacher import Recipe, Sentences, Targets, Teacher, loss_of

Unit = Literal["minutes", "cpu-seconds", "steps"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """When a run ends; teacher and compilation are included.

    Attributes:
      amount: how much.
      unit: "minutes" of wall time, "cpu-seconds" of this process, or "steps".
    """

    amount: float = 8.0
    unit: Unit = "minutes"

    def __post_init__(self):
        """Validates the fields."""
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit={self.unit!r}; known: {', '.join(get_args(Unit))}")
        if not 0 < self.amount < math.inf:
            raise ValueError(f"a budget of {self.amount} {self.unit} is not positive")

    def progress(self, step: int, spent: float) -> float:
        """The spent fraction after `step` steps and `spent` seconds of `clock`."""
        if self.unit == "steps":
            return step / self.amount
        return spent / (60 * self.amount if self.unit == "minutes" else self.amount)

    def clock(self) -> float:
        """Seconds since some moment, in the kind of time that the budget counts."""
        if self.unit == "cpu-seconds":
            return time.process_time()
        return time.perf_counter()


@dataclasses.dataclass
class Progress:
    """Where a run is; everything that a checkpoint holds.

    Attributes:
      student: the parameters that move.
      opt_state: state of the optimiser.
      step: finished steps.
      spent: seconds of the budget's clock.
    """

    student: Any
    opt_state: Any
    step: int = 0
    spent: float = 0.0

    def tree(self) -> dict[str, Any]:
        """The tree to save."""
        return {
            "student": self.student,
            "opt_state": self.opt_state,
            "step": np.asarray(self.step, np.int64),
            "spent": np.asarray(self.spent, np.float64),
        }


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


def at_rate(opt_state: Any, rate: float) -> Any:
    """The state of `optimizer` with another learning rate."""
    value = jnp.asarray(rate, jnp.float32)
    return optax.tree_utils.tree_set(opt_state, learning_rate=value)


def make_step(
    tx: optax.GradientTransformation, config: EncoderConfig, recipe: Recipe
) -> Callable[..., Any]:
    """One jitted step.

    Args:
      tx: the optimiser, `keep_sparse` outermost.
      config: sizes.
      recipe: the loss.

    Returns:
      (student, opt_state, fixed, rows, targets) -> student and state, moved, and the
      parts of the loss. The memory of the first two is given to the results.
    """

    def loss_fn(student: Any, fixed: Any, rows: Rows, targets: Targets) -> Any:
        return loss_of({**fixed, **student}, rows, targets, config, recipe)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        student: Any, opt_state: Any, fixed: Any, rows: Rows, targets: Targets
    ) -> tuple[Any, Any, dict[str, Array]]:
        grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, parts), grads = grad(student, fixed, rows, targets)
        updates, opt_state = tx.update(grads, opt_state, student)
        student = optax.apply_updates(student, updates)
        return student, opt_state, {"loss": loss, **parts}

    return step


class Recovery:
    """A run: the pruned model, its teacher, the text and the budget."""

    def __init__(
        self,
        dense: Mapping[str, Any],
        pruned: Mapping[str, Any],
        keep: Mapping[str, Any],
        token_lists: Sequence[Sequence[int]],
        config: EncoderConfig,
        recipe: Recipe,
        budget: Budget,
    ):
        """Sets up a run and starts its clock.

        Args:
          dense: the teacher.
          pruned: the same tree with zeros in place.
          keep: the same tree with masks; None on what is not pruned.
          token_lists: the sentences.
          config: sizes.
          recipe: how.
          budget: how long.

        Raises:
          ValueError: too few sentences.
        """
        self.budget = budget
        self._began = budget.clock()
        self._recipe = recipe
        self.sentences = Sentences(token_lists, recipe)
        names = moving(pruned)
        self.fixed = {k: jnp.asarray(v) for k, v in pruned.items() if k not in names}
        self._teacher = Teacher(jax.tree.map(jnp.asarray, dict(dense)), config, recipe)
        # The step gives its arguments' memory away: the caller keeps their own arrays.
        copy = functools.partial(jax.tree.map, functools.partial(jnp.array, copy=True))
        tx = fh.keep_sparse(optimizer(recipe), copy({k: keep[k] for k in names}))
        student = copy({name: pruned[name] for name in names})
        self.progress = Progress(student, tx.init(student))
        self._step = make_step(tx, config, recipe)

    def tree(self) -> dict[str, Any]:
        """What a checkpoint holds; its structure stays the same through the run."""
        return self.progress.tree()

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Continues where `tree` was taken."""
        self.progress = Progress(
            tree["student"], tree["opt_state"], int(tree["step"]), float(tree["spent"])
        )
        self._began = self.budget.clock() - self.progress.spent

    def params(self) -> dict[str, Array]:
        """All parameters of the student."""
        return {**self.fixed, **self.progress.student}

    def advance(
        self, rows: Rows, targets: Targets, rate: float, part: float
    ) -> dict[str, Array]:
        """One step at a learning rate, when a fraction `part` is spent."""
        del part
        now = self.progress
        now.student, now.opt_state, found = self._step(
            now.student,
            at_rate(now.opt_state, rate),
            self.fixed,
            rows,
            targets,
        )
        return found

    def run(self) -> Iterator[dict[str, Any]]:
        """Runs until the budget is spent; yields the figures of every step."""
        now = self.progress
        while True:
            part = self.budget.progress(now.step, now.spent)
            if part >= 1:
                return
            number = self.sentences.number(now.step)
            rows = self.sentences.batch(number)
            targets = self._teacher(number, rows)
            rate = self._recipe.rate(part)
            found = self.advance(rows, targets, rate, part)
            figures = {k: float(v) for k, v in found.items()}
            now.step += 1
            now.spent = self.budget.clock() - self._began
            count = int(np.sum(rows.lists >= 0))
            yield {"progress": part, "rate": rate, "sentences": count, **figures}
