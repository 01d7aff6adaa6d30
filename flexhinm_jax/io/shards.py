"""Weights of a model directory without loading them: read lazily, written in place.

`read_index` looks at headers only; `Index.read` maps one array. A `Writer` makes the
same files again, array by array in any order: every file has its full size from the
start, so a disk that is too small is known before work begins, and it is called
`NAME.partial` until `finish`, so that nobody takes it for complete.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from flexhinm_jax import atomic
from flexhinm_jax.io import records, tensors
from flexhinm_jax.io.hints import hint

__all__ = ["INDEX", "SINGLE", "Index", "Writer", "check_space", "read_index"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PARTIAL = ".partial"
CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Index:
    """Which file of a directory holds which array, from the headers alone.

    Attributes:
      files: key -> file name.
      headers: file name -> header.
      directory: where the files are.
    """

    files: dict[str, str]
    headers: dict[str, tensors.Header]
    directory: Path

    def keys_of(self, file: str) -> list[str]:
        """The keys that belong to a file."""
        return [key for key, at in self.files.items() if at == file]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of an array."""
        return self.headers[self.files[key]].shapes[key]

    def dtype(self, key: str) -> str:
        """Name of its dtype in the format, such as "BF16"."""
        return self.headers[self.files[key]].dtypes[key]

    def nbytes(self, key: str) -> int:
        """Bytes of an array."""
        start, end = self.headers[self.files[key]].places[key]
        return end - start

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(map(self.nbytes, self.files))

    def with_array(self, key: str, like: str) -> "Index":
        """The index with one more array, of the file, shape and dtype of another one.

        It is what a `Writer` shall make; `read` knows nothing of the new array.
        """
        file = self.files[like]
        header = self.headers[file]
        header = dataclasses.replace(
            header,
            shapes=header.shapes | {key: header.shapes[like]},
            dtypes=header.dtypes | {key: header.dtypes[like]},
            places=header.places | {key: header.places[like]},
        )
        headers = self.headers | {file: header}
        return dataclasses.replace(
            self, files=self.files | {key: file}, headers=headers
        )

    def read(self, key: str) -> np.ndarray:
        """One array, read-only and mapped: its pages are read when looked at.

        Raises:
          ValueError: a dtype that is not supported.
        """
        file = self.files[key]
        return tensors.mapped(self.directory / file, self.headers[file], key)


