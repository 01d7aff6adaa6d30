"""Hugging Face model directories in and out, names and dtypes unchanged.

`read` takes a directory with `config.json` and either `model.safetensors` or the shards
named in `model.safetensors.index.json`. The parameters are a flat dict under the keys
of the checkpoint in torch layout `[out, in]`, so a report names the leaves as the file
does and the way back needs no table of names. They are host arrays: nothing moves to a
device, and int64 buffers, which JAX would narrow, stay int64.

`write` makes a directory that any reader of the source can load: same keys, shapes,
dtypes and shards, every other file of the source copied, and only values changed.
Weights in other formats (`pytorch_model.bin`, ONNX, ...) are not copied, because they
would still hold the unpruned model; those of its further modules (`2_Dense`) are.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexhinm_jax import arguments, atomic, types
from flexhinm_jax.io import model_card, shards, tensors
from flexhinm_jax.io.hints import OTHER_WEIGHTS, hint

__all__ = [
    "Checkpoint",
    "check_copy",
    "check_place",
    "copy_others",
    "read",
    "read_config",
    "write",
]

CONFIG = "config.json"

MODULES = "modules.json"
"""The parts of an embedding model, as sentence-transformers lists them."""

NARROWED = {"I64": np.int32, "U64": np.uint32, "F64": np.float32}
"""What JAX makes of the 64-bit dtypes by default."""

SKIPPED_FOLDERS = {".git", ".cache", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model directory in memory.

    Attributes:
      config: contents of `config.json`.
      params: key of the checkpoint -> host array, in stored dtype and torch layout.
      files: key -> name of the file that holds it.
      metadata: file name -> metadata strings of that file.
      directory: where it was read.
    """

    config: dict[str, Any]
    params: dict[str, np.ndarray]
    files: dict[str, str]
    metadata: dict[str, dict[str, str]]
    directory: Path

    def __repr__(self) -> str:
        """Kind, size and place; the arrays are in the attributes."""
        size = sum(array.nbytes for array in self.params.values())
        return (
            f"Checkpoint({self.directory.name!r}, {self.config.get('model_type')!r},"
            f" {len(self.params)} arrays, {size / 1e6:.1f} MB)"
        )


def read(directory: str | os.PathLike) -> Checkpoint:
    """Reads a model directory.

    Args:
      directory: folder with `config.json` and safetensors weights, single or sharded.

    Returns:
      The checkpoint.

    Raises:
      FileNotFoundError: the directory, its config, its weights or a shard is missing.
      ValueError: a file is damaged, `config.json` is not a JSON object, or the index
        names a key that its shard does not hold.
      ImportError: the `hf` extra is not installed.
    """
    directory = Path(directory)
    config = read_config(directory)
    layout = shards.read_index(directory)
    params = {}
    for file in layout.headers:
        params.update(tensors.read(directory / file, layout.keys_of(file)))
    return Checkpoint(
        config=config,
        params={key: params[key] for key in layout.files},
        files=layout.files,
        metadata={file: header.metadata for file, header in layout.headers.items()},
        directory=directory,
    )


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """Reads `config.json` of a model directory.

    Raises:
      FileNotFoundError: there is no such directory or no config in it.
      ValueError: the config is not a JSON object.
    """
    return shards.read_json(_existing(Path(directory)) / CONFIG)


def _existing(directory: Path) -> Path:
    if not directory.is_dir():
        folder = f"give the folder that holds {CONFIG} and {shards.SINGLE}"
        raise FileNotFoundError(
            f"{directory} is not a directory; {hint(directory, folder)}"
        )
    return directory


