"""Input orders for 2:4 masks of unmoved weights, beside their anchors.

    make bench-permutation                          # layers, then MiniLM
    make bench-permutation ARGS="--only layers"     # or "--only model --steps 30"

Layers: relative squared output error on the inputs of `bench.inputs.layer`, as in the
anchors. Model: mean cosine of the embeddings of all-MiniLM-L6-v2 with 36 pruned linears
to the dense ones (`train.lab.models`); orders are learned on calibration sentences and
chosen on others of those. CPU seconds are process time; for layers without compilation,
for the model with it.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

import flexhinm_jax as fh
from bench import inputs
from bench.study import Row, Study, timed
from flexhinm_jax.models import encoder
from flexhinm_jax.patterns import ChannelSearch
from flexhinm_jax.pruning import share_orders
from train.lab import models
from train.lab import text as corpus

KEY = 0
NATURAL = fh.NM(2, 4)
SEARCHED = fh.NM(2, 4, permute=ChannelSearch())
LAYERS = "Input orders for 2:4, one layer"
MODEL = "Input orders for 2:4 on all-MiniLM-L6-v2"


def searched(sweeps: int) -> fh.NM:
    """2:4 with a search of that many sweeps; 0 only deals by strength."""
    return fh.NM(2, 4, permute=ChannelSearch(sweeps=sweeps))


def layer_rows(score: Any) -> dict[str, fh.PermLLM]:
    """Name -> configuration; `steps=0` only searches."""
    make = functools.partial(fh.PermLLM, scores=score, mask_temperature=0.3)
    return {
        "natural order": make(NATURAL, steps=0),
        "deal": make(searched(0), steps=0),
        "search, 16 sweeps": make(searched(16), steps=0),
        "search, 64 sweeps (default)": make(searched(64), steps=0),
        "search, 256 sweeps": make(searched(256), steps=0),
        "PermLLM from natural": make(NATURAL, steps=150, learning_rate=0.05),
        "PermLLM from search": make(searched(64), steps=150),
        "cost variant from natural": make(
            NATURAL, steps=150, variant="cost", learning_rate=0.02
        ),
        "cost variant from search": make(
            searched(64), steps=150, variant="cost", learning_rate=0.01
        ),
    }


def layers(_: argparse.Namespace) -> Iterator[Row]:
    """Every layer, score and row."""
    scores_of = itertools.product(("synth512", "minilm"), ("wanda", "ria", "squared"))
    for name, score in scores_of:
        w, x = inputs.layer(name)
        gram, stats, weight = x.astype(np.float64), inputs.statistics(x), jnp.asarray(w)
        gram = gram.T @ gram

        def row(label: str, keep: np.ndarray, seconds: float) -> Row:
            error = inputs.relative_error(w, w * keep, gram)  # noqa: B023
            what = f"{name}, {score}, {label}"  # noqa: B023
            return Row(LAYERS, what, error, None, seconds)

        for label, method in layer_rows(score).items():
            if method.steps and score == "squared":
                continue

            def support(w: Any, stats: Any, method: fh.PermLLM = method) -> Any:
                state = method.solve(jax.random.key(KEY), w, stats)
                return method.decide(state, w).support.keep

            found = timed(functools.partial(jax.jit(support), weight, stats), repeats=1)
            yield row(label, np.asarray(found.result), found.least)
        scores = np.asarray(fh.PermLLM(scores=score).score(weight, stats))
        start = searched(0).project(jax.random.key(KEY), jnp.asarray(scores)).regions
        for sweeps in (1, 4):
            before = time.process_time()
            order = assignment_sweeps(scores, np.asarray(start.in_order[0]), sweeps)  # type: ignore[union-attr]
            seconds = time.process_time() - before
            ranks = np.argsort(np.argsort(-scores[:, order].reshape(len(w), -1, 4)))
            keep = np.zeros(w.shape, bool)
            keep[:, order] = (ranks < 2).reshape(w.shape)
            label = f"assignment, {sweeps} sweep{'s' if sweeps > 1 else ''}"
            yield row(label, keep, seconds)


def assignment_sweeps(scores: np.ndarray, order: np.ndarray, sweeps: int) -> np.ndarray:
    """Exact assignment of one slot of all groups after the other (RIA), on the host."""
    groups = order.reshape(-1, 4).copy()
    for _ in range(sweeps):
        for slot in range(4):
            rest = np.sort(scores[:, np.delete(groups, slot, 1)], axis=2)
            second, x = rest[..., 1], scores[:, groups[:, slot]]
            gain = np.stack(
                [np.maximum(second[:, g, None], x).sum(0) for g in range(len(groups))]
            )
            _, assigned = linear_sum_assignment(gain, maximize=True)
            groups[:, slot] = groups[assigned, slot]
    return groups.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Config:
    """How orders are learned with the loss of the model.

    Attributes:
      steps: updates.
      learning_rate: of Adam, with cosine decay.
      block: channels permuted among themselves.
      mask_temperature: see `PermLLM`.
      bias: see `PermLLM`.
      variant: see `PermLLM`.
      sentences: to learn from.
      batch: sentences in a step.
      length: tokens of a sentence, cut or padded.
      tie: one order for weights that read the same input.
      every: steps between two looks at the validation sentences.
    """

    steps: int = 100
    learning_rate: float = 0.05
    block: int = 64
    mask_temperature: float = 0.5
    bias: float = 1.0
    variant: Any = "sinkhorn"
    sentences: int = 1024
    batch: int = 32
    length: int = 24
    tie: bool = False
    every: int = 25


class Sentences:
    """Calibration sentences of one length, with what the dense model gives."""

    def __init__(self, dense: models.Encoder, config: Config):
        """Tokenizes and runs the dense model; the last sentences are for validation."""
        self.config = dense.model.config
        self.encode = jax.jit(functools.partial(encoder.encode, config=self.config))
        text = corpus.sentences("calibration", config.sentences + 128)
        rows = dense.tokenize(text)
        np.random.default_rng(KEY).shuffle(rows)
        tokens = np.zeros((len(rows), config.length), np.int32)
        for line, row in zip(tokens, rows, strict=True):
            line[: len(row)] = row[: config.length]
        mask = np.arange(config.length) < np.array([[len(row)] for row in rows])
        mask = mask.astype(np.int32)

        def batches(first: int, last: int, size: int) -> list[tuple[Any, Any, Any]]:
            cuts = [slice(k, k + size) for k in range(first, last - size + 1, size)]
            pairs = [(jnp.asarray(tokens[cut]), jnp.asarray(mask[cut])) for cut in cuts]
            return [(t, m, self.encode(dense.params, t, m)) for t, m in pairs]

        self.validation = batches(0, 128, 64)
        self.batches = batches(128, len(rows), config.batch)

    def loss(self, params: Any, tokens: Any, mask: Any, target: Any) -> Any:
        """1 - mean cosine of the embeddings to those of the dense model."""
        hidden = encoder.encode(params, tokens, mask, self.config)
        pair = encoder.pool(hidden, mask), encoder.pool(target, mask)
        return 1 - jnp.mean(jnp.sum(pair[0] * pair[1], -1))


def model(flags: argparse.Namespace) -> Iterator[Row]:
    """The rows of MiniLM."""
    names = [field.name for field in dataclasses.fields(Config)]
    config = Config(**{name: getattr(flags, name) for name in names})
    dense = models.load(evaluation=flags.evaluation)
    params, key, text = dense.params, jax.random.key(KEY), Sentences(dense, config)
    sample = [b[:2] for b in text.batches[: max(1, 512 // config.batch)]]
    uses = fh.discover(dense.embed, params, *sample[0])
    real = dense.model.token_mask
    stats = fh.calibrate(dense.embed, params, uses, sample, token_mask=real)

    digest = corpus.digest()

    def row(label: str, method: Any, states: Any, began: float, **data: Any) -> Row:
        plans = fh.decide(method, states, params, uses)
        sparse = jax.block_until_ready(fh.densify(plans, params, uses))
        seconds, scores = time.process_time() - began, dense.scores(sparse)
        more, data = {"5 % quantile": scores["quantile"]}, data | {"digest": digest}
        return Row(MODEL, label, scores["cosine"], None, seconds, more, data)

    for label, method in {
        "Wanda": fh.Wanda(NATURAL),
        "Wanda, searched orders": fh.Wanda(SEARCHED),
    }.items():
        began = time.process_time()
        yield row(label, method, fh.solve(method, key, params, uses, stats), began)
    began = time.process_time()
    method, given = fh.share_orders(fh.Wanda(SEARCHED), key, params, uses, stats)
    states = fh.solve(method, key, params, uses, given)
    yield row("Wanda, searched shared orders", method, states, began)
    options = {k: getattr(config, k) for k in ("block", "mask_temperature", "bias")}
    learner = fh.PermLLM(SEARCHED, steps=0, variant=config.variant, **options)
    if not flags.no_layer_fit:
        began = time.process_time()
        fitted = dataclasses.replace(learner, steps=50)
        states = fh.solve(fitted, key, params, uses, stats)
        yield row("PermLLM, loss of the layer", fitted, states, began)
    began = time.process_time()
    if config.tie:
        _, stats = fh.share_orders(learner, key, params, uses, stats)
    lost = jax.jit(text.loss)
    states, history = fh.fit(
        learner,
        fh.solve(learner, key, params, uses, stats),
        text.loss,
        params,
        uses,
        text.batches,
        key=key,
        tx=optax.adam(
            optax.cosine_decay_schedule(config.learning_rate, config.steps + 1)
        ),
        steps=config.steps,
        every=config.every,
        ties=share_orders.ties(uses) if config.tie else None,
        evaluate=lambda p: np.mean([float(lost(p, *b)) for b in text.validation]),
        progress=lambda entry: print(entry, file=sys.stderr, flush=True),
    )
    data: dict[str, Any] = {"config": dataclasses.asdict(config)}
    data["history"] = [{k: v for k, v in h.items() if v == v} for h in history]
    yield row("PermLLM, loss of the model", learner, states, began, **data)


STUDY = Study(
    "permutation",
    "Input orders",
    {"layers": layers, "model": model},
    {
        LAYERS: "Relative squared output error, weights unmoved, smaller is better. "
        "The anchor is the reference implementation on the same layer "
        "(`bench/anchors.json`).",
        MODEL: "Mean cosine, weights unmoved; CPU seconds with compilation.",
    },
)

if __name__ == "__main__":
    parser = STUDY.parser(__doc__)
    parser.add_argument("--evaluation", type=int, default=512, help="sentences")
    parser.add_argument("--no-layer-fit", action="store_true", help="one row less")
    for field in dataclasses.fields(Config):
        name, default = f"--{field.name.replace('_', '-')}", field.default
        options: Any = {"type": type(default), "default": default}
        if default is False:
            options = {"action": "store_true"}
        parser.add_argument(name, **options)
    STUDY.main(parser)
