"""The packed file: a pruned model in run-time form, in one safetensors file.

Any safetensors reader can open it. A leaf that is not packed is stored as it is, under
its path in the tree, as reports name it ("encoder/0/kernel"). A packed leaf at path P
is stored as

    P#dense_index      i32[t, D]           original input of each dense column
    P#dense_values        [t, v, D]        their weights
    P#nm_index         i32[t, H]           original input of each N:M column
    P#nm_values           [t, v, H/m*n]    the kept weights of each group of m columns
    P#nm_positions     u32[t, v, words]    positions of the kept weights in their group
    P#out_order        i32[o]              original row at storage row r
    P#scale               [t, v]           factor of the values of each storage row,
                                           only where values are rounded to 8 bits
    P#left, P#right       [k, b, b]        block-diagonal factors, only where present
    P#left_order,      i32[k * b]          original channel at each position of such a
    P#right_order                          factor, where it has an order of its own

(the fields of `types.PackedWeight`, which explains them; a stack of matrices has the
same leading axes everywhere; layouts that `kernels.prepare` derived are left out;
what is None there, because there are no such columns, is an empty array here).
Positions rise inside a group. Those of a 2:4 group take two bits each; those of other
groups are one rank, sum of C(p[k], k + 1) over the positions p[0] < p[1] < ..., in the
bits that C(m, n) - 1 needs (with more than 2**32 ranks every position is stored, in the
least power of two of bits that holds m - 1). Codes are joined without gaps, low bits
first, and each row [t, v] starts a new word. The metadata of the file has four strings:

    format   "flexhinm_jax.packed"
    version  "2"; in files of version "1", which are read too, all groups store every
             position
    packed   JSON: path -> {"shape": [o, i], "n": n, "m": m, "dtype": "bfloat16",
             "stack": [leading axes], "left": bool, "right": bool, "dtype" that of
             the values; "scale": dtype of the scale, absent when none;
             "orders": [factors that have an order, absent when none],
             "layout": null or {"shape": [...], "stack": F, "out": F, "inputs": F}}
             where F lists the (axis, stride, size) of `types.AxisFactor`
    checksums  JSON: path -> eight hexadecimal digits, for every leaf; see `_checksum`.
             Absent in files of early versions, which are read without that check

A reader needs nothing else: multiply `x[..., dense_index[t]]` by `dense_values[t]`, add
the same for the N:M columns that the positions select, and put row r of the result at
`out_order[r]`, times its scale where there is one.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax import atomic
from flexhinm_jax.io import records, tensors
from flexhinm_jax.jax_versions import on_device
from flexhinm_jax.kernels import positions
from flexhinm_jax.kernels.packing import canonical
from flexhinm_jax.kernels.validation import (
    verify_layout,
    verify_packed,
    verify_positions,
)
from flexhinm_jax.ops.words import WORD, from_words, position_bits
from flexhinm_jax.paths import named_leaves
from flexhinm_jax.types import AxisFactor, BlockDiagonal, Layout, PackedWeight

__all__ = ["FORMAT", "VERSION", "read_packed", "write_packed"]

FORMAT = "flexhinm_jax.packed"
VERSION = 2
READABLE = ("1", "2")

ARRAYS = (
    "dense_index",
    "dense_values",
    "nm_index",
    "nm_values",
    "nm_positions",
    "out_order",
)
FACTORS = ("left", "right")

MAX_GROUP = 1 << 16
AGAIN = "the file is damaged: copy it, or write it again"


def write_packed(
    path: str | os.PathLike, tree: Any, *, overwrite: bool = False
) -> Path:
    """Writes a tree with packed leaves.

    Args:
      path: file to create; it appears complete or not at all.
      tree: a flat dict path -> leaf, or any tree of arrays and `PackedWeight`.
      overwrite: replaces an existing file.

    Returns:
      Path of the file.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
      ValueError: a leaf is not an array, breaks an invariant of `PackedWeight`, or two
        leaves have the same name.
      OSError: the disk is full or not writable; nothing is left behind.
    """
    arrays: dict[str, np.ndarray] = {}
    headers: dict[str, dict[str, Any]] = {}
    checksums: dict[str, str] = {}
    for name, leaf in named_leaves(tree)[0]:
        if isinstance(leaf, PackedWeight):
            headers[name] = _header(leaf)
            verify_packed(leaf, name)
            verify_layout(leaf, name)
            stored = _arrays(leaf)
            stored = {f"{name}#{field}": array for field, array in stored.items()}
        else:
            stored = {name: _host(name, leaf)}
        checksums[name] = _checksum(headers.get(name), stored)
        for key, array in stored.items():
            if key in arrays or key == "__metadata__":
                raise ValueError(f"two leaves would be stored as {key}; rename one")
            arrays[key] = array
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "packed": json.dumps(headers, sort_keys=True),
        "checksums": json.dumps(checksums, sort_keys=True),
    }
    with atomic.file(path, overwrite=overwrite) as temporary:
        tensors.write(temporary, arrays, metadata)
    return Path(path)


def read_packed(path: str | os.PathLike, like: Any = None) -> Any:
    """Reads a packed file and checks everything that a kernel relies on.

    Args:
      path: file that `write_packed` made.
      like: a tree whose structure the result gets, such as the dense parameters (its
        leaves are not read); None returns a flat dict path -> leaf.

    Returns:
      Leaves as JAX arrays and `PackedWeight`s, bit for bit as written. An array in a
      dtype that JAX would narrow (int64 without x64) stays a NumPy array.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged (any changed bit is noticed), is no packed file or
        one of another version, an array is missing or has a wrong shape or dtype, an
        index is out of range or there twice, positions do not increase, the layout does
        not fit the arrays, or the paths are not those of `like`.
    """
    header = tensors.read_header(path)
    described, checksums = _metadata(path, header.metadata)
    version = header.metadata["version"]
    try:
        leaves: dict[str, Any] = {}
        unread = dict.fromkeys(header.shapes)
        for name, fields in described.items():
            keys = {f: f"{name}#{f}" for f in _field_names(name, fields)}
            for key in keys.values():
                if key not in unread:
                    raise ValueError(
                        f"{name}: the array {key} is missing; write the file again"
                    )
                del unread[key]
            stored = tensors.read(path, keys.values())
            arrays = {f: stored[key] for f, key in keys.items()}
            if version == "1":
                arrays |= _ranked(name, fields, arrays)
            held = _packed_weight(fields, arrays)
            stack = tuple(fields["stack"])
            dtype = jnp.dtype(fields["dtype"])
            verify_packed(held, name, dtype=dtype, stack=stack)
            verify_layout(held, name)
            _check(checksums, name, fields, stored)
            leaves[name] = jax.tree.map(on_device, canonical(held))
        for name, array in tensors.read(path, unread).items():
            if name in leaves:
                raise ValueError(f"{name} is stored twice, packed and as it is")
            _check(checksums, name, None, {name: array})
            leaves[name] = _device(array)
        lost = [name for name in checksums or () if name not in leaves]
        if lost:
            raise ValueError(f"{lost[0]} is missing; {AGAIN}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return leaves if like is None else _restore(path, leaves, like)


def _checksum(
    description: Mapping[str, Any] | None, stored: Mapping[str, np.ndarray]
) -> str:
    """CRC-32 of a leaf as it lies in the file.

    Of its description as JSON with sorted keys and no spaces, "null" for a leaf that is
    not packed; then, in the order of the keys, of every array's "key dtype shape" (such
    as "w#out_order int32 [8]") and bytes.
    """
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    total = zlib.crc32(text.encode())
    for key, array in sorted(stored.items()):
        head = f"{key} {array.dtype.name} {list(array.shape)}"
        total = zlib.crc32(head.encode(), total)
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        total = zlib.crc32(raw.data, total)
    return f"{total:08x}"


def _check(
    checksums: Mapping[str, Any] | None,
    name: str,
    description: Mapping[str, Any] | None,
    stored: Mapping[str, np.ndarray],
) -> None:
    """Raises ValueError when a leaf is not the one that was written."""
    if checksums is not None and checksums.get(name) != _checksum(description, stored):
        raise ValueError(f"{name}: its checksum is not that of the file; {AGAIN}")


def _restore(path: str | os.PathLike, leaves: dict[str, Any], like: Any) -> Any:
    pairs, structure = named_leaves(like)
    names = [name for name, _ in pairs]
    missing = [name for name in names if name not in leaves]
    extra = [name for name in leaves if name not in set(names)]
    if missing or extra:
        raise ValueError(
            f"{path}: the leaves are not those of `like`:"
            f" missing in the file {missing[:3] or 'none'},"
            f" not in `like` {extra[:3] or 'none'}; give the tree that was written"
        )
    return jax.tree.unflatten(structure, [leaves[name] for name in names])


def _host(name: str, leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or (
        jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    ):
        raise ValueError(
            f"{name} is {type(leaf).__name__} {getattr(leaf, 'dtype', '')}: the packed"
            " file holds arrays of numbers; take the leaf out of the tree"
        )
    return np.asarray(leaf)


def _device(array: np.ndarray) -> Any:
    narrowed = jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
    return array if narrowed else on_device(array)


def _arrays(leaf: PackedWeight) -> dict[str, np.ndarray]:
    whole = leaf.filled()
    stored = {field: np.asarray(getattr(whole, field)) for field in ARRAYS}
    if leaf.scale is not None:
        stored["scale"] = np.asarray(leaf.scale)
    for field in FACTORS:
        factor = getattr(leaf, field)
        if factor is not None:
            stored[field] = np.asarray(factor.blocks)
            if factor.order is not None:
                stored[f"{field}_order"] = np.asarray(factor.order)
    return stored


def _header(leaf: PackedWeight) -> dict[str, Any]:
    """The JSON description of one packed leaf."""
    layout = leaf.layout
    factors = {f: getattr(leaf, f) for f in FACTORS}
    orders = [f for f, x in factors.items() if x is not None and x.order is not None]
    scale = {} if leaf.scale is None else {"scale": np.dtype(leaf.scale.dtype).name}
    return (
        ({"orders": orders} if orders else {})
        | scale
        | {
            "shape": list(leaf.shape),
            "n": leaf.n,
            "m": leaf.m,
            "dtype": np.dtype(leaf.values_dtype).name,
            "stack": list(leaf.out_order.shape[:-1]),
            "left": leaf.left is not None,
            "right": leaf.right is not None,
            "layout": None
            if layout is None
            else {
                "shape": list(layout.shape),
                "stack": _factors(layout.stack),
                "out": _factors(layout.out),
                "inputs": _factors(layout.inputs),
            },
        }
    )


def _factors(factors: tuple[AxisFactor, ...]) -> list[list[int]]:
    return [[f.axis, f.stride, f.size] for f in factors]


def _packed_weight(
    fields: Mapping[str, Any], stored: Mapping[str, np.ndarray]
) -> PackedWeight:
    """The weight with its arrays still on the host."""
    layout = fields["layout"]
    if layout is not None:
        groups = {
            k: tuple(AxisFactor(*f) for f in layout[k])
            for k in ("stack", "out", "inputs")
        }
        layout = Layout(shape=tuple(layout["shape"]), **groups)

    def factor(name: str) -> BlockDiagonal | None:
        if name not in stored:
            return None
        order: Any = stored.get(f"{name}_order")
        blocks: Any = stored[name]
        return BlockDiagonal(blocks, order)

    factors: dict[str, Any] = {f: factor(f) for f in FACTORS}
    return PackedWeight(
        **{field: stored[field] for field in ARRAYS},
        **factors,
        scale=stored.get("scale"),  # pyright: ignore[reportArgumentType]
        shape=tuple(fields["shape"]),
        n=fields["n"],
        m=fields["m"],
        layout=layout,
    )


def _ranked(
    name: str, fields: Mapping[str, Any], stored: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The positions of version 1, one by one, in the codes of this version."""
    n, m = fields["n"], fields["m"]
    if positions.subsets(n, m) is None:
        return {}
    words, kept = stored["nm_positions"], stored["nm_values"].shape[-1]
    bits = position_bits(m)
    wanted = -(-kept * bits // WORD)
    if words.dtype != np.uint32 or words.shape[-1:] != (wanted,) or kept % n:
        raise ValueError(
            f"{name}: nm_positions is {words.dtype}{list(words.shape)}, expected"
            f" uint32[..., {wanted}] for {kept} values"
        )
    chosen = from_words(words, kept, bits)
    verify_positions(chosen.reshape(*words.shape[:-1], kept // n, n), m, name)
    return {"nm_positions": positions.encode(chosen, n, m)}


def _metadata(
    path: str | os.PathLike, metadata: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(path -> description, path -> checksum) from the metadata of the file.

    The second is None for a file of a version that had no checksums.
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a packed file: its format is"
            f" {metadata.get('format', 'not given')!r}, not {FORMAT!r}"
        )
    if metadata.get("version") not in READABLE:
        raise ValueError(
            f"{path} has version {metadata.get('version')!r} of the packed format; this"
            f" library reads versions {' and '.join(READABLE)}. Use the library that"
            " wrote it"
        )
    unknown = sorted(set(metadata) - {"format", "version", "packed", "checksums"})
    if unknown:
        raise ValueError(f"{path} has unknown metadata {unknown[0]!r}; {AGAIN}")
    described = records.parse(metadata.get("packed", ""), f"{path}: its description")
    sums = metadata.get("checksums")
    if sums is None:
        return described, None
    return described, records.parse(sums, f"{path}: its checksums")


def _field_names(name: str, fields: Any) -> tuple[str, ...]:
    """Names of the arrays of one leaf; checks the form of its description."""

    def ints(value: Any, length: int | None = None) -> bool:
        whole = isinstance(value, list) and all(type(v) is int for v in value)
        return whole and (length is None or len(value) == length)

    def sizes(value: Any, length: int | None = None) -> bool:
        return ints(value, length) and all(v > 0 for v in value)

    def of_layout(value: Any) -> bool:
        groups = ("stack", "out", "inputs")
        return value is None or (
            isinstance(value, dict)
            and sizes(value.get("shape"))
            and all(isinstance(value.get(g), list) for g in groups)
            and all(ints(f, 3) for g in groups for f in value[g])
        )

    try:
        good = (
            sizes(fields["shape"], 2)
            and ints([fields["n"], fields["m"]])
            and 0 < fields["n"] <= fields["m"] <= MAX_GROUP
            and fields["dtype"] in (names := {d.name for d in tensors.DTYPES.values()})
            and (fields.get("scale") is None or fields["scale"] in names)
            and sizes(fields["stack"])
            and all(isinstance(fields[f], bool) for f in FACTORS)
            and isinstance(orders := fields.get("orders", []), list)
            and all(f in FACTORS and fields[f] for f in orders)
            and of_layout(fields["layout"])
        )
    except (KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{name}: its description is damaged: {str(fields)[:300]}")
    return (
        *ARRAYS,
        *(("scale",) if fields.get("scale") else ()),
        *(f for f in FACTORS if fields[f]),
        *(f"{f}_order" for f in dict.fromkeys(orders)),
    )
