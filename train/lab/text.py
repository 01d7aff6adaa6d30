"""English sentences that every installation has: to calibrate, evaluate and train on.

Nothing is downloaded: the text is documentation. It is the docstrings and help topics
of Python's standard library, read from its source files without importing them, and the
data-set descriptions that scikit-learn ships. Code, tables, lists and parameter
descriptions are dropped; what is left are ordinary sentences about technical matters.
Unlabeled text for training need not stay the same: `training` adds the docstrings of
every package installed beside the library.

A document (one source file or one help topic) belongs wholly to calibration or wholly
to evaluation, by a checksum of its name, and a sentence found in several documents
counts only for the first. So no evaluation sentence was seen in calibration.

The text follows the version of Python and of scikit-learn: compare numbers only where
`digest()` is the same.
"""

import ast
import functools
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from flexhinm_jax.io.sources import read_sentences
from train.lab.data import by_checksum, files

Split = Literal["calibration", "evaluation"]

MIN_WORDS, MAX_WORDS = 6, 40


def sentences(split: Split, limit: int | None = None) -> list[str]:
    """Returns the sentences of one split, in an order that is always the same.

    Args:
      split: "calibration" or "evaluation".
      limit: how many at most. They are taken evenly from the whole split, so a few of
        them already cover many documents.

    Raises:
      ValueError: the split is unknown or the limit is not positive.
    """
    if split not in ("calibration", "evaluation"):
        raise ValueError(f"split is {split!r}; it is 'calibration' or 'evaluation'")
    found = _by_split()[split]
    if limit is None or limit >= len(found):
        return list(found)
    if limit < 1:
        raise ValueError(f"limit={limit}; it is a number of sentences, at least 1")
    return [found[k * len(found) // limit] for k in range(limit)]


def training(limit: int | None = None) -> list[str]:
    """Distinct training sentences, in an order that depends only on what is installed.

    First the calibration split. A file that shares a single sentence with the
    evaluation split is left out wholly: packages carry copies of the standard library.

    Args:
      limit: how many at most; fewer packages are then read.

    Raises:
      ValueError: the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; it is a number of sentences, at least 1")
    found = dict.fromkeys(sentences("calibration"))
    held_out = {sentence.lower() for sentence in sentences("evaluation")}
    seen = {sentence.lower() for sentence in found}
    for text in _docstrings(Path(sysconfig.get_path("purelib"))):
        if limit is not None and len(found) >= limit:
            break
        made = list(split_sentences(text))
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
    held_out = {sentence.lower() for sentence in sentences("evaluation")}
    lines = [line for path in paths for line in read_sentences(path)]
    return [s for s in dict.fromkeys(lines) if s.lower() not in held_out]


def digest() -> str:
    """Returns a fingerprint of both splits; equal digests mean equal sentences."""
    text = "\n".join("\n".join(lines) for lines in _by_split().values())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _by_split() -> dict[Split, tuple[str, ...]]:
    found: dict[Split, list[str]] = {"calibration": [], "evaluation": []}
    seen: set[str] = set()
    for name, text in documents():
        for sentence in split_sentences(text):
            if sentence.lower() not in seen:
                seen.add(sentence.lower())
                found[split_of(name)].append(sentence)
    return {split: tuple(lines) for split, lines in found.items()}


def split_of(document: str) -> Split:
    """The split that a document belongs to: a third of them go to evaluation."""
    return "evaluation" if zlib.crc32(document.encode()) % 3 == 0 else "calibration"


def documents() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of every document, sorted by name within each source."""
    library = Path(sysconfig.get_path("stdlib"))
    for name, path in files(library, "*.py", "encodings").items():
        for part, text in _prose(path):
            yield f"python/{name}{part}", text
    descriptions = _scikit_learn() / "datasets" / "descr"
    for name, path in files(descriptions, "*.rst").items():
        yield f"scikit-learn/{name}", path.read_text(encoding="utf-8")


def _scikit_learn() -> Path:
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the corpus reads scikit-learn's data-set descriptions; "
            "install it with pip install scikit-learn"
        )
    return Path(spec.submodule_search_locations[0])


def _prose(path: Path) -> Iterator[tuple[str, str]]:
    """Yields ("", docstrings) of a source file, or ("#topic", text) of pydoc's help."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a deliberately broken file
        return
    if path.parent.name == "pydoc_data":
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                for topic, text in zip(node.keys, node.values, strict=True):
                    if isinstance(topic, ast.Constant) and isinstance(
                        text, ast.Constant
                    ):
                        yield f"#{topic.value}", inspect.cleandoc(str(text.value))
        return
    documented: Any = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes: Any = (n for n in ast.walk(tree) if isinstance(n, documented))
    yield "", "\n\n".join(ast.get_docstring(n) or "" for n in nodes)


def _docstrings(root: Path) -> Iterator[str]:
    """Yields the docstrings of each source file, in an order mixed by checksum."""
    found = files(root, "*.py", "encodings")
    for name in by_checksum(found):
        for _, text in _prose(found[name]):
            yield text


def split_sentences(text: str) -> Iterator[str]:
    """Yields the plain English sentences of a documentation text."""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        lines = paragraph.rstrip().split("\n")
        if _is_running_text(lines):
            yield from filter(_is_english, _cut(_without_markup(" ".join(lines))))


# What begins a line of code, of a list, of a table, of a directive or of a parameter.
_NOT_TEXT = re.compile(
    r"""\s*(
        >>>|\.\.\.|\.\.[ ]|[$%#|+@]          # prompts, directives, tables
        |[-*+•o][ ]|\(?(\d+|[a-z])[.)][ ]     # list items
        |:\w+|\w+[ ]*(--|:|=|-)([ ]|$)       # parameters
        |[=\-~^*_"+]{3,}                     # rules and underlined titles
    )""",
    re.VERBOSE,
)


def _is_running_text(lines: list[str]) -> bool:
    indented = any(line[:1].isspace() for line in lines)
    return not indented and not any(_NOT_TEXT.match(line) for line in lines)


def _without_markup(text: str) -> str:
    text = re.sub(r":[\w:]+:`~?([^`<]*)(<[^`]*>)?`", r"\1", text)  # :role:`target`
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_*", r"\1", text)  # `link <address>`_
    text = re.sub(r"``?([^`]+)``?_*", r"\1", text)  # ``code``, `name`
    text = re.sub(r"`+([^`']+)'+", r"\1", text)  # `quoted'
    text = re.sub(r"(?<!\w)(\*\*?)(\S(?:[^*]*\S)?)\1(?!\w)", r"\2", text)  # *emphasis*
    return re.sub(r"\s+", " ", text).strip()


_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_ABBREVIATION = re.compile(
    r"\b(?:[A-Za-z]|e\.g|i\.e|etc|cf|vs|approx|resp|al|Mr|Mrs|Dr|St|No|Fig|Eq|Sec|Ch|"
    r"Inc|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Oct|Nov|Dec|pp|Vol)\.$"
)


def _cut(text: str) -> Iterator[str]:
    start = 0
    for end in _END.finditer(text):
        if not _ABBREVIATION.search(text[start : end.start()]):
            yield text[start : end.start()]
            start = end.end()
    yield text[start:]


_PLAIN = re.compile(r"[A-Z](?:[A-Za-z0-9 ,;'\"()%\-]|\b(?:e\.g|i\.e)\.)*\.")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_NAME = re.compile(r"[a-z]+[A-Z]|[A-Z]{3,}|[A-Za-z]+\d|\d[A-Za-z]|\w+\(\)|--")
_LEGAL = re.compile(r"copyright|licen[sc]e|warrant|permission", re.IGNORECASE)
_FUNCTION_WORDS = frozenset(
    "a an the of to in is are was be been it its this that these those and or but not "
    "for with by on at as from if when which who will can may must should has have no "
    "there then than so all any each into".split()
)


def _is_english(sentence: str) -> bool:
    """True for a sentence that a person would write, without code in it."""
    if not _PLAIN.fullmatch(sentence) or _LEGAL.search(sentence):
        return False
    words = [word.strip(",;'\"()%.") for word in sentence.split()]
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return False
    if sentence.count("(") != sentence.count(")") or sentence.count('"') % 2:
        return False
    if len(_NAME.findall(sentence)) > 1:  # one acronym or one name is still English
        return False
    plain = sum(bool(_WORD.fullmatch(word)) for word in words)
    linking = sum(word.lower() in _FUNCTION_WORDS for word in words)
    return plain >= 0.85 * len(words) and linking >= max(2, len(words) // 5)
