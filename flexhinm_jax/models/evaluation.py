"""How good a model is on data: perplexity of decoders, outputs of encoders.

Perplexity is over windows of `length` tokens that begin every `stride` tokens. Every
token of the text but the first is scored once, in the first window that holds it: with
`stride` = `length` windows do not overlap, which is what papers on pruning report; a
smaller stride gives every token behind the first window at least length - stride + 1
tokens to look back at. The mean is over tokens, not over windows.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax.models import decoder, encoder
from flexhinm_jax.models.load import Model
from flexhinm_jax.models.pooling import Pooling
from flexhinm_jax.tracing.sparsify import sparsify

__all__ = [
    "LENGTH",
    "Divergence",
    "Perplexity",
    "divergence",
    "embeddings",
    "logits",
    "perplexity",
    "windows",
]

LENGTH = 2048
"""Tokens of a window where the model reads so many."""

Track = Callable[[range], Iterable[int]]


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a decoder foresees a text.

    Attributes:
      nats: of all scored tokens together.
      tokens: scored, all but the first.
      bytes: of UTF-8 that the scored tokens stand for.
      length: tokens of a window.
      stride: tokens from one window to the next.
      seconds: wall time of the passes, without compiling; None where it was not asked.
      computed: tokens that went through the model in that time.
    """

    nats: float
    tokens: int
    bytes: int
    length: int
    stride: int
    seconds: float | None = None
    computed: int = 0

    @property
    def perplexity(self) -> float:
        """The exponential of the mean over tokens; infinity where that is too large."""
        with contextlib.suppress(OverflowError):
            return math.exp(self.nats / self.tokens)
        return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the text takes, coded by the model, over its bytes."""
        return self.nats / math.log(2) / max(self.bytes, 1)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far a decoder is from another one, on a text.

    Attributes:
      first: perplexity of the first, often dense, model.
      second: that of the other one.
      kl: mean over the scored tokens of KL(first || second), nats.
      same_top: share of them for which both hold the same token most likely.
    """

    first: Perplexity
    second: Perplexity
    kl: float
    same_top: float


def perplexity(
    model: Model,
    text: str,
    *,
    length: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch: int = 1,
    timed: bool = False,
    track: Track = iter,
) -> Perplexity:
    """Perplexity of a text.

    Args:
      model: a decoder with its tokenizer, dense or packed.
      text: at least two tokens.
      length: tokens of a window; None for 2048 or what the model reads.
      stride: tokens from one window to the next, at most `length`; None for `length`.
      limit: first tokens of the text to use; None for all.
      batch: windows in one step.
      timed: measures the time of the passes, behind a first one that compiles.
      track: passes the numbers of the steps on, to show how far it has come.

    Returns:
      The figures.

    Raises:
      ValueError: too short a text, a window longer than the model reads, a stride that
        would leave tokens out, or logits that are not finite.
    """
    cut = _cut(model, text, length, stride, limit)
    score = _scorer(model.config, model.packed)

    def nats_of(start: int) -> float:
        return float(score(model.params, *cut.part(start, batch)))

    steps = cut.steps(batch)
    if timed:
        nats_of(0)
    began = time.perf_counter()
    nats = sum(nats_of(start) for start in track(steps))
    seconds = time.perf_counter() - began if timed else None
    check_nats(model, nats)
    computed = len(steps) * batch * cut.length
    return cut.perplexity(nats, seconds=seconds, computed=computed)


