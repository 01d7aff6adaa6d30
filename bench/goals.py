"""Goals of the quality of pruned models, kept apart from what was measured.

Those of single layers and kernels are beside the programs that measure them.
"""

from typing import NamedTuple


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
MINILM = {
    ("one-shot", 0.5): Goal(0.90, 0.95, 0.97),
    ("one-shot", 0.75): Goal(0.74, 0.83, 0.87),
    ("distilled", 0.5): Goal(0.955, 0.97, 0.98),
    ("distilled", 0.75): Goal(0.865, 0.89, 0.92),
}
