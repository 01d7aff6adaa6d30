"""The model card of a pruned directory: what it was made from, how, and how good it is.

A card is Markdown behind a header of YAML, as the Hugging Face Hub reads it. What the
header of the card before says about licence and languages holds for the pruned model
too; the rest of that card is kept beside the new one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flexhinm_jax.io import records
from flexhinm_jax.io.sources import short

__all__ = [
    "BASE_CARD",
    "CARD",
    "REPORT",
    "card",
    "cards",
    "is_pruned",
    "texts",
    "write",
]

REPORT = "report.json"

CARD = "README.md"

BASE_CARD = "README.base.md"
"""Where the card of the model before is kept."""

INHERITED = (
    *("license", "license_name", "license_link", "language", "pipeline_tag"),
    *("library_name", "datasets"),
)
TAGS = ("pruned", "sparse", "flexhinm_jax")
NOTHING = ("", "~", "null")

ROWS = (
    ("base model", "base"),
    ("method", "method"),
    ("start", "start"),
    ("sparsity asked for", "sparsity"),
    ("spread", "allocate"),
    ("target", "target"),
    ("reconstruction", "reconstruct"),
    ("steps", "steps"),
    ("rate of the weights", "weights_rate"),
    ("calibration", "calibration"),
    ("seed", "seed"),
    ("flexhinm_jax", "version"),
)
"""(name in the table, key of the document)."""


def texts(source: Path, report: Mapping[str, Any]) -> dict[str, str]:
    """What stands beside every pruned model: the report, the card, the card before.

    Args:
      source: directory of the model before.
      report: the contents of `report.json`, see `card`.

    Returns:
      File name -> text.
    """
    return {REPORT: records.text(report) + "\n"} | cards(source, report)


def is_pruned(source: Path) -> bool:
    """Whether a directory says in its report that it was pruned."""
    try:
        return bool(records.read(source / REPORT).get("weights"))
    except (OSError, ValueError):
        return False


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes texts into a folder.

    Bytes that are no UTF-8, of a card or of the name of a file, come back as they were:
    they are surrogates in the text.

    Args:
      folder: of the model.
      texts: file name -> text.
    """
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))


