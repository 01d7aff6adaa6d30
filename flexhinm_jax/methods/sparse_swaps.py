"""SparseSwaps: exchanges of a kept and a removed weight until none gains.

Zimmer et al. 2025 (arXiv:2512.10922): from any mask, rows apart, the change of
|| X (W - W') ||^2 by a swap is a closed form of the Gram and the residual. This is the
descent of `RefineMask` with the dense weights; the published version differs in the
order of the moves (one best swap of a row at a time) and knows N:M and rows of equal
sparsity. Where a group has at most 70 patterns all of them are compared, not only those
one swap away.
"""

import dataclasses
from typing import Literal

from flexhinm_jax.methods.refine_mask import RefineMask


@dataclasses.dataclass(frozen=True)
class SparseSwaps(RefineMask):
    """Swaps weights of any method's plan until no swap lowers the error.

    `RefineMask` with other defaults. The kept weights are those of the dense matrix;
    `Refit(SparseSwaps(Wanda(pattern)))` moves them afterwards.

    Attributes:
      inner: the method that finds the start.
      sweeps: looks at every swap, at most; ten are usually enough.
      weights: see `RefineMask`.
      refit_steps: see `RefineMask`.

    Example:
      >>> from flexhinm_jax.methods import Wanda
      >>> from flexhinm_jax.patterns import Unstructured
      >>> SparseSwaps(Wanda(Unstructured(scope="row"))).weights
      'dense'
    """

    sweeps: int = 100
    weights: Literal["solve", "dense"] = "dense"
