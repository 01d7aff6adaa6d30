"""Decoders in bounded memory: a block of the size of a 7B model, a whole small model.

    make bench-scale                                   # all parts, about an hour
    make bench-scale ARGS="--only block-sparsegpt"     # one part
    make bench-scale ARGS="--only stream --small --out /tmp/scale.json"  # one minute
    make bench-scale ARGS="--only growth --widths 5"   # up to width 4096
    make bench-scale ARGS="--only growth --widths 5 --methods alps"

block-sparsegpt, block-wanda, block-alps: one block of the shape of LLaMA-2-7B, random
bfloat16 weights, 32 samples of 512 random tokens, streamed. Hours for a model are the
seconds of the block times 32: an extrapolation, not a measurement.
stream: a random Llama of 200 million parameters, streamed under a limit, beside the
same model pruned whole; the files must be equal.
growth: seconds per square matrix against its width.
calibration: the Grams of all inputs beside the forward pass alone.

Every measurement is a process of its own. Its peak is the high-water mark of resident
memory that the system counted (VmHWM), its baseline the same after the imports.
"""

import argparse
import functools
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import flexhinm_jax as fh
from bench import inputs
from bench.study import ONE_THREAD, Row, Study, alone, use_cores
from flexhinm_jax.cli.flags import size
from flexhinm_jax.io import huggingface, shards, tensors
from flexhinm_jax.models import decoder
from flexhinm_jax.sequential.cuts import Layer
from flexhinm_jax.streaming import memory, streaming
from flexhinm_jax.streaming.memory import Budget

PEAK = "Peak resident memory in GiB, interpreter included"
GROWN = "Growth with the width"
EXPONENTS = "Exponents of growth"
CALIBRATION = "Calibration of a decoder beside its forward pass"
BLOCKS = 32  # of LLaMA-2-7B


def llama(
    hidden: int, inner: int, blocks: int, heads: int, words: int = 32_000
) -> dict[str, Any]:
    """The config.json of a Llama."""
    return {
        "model_type": "llama",
        "vocab_size": words,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,  # keeps a second table of 262 MB off the disk
    }


SEVEN, SMALL_SEVEN = llama(4096, 11_008, 1, 32), llama(256, 704, 1, 2)
LLAMA_200M, SMALL_LLAMA = llama(1024, 2816, 13, 16), llama(128, 352, 3, 4, 2000)

BLOCK_METHODS = {
    "block-sparsegpt": (fh.SparseGPT(fh.NM(2, 4)), None),
    "block-alps": (fh.ALPS(fh.NM(2, 4)), None),
    "block-wanda": (fh.Wanda(fh.FlexHiNM(64, permute=fh.Gyro())), 0.75),
}
NM = fh.NM(2, 4)
GROWTH = {
    "magnitude": (fh.Magnitude(NM), None, 2),
    "wanda": (fh.Wanda(NM), None, 2),
    "ria": (fh.RIA(NM), None, 2),
    "wanda, transposable 2:4": (fh.Wanda(fh.Transposable(2, 4)), None, 2),
    "wanda, order of channels": (
        fh.Wanda(fh.NM(2, 4, permute=fh.patterns.ChannelSearch())),
        None,
        3,
    ),
    "wanda, FlexHiNM V=64": (fh.Wanda(fh.FlexHiNM(64, permute=None)), 0.75, 2),
    "wanda, FlexHiNM V=64, Gyro": (
        fh.Wanda(fh.FlexHiNM(64, permute=fh.Gyro())),
        0.75,
        3,
    ),
    "refit(wanda)": (fh.Refit(fh.Wanda(NM)), None, 3),
    "refine_mask(wanda)": (fh.RefineMask(fh.Wanda(NM)), None, 3),
    "sparse_swaps(wanda)": (fh.SparseSwaps(fh.Wanda(NM)), None, 3),
    "sparsegpt": (fh.SparseGPT(NM), None, 3),
    "alps": (fh.ALPS(NM), None, 3),
}
"""Name -> method, sparsity, exponent of its mathematics in the width."""

WIDTHS = (256, 512, 1024, 2048, 4096)
ENOUGH_SECONDS = 2.0  # of one method: no further call after these


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


