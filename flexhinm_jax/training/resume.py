"""Checkpoints of a gradual run: one folder per saved step.

A checkpoint holds everything that matters: parameters, optimiser states, regions,
masks, gates, keys, the step (which is also the position in the data), the stage, and
the configuration of the run. See `io.checkpoints` for what is compared on the way back.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from flexhinm_jax.io import checkpoints

NAME = re.compile(r"step-(\d{8})")

#: False begins a new run, True continues the newest checkpoint, "auto" continues if
#: there is one, "older" continues the newest checkpoint that is not damaged.
Resume = bool | Literal["auto", "older"]


def found(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name))


def save(
    folder: str | os.PathLike, tree: Any, step: int, config: Any, last: int
) -> Path:
    """Saves a checkpoint and removes all but the newest `last`.

    Args:
      folder: of the run.
      tree: what to save.
      step: names the checkpoint; one of the same step is replaced.
      config: of the run, see `checkpoints.describe`.
      last: checkpoints to keep, at least 1.
    """
    path = Path(folder) / f"step-{step:08d}"
    checkpoints.save(path, tree, config, overwrite=True)
    if jax.process_index() == 0:
        for old in found(folder)[:-last]:
            with contextlib.suppress(OSError):
                shutil.rmtree(old)
    return path


def load(
    folder: str | os.PathLike, like: Any, config: Any, resume: Resume
) -> tuple[Any, Path] | None:
    """The checkpoint to continue from.

    Args:
      folder: of the run.
      like: a tree of the saved structure, see `checkpoints.restore`.
      config: of this run; must equal the saved one.
      resume: see `Resume`.

    Returns:
      The tree and the checkpoint it came from, or None for a new run.

    Raises:
      FileExistsError: a new run in a folder with checkpoints.
      FileNotFoundError: nothing to continue.
      ValueError: another configuration, or a damaged checkpoint.
    """
    there = found(folder)
    if resume is False and there:
        raise FileExistsError(
            f"{folder} holds {len(there)} checkpoints, the newest {there[-1].name}; "
            "continue with resume=True, or give another folder"
        )
    if resume is True and not there:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint to resume from; begin with resume=False, "
            'or "auto" to begin where there is none'
        )
    for path in reversed(there):
        try:
            return checkpoints.restore(path, like, config), path
        except (ValueError, FileNotFoundError) as error:
            damaged = "damaged" in str(error) or isinstance(error, FileNotFoundError)
            if damaged and resume == "older":
                continue
            older = [p.name for p in there if p < path]
            if damaged and older:
                raise ValueError(
                    f'{error}\nresume="older" continues from {older[-1]}'
                ) from error
            raise
    if there:
        raise ValueError(
            f"{folder}: all {len(there)} checkpoints are damaged; remove the folder, "
            "or give another, and begin again"
        )
    return None


def check_resume(resume: Any) -> None:
    """Raises ValueError unless the value is one that `Resume` lists."""
    if resume not in (False, True, "auto", "older"):
        raise ValueError(f"resume={resume!r}: choose False, True, 'auto' or 'older'")


def key_words(key: Any) -> list[int]:
    """A PRNG key as numbers for a configuration."""
    if jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    return [int(word) for word in np.asarray(key).ravel()]
