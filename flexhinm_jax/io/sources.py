"""Where models and texts come from: files, the bundled text, the Hugging Face Hub."""

import os
import re
from pathlib import Path

from flexhinm_jax import arguments
from flexhinm_jax.io.hints import OTHER_WEIGHTS

__all__ = ["BUILTIN", "find", "is_dataset", "read_sentences", "read_text", "short"]

BUILTIN = "builtin"
"""Name of the bundled text: short sentences of plain English."""

DATASET_ROWS = 512
"""Rows that are read of a dataset unless told otherwise."""

HUB_ADDRESS = re.compile(
    r"(?:https?://(?:www\.)?huggingface\.co/|hf://)"
    r"([\w.-]+/[\w.-]+)(?:/tree/([\w./-]+?))?/?"
)

HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def find(name: str | Path, cache: Path | None = None, offline: bool = False) -> Path:
    """The directory of a model: a folder, or one of the Hugging Face Hub.

    Args:
      name: a folder, OWNER/NAME[@REVISION], or the address of its page.
      cache: where downloads are kept; None for the place of huggingface_hub.
      offline: takes what is in the cache and fetches nothing.

    Returns:
      A path; one that is neither there nor a name of the Hub as it was given.

    Raises:
      ValueError: it is not there, or cannot be fetched.
      ImportError: the `hf` extra is not installed.
    """
    if address := HUB_ADDRESS.fullmatch(str(name)):
        name = "@".join(filter(None, address.groups()))
    path = Path(name)
    remote = HUB_NAME.fullmatch(str(name))
    if path.exists() or remote is None:
        return path
    need = f"{name} is no folder here; fetching it from the Hub needs huggingface_hub"
    with arguments.extra("hf", need):
        import huggingface_hub
        from huggingface_hub import constants, errors
    try:
        folder = huggingface_hub.snapshot_download(
            remote["repo"],
            revision=remote["revision"],
            cache_dir=cache,
            local_files_only=offline,
            ignore_patterns=[f"*{suffix}" for suffix in OTHER_WEIGHTS],
        )
    # The package and its transport raise many kinds, some of them no OSError.
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        why = f"{type(error).__name__}: {why}"
        if isinstance(error, errors.LocalEntryNotFoundError):
            closed = offline or constants.HF_HUB_OFFLINE
            why = "offline nothing is fetched" if closed else "the Hub does not answer"
            why = f"it is not in the cache, and {why}"
        raise ValueError(
            f"{name} is no folder here, and not to be had from the Hugging Face Hub:"
            f" {why}"
        ) from error
    return Path(folder)


def short(path: Path) -> str:
    """A model directory for people: OWNER/NAME in a cache of the Hub, or its last name.

    Args:
      path: of a directory.

    Example:
      >>> short(Path("hub/models--owner--tiny/snapshots/0123"))
      'owner/tiny'
      >>> short(Path("/models/tiny"))
      'tiny'
    """
    path = Path(os.path.abspath(path))
    *_, repository, kind, _ = ("", "", *path.parts)
    remote = re.fullmatch(r"models--(.+?)--(.+)", repository)
    if kind == "snapshots" and remote:
        return f"{remote[1]}/{remote[2]}"
    return path.name


def read_text(source: str | Path, limit: int | None = None) -> str:
    """Reads a text, line ends as they are, without the mark that Windows begins with.

    Args:
      source: a file, "builtin", or hf:DATASET[:CONFIG]:SPLIT:COLUMN.
      limit: rows of a dataset; None takes `DATASET_ROWS`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not UTF-8, or the dataset cannot be read.
      ImportError: the `datasets` extra is not installed.
    """
    if str(source) == BUILTIN:
        return Path(__file__).with_name("builtin.txt").read_text(encoding="utf-8")
    if is_dataset(source):
        return "\n".join(_rows(str(source), limit or DATASET_ROWS))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a UTF-8 text")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error}; save it as UTF-8"
        ) from error


def is_dataset(source: str | Path) -> bool:
    """Whether a source is a dataset of the Hub, not a file."""
    return str(source).startswith("hf:")


def read_sentences(source: str | Path, limit: int | None = None) -> list[str]:
    """Reads a text of one sentence a line; blank lines are skipped.

    Args:
      source: see `read_text`.
      limit: takes the first so many sentences; None takes all.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not UTF-8 or has no text.
    """
    lines = [line.strip() for line in read_text(source, limit).splitlines()]
    sentences = [line for line in lines if line]
    if not sentences:
        raise ValueError(f"{source} has no text; give one sentence a line")
    return sentences[:limit]


def _rows(source: str, limit: int) -> list[str]:
    """The first rows with text of a column of a dataset."""
    parts = source.split(":")[1:]
    if len(parts) not in (3, 4) or not all(parts):
        raise ValueError(
            f"{source}: write hf:DATASET[:CONFIG]:SPLIT:COLUMN, such as"
            " hf:Salesforce/wikitext:wikitext-2-raw-v1:train:text"
        )
    with arguments.extra("datasets", "reading a dataset needs datasets"):
        import datasets
    name, *config, split, column = parts
    rows: list[str] = []
    try:
        for row in datasets.load_dataset(name, *config, split=split, streaming=True):
            if len(rows) == limit:
                break
            if text := str(row[column]).strip():
                rows.append(text)
    # The package and its transport raise many kinds.
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"{source}: {type(error).__name__}: {why}") from error
    return rows
