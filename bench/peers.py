"""Our one-shot pruners beside the published formulas in plain PyTorch, in one run.

    make bench-peers                    # in its own environment, .venv-peers
    make bench-peers ARGS=--quick       # one seed, 2:4 alone
    make bench-peers ARGS="--only solvers"          # one thread, up to 4096 x 4096
    make bench-peers ARGS="--only model --text calibration.txt evaluation.txt"

The PyTorch side is written from the papers (magnitude, Wanda, RIA, SparseGPT, ALPS, the
transposable solver of TSENOR), not taken from their repositories. Both sides see the
same float32 layer; errors are || X (W - W')^T ||^2 / || X W^T ||^2 in float64. Supports
or errors must agree, or the run fails. CPU seconds are the least process time of three
calls: ours after compilation with the threads that XLA takes, PyTorch's with one thread
and with its default.

The part `solvers` gives both sides one thread of one core, in a process of its own, and
calls them in turn: nine times, less often where a call takes long.

The part `model` prunes SmolLM2-135M by `flexhinm prune` and by a plain pipeline of
PyTorch and transformers (`bench/pipeline.py`) on the same tokens, each in a process of
its own.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import flexhinm_jax as fh
from bench import formulas, inputs, language_models
from bench.oneshot import FIFTY
from bench.study import ONE_THREAD, Row, Study, alone, timed, use_cores
from flexhinm_jax.models.batches import pieces
from flexhinm_jax.models.evaluation import windows
from flexhinm_jax.models.load import load
from flexhinm_jax.ops import transport

TABLE = "Beside PyTorch"
ONE = "SparseGPT and ALPS beside PyTorch, one thread"
MODEL = "A language model beside PyTorch and transformers"

#: Largest relative difference of the errors, by method.
TOLERANCE = {"magnitude": 1e-4, "wanda": 1e-4, "ria": 1e-4, "transposable": 1e-3}

#: Largest relative difference of the perplexities, by method; .01 for others. SparseGPT
#: on the same Gram has the same error to five digits on either side, but hands every
#: difference of rounding on to the columns and the blocks behind it.
APART = {"sparsegpt": 0.03}

PEERS: dict[str, tuple[Callable, Callable]] = {
    "magnitude": (formulas.magnitude, fh.Magnitude),
    "wanda": (formulas.wanda, fh.Wanda),
    "ria": (formulas.ria, fh.RIA),
}
SOLVERS: dict[str, tuple[Callable, Callable]] = {
    "sparsegpt": (formulas.sparsegpt, fh.SparseGPT),
    "alps": (formulas.alps, fh.ALPS),
}


def torch_seconds(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, CPU seconds with one thread and with the default number)."""
    threads, seconds = torch.get_num_threads(), []
    for count in (1, threads):
        torch.set_num_threads(count)
        with torch.inference_mode():
            timing = timed(call)
        seconds.append(timing.least)
    return timing.result, *seconds


def row(
    what: str, ours: float, theirs: float, seconds: float, peer: tuple, **more: Any
) -> Row:
    """One line.

    Raises:
      SystemExit: the figures do not agree.
    """
    ratio, name = ours / theirs, what.split()[0]
    if abs(ratio - 1) > TOLERANCE[name]:
        raise SystemExit(f"{what} disagree: {ours:g} and {theirs:g}")
    _, one, default = peer
    more = {"error or score, ours / PyTorch": ratio} | more
    more |= {"PyTorch, default threads": default}
    data = {"ours": ours, "torch": theirs, "version": torch.__version__}
    return Row(TABLE, what, seconds, one, None, more, data)