def divergence(
    first: Model,
    second: Model,
    text: str,
    *,
    length: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch: int = 1,
    timed: bool = False,
    track: Track = iter,
) -> Divergence:
    """How far a decoder is from another one: both perplexities, KL and top tokens.

    Both models are in memory at once, and the logits of both for a batch.

    Args:
      first: a decoder with its tokenizer, dense or packed; windows follow its limits.
      second: another one with the same tokenizer.
      text: see `perplexity`, as the arguments behind it.
      length: tokens of a window.
      stride: tokens from one window to the next.
      limit: first tokens of the text to use.
      batch: windows in one step.
      timed: measures the time of the passes of each, behind first ones that compile.
      track: passes the numbers of the steps on.

    Returns:
      The figures.

    Raises:
      ValueError: as `perplexity`, and tokenizers that give different tokens.
    """
    cut = _cut(first, text, length, stride, limit)
    other, _ = second.encode(text, limit)
    if not np.array_equal(cut.tokens, other):
        raise ValueError(
            f"{first.directory} and {second.directory} cut the text into different"
            " tokens, so their predictions cannot be compared token by token; give two"
            " directories of one model"
        )
    both = [(m.params, _log_likelihoods(m.config, m.packed)) for m in (first, second)]
    if timed:
        for params, logs_of in both:
            jax.block_until_ready(logs_of(params, cut.part(0, batch)[0]))
    steps, sums, seconds = cut.steps(batch), np.zeros(4), [0.0, 0.0]
    for start in track(steps):
        inputs, targets, scored = cut.part(start, batch)
        logs = []
        for k, (params, logs_of) in enumerate(both):
            began = time.perf_counter()
            logs.append(jax.block_until_ready(logs_of(params, inputs)))
            seconds[k] += time.perf_counter() - began
        sums += np.asarray(_compared(*logs, targets, scored), np.float64)
    for model, nats in zip((first, second), sums[:2], strict=True):
        check_nats(model, nats)
    computed = len(steps) * batch * cut.length
    scores = [
        cut.perplexity(float(nats), seconds=taken if timed else None, computed=computed)
        for nats, taken in zip(sums[:2], seconds, strict=True)
    ]
    return Divergence(
        *scores, kl=float(sums[2]) / cut.scored, same_top=float(sums[3]) / cut.scored
    )


def check_nats(model: Model, nats: float) -> None:
    """Raises ValueError if a model's logits were not finite."""
    if not math.isfinite(nats):
        model.check_finite()
        raise ValueError(f"{model.directory} gives logits that are not finite")


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A text as tokens in windows, see `perplexity`.

    Attributes:
      tokens: i32[count].
      size: bytes of all of them but the first.
      length: tokens of a window.
      stride: from one window to the next.
    """

    tokens: np.ndarray
    size: int
    length: int
    stride: int

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return len(self.tokens) - 1

    def perplexity(self, nats: float, **timing: Any) -> Perplexity:
        """The figures of a model that lost so many nats."""
        return Perplexity(
            nats, self.scored, self.size, self.length, self.stride, **timing
        )

    @functools.cached_property
    def windows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `windows`."""
        return windows(self.tokens, self.length, self.stride)

    def steps(self, batch: int) -> range:
        """The first window of every batch."""
        return range(0, len(self.windows[0]), batch)

    def part(self, start: int, batch: int) -> list[np.ndarray]:
        """Inputs, targets and scored of the batch that begins at a window.

        The last batch is filled up with windows that score nothing.
        """
        rows = [array[start : start + batch] for array in self.windows]
        missing = ((0, batch - len(rows[0])), (0, 0))
        return [np.pad(row, missing) for row in rows]


def _cut(
    model: Model, text: str, length: int | None, stride: int | None, limit: int | None
) -> _Cut:
    """A text as `perplexity` reads it."""
    tokens, offsets = model.encode(text, limit)
    if len(tokens) < 2:
        raise ValueError(
            f"the text has {len(tokens)} tokens; at least 2 are needed, the first of"
            " which is only read"
        )
    longest = model.config.max_position_embeddings or LENGTH
    length = length or min(LENGTH, longest)
    if length > longest:
        raise ValueError(
            f"windows of {length} tokens are more than {model.directory} reads:"
            f" max_position_embeddings={longest}"
        )
    if stride and stride > length:
        raise ValueError(
            f"a stride of {stride} is more than windows of {length} tokens: those"
            " between two windows would not be scored"
        )
    length = min(length, len(tokens) - 1)
    # An end token that the tokenizer adds stands at (0, 0), as the first one does.
    end = max(last for _, last in offsets)
    size = len(text[offsets[1][0] : end].encode())
    return _Cut(tokens, size, length, min(stride or length, length))


