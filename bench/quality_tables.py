"""The tables about quality: what is lost, and what it is held against.

One function per file of bench/results/; `bench.report` calls them.
"""

import statistics
from collections.abc import Iterator
from typing import Any

from bench.goals import MINILM
from bench.tables import Row, Table


def minilm(found: Any) -> Iterator[Table]:
    """One-shot pruning of the sentence encoder."""
    rows = [
        Row(
            f"{r['name']} {r['note']}".strip(),
            r["cosine"],
            goal("one-shot", r["zeros"]),
            r.get("cpu_seconds_compiled") or r["cpu_seconds"],
            f'make bench-minilm ARGS="--only {r["name"]}"',
            {"zeros": r["zeros"], "5 % quantile": r["quantile"]},
        )
        for r in found["rows"]
    ]
    yield Table(
        "all-MiniLM-L6-v2, one-shot",
        "Mean cosine of the embeddings to those of the dense model, all 36 linear "
        "layers pruned; the name gives method, pattern, target and calibration "
        "sentences. The anchor is the excellent level of the goals in "
        "`bench/goals.py`; larger is better. "
        "CPU seconds without compilation where a second run was made, else with it.",
        rows,
    )


def goal(how: str, zeros: float) -> float | None:
    """The goal for the sentence encoder at a sparsity, or None."""
    known = MINILM.get((how, round(zeros, 3)))
    return known.excellent if known else None


def distill(found: Any) -> Iterator[Table]:
    """The pruned sentence encoder, distilled."""
    rows = []
    for r in found.values():
        budget, what = r["config"]["budget"], r["name"]
        rows.append(
            Row(
                f"{what}, {budget['amount']:g} {budget['unit']}",
                r["distilled"]["cosine"],
                goal("distilled", r["zeros"]),
                None,
                f'make bench-distill ARGS="--rows {what}"',
                {
                    "before": r["pruned"]["cosine"],
                    "5 % quantile": r["distilled"]["quantile"],
                    "zeros": r["zeros"],
                    "mask bits moved": r.get("moved"),
                },
            )
        )
    yield Table(
        "all-MiniLM-L6-v2, pruned and distilled",
        'Mean cosine after training the remaining weights; "before" is the one-shot '
        "start. The anchor is the goal for eight minutes on two idle cores.",
        rows,
    )


def masks(found: Any) -> Iterator[Table]:
    """Learned masks."""
    command = 'make bench-masks ARGS="--part figures"'
    rows = [
        Row(
            r["name"],
            r["value"],
            r.get("want"),
            None,
            command,
            {"tolerance": r.get("tolerance"), "within": r.get("within")},
        )
        for r in found.get("figures", [])
    ]
    note = "The anchor is what the figure should be, to the tolerance."
    yield Table("Learned masks: identities", note, rows)
    rows = []
    for r in found.get("layer", []):
        more = {"reference": r["anchor"]} if r.get("anchor") else {}
        seconds = r.get("cpu_seconds_compiled")
        part = 'make bench-masks ARGS="--part layer"'
        rows.append(Row(r["row"], mean(r["errors"]), None, seconds, part, more))
    note = "Relative squared output error of one 64 x 64 layer, smaller is better."
    yield Table("Learned masks: one layer", note, rows)
    rows = [
        Row(
            r["row"],
            r.get("total"),
            None,
            None,
            'make bench-masks ARGS="--part memory"',
            {k: r.get(k) for k in ("learned", "gradient", "optimizer")},
        )
        for r in found.get("memory", [])
    ]
    note = "Bytes per weight while learning."
    yield Table("Learned masks: memory", note, rows)
    for part, title, note in (
        ("model", "Learned masks on all-MiniLM-L6-v2", "Mean cosine."),
        ("longer", "Learned masks on all-MiniLM-L6-v2, longer", "Mean cosine."),
        (
            "bytes",
            "Learned masks of the byte decoder",
            "Bits per byte, less is better.",
        ),
    ):
        rows = [
            Row(
                r["row"],
                scored(r).get("cosine", r.get("bits_per_byte")),
                None,
                r.get("cpu_seconds"),
                f'make bench-masks ARGS="--part {part}"',
                {"5 % quantile": scored(r)["quantile"]} if scored(r) else {},
            )
            for r in found.get(part, {}).get("rows", [])
        ]
        yield Table(title, note, rows)
    rows = [
        Row(
            r["row"],
            r["error"],
            None,
            r["cpu_seconds"],
            'make bench-masks ARGS="--part hyper"',
            {"matrices worse than the prior": r["worse_than_prior"]},
        )
        for r in found.get("hyper", [])
    ]
    note = "Relative squared output error, mean over 8 attention matrices of MiniLM."
    yield Table("HyperPrune and its parts", note, rows)
    rows = [
        Row(
            r["row"],
            r["noise"] / r["signal"] if r["signal"] > 0 else None,
            None,
            r["cpu_seconds_per_sample"],
            'make bench-masks ARGS="--part noise"',
            {k: r[k] for k in ("weights_changed", "gap", "gap_deviation", "better")},
        )
        for r in found.get("noise", [])
    ]
    note = "Samples on one batch whose mean gradient has as much signal as noise."
    yield Table("Noise of MaskPro's gradient on the byte decoder", note, rows)


