"""The frozen pytrees that the layers hand to each other.

Letters used in every shape: `o` outputs, `i` inputs, `v` vector size (rows of a tile),
`t = o / v` tiles, `n` weights kept of `m`, `k` blocks of side `b`. A matrix is
`[o, i]`; groups of `m` run along `i`. A stack of matrices has the same fields with
leading axes.

These classes carry data and never validate: `__post_init__` of a pytree also runs on
unflatten, with tracers, strings and None as leaves. `checks` holds the validation.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import Array, export

__all__ = [
    "AxisFactor",
    "BlockDiagonal",
    "Layout",
    "PackedWeight",
    "Plan",
    "Regions",
    "State",
    "Stats",
    "Support",
    "TransposedWeight",
    "Use",
    "Uses",
]


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the tree structure instead of a leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


class _Text(str):
    """Text that shows itself without quotes."""

    __repr__ = str.__str__


def brief(self: Any) -> str:
    """The `repr` of a dataclass with dtype and shape in the place of every array.

    Reads no array, so tracers and `jax.ShapeDtypeStruct`s show themselves as well.
    Fields without a leaf are left out.
    """

    def named(x: Any) -> Any:
        array = isinstance(getattr(x, "shape", None), tuple) and hasattr(x, "dtype")
        return _Text(f"{x.dtype}{list(x.shape)}") if array else x

    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr}
    shown = [
        f"{k}={jax.tree.map(named, x)!r}"
        for k, x in fields.items()
        if jax.tree.leaves(x)
    ]
    return f"{type(self).__name__}({', '.join(shown)})"


def exportable(cls: Any) -> Any:
    """Lets `jax.export` write programs whose arguments or results are of this class.

    Static fields are written as JSON, so they may hold numbers, strings, None, tuples
    and the descriptions of leaves in this file.
    """
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"flexhinm_jax.{cls.__name__}",
        serialize_auxdata=lambda fields: json.dumps(_described(fields)).encode(),
        deserialize_auxdata=lambda text: _restored(json.loads(bytes(text))),
    )
    return cls


def _described(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        described = {name: _described(field) for name, field in fields.items()}
        return {"class": type(value).__name__, **described}
    return list(map(_described, value)) if isinstance(value, tuple) else value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        cls = {c.__name__: c for c in (AxisFactor, Layout)}[value.pop("class")]
        return cls(**{name: _restored(field) for name, field in value.items()})
    return tuple(map(_restored, value)) if isinstance(value, list) else value


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Regions:
    """Where the dense, N:M and pruned columns of every row tile are.

    The boundaries are arrays, so a new sparsity target does not retrace; they become
    Python integers only in `kernels.pack`. Plain N:M has one tile, `dense_end = 0` and
    `nm_end = i`; vector pruning has `nm_end = dense_end`; HiNM has `dense_end = 0`.

    Attributes:
      out_order: i32[o], the original row at storage row r. Tile t owns the storage rows
        t * v .. t * v + v - 1.
      in_order: i32[t, i], per tile the original column at each position: the dense
        columns, then the N:M columns in groups of m, then the pruned ones. Every row
        is a permutation of arange(i).
      dense_end: i32[t], number of dense columns.
      nm_end: i32[t], number of dense and N:M columns; nm_end - dense_end is a multiple
        of m.
      n: kept of each group of m.
      m: group size.
    """

    out_order: Array
    in_order: Array
    dense_end: Array
    nm_end: Array
    n: int = static()
    m: int = static()

    __repr__ = brief


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Support:
    """Which weights stay.

    Attributes:
      keep: bool[o, i], True where a weight stays, in the ORIGINAL channel order.
      regions: the structure that packing needs, or None for an unstructured support.
    """

    keep: Array
    regions: Regions | None = None

    __repr__ = brief


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
    """A block-diagonal square matrix, in natural or in a given channel order.

    Attributes:
      blocks: [k, b, b]; block j maps the channels at positions j * b .. j * b + b - 1
        to themselves.
      order: i32[k * b], the original channel now at each position, or None for the
        natural order.
    """

    blocks: Array
    order: Array | None = None

    __repr__ = brief

    @property
    def T(self) -> "BlockDiagonal":
        """The transpose, in the same order."""
        return BlockDiagonal(self.blocks.swapaxes(-1, -2), self.order)


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The pruned form of one matrix: what `densify` and `pack` read.

    The matrix is `left @ weight @ right`, where a missing factor is the identity.

    Attributes:
      weight: [o, i], the sparse core in original channel order, zero outside
        `support.keep`.
      support: which weights stay.
      retained: f32[], share of the total saliency that the support keeps, in [0, 1].
      bias: [o], a correction refitted with the weight, to be added to the bias of the
        layer, or None.
      left: square [o, o] block-diagonal factor, or None.
      right: square [i, i] block-diagonal factor, or None.
    """

    weight: Array
    support: Support
    retained: Array
    bias: Array | None = None
    left: BlockDiagonal | None = None
    right: BlockDiagonal | None = None

    __repr__ = brief


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a method found for one matrix.

    Attributes:
      learned: the pytree an optimiser may move; () for a one-shot method.
      fixed: the pytree that `solve` computed.
    """

    learned: Any
    fixed: Any

    __repr__ = brief


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of the inputs x of one weight over `count` calibration tokens.

    Attributes:
      sq_norm: f32[i], sum over tokens of x_j^2: the squared norm of input channel j.
      mean: f32[i], mean over tokens of x_j.
      count: f32[], number of tokens.
      gram: f32[i, i], X^T X summed over tokens, or None when only norms were taken.
      cross: f32[o, i], T^T X for targets T that differ from X W^T, or None.
      target_mean: f32[o], mean of those targets, or None.
      sq_grad: f32[o, i], sum over samples of the squared gradient of the loss, or None.
      fisher: f32[o, i / b, b, b], sum of g g^T over blocks of b consecutive inputs, or
        None.
      order: i32[i], an input order to solve in, shared with the other weights that read
        the same input (`pruning.share_orders`), or None.
    """

    sq_norm: Array
    mean: Array
    count: Array
    gram: Array | None = None
    cross: Array | None = None
    target_mean: Array | None = None
    sq_grad: Array | None = None
    fisher: Array | None = None
    order: Array | None = None

    __repr__ = brief


