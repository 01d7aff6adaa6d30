"""A decoder directory as blocks that are loaded one at a time.

Only headers are read when it is opened. A block is a pure function of the hidden
states; its parameters keep the keys of the checkpoint, so that a leaf is known by the
same name, and is given the same random key, as in the whole model.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import checks
from flexhinm_jax.io import huggingface, shards, tensors
from flexhinm_jax.models import decoder
from flexhinm_jax.models.decoder_parameters import TABLE
from flexhinm_jax.tracing.discover import Traced, check_reached, choose, uses_of
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Uses

OUTSIDE = "outside the blocks: copied unchanged"
"""Why what is no parameter of a block is skipped."""

Dtype = Literal["checkpoint", "float32"]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """An opened decoder directory.

    Attributes:
      config: sizes.
      index: where every array is.
      contents: of `config.json`.
      dtype: what to compute in: that of the checkpoint, or float32.
    """

    config: decoder.DecoderConfig
    index: shards.Index
    contents: dict[str, Any]
    dtype: Dtype = "checkpoint"

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def keys(self, layer: int) -> list[str]:
        """Keys of the parameters of a block."""
        prefix = decoder.block_prefix(layer)
        return [prefix + name for name in decoder.block_shapes(self.config, layer)]

    def like(self, layer: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters of a block, as they are computed with."""
        return {
            key: jax.ShapeDtypeStruct(self.index.shape(key), self.computed(key))
            for key in self.keys(layer)
        }

    def stored(self, key: str) -> np.dtype:
        """Dtype of an array in the checkpoint."""
        return tensors.DTYPES[self.index.dtype(key)]

    def computed(self, key: str) -> np.dtype:
        """Dtype in which an array is computed with."""
        if self.dtype == "float32":
            return np.dtype(np.float32)
        return self.stored(key)

    def load(self, layer: int) -> dict[str, Array]:
        """The parameters of a block, on the device.

        Raises:
          ValueError: NaN or infinity in one of them.
        """
        return {key: self.array(key) for key in self.keys(layer)}

    def array(self, key: str) -> Array:
        """One array on the device, in the dtype that is computed with."""
        stored = self.index.read(key)
        checks.finite(stored, "weight", key)
        return jnp.asarray(stored.astype(self.computed(key), copy=False))

    def apply(self, layer: int) -> Callable[[Mapping[str, Any], Any], Any]:
        """Block `layer` as a function of (parameters, hidden states)."""

        def run(params: Mapping[str, Any], h: Any) -> Any:
            return decoder.block(
                decoder.block_params(params, layer), h, self.config, layer
            )

        return run

    def embedded(self, batches: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Hidden states before the first block.

        Only the rows of the table that occur are read.

        Args:
          batches: i32[batch, length] each.

        Raises:
          ValueError: NaN or infinity in one of these rows.
        """
        used, place = np.unique(np.stack(batches), return_inverse=True)
        rows = np.asarray(self.index.read(TABLE)[used])
        checks.finite(rows, "a row that the text uses", TABLE)
        config = dataclasses.replace(self.config, vocab_size=len(used))
        table = {TABLE: jnp.asarray(rows.astype(self.computed(TABLE)))}
        run = jax.jit(functools.partial(decoder.embed, config=config))
        for tokens in place.reshape(len(batches), *batches[0].shape):
            yield np.asarray(run(table, jnp.asarray(tokens, jnp.int32)))

    def uses(
        self,
        rules: Mapping[str, Any] | None,
        fit: Callable[[Uses], Uses] = lambda uses: uses,
    ) -> "BlockUses":
        """What is prunable in every block; routers of experts never are.

        Args:
          rules: {regex: pattern, "skip" or "prune"} on the keys of the checkpoint.
          fit: the uses of a block -> those of the leaves that the pattern fits.

        Raises:
          ValueError: a rule that matches nothing, or whose arrays can all not be
            pruned, as those outside the blocks.
        """
        rules = decoder.rules(self.config) | dict(rules or {})
        chosen = choose(rules, list(self.index.files))
        uses = BlockUses(self, chosen, fit)
        if any(action != "skip" for action in rules.values()):
            found = [uses.found(layer) for layer in range(self.count)]
            pruned = {path for one in found for path in one.leaves}
            skipped = {key: OUTSIDE for key in self.index.files if key not in pruned}
            for one in found:
                skipped |= one.skipped
            check_reached(rules, chosen, skipped)
        return uses


@dataclasses.dataclass(frozen=True)
class BlockProgram:
    """What blocks of one kind share, under short keys.

    Attributes:
      apply: (parameters, hidden states) -> hidden states.
      parts: the same -> those behind the attention and behind the block.
      run: the same, compiled.
      uses: what is prunable.
    """

    apply: Callable[[Mapping[str, Any], Array], Array]
    parts: Callable[[Mapping[str, Any], Array], tuple[Array, Array]]
    run: Callable[[Mapping[str, Any], Array], Array]
    uses: Uses


class BlockUses:
    """The uses of every block, traced once per set of rules that applies."""

    def __init__(
        self,
        blocks: Blocks,
        chosen: Mapping[str, tuple[str, Any]],
        fit: Callable[[Uses], Uses],
    ):
        """Keeps key -> (rule, action), and what leaves the misfits out."""
        self.blocks, self.chosen, self.fit = blocks, chosen, fit
        self.known: dict[Any, Uses] = {}
        self.programs: dict[Any, BlockProgram] = {}

    @property
    def actions(self) -> dict[str, Any]:
        """Key -> action, whatever the rules are called."""
        return {key: action for key, (_, action) in self.chosen.items()}

    def kind(self, layer: int) -> tuple:
        """Equal for blocks that do the same and to which the same rules apply."""
        prefix = decoder.block_prefix(layer)
        return self.blocks.config.layer(layer), tuple(
            (key.removeprefix(prefix), self.chosen[key])
            for key in self.blocks.keys(layer)
            if key in self.chosen
        )

    def kinds(self) -> dict[Any, int]:
        """Kind -> the first block of it."""
        kinds: dict[Any, int] = {}
        for layer in range(self.blocks.count):
            kinds.setdefault(self.kind(layer), layer)
        return kinds

    def of(self, layer: int) -> Uses:
        """The uses of a block under the keys of the checkpoint."""
        prefix = decoder.block_prefix(layer)
        return renamed(self.program(layer).uses, lambda key: prefix + key)

    def found(self, layer: int) -> Uses:
        """The uses of a block under the keys of the checkpoint, misfits among them."""
        kind, prefix = self.kind(layer), decoder.block_prefix(layer)
        if kind not in self.known:
            width, dtype = self.blocks.config.hidden_size, self.blocks.computed(TABLE)
            h = jax.ShapeDtypeStruct((1, 8, width), dtype)
            leaves = Leaves.of(self.blocks.like(layer))
            finder = Traced(self.blocks.apply(layer)).find(leaves, (h,))
            uses = uses_of(finder, leaves, self.chosen)
            self.known[kind] = renamed(uses, lambda key: key.removeprefix(prefix))
        return renamed(self.known[kind], lambda key: prefix + key)

    def program(self, layer: int) -> BlockProgram:
        """The program of a block, one object for all blocks of its kind."""
        kind, prefix = self.kind(layer), decoder.block_prefix(layer)
        if kind not in self.programs:
            config, uses = self.blocks.config, self.fit(self.found(layer))
            apply = functools.partial(decoder.block, config=config, layer=layer)
            self.programs[kind] = BlockProgram(
                apply,
                functools.partial(decoder.parts, config=config, layer=layer),
                jax.jit(apply),
                renamed(uses, lambda key: key.removeprefix(prefix)),
            )
        return self.programs[kind]


def renamed(uses: Uses, name: Callable[[str], str]) -> Uses:
    """The same uses under other keys.

    Args:
      uses: of a block.
      name: key -> new key.
    """
    return Uses(
        tuple(
            dataclasses.replace(
                use,
                path=name(use.path),
                bias=None if use.bias is None else name(use.bias),
            )
            for use in uses
        ),
        {name(key): reason for key, reason in uses.skipped.items()},
        {name(key): size for key, size in uses.dense.items()},
    )


def open_blocks(directory: Path, dtype: Dtype = "checkpoint") -> Blocks:
    """Opens a decoder directory; reads its config and the headers of its weights.

    Args:
      directory: Hugging Face directory of a supported family.
      dtype: what to compute in.

    Raises:
      FileNotFoundError: the directory or a part of it is missing.
      ValueError: an architecture that is not supported, tensors that are missing, not
        known or of another shape than the configuration says, a truncated shard, or
        weights that are not floating-point.
    """
    if dtype not in ("checkpoint", "float32"):
        raise ValueError(f"dtype={dtype!r}: choose 'checkpoint' or 'float32'")
    directory = Path(directory)
    contents = huggingface.read_config(directory)
    try:
        config = decoder.DecoderConfig.from_dict(contents)
    except ValueError as error:
        raise ValueError(f"{directory / huggingface.CONFIG}: {error}") from error
    index = shards.read_index(directory)
    stored = {
        key: (index.shape(key), tensors.DTYPES.get(index.dtype(key), index.dtype(key)))
        for key in index.files
    }
    decoder.check_directory(directory, stored, config)
    return Blocks(config, index, contents, dtype)