def scored(row: Any) -> Any:
    """Where a row of the sentence encoder keeps its cosine."""
    if "cosine" in row:
        return row
    nested = [v for v in row.values() if isinstance(v, dict) and "cosine" in v]
    return nested[-1] if nested else {}


def armor(found: Any) -> Iterator[Table]:
    """Block-diagonal factors."""
    rows = []
    for r in found.get("layers", []):
        what = f"{r['layer']}, {r['method']}"
        if r.get("block"):
            what += f" block {r['block']}, {r['solver']}, {r['steps']} steps"
        if "permute=C" in r["pattern"]:
            what += ", inputs ordered"
        more = {"published loop": r["anchor"]} if r.get("anchor") else {}
        rows.append(
            Row(what, r["proxy"], r["goal"], r["cpu_seconds"], "make bench-armor", more)
        )
    yield Table(
        "Factors around a 2:4 core, one layer",
        "Weighted squared error relative to the zero matrix, smaller is better. The "
        "anchor is the author's code for NoWag-P and the published loop, else the goal "
        "of an exact solver; both are in `bench/armor.py`.",
        rows,
    )
    rows = [
        Row(
            r["name"],
            r["cosine"],
            None,
            r["cpu_seconds_first"],
            'make bench-armor ARGS="--model"',
            {"5 % quantile": r["quantile"], "packed / dense bytes": r["packed_ratio"]},
        )
        for r in found.get("model", [])
    ]
    yield Table(
        "Factors on all-MiniLM-L6-v2",
        "Mean cosine, one-shot, 128 calibration sentences; CPU seconds with "
        "compilation.",
        rows,
    )


def permutation(found: Any) -> Iterator[Table]:
    """Input orders."""
    rows = [
        Row(
            f"{r['layer']}, {r['score']}, {r['row']}",
            r["error"],
            r.get("anchor"),
            r["cpu_seconds"],
            'make bench-permutation ARGS="--only layer"',
        )
        for r in found.get("layers", [])
    ]
    yield Table(
        "Input orders for 2:4, one layer",
        "Relative squared output error, weights unmoved, smaller is better. The anchor "
        "is the reference implementation on the same layer (`bench/permutation.py`).",
        rows,
    )
    rows = [
        Row(
            r["row"],
            r["cosine"],
            None,
            r["cpu_seconds"],
            'make bench-permutation ARGS="--only model"',
            {"5 % quantile": r["quantile"]},
        )
        for r in found.get("model", [])
    ]
    yield Table(
        "Input orders for 2:4 on all-MiniLM-L6-v2",
        "Mean cosine, weights unmoved; CPU seconds with compilation.",
        rows,
    )


def gyro(found: Any) -> Iterator[Table]:
    """Permutation search."""
    command = "make bench-gyro"
    rows = [
        Row(
            r["matrix"],
            r["kept"],
            r["anchor"],
            r["cpu_s"],
            command,
            {"natural order": r["none"]}
            | ({"planted order": r["oracle"]} if r["oracle"] else {}),
        )
        for r in found.get("quality", [])
    ]
    yield Table(
        "Gyro: HiNM at 75 %, tiles of 32 rows",
        "Share of sum |W| kept, larger is better. The anchor is the released code with "
        "its aliasing bug fixed, on the same matrices (`bench/gyro.py`).",
        rows,
    )
    rows = [
        Row(
            f"{r['matrix']}, {r['sparsity']:.0%}, {name}",
            r[key],
            r.get(anchor),
            None,
            command,
        )
        for r in found.get("regions", [])
        for name, key, anchor in (
            ("natural order", "flex_none", "anchor_flex_none"),
            ("Gyro", "flex", "anchor_flex"),
            ("HiNM + Gyro", "hinm", ""),
        )
    ]
    yield Table("FlexHiNM regions", "Share of sum |W| kept, as above.", rows)
    rows = [
        Row(r["matrix"], r["kept"], r["anchor"], r["cpu_s"], command)
        for r in found.get("plain", [])
    ]
    yield Table(
        "Column search for 2:4",
        "Share of sum |W| kept; the anchor is the search of apex.",
        rows,
    )
    stacked = found.get("stacked")
    if stacked:
        row = Row(
            "a stack of layers",
            stacked["cpu_s"],
            stacked["loop_cpu_s"],
            None,
            command,
            {"same result": stacked["same"], "compilations": stacked["compilations"]},
        )
        note = "CPU seconds, smaller is better; the anchor is a loop over the layers."
        yield Table("A stack of layers against a loop", note, [row])
    rows = [
        Row(f"{matrix}, setting {k}", r["kept"], None, r["cpu_s"], command)
        for matrix, points in found.get("curve", {}).items()
        for k, r in enumerate(points)
    ]
    yield Table("Search effort", "Share of sum |W| kept against CPU seconds.", rows)
    rows = [
        Row(
            name,
            r["cosine"],
            None,
            r["cpu_s_with_compilation"],
            command,
            {"5 % quantile": r["quantile"], "score kept": r["kept"]},
        )
        for name, r in found.get("minilm", {}).items()
    ]
    yield Table(
        "Gyro on all-MiniLM-L6-v2, HiNM at 75 %",
        "Mean cosine, Wanda, one-shot, weights unmoved; CPU seconds with compilation.",
        rows,
    )


