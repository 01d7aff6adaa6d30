"""The figures of bench/RESULTS.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.cost_tables import kernels_of
from bench.goals import MINILM


def points(results: Mapping[str, Any]) -> list[tuple[str, float, float, float | None]]:
    """(group, sparsity, cosine, CPU seconds) of every row on the sentence encoder."""
    found: list[tuple[str, float, float, float | None]] = []
    for r in results.get("minilm", {}).get("rows", []):
        seconds = r.get("cpu_seconds_compiled") or r["cpu_seconds"]
        group = f"{r['method']}, {r['target']}"
        found.append((group, r["zeros"], r["cosine"], seconds))
    for r in results.get("permutation", {}).get("model", []):
        group = "PermLLM" if r["row"].startswith("PermLLM") else "Wanda, ordered inputs"
        group = "Wanda" if r["row"] == "Wanda" else group
        found.append((group, 0.5, r["cosine"], r["cpu_seconds"]))
    for name, r in results.get("gyro", {}).get("minilm", {}).items():
        group = "Wanda" if name == "none" else "Wanda, ordered inputs"
        found.append((group, 0.75, r["cosine"], r["cpu_s_with_compilation"]))
    for r in results.get("distill", {}).values():
        if isinstance(r, dict) and "distilled" in r:
            found.append(("distilled", r["zeros"], r["distilled"]["cosine"], None))
    return found


def draw(results: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Writes the figures that the results allow; (file, caption) of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made = []
    shown = points(results)
    groups = sorted({group for group, *_ in shown})
    style = {g: (f"C{k % 10}", "os^Dv<>P*X"[k % 9]) for k, g in enumerate(groups)}

    def save(figure: Any, file: str, caption: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / file, dpi=120, metadata={"Software": None})
        plt.close(figure)
        made.append((file, caption))

    if shown:
        figure, axis = plt.subplots(figsize=(7, 4.2))
        for group in groups:
            mine = [(x, y) for g, x, y, _ in shown if g == group]
            color, marker = style[group]
            axis.plot(
                *zip(*mine, strict=True),
                marker,
                color=color,
                ms=5,
                label=group,
                alpha=0.8,
            )
        for (how, sparsity), level in MINILM.items():
            if how == "one-shot":
                axis.plot(sparsity, level.excellent, "k_", ms=18, mew=1.5)
        axis.set_xlabel("sparsity of the linear layers (black bars: one-shot goals)")
        axis.set_ylabel("mean cosine to the dense model")
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "quality_sparsity.png", "Quality of MiniLM against sparsity")
        figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
        for axis, title, low, high in (
            (axes[0], "half of the weights gone", 0.45, 0.55),
            (axes[1], "75 % gone", 0.7, 0.8),
        ):
            for group in groups:
                mine = [
                    (seconds, y)
                    for g, x, y, seconds in shown
                    if g == group and low < x < high and seconds
                ]
                if mine:
                    color, marker = style[group]
                    axis.plot(
                        *zip(*mine, strict=True), marker, color=color, ms=5, label=group
                    )
            axis.set_xscale("log")
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("CPU seconds")
            axis.legend(fontsize=6)
        axes[0].set_ylabel("mean cosine to the dense model")
        save(figure, "quality_time.png", "Quality of MiniLM against CPU time")
    times = results.get("gpu", {}).get("times")
    if isinstance(times, list) and times:
        figure, axis = plt.subplots(figsize=(7, 4.2))
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for r in times:
            for kernel in kernels_of(r):
                share = r["floor"] / r[kernel]
                lines.setdefault((kernel, r["size"]), []).append((r["n"], share))
        for (kernel, size), line in lines.items():
            label = f"{kernel}, {size}"
            axis.plot(*zip(*line, strict=True), "o-", ms=3, lw=1, label=label)
        axis.axhline(1, color="k", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.set_ylabel("share of the roofline")
        axis.legend(fontsize=5, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "roofline.png", "GPU kernels against the roofline")
    return made


def captions(folder: Path) -> list[tuple[str, str]]:
    """(file, caption) of the figures that are there, without drawing them."""
    known = {
        "quality_sparsity.png": "Quality of MiniLM against sparsity",
        "quality_time.png": "Quality of MiniLM against CPU time",
        "roofline.png": "GPU kernels against the roofline",
    }
    return [(f, text) for f, text in known.items() if (folder / f).exists()]
