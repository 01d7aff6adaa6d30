"""What a pruned encoder is trained towards: the dense one, its teacher.

The student has to give the teacher's sentence embeddings and, layer by layer, its
hidden states (TinyBERT, arXiv:1909.10351, without projections: both have the same
width), on unlabeled sentences.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax.models.encoder import EncoderConfig
from train.lab import optimizers, packing
from train.lab.packing import Precision, Rows


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to recover.

    Attributes:
      learning_rate: peak of Adam's.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      warmup: fraction of the budget in which the rate rises to its peak; from there it
        follows a cosine to 0.
      rows: packed rows of `length` tokens in a step.
      length: tokens in a row; longer sentences are left out.
      cosine: weight of 1 - cosine of the embeddings.
      hidden: weight of the relative squared errors of the hidden states, summed over
        layers.
      vector_rate: learning rate of biases and norms relative to that of matrices.
      precision: of the matrix products of student and teacher.
      cache_bytes: teacher states kept in memory; others are computed again when their
        sentences come again.
      seed: of packing and order.
    """

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.99
    warmup: float = 0.04
    rows: int = 8
    length: int = 64
    cosine: float = 3.0
    hidden: float = 1.0
    vector_rate: float = 1.0
    precision: Precision = "bfloat16"
    cache_bytes: int = 3 << 30
    seed: int = 0

    def __post_init__(self):
        """Validates the fields."""
        if self.precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise ValueError(f"precision={self.precision!r}; known: {known}")
        for name in ("rows", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "vector_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("b1", "b2", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")

    def rate(self, progress: float) -> float:
        """The learning rate when a fraction `progress` of the budget is spent."""
        return optimizers.warm_cosine(progress, self.learning_rate, self.warmup)


class Targets(NamedTuple):
    """What the teacher says about packed rows.

    Attributes:
      states: bf16[rows, length, hidden] behind every layer.
      embeddings: f32[rows, slots, hidden].
    """

    states: list[Array]
    embeddings: Array


class Sentences:
    """Packed rows in steps, in an order that is a function of the seed and the step."""

    def __init__(self, token_lists: Sequence[Sequence[int]], recipe: Recipe):
        """Packs the sentences.

        Args:
          token_lists: token ids, one list a sentence; too long ones are left out.
          recipe: rows of a step, their length, and the seed.

        Raises:
          ValueError: the sentences do not fill the rows of one step.
        """
        sizes = np.array([len(tokens) for tokens in token_lists], np.int64)
        fits = np.flatnonzero((sizes > 0) & (sizes <= recipe.length))
        self._seed = recipe.seed
        generator = np.random.default_rng(recipe.seed)
        order = generator.permutation(fits)
        self.rows = packing.pack_rows(token_lists, order, length=recipe.length)
        count = len(self.rows.tokens)
        self.count = count // recipe.rows
        if self.count == 0:
            raise ValueError(
                f"{len(fits)} of {len(sizes)} sentences have at most {recipe.length} "
                f"tokens and fill {count} rows; a step takes {recipe.rows}: give more "
                "sentences or fewer rows"
            )
        # Rows that were packed together would otherwise follow each other.
        mixed = generator.permutation(count)[: self.count * recipe.rows]
        self._members = mixed.reshape(self.count, recipe.rows)
        self.used = int(np.sum(self.rows.lists[mixed] >= 0))

    def number(self, step: int) -> int:
        """Which batch a step takes: every one once before any comes again."""
        epoch, at = divmod(step, self.count)
        return int(_order(self._seed, epoch, self.count)[at])

    def batch(self, number: int) -> Rows:
        """The rows of a batch."""
        return packing.take(self.rows, self._members[number])


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


class Teacher:
    """The dense model, asked once per batch as far as memory goes."""

    def __init__(self, params: Any, config: EncoderConfig, recipe: Recipe):
        """Compiles nothing yet.

        Args:
          params: the dense parameters.
          config: sizes.
          recipe: precision and bytes to keep.
        """
        self._params, self._config, self._precision = params, config, recipe.precision
        self._left = recipe.cache_bytes
        self._known: dict[int, Targets] = {}

    def __call__(self, number: int, rows: Rows) -> Targets:
        """The targets of batch `number`, whose rows are given."""
        if number in self._known:
            return self._known[number]
        targets = _targets(self._params, rows, self._config, self._precision)
        size = sum(x.nbytes for x in jax.tree.leaves(targets))
        if size <= self._left:
            self._left -= size
            self._known[number] = targets
        return targets


@functools.partial(jax.jit, static_argnums=(2, 3))
def _targets(
    params: Any, rows: Rows, config: EncoderConfig, precision: Precision
) -> Targets:
    found = packing.hidden_states(params, rows, config, precision)
    states = [h.astype(jnp.bfloat16) for h in found]
    return Targets(states, packing.pool(found[-1], rows))


def loss_of(
    params: Any, rows: Rows, targets: Targets, config: EncoderConfig, recipe: Recipe
) -> tuple[Array, dict[str, Array]]:
    """How far a student is from its teacher.

    Returns:
      The loss, f32[], and its parts: the mean cosine of the embeddings, and the
      relative squared error of the hidden states summed over layers.
    """
    states = packing.hidden_states(params, rows, config, recipe.precision)
    real = (rows.slots >= 0)[..., None]
    hidden = jnp.zeros((), jnp.float32)
    for found, wanted in zip(states, targets.states, strict=True):
        target = jnp.where(real, wanted.astype(jnp.float32), 0.0)
        error = jnp.where(real, found, 0.0) - target
        hidden += jnp.sum(error**2) / jnp.sum(target**2)
    there = rows.lists >= 0
    cosines = jnp.sum(packing.pool(states[-1], rows) * targets.embeddings, axis=-1)
    cosine = jnp.sum(jnp.where(there, cosines, 0.0)) / jnp.sum(there)
    loss = recipe.cosine * (1 - cosine) + recipe.hidden * hidden
    return loss, {"cosine": cosine, "hidden": hidden}