def oneshot(found: Any) -> Iterator[Table]:
    """One-shot pruners of one layer."""
    command = "make bench-oneshot" + (" ARGS=--quick" if found.get("quick") else "")
    rows = [
        Row(
            f"{r['method']}, seed {r['seed']}",
            r["calibration"],
            r.get("anchor"),
            r["cpu_s"],
            command,
            {"hold-out": r.get("hold_out")},
        )
        for r in found.get("layers", [])
    ]
    yield Table(
        "One-shot pruners, one layer",
        "Relative squared output error on the calibration inputs, smaller is better. "
        "The anchor is the reference code on the same inputs (`bench/oneshot.py`).",
        rows,
    )
    rows = [
        Row(f"{r['size']} x {r['size']}", r["cpu_s"], r["anchor_s"], None, command)
        for r in found.get("times", [])
    ]
    yield Table(
        "Transposable masks 4:8, time",
        "CPU seconds after compilation, smaller is better.",
        rows,
    )
    rows = [
        Row(
            f"{r['pattern']}, {r['tiles']} tiles",
            r["50 sweeps + 8 exchanges"],
            None,
            None,
            command,
            {"annealed": r["annealed + 8 exchanges"], "sums exact": r["sums exact"]},
        )
        for r in found.get("tiles", [])
    ]
    yield Table(
        "Transposable masks, distance to the optimum",
        "Relative gap to the exact optimum by linear programming; 0 is optimal.",
        rows,
    )


def training(found: Any) -> Iterator[Table]:
    """Recipes compared."""
    part = found.get("recipes")
    if part:
        base = {r["target"]: mean(r["nll"]) for r in part["rows"] if is_base(r, part)}
        rows = [
            Row(
                f"{r['title']}, {r['target']:.4g}",
                mean(r["nll"]),
                base.get(r["target"]),
                r.get("cpu_seconds"),
                "python -m bench.comparison --only recipes",
                {"accuracy": mean(r["accuracy"]), "seeds": len(r["nll"])},
            )
            for r in part["rows"]
        ]
        yield Table(
            "Digits: test loss after pruning and training",
            "Mean negative log-likelihood, smaller is better; the anchor is HiNM + "
            "Gyro at the same sparsity.",
            rows,
        )
    part = found.get("bytes")
    if part:
        dense = next(mean(r["bits_per_byte"]) for r in part["rows"] if not r["target"])
        rows = [
            Row(
                f"{r['title']}, {r['target']:.4g}",
                mean(r["bits_per_byte"]),
                dense,
                r.get("cpu_seconds"),
                "python -m bench.comparison --only bytes",
                {"zeros": mean(r["zeros"])},
            )
            for r in part["rows"]
        ]
        yield Table(
            "Byte-level decoder",
            "Bits per byte, one seed, smaller is better; the anchor is the dense model "
            "trained as long.",
            rows,
        )
    for name, title in (
        ("masks", "Gates beside fixed masks, digits"),
        ("byte_masks", "Gates beside fixed masks, bytes"),
    ):
        part = found.get(name)
        if part and "rows" in part:
            figure = next(k for k in ("nll", "bits_per_byte") if k in part["rows"][0])
            rows = [
                Row(
                    f"{r['title']}, {r['target']:.4g}",
                    mean(r[figure]),
                    None,
                    r.get("cpu_seconds"),
                    f"python -m bench.comparison --only {name}",
                    {"seeds": len(r[figure]), "moved": mean(r.get("moved", [0.0]))},
                )
                for r in part["rows"]
            ]
            note = "smaller is better; moved: share of the kept weights exchanged."
            yield Table(title, f"Mean {figure.replace('_', ' ')}, {note}", rows)


def is_base(row: Any, part: Any) -> bool:
    """Whether a row is what the others are compared with."""
    return row["recipe"] == part["base"]


def mean(values: list[float]) -> float:
    """Mean over seeds."""
    return statistics.fmean(values)
