"""Images and bytes to train on: what every installation has, or a file of your own.

Without a path nothing is downloaded: the images are scikit-learn's 1797 handwritten
digits, the text is the source of Python's own standard library. Batches are pure
functions of (seed, step), so a run that is stopped goes on with the same data.
"""

import dataclasses
import gzip
import hashlib
import struct
import sysconfig
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# Big-endian 32-bit words of the idx format: two zero bytes, the type (8 is unsigned
# byte), the number of axes (http://yann.lecun.com/exdb/mnist).
_IDX_IMAGES, _IDX_LABELS = 0x0803, 0x0801
_IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}

_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
}


@dataclasses.dataclass(frozen=True)
class Images:
    """A classification task.

    Attributes:
      x_train: f32[count, height, width, channels], standardised by the training mean
        and deviation.
      y_train: i32[count], classes from 0.
      x_test: like `x_train`.
      y_test: like `y_train`.
      classes: number of classes.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int

    def digest(self) -> str:
        """A fingerprint of all images and classes."""
        parts = (self.x_train, self.y_train, self.x_test, self.y_test)
        return hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest()[:16]


def images(path: Path | None, split_seed: int = 0) -> Images:
    """The images at `path`, or scikit-learn's digits when there is none.

    Args:
      path: a directory with the four idx files of MNIST or Fashion-MNIST, packed with
        gzip or not, or an .npz file with x_train, y_train, x_test and y_test; None for
        the digits.
      split_seed: seed of the stratified split of the digits; files bring their own.

    Raises:
      ValueError: the file is missing, empty or in another format.
    """
    if path is None:
        return _standardised(_digits(split_seed), "digits")
    path = Path(path)
    if path.is_dir():
        return _standardised(_idx_directory(path), path)
    if not path.exists():
        raise ValueError(
            f"{path}: there is no such file; need a directory with the four idx files "
            "of MNIST or an .npz file"
        )
    if path.suffix != ".npz":
        raise ValueError(
            f"{path}: need an .npz file, or the directory that holds the four idx files"
        )
    return _standardised(_npz(path), path)


def read_idx(path: Path, magic: int) -> np.ndarray:
    """The bytes of an idx file, u8[count] or u8[count, height, width].

    Args:
      path: the file, packed with gzip when it ends in .gz.
      magic: the first word it must have.

    Raises:
      ValueError: the file is empty, of another kind, cut off or too long.
    """
    raw = path.read_bytes()
    if path.suffix == ".gz" and raw:
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error})") from None
    axes = magic & 0xFF
    if not raw:
        raise ValueError(f"{path}: the file is empty; need an idx file")
    head = 4 * (1 + axes)
    found = struct.unpack(">I", raw[:4])[0] if len(raw) >= 4 else None
    if found != magic:
        given = "fewer than 4 bytes" if found is None else f"magic number 0x{found:08x}"
        raise ValueError(
            f"{path}: {given}, need 0x{magic:08x}: an idx file of unsigned bytes with "
            f"{axes} axes"
        )
    if len(raw) < head:
        raise ValueError(f"{path}: {len(raw)} bytes, the header alone has {head}")
    shape = struct.unpack(f">{axes}I", raw[4:head])
    if len(raw) - head != np.prod(shape, dtype=np.int64):
        raise ValueError(
            f"{path}: {len(raw) - head} bytes of data, the header announces "
            f"{' x '.join(map(str, shape))}; download the file again"
        )
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _idx_directory(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for name, file in _IDX_NAMES.items():
        dotted = file.replace("-idx", ".idx")
        forms = [folder / (f + end) for f in (file, dotted) for end in ("", ".gz")]
        there = [p for p in forms if p.exists()]
        if not there:
            raise ValueError(
                f"{folder}: no {file} (or {file}.gz); need the four idx files "
                f"{', '.join(_IDX_NAMES.values())}"
            )
        magic = _IDX_IMAGES if name.startswith("x") else _IDX_LABELS
        found[name] = read_idx(there[0], magic)
    return found


def _npz(path: Path) -> dict[str, np.ndarray]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; need an .npz file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz file; write one with numpy.savez")
    with np.load(path, allow_pickle=False) as arrays:
        missing = [name for name in _IDX_NAMES if name not in arrays.files]
        if missing:
            raise ValueError(
                f"{path}: no {', '.join(missing)} in it (it has "
                f"{', '.join(arrays.files) or 'nothing'}); need x_train, y_train, "
                "x_test and y_test"
            )
        try:
            return {name: arrays[name] for name in _IDX_NAMES}
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise ValueError(f"{path}: an array cannot be read ({error})") from None


def _digits(seed: int) -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    names = ("x_train", "x_test", "y_train", "y_test")
    parts: Any = train_test_split(
        digits.images,
        digits.target,
        test_size=0.3,
        stratify=digits.target,
        random_state=seed,
    )
    return dict(zip(names, parts, strict=True))


def _standardised(arrays: dict[str, np.ndarray], source: Path | str) -> Images:
    found = {}
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim == 3:
            x = x[..., None]
        if x.ndim != 4 or y.shape != x.shape[:1] or not len(x):
            raise ValueError(
                f"{source}: x_{part} has shape {x.shape} and y_{part} {y.shape}; need "
                "[count, height, width] or [count, height, width, channels] and "
                "[count], count > 0"
            )
        if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
            raise ValueError(f"{source}: y_{part} must be classes 0, 1, ...")
        found[f"x_{part}"] = x.astype(np.float32)
        found[f"y_{part}"] = y.astype(np.int32)
    if found["x_train"].shape[1:] != found["x_test"].shape[1:]:
        raise ValueError(
            f"{source}: images of {found['x_train'].shape[1:]} in x_train and of "
            f"{found['x_test'].shape[1:]} in x_test; need one size"
        )
    if not all(np.isfinite(found[f"x_{part}"]).all() for part in ("train", "test")):
        raise ValueError(f"{source}: there are NaN or infinite values in the images")
    mean, deviation = found["x_train"].mean(), found["x_train"].std()
    for part in ("train", "test"):
        found[f"x_{part}"] = (found[f"x_{part}"] - mean) / max(deviation, 1e-6)
    classes = int(max(found["y_train"].max(), found["y_test"].max())) + 1
    return Images(**found, classes=classes)


def image_rows(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of batch `step`: every epoch in a new order, whole batches only.

    Args:
      count: rows of the training set.
      batch_size: rows of a batch, at most `count`.
      seed: seed of all orders.
      step: from 0.

    Raises:
      ValueError: the batch is larger than the training set.
    """
    if not 0 < batch_size <= count:
        raise ValueError(
            f"batch_size={batch_size}: need 1 .. {count}, the rows of the training set"
        )
    epoch, place = divmod(step, count // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[place * batch_size : (place + 1) * batch_size]


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes of other files to test with.

    Attributes:
      train: u8[count].
      valid: u8[count].
      digest: fingerprint of both; bits per byte compare only where it is the same.
    """

    train: np.ndarray
    valid: np.ndarray
    digest: str


def text(path: Path | None, length: int, limit: int = 8_000_000) -> Text:
    """The bytes of `path`, or Python's standard library when there is none.

    Args:
      path: any file, of which the last tenth tests; None for the source files of the
        standard library, of which a tenth, chosen by a checksum of the name, tests.
      length: bytes of one training sequence; every part must hold one and a byte.
      limit: bytes of the standard library that are read at most.

    Raises:
      ValueError: the file is missing, empty or too short.
    """
    if path is None:
        train, valid = _standard_library(limit)
    else:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; need a text file")
        whole = path.read_bytes()
        if not whole:
            raise ValueError(f"{path}: the file is empty; need text to train on")
        cut = len(whole) - len(whole) // 10
        train, valid = whole[:cut], whole[cut:]
    for name, part in (("training", train), ("validation", valid)):
        if len(part) <= length:
            raise ValueError(
                f"{path or 'standard library'}: {len(part)} bytes of {name} text, need "
                f"more than length={length}; give a longer file (a tenth of it is for "
                "validation) or a smaller length"
            )
    return Text(
        np.frombuffer(train, np.uint8),
        np.frombuffer(valid, np.uint8),
        hashlib.sha256(train + b"\0" + valid).hexdigest()[:16],
    )


def files(root: Path, pattern: str, *skipped: str) -> dict[str, Path]:
    """Files below a folder by their names, sorted, without tests and what is installed.

    Args:
      root: the folder.
      pattern: of the last part of a name.
      *skipped: further folders that are passed over.
    """
    paths = {p.relative_to(root).as_posix(): p for p in root.rglob(pattern)}
    passed = _SKIPPED_FOLDERS.union(skipped)
    return {n: paths[n] for n in sorted(paths) if passed.isdisjoint(n.split("/"))}


def by_checksum(names: Iterable[str]) -> list[str]:
    """Names mixed, but always alike: a limit does not cut the alphabet off."""
    return sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))


def _standard_library(limit: int) -> tuple[bytes, bytes]:
    found = files(Path(sysconfig.get_path("stdlib")), "*.py")
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for name in by_checksum(found):
        if limit <= 0:
            break
        source = found[name].read_bytes()[:limit]
        limit -= len(source)
        parts[zlib.crc32(name.encode()[::-1]) % 10 == 0].append(source)
    return b"".join(parts[False]), b"".join(parts[True])


def windows(
    source: np.ndarray, batch_size: int, length: int, seed: int, step: int
) -> np.ndarray:
    """Batch `step` of random windows, i32[batch_size, length + 1]."""
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, len(source) - length, batch_size)
    return source[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def even_windows(source: np.ndarray, count: int, length: int) -> np.ndarray:
    """At most `count` windows spread over the whole text, i32[count, length + 1]."""
    count = max(1, min(count, (len(source) - 1) // length))
    starts = np.linspace(0, len(source) - length - 1, count).astype(np.int64)
    return source[starts[:, None] + np.arange(length + 1)].astype(np.int32)
