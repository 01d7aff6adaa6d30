"""Input orders for 2:4 masks of unmoved weights, beside their anchors.

    make bench-permutation                          # layers, then MiniLM
    make bench-permutation ARGS="--only layer"      # or "--only model --steps 30"

Layers: relative squared output error on the inputs of `bench.inputs.layer`, as in the
anchors. Model: mean cosine of the embeddings of all-MiniLM-L6-v2 with 36 pruned linears
to the dense ones, on evaluation sentences; orders are learned on calibration sentences
and chosen on others of those. CPU seconds are process time; for layers without
compilation, for the model with it.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment

import flexhinm_jax as fh
from bench import inputs
from flexhinm_jax.cli import source
from flexhinm_jax.models import encoder
from flexhinm_jax.patterns import ChannelSearch
from flexhinm_jax.pruning import share_orders
from flexhinm_jax.types import Stats
from train import corpus, minilm

KEY = 0
NATURAL = fh.NM(2, 4)
SEARCHED = fh.NM(2, 4, permute=ChannelSearch())

#: (layer, score, row) -> output error of the reference implementations.
ANCHORS: dict[tuple[str, str], dict[str, float]] = {
    ("synth512", "wanda"): {
        "natural order": 0.08579,
        "deal": 0.07429,
        "assignment, 1 sweep": 0.06523,
        "assignment, 4 sweeps": 0.06398,
        "PermLLM from natural": 0.07911,
    },
    ("synth512", "ria"): {
        "natural order": 0.09385,
        "deal": 0.08085,
        "assignment, 1 sweep": 0.07425,
        "assignment, 4 sweeps": 0.07401,
        "PermLLM from natural": 0.08534,
    },
    ("synth512", "squared"): {
        "natural order": 0.08579,
        "deal": 0.07385,
        "assignment, 1 sweep": 0.06566,
        "assignment, 4 sweeps": 0.06368,
    },
    ("minilm", "wanda"): {
        "natural order": 0.07885,
        "deal": 0.06595,
        "assignment, 1 sweep": 0.06209,
        "assignment, 4 sweeps": 0.06115,
        "PermLLM from natural": 0.07187,
    },
    ("minilm", "ria"): {
        "natural order": 0.08637,
        "deal": 0.07547,
        "assignment, 1 sweep": 0.07145,
        "assignment, 4 sweeps": 0.07133,
        "PermLLM from natural": 0.07768,
    },
    ("minilm", "squared"): {
        "natural order": 0.07885,
        "deal": 0.06624,
        "assignment, 1 sweep": 0.06182,
        "assignment, 4 sweeps": 0.06098,
    },
}


def searched(sweeps: int) -> fh.NM:
    """2:4 with a search of that many sweeps; 0 only deals by strength."""
    return fh.NM(2, 4, permute=ChannelSearch(sweeps=sweeps))


def layer_rows(score: str) -> dict[str, fh.PermLLM]:
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
            _, chosen = linear_sum_assignment(gain, maximize=True)
            groups[:, slot] = groups[chosen, slot]
    return groups.reshape(-1)


def layer_table() -> list[dict[str, Any]]:
    """Every layer x score x row."""
    found = []
    for (name, score), anchors in ANCHORS.items():
        w, x = inputs.layer(name)
        given = statistics(x)
        for label, method in layer_rows(score).items():
            if method.steps and score == "squared":
                continue
            keep, seconds = timed(method, jnp.asarray(w), given)
            found.append(row(name, score, label, w, x, keep, seconds, anchors))
        scores = np.asarray(fh.PermLLM(scores=score).score(jnp.asarray(w), given))
        dealt = fh.NM(2, 4, permute=ChannelSearch(sweeps=0))
        start = dealt.project(jax.random.key(KEY), jnp.asarray(scores)).regions
        for sweeps in (1, 4):
            before = time.process_time()
            order = assignment_sweeps(scores, np.asarray(start.in_order[0]), sweeps)  # type: ignore[union-attr]
            seconds = time.process_time() - before
            groups = np.argsort(np.argsort(-scores[:, order].reshape(len(w), -1, 4)))
            keep = np.zeros(w.shape, bool)
            keep[:, order] = (groups < 2).reshape(w.shape)
            label = f"assignment, {sweeps} sweep{'s' if sweeps > 1 else ''}"
            found.append(row(name, score, label, w, x, keep, seconds, anchors))
    return found


def statistics(x: np.ndarray) -> Stats:
    """Of concrete inputs."""
    gram = jnp.asarray(x.T @ x)
    mean = jnp.asarray(x.mean(0))
    return Stats(jnp.diag(gram), mean, jnp.float32(len(x)), gram)


def timed(method: fh.PermLLM, w: Any, given: Stats) -> tuple[np.ndarray, float]:
    """(the support that a method chooses, CPU seconds without compilation)."""

    def keep(w: Any, given: Stats) -> Any:
        state = method.solve(jax.random.key(KEY), w, given)
        return method.decide(state, w).support.keep

    run = jax.jit(keep).lower(w, given).compile()
    before = time.process_time()
    found = jax.block_until_ready(run(w, given))
    return np.asarray(found), time.process_time() - before


def row(
    name: str,
    score: str,
    label: str,
    w: np.ndarray,
    x: np.ndarray,
    keep: np.ndarray,
    seconds: float,
    anchors: dict[str, float],
) -> dict[str, Any]:
    """One line: errors in float64."""
    wide, data = w.astype(np.float64), x.astype(np.float64)
    gram = data.T @ data
    lost = wide * ~keep
    return {
        "layer": name,
        "score": score,
        "row": label,
        "error": float(np.sum((lost @ gram) * lost) / np.sum((wide @ gram) * wide)),
        "anchor": anchors.get(label),
        "cpu_seconds": seconds,
    }


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


class Setting:
    """MiniLM, its sentences, and the measures of its quality."""

    def __init__(self, config: Config, evaluation: int):
        """Tokenizes and runs the dense model."""
        self.model = source.load(minilm.model_directory())
        self.params = jax.tree.map(jnp.asarray, self.model.params)
        self.encode = jax.jit(
            functools.partial(encoder.encode, config=self.model.config)
        )
        known = self.rows("calibration", config.sentences + 2 * 64, config.length)
        self.batches = self.targets(cut(known[128:], config.batch))
        self.validation = self.targets(cut(known[:128], 64))
        self.evaluation = self.targets(cut(self.rows("evaluation", evaluation, 48), 64))

        def embed(params: Any, tokens: Any, mask: Any) -> Any:
            return encoder.embed(params, tokens, mask, self.model.config)

        sample = self.batches[0][:2]
        self.uses = fh.discover(embed, self.params, *sample)
        self.stats = fh.calibrate(
            embed,
            self.params,
            self.uses,
            [b[:2] for b in self.batches[: max(1, 512 // config.batch)]],
            token_mask=lambda _, mask: mask != 0,
        )

    def rows(self, split: Any, count: int, length: int) -> list[tuple[Any, Any]]:
        """Sentences in a random order, cut or padded to one length."""
        text = corpus.sentences(split, count)
        lists = [
            r[m != 0][:length]
            for b in source.tokenize(self.model, text, 64, None)
            for r, m in zip(b.tokens[: len(b.rows)], b.mask, strict=False)
        ]
        np.random.default_rng(KEY).shuffle(lists)
        pad = lambda r: (0, length - len(r))  # noqa: E731
        return [(np.pad(r, pad(r)), np.pad(np.ones_like(r), pad(r))) for r in lists]

    def targets(self, batches: list[tuple]) -> list[tuple]:
        """The batches with what the dense model gives."""
        return [(t, m, self.encode(self.params, t, m)) for t, m in batches]

    def loss(self, params: Any, tokens: Any, mask: Any, target: Any) -> Any:
        """1 - mean cosine of the embeddings to those of the dense model."""
        hidden = encoder.encode(params, tokens, mask, self.model.config)
        pair = encoder.pool(hidden, mask), encoder.pool(target, mask)
        return 1 - jnp.mean(jnp.sum(pair[0] * pair[1], -1))

    def cosines(self, params: Any, batches: list[tuple]) -> np.ndarray:
        """Cosine of every sentence."""
        found = []
        for tokens, mask, target in batches:
            hidden = self.encode(params, tokens, mask)
            pair = encoder.pool(hidden, mask), encoder.pool(target, mask)
            found.append(np.sum(np.asarray(pair[0]) * np.asarray(pair[1]), -1))
        return np.concatenate(found)


def cut(rows: list[tuple[Any, Any]], batch: int) -> list[tuple[Any, Any]]:
    """Whole batches."""
    return [
        tuple(jnp.asarray(np.stack(x)) for x in zip(*rows[k : k + batch], strict=True))  # type: ignore[misc]
        for k in range(0, len(rows) - batch + 1, batch)
    ]


def model_table(config: Config, evaluation: int, layer_fit: bool) -> list[dict]:
    """The rows of MiniLM."""
    setting = Setting(config, evaluation)
    uses, params, stats = setting.uses, setting.params, setting.stats
    key = jax.random.key(KEY)
    found = []

    def add(label: str, method: Any, states: Any, began: float, **more: Any) -> None:
        plans = fh.decide(method, states, params, uses)
        sparse = fh.densify(plans, params, uses)
        seconds = time.process_time() - began
        cosine = setting.cosines(sparse, setting.evaluation)
        entry = {
            "row": label,
            "cosine": float(cosine.mean()),
            "quantile": float(np.quantile(cosine, 0.05)),
            "cpu_seconds": seconds,
            "digest": corpus.digest(),
            **more,
        }
        found.append(entry)
        print(json.dumps({k: v for k, v in entry.items() if k != "history"}))

    for label, method in {
        "Wanda": fh.Wanda(NATURAL),
        "Wanda, searched orders": fh.Wanda(SEARCHED),
    }.items():
        began = time.process_time()
        add(label, method, fh.solve(method, key, params, uses, stats), began)
    began = time.process_time()
    method, given = fh.share_orders(fh.Wanda(SEARCHED), key, params, uses, stats)
    states = fh.solve(method, key, params, uses, given)
    add("Wanda, searched shared orders", method, states, began)
    learner = fh.PermLLM(
        SEARCHED,
        block=config.block,
        steps=0,
        mask_temperature=config.mask_temperature,
        bias=config.bias,
        variant=config.variant,
    )
    if layer_fit:
        began = time.process_time()
        fitted = dataclasses.replace(learner, steps=50)
        states = fh.solve(fitted, key, params, uses, stats)
        add("PermLLM, loss of the layer", fitted, states, began)
    began = time.process_time()
    if config.tie:
        _, stats = fh.share_orders(learner, key, params, uses, stats)
    states = fh.solve(learner, key, params, uses, stats)
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps + 1)
    states, history = fh.fit(
        learner,
        states,
        setting.loss,
        params,
        uses,
        setting.batches,
        key=key,
        tx=optax.adam(rate),
        steps=config.steps,
        every=config.every,
        ties=share_orders.ties(uses) if config.tie else None,
        evaluate=lambda p: 1 - setting.cosines(p, setting.validation).mean(),
        progress=lambda entry: print(
            json.dumps(entry), f"{time.process_time() - began:.0f} CPU s", flush=True
        ),
    )
    add(
        "PermLLM, loss of the model",
        learner,
        states,
        began,
        config=dataclasses.asdict(config),
        history=[{k: v for k, v in h.items() if v == v} for h in history],
    )
    return found


def show(rows: list[dict[str, Any]], columns: list[str], title: str) -> Table:
    """A table of some columns."""
    made = Table(title=title)
    for name in columns:
        made.add_column(name)
    for r in rows:
        cells = (r.get(c) for c in columns)
        made.add_row(
            *(
                "" if c is None else f"{c:.5f}" if isinstance(c, float) else str(c)
                for c in cells
            )
        )
    return made


def main() -> None:
    """Runs the benchmark; a part that is not run keeps its last result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", choices=("", "layer", "model"))
    parser.add_argument("--evaluation", type=int, default=512, help="sentences")
    parser.add_argument("--no-layer-fit", action="store_true", help="one row less")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/permutation.json")
    )
    for field in dataclasses.fields(Config):
        name = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(name, type=type(field.default), default=field.default)
    args = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Config)]
    config = Config(**{name: getattr(args, name) for name in names})
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.only != "model":
        result["layers"] = layer_table()
    if args.only != "layer":
        result["model"] = model_table(config, args.evaluation, not args.no_layer_fit)
    result["jax"] = jax.__version__
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    console = Console(width=120)
    layer_columns = ["layer", "score", "row", "error", "anchor", "cpu_seconds"]
    console.print(show(result.get("layers", []), layer_columns, "one layer, 2:4"))
    model_columns = ["row", "cosine", "quantile", "cpu_seconds"]
    console.print(show(result.get("model", []), model_columns, "all-MiniLM-L6-v2, 2:4"))


if __name__ == "__main__":
    main()
