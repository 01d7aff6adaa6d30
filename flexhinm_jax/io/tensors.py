"""One safetensors file as a dict of host arrays.

A thin wrapper around the `safetensors` package, which is an optional extra. It adds
what callers need and the package leaves out: errors that name the file, dtypes known
from the header alone, arrays that are not contiguous (the package writes their memory
as it lies) and the usual file permissions (the package creates files readable by their
owner only).
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexhinm_jax import arguments, atomic
from flexhinm_jax.io import records

__all__ = ["DTYPES", "Header", "mapped", "read", "read_header", "write"]

LFS_POINTER = b"version https://git-lfs"

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""Supported dtypes by their name in a safetensors header."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a safetensors file says about its contents.

    Attributes:
      shapes: key -> shape.
      dtypes: key -> name of the dtype in the format ("BF16").
      metadata: the free-form strings of the file.
      places: key -> (first byte, one behind the last) of the values in the file.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    places: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return sum(end - start for start, end in self.places.values())


def read_header(path: str | os.PathLike) -> Header:
    """Reads names, shapes, dtypes and metadata, but no values.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or is not safetensors.
    """
    package = _package()
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; check the name")
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, f"{size} bytes are less than its header alone")
        text = f.read(length)
    try:
        fields = records.parse(text, "its header")
        metadata = fields.pop("__metadata__", None) or {}
        start = 8 + length
        places = {
            key: (start + x["data_offsets"][0], start + x["data_offsets"][1])
            for key, x in fields.items()
        }
        promised = max((end for _, end in places.values()), default=start)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(path, error) from error
    if size != promised:
        raise _damaged(path, f"it has {size} bytes, its header promises {promised}")
    try:
        with package.safe_open(os.fspath(path), framework="numpy"):
            pass  # checks what is left: overlaps, sizes, dtypes
    except package.SafetensorError as error:
        raise _damaged(path, error) from error
    keys = sorted(places, key=places.__getitem__)
    return Header(
        shapes={key: tuple(fields[key]["shape"]) for key in keys},
        dtypes={key: fields[key]["dtype"] for key in keys},
        metadata=dict(metadata),
        places={key: places[key] for key in keys},
    )


def mapped(path: str | os.PathLike, header: Header, key: str) -> np.ndarray:
    """One array of a file, read-only and mapped: its pages are read when looked at.

    Args:
      path: a safetensors file.
      header: from `read_header`.
      key: which array.

    Returns:
      The array; it must not be written to.

    Raises:
      ValueError: a dtype that is not in `DTYPES`.
    """
    if header.dtypes[key] not in DTYPES:
        raise ValueError(
            f"{path}: {key} has dtype {header.dtypes[key]}; supported are"
            f" {', '.join(DTYPES)}. Convert it to one of them first"
        )
    dtype, shape = DTYPES[header.dtypes[key]], header.shapes[key]
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    start = header.places[key][0]
    # numpy maps its own dtypes only: the bytes first, then what they mean.
    size = math.prod(shape) * dtype.itemsize
    raw = np.memmap(path, np.uint8, "r", offset=start, shape=(size,))
    if start % dtype.itemsize:  # a writer may leave values unaligned
        raw = np.array(raw)
    return raw.view(dtype).reshape(shape)


def read(
    path: str | os.PathLike, keys: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads arrays one by one, in their stored dtype (bfloat16 included).

    Args:
      path: a safetensors file.
      keys: the arrays to read; None reads all.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or holds a dtype that is not in `DTYPES`.
    """
    header = read_header(path)
    keys = header.shapes if keys is None else keys
    return {key: np.array(mapped(path, header, key)) for key in keys}


def write(
    path: str | os.PathLike,
    arrays: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file at once; see `atomic` for making that all or nothing.

    Args:
      path: file to write.
      arrays: key -> array, in any memory order.
      metadata: strings kept in the header.

    Raises:
      OSError: the file could not be written (disk full, permissions).
      ValueError: an array has a dtype that is not in `DTYPES`.
    """
    package = _package()
    from safetensors.numpy import save_file

    # order="C": the package copies `nbytes` from the data pointer and ignores strides,
    # so a transposed view would be stored as its untransposed memory.
    host = {k: np.asarray(a, order="C") for k, a in arrays.items()}
    for key, array in host.items():
        if array.dtype.newbyteorder("=") not in DTYPES.values():
            raise ValueError(
                f"{key} has dtype {array.dtype}, which safetensors cannot hold;"
                f" supported are {', '.join(DTYPES)}"
            )
    try:
        save_file(host, os.fspath(path), metadata=dict(metadata or {}))
    except package.SafetensorError as error:
        known = atomic.os_error(path, error)
        raise known or OSError(f"{path} could not be written: {error}") from error
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def _damaged(path: str | os.PathLike, why: object) -> ValueError:
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return ValueError(
                f"{path} is a pointer of Git LFS in place of the weights: run 'git lfs"
                " pull' in its folder, or download the file"
            )
    return ValueError(
        f"{path} is truncated or not a safetensors file ({why}); copy or download it"
        " again"
    )


def _package() -> Any:
    with arguments.extra("hf", "safetensors is needed for this"):
        import safetensors
    return safetensors
