"""Writes that appear whole or not at all.

A writer fills a temporary sibling of its target and renames it at the end. A rename
inside one file system is atomic, so a reader never sees a half-written file and a
failure (disk full, interrupt, bad data) leaves nothing behind.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_directory", "directory", "file", "flush", "os_error", "swap"]


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
def directory(
    path: str | os.PathLike, *, overwrite: bool = False, marker: str = "config.json"
) -> Iterator[Path]:
    """Yields an empty temporary sibling of `path`, which becomes `path` on success.

    Args:
      path: directory to write; missing parents are created.
      overwrite: replaces an existing directory that is empty or holds `marker`. Any
        other directory stays: it is not something that this package wrote.
      marker: file by which an earlier output is recognised.

    Yields:
      Path of the directory to fill.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
    """
    check_directory(path, overwrite=overwrite, marker=marker)
    target = Path(os.path.realpath(path))
    with _sibling(target) as temporary:
        temporary.mkdir()
        yield temporary
        flush(temporary)
        swap(temporary, target)


def check_directory(
    path: str | os.PathLike, *, overwrite: bool = False, marker: str = "config.json"
) -> None:
    """Raises what `directory` would raise, for asking before a long computation.

    Args:
      path: the directory that is going to be written.
      overwrite: an earlier output there may be replaced.
      marker: file by which an earlier output is known.

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
    if any(target.iterdir()) and not (target / marker).is_file():
        raise FileExistsError(
            f"{path} has no {marker}, so it is not an earlier output and is not"
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
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


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
        f"{path} exists; pass overwrite=True (--force on the command line) to replace"
        " it, or choose another name"
    )