def read_index(directory: str | os.PathLike) -> Index:
    """Finds the file of every key and checks that every file is whole.

    Args:
      directory: folder with one safetensors file, or shards and their index.

    Raises:
      FileNotFoundError: the weights or a shard are missing.
      ValueError: a file is truncated or damaged, or the index does not fit its shards.
    """
    directory = Path(directory)
    if (directory / SINGLE).is_file():
        header = tensors.read_header(directory / SINGLE)
        return Index(dict.fromkeys(header.shapes, SINGLE), {SINGLE: header}, directory)
    if not (directory / INDEX).is_file():
        known = "give a directory that has the weights as safetensors"
        raise FileNotFoundError(
            f"{directory} has neither {SINGLE} nor {INDEX}; {hint(directory, known)}"
        )
    files = read_json(directory / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{directory / INDEX} has no weight_map of key to file name")
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(
                f"{directory / INDEX} names {str(file)[:100]!r}, which is not the name"
                " of a file beside it"
            )
    headers = {}
    for file in dict.fromkeys(files.values()):
        if not (directory / file).is_file():
            raise FileNotFoundError(
                f"{directory / file} is missing, but {INDEX} names it; copy or download"
                " this shard again"
            )
        headers[file] = tensors.read_header(directory / file)
    for key, file in files.items():
        if key not in headers[file].shapes:
            raise ValueError(
                f"{directory / INDEX} places {key} in {file}, which does not hold it;"
                " the index and the shards belong to different checkpoints"
            )
    # A key that only its shard knows is loaded by other readers too.
    for file, header in headers.items():
        files |= {key: file for key in header.shapes if key not in files}
    return Index(files, headers, directory)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a model directory.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not valid, or no object.
    """
    if not path.is_file():
        complete = "give a complete Hugging Face model directory"
        raise FileNotFoundError(f"{path} is missing; {hint(path.parent, complete)}")
    return records.read(path)


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError (no space left) when a disk cannot take so many more bytes.

    Args:
      folder: where to write; need not exist yet.
      needed: bytes.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"{folder} needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are"
            " free on its disk; free some space, or write to another disk"
        )


class Writer:
    """The files of an index made again in another folder, array by array."""

    def __init__(self, folder: str | os.PathLike, index: Index):
        """Makes the files in full size, or goes on with those of an earlier writer.

        Args:
          folder: where to write; exists.
          index: gives keys, shapes, dtypes and the division into files.

        Raises:
          OSError: no space.
          ValueError: a file of an earlier writer is of another index.
        """
        self.folder, self.index = Path(folder), index
        self.places: dict[str, tuple[Path, int]] = {}
        for file in index.headers:
            text, places, size = layout(index, file)
            done = self.folder / file  # after a kill inside `finish`
            path = done if done.exists() else self.folder / (file + PARTIAL)
            self.places |= {key: (path, start) for key, start in places.items()}
            if path.exists():
                with open(path, "rb") as f:
                    same = f.read(len(text)) == text and path.stat().st_size == size
                if not same:
                    raise ValueError(
                        f"{path} is of another checkpoint; remove {self.folder}"
                    )
                continue
            with atomic.file(path) as temporary, open(temporary, "wb") as f:
                f.write(text)
                f.flush()
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(f.fileno(), 0, size)
                else:
                    f.truncate(size)

    def put(self, key: str, array: np.ndarray) -> None:
        """Writes an array.

        Raises:
          ValueError: its shape or dtype is not that of the index.
        """
        wanted = tensors.DTYPES.get(self.index.dtype(key))
        if array.shape != self.index.shape(key) or array.dtype != wanted:
            raise ValueError(
                f"{key} is {array.dtype}{list(array.shape)}, the source has"
                f" {wanted}{list(self.index.shape(key))}; write what was read from it"
            )
        path, start = self.places[key]
        with open(path, "r+b") as f:
            f.seek(start)
            f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def read(self, key: str) -> np.ndarray:
        """An array that was written, read-only and mapped; before `finish`."""
        path, start = self.places[key]
        dtype, shape = tensors.DTYPES[self.index.dtype(key)], self.index.shape(key)
        if 0 in shape:  # there is nothing to map
            return np.zeros(shape, dtype)
        size = (self.index.nbytes(key),)
        raw = np.memmap(path, np.uint8, "r", offset=start, shape=size)
        return raw.view(dtype).reshape(shape)

    def copy(self, key: str) -> None:
        """Copies an array of the index unchanged."""
        file = self.index.files[key]
        first, end = self.index.headers[file].places[key]
        path, start = self.places[key]
        with open(self.index.directory / file, "rb") as source, open(path, "r+b") as f:
            source.seek(first)
            f.seek(start)
            left = end - first
            while left:
                piece = source.read(min(CHUNK, left))
                if not piece:
                    raise OSError(f"{source.name} ended early; it changed while read")
                f.write(piece)
                left -= len(piece)

    def flush(self) -> None:
        """Brings everything written so far to the disk."""
        for path in {path for path, _ in self.places.values()}:
            with open(path, "rb") as f:
                os.fsync(f.fileno())

    def finish(self) -> None:
        """Gives the files their names, the index last; again after a kill is fine."""
        for file in self.index.headers:
            path = self.folder / (file + PARTIAL)
            if path.exists():
                atomic.swap(path, self.folder / file)
        source = self.index.directory / INDEX
        if SINGLE not in self.index.headers and source.is_file():
            text = read_json(source)
            new = {
                k: x for k, x in self.index.files.items() if k not in text["weight_map"]
            }
            with atomic.file(self.folder / INDEX, overwrite=True) as temporary:
                if new:
                    text["weight_map"] |= new
                    text["metadata"] = {"total_size": self.index.size}
                    temporary.write_text(json.dumps(text, indent=2) + "\n")
                else:
                    shutil.copyfile(source, temporary)


def layout(index: Index, file: str) -> tuple[bytes, dict[str, int], int]:
    """(header with its length, key -> first byte, bytes in all) of a file to write.

    Arrays keep the order of the source, without gaps; the text depends on nothing else.
    """
    header = index.headers[file]
    own = set(index.keys_of(file))
    # transformers refuses a file whose metadata does not name its framework.
    metadata = dict(sorted({**header.metadata, "format": "pt"}.items()))
    fields: dict[str, Any] = {"__metadata__": metadata}
    offsets, at = {}, 0
    for key in (key for key in header.shapes if key in own):
        size = index.nbytes(key)
        fields[key] = {
            "dtype": header.dtypes[key],
            "shape": list(header.shapes[key]),
            "data_offsets": [at, at + size],
        }
        offsets[key], at = at, at + size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {key: start + offset for key, offset in offsets.items()}
    return len(text).to_bytes(8, "little") + text, places, start + at
