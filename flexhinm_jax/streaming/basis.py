"""What `reorder` and `rotate` share: a directory read by blocks, written in a basis.

The same function in other channels (`models.basis`): one block at a time is loaded,
first to see what its products read, then to be written.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import atomic
from flexhinm_jax.io import huggingface, model_card, shards, tensors
from flexhinm_jax.models import decoder
from flexhinm_jax.models.basis import Basis, turned_block, turned_ends
from flexhinm_jax.models.decoder_parameters import HEAD, NORM, TABLE
from flexhinm_jax.ops import gram
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.streaming.blocks import Blocks, open_blocks
from flexhinm_jax.types import Stats

__all__ = ["calibrated", "inverse", "mean_gram", "opened", "write"]

#: Of a Gram matrix, damped as SparseGPT does.
inverse = functools.partial(gram.inverse, damp=0.01)


def opened(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    form: tuple[int, int],
    overwrite: bool,
) -> Blocks:
    """The blocks of a directory whose channels shall be written in another basis.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: see `reorder`.
    """
    huggingface.check_place(out, overwrite=overwrite)
    huggingface.check_copy(Path(directory), Path(out))
    if model_card.is_pruned(Path(directory)):
        raise ValueError(
            f"{directory} is pruned already, as its {model_card.REPORT} says, and in"
            " other channels its zeros are lost or lie in other groups; give the model"
            " before pruning, and prune what is written"
        )
    blocks, (n, m) = open_blocks(Path(directory)), form
    sizes = {"stream": blocks.config.hidden_size, "heads": blocks.config.head_size}
    for name, size in sizes.items():
        if size % m:
            raise ValueError(
                f"{n}:{m} does not divide the {size} channels of the {name}; choose"
                " another group size"
            )
    return blocks


def calibrated(
    blocks: Blocks,
    batches: list[np.ndarray],
    change: Callable[[dict[str, Array], int], dict[str, Array]] = lambda own, layer: (
        own
    ),
) -> Iterator[tuple[int, dict[str, Array], dict[str, Stats]]]:
    """The statistics of all blocks, each on what the blocks before it give.

    Args:
      blocks: the opened directory.
      batches: i32[batch, length] each, the calibration text.
      change: (parameters of a block under short keys, its number) -> those of the same
        function to look at.

    Yields:
      Number of a block, its parameters, short key -> statistics.
    """
    hidden = list(blocks.embedded(batches))
    uses = blocks.uses(None)
    for layer in range(blocks.count):
        program = uses.program(layer)
        params = change(decoder.block_params(blocks.load(layer), layer), layer)
        inputs = [(h,) for h in hidden]
        yield layer, params, calibrate(program.apply, params, program.uses, inputs)
        hidden = [np.asarray(program.run(params, jnp.asarray(h))) for h in hidden]


def mean_gram(stats: Stats) -> Array:
    """f32[i, i]: the mean of x x^T over the tokens."""
    assert stats.gram is not None
    return stats.gram / jnp.maximum(stats.count, 1)


def write(
    blocks: Blocks,
    source: Path,
    out: Path,
    basis: Basis,
    overwrite: bool,
) -> None:
    """Writes the directory in a basis, one array after the other."""
    config, index = blocks.config, blocks.index
    untied = basis.turns_stream and config.tie_word_embeddings
    if untied and HEAD not in index.files:
        index = index.with_array(HEAD, TABLE)
    with atomic.directory(out, overwrite=overwrite) as folder:
        huggingface.copy_others(source, folder)
        if untied:
            text = blocks.contents | {"tie_word_embeddings": False}
            (folder / huggingface.CONFIG).write_text(json.dumps(text, indent=2) + "\n")
        writer = shards.Writer(folder, index)
        written = set()

        def put(key: str, leaf: Array) -> None:
            writer.put(key, np.asarray(leaf).astype(tensors.DTYPES[index.dtype(key)]))
            written.add(key)

        for layer in range(blocks.count):
            at, keys = decoder.block_prefix(layer), blocks.keys(layer)
            own = decoder.block_params({key: read(blocks, key) for key in keys}, layer)
            block = turned_block(own, config, layer, basis)
            for name, leaf in block.items():
                put(at + name, leaf)
        ends = (key for key in (TABLE, NORM, HEAD) if key in blocks.index.files)
        stored = {key: read(blocks, key) for key in ends}
        for key, leaf in turned_ends(stored, config, basis).items():
            put(key, leaf)
        for key in set(index.files) - written:
            writer.copy(key)
        writer.finish()


def read(blocks: Blocks, key: str) -> Array:
    """One array in float32, which holds what is stored and is rounded once."""
    return jnp.asarray(blocks.index.read(key).astype(np.float32))
