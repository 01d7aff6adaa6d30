"""The figures of bench/RESULTS.md, drawn from the rows of bench/results."""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CAPTIONS = {
    "sparsity.png": "Perplexity of SmolLM2-135M against sparsity, the best row of a "
    "pattern; hollow where weights or masks were trained, dashed the dense model",
    "nm_time.png": "Perplexity of SmolLM2-135M at 2:4 against CPU seconds; named are "
    "the best for their time, dashed the dense model",
    "quality.png": "Quality of MiniLM against CPU time, half and three quarters of the "
    "weights gone; named are the best for their time, dashed the one-shot goal",
    "gyro.png": "Share of sum |W| kept by the permutation search against CPU time",
    "scale.png": "CPU seconds of a solve against the width of a square matrix, with "
    "one thread, and the fitted exponents",
}
SENTENCE_ENCODER = ("minilm", "permutation", "gyro", "distill")
GAIN = 0.01  # of cosine, from one named point to the next


def rows_of(results: Mapping[str, Any], name: str, table: str) -> list[dict[str, Any]]:
    """Rows of one table."""
    rows = results.get(name, {}).get("rows", ())
    return [row for row in rows if row["table"] == table]


def points(results: Mapping[str, Any]) -> Iterable[tuple[float, float, float, str]]:
    """(zeros, CPU seconds, cosine, label) of rows on the sentence encoder."""
    for name in SENTENCE_ENCODER:
        for row in results.get(name, {}).get("rows", ()):
            if "MiniLM" in row["table"] and row.get("seconds"):
                default = 0.75 if name == "gyro" else 0.5
                zeros = row.get("more", {}).get("zeros", default)
                label = row["what"].split("-c")[0].removesuffix(" control")
                label = f"distilled, {row['what']}" if name == "distill" else label
                label = f"wanda-hinm, {label}" if name == "gyro" else label
                yield zeros, row["seconds"], row["value"], label


