"""Retained saliency and time of the permutation search, beside the anchors.

    make bench-gyro                      # everything, about half an hour
    make bench-gyro ARGS=--quick         # one seed of everything, a few minutes

The anchors are the released Gyro code with its aliasing bug fixed (`.clone()` twice),
on the same matrices, 75 % = half of the vectors removed and 2:4 in the rest, V = 32.
CPU seconds are process time after a warm-up call; compilation is listed on its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import flexhinm_jax as fh
from bench import inputs
from flexhinm_jax.ops import masks
from flexhinm_jax.patterns import ChannelSearch, Gyro, Pattern, RandomRows

RESULTS = Path(__file__).parent / "results"
KEY = 0

# name: (no permutation, fixed reference) of sum|W| kept
ANCHORS = {
    "gauss256_s0": (0.4061, 0.4331),
    "gauss256_s1": (0.4064, 0.4331),
    "gauss256_s2": (0.4079, 0.4318),
    "heavy256_s0": (0.5760, 0.6098),
    "heavy256_s1": (0.5854, 0.6146),
    "heavy256_s2": (0.5674, 0.5970),
    "planted256_s0": (0.5967, 0.6693),
    "planted256_s1": (0.5869, 0.6531),
    "planted256_s2": (0.5935, 0.6663),
    "gauss512_s0": (0.4071, 0.4347),
    "gauss512_s1": (0.4076, 0.4346),
    "gauss512_s2": (0.4073, 0.4347),
    "heavy512_s0": (0.5630, 0.5946),
    "heavy512_s1": (0.5642, 0.5960),
    "heavy512_s2": (0.5678, 0.6009),
    "planted512_s0": (0.5732, 0.6858),
    "planted512_s1": (0.5697, 0.6746),
    "planted512_s2": (0.5636, 0.6710),
    "query": (0.4197, 0.4420),
    "attention": (0.4246, 0.4543),
    "intermediate": (0.4198, 0.4566),
}
# oracle row order with searched columns, the target of the planted rows
ORACLE = {
    "planted256_s0": 0.7139,
    "planted256_s1": 0.7099,
    "planted256_s2": 0.7106,
    "planted512_s0": 0.7173,
    "planted512_s1": 0.7118,
    "planted512_s2": 0.7072,
}
# (matrix, sparsity): FlexHiNM without and with permutation
REGIONS = {
    ("heavy256_s0", 0.5): (0.8257, 0.8594),
    ("colsig_1.0", 0.5): (0.8743, 0.8945),
    ("colsig_1.0", 0.75): (0.6779, 0.7025),
    ("colsig_1.5", 0.75): (0.8281, 0.8439),
    ("colsig_2.0", 0.75): (0.9344, 0.9406),
}
# plain 2:4: none, apex channel search
PLAIN = {
    "gauss256_s0": (0.7431, 0.7580),
    "gauss256_s1": (0.7447, 0.7585),
    "gauss256_s2": (0.7451, 0.7593),
    "heavy256_s0": (0.8216, 0.8441),
    "planted256_s0": (0.8636, 0.8866),
    "query": (0.7465, 0.7592),
}


def scores(name: str) -> jax.Array:
    """|W| of an anchor matrix."""
    return jnp.abs(jnp.asarray(inputs.matrix(name)))


def timed(call: Any, repeats: int = 3) -> tuple[Any, float, float]:
    """(result, least CPU seconds, CPU seconds of the first call) of a jitted call."""
    start = time.process_time()
    jax.block_until_ready(call())
    first = time.process_time() - start
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        result = jax.block_until_ready(call())
        spent.append(time.process_time() - start)
    return result, min(spent), first


def measure(
    name: str, pattern: Pattern, sparsity: float | None = 0.75, repeats: int = 3
) -> dict:
    """Retained sum|W| and sum W^2 and the time of one projection."""
    s = scores(name)
    call = lambda: pattern.project(jax.random.key(KEY), s, sparsity)  # noqa: E731
    support, cpu, first = timed(call, repeats)
    row = {
        "matrix": name,
        "kept": float(masks.retained(s, support.keep)),
        "kept_squares": float(masks.retained(s * s, support.keep)),
        "cpu_s": cpu,
        "first_call_cpu_s": first,
    }
    if name.startswith("planted") and support.regions is not None:
        order = np.asarray(support.regions.out_order)
        label = inputs.labels(name)[order].reshape(-1, inputs.TILE)
        row["purity"] = float(np.mean([np.bincount(t).max() for t in label]) / 32)
    return row


def quality(names: list[str], thorough: bool) -> list[dict]:
    """HiNM at 75 % beside the corrected reference."""
    rows = []
    for name in names:
        row = measure(name, fh.HiNM(32))
        row["none"] = measure(name, fh.HiNM(32, permute=None))["kept"]
        row["anchor"] = ANCHORS[name][1]
        if thorough:
            best = measure(name, fh.HiNM(32, permute=Gyro.thorough()), repeats=1)
            row["thorough"], row["thorough_cpu_s"] = best["kept"], best["cpu_s"]
            row["thorough_purity"] = best.get("purity")
        row["oracle"] = ORACLE.get(name)
        rows.append(row)
    return rows


def regions(names: list[tuple[str, float]]) -> list[dict]:
    """Three regions, HiNM, and the absorbed form."""
    rows = []
    for name, sparsity in names:
        plain, searched = REGIONS[name, sparsity]
        row = {"matrix": name, "sparsity": sparsity}
        patterns = {
            "hinm_none": fh.HiNM(32, permute=None),
            "flex_none": fh.FlexHiNM(32, permute=None),
            "absorb_none": fh.FlexHiNM(32, permute=None, regions="absorb"),
            "hinm": fh.HiNM(32),
            "flex": fh.FlexHiNM(32),
            "absorb": fh.FlexHiNM(32, regions="absorb"),
        }
        for key, pattern in patterns.items():
            row[key] = measure(name, pattern, sparsity)["kept"]
        row["anchor_flex_none"], row["anchor_flex"] = plain, searched
        rows.append(row)
    return rows


def plain(names: list[str]) -> list[dict]:
    """One input order for plain 2:4, beside apex."""
    rows = []
    for name in names:
        row = measure(name, fh.NM(2, 4, permute=ChannelSearch()), None)
        more = measure(name, fh.NM(2, 4, permute=ChannelSearch(sweeps=512)), None)
        row["none"], row["anchor"] = PLAIN[name]
        row["thorough"], row["thorough_cpu_s"] = more["kept"], more["cpu_s"]
        rows.append(row)
    return rows


def stacked(pattern: Pattern) -> dict:
    """Six 384 x 384 matrices: one call against six."""
    stack = jnp.abs(jax.random.normal(jax.random.key(1), (6, 384, 384)))
    keys = jax.random.split(jax.random.key(2), 6)
    project = lambda k, s: pattern.project(k, s, 0.75)  # noqa: E731
    together = jax.jit(jax.vmap(project))
    whole, cpu, first = timed(lambda: together(keys, stack))
    each, loop, _ = timed(
        lambda: [project(k, s) for k, s in zip(keys, stack, strict=True)]
    )
    same = all(bool((one.keep == whole.keep[j]).all()) for j, one in enumerate(each))
    return {
        "cpu_s": cpu,
        "loop_cpu_s": loop,
        "ratio": cpu / loop,
        "same": same,
        "compilations": together._cache_size(),
        "first_call_cpu_s": first,
    }


def wide() -> dict:
    """One 4096 x 4096 projection, V = 64; run in a process of its own."""
    w = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
    s = jnp.abs(jnp.asarray(w))
    del w
    call = lambda: fh.HiNM(64).project(jax.random.key(KEY), s, 0.75)  # noqa: E731
    start = time.process_time()
    jax.block_until_ready(call())
    first = time.process_time() - start
    start = time.process_time()
    support = jax.block_until_ready(call())
    return {
        "cpu_s": time.process_time() - start,
        "first_call_cpu_s": first,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "kept": float(masks.retained(s, support.keep)),
    }


def curve(names: list[str], efforts: list[int]) -> dict[str, list[dict]]:
    """Quality against search time, and the published schedule as one point."""
    found: dict[str, list[dict]] = {}
    for name in names:
        found[name] = [
            measure(name, fh.HiNM(32, permute=Gyro(sweeps=4 * e, rounds=e)))
            for e in efforts
        ]
        found[name].append(measure(name, fh.HiNM(32, permute=Gyro.paper())))
    return found


def plot(found: dict[str, list[dict]], path: Path) -> None:
    """One panel per matrix: retained share over CPU seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(found), 3.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, rows) in zip(panels, found.items(), strict=True):
        *ours, paper = rows
        axes.semilogx(
            [r["cpu_s"] for r in ours],
            [r["kept"] for r in ours],
            marker="o",
            color="#1f4e79",
            label="Gyro()",
        )
        axes.plot(paper["cpu_s"], paper["kept"], "s", color="#b5651d", label="schedule")
        axes.axhline(
            ANCHORS[name][1], color="#999999", linewidth=0.8, label="reference"
        )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("CPU seconds")
    panels[0].set_ylabel("share of sum |w| kept")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def sentence_encoder(count: int) -> dict:
    """Mean cosine of MiniLM at 75 %, Wanda scores, by row order."""
    from flexhinm_jax.cli import source
    from flexhinm_jax.models import encoder
    from train import corpus, demo

    model = source.load(demo.model_directory())
    params = jax.tree.map(jnp.asarray, model.params)
    texts = {k: corpus.sentences(k, count) for k in ("calibration", "evaluation")}
    batches = {k: source.tokenize(model, v, 32, None) for k, v in texts.items()}

    def embed(params: Any, tokens: Any, mask: Any) -> Any:
        return encoder.embed(params, tokens, mask, model.config)

    run = jax.jit(embed)
    held_out = batches["evaluation"], len(texts["evaluation"])
    dense = demo.embeddings(run, params, *held_out)
    uses = fh.discover(embed, params, *model.sample())
    stats = fh.calibrate(
        embed,
        params,
        uses,
        ((b.tokens, b.mask) for b in batches["calibration"]),
        gram=False,
        token_mask=lambda _, mask: mask != 0,
    )
    rows = {}
    for name, permute in {
        "none": None,
        "natural rows, searched columns": ChannelSearch(),
        "random rows, searched columns": RandomRows(),
        "gyro": Gyro(),
    }.items():
        method = fh.Wanda(fh.HiNM(32, permute=permute))
        start = time.process_time()
        states = fh.solve(method, jax.random.key(KEY), params, uses, stats, 0.75)
        plans = fh.decide(method, states, params, uses)
        sparse = fh.densify(plans, params, uses)
        jax.block_until_ready(jax.tree.leaves(sparse))
        spent = time.process_time() - start
        found = demo.embeddings(run, sparse, *held_out)
        cosine, quantile, _ = demo.compare(dense, found)
        kept = np.mean([np.mean(np.asarray(p.retained)) for p in plans.values()])
        rows[name] = {
            "cosine": cosine,
            "quantile": quantile,
            "kept": float(kept),
            "cpu_s_with_compilation": spent,
        }
    return rows


