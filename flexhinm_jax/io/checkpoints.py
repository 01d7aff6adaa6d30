"""Training checkpoints: any tree and the configuration that explains it.

Orbax stores the arrays, `config.json` beside them everything that orbax leaves out: the
configuration, the static fields inside the tree (orbax restores whatever its target
holds, so an N:M weight saved with n=2 would silently come back as n=3), the shape and
dtype of every leaf, and the version of the library. `restore` compares all of them
before it touches an array and names every difference.

A checkpoint appears complete or not at all. The way back goes through a tree of the
same structure, because orbax without one returns plain dicts.

`save` and `restore` are about one checkpoint, `Checkpoints` about those of a run: which
steps are saved, how many are kept, and which one a new process continues from.

Orbax takes 0.4 s to import, so it is when the first array is written or read.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from flexhinm_jax import arguments, atomic
from flexhinm_jax.io import fingerprint, records

__all__ = [
    "Checkpoints",
    "Damaged",
    "Resume",
    "describe",
    "read_config",
    "restore",
    "save",
]

CONFIG = "config.json"
ARRAYS = "arrays"
STEP = re.compile(r"step-(\d+)")

Resume = bool | Literal["auto", "older"]
"""How a run begins: False anew; True from the newest checkpoint; "auto" from the newest
if there is one; "older" as "auto", but passing over damaged ones."""


class Damaged(ValueError):
    """A checkpoint that cannot be read, because its files are incomplete or changed."""


class Checkpoints:
    """The checkpoints of one run: a folder with one folder `step-00000042` per save.

    A run asks `load` where to begin, tells `due` every step that it has done, and calls
    `save` when that says so. What is saved are any trees; a configuration explains them
    and must be the same when the run is continued.

    Attributes:
      folder: of the run.
      every: steps between two checkpoints; None for none but those the run asks for.
      seconds: wall time after which one more is due; None for no such time.
      keep: how many of the newest stay.
      resume: see `Resume`.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from flexhinm_jax.io.checkpoints import Checkpoints
      >>> folder = tempfile.mkdtemp()
      >>> saves = Checkpoints(folder, every=2, resume="auto")
      >>> like, config = {"w": jnp.zeros(3, jnp.float32)}, {"rate": 0.1}
      >>> saved = saves.load(lambda step: like, config)
      >>> begin, tree = (0, like) if saved is None else saved
      >>> for step in range(begin + 1, 6):
      ...     tree = {"w": tree["w"] + 1}
      ...     if saves.due(step):
      ...         path = saves.save(step, tree, config)
      >>> Checkpoints(folder, resume=True).load(lambda step: like, config)
      (4, {'w': Array([4., 4., 4.], dtype=float32)})
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        every: int | None = 100,
        keep: int = 2,
        resume: Resume = False,
        *,
        seconds: float | None = None,
    ):
        """Names the folder; nothing is touched.

        Raises:
          ValueError: a count below one, or a word that `Resume` does not list.
        """
        if every is not None:
            arguments.count(every, "checkpoints: every", 1)
        arguments.count(keep, "checkpoints: keep", 1)
        if resume not in (False, True, *get_args(get_args(Resume)[1])):
            raise ValueError(
                f"resume={resume!r}: choose False, True, 'auto' or 'older'"
            )
        self.folder, self.every, self.seconds = Path(folder), every, seconds
        self.keep, self.resume = keep, resume
        self._saved_at = time.monotonic()

    def paths(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        if not self.folder.is_dir():
            return []
        there = (p for p in self.folder.iterdir() if STEP.fullmatch(p.name))
        return sorted(there, key=_step)

    def due(self, step: int) -> bool:
        """Whether to save now that so many steps are done.

        With several processes all of them ask, and get the answer of the first.
        """
        if self.every is not None and step % self.every == 0:
            return True
        if self.seconds is None:
            return False
        late = np.asarray(time.monotonic() - self._saved_at >= self.seconds)
        if jax.process_count() > 1:
            late = multihost_utils.broadcast_one_to_all(late)
        return bool(late)

    def save(self, step: int, tree: Any, config: Any) -> Path:
        """Saves a checkpoint and removes all but the newest.

        Args:
          step: steps done; a checkpoint of the same step is replaced.
          tree: what to save, with shapes that `load` can name from the step, or from
            what `leaves` says of it.
          config: what must be equal to continue, see `describe`.

        Returns:
          Path of the checkpoint.
        """
        path = self._path(step)
        save(path, tree, _versioned(config), overwrite=True)
        if jax.process_index() == 0:
            for old in self.paths()[: -self.keep]:
                if (old / CONFIG).is_file():  # others are none that `save` wrote
                    shutil.rmtree(old, ignore_errors=True)
        self._saved_at = time.monotonic()
        return path

    def load(
        self, like: Callable[[int], Any], config: Any = None
    ) -> tuple[int, Any] | None:
        """The steps done and the tree to continue from, or None for a new run.

        Args:
          like: called with the steps done, gives a tree of the saved structure, see
            `restore`. Not called when there is nothing to restore.
          config: of this run; must equal the saved one.

        Raises:
          FileExistsError: a new run in a folder with checkpoints.
          FileNotFoundError: nothing to continue.
          Damaged: the newest checkpoint is damaged, or with "older" all are.
          ValueError: checkpoints of another run or another version of the library.
        """
        there = self.paths()
        if self.resume is False and there:
            raise FileExistsError(
                f"{self.folder} holds {len(there)} checkpoints, the newest"
                f" {there[-1].name}; continue with {arguments.say('continue')}, or give"
                " another folder"
            )
        if self.resume is True and not there:
            raise FileNotFoundError(
                f"{self.folder} holds no checkpoint to resume from; begin with"
                f" {arguments.say('restart')}"
            )
        for path in reversed(there):
            try:
                return _step(path), self._restored(path, like, config)
            except Damaged as error:
                older = [p.name for p in there if _step(p) < _step(path)]
                if self.resume == "older":
                    continue
                if not older:
                    raise
                raise Damaged(
                    f"{error}\n{arguments.say('older', older[-1])}"
                ) from error
        if there:
            raise Damaged(
                f"{self.folder}: all {len(there)} checkpoints are damaged; remove the"
                " folder, or give another, and begin again"
            )
        return None

    def leaves(self, step: int) -> dict[str, str]:
        """Leaf path -> dtype and shape of what was saved at a step, read as text.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          Damaged: its `config.json` is damaged.
        """
        return _read_record(self._path(step))["leaves"]

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _restored(self, path: Path, like: Callable[[int], Any], config: Any) -> Any:
        now = _versioned(config)
        try:
            saved = read_config(path)
        except FileNotFoundError as error:
            raise Damaged(f"{error}; the checkpoint is damaged") from error
        fingerprint.check_version(saved if isinstance(saved, dict) else {}, path)
        return restore(path, like(_step(path)), now)


def _step(path: Path) -> int:
    """Steps done at a checkpoint."""
    return int(path.name.rpartition("-")[2])


def _versioned(config: Any) -> dict[str, Any]:
    """The configuration as saved: its fields, and the version of fingerprints."""
    fields = describe({} if config is None else config)
    fields = fields if isinstance(fields, dict) else {"config": fields}
    return {fingerprint.FIELD: str(fingerprint.VERSION)} | fields


def save(
    directory: str | os.PathLike,
    tree: Any,
    config: Any = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Saves a tree and its configuration, and waits until both are on disk.

    With several processes all of them call this, on a file system that they share.

    Args:
      directory: folder to create, for example one per step.
      tree: any tree of arrays and numbers: (params, states, opt_state, step).
      config: a method, pattern or other frozen dataclass, or a tree of plain values;
        compared on restore.
      overwrite: replaces an earlier checkpoint.

    Returns:
      Path of the checkpoint.

    Raises:
      FileExistsError: `directory` exists and may not be replaced.
      ValueError: `config` holds something that JSON cannot.
      OSError: the disk is full or not writable; nothing is left behind.
    """
    record = {
        "library": {"name": "flexhinm_jax", "version": _version()},
        "config": describe(config),
        "static": _static_fields(tree),
        "leaves": _leaves(tree),
    }
    text = json.dumps(record, indent=1)
    with _directory(directory, overwrite=overwrite) as temporary:
        try:
            _write(temporary / ARRAYS, jax.tree.map(_without_empty, tree))
        except ValueError as error:
            known = atomic.os_error(directory, error)
            if known is None:
                raise
            raise known from error
        if jax.process_index() == 0:
            (temporary / CONFIG).write_text(text, encoding="utf-8")
    return Path(directory)


def restore(directory: str | os.PathLike, like: Any, config: Any = None) -> Any:
    """Restores a tree.

    Args:
      directory: what `save` wrote.
      like: a tree with the structure, static fields, shapes and dtypes of the saved
        one: a fresh initialisation, or `jax.eval_shape` of it. Leaves come back where
        those of `like` live (sharding), by default on the first device.
      config: the configuration of this run; must equal the saved one.

    Returns:
      A tree like `like` with the saved values.

    Raises:
      FileNotFoundError: there is no checkpoint in `directory`.
      Damaged: its files are incomplete or changed.
      ValueError: its configuration, static fields, leaves, shapes or dtypes differ from
        those given; every difference is listed.
    """
    record = _read_record(directory)
    for title, saved, now in (
        ("configuration", record["config"], describe(config)),
        ("static fields", record["static"], _static_fields(like)),
        ("leaves", record["leaves"], _leaves(like)),
    ):
        different = _differences(saved, json.loads(json.dumps(now)))
        if different:
            raise ValueError(
                f"{directory}: the {title} differ from the checkpoint:\n  "
                + "\n  ".join(different)
                + "\nrestore with what was saved, or start a new run"
            )
    try:
        arrays = Path(os.path.realpath(directory)) / ARRAYS
        restored = _read(arrays, jax.tree.map(_target, like))
    # Orbax has no error class of its own: damage surfaces as whatever failed inside.
    except Exception as error:
        raise Damaged(
            f"{directory}: the arrays are damaged or incomplete"
            f" ({type(error).__name__}: {str(error)[:300]}); restore an earlier"
            " checkpoint"
        ) from error
    return jax.tree.map(_with_empty, like, restored)


def read_config(directory: str | os.PathLike) -> Any:
    """Returns the described configuration of a checkpoint, to rebuild the run from.

    Raises:
      FileNotFoundError: there is no checkpoint in `directory`.
      Damaged: its `config.json` is damaged.
    """
    return _read_record(directory)["config"]


def describe(config: Any) -> Any:
    """Turns a configuration into JSON values; a dataclass becomes its name and fields.

    Args:
      config: dataclass, mapping with string keys, list, tuple, string, number, bool or
        None, nested.

    Raises:
      ValueError: anything else, such as an array or a function.

    Example:
      >>> from flexhinm_jax.types import AxisFactor
      >>> describe({"axis": AxisFactor(0, 1, 4)})
      {'axis': {'name': 'AxisFactor', 'axis': 0, 'stride': 1, 'size': 4}}
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = dataclasses.fields(config)
        values = {f.name: describe(getattr(config, f.name)) for f in fields}
        return {"name": type(config).__name__} | values
    if isinstance(config, Mapping) and all(isinstance(k, str) for k in config):
        return {key: describe(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [describe(value) for value in config]
    if config is None or isinstance(config, str | bool | int | float):
        return config
    raise ValueError(
        f"the configuration holds a {type(config).__name__}, which config.json cannot:"
        f" {config!r}; use dataclasses, dicts, lists, strings and numbers"
    )


@contextlib.contextmanager
def _directory(directory: str | os.PathLike, *, overwrite: bool) -> Iterator[Path]:
    """`atomic.directory` of process 0, which every process fills."""
    if jax.process_count() == 1:
        with atomic.directory(directory, overwrite=overwrite) as temporary:
            yield temporary
        return
    with contextlib.ExitStack() as stack:
        name, refused = b"", None
        if jax.process_index() == 0:
            try:
                opened = atomic.directory(directory, overwrite=overwrite)
                name = os.fsencode(stack.enter_context(opened))
            except OSError as error:
                refused = error
        padded = np.frombuffer(name.ljust(4096, b"\0"), np.uint8)
        agreed = multihost_utils.broadcast_one_to_all(padded)
        name = np.asarray(agreed, np.uint8).tobytes().rstrip(b"\0")
        if not name:
            # Every process fails together; otherwise the others wait for ever.
            raise refused or OSError(f"process 0 could not create {directory}")
        yield Path(os.fsdecode(name))
        multihost_utils.sync_global_devices("flexhinm_jax checkpoint filled")
    multihost_utils.sync_global_devices("flexhinm_jax checkpoint renamed")


def _static_fields(tree: Any, path: tuple = ()) -> dict[str, Any]:
    """Leaf path -> the static fields of every registered dataclass in the tree."""
    fields = {}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        static = {
            f.name: describe(getattr(tree, f.name))
            for f in dataclasses.fields(tree)
            if f.metadata.get("static") or f.metadata.get("pytree_node") is False
        }
        if static:
            fields[_name(path)] = {"name": type(tree).__name__} | static
    children = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree
    )[0]
    for key, child in children:
        if child is not tree:
            fields |= _static_fields(child, (*path, *key))
    return fields


def _leaves(tree: Any) -> dict[str, str]:
    """Leaf path -> dtype and shape, as in float32[4, 8]."""

    def form(leaf):
        if not hasattr(leaf, "dtype"):
            return type(leaf).__name__
        return f"{leaf.dtype}{list(leaf.shape)}"

    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): form(leaf) for path, leaf in pairs}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _differences(saved: Any, now: Any, at: str = "") -> list[str]:
    """Lines naming each field whose value differs."""
    if isinstance(saved, dict) and isinstance(now, dict):
        lines = []
        for key in dict.fromkeys([*saved, *now]):
            name = f"{at}.{key}" if at else key
            if key not in now:
                lines.append(f"{name}: saved {_short(saved[key])}, now absent")
            elif key not in saved:
                lines.append(f"{name}: not saved, now {_short(now[key])}")
            else:
                lines += _differences(saved[key], now[key], name)
        return lines
    if type(saved) is type(now) and saved == now:
        return []
    return [f"{at or 'value'}: saved {_short(saved)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


# `Checkpointer` waits: when saving fails, the asynchronous one goes on for minutes.
def _write(directory: Path, tree: Any) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, args=ocp.args.StandardSave(tree))


def _read(directory: Path, like: Any) -> Any:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory, args=ocp.args.StandardRestore(like))