def windows(
    tokens: np.ndarray, length: int, stride: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts a text so that every token but the first is scored once.

    Args:
      tokens: i32[count], count >= 2.
      length: inputs of a window.
      stride: tokens from one window to the next, at most `length`.

    Returns:
      Inputs i32[windows, length], targets i32[windows, length] (the next tokens), and
      bool[windows, length], True where a target is scored.

    Example:
      >>> inputs, targets, scored = windows(np.arange(7, dtype=np.int32), 4, 2)
      >>> [targets[k][scored[k]].tolist() for k in range(2)]
      [[1, 2, 3, 4], [5, 6]]
      >>> inputs.tolist()
      [[0, 1, 2, 3], [2, 3, 4, 5]]
    """
    count = len(tokens) - 1
    starts = np.arange(0, max(count - length, 0) + stride, stride)
    at = starts[:, None] + np.arange(length)
    before = np.where(starts > 0, starts - stride + length, 0)
    scored = (at >= before[:, None]) & (at < count)
    at = np.minimum(at, count - 1)
    return tokens[at], tokens[at + 1], scored


def embeddings(
    model: Model,
    text: Sequence[str],
    batch: int = 32,
    max_length: int | None = None,
    track: Track = iter,
) -> np.ndarray:
    """Sentence embeddings of an encoder.

    Args:
      model: an encoder with its tokenizer, dense or packed.
      text: sentences, none of them without tokens.
      batch: sentences in one step.
      max_length: see `Model.tokenize`.
      track: goes through the steps, to show how many there were.

    Returns:
      f64[sentences, width], pooled as the directory says; of unit length unless it says
      otherwise.
    """
    embed = _embedder(model.config, model.packed, model.pooling)
    rows: dict[int, np.ndarray] = {}
    parts = [*model.tokenize(text, batch, max_length)]
    for step in track(range(len(parts))):
        part = parts[step]
        values = np.asarray(embed(model.params, part.tokens, part.mask), np.float64)
        rows |= dict(zip(part.rows.tolist(), values, strict=False))
    stacked = np.stack([rows[row] for row in sorted(rows)])
    if not model.pooling.unit:
        return stacked
    return stacked / np.linalg.norm(stacked, axis=-1, keepdims=True)


def logits(
    model: Model, pixels: np.ndarray, batch: int = 32, track: Track = iter
) -> np.ndarray:
    """Logits of images by a classifier.

    Args:
      model: a classifier, dense or packed.
      pixels: f32[images, channels, height, width].
      batch: images in one step.
      track: goes through the steps, to show how many there were.

    Returns:
      f64[images, classes].
    """
    classify, steps = jax.jit(model.apply), [*model.steps(pixels, batch)]
    rows = [
        np.asarray(classify(model.params, *steps[k]), np.float64)
        for k in track(range(len(steps)))
    ]
    return np.concatenate(rows)


def _logits(config: Any, packed: bool) -> Callable[..., Array]:
    """Logits f32[batch, length, vocabulary] of parameters and inputs."""

    def logits(params: Any, inputs: Array) -> Array:
        return decoder.apply(params, inputs, config).astype(jnp.float32)

    return sparsify(logits) if packed else logits


@functools.cache
def _scorer(config: Any, packed: bool) -> Callable[..., Array]:
    """Nats of all scored targets together; compiled once for models of equal sizes."""
    logits_of = _logits(config, packed)

    @jax.jit
    def nats(params: Any, inputs: Array, targets: Array, scored: Array) -> Array:
        logits = logits_of(params, inputs)
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        lost = jax.nn.logsumexp(logits, axis=-1) - chosen
        return jnp.sum(jnp.where(scored, lost, jnp.float32(0)))

    return nats


@functools.cache
def _log_likelihoods(config: Any, packed: bool) -> Callable[..., Array]:
    """f32[batch, length, vocabulary]; compiled once for models of equal sizes."""
    logits_of = _logits(config, packed)
    return jax.jit(lambda params, inputs: jax.nn.log_softmax(logits_of(params, inputs)))


@jax.jit
def _compared(one: Array, two: Array, targets: Array, scored: Array) -> Array:
    """f32[4] of a batch: nats of both, KL(first || second), equal top tokens; sums."""
    at = targets[..., None]
    figures = (
        -jnp.take_along_axis(one, at, -1)[..., 0],
        -jnp.take_along_axis(two, at, -1)[..., 0],
        jnp.sum(jnp.exp(one) * (one - two), -1),
        (jnp.argmax(one, -1) == jnp.argmax(two, -1)).astype(jnp.float32),
    )
    parts = [jnp.sum(jnp.where(scored, x, jnp.float32(0))) for x in figures]
    return jnp.stack(parts)


@functools.cache
def _embedder(config: Any, packed: bool, pooling: Pooling) -> Callable[..., Array]:
    """The embeddings of a batch; compiled once for models of equal sizes."""
    embed = functools.partial(encoder.embed, config=config, pooling=pooling)
    return jax.jit(sparsify(embed) if packed else embed)