def measured(call: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Adds what the process had used before, and took, to what is returned."""

    @functools.wraps(call)
    def run(folder: str, options: dict[str, Any]) -> dict[str, Any]:
        jnp.zeros(8).block_until_ready()
        baseline = memory.resident_peak()
        began, used = time.perf_counter(), time.process_time()
        figures = call(Path(folder), options)
        return {
            "baseline": baseline,
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - used,
            **figures,
        }

    return run


@measured
def make(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Writes the random model."""
    kind = ml_dtypes.bfloat16 if options["dtype"] == "bfloat16" else np.float32
    make_model(folder / "model", options["config"], kind)
    return {}


@measured
def streamed(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Streams a model; seconds per stage and the peak."""
    method, sparsity = BLOCK_METHODS[options["method"]]
    peaks, rows, blocks, plan = [], [], [], {}
    started = time.perf_counter()

    def progress(done: Any) -> None:
        peaks.append(memory.resident_peak())
        if isinstance(done, Budget):
            seconds = time.perf_counter() - started
            plan.update(dict(done.rows()) | {"planned after s": seconds})
            print(plan, file=sys.stderr)
        elif isinstance(done, Layer):
            rows.append({"path": done.path, "s": done.seconds, "error": done.error})
            print(f"{done.path}: {done.seconds:.1f} s", file=sys.stderr, flush=True)
        else:
            peaks.append(done.peak)
            blocks.append(done.seconds)

    streaming.stream(
        folder / "model",
        folder / "streamed",
        tokens(options["config"], options["samples"], options["length"]),
        streaming.Request(method=method, sparsity=sparsity, key=jax.random.key(0)),
        limits=streaming.Limits(options["memory"], options["batch"]),
        progress=progress,
    )
    return {
        "plan": plan,
        "blocks_s": blocks,
        "matrices": rows,
        "peak": max(*peaks, memory.resident_peak()),
        "digest": digest(folder / "streamed" / shards.SINGLE),
    }


@measured
def whole(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Prunes the same model whole, with everything in memory."""
    method, sparsity = BLOCK_METHODS[options["method"]]
    checkpoint = huggingface.read(folder / "model")
    config = decoder.DecoderConfig.from_dict(checkpoint.config)
    every = tokens(options["config"], options["samples"], options["length"])
    batches = every.reshape(-1, options["batch"], options["length"])
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
    digest = hashlib.sha256()
    for key in sorted(header.shapes):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(tensors.mapped(path, header, key)).tobytes())
    return digest.hexdigest()


def apart(call: Any, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """A measurement in a process whose allocator gives back what is freed."""
    return alone(call, folder, options, MALLOC_ARENA_MAX="2")


def options_of(
    flags: argparse.Namespace, config: dict[str, Any], method: str, length: int
) -> dict[str, Any]:
    """What a measurement is told: 32 samples under a limit."""
    known = {"config": config, "method": method, "samples": 32, "batch": 4}
    return known | {"length": 64 if flags.small else length}


def peak(name: str, figures: dict[str, Any], goal: int, **data: Any) -> Row:
    """The row of a streamed model."""
    seconds = figures.pop("cpu_seconds")
    more = {
        "planned GiB": figures["plan"]["planned peak"] / 2**30,
        "seconds of all blocks": sum(figures["blocks_s"]),
    }
    more |= data.pop("more", {})
    value, limit = figures["peak"] / 2**30, goal / 2**30
    return Row(PEAK, name, value, limit, seconds, more, {**figures, **data})


def block(
    name: str, limit: str = "6GiB", goal: int = 7
) -> Callable[[argparse.Namespace], Iterator[Row]]:
    """A part: one block of the shape of LLaMA-2-7B; `goal` in GiB."""

    def part(flags: argparse.Namespace) -> Iterator[Row]:
        options = options_of(flags, SMALL_SEVEN if flags.small else SEVEN, name, 512)
        options |= {"memory": size(flags.memory or limit), "dtype": "bfloat16"}
        with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
            apart(make, folder, options)
            figures = apart(streamed, folder, options)
        hours = BLOCKS * sum(figures["blocks_s"]) / 3600
        more = {"hours of 32 blocks, extrapolated": hours}
        yield peak(name, figures, goal << 30, options=options, more=more)

    return part


def stream(flags: argparse.Namespace) -> Iterator[Row]:
    """A whole model, streamed and in memory."""
    config = SMALL_LLAMA if flags.small else LLAMA_200M
    options = options_of(flags, config, "block-sparsegpt", 256)
    options |= {"memory": size(flags.memory or "2GiB"), "dtype": "float32"}
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        apart(make, folder, options)
        figures, beside = (apart(call, folder, options) for call in (streamed, whole))
    shapes = decoder.shapes(decoder.DecoderConfig.from_dict(config)).values()
    more = {
        "whole model GiB": beside["peak"] / 2**30,
        "same arrays": figures["digest"] == beside["digest"],
    }
    parameters = sum(math.prod(shape) for shape in shapes)
    data = {"options": options, "parameters": parameters, "whole": beside}
    goal = options["memory"] + figures["baseline"]
    yield peak("stream", figures, goal, more=more, **data)


def growth(flags: argparse.Namespace) -> Iterator[Row]:
    """Seconds of a solve, per method and width, and the exponents of their growth."""
    seconds: dict[str, dict[int, float]] = {}
    widths = (128, 256) if flags.small else WIDTHS[: flags.widths]
    names = [n for n in GROWTH if any(text in n for text in flags.methods)]
    for width in widths:
        for name, spent in alone(solved, width, names, **ONE_THREAD).items():
            own = seconds.setdefault(name, {})
            more = {}
            if width // 2 in own:
                more = {"times half the width": spent / own[width // 2]}
            own[width] = spent
            data = {"method": name, "width": width}
            yield Row(GROWN, f"{name}, {width} x {width}", spent, more=more, data=data)
    for name in names:
        yield Row(EXPONENTS, name, exponent(seconds[name]), GROWTH[name][2])


def exponent(seconds: Mapping[int, float]) -> float:
    """Slope of log(seconds) in log(width), by least squares."""
    widths, spent = np.log(list(seconds.items())).T
    return float(np.polyfit(widths, spent, 1)[0])


def solved(width: int, names: list[str]) -> dict[str, float]:
    """Method -> least CPU seconds of a solve, compiled, with one thread."""
    use_cores(1)
    keys = jax.random.split(jax.random.key(width), 3)
    x = jax.random.normal(keys[0], (2 * width, width), jnp.float32)
    mix = jax.random.normal(keys[1], (width, width), jnp.float32) / width**0.5
    stats = inputs.statistics(np.asarray(x @ (mix + jnp.eye(width))))
    w = jax.random.normal(keys[2], (width, width), jnp.float32)
    args = jax.random.key(0), w, stats
    least = {}
    for name in names:
        method, sparsity, _ = GROWTH[name]

        def solve(key, w, stats, method=method, sparsity=sparsity):
            state = method.solve(key, w, stats, sparsity=sparsity)
            return method.decide(state, w).weight

        run, spent = jax.jit(solve).lower(*args).compile(), []
        while len(spent) < 3 and sum(spent) < ENOUGH_SECONDS:
            before = time.process_time()
            jax.block_until_ready(run(*args))
            spent.append(time.process_time() - before)
        least[name] = min(spent)
        print(f"{name}, {width}: {least[name]:.4g} s", file=sys.stderr, flush=True)
    return least


def calibration(flags: argparse.Namespace) -> Iterator[Row]:
    """Blocks of the shape of SmolLM2-135M: all Grams beside the forward pass alone."""
    blocks = 1 if flags.small else 4
    spent = alone(calibrated, blocks, 64 if flags.small else 512, **ONE_THREAD)
    what = f"{blocks} blocks of 576, {spent['tokens']} tokens"
    more = {"calibrate CPU s": spent["calibrate"], "forward CPU s": spent["forward"]}
    yield Row(CALIBRATION, what, spent["ratio"], 1.6, more=more, data=spent)


def calibrated(blocks: int, length: int) -> dict[str, Any]:
    """Median CPU seconds of three passes over the same batches, taking turns.

    Random weights: cost depends on shapes alone.

    Args:
      blocks: of the model, which has 30.
      length: tokens of a sample; four samples are a batch, two batches a pass.
    """
    use_cores(1)
    config = inputs.smollm2(blocks)
    params = decoder.init(jax.random.key(0), config)
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, (2, 4, length))
    batches = list(jnp.asarray(drawn, jnp.int32))
    apply_fn = functools.partial(decoder.apply, config=config)
    forward = jax.jit(apply_fn)
    uses = fh.discover(apply_fn, params, batches[0], rules={"embed": "skip"})
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: [forward(params, batch) for batch in batches],
        "calibrate": lambda: fh.calibrate(apply_fn, params, uses, batches),
    }
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(4):  # the first compiles
        for name, call in calls.items():
            before = time.process_time()
            jax.block_until_ready(call())
            if repetition:
                spent[name].append(time.process_time() - before)
    each = {name: float(np.median(seconds)) for name, seconds in spent.items()}
    ratios = np.asarray(spent["calibrate"]) / np.asarray(spent["forward"])
    return each | {"ratio": float(np.median(ratios)), "tokens": drawn.size}


STUDY = Study(
    "scale",
    "Decoders in bounded memory",
    {
        "block-sparsegpt": block("block-sparsegpt"),
        "stream": stream,
        "growth": growth,
        "calibration": calibration,
        "block-wanda": block("block-wanda"),
        "block-alps": block("block-alps", "8GiB", 8),
    },
    {
        PEAK: "The anchor is the goal; a ratio below 1 meets it. Seconds of blocks "
        "are wall time.",
        CALIBRATION: "CPU time of `calibrate` with the Grams of all inputs over that "
        "of the forward pass alone, one thread, median of three; smaller is better; "
        "the anchor is the goal.",
        GROWN: "CPU seconds of a solve of one square matrix with one thread, 2:4 where "
        "nothing else is said, compilation not included (`bench/results/scale.png`).",
        EXPONENTS: "Slope of log(seconds) in log(width) over the widths above; the "
        "anchor is the exponent of the mathematics, a ratio above 1 is more.",
    },
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    add = parser.add_argument
    add("--small", action="store_true", help="tiny sizes; give --out as well")
    add("--widths", type=int, default=3, help="of growth: up to 256 * 2^(this - 1)")
    add("--methods", nargs="+", default=[""], help="of growth: texts of their names")
    add("--memory", help="limit, instead of that of the part")
    add("--folder", type=Path, help="where to put models (removed)")
    STUDY.main(parser)
