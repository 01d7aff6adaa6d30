"""Writes a decoder directory with its channels in an order that suits N:M groups.

The function stays, to the bit of every product's terms: an order of the residual
stream, of the values of every head and of the channels inside the gated block folds
into the weights on both sides (`models.basis`). What the order per matrix of
`NM(permute=ChannelSearch())` does at run time by a gather is done here once, in part:
inputs that several matrices share get one order for all of them. Prune what is written
with plain N:M, and nothing is gathered.

One block at a time is loaded: its own orders are searched at once, those of the stream
on a sample of the rows that read it, and a second pass writes.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import arguments, atomic
from flexhinm_jax.models import decoder
from flexhinm_jax.models.basis import Basis, readers
from flexhinm_jax.ops import regions
from flexhinm_jax.patterns import ChannelSearch
from flexhinm_jax.streaming.basis import calibrated, inverse, mean_gram, opened, write
from flexhinm_jax.streaming.blocks import Blocks
from flexhinm_jax.streaming.streaming import split
from flexhinm_jax.types import Stats

__all__ = ["Group", "Reordered", "reorder"]

STREAM_ROWS = 16_384
"""Rows of all readers together that the order of the stream is searched on."""


@dataclasses.dataclass(frozen=True)
class Group:
    """How N:M fits channels, before and after: shares of the costs that it keeps.

    Attributes:
      name: which channels: "stream", or the block and "heads" or "inner".
      before: in the order of the checkpoint.
      after: in the new order; never less.
    """

    name: str
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class Reordered:
    """What `reorder` returns.

    Attributes:
      groups: of the stream and of every block.
    """

    groups: tuple[Group, ...]

    def mean(self, name: str) -> tuple[float, float]:
        """(before, after), the mean over blocks; a name without the block."""
        chosen = [g for g in self.groups if g.name.rsplit(" ", 1)[-1] == name]
        return (
            float(np.mean([g.before for g in chosen])),
            float(np.mean([g.after for g in chosen])),
        )


def reorder(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokens: np.ndarray,
    key: Array,
    *,
    search: ChannelSearch | None = None,
    n: int = 2,
    m: int = 4,
    batch: int = 4,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Reordered:
    """Writes a decoder directory with its channels in better orders for N:M.

    Hidden states of the calibration text are held in memory, one block of weights at a
    time beside them.

    Args:
      directory: Hugging Face directory of a supported family.
      out: directory to write.
      tokens: i32[samples, length], the calibration text.
      key: PRNG key, consumed.
      search: how to search; None for `ChannelSearch()`.
      n: kept of every m inputs.
      m: group size; divides the inputs of every matrix that is to be pruned.
      batch: samples in one step.
      overwrite: replaces an earlier model directory.
      progress: called with (blocks looked at, blocks in all).

    Returns:
      What the orders keep of the costs of dropping weights (see `costs`) under N:M.
      Blocks with experts keep the orders inside them.

    Raises:
      FileNotFoundError: a part of the directory is missing.
      FileExistsError: `out` exists and may not be replaced.
      InUse: another process writes `out`.
      ValueError: a directory that is not a supported decoder or is damaged, groups that
        do not divide the channels of the stream or of a head, tokens out of range.

    Source: Pool and Yu, NeurIPS 2021 (channel permutation); Zhang et al. 2024, RIA.
    """
    arguments.key(key)
    blocks = opened(directory, out, (n, m), overwrite)
    find = Searching(key, search or ChannelSearch(), n, m)
    batches = split(tokens, batch, blocks)
    with atomic.locked(out):
        basis = searched(find, blocks, batches, progress or (lambda *done: None))
        write(blocks, Path(directory), Path(out), basis, overwrite)
    return Reordered(tuple(find.groups))


def searched(
    find: "Searching",
    blocks: Blocks,
    batches: list[np.ndarray],
    progress: Callable[[int, int], None],
) -> Basis:
    """The orders of all blocks, each searched on what the blocks before it give.

    Args:
      find: searches, and keeps what that gains.
      blocks: the opened directory.
      batches: i32[batch, length] each, the calibration text.
      progress: called with (blocks looked at, blocks in all).
    """
    orders: list[tuple[Array, Array]] = []
    sampled: list[np.ndarray] = []
    share = max(STREAM_ROWS // blocks.count, 1)
    for layer, params, stats in calibrated(blocks, batches):
        scores = costs(params, stats)
        orders.append(find.block(layer, scores, blocks.config))
        reading = [name for name in readers(blocks.config, layer) if name in scores]
        rows = np.concatenate([np.asarray(scores[name]) for name in reading])
        sampled.append(rows[:: max(len(rows) // share, 1)])
        progress(layer + 1, blocks.count)
    stream = find.best("stream", blocks.count, np.concatenate(sampled)[None])[0]
    heads, inner = (jnp.stack(part) for part in zip(*orders, strict=True))
    return Basis(stream, heads, inner)


def costs(params: Mapping[str, Array], stats: Mapping[str, Stats]) -> dict[str, Array]:
    """What dropping each weight alone costs, f32[out, in]: w^2 / (G^-1)_jj.

    The rest of its row moves to make up for it (optimal brain surgeon).

    Args:
      params: short name -> f[out, in].
      stats: of the weights that count; those that read the same input share theirs.
    """
    by_input = {id(own): own for own in stats.values()}
    scales = {k: jnp.diagonal(inverse(mean_gram(x))) for k, x in by_input.items()}
    return {
        name: jnp.square(params[name].astype(jnp.float32)) / scales[id(own)]
        for name, own in stats.items()
    }


class Searching:
    """Searches orders, and remembers what they keep."""

    def __init__(self, key: Array, search: ChannelSearch, n: int, m: int):
        """See `reorder`."""
        self.key, self.search, self.n, self.m = key, search, n, m
        self.groups: list[Group] = []

    def best(self, name: str, number: int, tiles: Any) -> Array:
        """The best order of the columns of every tile.

        Args:
          name: of the channels.
          number: which search it is; decides about its key.
          tiles: f32[tiles, rows, channels].

        Returns:
          i32[tiles, channels].
        """
        tiles = jnp.asarray(tiles, jnp.float32)
        count, _, size = tiles.shape
        none, h = jnp.zeros((), jnp.int32), jnp.asarray(size // self.m, jnp.int32)
        natural = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (count, size))
        start = regions.Columns(natural, none, h, self.n, self.m)
        key = jax.random.fold_in(self.key, number)
        order = self.search.columns(key, tiles, start).order
        kept = [self.kept(tiles, each) for each in (natural, order)]
        self.groups.append(Group(name, *kept))
        return order

    def kept(self, tiles: Array, order: Array) -> float:
        """Share of the scores that N:M keeps in an order."""
        ordered = jnp.take_along_axis(tiles, order[:, None, :], axis=2)
        rows = ordered.reshape(-1, ordered.shape[2])
        best = jnp.sort(rows.reshape(len(rows), -1, self.m), axis=-1)[..., -self.n :]
        return float(jnp.sum(best) / jnp.maximum(jnp.sum(rows), 1e-30))

    def block(
        self, layer: int, scores: Mapping[str, Array], config: decoder.DecoderConfig
    ) -> tuple[Array, Array]:
        """The orders of the values of the heads of a block and of its gated block."""
        count, size = config.num_key_value_heads, config.head_size
        heads = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (count, size))
        inner = jnp.arange(config.intermediate_size, dtype=jnp.int32)
        first = 2 * config.num_hidden_layers + 2 * layer
        output = scores.get("self_attn.o_proj.weight")
        if output is not None:
            by_head = output.reshape(output.shape[0], count, -1, size)
            tiles = jnp.moveaxis(by_head, 0, 2).reshape(count, -1, size)
            heads = self.best(f"{layer} heads", first, tiles)
        down = scores.get("mlp.down_proj.weight")
        if down is not None and down.shape[1] % self.m == 0:
            inner = self.best(f"{layer} inner", first + 1, down[None])[0]
        return heads, inner
