"""Decoders in bounded memory: a block of the size of a 7B model, a whole small model.

    make bench-scale                                   # all parts, about an hour
    make bench-scale ARGS="--only block-sparsegpt"     # one part
    make bench-scale ARGS="--only stream --small"      # the same checks, one minute
    make bench-scale ARGS="--only growth --wide"       # up to width 4096

block-sparsegpt, block-wanda: one block of the shape of LLaMA-2-7B, random bfloat16
weights, 32 samples of 512 random tokens, streamed. Hours for a model are the seconds of
the block times 32: an extrapolation, not a measurement.
stream: a random Llama of 200 million parameters, streamed under a limit, beside the
same model pruned whole; the files must be equal.
growth: seconds per square matrix against its width.

Every measurement is a process of its own. Its peak is the high-water mark of resident
memory that the system counted (VmHWM), its baseline the same after the imports. Parts
are merged into bench/results/scale.json, so they can be run one after the other.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

import flexhinm_jax as fh
from flexhinm_jax.cli.stream import size
from flexhinm_jax.io import huggingface, shards, tensors
from flexhinm_jax.models import decoder
from flexhinm_jax.sequential import memory
from flexhinm_jax.sequential.cuts import Layer
from flexhinm_jax.streaming import streaming

RESULTS = Path("bench/results/scale.json")
FIGURE = Path("bench/results/scale.png")
BLOCKS = 32  # of LLaMA-2-7B

SEVEN = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,  # keeps a second table of 262 MB off the disk
}
SMALL_SEVEN = SEVEN | {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LLAMA_200M = SEVEN | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 13,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
SMALL_LLAMA = LLAMA_200M | {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}

BLOCK_METHODS = {
    "block-sparsegpt": (fh.SparseGPT(fh.NM(2, 4)), None),
    "block-wanda": (fh.Wanda(fh.FlexHiNM(64, permute=fh.Gyro())), 0.75),
}
GROWTH = {
    "magnitude": fh.Magnitude(fh.NM(2, 4)),
    "wanda": fh.Wanda(fh.NM(2, 4)),
    "sparsegpt": fh.SparseGPT(fh.NM(2, 4)),
    "alps": fh.ALPS(fh.NM(2, 4)),
}
PARTS = (*BLOCK_METHODS, "stream", "growth")


def make_model(folder: Path, config: dict[str, Any], dtype: Any) -> None:
    """A directory with random weights, array by array."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    known = decoder.DecoderConfig.from_dict(config)
    random = np.random.default_rng(0)
    arrays = {}
    for name, shape in decoder.shapes(known).items():
        if len(shape) == 1:
            arrays[name] = np.ones(shape, dtype)
        else:
            scale = np.float32(1.0 if "embed" in name else shape[1] ** -0.5)
            draw = random.standard_normal(shape, np.float32) * scale
            arrays[name] = draw.astype(dtype)
    tensors.write(folder / shards.SINGLE, arrays, {"format": "pt"})


def tokens(config: dict[str, Any], samples: int, length: int) -> np.ndarray:
    random = np.random.default_rng(1)
    return random.integers(0, config["vocab_size"], (samples, length), np.int32)


