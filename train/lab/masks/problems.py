"""The models on which masks of frozen weights are learned and compared.

MiniLM distils its own embeddings and hidden states on packed sentences (`teacher`); the
byte decoder of `language` predicts the next byte. A part of the calibration data is
held back to choose among the masks that a run visits; the evaluation data is other
documents, and nothing is chosen by it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flexhinm_jax as fh
from flexhinm_jax.models import batches as batching
from flexhinm_jax.models import decoder
from flexhinm_jax.types import Stats, Uses
from train import corpus, data, language, loop, packing, programs, prose, pruned
from train.teacher import Recipe, Sentences, Teacher, loss_of

#: Sentences that choose among masks instead of teaching them, at most a quarter.
HELD_BACK = 256

#: Sentences of a step, and the loss.
RECIPE = Recipe(rows=8)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model with frozen weights, and what its masks are learned and judged on.

    Attributes:
      name: of the model.
      params: the dense parameters.
      uses: what is pruned.
      discover: the same with rules, as in `fh.discover`.
      stats: statistics of the inputs on the calibration data.
      loss_fn: (params, *batch) -> (f32[], metrics), lower is better.
      batch_at: step -> batch, all of one shape.
      validate: params -> loss on the held-back data, lower is better.
      evaluate: params -> figures on the evaluation data.
      score: the figure of `evaluate` that the table is about.
      tile: side of the tiles of PATCH.
      facts: what a result depends on, for the results.
      sequential: (method) -> parameters, pruned in order of execution with weights
        that move.
    """

    name: str
    params: Any
    uses: Uses
    discover: Callable[[dict[str, Any]], Uses]
    stats: dict[str, Stats]
    loss_fn: Callable[..., Any]
    batch_at: Callable[[int], tuple]
    validate: Callable[[Any], float]
    evaluate: Callable[[Any], dict[str, float]]
    score: str
    tile: int
    facts: dict[str, Any]
    sequential: Callable[[fh.Method], Any]


