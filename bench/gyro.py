"""Retained saliency and time of the permutation search, beside the anchors.

    make bench-gyro                      # everything, about half an hour
    make bench-gyro ARGS=--quick         # one seed of everything, a few minutes

The anchors are the released Gyro code with its aliasing bug fixed (`.clone()` twice),
on the same matrices, 75 % = half of the vectors removed and 2:4 in the rest, V = 32.
CPU seconds are process time after a warm-up call.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from bench import inputs
from bench.study import Row, Study, alone, anchors, timed
from flexhinm_jax.ops import masks
from flexhinm_jax.patterns import ChannelSearch, Gyro, Pattern, RandomRows
from train.lab import models

KEY = 0
QUALITY = "Gyro: HiNM at 75 %, tiles of 32 rows"
REGION = "FlexHiNM regions"
COLUMNS = "Column search for 2:4"
STACK = "A stack of layers against a loop"
WIDE = "One wide matrix, V = 64"
EFFORT = "Search effort"
MODEL = "Gyro on all-MiniLM-L6-v2, HiNM at 75 %"


def kept(
    name: str, pattern: Pattern, sparsity: float | None = 0.75, repeats: int = 3
) -> tuple[float, float, dict[str, Any]]:
    """(share of sum|W| kept, CPU seconds of one projection, further figures)."""
    s = jnp.abs(jnp.asarray(inputs.matrix(name)))
    timing = timed(lambda: pattern.project(jax.random.key(KEY), s, sparsity), repeats)
    support = timing.result
    more = {
        "kept of the squares": float(masks.retained(s * s, support.keep)),
        "first cpu_s": timing.first,
    }
    if name.startswith("planted") and support.regions is not None:
        order = np.asarray(support.regions.out_order)
        label = inputs.labels(name)[order].reshape(-1, inputs.TILE)
        more["purity"] = float(np.mean([np.bincount(t).max() for t in label]) / 32)
    return float(masks.retained(s, support.keep)), timing.least, more


def quality(flags: argparse.Namespace) -> Iterator[Row]:
    """HiNM at 75 % beside the corrected reference."""
    planted = anchors(f"{QUALITY}, planted order")
    for name in anchors(QUALITY):
        if flags.quick and name.endswith(("_s1", "_s2")):
            continue
        value, seconds, data = kept(name, fh.HiNM(32))
        more = {"natural order": kept(name, fh.HiNM(32, permute=None))[0]}
        if name in planted:
            more["planted order"] = planted[name]
        if not flags.quick:
            pattern = fh.HiNM(32, permute=Gyro.thorough())
            more["thorough"], more["thorough cpu_s"], _ = kept(name, pattern, repeats=1)
        yield Row(QUALITY, name, value, None, seconds, more, data)


def regions(flags: argparse.Namespace) -> Iterator[Row]:
    """Three regions, HiNM, and the absorbed form."""
    flex, matrices = fh.FlexHiNM, ["heavy256_s0, 50%", "colsig_1.0, 50%"]
    if not flags.quick:
        matrices += ["colsig_1.0, 75%", "colsig_1.5, 75%", "colsig_2.0, 75%"]
    for matrix in matrices:
        name, sparsity = matrix.split(", ")
        for text, pattern in {
            "natural order": flex(32, permute=None),
            "Gyro": flex(32),
            "absorbed, natural order": flex(32, permute=None, regions="absorb"),
            "absorbed, Gyro": flex(32, regions="absorb"),
            "HiNM, natural order": fh.HiNM(32, permute=None),
            "HiNM + Gyro": fh.HiNM(32),
        }.items():
            value, _, _ = kept(name, pattern, float(sparsity.removesuffix("%")) / 100)
            yield Row(REGION, f"{matrix}, {text}", value)


def columns(flags: argparse.Namespace) -> Iterator[Row]:
    """One input order for plain 2:4, beside apex."""
    natural = anchors(f"{COLUMNS}, natural order")
    for name in list(natural)[: 1 if flags.quick else None]:
        search = ChannelSearch()
        value, seconds, data = kept(name, fh.NM(2, 4, permute=search), None)
        search = ChannelSearch(sweeps=512)
        more = {"natural order": natural[name]}
        more["512 sweeps"], more["512 sweeps cpu_s"], _ = kept(
            name, fh.NM(2, 4, permute=search), None
        )
        yield Row(COLUMNS, name, value, None, seconds, more, data)


def stacked(_: argparse.Namespace) -> Iterator[Row]:
    """Six 384 x 384 matrices: one call against six."""
    pattern = fh.HiNM(32)
    stack = jnp.abs(jax.random.normal(jax.random.key(1), (6, 384, 384)))
    keys = jax.random.split(jax.random.key(2), 6)
    project = lambda k, s: pattern.project(k, s, 0.75)  # noqa: E731
    together: Any = jax.jit(jax.vmap(project))
    one = timed(lambda: together(keys, stack))
    loop = timed(lambda: [project(k, s) for k, s in zip(keys, stack, strict=True)])
    same = all(
        bool((each.keep == one.result.keep[j]).all())
        for j, each in enumerate(loop.result)
    )
    more = {"same result": same, "compilations": together._cache_size()}
    data = {"first cpu_s": one.first}
    yield Row(STACK, "a stack of layers", one.least, loop.least, None, more, data)


def one_wide_matrix() -> dict[str, float]:
    """One 4096 x 4096 projection, in a process of its own."""
    w = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
    s = jnp.abs(jnp.asarray(w))
    del w
    run = lambda: fh.HiNM(64).project(jax.random.key(KEY), s, 0.75)  # noqa: E731
    timing = timed(run, repeats=1)
    return {
        "kept": float(masks.retained(s, timing.result.keep)),
        "cpu_s": timing.least,
        "first cpu_s": timing.first,
        "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def wide(flags: argparse.Namespace) -> Iterator[Row]:
    """4096 x 4096, time and memory."""
    if not flags.quick:
        more = alone(one_wide_matrix)
        value, seconds = more.pop("kept"), more.pop("cpu_s")
        yield Row(WIDE, "4096 x 4096", value, None, seconds, more)


def curve(flags: argparse.Namespace) -> Iterator[Row]:
    """Quality against search time, and the published schedule as the last point."""
    efforts = [1, 4, 16] if flags.quick else [1, 2, 4, 8, 16, 32, 64, 128]
    names = (
        ["gauss512_s0"] if flags.quick else ["gauss512_s0", "planted512_s0", "query"]
    )
    for name in names:
        searches = [Gyro(sweeps=4 * e, rounds=e) for e in efforts]
        for k, search in enumerate([*searches, Gyro.paper()]):
            value, seconds, data = kept(name, fh.HiNM(32, permute=search))
            data |= {"matrix": name, "reference": anchors(QUALITY)[name]}
            data["published"] = k == len(searches)
            yield Row(EFFORT, f"{name}, setting {k}", value, None, seconds, {}, data)


def sentence_encoder(flags: argparse.Namespace) -> Iterator[Row]:
    """Mean cosine of MiniLM at 75 %, Wanda scores, by row order."""
    count = 64 if flags.quick else 512
    dense = models.load(evaluation=count)
    batches = dense.calibration(count)
    uses = fh.discover(dense.embed, dense.params, *batches[0])
    options: Any = {"gram": False, "token_mask": dense.model.token_mask}
    stats = fh.calibrate(dense.embed, dense.params, uses, batches, **options)
    for name, permute in {
        "none": None,
        "natural rows, searched columns": ChannelSearch(),
        "random rows, searched columns": RandomRows(),
        "gyro": Gyro(),
    }.items():
        method = fh.Wanda(fh.HiNM(32, permute=permute))
        start = time.process_time()
        key = jax.random.key(KEY)
        states = fh.solve(method, key, dense.params, uses, stats, 0.75)
        plans = fh.decide(method, states, dense.params, uses)
        sparse = jax.block_until_ready(fh.densify(plans, dense.params, uses))
        seconds = time.process_time() - start
        scores = dense.scores(sparse)
        more = {"5 % quantile": scores["quantile"]}
        retained = [np.mean(np.asarray(p.retained)) for p in plans.values()]
        more["score kept"] = float(np.mean(retained))
        yield Row(MODEL, name, scores["cosine"], None, seconds, more)


STUDY = Study(
    "gyro",
    "Gyro",
    {
        "quality": quality,
        "regions": regions,
        "columns": columns,
        "stacked": stacked,
        "wide": wide,
        "curve": curve,
        "minilm": sentence_encoder,
    },
    {
        QUALITY: "Share of sum |W| kept, larger is better. The anchor is the released "
        "code with its aliasing bug fixed, on the same matrices.",
        REGION: "Share of sum |W| kept, as above.",
        COLUMNS: "Share of sum |W| kept; the anchor is the search of apex.",
        STACK: "CPU seconds, smaller is better; the anchor is a loop over the layers.",
        WIDE: "Share of sum |W| kept.",
        EFFORT: "Share of sum |W| kept against CPU seconds.",
        MODEL: "Mean cosine, Wanda, one-shot, weights unmoved; CPU seconds with "
        "compilation.",
    },
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, no thorough")
    STUDY.main(parser)
