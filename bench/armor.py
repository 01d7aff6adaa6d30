"""NoWag-P and ARMOR beside their anchors, and ARMOR on all-MiniLM-L6-v2.

    make bench-armor                          # the layers, some minutes
    make bench-armor ARGS=--quick             # one block size, no Adam
    make bench-armor ARGS="--model"           # the sentence encoder, slow

The proxy is the loss that ARMOR fits, relative to the zero matrix; out is
|| X (W - W')^T ||^2 / || X W^T ||^2 in float64. CPU seconds are the process time of a
second solve, after compilation. "Anchor" is the author's code at 500 iterations, "goal"
an exact solver with a few updates per block and step; both on the same inputs.
"""

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import flexhinm_jax as fh
from bench import inputs, minilm
from flexhinm_jax.ops import proxy
from flexhinm_jax.patterns import ChannelSearch
from flexhinm_jax.pruning.apply import dense_weight
from train import corpus
from train import minilm as helpers

RESULTS = Path("bench/results/armor.json")
SEARCHED = fh.NM(2, 4, permute=ChannelSearch())

NOWAG = {"synth512": (0.08695, 0.08600), "minilm": (0.08072, 0.08065)}
"""layer: (proxy, out) of the reference."""

ANCHORS = {
    ("synth512", 32): (0.05551, 0.03494),
    ("synth512", 64): (0.04054, 0.02493),
    ("synth512", 128): (0.01956, 0.00297),
    ("minilm", 32): (0.05210, 0.03767),
    ("minilm", 64): (0.04026, 0.02719),
    ("minilm", 128): (0.02312, 0.01316),
}
"""(layer, block): proxy of (the reference at 500 iterations, the goal)."""

SEARCHED_GOAL = {"synth512": 0.03553, "minilm": 0.03540}
"""layer: proxy of block 32 after a search of the input order."""

STEPS = {32: 40, 64: 40, 128: 80}
"""block: exact steps, as many as the goals took or more."""


def stats(x: np.ndarray) -> fh.Stats:
    """Statistics of input rows, summed in float64."""
    wide = x.astype(np.float64)
    as_array = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    return fh.Stats(
        sq_norm=as_array(np.square(wide).sum(0)),
        mean=as_array(wide.mean(0)),
        count=as_array(len(x)),
        gram=as_array(wide.T @ wide),
    )


def proxy_loss(w: np.ndarray, pruned: Any, given: fh.Stats) -> float:
    """The loss of ARMOR."""
    bar, r, c = proxy.normalise(jnp.asarray(w))
    weights = proxy.channel_weights(given.sq_norm)
    return float(proxy.loss(pruned / r[:, None] / c, bar, weights))