def cards(
    source: Path, told: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The new card, and the old one under its new name.

    Args:
      source: directory of the model before, whose name is the "base" of the card unless
        it is told.
      told: see `card`.
      evaluation: see `card`.

    Returns:
      File name -> text, see `write`.
    """
    path = source / CARD
    old = None
    if path.is_file():
        old = path.read_bytes().decode("utf-8", "surrogateescape")
    kept = {} if old is None else {BASE_CARD: old}
    return {CARD: card({"base": short(source), **told}, old, evaluation)} | kept


def card(
    told: Mapping[str, Any],
    old: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """The text of a card.

    Args:
      told: the report of the run: the keys of `ROWS`, "commands" in their order,
        "rules", "exceptions", "weights", "skipped", "moved", "tuned" and "total"; what
        is missing or None is left out. "base" is the name of the model before; one of
        the form owner/name is linked.
      old: the card of the model before.
      evaluation: what `flexhinm eval` found; None for not measured.

    Returns:
      Markdown behind a YAML header.
    """
    base = str(told.get("base") or "")
    before = _header(old)
    header = {k: v for k, v in before.items() if k in INHERITED and v not in NOTHING}
    if base.count("/") == 1 and not base.startswith(("/", ".")):
        header["base_model"] = base
    header["tags"] = list(dict.fromkeys([*_tags(before), *TAGS]))
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {Path(base).name or 'A model'}, pruned",
        "",
        _summary(told),
        "",
        "| | |",
        "|---|---|",
    ]
    for name, key in ROWS:
        if told.get(key) not in (None, "", {}):
            lines.append(f"| {name} | {_cell(told[key])} |")
    for name in ("rules", "exceptions"):
        for regex, action in dict(told.get(name) or {}).items():
            lines.append(f"| rule | {_cell(f'`{regex}`: {action}')} |")
    lines.append("")
    if evaluation is not None:
        lines += ["## Figures", "", *_figures(evaluation), ""]
    if told.get("commands"):
        lines += ["## How it was made", "", "```", *map(str, told["commands"]), "```"]
        lines.append("")
    if old is not None:
        lines += [f"The card of the model before is `{BASE_CARD}`.", ""]
    return "\n".join(lines)


def _header(text: str | None) -> dict[str, Any]:
    """The YAML header of a card, scalars as text: "no" is a language.

    It is empty where there is none that can be read.
    """
    text = (text or "").removeprefix("\ufeff").replace("\r\n", "\n")
    text = text.encode("utf-8", "replace").decode()
    head, closed, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not closed:
        return {}
    try:
        entries = yaml.load(head, yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _tags(header: Mapping[str, Any]) -> list[str]:
    tags = header.get("tags")
    return [str(tag) for tag in tags] if isinstance(tags, list) else []


def _summary(told: Mapping[str, Any]) -> str:
    """What is zero, where, and what became of the other leaves."""
    return f"{_zeros(told)}; {_others(told)} (`{REPORT}`)."


def _zeros(told: Mapping[str, Any]) -> str:
    """Which weights are zero, and in which file."""
    total, weights = told.get("total") or {}, told.get("weights") or ()
    if "zeros" not in total:
        return "Weights are zero where the pattern says so"
    zeros, dense = total["zeros"], total.get("dense_zeros", total["zeros"])
    factored = [
        w
        for w in weights
        if isinstance(w, Mapping) and w.get("product_zeros") is not None
    ]
    if not factored:
        return f"{zeros:.1%} of {len(weights)} weight matrices are zero"
    return (
        f"{zeros:.1%} of the cores of {len(weights)} weight matrices are zero, in"
        " packed form; the safetensors files of the model hold"
        f" {len(factored)} of them multiplied out with their block-diagonal factors,"
        f" and there {dense:.1%} is zero"
    )


def _others(told: Mapping[str, Any]) -> str:
    """What became of the leaves that were not pruned."""
    count, moved = len(told.get("skipped") or ()), told.get("moved")
    if told.get("tuned"):
        return (
            f"{count} other leaves were not pruned, but biases and norms among them"
            " were trained with the weights that stay"
        )
    if moved is None:
        return f"{count} other leaves were not pruned"
    if moved:
        return (
            f"{len(moved)} of {count} other leaves have new values, such as"
            f" `{moved[0]}`: biases were refitted, or leaves trained along"
        )
    return f"{count} other leaves are as they were"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _figures(evaluation: Mapping[str, Any]) -> list[str]:
    """Perplexities of decoders, or similarities of encoders and classifiers."""
    source = evaluation["images" if "images" in evaluation else "text"]
    where = f"on `{Path(str(source)).name}`"
    if evaluation["kind"] == "classifier":
        return [
            f"Beside the model before, {where}, {evaluation['count']} images: the same"
            f" class in {evaluation['same_class']:.1%}, mean cosine similarity of the"
            f" logits {evaluation['mean_cosine']:.4f}."
        ]
    if evaluation["kind"] == "encoder":
        return [
            f"Cosine similarity to the embeddings of the model before, {where},"
            f" {evaluation['lines']} lines: mean {evaluation['mean_cosine']:.4f},"
            f" 5 % quantile {evaluation['quantile_5']:.4f}."
        ]
    rows = evaluation["models"]
    length = rows[0]["length"]
    return [
        f"Perplexity {where}, {rows[0]['tokens']} tokens in windows of {length}:",
        "",
        "| model | zeros | perplexity | bits per byte |",
        "|---|---|---|---|",
        *(
            f"| {_cell(short(Path(row['model'])))} | {row['zeros']:.1%}"
            f" | {row['perplexity']:.4f} | {row['bits_per_byte']:.4f} |"
            for row in rows
        ),
    ]