def _is_empty(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and 0 in leaf.shape


def _without_empty(leaf: Any) -> Any:
    """Orbax refuses arrays of size zero, such as the dense block of an N:M weight."""
    return np.zeros((), np.int8) if _is_empty(leaf) else leaf


def _with_empty(like: Any, restored: Any) -> Any:
    if not _is_empty(like):
        return restored
    zeros = np.zeros if isinstance(like, np.ndarray) else jnp.zeros
    return zeros(like.shape, like.dtype)


def _target(leaf: Any) -> Any:
    """What orbax needs to restore one leaf of its kind to its place."""
    leaf = _without_empty(leaf)
    if isinstance(leaf, np.ndarray | np.generic) or not hasattr(leaf, "dtype"):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(leaf, jax.Array):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _read_record(directory: str | os.PathLike) -> dict[str, Any]:
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {directory} is no checkpoint of this library"
        )
    try:
        record = records.read(path)
        if not {"config", "static", "leaves"} <= set(record):
            raise ValueError("it lacks config, static or leaves")
    except ValueError as error:
        raise Damaged(
            f"{path} is damaged or from another program: {error}; restore an earlier"
            " checkpoint"
        ) from error
    return record


def _version() -> str:
    try:
        return importlib.metadata.version("flexhinm_jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
