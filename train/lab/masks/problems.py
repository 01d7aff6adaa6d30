"""The models on which masks of frozen weights are learned and compared.

MiniLM distils its own embeddings and hidden states on packed sentences (`teacher`); the
byte decoder of `language` predicts the next byte. A part of the calibration data is
held back to choose among the masks that a run visits; the evaluation data is other
documents, and nothing is chosen by it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from flexhinm_jax.models import decoder
from flexhinm_jax.types import Stats, Uses
from train import language
from train.lab import data, models, packing, programs, text
from train.lab.teacher import Recipe, Sentences, Teacher, loss_of
from train.lab.trainer import Trainer

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
      apply_fn: the model, for its uses and statistics.
      calibration: batches of `apply_fn` that the statistics are taken on.
      loss_fn: (params, *batch) -> (f32[], metrics), lower is better.
      batch_at: step -> batch, all of one shape.
      validate: params -> loss on the held-back data, lower is better.
      evaluate: params -> figures on the evaluation data.
      score: the figure of `evaluate` that the table is about.
      side: of the tiles of PATCH, at most.
      facts: what a result depends on, for the results.
      rules: of `fh.discover`, for what is never pruned.
      token_mask: as `fh.calibrate` asks.
      seed: of what prunes in order.
    """

    name: str
    params: Any
    apply_fn: Callable[..., Any]
    calibration: Sequence[tuple]
    loss_fn: Callable[..., Any]
    batch_at: Callable[[int], tuple]
    validate: Callable[[Any], float]
    evaluate: Callable[[Any], dict[str, float]]
    score: str
    side: int
    facts: dict[str, Any]
    rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    token_mask: Callable[..., Any] | None = None
    seed: int = 0

    def discover(self, rules: Mapping[str, Any]) -> Uses:
        """What is pruned under further rules."""
        rules, batch = {**rules, **self.rules}, self.calibration[0]
        return fh.discover(self.apply_fn, self.params, *batch, rules=rules)

    @functools.cached_property
    def uses(self) -> Uses:
        """What is pruned."""
        return self.discover({})

    @functools.cached_property
    def stats(self) -> Mapping[str, Stats]:
        """Statistics of the inputs on the calibration data."""
        given = self.params, self.uses, self.calibration
        return fh.calibrate(self.apply_fn, *given, token_mask=self.token_mask)

    @functools.cached_property
    def tile(self) -> int:
        """The side of the largest square tile, a multiple of 4, that divides all."""
        sides = [s for use in self.uses.prunable for s in use.layout.matrix_shape]
        return math.gcd(self.side, *sides)

    def sequential(self, method: fh.Method) -> Any:
        """Parameters pruned in order of execution, with weights that move."""
        return fh.prune_sequential(
            self.apply_fn,
            self.params,
            self.calibration,
            method,
            key=jax.random.key(self.seed),
            target="resid",
            rules=self.rules,
            token_mask=self.token_mask,
        ).params


def minilm(
    folder: Path | None,
    *,
    sentences: int = 4096,
    calibration: int = 1024,
    evaluation: int = 512,
    given: Sequence[str] | None = None,
    recipe: Recipe = RECIPE,
) -> Problem:
    """An encoder that distils its own embeddings.

    Args:
      folder: model directory; None for all-MiniLM-L6-v2.
      sentences: calibration sentences that every method may use.
      calibration: the first of them, which the statistics are taken on.
      evaluation: sentences of the evaluation split.
      given: calibration sentences in place of those of `text`.
      recipe: the loss, and how sentences are packed.

    Raises:
      ValueError: too few sentences.
    """
    dense = models.load(folder, evaluation)
    some = list(given or text.sentences("calibration", sentences))[:sentences]
    if given is None and len(some) < sentences:
        some = text.training(sentences)
    lists = dense.tokenize(some)
    back = min(HELD_BACK, len(lists) // 4)
    config = dense.model.config
    rows = Sentences(lists[back:], recipe)
    teacher = Teacher(dense.params, config, recipe)
    judge = dataclasses.replace(recipe, rows=min(8, recipe.rows), cosine=1.0)
    held = Sentences(lists[:back], judge)
    asked = Teacher(dense.params, config, judge)

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

    return Problem(
        name="minilm",
        params=dense.params,
        apply_fn=dense.embed,
        calibration=dense.calibration(lists[:calibration]),
        loss_fn=loss_fn,
        batch_at=batch_at,
        validate=validate,
        evaluate=dense.scores,
        score="cosine",
        side=128,
        facts={
            "sentences": len(lists),
            "statistics": min(calibration, len(lists)),
            "held_back": back,
            "evaluation": dense.count,
            "digest": text.digest(),
        },
        token_mask=dense.model.token_mask,
        seed=recipe.seed,
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
        config = programs.config("bytes", language.Config, dense_steps=dense_steps)
    assert config is not None
    size, length, sizes = config.batch_size, config.length, config.model
    task = language.task(config, path, (seed,))
    lanes = Trainer(task, config).dense(folder)
    params = jax.tree.map(lambda x: x[0], lanes)
    apply_fn = functools.partial(decoder.apply, config=sizes)
    source = data.text(path, length)

    def part(step: int) -> Any:
        return data.windows(source.train, size, length, seed + 1, step)

    def loss_fn(params: Any, tokens: Any, dense: Any) -> Any:
        logits = apply_fn(params, tokens[:, :-1])
        bits = language.nats(logits, tokens) / jnp.float32(math.log(2))
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

    return Problem(
        name="bytes",
        params=params,
        apply_fn=apply_fn,
        calibration=[(part(step)[:, :-1],) for step in range(calibration)],
        loss_fn=loss_fn,
        batch_at=batch_at,
        validate=validate,
        evaluate=evaluate,
        score="bits_per_byte",
        side=32,
        facts={
            "loss": loss,
            "statistics_bytes": calibration * size * length,
            "digest": task.digest,
        },
        rules=dict(config.rules),
        seed=seed,
    )
