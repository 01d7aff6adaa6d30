"""Renders bench/RESULTS.md and its figures from bench/results/*.json.

    make bench-report                # after any benchmark; reads, measures nothing
    python -m bench.report --check   # exits with 1 if RESULTS.md is not up to date

Every row has the figure measured, the anchor it is held against (a published number, a
goal or the reference of the same run), the ratio of the two and the command that writes
the figure again. What a file does not hold is "not measured"; files and parts without a
renderer are listed by name. A new file needs a function in `RENDERERS`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench import cost_tables as cost
from bench import figures
from bench import quality_tables as quality
from bench.tables import NOT_MEASURED, Table, markdown

BENCH = Path(__file__).parent
RESULTS = BENCH / "results"
PAGE = BENCH / "RESULTS.md"


class Renderer(NamedTuple):
    """What shows a file.

    Attributes:
      title: heading of its section.
      tables: makes its tables.
      parts: its top-level keys that are shown; None shows all.
    """

    title: str
    tables: Callable[[Any], Iterator[Table]]
    parts: set[str] | None


#: Told once for the whole page, not part by part.
ABOUT = {"jax", "machine", "quick", "device", "interpreted", "digest", "limits"}

RENDERERS = {
    "minilm": Renderer("Sentence encoder", quality.minilm, {"rows"}),
    "distill": Renderer("Distillation", quality.distill, None),
    "masks": Renderer(
        "Learned masks",
        quality.masks,
        {"figures", "layer", "memory", "model", "longer", "bytes", "hyper", "noise"},
    ),
    "armor": Renderer("ARMOR", quality.armor, {"layers", "model"}),
    "permutation": Renderer("Input orders", quality.permutation, {"layers", "model"}),
    "gyro": Renderer(
        "Gyro",
        quality.gyro,
        {"quality", "regions", "plain", "stacked", "curve", "minilm"},
    ),
    "oneshot": Renderer(
        "One-shot pruners", quality.oneshot, {"layers", "times", "tiles"}
    ),
    "peers": Renderer(
        "Peers", cost.peers, {"layers", "masks", "torch", "torch default threads"}
    ),
    "overhead": Renderer("Cost of training", cost.overhead, None),
    "scale": Renderer("Decoders in bounded memory", cost.scale, None),
    "training": Renderer(
        "Quality of training",
        quality.training,
        {"recipes", "bytes", "masks", "byte_masks"},
    ),
    "kernels": Renderer("Packed products, CPU", cost.kernels, {"layers", "minilm"}),
    "gpu": Renderer("Packed products, GPU", cost.gpu, {"numerics", "times"}),
    "gpu_compile": Renderer(
        "Kernels compiled offline", cost.gpu_compile, {"cases", "executed_on_a_gpu"}
    ),
}


def render(results: Mapping[str, Any], shown: list[tuple[str, str]]) -> str:
    """The page of all results.

    Args:
      results: file name without ".json" -> its content.
      shown: (file, caption) of the figures.
    """
    lines = [
        "# Measurements",
        "",
        "Made by `make bench-report` from `bench/results/*.json`, never by hand. The",
        "ratio is measured / anchor; the note above a table says which side of 1 is",
        "better. Rows were measured at different times on machines with two CPU cores,",
        "often busy with other work: compare CPU seconds within a table only.",
        "",
    ]
    for file, caption in shown:
        lines += [f"![{caption}](results/{file})", "", f"*{caption}*", ""]
    odd: list[str] = []
    for name in [*RENDERERS, *(n for n in sorted(results) if n not in RENDERERS)]:
        if name not in RENDERERS:
            odd.append(f"`{name}.json`: no renderer in `bench/report.py` yet")
            continue
        renderer = RENDERERS[name]
        lines += [f"## {renderer.title}", ""]
        if name not in results:
            lines += [f"{NOT_MEASURED.capitalize()}: no `{name}.json`.", ""]
            continue
        found = results[name]
        version = f", jax {found['jax']}" if "jax" in found else ""
        lines += [f"From `bench/results/{name}.json`{version}.", ""]
        try:
            tables = [t for t in renderer.tables(found) if t.rows]
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            odd.append(f"`{name}.json`: another form than expected ({error!r})")
            lines += ["Not shown, see the end of the page.", ""]
            continue
        lines += [markdown(table) for table in tables]
        if renderer.parts is not None:
            hidden = sorted(found.keys() - renderer.parts - ABOUT)
            odd += [f"`{name}.json`: part `{part}`" for part in hidden]
    lines += ["## Not shown", ""]
    lines += [f"- {text}" for text in odd] or ["Everything is shown."]
    return "\n".join(lines) + "\n"


def load(folder: Path = RESULTS) -> dict[str, Any]:
    """File name without ".json" -> content."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}


def main() -> int:
    """Renders the page, or checks it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    results = load()
    if args.check:
        if PAGE.exists() and PAGE.read_text() == render(
            results, figures.captions(RESULTS)
        ):
            return 0
        print("bench/RESULTS.md is not up to date: make bench-report", file=sys.stderr)
        return 1
    PAGE.write_text(render(results, figures.draw(results, RESULTS)))
    print(f"wrote {PAGE.relative_to(BENCH.parent)} from {len(results)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