def layers(flags: argparse.Namespace) -> Iterator[Row]:
    """Every score on the calibrated 768 x 768 layers."""
    for seed in range(1 if flags.quick else 3):
        w, x, _ = inputs.held_out_layer(seed)
        h, stats = x.T.astype(np.float64) @ x, inputs.statistics(x)
        given = torch.from_numpy(w), torch.from_numpy(h.astype(np.float32))
        for n, m in [(2, 4)] if flags.quick else [(2, 4), (4, 8)]:
            for name, (formula, method_class) in PEERS.items():
                method = method_class(fh.NM(n, m))
                run = jax.jit(functools.partial(method.solve, jax.random.key(0)))
                timing = timed(functools.partial(run, jnp.asarray(w), stats))
                plan = method.decide(timing.result, jnp.asarray(w))
                peer = torch_seconds(functools.partial(formula, *given, n, m))
                both = np.asarray(plan.weight), peer[0].numpy()
                ours, theirs = (inputs.relative_error(w, y, h) for y in both)
                same = float(np.mean((both[0] != 0) == (both[1] != 0)))
                what = f"{name} {n}:{m}, seed {seed}"
                more = {"same support": same}
                yield row(what, ours, theirs, timing.least, peer, **more)


#: (width, n, m) -> how often each side is called, by method.
CALLS = {
    (768, 2, 4): {"sparsegpt": 9, "alps": 9},
    (768, 4, 8): {"sparsegpt": 9, "alps": 9},
    (2048, 2, 4): {"sparsegpt": 3, "alps": 1},
    (4096, 2, 4): {"sparsegpt": 1, "alps": 1},
}
GOALS = {"sparsegpt": 0.8, "alps": 0.7}


def solvers(flags: argparse.Namespace) -> Iterator[Row]:
    """The methods that move weights, against the width.

    Raises:
      SystemExit: the losses do not agree.
    """
    for (width, n, m), calls in CALLS.items():
        if flags.width and width not in flags.width:
            continue
        for name, count in calls.items():
            pair = alone(in_turn, name, width, n, m, count, **ONE_THREAD)
            what = f"{name} {n}:{m}, {width} x {width}"
            loss = pair["losses"][0] / pair["losses"][1]
            if loss > 1.002:
                raise SystemExit(f"{what}: {loss:g} times the loss of PyTorch")
            ratios = [a / b for a, b in zip(*pair["seconds"], strict=True)]
            more = {
                "median of ratios": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "calls": count,
                "goal": GOALS[name],
                "loss, ours / PyTorch": loss,
            }
            ours, theirs = map(statistics.median, pair["seconds"])
            yield Row(ONE, what, ours, theirs, None, more, pair)


