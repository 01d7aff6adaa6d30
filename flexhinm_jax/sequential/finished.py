"""Finished matrices on disk, so that a long run survives being killed.

A folder holds `job.json`, a fingerprint of everything that the result depends on,
and one file per finished matrix. A file appears complete or not at all.
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

CONFIG = "job.json"


class Finished:
    """What a run has finished, in a folder."""

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, str]):
        """Opens or begins a folder.

        Args:
          folder: created if missing.
          config: name -> value of everything that decides about the result.

        Raises:
          ValueError: the folder is of a run with another configuration, or holds
            something else.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / CONFIG
        if path.exists():
            try:
                before = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"resume: {path} is damaged: {error}") from error
            for name in sorted({*before, *config}):
                if before.get(name) != config.get(name):
                    raise ValueError(
                        f"resume: {self.folder} was begun with {name}="
                        f"{before.get(name)}, this run has {config.get(name)}; give "
                        "the same arguments or another folder"
                    )
        elif any(self.folder.glob("*.npz")):
            raise ValueError(
                f"resume: {self.folder} holds arrays but no {CONFIG}; give another"
            )
        else:
            self.write(path, lambda f: f.write(json.dumps(config, indent=2).encode()))

    def write(self, path: Path, fill: Any) -> None:
        """Writes a file that appears complete or not at all."""
        scratch = path.with_suffix(".partial")
        with open(scratch, "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)

    def path(self, name: str) -> Path:
        """File of a matrix."""
        return self.folder / f"{zlib.crc32(name.encode()):08x}.npz"

    def save(self, name: str, tree: Any) -> None:
        """Keeps the arrays of a tree."""
        arrays = {
            f"{k:03d}": np.asarray(x) for k, x in enumerate(jax.tree.leaves(tree))
        }
        # numpy does not know the small floating-point formats: their bytes are kept.
        raw = {
            k: np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)
            for k, x in arrays.items()
        }
        raw["name"] = np.frombuffer(name.encode(), np.uint8)
        self.write(self.path(name), lambda f: np.savez(f, **raw))  # type: ignore[arg-type]

    def load(self, name: str, like: Any) -> Any | None:
        """The tree kept under a name, or None.

        Args:
          name: as given to `save`.
          like: tree of `jax.ShapeDtypeStruct`s of the same structure.

        Raises:
          ValueError: the file holds something else.
        """
        path = self.path(name)
        if not path.exists():
            return None
        shapes, structure = jax.tree.flatten(like)
        with np.load(path) as raw:
            found = [raw[k] for k in sorted(raw.files) if k != "name"]
            owner = raw["name"].tobytes().decode()
        sizes = [s.size * np.dtype(s.dtype).itemsize for s in shapes]
        if owner != name or [x.size for x in found] != sizes:
            raise ValueError(
                f"resume: {path} holds {owner!r}, or another form of it, not {name!r}; "
                "delete it"
            )
        arrays = [
            np.frombuffer(x.tobytes(), s.dtype).reshape(s.shape)
            for x, s in zip(found, shapes, strict=True)
        ]
        return jax.tree.unflatten(structure, arrays)


def digest(tree: Any) -> str:
    """A checksum of all arrays of a tree, of its structure and of what is no array."""
    leaves, structure = jax.tree.flatten(tree)
    found = zlib.crc32(str(structure).encode())
    for x in leaves:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if isinstance(x, jax.Array | np.ndarray | np.generic):
            value = np.ascontiguousarray(np.asarray(x))
            found = zlib.crc32(f"{value.dtype}{value.shape}".encode(), found)
            found = zlib.crc32(value.reshape(-1).view(np.uint8).tobytes(), found)
        else:
            found = zlib.crc32(repr(x).encode(), found)
    return f"{found:08x}"
