"""all-MiniLM-L6-v2 for benchmarks: read, judged, its sentences and its goals.

Quality is the mean cosine between the embeddings of the pruned and of the dense model
over evaluation sentences of `train.corpus`; numbers compare only where its digest is
the same.
"""

from typing import Any, NamedTuple

from flexhinm_jax.models import batches
from train import corpus, minilm, pruned


class Goal(NamedTuple):
    """Three levels of the same figure.

    Attributes:
      good: what a sound implementation reaches.
      excellent: what `bench/RESULTS.md` holds rows against.
      reach: further than any run had come when the goals were set.
    """

    good: float
    excellent: float
    reach: float


#: (how, sparsity) -> mean cosine of the embeddings of all-MiniLM-L6-v2, all 36 linear
#: layers pruned, to those of the dense model. Distilled: eight minutes on two idle
#: cores, teacher included. One-shot at 75 % in HiNM tiles of 32 rows.
GOALS = {
    ("one-shot", 0.5): Goal(0.90, 0.95, 0.97),
    ("one-shot", 0.75): Goal(0.74, 0.83, 0.87),
    ("distilled", 0.5): Goal(0.955, 0.97, 0.98),
    ("distilled", 0.75): Goal(0.865, 0.89, 0.92),
}


def goal(how: str, zeros: float) -> float | None:
    """The excellent level at a sparsity, or None where no goal was set."""
    known = GOALS.get((how, round(zeros, 3)))
    return known.excellent if known else None


def load(evaluation: int = 512) -> pruned.Encoder:
    """The dense model and its evaluation sentences."""
    return pruned.load(minilm.model_directory(), evaluation)


def calibration(dense: pruned.Encoder, count: int) -> list[tuple[Any, Any]]:
    """(tokens, mask) of large batches of few shapes."""
    lists = pruned.tokenize(dense.model, corpus.sentences("calibration", count))
    rows, longest = pruned.CALIBRATION_ROWS, pruned.LONGEST
    found = batches.batches(lists, rows, longest, buckets=pruned.BUCKETS)
    return [(b.tokens, b.mask) for b in found]


def real(_: Any, mask: Any) -> Any:
    """Which tokens count, as `fh.calibrate` asks."""
    return mask != 0


def figures(scores: dict[str, float], zeros: float | None = None) -> dict[str, float]:
    """The figures beside the mean cosine, as columns of a table."""
    found = {} if zeros is None else {"zeros": zeros}
    return found | {"5 % quantile": scores["quantile"], "Spearman": scores["spearman"]}
