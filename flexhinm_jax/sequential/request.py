"""What to prune with, and how: one value that a run is asked for."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jax import Array

from flexhinm_jax.methods import Method
from flexhinm_jax.methods.base import check_method

Target = Literal["seq", "asym", "resid"]
TARGETS = ("seq", "asym", "resid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a pass over a model is asked to do.

    Attributes:
      method: what to prune with, such as `SparseGPT(NM(2, 4))`.
      key: PRNG key, consumed; a leaf uses the same as in `prune`.
      sparsity: fraction of weights removed, one for all or one per path; None for a
        pattern that has only one.
      rules: {regex: pattern or "skip"} on leaf paths; the first match wins.
      target: what to fit to, see `sequential.sequential`.
      center: for methods that move weights: fits around the means, and refits the bias
        where the product has one of its own.
    """

    method: Method
    key: Array
    sparsity: float | Mapping[str, float] | None = None
    rules: Mapping[str, Any] | None = None
    target: Target = "seq"
    center: bool = True

    @property
    def beside(self) -> bool:
        """Whether a dense model runs beside the pruned one."""
        return self.target != "seq"


def check_target(target: str, method: Method) -> None:
    """Raises ValueError for an unknown target or a method that needs gradients."""
    check_method(method)
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: choose one of {', '.join(TARGETS)}")
    if method.needs == "gradients":
        raise ValueError(
            f"{type(method).__name__} needs gradients, which one pass forward does not "
            "give; use accumulate_gradients and solve"
        )
