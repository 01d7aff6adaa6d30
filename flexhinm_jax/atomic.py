"""Writes that appear whole or not at all, by one process at a time.

A writer fills a temporary sibling of its target and renames it at the end. A rename
inside one file system is atomic, so a reader never sees a half-written file and a
failure (disk full, interrupt, bad data) leaves nothing behind.

Who writes a folder holds its lock, a long run from the beginning. The lock belongs to
the process, so one that was killed leaves files behind but no lock: who has it next
removes them.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from flexhinm_jax import arguments

try:
    import fcntl
except ImportError:  # a system without it locks nothing
    fcntl = None

__all__ = [
    "InUse",
    "check_directory",
    "directory",
    "file",
    "flush",
    "is_temporary",
    "locked",
    "os_error",
    "swap",
    "sweep",
]

MARKER = "config.json"
"""File by which an earlier output is recognised."""


class InUse(OSError):
    """Another process is writing there."""


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Keeps other processes from writing `path` while the block runs.

    The lock is a file `.NAME.lock` beside the target, which holds the number of the
    process. Blocks of one process may be nested. What a process that was killed left
    beside the target is removed.

    Args:
      path: file or folder, which need not exist; missing parents are created.

    Yields:
      Nothing.

    Raises:
      FileExistsError: a file of the name of the lock holds something else.
      InUse: another process holds the lock; the message names it.
    """
    target = Path(os.path.realpath(path))
    if target in _HELD or fcntl is None:
        yield
        return
    created = [p for p in target.parents if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    handle, alone = _taken(lock, path)
    _HELD.add(target)
    try:
        if alone:
            sweep(target.parent, target)
        yield
    finally:
        _HELD.discard(target)
        lock.unlink(missing_ok=True)
        os.close(handle)
        _remove_empty(created)


_HELD: set[Path] = set()
"""Targets that this process has locked."""


def sweep(folder: Path, target: Path | None = None) -> None:
    """Removes what writers that were killed left, where this process alone writes.

    A directory that was put aside and not yet replaced stays.

    Args:
      folder: where to look.
      target: what they wrote there; None for anything, in folders inside too.
    """
    names = folder.rglob(".*") if target is None else folder.glob(".*")
    for path in list(names):
        left = _HIDDEN.fullmatch(path.name)
        if left is None or (target is not None and left["name"] != target.name):
            continue
        if left["kind"] == "tmp" or (folder / left["name"]).exists():
            _remove(path)


_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{8}")
"""Names that `_hidden` gives."""


def is_temporary(path: Path) -> bool:
    """Whether a name is one that a writer which was killed leaves."""
    return _HIDDEN.fullmatch(path.name) is not None


def _taken(lock: Path, path: str | os.PathLike) -> tuple[int, bool]:
    """Opens and locks a file that holds the number of this process.

    Returns:
      The open file, and whether it is locked: some file systems have no locks.

    Raises:
      FileExistsError: it holds something else, and is not touched.
      InUse: another process holds it.
    """
    while True:
        handle, alone = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666), True
        try:
            assert fcntl is not None  # asked before
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            raise InUse(
                f"{path} is being written by {owner or 'another process'}; wait for"
                " its end, or choose another name"
            ) from error
        except OSError:  # a file system without locks
            alone = False
        # The owner before may have removed the file between the two lines above.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(lock)):
                break
        os.close(handle)
    if not os.pread(handle, 200, 0).startswith(_OWNER) and os.fstat(handle).st_size:
        os.close(handle)
        raise FileExistsError(
            f"{lock} is no lock of this library, which keeps one under this name while"
            f" it writes {path}; move it away, or choose another name"
        )
    os.ftruncate(handle, 0)
    with contextlib.suppress(OSError):  # a full disk: locked, without a name
        os.write(handle, _OWNER + f"{os.getpid()} on {socket.gethostname()}\n".encode())
    return handle, alone


_OWNER = b"process "
"""How the text of a lock begins."""


@contextlib.contextmanager
def file(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling of `path`, which becomes `path` on success.

    Args:
      path: file to write; missing parents are created.
      overwrite: replaces an existing file.

    Yields:
      Path to write to. It does not exist yet.

    Raises:
      FileExistsError: `path` exists and `overwrite` is False, or it is a directory.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise FileExistsError(f"{path} is a directory; name a file")
    if target.exists() and not overwrite:
        raise _exists(path)
    with _sibling(target) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)


@contextlib.contextmanager
def directory(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary sibling of `path`, which becomes `path` on success.

    Args:
      path: directory to write; missing parents are created.
      overwrite: replaces an existing directory that is empty or holds a config.json.
        Any other directory stays: it is not something that this package wrote.

    Yields:
      Path of the directory to fill.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
      InUse: another process writes it.
    """
    target = Path(os.path.realpath(path))
    with locked(path), _sibling(target) as temporary:
        check_directory(path, overwrite=overwrite)
        temporary.mkdir()
        yield temporary
        flush(temporary)
        swap(temporary, target)


def check_directory(path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raises what `directory` would raise, for asking before a long computation.

    Args:
      path: the directory that is going to be written.
      overwrite: an earlier output there may be replaced.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
    """
    target = Path(os.path.realpath(path))
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{path} is a file; name a directory")
    if not overwrite:
        raise _exists(path)
    if any(target.iterdir()) and not (target / MARKER).is_file():
        raise FileExistsError(
            f"{path} has no {MARKER}, so it is not an earlier output and is not"
            " replaced; remove it by hand or choose another directory"
        )


def os_error(path: str | os.PathLike, error: Exception) -> OSError | None:
    """The OSError inside an error of a native writer, or None when there is none.

    safetensors and tensorstore (below orbax) report a full disk in errors of their own,
    with the system's number in the text.
    """
    number = re.search(r"\(os error (\d+)\)|os_error_code='(\d+)'", str(error))
    if number is None:
        return None
    code = int(number[1] or number[2])
    return OSError(code, os.strerror(code), os.fspath(path))


@contextlib.contextmanager
def _sibling(target: Path) -> Iterator[Path]:
    """Yields an unused hidden name beside `target`; removes it on failure."""
    created = [p for p in target.parents if not p.exists()]
    temporary = _hidden(target, "tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except BaseException:
        _remove(temporary)
        _remove_empty(created)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders, the innermost first, as far as they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def flush(folder: Path) -> None:
    """Brings all files of a folder to the disk."""
    for inner in folder.rglob("*"):
        if inner.is_file():
            _flush(inner)


def swap(temporary: Path, target: Path) -> None:
    """Renames `temporary` to `target`; an old directory returns if that fails.

    Args:
      temporary: on the same disk as `target`.
      target: as `check_directory` accepts it.
    """
    if not target.exists():
        os.rename(temporary, target)
        return
    old = _hidden(target, "old")
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    _remove(old)


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    # Without this a power cut after the rename can leave a file of the right name and
    # length without its data.
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def _exists(path: str | os.PathLike) -> FileExistsError:
    return FileExistsError(
        f"{path} exists; pass {arguments.say('overwrite')} to replace it, or choose"
        " another name"
    )