def best(found: Iterable[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The points that no other beats in both time and quality, by time."""
    front: list[tuple[float, float, str]] = []
    for point in sorted(found, key=lambda p: (float(f"{p[0]:.2g}"), -p[1])):
        if not front or point[1] > front[-1][1] + GAIN:
            front.append(point)
    return front


def quality(results: Mapping[str, Any], axes: Any) -> None:
    """One panel per sparsity: all rows as points, the best for their time named."""
    from bench.minilm import GOALS

    every = list(points(results))
    for axis, zeros in zip(axes, (0.5, 0.75), strict=True):
        shown = [point[1:] for point in every if abs(point[0] - zeros) < 0.01]
        if not shown:
            continue
        x, y, _ = zip(*shown, strict=True)
        axis.semilogx(x, y, "o", ms=4, color="#b0b8c0")
        front = best(shown)
        axis.plot(
            *list(zip(*front, strict=True))[:2], "o-", ms=5, color="#1f4e79", lw=1
        )
        for k, (seconds, cosine, label) in enumerate(front):
            # The line rises: there is room below its first points, above its last.
            early = k < len(front) / 2
            offset, side = ((6, -8), "left") if early else ((-6, 4), "right")
            place = {"textcoords": "offset points", "xytext": offset, "ha": side}
            axis.annotate(label, (seconds, cosine), fontsize=7, **place)
        axis.axhline(GOALS["one-shot", zeros], color="#999999", ls="--", lw=0.8)
        axis.set(title=f"{zeros:.0%} gone", xlabel="CPU seconds")
        axis.set_xlim(min(x) / 2, max(x) * 3)
    axes[0].set_ylabel("mean cosine to the dense model")


def language_models(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows on the language model, all tables but that of other seeds."""
    rows = results.get("language_models", {}).get("rows", [])
    return [row for row in rows if ", seed " not in row["what"]]


def pattern_of(row: Mapping[str, Any]) -> str:
    """The pattern in the name of a row, which says how sparse it is unless it is N:M.

    Example:
      >>> pattern_of({"what": "FlexHiNM v=64 37.5% wanda"})
      'FlexHiNM v=64'
      >>> pattern_of({"what": "2:4 sparsegpt reordered"})
      '2:4'
    """
    name = re.sub(r" [\d.]+% .*", "", row["what"])
    return name.partition(" ")[0] if name == row["what"] else name


def trained(row: Mapping[str, Any]) -> bool:
    """Whether what is left, or its masks, took steps of an optimiser."""
    words = row["what"].split()
    return "reconstructed" in words or "tuned" in words or "learned" in row["table"]


def best_of_patterns(
    rows: Iterable[Mapping[str, Any]],
) -> dict[str, dict[float, Mapping[str, Any]]]:
    """Pattern -> share of zeros -> the row with the least perplexity."""
    lines: dict[str, dict[float, Mapping[str, Any]]] = {}
    for row in rows:
        zeros = round(row.get("more", {}).get("zeros", 0) * 200) / 200
        if zeros and row["table"] != "Transposable groups":
            known = lines.setdefault(pattern_of(row), {})
            if zeros not in known or row["value"] < known[zeros]["value"]:
                known[zeros] = row
    return lines


def sparsity(results: Mapping[str, Any], axes: Any) -> None:
    """The best row of every pattern at every sparsity, patterns as lines."""
    (axis,), rows = axes, language_models(results)
    lines = best_of_patterns(rows)
    for k, name in enumerate(sorted(lines, key=lambda name: -len(lines[name]))):
        x = sorted(lines[name])
        color = f"C{k % 10}"
        y = [lines[name][zeros]["value"] for zeros in x]
        axis.semilogy(x, y, "-" if k < 10 else ":", lw=1, color=color)
        axis.plot([], [], "o-" if k < 10 else "o:", color=color, ms=5, label=name)
        for zeros in x:
            fill = "white" if trained(lines[name][zeros]) else color
            at = (zeros, lines[name][zeros]["value"])
            axis.plot(*at, "o", color=color, mfc=fill, ms=5)
    axis.axhline(rows[0]["anchor"], color="#999999", ls="--", lw=0.8)
    plain_numbers(axis.yaxis)
    axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.set(xlabel="weights of the blocks gone", ylabel="perplexity")
    axis.legend(fontsize=8, frameon=False)


def nm_time(results: Mapping[str, Any], axes: Any) -> None:
    """All rows at 2:4, the best for their time named."""
    (axis,), rows = axes, language_models(results)
    shown = [
        (row["seconds"], -math.log(row["value"]), row["what"].removeprefix("2:4 "))
        for row in rows
        if pattern_of(row) == "2:4" and row.get("seconds")
    ]
    x, y, _ = zip(*shown, strict=True)
    axis.loglog(x, [math.exp(-v) for v in y], "o", ms=4, color="#b0b8c0")
    front = [(at, math.exp(-value), label) for at, value, label in best(shown)]
    axis.plot(*list(zip(*front, strict=True))[:2], "o-", ms=5, color="#1f4e79", lw=1)
    for seconds, value, label in front:
        place = {"textcoords": "offset points", "xytext": (3, 5), "rotation": 25}
        place |= {"rotation_mode": "anchor", "fontsize": 7}
        axis.annotate(label, (seconds, value), **place)
    axis.axhline(rows[0]["anchor"], color="#999999", ls="--", lw=0.8)
    axis.set_xlim(min(x) / 1.5, max(x) * 6)
    plain_numbers(axis.xaxis, wide=True)
    plain_numbers(axis.yaxis)
    axis.set(xlabel="CPU seconds", ylabel="perplexity")


def plain_numbers(axis: Any, wide: bool = False) -> None:
    """Writes the numbers of a logarithmic axis, fewer where decades are short."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 2, 3, 4, 5, 7)))
    axis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axis.set_minor_formatter(NullFormatter())


def gyro(results: Mapping[str, Any], axes: Any) -> None:
    """Retained share over CPU seconds, the published schedule as a square."""
    rows = rows_of(results, "gyro", "Search effort")
    for axis, matrix in zip(axes, {r["data"]["matrix"]: 0 for r in rows}, strict=False):
        mine = [r for r in rows if r["data"]["matrix"] == matrix]
        for published, style in ((False, "o-"), (True, "s")):
            these = [r for r in mine if r["data"]["published"] == published]
            label = "published schedule" if published else "Gyro()"
            xy = [r["seconds"] for r in these], [r["value"] for r in these]
            (line,) = axis.semilogx(*xy, style)
            place = {"textcoords": "offset points", "xytext": (-7, -3), "ha": "right"}
            at, colour = (xy[0][-1], xy[1][-1]), line.get_color()
            axis.annotate(label, at, fontsize=8, color=colour, **place)
        reference = mine[0]["data"]["reference"]
        axis.axhline(reference, color="#999999", zorder=0)
        left = axis.get_xlim()[0]
        axis.annotate(
            "reference", (left, reference), fontsize=8, color="#777777", va="bottom"
        )
        axis.set(title=matrix, xlabel="CPU seconds")
    axes[0].set_ylabel("share of sum |w| kept")


def scale(results: Mapping[str, Any], axes: Any) -> None:
    """Seconds against width, both logarithmic, with the exponents that were fitted."""
    rows, (axis,) = rows_of(results, "scale", "Growth with the width"), axes
    axis.set_prop_cycle(marker=list("osDv^<>phX*d"))
    slopes = {
        r["what"]: r["value"] for r in rows_of(results, "scale", "Exponents of growth")
    }
    for k, method in enumerate(dict.fromkeys(r["data"]["method"] for r in rows)):
        mine = [r for r in rows if r["data"]["method"] == method]
        x, y = [r["data"]["width"] for r in mine], [r["value"] for r in mine]
        axis.loglog(
            x, y, ms=4, label=f"{method}: {slopes[method]:.1f}", color=f"C{k % 10}"
        )
    axis.set_xticks(sorted({r["data"]["width"] for r in rows}))
    axis.get_xaxis().set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set(xlabel="width of a square matrix", ylabel="CPU seconds")


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Writes the figures that the results allow."""
    from matplotlib.figure import Figure

    efforts = {r["data"]["matrix"] for r in rows_of(results, "gyro", "Search effort")}
    widths = rows_of(results, "scale", "Growth with the width")
    zeros = {r.get("more", {}).get("zeros") for r in language_models(results)}
    timed = [r for r in language_models(results) if pattern_of(r) == "2:4"]
    known = {
        "sparsity.png": (sparsity, 1 if len(zeros) > 1 else 0, 6.4),
        "nm_time.png": (nm_time, 1 if timed else 0, 6.4),
        "quality.png": (quality, 2 if "minilm" in results else 0, 4.6),
        "gyro.png": (gyro, len(efforts), 3.6),
        "scale.png": (scale, 1 if widths else 0, 7.5),
    }
    for file, (panels, count, width) in known.items():
        if count:
            figure = Figure(figsize=(width * count, 3.8), layout="constrained")
            panels(results, figure.subplots(1, count, squeeze=False)[0])
            for axis in figure.axes:
                axis.spines[["top", "right"]].set_visible(False)
            save = functools.partial(figure.savefig, dpi=120)
            save(folder / file, metadata={"Software": None})


def captions(folder: Path) -> dict[str, str]:
    """File -> caption of the figures that are there."""
    return {f: text for f, text in CAPTIONS.items() if (folder / f).exists()}
