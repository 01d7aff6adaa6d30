"""More English sentences, for training: the docstrings of the installed packages.

`corpus` keeps to text that every installation has, because its evaluation sentences
must stay the same; unlabeled text for distillation need not. Here come its calibration
split and, behind it, every package installed beside the library, filtered in the same
way. A file that shares a single sentence with the evaluation split is left out wholly:
packages carry copies of the standard library.
"""

import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from flexhinm_jax.io.sources import read_sentences
from train import corpus


def sentences(limit: int | None = None) -> list[str]:
    """Distinct training sentences, in an order that depends only on what is installed.

    Args:
      limit: how many at most; fewer packages are then read.

    Raises:
      ValueError: the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; it is a number of sentences, at least 1")
    found = dict.fromkeys(corpus.sentences("calibration"))
    held_out = {sentence.lower() for sentence in corpus.sentences("evaluation")}
    seen = {sentence.lower() for sentence in found}
    for text in _docstrings(Path(sysconfig.get_path("purelib"))):
        if limit is not None and len(found) >= limit:
            break
        made = list(corpus.split_sentences(text))
        lower = [sentence.lower() for sentence in made]
        if held_out.isdisjoint(lower):
            fresh = {s: None for s, k in zip(made, lower, strict=True) if k not in seen}
            found |= fresh
            seen.update(lower)
    return list(found)[:limit]


def from_files(paths: Iterable[Path]) -> list[str]:
    """Distinct sentences of text files, one a line, without those of the evaluation.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is not UTF-8 or has no text.
    """
    held_out = {sentence.lower() for sentence in corpus.sentences("evaluation")}
    lines = [line for path in paths for line in read_sentences(path)]
    return [s for s in dict.fromkeys(lines) if s.lower() not in held_out]


def _docstrings(root: Path) -> Iterator[str]:
    """Yields the docstrings of each source file, in an order mixed by checksum."""
    files = dict(corpus._files(root, "*.py"))
    for name in sorted(files, key=lambda name: (zlib.crc32(name.encode()), name)):
        for _, text in corpus._prose(files[name]):
            yield text
