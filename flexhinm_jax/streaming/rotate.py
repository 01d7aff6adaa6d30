"""Writes a decoder directory in rotated channels, of which N:M loses less.

An orthogonal matrix on the residual stream and one per head on the values is absorbed
into the weights on both sides (`models.basis`): the function stays, and nothing is left
to do at run time. DenoiseRotator (arXiv:2505.23049) learns them by the entropy of the
importance of weights; here what the groups lose of the outputs is made smaller itself,
each weight at its cost to the optimal brain surgeon. That cost is of the function, so
that a basis cannot look better by raising importance as a whole.

Two passes over the blocks, one at a time, and learning in between: the first takes the
Gram matrices of what the products read, the second writes.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from flexhinm_jax import arguments, atomic
from flexhinm_jax.models.basis import (
    Basis,
    folded_block,
    of_heads,
    readers,
    turned,
    writers,
)
from flexhinm_jax.models.decoder_config import DecoderConfig
from flexhinm_jax.models.decoder_parameters import block_params
from flexhinm_jax.ops import gram
from flexhinm_jax.streaming.basis import calibrated, inverse, mean_gram, opened, write
from flexhinm_jax.streaming.blocks import Blocks
from flexhinm_jax.streaming.streaming import split

__all__ = ["Learning", "Rotated", "rotate"]


Turns = tuple[Array | None, Array]
"""Orthogonal matrices of the stream, or None, and of the heads of every block."""

MAX_HELD_BYTES = 1 << 30
"""Weights of blocks that take no more together are kept while rotations are learned."""

VALUES, OUTPUT = "self_attn.v_proj.weight", "self_attn.o_proj.weight"


@dataclasses.dataclass(frozen=True)
class Learning:
    """How rotations are learned.

    Attributes:
      steps: of Adam on the orthogonal matrices.
      rate: first learning rate, decayed to zero by a cosine.
      blocks: drawn for one step.
    """

    steps: int = 200
    rate: float = 0.01
    blocks: int = 5

    def __post_init__(self):
        """Validates the configuration."""
        arguments.configuration(self)
        arguments.count(self.steps, "steps", 1)
        arguments.count(self.blocks, "blocks", 1)
        arguments.positive(self.rate, "rate")


@dataclasses.dataclass(frozen=True)
class Rotated:
    """What `rotate` returns: shares of the outputs that N:M keeps, see `shares`.

    Attributes:
      before: {short name of a weight: mean over blocks}, channels as they were.
      after: the same in the rotated channels.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]


