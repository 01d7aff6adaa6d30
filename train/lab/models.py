"""MiniLM before training: read, judged, pruned one-shot, and packed after training."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from flexhinm_jax.models import batches, encoder
from flexhinm_jax.models.load import Model
from flexhinm_jax.models.load import load as load_model
from flexhinm_jax.pruning.prune import Pruned, applied
from train import corpus, minilm

LONGEST = 128
CALIBRATION_ROWS = 128
BUCKETS = (16, 24, 32, 48, 64, LONGEST)


@dataclasses.dataclass
class Encoder:
    """The dense model and how it is judged.

    Attributes:
      model: its directory, read.
      params: its parameters.
      evaluation: batches of evaluation sentences.
      dense: their embeddings by the dense model.
    """

    model: Model
    params: dict[str, Any]
    evaluation: list[batches.Batch]
    dense: np.ndarray

    def __post_init__(self):
        """Compiles nothing yet."""
        self._embed = jax.jit(self.embed)

    def embed(self, params: Any, tokens: Any, mask: Any) -> Any:
        """Sentence embeddings."""
        return encoder.embed(params, tokens, mask, self.model.config)

    def scores(self, params: Any) -> dict[str, float]:
        """Mean cosine to the dense model, its 5 % quantile, and Spearman's rank."""
        count = len(self.dense)
        found = minilm.embeddings(self._embed, params, self.evaluation, count)
        names = ("cosine", "quantile", "spearman")
        return dict(zip(names, minilm.compare(self.dense, found), strict=True))


def method(pattern: str) -> fh.Method:
    """The method that a pattern is solved with; N:M gets its inputs permuted.

    Raises:
      ValueError: the pattern is unknown.
    """
    parsed = fh.patterns.parse(pattern)
    if isinstance(parsed, fh.NM) and parsed.permute is None:
        parsed = dataclasses.replace(parsed, permute=fh.ChannelSearch())
    return fh.StagedALPS(parsed)


def load(folder: Path, evaluation: int) -> Encoder:
    """Reads a model directory and embeds the evaluation sentences."""
    model = load_model(folder)
    params = jax.tree.map(jnp.asarray, dict(model.params))
    text = corpus.sentences("evaluation", evaluation)
    held_out = model.tokenize(text, 32, None)
    made = Encoder(model, params, held_out, np.zeros((len(text), 0), np.float32))
    embed = jax.jit(made.embed)
    made.dense = minilm.embeddings(embed, params, held_out, len(text))
    return made


def tokenize(model: Model, text: Sequence[str]) -> list[list[int]]:
    """Token ids of sentences, cut at `LONGEST` tokens."""
    longest = min(LONGEST, model.config.max_position_embeddings)
    return [
        row[mask != 0].tolist()
        for batch in model.tokenize(list(text), 128, longest)
        for row, mask in zip(batch.tokens[: len(batch.rows)], batch.mask, strict=False)
    ]


def prune(
    made: Encoder,
    pattern: str,
    sparsity: float | None,
    calibration: int,
    *,
    seed: int = 0,
    folder: Path | None = None,
) -> Pruned:
    """Prunes one-shot, every weight on the inputs that those before it give.

    Args:
      made: the dense model.
      pattern: text form of the pattern.
      sparsity: fraction of weights removed; None for a pattern that has only one.
      calibration: number of sentences.
      seed: of the method.
      folder: keeps finished matrices; those that it already holds are taken from there.
    """
    text = corpus.sentences("calibration", calibration)
    rows = batches.batches(
        tokenize(made.model, text), CALIBRATION_ROWS, LONGEST, buckets=BUCKETS
    )
    return fh.prune_sequential(
        made.embed,
        made.params,
        [(b.tokens, b.mask) for b in rows],
        method(pattern),
        sparsity=sparsity,
        key=jax.random.key(seed),
        target="resid",
        token_mask=lambda _, mask: mask != 0,
        resume=folder,
    )


def packed_again(
    plans: Mapping[str, Any], params: Mapping[str, Any], uses: fh.Uses
) -> Pruned:
    """Plans with trained weights, verified, packed and reported.

    Raises:
      ValueError: a pruned weight is not zero, or a plan breaks its pattern.
    """
    for path, plan in plans.items():
        fh.verify(plan, path=path)
    return applied(dict(plans), dict(params), uses)