def minilm(
    directory: Path,
    *,
    sentences: int = 4096,
    calibration: int = 1024,
    evaluation: int = 512,
    text: Sequence[str] | None = None,
    recipe: Recipe = RECIPE,
) -> Problem:
    """An encoder directory that distils its own embeddings.

    Args:
      directory: of all-MiniLM-L6-v2, or another encoder of the family.
      sentences: calibration sentences that every method may use.
      calibration: the first of them, which the statistics are taken on.
      evaluation: sentences of the evaluation split.
      text: calibration sentences in place of those of `corpus` and, behind them,
        of `prose`.
      recipe: the loss, and how sentences are packed.

    Raises:
      ValueError: too few sentences.
    """
    made = pruned.load(directory, evaluation)
    given = list(text or corpus.sentences("calibration", sentences))[:sentences]
    if text is None and len(given) < sentences:
        given = prose.sentences(sentences)
    lists = pruned.tokenize(made.model, given)
    back = min(HELD_BACK, len(lists) // 4)
    config = made.model.config
    rows = Sentences(lists[back:], recipe)
    teacher = Teacher(made.params, config, recipe)
    judge = dataclasses.replace(recipe, rows=min(8, recipe.rows), cosine=1.0)
    held = Sentences(lists[:back], judge)
    asked = Teacher(made.params, config, judge)

    def loss_fn(params: Any, rows: packing.Rows, targets: Any) -> Any:
        return loss_of(params, rows, targets, config, recipe)

    def batch_at(step: int) -> tuple:
        number = rows.number(step)
        batch = rows.batch(number)
        return batch, teacher(number, batch)

    @jax.jit
    def cosine(params: Any, batch: packing.Rows, targets: Any) -> Any:
        return loss_of(params, batch, targets, config, judge)[1]["cosine"]

    def validate(params: Any) -> float:
        parts = [(held.batch(k), k) for k in range(held.count)]
        return 1 - float(np.mean([cosine(params, b, asked(k, b)) for b, k in parts]))

    few = batching.batches(
        lists[:calibration],
        pruned.CALIBRATION_ROWS,
        pruned.LONGEST,
        buckets=pruned.BUCKETS,
    )
    known = [(b.tokens, b.mask) for b in few]
    discover = functools.partial(_discover, made.embed, made.params, known[0], {})
    uses = discover({})
    real = lambda _, mask: mask != 0  # noqa: E731

    def sequential(method: fh.Method) -> Any:
        return fh.prune_sequential(
            made.embed,
            made.params,
            known,
            method,
            key=jax.random.key(recipe.seed),
            target="resid",
            token_mask=real,
        ).params

    return Problem(
        name="minilm",
        params=made.params,
        uses=uses,
        discover=discover,
        stats=fh.calibrate(made.embed, made.params, uses, known, token_mask=real),
        loss_fn=loss_fn,
        batch_at=batch_at,
        validate=validate,
        evaluate=made.scores,
        score="cosine",
        tile=_tile(uses, 128),
        facts={
            "sentences": len(lists),
            "statistics": min(calibration, len(lists)),
            "held_back": back,
            "evaluation": len(made.dense),
            "digest": corpus.digest(),
        },
        sequential=sequential,
    )


def bytes_decoder(
    folder: Path | None,
    *,
    path: Path | None = None,
    dense_steps: int | None = None,
    seed: int = 0,
    loss: Literal["cross_entropy", "kl"] = "cross_entropy",
    config: language.Config | None = None,
    calibration: int = 32,
) -> Problem:
    """The byte decoder of `train.language`, trained dense first.

    Args:
      folder: keeps the dense model; None trains it anew.
      path: text, see `data.text`.
      dense_steps: of the dense model; None for the configured ones.
      seed: of initialisation and batches.
      loss: next-byte cross entropy, or divergence from the dense model.
      config: sizes; None for the configuration "bytes".
      calibration: batches of training text that the statistics are taken on.

    Raises:
      ValueError: a missing, empty or too short file.
    """
    if config is None:
        found = programs.config("bytes", language.Config, dense_steps=dense_steps)
    else:
        found = config
    return _bytes(found, folder, path, seed, loss, calibration)


def _bytes(
    config: language.Config,
    folder: Path | None,
    path: Path | None,
    seed: int,
    loss: str,
    calibration: int,
) -> Problem:
    task = language.task(config, path, (seed,))
    lanes = loop.Trainer(task, config).dense(folder)
    params = jax.tree.map(lambda x: x[0], lanes)
    apply_fn = functools.partial(decoder.apply, config=config.model)
    example = jax.ShapeDtypeStruct((1, config.length), jnp.int32)
    always = dict(config.rules)
    discover = functools.partial(_discover, apply_fn, params, (example,), always)
    uses = discover({})
    source = data.text(path, config.length)

    def part(step: int) -> Any:
        size, length = config.batch_size, config.length
        return data.windows(source.train, size, length, seed + 1, step)

    def loss_fn(params: Any, tokens: Any, dense: Any) -> Any:
        logits = apply_fn(params, tokens[:, :-1])
        score = optax.softmax_cross_entropy_with_integer_labels
        bits = jnp.mean(score(logits, tokens[:, 1:])) / jnp.float32(math.log(2))
        if dense is None:
            return bits, {}
        given = jax.nn.log_softmax(logits)
        apart = jnp.sum(jnp.exp(dense) * (dense - given), axis=-1)
        return jnp.mean(apart) / jnp.float32(math.log(2)), {"bits_per_byte": bits}

    @jax.jit
    def ask(tokens: Any) -> Any:
        return jax.nn.log_softmax(apply_fn(params, tokens[:, :-1]))

    def batch_at(step: int) -> tuple:
        tokens = part(step)
        return tokens, ask(tokens) if loss == "kl" else None

    value = jax.jit(lambda params, batch: loss_fn(params, *batch)[0])
    held = [part((1 << 30) + step) for step in range(16)]

    def validate(params: Any) -> float:
        return float(np.mean([value(params, (b, None)) for b in held]))

    def evaluate(params: Any) -> dict[str, float]:
        found = task.evaluate(jax.tree.map(lambda x: x[None], params))
        return {name: float(x[0]) for name, x in found.items()}

    known = [(part(step)[:, :-1],) for step in range(calibration)]

    def sequential(method: fh.Method) -> Any:
        return fh.prune_sequential(
            apply_fn,
            params,
            known,
            method,
            key=jax.random.key(seed),
            target="resid",
            rules=always,
        ).params

    return Problem(
        name="bytes",
        params=params,
        uses=uses,
        discover=discover,
        stats=fh.calibrate(apply_fn, params, uses, known),
        loss_fn=loss_fn,
        batch_at=batch_at,
        validate=validate,
        evaluate=evaluate,
        score="bits_per_byte",
        tile=_tile(uses, 32),
        facts={
            "loss": loss,
            "statistics_bytes": calibration * config.batch_size * config.length,
            "digest": task.digest,
        },
        sequential=sequential,
    )


def _discover(
    apply_fn: Any, params: Any, batch: tuple, always: dict[str, Any], rules: Any
) -> Uses:
    return fh.discover(apply_fn, params, *batch, rules={**rules, **always})


def _tile(uses: Uses, most: int) -> int:
    """The side of the largest square tile, a multiple of 4, that divides all."""
    sides = [s for use in uses.prunable for s in use.layout.matrix_shape]
    return math.gcd(most, *sides)