def in_turn(name: str, width: int, n: int, m: int, count: int) -> dict[str, Any]:
    """CPU seconds of every call, ours and PyTorch's, and the losses of both."""
    use_cores(1)
    torch.set_num_threads(1)
    w, x, _ = inputs.held_out_layer(0, width)
    stats = inputs.statistics(x)
    formula, method_class = SOLVERS[name]
    method = method_class(fh.NM(n, m))
    solve = jax.jit(functools.partial(method.solve, jax.random.key(0)))
    solve = solve.lower(jnp.asarray(w), stats).compile()
    given = torch.from_numpy(w), torch.from_numpy(np.array(stats.gram))
    calls = (
        lambda: jax.block_until_ready(solve(jnp.asarray(w), stats).fixed["weight"]),
        lambda: formula(*given, n, m),
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    solved: list[Any] = [None, None]
    with torch.inference_mode():
        for _ in range(count):
            for side, call in enumerate(calls):
                before = time.process_time()
                solved[side] = call()
                seconds[side].append(time.process_time() - before)
    gram = np.asarray(stats.gram, np.float64)
    losses = [inputs.relative_error(w, np.asarray(y), gram) for y in solved]
    data = {"torch": torch.__version__, "threads": 1}
    return {"seconds": seconds, "losses": losses, **data}


def masks(flags: argparse.Namespace) -> Iterator[Row]:
    """The transposable solver on |W| of a 1024 x 1024 matrix, same sweeps."""
    for n, m in [(4, 8)] if flags.quick else [(4, 8), (16, 32)]:
        a = inputs.tiles(inputs.scores(0), m)
        solve = jax.jit(
            lambda a, n=n: transport.solve(a, n=n, stages=FIFTY, exchanges=0).keep
        )
        timing = timed(functools.partial(solve, jnp.asarray(a)))
        peer = torch_seconds(
            functools.partial(formulas.transposable, torch.from_numpy(a), n)
        )
        sides = np.asarray(timing.result), peer[0].numpy()
        exact = all((s.sum(1) == n).all() and (s.sum(2) == n).all() for s in sides)
        if not exact:
            raise SystemExit(f"transposable {n}:{m}: a row or column does not keep {n}")
        total = a.sum(dtype=float)
        ours, theirs = ((a * s).sum(dtype=np.float64) / total for s in sides)
        more = {"same support": float(np.mean(sides[0] == sides[1]))}
        more["sums exact"] = exact
        what = f"transposable {n}:{m}, 1024"
        yield row(what, float(ours), float(theirs), timing.least, peer, **more)


def whole_model(flags: argparse.Namespace) -> Iterator[Row]:
    """SmolLM2 pruned at 2:4, judged from the dense inputs of each block, on both sides.

    Raises:
      RuntimeError: the perplexities differ by more than 1 %.
    """
    with tempfile.TemporaryDirectory(prefix="flexhinm-") as name:
        folder = Path(name)
        flags.text = flags.text or language_models.texts(folder)
        flags.calibration, flags.evaluation = flags.text
        model = load(flags.model)
        samples = token_pieces(model, flags.calibration, flags.length)[: flags.samples]
        read = model.encode(flags.evaluation.read_text())[0][: flags.tokens + 1]
        inputs, targets, _ = windows(
            read, language_models.WINDOW, language_models.WINDOW
        )
        files = folder / "samples.npy", folder / "windows.npy"
        np.save(files[0], samples.astype(np.int64))
        joined = np.concatenate([inputs, targets[:, -1:]], 1)
        np.save(files[1], joined.astype(np.int64))
        for method in flags.methods.split(","):
            out = folder / method
            options = f"--method {method} --pattern 2:4 --statistics block"
            told = language_models.line("prune", [flags.model], options, flags)
            cost, _ = language_models.run([*told, "--out", str(out)])
            places = str(flags.model), str(out), str(flags.evaluation)
            ours = language_models.judge(*places, flags.tokens)["perplexity"]
            line = [sys.executable, "-m", "bench.pipeline", str(flags.model), method]
            line += ["2:4", *map(str, files)]
            done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
            theirs = json.loads(done.stdout.splitlines()[-1])
            apart = ours / theirs["perplexity"]
            if abs(apart - 1) > APART.get(method, 0.01):
                raise RuntimeError(f"{method}: {ours} and {theirs['perplexity']}")
            yield Row(
                MODEL,
                f"{method} 2:4",
                cost["seconds"],
                theirs["seconds"],
                None,
                {
                    "perplexity, ours / PyTorch": apart,
                    "perplexity": ours,
                    "peak GB": cost["peak GB"],
                    "peak GB, PyTorch": theirs["peak GB"],
                },
                {"samples": len(samples), "length": flags.length},
            )


def token_pieces(model: Any, file: Path, length: int) -> np.ndarray:
    """The text in pieces of equal length, as the command cuts it."""
    tokens, _ = model.encode(file.read_text())
    return pieces(np.asarray(tokens), length, None, len(tokens))


STUDY = Study(
    "peers",
    "Beside peers",
    {"solvers": solvers, "layers": layers, "masks": masks, "model": whole_model},
    {
        ONE: "CPU seconds after compilation, medians of calls in turn on one core;"
        " the anchor is the published formula in PyTorch"
        f" {torch.__version__}; a ratio below 1 is faster.",
        MODEL: "CPU seconds of the whole process and the peak of its memory, ours with"
        " `--statistics block`; the anchor is `bench/pipeline.py` in PyTorch"
        f" {torch.__version__}.",
        TABLE: f"CPU seconds after compilation; the anchor is the published formula in "
        f"PyTorch {torch.__version__} with one thread, in the same run; a ratio below "
        "1 is faster.",
    },
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed, 2:4 alone")
    add("--width", type=int, nargs="*", help="of the part solvers")
    add("--methods", default="wanda,sparsegpt", help="of the part model, with commas")
    language_models.add_data(parser)
    STUDY.main(parser)