def table(title: str, rows: list[dict]) -> Table:
    """Rows as a table, one column per key."""
    made = Table(title=title)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        made.add_column(name, justify="left" if name in ("matrix", "rows") else "right")
    for row in rows:
        cells = (row.get(name) for name in names)
        made.add_row(
            *(
                f"{x:.4f}" if isinstance(x, float) else "" if x is None else str(x)
                for x in cells
            )
        )
    return made


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, no thorough")
    parser.add_argument("--wide", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.wide:
        print(json.dumps(wide()))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=160)
    quick = args.quick
    names = [n for n in ANCHORS if not quick or not n.endswith(("_s1", "_s2"))]
    found: dict[str, Any] = {"quality": quality(names, thorough=not quick)}
    console.print(
        table("HiNM 75 %, V=32 (anchor: corrected reference)", found["quality"])
    )
    if not quick:
        gain = np.mean([r["thorough"] - r["anchor"] for r in found["quality"]])
        found["thorough_mean_gain"] = float(gain)
        console.print(f"thorough over the anchor, mean of all rows: {gain:+.4f}")
    found["regions"] = regions(list(REGIONS)[: 2 if quick else None])
    console.print(table("regions, beside their anchors", found["regions"]))
    found["plain"] = plain(list(PLAIN)[: 1 if quick else None])
    console.print(table("2:4 with one input order (anchor: apex)", found["plain"]))
    found["stacked"] = stacked(fh.HiNM(32))
    console.print(table("6 x (384 x 384) in one call", [found["stacked"]]))
    if not quick:
        line = [sys.executable, "-m", "bench.gyro", "--wide"]
        out = subprocess.run(line, check=True, capture_output=True, text=True).stdout
        found["wide"] = json.loads(out)
        console.print(table("4096 x 4096, V=64", [found["wide"]]))
    efforts = [1, 4, 16] if quick else [1, 2, 4, 8, 16, 32, 64, 128]
    traces = ["gauss512_s0"] if quick else ["gauss512_s0", "planted512_s0", "query"]
    found["curve"] = curve(traces, efforts)
    plot(found["curve"], args.out / "gyro.png")
    found["minilm"] = sentence_encoder(64 if quick else 512)
    rows = [{"rows": name, **row} for name, row in found["minilm"].items()]
    console.print(table("MiniLM, 75 %, Wanda, all linears", rows))
    (args.out / "gyro.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"wrote {args.out}/gyro.json and gyro.png")


if __name__ == "__main__":
    main()