def rotate(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokens: np.ndarray,
    key: Array,
    *,
    n: int = 2,
    m: int = 4,
    learning: Learning | None = None,
    batch: int = 4,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Rotated:
    """Writes a decoder directory in rotated channels that suit N:M.

    In memory: the Gram matrices of all blocks, two of the width of the stream each, and
    one block of weights, which is read again for every step it is drawn in; or all
    blocks, read once, if that is little (`MAX_HELD_BYTES`). Embeddings that were tied
    are not in what is written, since the scale of the last norm moves into the head. A
    family whose norms scale what is written to the stream gets rotated heads alone.

    Args:
      directory: Hugging Face directory of a supported family.
      out: directory to write.
      tokens: i32[samples, length], the calibration text.
      key: PRNG key, consumed; draws the blocks of a step.
      n: kept of every m inputs.
      m: group size; divides the channels of the stream and of a head.
      learning: steps and rate; None for `Learning()`.
      batch: samples in one step of the first pass.
      overwrite: replaces an earlier model directory.
      progress: called with (blocks read and steps learned, both in all).

    Returns:
      What N:M keeps before and after.

    Raises:
      FileNotFoundError: a part of the directory is missing.
      FileExistsError: `out` exists and may not be replaced.
      InUse: another process writes `out`.
      ValueError: a directory that is not a supported decoder or is damaged, groups that
        do not divide the channels, tokens out of range.

    Source: DenoiseRotator, arXiv:2505.23049; SliceGPT, arXiv:2401.15024, section 3.
    """
    arguments.key(key)
    blocks = opened(directory, out, (n, m), overwrite)
    learning = learning or Learning()
    total = blocks.count + learning.steps
    done = itertools.count(1)

    def tell() -> None:
        if progress is not None:
            progress(next(done), total)

    batches = split(tokens, batch, blocks)
    with atomic.locked(out):
        learner = Learner(blocks, inputs_of(blocks, batches, tell), n, m)
        learned = learner.learn(key, learning, tell)
        write(blocks, Path(directory), Path(out), Basis(*learned), overwrite)
    return Rotated(learner.kept(*learner.start), learner.kept(*learned))


def folded(
    config: DecoderConfig, params: dict[str, Array], layer: int
) -> dict[str, Array]:
    """A block under short keys, with its norms in what reads them where they can be."""
    return params if config.sandwich_norms else folded_block(params, config, layer)


class Inputs(NamedTuple):
    """What counts about the inputs x of a weight W.

    Attributes:
      inverse: of G, the mean of x x^T, damped: f32[width, width] of the stream,
        f32[heads, size, size] within the heads that the output projection reads, or
        f32[intermediate], the diagonal, inside a gated block.
      energy: f32[], the mean of ||W x||^2, which no rotation changes.
    """

    inverse: Array
    energy: Array


def inputs_of(
    blocks: Blocks, batches: list[np.ndarray], tell: Callable[[], None]
) -> list[dict[str, Inputs]]:
    """Of every block: short name of a weight -> its inputs.

    Weights that read the same input share an inverse, and experts that of their mean.
    """
    config = blocks.config
    result = []
    for layer, params, stats in calibrated(blocks, batches, partial(folded, config)):
        grams = {name: mean_gram(own) for name, own in stats.items()}
        names, inverses = readers(config, layer), {}
        for group in (names[:3], names[3:]):
            known = [name for name in group if name in grams]
            if known:
                mean = jnp.mean(jnp.stack([grams[name] for name in known]), axis=0)
                inverses |= dict.fromkeys(known, inverse(mean))
        for name in set(writers(config, layer)) & set(grams):
            whole = inverse(grams[name])
            if name == OUTPUT:
                heads, size = config.num_attention_heads, config.head_size
                by_head = whole.reshape(heads, size, heads, size)
                inverses[name] = jnp.einsum("hihj->hij", by_head)
            else:
                inverses[name] = jnp.diagonal(whole)
        energies = {
            k: gram.energy(params[k].astype(jnp.float32), grams[k]) for k in inverses
        }
        result.append({k: Inputs(x, energies[k]) for k, x in inverses.items()})
        tell()
    return result


@partial(jax.jit, static_argnames=("form",))
def shares(
    stream: Array | None,
    heads: Array,
    weights: Mapping[str, Array],
    inputs: Mapping[str, Inputs],
    form: tuple[int, int],
) -> dict[str, Array]:
    """What is left of the outputs of the weights of a block when N:M is applied.

    A dropped weight costs w^2 / (G^-1)_jj, the rest of its row moved to make up for it
    (optimal brain surgeon), as if it were the only one.

    Args:
      stream: f32[hidden, hidden], orthogonal, or None for the channels as they are.
      heads: f32[kv, size, size], orthogonal.
      weights: short name -> f[out, in], norms folded in.
      inputs: see `inputs_of`, of the weights that count.
      form: (n, m).

    Returns:
      Short name -> f32[], 1 minus the cost over the energy.
    """
    n, m = form
    result = {}
    for name, (x, energy) in inputs.items():
        w = weights[name].astype(jnp.float32)
        if name == VALUES:
            w = of_heads(w, heads, 0)
        if name == OUTPUT:
            repeated = jnp.repeat(heads, len(x) // len(heads), axis=0)
            w = turned(of_heads(w, repeated, 1), stream, 0)
            scale = diagonal(x, repeated).reshape(-1)
        elif x.ndim == 1:
            w, scale = turned(w, stream, 0), x
        else:
            w, scale = turned(w, stream, 1), diagonal(x, stream)
        costs = jnp.square(w) / scale
        least = -jax.lax.top_k(-costs.reshape(len(w), -1, m), m - n)[0]
        result[name] = 1 - jnp.sum(least) / jnp.maximum(energy, 1e-30)
    return result


def diagonal(x: Array, basis: Array | None) -> Array:
    """The diagonal of R^T X R."""
    if basis is None:
        return jnp.diagonal(x, axis1=-2, axis2=-1)
    return jnp.sum(basis * (x @ basis), -2)


@partial(jax.jit, static_argnames=("form",))
def ascent(
    stream: Array | None,
    heads: Array,
    weights: Mapping[str, Array],
    inputs: Mapping[str, Inputs],
    form: tuple[int, int],
) -> tuple[Any, Array]:
    """Skew directions in which a block loses, as `shares`; sizes weigh the weights."""

    def lost(both: tuple[Any, Array]) -> Array:
        parts = shares(*both, weights, inputs, form)
        total = sum(weights[name].size for name in parts)
        weighed = [x * (weights[name].size / total) for name, x in parts.items()]
        return -jnp.sum(jnp.stack(weighed))

    both = stream, heads
    slopes = jax.grad(lost)(both)
    return jax.tree.map(lambda x, g: skew(jnp.swapaxes(x, -1, -2) @ g), both, slopes)


def skew(x: Array) -> Array:
    """The skew-symmetric part."""
    return (x - jnp.swapaxes(x, -1, -2)) / 2


def cayley(a: Array) -> Array:
    """The orthogonal matrix (I - A/2)^-1 (I + A/2) of a skew-symmetric one."""
    one = jnp.eye(a.shape[-1], dtype=a.dtype)
    return jnp.linalg.solve(one - a / 2, one + a / 2)


def orthogonal(x: Array) -> Array:
    """The nearest orthogonal matrix."""
    u, _, v = jnp.linalg.svd(x)
    return u @ v


class Learner:
    """Rotations of a decoder, and what N:M keeps in them."""

    def __init__(self, blocks: Blocks, inputs: list[dict[str, Inputs]], n: int, m: int):
        """Begins with the channels as they are; see `inputs_of` and `rotate`."""
        config = blocks.config
        self.blocks, self.inputs, self.form = blocks, inputs, (n, m)
        self.held: dict[int, dict[str, Array]] = {}
        heads = config.num_hidden_layers, config.num_key_value_heads
        one = jnp.eye(config.head_size, dtype=jnp.float32)
        stream = jnp.eye(config.hidden_size, dtype=jnp.float32)
        self.start: Turns = (
            None if config.sandwich_norms else stream,
            jnp.broadcast_to(one, (*heads, *one.shape)),
        )

    def of_block(self, function: Any, layer: int, stream: Any, heads: Array) -> Any:
        """`shares` or `ascent` of a block."""
        weights = self.weights(layer)
        return function(stream, heads[layer], weights, self.inputs[layer], self.form)

    def weights(self, layer: int) -> dict[str, Array]:
        """Those weights of a block that count, norms folded in."""
        if layer in self.held:
            return self.held[layer]
        own = block_params(self.blocks.load(layer), layer)
        own = folded(self.blocks.config, own, layer)
        weights = {name: own[name] for name in self.inputs[layer]}
        size = sum(x.nbytes for x in weights.values())
        if size * self.blocks.count <= MAX_HELD_BYTES:
            self.held[layer] = weights
        return weights

    def kept(self, stream: Array | None, heads: Array) -> dict[str, float]:
        """Mean over blocks of the share that N:M keeps, by short name."""
        shares_of: dict[str, list[float]] = {}
        for layer in range(self.blocks.count):
            parts = self.of_block(shares, layer, stream, heads)
            for name, value in parts.items():
                short_name = name.removesuffix(".weight")
                shares_of.setdefault(short_name, []).append(float(value))
        return {name: float(np.mean(values)) for name, values in shares_of.items()}

    def learn(self, key: Array, learning: Learning, tell: Callable[[], None]) -> Turns:
        """The learned rotations; see `rotate`."""
        count = self.blocks.count
        schedule = optax.cosine_decay_schedule(learning.rate, learning.steps)
        optimiser = optax.adam(schedule)
        product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

        @jax.jit
        def moved(both: Any, directions: Any, state: Any) -> Any:
            """One step on: Cayley's transform of Adam's, which stays skew."""
            updates, state = optimiser.update(directions, state)
            turn = jax.tree.map(lambda u: cayley(skew(u)), updates)
            return jax.tree.map(product, both, turn), state

        both: Any = self.start
        state = optimiser.init(both)
        for step in range(learning.steps):
            order = jax.random.permutation(jax.random.fold_in(key, step), count)
            sums = jax.tree.map(jnp.zeros_like, both)
            for layer in map(int, order[: learning.blocks]):
                stream, heads = self.of_block(ascent, layer, *both)
                added = None if stream is None else sums[0] + stream
                sums = added, sums[1].at[layer].set(heads)
            both, state = moved(both, sums, state)
            tell()
        return jax.tree.map(orthogonal, both)