@dataclasses.dataclass(frozen=True, order=True)
class AxisFactor:
    """`size` steps of `stride` along one axis of a leaf: an axis, or a factor of one.

    Attributes:
      axis: axis of the leaf.
      stride: distance of two neighbours, in positions of that axis.
      size: number of positions.
    """

    axis: int
    stride: int
    size: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a parameter leaf is read as a stack of matrices `[*stack, o, i]`.

    Each group lists leaf axes (or factors of one) in the order in which the matrix has
    them, major first: in leaf order, but for the inputs of a convolution, which are
    positions of the kernel, then input channels, whatever the order of the leaf. Unit
    axes belong to no group. A Flax Dense kernel `[in, out]` has `out = (axis 1,)` and
    `inputs = (axis 0,)`; convolutions HWIO and OIHW both have `inputs = (H, W, I)`.

    Attributes:
      shape: shape of the leaf.
      stack: axes over which matrices are stacked (scanned layers, experts, groups).
      out: output axes.
      inputs: contracted axes.
    """

    shape: tuple[int, ...]
    stack: tuple[AxisFactor, ...]
    out: tuple[AxisFactor, ...]
    inputs: tuple[AxisFactor, ...]

    @functools.cached_property
    def stack_shape(self) -> tuple[int, ...]:
        """Leading axes of the matrix form; () for a single matrix."""
        return tuple(f.size for f in self.stack)

    @functools.cached_property
    def matrix_shape(self) -> tuple[int, int]:
        """(o, i) of one matrix."""
        o, i = (math.prod(f.size for f in side) for side in (self.out, self.inputs))
        return o, i

    @functools.cached_property
    def transposed(self) -> "Layout":
        """The layout with inputs and outputs exchanged."""
        return dataclasses.replace(self, out=self.inputs, inputs=self.out)


@dataclasses.dataclass(frozen=True)
class ChannelScale:
    """A leaf that a program multiplies another one with, element by element.

    Attributes:
      path: leaf path of the scale.
      factors: (factor of the scaled leaf, factor of the scale), for all of the scale.
    """

    path: str
    factors: tuple[tuple[AxisFactor, AxisFactor], ...]


@dataclasses.dataclass(frozen=True)
class Use:
    """One contraction in which a parameter leaf takes part.

    Attributes:
      path: leaf path, normalised ("encoder/0/kernel"); names the leaf everywhere.
      ordinal: 0 for the first use of the leaf, 1 for the second, ...
      layout: the matrix view of the leaf in this use.
      at: static stack index per stack axis of an unrolled stack (`w[2]`), None where
        the whole axis takes part.
      source: uses with the same number contract the same input: they share statistics.
      bias: path of the parameter that is added to the output of this use, or None.
      pattern: a pattern that a rule asks for instead of the method's own, or None.
      scale: what a leaf of eight bits, or its product, is multiplied with, or None.
      bias_factor: the constant that the program multiplies the bias with.
    """

    path: str
    ordinal: int
    layout: Layout
    at: tuple[int | None, ...] = ()
    source: int = 0
    bias: str | None = None
    pattern: Any = None
    scale: ChannelScale | None = dataclasses.field(default=None, repr=False)
    bias_factor: float = dataclasses.field(default=1.0, repr=False)

    @property
    def key(self) -> tuple[str, int]:
        """(path, ordinal): identifies the use, and its statistics before merging."""
        return self.path, self.ordinal


@dataclasses.dataclass(frozen=True)
class Uses:
    """What `discover` found: every leaf is either prunable or skipped for a reason.

    Attributes:
      prunable: all uses of the leaves that can be pruned, in order of execution.
      skipped: leaf path -> reason, for every other leaf.
      dense: leaf path -> weights, for those of the skipped leaves that are floating and
        have two or more axes: what pruning might have reached.
    """

    prunable: tuple[Use, ...]
    skipped: dict[str, str]
    dense: dict[str, int] = dataclasses.field(default_factory=dict)

    def without(self, reasons: dict[str, str]) -> "Uses":
        """The same uses with some leaves skipped: leaf path -> reason."""
        leaves = self.leaves
        sizes = {path: math.prod(leaves[path].layout.shape) for path in reasons}
        kept = tuple(use for use in self if use.path not in reasons)
        return Uses(kept, self.skipped | reasons, self.dense | sizes)

    def __iter__(self) -> Iterator[Use]:
        """Iterates over the prunable uses in order of execution."""
        return iter(self.prunable)

    def __len__(self) -> int:
        """Number of prunable uses."""
        return len(self.prunable)

    def __repr__(self) -> str:
        """Counts and the share of the weights; `describe` lists every leaf."""
        pruned = sum(math.prod(use.layout.shape) for use in self.leaves.values())
        share = pruned / max(pruned + sum(self.dense.values()), 1)
        return (
            f"Uses(leaves={len(self.leaves)}, uses={len(self)}, "
            f"skipped={len(self.skipped)}, coverage={share:.2%})"
        )

    @functools.cached_property
    def leaves(self) -> dict[str, Use]:
        """Leaf path -> first use, for every prunable leaf in order of execution."""
        first: dict[str, Use] = {}
        for use in self.prunable:
            first.setdefault(use.path, use)
        return first

    @functools.cached_property
    def biases(self) -> dict[str, tuple[str, float]]:
        """Leaf path -> its bias and the constant that the program multiplies that with.

        Only where a bias can be refitted: all uses of the leaf have the same, times the
        same, and no other leaf has it.
        """
        found: dict[str, set[tuple[str | None, float]]] = {}
        owners: dict[str | None, set[str]] = {}
        for use in self.prunable:
            found.setdefault(use.path, set()).add((use.bias, use.bias_factor))
            owners.setdefault(use.bias, set()).add(use.path)
        return {
            path: (name, factor)
            for path, biases in found.items()
            for name, factor in biases
            if name is not None and len(biases) == len(owners[name]) == 1
        }


def _kernels() -> Any:
    """The room of the products, far above this one: imported when an operator runs."""
    from flexhinm_jax import kernels

    return kernels


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight in run-time form: gathered columns, values and positions per row tile.

    `D` dense and `H` N:M columns per tile are static; a tile with fewer dense columns
    holds N:M groups there, with their zeros, and what is left is padding, index 0 and
    value 0. A stack of matrices has the same leading axes on every array. No array is
    empty: without dense columns the first two are None, without N:M columns the next
    three; a weight without any has one column of padding.

    Attributes:
      dense_index: i32[t, D], original input of each dense column, or None.
      dense_values: [t, v, D], or None.
      nm_index: i32[t, H], original input of each N:M column, or None; m in a row form a
        group.
      nm_values: [t, v, H / m * n], the kept values of each group, by position, or None.
      nm_positions: u32[t, v, words], which positions of each group the kept values
        have, strictly increasing, also where the values are zero: two bits each for
        2:4, else one rank per group (`kernels.positions`). None without N:M columns.
      out_order: i32[o], original row at storage row r.
      left: block-diagonal factor on the outputs, or None.
      right: block-diagonal factor on the inputs, or None.
      shape: (o, i) of the matrix.
      n: kept of each group of m.
      m: group size.
      layout: how the matrix goes back into its leaf; None for a plain `[o, i]` leaf.
      scale: [t, v] in the dtype of the weight, what the stored values of each storage
        row are multiplied with; None for values that are the weights themselves.
      layouts: backend -> arrays in the order of that backend, derived from the fields
        above by `kernels.prepare`; whatever changes those must empty it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> w = jnp.array([[4.0, 1, 0, 3], [0, 2, 5, 1]])
      >>> method = fh.Magnitude(fh.NM(2, 4))
      >>> state = method.solve(jax.random.key(0), w, None)
      >>> packed = fh.kernels.pack(method.decide(state, w))
      >>> (jnp.ones(4) @ packed.T).tolist(), (packed @ jnp.ones(4)).tolist()
      ([7.0, 7.0], [7.0, 7.0])
      >>> (jnp.ones(2) @ packed).tolist(), packed.todense().shape
      ([4.0, 2.0, 5.0, 3.0], (2, 4))
    """

    dense_index: Array | None
    dense_values: Array | None
    nm_index: Array | None
    nm_values: Array | None
    nm_positions: Array | None
    out_order: Array
    left: BlockDiagonal | None
    right: BlockDiagonal | None
    shape: tuple[int, int] = static()
    n: int = static()
    m: int = static()
    layout: Layout | None = static(default=None, repr=False)
    scale: Array | None = None
    layouts: dict[str, Any] = dataclasses.field(default_factory=dict)

    __repr__ = brief

    @property
    def tiles(self) -> int:
        """Number of row tiles."""
        index: Any = self.dense_index if self.nm_index is None else self.nm_index
        return index.shape[-2]

    @property
    def dtype(self) -> Any:
        """Dtype of the weights: of the scale where there is one, else of the values."""
        return self.values_dtype if self.scale is None else self.scale.dtype

    @property
    def values_dtype(self) -> Any:
        """Dtype of the stored values."""
        values: Any = self.dense_values if self.nm_values is None else self.nm_values
        return values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: values, indices, positions, order, wrappers, layouts."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def ndim(self) -> int:
        """2: the face of one matrix; stacks are for vmap."""
        return len(self.shape)

    @property
    def T(self) -> "TransposedWeight":
        """W^T, sharing every array."""
        return TransposedWeight(self)

    def filled(self) -> "PackedWeight":
        """The same weight with an empty array in the place of None.

        What computes with a weight starts from here, so it has one form to think of.
        """
        tiles = (*self.out_order.shape[:-1], self.tiles)
        rows = (*tiles, self.shape[0] // max(self.tiles, 1))
        arrays: dict[str, Any] = {}
        if self.dense_index is None:
            arrays["dense_index"] = np.zeros((*tiles, 0), np.int32)
            arrays["dense_values"] = np.zeros((*rows, 0), self.values_dtype)
        if self.nm_index is None:
            arrays["nm_index"] = np.zeros((*tiles, 0), np.int32)
            arrays["nm_values"] = np.zeros((*rows, 0), self.values_dtype)
            arrays["nm_positions"] = np.zeros((*rows, 0), np.uint32)
        return dataclasses.replace(self, **arrays) if arrays else self

    @property
    def core(self) -> "PackedWeight":
        """The stored values alone, which the kernels multiply, with their layouts."""
        return dataclasses.replace(self, left=None, right=None, layout=None, scale=None)

    def todense(self) -> Array:
        """W as an array: `kernels.unpack`."""
        return _kernels().unpack(self)

    def __matmul__(self, x: Array) -> Array:
        """W @ x for x [i] or [i, N]."""
        return _kernels().sparse_dot(x.T, self, transposed=False).T

    def __rmatmul__(self, x: Array) -> Array:
        """X @ W for x [..., o]."""
        return _kernels().sparse_dot(x, self, transposed=True)

    # NumPy would otherwise loop over the elements of x @ packed.
    __array_ufunc__ = None


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedWeight:
    """W^T of a packed W, as `x @ packed.T` reads it.

    Attributes:
      of: the packed weight W [o, i].
    """

    of: PackedWeight

    __repr__ = brief

    @property
    def shape(self) -> tuple[int, int]:
        """(i, o)."""
        return self.of.shape[1], self.of.shape[0]

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    @property
    def dtype(self) -> Any:
        """Dtype of the values."""
        return self.of.dtype

    @property
    def T(self) -> PackedWeight:
        """W."""
        return self.of

    def todense(self) -> Array:
        """W^T as an array."""
        return self.of.todense().T

    def __matmul__(self, x: Array) -> Array:
        """W^T @ x for x [o] or [o, N]."""
        return _kernels().sparse_dot(x.T, self.of, transposed=True).T

    def __rmatmul__(self, x: Array) -> Array:
        """X @ W^T for x [..., i]: the product of a layer."""
        return _kernels().sparse_dot(x, self.of, transposed=False)

    __array_ufunc__ = None