def measured(part: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own prints about one part."""
    command = [sys.executable, "-m", "bench.scale", "--child", part]
    command += ["--folder", str(folder), "--options", json.dumps(options)]
    # With few arenas the allocator gives back what is freed.
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}
    found = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env=environment, text=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def child(part: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Runs one part in this process."""
    jnp.zeros(8).block_until_ready()
    baseline = memory.resident_peak()
    began, used = time.perf_counter(), time.process_time()
    if part == "make":
        make_model(folder, options["config"], ml_dtypes.bfloat16)
        found = {}
    elif part == "make32":
        make_model(folder, options["config"], np.float32)
        found = {}
    elif part == "stream":
        found = stream(folder, options)
    elif part == "whole":
        found = whole(folder, options)
    elif part == "growth":
        found = growth(options)
    else:
        raise ValueError(part)
    return {
        "baseline": baseline,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
        **found,
    }


def stream(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Streams a model; seconds per stage and the peak."""
    method, sparsity = BLOCK_METHODS[options["method"]]
    peaks, rows, blocks, plan = [], [], [], {}
    started = time.perf_counter()
    planned_at = 0.0

    def planned(made: Any) -> None:
        nonlocal planned_at
        planned_at = time.perf_counter() - started
        peaks.append(memory.resident_peak())
        plan.update(made.rows())
        print(plan, file=sys.stderr)

    def progress(done: Any) -> None:
        if isinstance(done, Layer):
            rows.append({"path": done.path, "s": done.seconds, "error": done.error})
            print(f"{done.path}: {done.seconds:.1f} s", file=sys.stderr, flush=True)
        else:
            peaks.append(done.peak)
            blocks.append(done.seconds)

    streaming.stream(
        folder / "model",
        folder / "streamed",
        tokens(options["config"], options["samples"], options["length"]),
        method,
        sparsity=sparsity,
        key=jax.random.key(0),
        memory_limit=options["memory"],
        batch=options["batch"],
        planned=planned,
        progress=progress,
    )
    return {
        "plan": plan,
        "plan_and_compile_s": planned_at,
        "blocks_s": blocks,
        "matrices": rows,
        "peak": max(*peaks, memory.resident_peak()),
        "digest": digest(folder / "streamed" / shards.SINGLE),
    }


def whole(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Prunes the same model whole, with everything in memory."""
    method, sparsity = BLOCK_METHODS[options["method"]]
    checkpoint = huggingface.read(folder / "model")
    config = decoder.DecoderConfig.from_dict(checkpoint.config)
    given = tokens(options["config"], options["samples"], options["length"])
    batches = given.reshape(-1, options["batch"], options["length"])
    result = fh.prune_sequential(
        functools.partial(decoder.apply, config=config),
        checkpoint.params,
        [jnp.asarray(b) for b in batches],
        method,
        sparsity=sparsity,
        key=jax.random.key(0),
        rules={"embed_tokens|lm_head": "skip"},
    )
    huggingface.write(folder / "whole", result.params, source=checkpoint)
    return {
        "peak": memory.resident_peak(),
        "digest": digest(folder / "whole" / shards.SINGLE),
    }


def digest(path: Path) -> str:
    """Of all arrays by name; headers may be ordered differently."""
    header = tensors.read_header(path)
    found = hashlib.sha256()
    for key in sorted(header.shapes):
        found.update(key.encode())
        found.update(np.ascontiguousarray(tensors.mapped(path, header, key)).tobytes())
    return found.hexdigest()


def growth(options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a second solve, per method and width."""
    rows = []
    for width in options["widths"]:
        keys = jax.random.split(jax.random.key(width), 3)
        x = jax.random.normal(keys[0], (2 * width, width), jnp.float32)
        mix = jax.random.normal(keys[1], (width, width), jnp.float32) / width**0.5
        x = x @ (mix + jnp.eye(width))
        gram = x.T @ x
        stats = fh.Stats(
            sq_norm=jnp.diagonal(gram),
            mean=x.mean(0),
            count=jnp.asarray(x.shape[0], jnp.float32),
            gram=gram,
        )
        w = jax.random.normal(keys[2], (width, width), jnp.float32)
        for name, method in GROWTH.items():
            run = jax.jit(
                lambda key, w, stats, method=method: (
                    method.decide(method.solve(key, w, stats), w).weight
                )
            )
            times = []
            for _ in range(2):
                cpu, wall = time.process_time(), time.perf_counter()
                run(jax.random.key(0), w, stats).block_until_ready()
                times.append((time.process_time() - cpu, time.perf_counter() - wall))
            row = {"method": name, "width": width}
            row |= {"cpu_s": times[1][0], "s": times[1][1], "first_s": times[0][1]}
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return {"rows": rows}


def asked(
    args: argparse.Namespace, config: dict[str, Any], method: str, length: int, gib: int
) -> dict[str, Any]:
    """The options of a measurement: 32 samples under a limit."""
    return {
        "config": config,
        "method": method,
        "samples": 32,
        "length": 64 if args.small else length,
        "batch": 4,
        "memory": size(args.memory or f"{gib}GiB"),
    }


def judged(found: dict[str, Any], goal: int) -> dict[str, Any]:
    """Whether the peak keeps its goal."""
    return {"goal_peak": goal, "within_goal": found["peak"] <= goal}


def run_block(part: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One block of the shape of LLaMA-2-7B."""
    options = asked(args, SMALL_SEVEN if args.small else SEVEN, part, 512, 6)
    measured("make", folder / "model", options)
    found = measured("stream", folder, options)
    return {
        **found,
        **judged(found, 7 << 30),
        "options": options,
        "hours_of_32_blocks_extrapolated": BLOCKS * sum(found["blocks_s"]) / 3600,
    }


def run_stream(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A whole model, streamed and in memory."""
    config = SMALL_LLAMA if args.small else LLAMA_200M
    options = asked(args, config, "block-sparsegpt", 256, 2)
    measured("make32", folder / "model", options)
    streamed = measured("stream", folder, options)
    beside = measured("whole", folder, options)
    shapes = decoder.shapes(decoder.DecoderConfig.from_dict(config)).values()
    return {
        **streamed,
        **judged(streamed, options["memory"] + streamed["baseline"]),
        "options": options,
        "parameters": sum(math.prod(shape) for shape in shapes),
        "whole": beside,
        "identical": streamed["digest"] == beside["digest"],
    }


def run_growth(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    widths = [128, 256] if args.small else [512, 1024, 2048]
    if args.wide:
        widths.append(4096)
    return measured("growth", folder, {"widths": widths})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help=f"parts, with commas: {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="tiny sizes, no results")
    parser.add_argument("--wide", action="store_true", help="growth up to width 4096")
    parser.add_argument("--memory", help="limit, instead of that of the part")
    parser.add_argument("--folder", type=Path, help="where to put models (removed)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.folder, args.options)))
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in args.only.split(",") if args.only else PARTS:
        folder = Path(tempfile.mkdtemp(prefix="flexhinm-scale-", dir=args.folder))
        try:
            if part in BLOCK_METHODS:
                found = run_block(part, args, folder)
            else:
                found = {"stream": run_stream, "growth": run_growth}[part](args, folder)
        finally:
            shutil.rmtree(folder)
        found |= {"jax": jax.__version__, "load": os.getloadavg()[0]}
        show(part, found)
        if not args.small:
            known[part] = found
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    if "growth" in known and not args.small:
        figure(known["growth"]["rows"])


def show(part: str, found: dict[str, Any]) -> None:
    """One table per part."""
    table = Table(title=part, title_justify="left", box=None)
    console = Console(width=110)
    if part == "growth":
        for name in ("method", "width", "CPU s", "s", "s with compilation"):
            table.add_column(name, justify="right")
        for row in found["rows"]:
            times = [f"{row[k]:.3f}" for k in ("cpu_s", "s", "first_s")]
            table.add_row(row["method"], str(row["width"]), *times)
        console.print(table)
        return
    table.add_column("what")
    table.add_column("measured", justify="right")
    gib = lambda x: f"{x / 2**30:.2f} GiB"  # noqa: E731
    table.add_row("peak resident", gib(found["peak"]))
    table.add_row("of it at the start", gib(found["baseline"]))
    table.add_row("goal", f"{gib(found['goal_peak'])}, met: {found['within_goal']}")
    table.add_row("planned peak", gib(found["plan"]["planned peak"]))
    table.add_row("planning, compiling", f"{found['plan_and_compile_s']:.0f} s")
    table.add_row("blocks", f"{sum(found['blocks_s']):.0f} s")
    if "identical" in found:
        table.add_row("parameters", f"{found['parameters'] / 1e6:.0f} M")
        table.add_row("equal to the whole model's", str(found["identical"]))
        table.add_row("peak of that", gib(found["whole"]["peak"]))
    else:
        hours = found["hours_of_32_blocks_extrapolated"]
        table.add_row("32 blocks, extrapolated", f"{hours:.1f} h")
        hours = BLOCKS * found["cpu_seconds"] / 3600
        table.add_row("the same in CPU time", f"{hours:.1f} h")
        for row in found["matrices"]:
            error = f"{row['s']:.1f} s, error {row['error']:.4f}"
            table.add_row(row["path"].removeprefix("model.layers."), error)
    console.print(table)


def figure(rows: list[dict[str, Any]]) -> None:
    """Seconds against width, both logarithmic."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(6, 4.5), layout="constrained")
    axes = made.subplots()
    for name in GROWTH:
        mine = [row for row in rows if row["method"] == name]
        axes.loglog(
            [r["width"] for r in mine], [r["cpu_s"] for r in mine], "o-", label=name
        )
    axes.set_xlabel("width of a square matrix")
    axes.set_ylabel("CPU seconds, without compilation")
    axes.set_xticks(sorted({row["width"] for row in rows}))
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    made.savefig(FIGURE, dpi=120)


if __name__ == "__main__":
    main()
