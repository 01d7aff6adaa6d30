"""Finished matrices on disk, so that a long run survives being killed.

A folder holds `job.json`, a fingerprint of everything that the result depends on,
and one file per finished matrix.
"""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexhinm_jax import arguments, atomic
from flexhinm_jax.io import fingerprint, records

CONFIG = "job.json"


def check_folder(folder: Path) -> None:
    """Refuses a folder that no run of this library began.

    Args:
      folder: one that is new, empty or holds a `job.json` is a run's.

    Raises:
      FileExistsError: it is a file, or holds something else, which is the user's.
    """
    if not folder.exists():
        return
    remedy = "move it away, or give another name"
    if not folder.is_dir():
        raise FileExistsError(
            f"{folder} is a file, and the state of the run goes to a folder of this"
            f" name; {remedy}"
        )
    if (folder / CONFIG).is_file():
        return
    others = [p.name for p in folder.iterdir() if not atomic.is_temporary(p)]
    if others:
        raise FileExistsError(
            f"{folder} holds {arguments.some(sorted(others))} and no {CONFIG}, so no"
            f" run of this library began it, and it is left as it is; {remedy}"
        )


class Finished:
    """What a run has finished, in a folder."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Mapping[str, str],
        *,
        writes: bool = True,
    ):
        """Opens or begins a folder.

        Args:
          folder: see `check_folder`; created if missing.
          config: what decides about the result, from `fingerprint.record`.
          writes: False for a process that only reads what another one writes.

        Raises:
          FileExistsError: the folder is of no run.
          ValueError: it is of a run with another configuration (`Differs`), of another
            version, or its configuration is damaged.
        """
        self.folder, self.writes = Path(folder), writes
        check_folder(self.folder)
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / CONFIG
        if path.exists():
            try:
                before = records.read(path)
            except ValueError as error:
                raise ValueError(
                    f"resume: {path} is damaged: {error}; remove {self.folder} to begin"
                    " anew"
                ) from error
            fingerprint.check(before, config, self.folder)
        elif writes:
            records.write(path, config)

    def path(self, name: str) -> Path:
        """File of a matrix."""
        return self.folder / f"{zlib.crc32(name.encode()):08x}.npz"

    def save(self, name: str, tree: Any) -> None:
        """Keeps the arrays of a tree, if this process is the one that writes."""
        if not self.writes:
            return
        arrays = {
            f"{k:03d}": np.asarray(x) for k, x in enumerate(jax.tree.leaves(tree))
        }
        # numpy does not know the small floating-point formats: their bytes are kept.
        raw = {
            k: np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)
            for k, x in arrays.items()
        }
        raw["name"] = np.frombuffer(name.encode(), np.uint8)
        with atomic.file(self.path(name), overwrite=True) as path:
            with open(path, "wb") as f:
                np.savez(f, **raw)  # type: ignore[arg-type]

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
            stored = [raw[k] for k in sorted(raw.files) if k != "name"]
            owner = raw["name"].tobytes().decode()
        sizes = [s.size * np.dtype(s.dtype).itemsize for s in shapes]
        if owner != name or [x.size for x in stored] != sizes:
            raise ValueError(
                f"resume: {path} holds {owner!r}, or another form of it, not {name!r}; "
                "delete it"
            )
        arrays = [
            np.frombuffer(x.tobytes(), s.dtype).reshape(s.shape)
            for x, s in zip(stored, shapes, strict=True)
        ]
        return jax.tree.unflatten(structure, arrays)