def write(
    directory: str | os.PathLike,
    params: Checkpoint | Mapping[str, Any],
    *,
    source: Checkpoint | str | os.PathLike | None = None,
    report: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes parameters as a copy of their source directory with new values.

    Integers and float64 that JAX narrowed to 32 bits are widened to the dtype of the
    source. No other difference of keys, shapes or dtypes is accepted.

    Args:
      directory: folder to create. It appears complete or not at all.
      params: key -> array, or a checkpoint.
      source: directory (or checkpoint read from one) that gives the keys, shards and
        all other files; may be left out when `params` is a checkpoint.
      report: what was done, such as `result.report.to_dict()`: written as
        `report.json`, and into a model card of its own (see `io.model_card.card` for
        further keys); the card of the source is kept as `README.base.md`. None copies
        the card of the source as it is.
      overwrite: replaces an existing directory that holds a `config.json`.

    Returns:
      Path of the directory.

    Raises:
      FileExistsError: `directory` exists and may not be replaced.
      FileNotFoundError: the source or a part of it is missing.
      ValueError: keys, shapes or dtypes differ from the source, a leaf is packed, tied
        weights are not equal, the output is not apart from the source, or the source
        cannot be copied.
      OSError: the disk is full or not writable; nothing is left behind.
    """
    if isinstance(params, Checkpoint):
        source = params.directory if source is None else source
        params = params.params
    if source is None:
        raise ValueError(
            "source is needed: the model directory that the parameters came from, for"
            " its config, tokenizer and shards"
        )
    source = Path(source.directory if isinstance(source, Checkpoint) else source)
    check_copy(source, Path(directory))
    check_place(directory, overwrite=overwrite)
    config = read_config(source)
    layout = shards.read_index(source)
    arrays = _as_stored(params, layout)
    _check_tied(arrays, config)
    with atomic.directory(directory, overwrite=overwrite) as temporary:
        copy_others(source, temporary)
        for file, header in layout.headers.items():
            held = {key: arrays[key] for key in layout.keys_of(file)}
            # transformers refuses a file whose metadata does not name its framework.
            metadata = {**header.metadata, "format": "pt"}
            tensors.write(temporary / file, held, metadata)
        if report is not None:
            model_card.write(temporary, model_card.texts(source, report))
        _check_written(temporary, layout)
    return Path(directory)


def _as_stored(
    params: Mapping[str, Any], layout: shards.Index
) -> dict[str, np.ndarray]:
    """Returns host arrays with exactly the keys, shapes and dtypes of the source."""
    missing = [key for key in layout.files if key not in params]
    extra = [key for key in params if key not in layout.files]
    if missing or extra:
        raise ValueError(
            "the keys differ from the source:"
            f" missing {arguments.some(missing, 3)}, not in the source"
            f" {arguments.some(extra, 3)};"
            " write the whole tree, as it was read"
        )
    arrays = {}
    for key in layout.files:
        if isinstance(params[key], types.PackedWeight):
            raise ValueError(
                f"{key} is packed; write the densified parameters, or use"
                " io.packed.write_packed"
            )
        array, name = np.asarray(params[key]), layout.dtype(key)
        if array.shape != layout.shape(key):
            raise ValueError(
                f"{key} has shape {array.shape}, the source has {layout.shape(key)};"
                " write what was read from it"
            )
        wanted = tensors.DTYPES.get(name)
        if wanted is not None and array.dtype != wanted:
            if array.dtype != NARROWED.get(name):
                raise ValueError(
                    f"{key} has dtype {array.dtype}, the source has {wanted}; cast it"
                    " back before writing"
                )
            array = array.astype(wanted)
        arrays[key] = array
    return arrays


def _check_tied(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """Refuses an output head that its embedding would silently replace on loading."""
    head = arrays.get("lm_head.weight")
    if head is None or not config.get("tie_word_embeddings", False):
        return
    for key, array in arrays.items():
        if key.endswith("embed_tokens.weight") and not np.array_equal(array, head):
            raise ValueError(
                f"lm_head.weight differs from {key}, but {CONFIG} ties them"
                " (tie_word_embeddings): a reader would use only one; exclude both"
                " from pruning"
            )


def check_copy(source: Path, output: Path) -> None:
    """Raises what copying a directory would raise, for asking before a computation.

    Args:
      source: model directory.
      output: the directory that is going to be written.

    Raises:
      ValueError: one directory is the other or lies inside it, or the source holds
        something that is no file, such as a pipe.
      FileNotFoundError: a link that leads nowhere.
      PermissionError: a file or folder that may not be read.
    """
    a, b = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise ValueError(
            f"{output} is the source {source}, or one lies inside the other; choose an"
            " output directory beside the source"
        )
    for path in _others(_existing(source)):
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(
                f"{path} is a link to {os.readlink(path)}, which does not exist; remove"
                " the link, or download the file again"
            )
        if not path.is_file():
            raise ValueError(
                f"{path} is no file that can be copied (a pipe, socket or device);"
                " remove it from the model directory"
            )
        if not os.access(path, os.R_OK):
            raise PermissionError(f"{path} may not be read; give yourself the right to")


def check_place(output: str | os.PathLike, *, overwrite: bool) -> None:
    """Raises what writing a model directory there would raise, for asking before.

    Args:
      output: the directory that is going to be written.
      overwrite: an earlier model directory there may be replaced.

    Raises:
      FileExistsError: it exists and may not be replaced, or holds no model: a
        `config.json` alone may be of anything.
    """
    atomic.check_directory(output, overwrite=overwrite)
    target = Path(output)
    if (target / CONFIG).is_file() and not any(target.glob("*.safetensors")):
        raise FileExistsError(
            f"{output} has a {CONFIG} but no weights, so it is no model directory and"
            " is not replaced; remove it by hand or choose another directory"
        )


def copy_others(source: Path, output: Path) -> None:
    """Copies every file that is not a weight file, with its folders."""
    for path in _others(source):
        target = output / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        # The hub's cache is made of links: copies the file, not the link.
        shutil.copyfile(path, target)


def _others(source: Path) -> Iterator[Path]:
    """Everything in a directory that is copied beside the weights, in order."""

    def refuse(error: OSError) -> None:
        raise error

    seen, modules = set(), _modules(source)
    for folder, folders, names in os.walk(source, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(folder))
        inner = sorted(set(folders) - SKIPPED_FOLDERS)
        # A link may lead back to a folder above it.
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in inner}
        folders[:] = [name for name in inner if real[name] not in seen]
        apart = any(Path(folder).is_relative_to(module) for module in modules)
        for name in sorted(names):
            if apart or not name.endswith((".safetensors", *OTHER_WEIGHTS)):
                yield Path(folder, name)


def _modules(source: Path) -> list[Path]:
    """Folders of the modules after the encoder, whose weights are never pruned."""
    try:
        parts = json.loads((source / MODULES).read_bytes())
        names = [str(part.get("path") or "") for part in parts]
    except (OSError, ValueError, RecursionError, TypeError, AttributeError):
        return []  # said where embeddings are computed
    return [source / name for name in names if name]


def _check_written(directory: Path, wanted: shards.Index) -> None:
    """Reads back the headers of what was written."""
    index = shards.read_index(directory)
    for key, file in wanted.files.items():
        if (
            index.files.get(key) != file
            or index.shape(key) != wanted.shape(key)
            or index.dtype(key) != wanted.dtype(key)
        ):
            raise ValueError(f"{key} was not written to {file} as in the source")
