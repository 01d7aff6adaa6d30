"""The figures of bench/RESULTS.md, drawn from the rows of bench/results."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CAPTIONS = {
    "quality.png": "Quality of MiniLM against CPU time, half and three quarters of the "
    "weights gone; named are the best for their time, dashed the one-shot goal",
    "gyro.png": "Share of sum |W| kept by the permutation search against CPU time",
    "scale.png": "CPU seconds of a solve against the width of a square matrix, 2:4",
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
        axis.axhline(
            GOALS["one-shot", zeros].excellent, color="#999999", ls="--", lw=0.8
        )
        axis.set(title=f"{zeros:.0%} gone", xlabel="CPU seconds")
        axis.set_xlim(min(x) / 2, max(x) * 3)
    axes[0].set_ylabel("mean cosine to the dense model")


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
    """Seconds against width, both logarithmic, methods named at their last point."""
    rows, (axis,) = rows_of(results, "scale", "Growth with the width"), axes
    for method in dict.fromkeys(r["data"]["method"] for r in rows):
        mine = [r for r in rows if r["data"]["method"] == method]
        x, y = [r["data"]["width"] for r in mine], [r["value"] for r in mine]
        axis.loglog(x, y, "o-", ms=4)
        axis.annotate(method, (x[-1], y[-1]), fontsize=8, ha="right", va="bottom")
    axis.set_xticks(sorted({r["data"]["width"] for r in rows}))
    axis.get_xaxis().set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    axis.set(xlabel="width of a square matrix", ylabel="CPU seconds")


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Writes the figures that the results allow."""
    from matplotlib.figure import Figure

    efforts = {r["data"]["matrix"] for r in rows_of(results, "gyro", "Search effort")}
    widths = rows_of(results, "scale", "Growth with the width")
    known = {
        "quality.png": (quality, 2 if "minilm" in results else 0, 4.6),
        "gyro.png": (gyro, len(efforts), 3.6),
        "scale.png": (scale, 1 if widths else 0, 6.0),
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