def output_loss(w: np.ndarray, pruned: Any, x: np.ndarray) -> float:
    """Relative squared error of the outputs."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    lost = x @ (w - np.asarray(pruned, np.float64)).T
    return float(np.square(lost).sum() / np.square(x @ w.T).sum())


def measure(layer: str, method: fh.Method, **facts: Any) -> dict[str, Any]:
    """One row: a method on one layer."""
    w, x = inputs.layer(layer)
    given, weight, key = stats(x), jnp.asarray(w), jax.random.key(0)
    seconds = []
    once = getattr(method, "solver", "") == "adam"  # long next to its compilation
    for _ in range(1 if once else 2):
        before = time.process_time()
        state = jax.block_until_ready(method.solve(key, weight, given))
        seconds.append(time.process_time() - before)
    plan = method.decide(state, weight)
    fh.verify(plan)
    pruned = dense_weight(plan)
    row = {
        "layer": layer,
        "method": type(method).__name__,
        "pattern": str(method.pattern),
        "proxy": proxy_loss(w, pruned, given),
        "out": output_loss(w, pruned, x),
        "cpu_seconds": seconds[-1],
        "cpu_seconds_first": seconds[0],
        **facts,
    }
    if isinstance(method, fh.ARMOR):
        trace = np.asarray(state.fixed["trace"], np.float64)
        row |= {
            "solver": method.solver,
            "weighting": method.weighting,
            "block": method.block,
            "steps": len(trace) - 1,
            "overhead": float(state.fixed["overhead"]),
            "monotone": bool((np.diff(trace) <= 0).all()),
            "trace": {
                str(k): trace[k]
                for k in (0, 1, 2, 3, 5, 10, 15, 20, 30, 40, 80, 100, 200, 300, 500)
                if k < len(trace)
            },
        }
        if method.pattern == fh.NM(2, 4):
            was = fh.NoWagP().solve(key, weight, given).fixed["support"].keep
            moved = np.asarray(was != plan.support.keep).reshape(len(w), -1, 4)
            row["groups_changed"] = float(moved.any(-1).mean())
        goal = row.get("goal")
        if goal is not None and (trace <= goal).any():
            first = int(np.argmax(trace <= goal))
            row |= {
                "steps_to_goal": first,
                "cpu_seconds_to_goal": seconds[-1] * first / (len(trace) - 1),
            }
    return row


def cases(quick: bool) -> Iterator[tuple[str, fh.Method, dict[str, Any]]]:
    """(layer, method, facts) of every row; what takes long comes last."""
    for layer in NOWAG:
        yield layer, fh.NoWagP(), {"goal": NOWAG[layer][0]}
        for block, steps in STEPS.items():
            anchor, goal = ANCHORS[layer, block]
            if not quick or block == 32:
                method = fh.ARMOR(block=block, steps=steps)
                yield layer, method, {"anchor": anchor, "goal": goal}
        method = fh.ARMOR(SEARCHED, block=32, steps=40)
        yield layer, method, {"goal": SEARCHED_GOAL[layer]}
    if quick:
        return
    for layer in NOWAG:
        yield layer, fh.ARMOR(block=32, weighting="gram", damp=1e-3), {}
    for layer in NOWAG:
        for block in STEPS:
            method = fh.ARMOR(block=block, steps=500, solver="adam")
            yield layer, method, {"anchor": ANCHORS[layer, block][0]}


def show(rows: list[dict[str, Any]]) -> Table:
    """The table of the layers."""
    made = Table(title="2:4, one layer")
    for head in ("layer", "method"):
        made.add_column(head)
    heads = ("block", "overhead", "steps", "proxy", "out", "anchor", "goal", "CPU s")
    for head in (*heads, "CPU s to goal", "groups moved"):
        made.add_column(head, justify="right")
    text = lambda x: "" if x is None else f"{x:.5f}"  # noqa: E731
    short = lambda x: "" if x is None else f"{x:.2f}"  # noqa: E731
    for r in rows:
        kind = [r["method"], r.get("solver"), r.get("weighting")]
        kind += ["searched"] if "ChannelSearch" in r["pattern"] else []
        share, moved = r.get("overhead"), r.get("groups_changed")
        made.add_row(
            r["layer"],
            " ".join(k for k in kind if k),
            str(r.get("block", "")),
            "" if share is None else f"{share:.1%}",
            str(r.get("steps", "")),
            text(r["proxy"]),
            text(r["out"]),
            text(r.get("anchor")),
            text(r.get("goal")),
            short(r["cpu_seconds"]),
            short(r.get("cpu_seconds_to_goal")),
            "" if moved is None else f"{moved:.1%}",
        )
    return made


ALPS = fh.ALPS(fh.NM(2, 4))
GRAM = fh.ARMOR(block=32, weighting="gram", updates=4)
FROM_ALPS = dataclasses.replace(GRAM, start=ALPS)

MODEL = {
    "alps-2:4": minilm.Run(ALPS, None, 128),
    "alps-7:12": minilm.Run(fh.ALPS(fh.NM(7, 12)), None, 128, note="equal bytes"),
    "armor": minilm.Run(fh.ARMOR(block=32), None, 128),
    "armor-gram": minilm.Run(GRAM, None, 128),
    "armor-gram-from-alps": minilm.Run(FROM_ALPS, None, 128),
    "alps-2:4-resid": minilm.Run(ALPS, "resid", 512),
    "alps-7:12-resid": minilm.Run(
        fh.ALPS(fh.NM(7, 12)), "resid", 512, note="equal bytes"
    ),
    "armor-gram-from-alps-resid": minilm.Run(FROM_ALPS, "resid", 512),
}
"""All linear layers of the encoder: one shot, then in order with repaired targets."""


def model(only: str, evaluation: int) -> list[dict[str, Any]]:
    """The rows of the encoder whose name matches `only`."""
    embed, params, dense_model, held_out, dense = minilm.prepare(evaluation)
    rows = []
    for name, run in MODEL.items():
        if not re.search(only, name):
            continue
        given = minilm.calibration(dense_model, run.sentences)
        before = time.process_time()
        result = minilm.prune(embed, params, given, run, True)
        jax.block_until_ready(result.params)
        seconds = time.process_time() - before
        sparse = helpers.embeddings(jax.jit(embed), result.params, held_out, evaluation)
        cosine, quantile, rank = helpers.compare(dense, sparse)
        total = result.report.total
        rows.append(
            {
                "name": name,
                "method": repr(run.method),
                "target": run.target or "one-shot",
                "sentences": run.sentences,
                "overhead": total["overhead"],
                "packed_ratio": total["packed_ratio"],
                "cosine": cosine,
                "quantile": quantile,
                "spearman": rank,
                "cpu_seconds_first": seconds,
                "digest": corpus.digest(),
                "note": run.note,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        jax.clear_caches()
    return rows


def show_model(rows: list[dict[str, Any]]) -> Table:
    """The table of the encoder."""
    made = Table(title="all-MiniLM-L6-v2, 36 linear layers")
    for head in ("row", "target"):
        made.add_column(head)
    numbers = "sentences", "factors", "packed / dense", "cosine", "5 %", "CPU s"
    for head in numbers:
        made.add_column(head, justify="right")
    for r in rows:
        made.add_row(
            f"{r['name']} {r['note']}".strip(),
            r["target"],
            str(r["sentences"]),
            f"{r['overhead']:.3f}",
            f"{r['packed_ratio']:.3f}",
            f"{r['cosine']:.4f}",
            f"{r['quantile']:.4f}",
            f"{r['cpu_seconds_first']:.0f}",
        )
    return made


def main() -> None:
    """Runs the benchmark and writes bench/results/armor.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="block 32, exact only")
    parser.add_argument("--model", action="store_true", help="the encoder instead")
    parser.add_argument(
        "--only", default="", help="encoder rows whose name matches this"
    )
    parser.add_argument("--evaluation", type=int, default=512, help="sentences")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    console = Console(width=150)
    if args.model:
        rows = {r["name"]: r for r in known.get("model", []) if r["name"] in MODEL}
        rows |= {r["name"]: r for r in model(args.only, args.evaluation)}
        known["model"] = [rows[n] for n in MODEL if n in rows]
        console.print(show_model(known["model"]))
    else:
        known["layers"] = []
        for layer, method, facts in cases(args.quick):
            known["layers"].append(measure(layer, method, **facts))
            write(args.out, known)
        console.print(show(known["layers"]))
    write(args.out, known)


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes the results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results["jax"] = jax.__version__
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
