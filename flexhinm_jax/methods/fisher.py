"""Fisher: second-order saliency of the training loss from gradients.

Diagonal (Theis et al. 2018, arXiv:1801.05787) or block-wise as in WoodFisher and oBERT
(Singh & Alistarh 2020, arXiv:2004.14340; Kurtic et al. 2022, arXiv:2203.07259), where
weights of one block may stand in for each other; "joint" also asks what all removed
weights of an N:M group cost together. Gradients come from the user:

    stats = accumulate_gradients(stats, grad_of_one_sample, block=16)
"""

import dataclasses
from typing import ClassVar, Literal

from jax import Array

from flexhinm_jax import arguments, checks
from flexhinm_jax.methods.base import ScoreMethod
from flexhinm_jax.ops import masks, saliency, subsets
from flexhinm_jax.types import State, Stats


@dataclasses.dataclass(frozen=True)
class Fisher(ScoreMethod):
    """Scores the rise of the loss when a weight is removed.

    Attributes:
      pattern: the supports to choose from.
      kind: "diagonal" reads `stats.sq_grad`; "block" reads `stats.fisher` and lets the
        other weights of a block of inputs make up for the removed one; "joint" finds
        the structure like "block" and then, in every N:M group, the set of weights that
        costs least when it is removed together: exact for a group inside one block.
        Without groups, "joint" is "block".
      damp: added to the diagonal of a block, as a fraction of its mean; not for
        "diagonal".
    """

    _: dataclasses.KW_ONLY
    kind: Literal["diagonal", "block", "joint"] = "diagonal"
    damp: float = 0.01

    needs: ClassVar[Literal["nothing", "norms", "gram", "gradients"]] = "gradients"

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if self.kind not in ("diagonal", "block", "joint"):
            raise ValueError(
                f"kind={self.kind!r}: choose 'diagonal', 'block' or 'joint'"
            )
        if self.kind == "joint" and not self.pattern.free_rows:
            raise ValueError(
                f"kind='joint' chooses every row for itself, which {self.pattern} does "
                "not allow; use kind='block'"
            )
        if not self.damp > 0:
            raise ValueError(f"damp={self.damp}: need a fraction > 0, such as 0.01")

    def check(
        self,
        w: Array,
        stats: Stats | None,
        sparsity: Array | float | None,
        path: str = "weight",
    ) -> None:
        """Raises ValueError also when the blocks are missing; see `Method.check`."""
        super().check(w, stats, sparsity, path)
        if self.kind != "diagonal" and (stats is None or stats.fisher is None):
            raise ValueError(
                f"{path}: kind={self.kind!r} needs the block Fisher: accumulate "
                "gradients with accumulate_gradients(stats, grad, block=16)"
            )

    def score(self, w: Array, stats: Stats | None) -> Array:
        """The rise of the loss by weight, up to a common factor, f32[o, i]."""
        assert stats is not None and stats.sq_grad is not None
        if self.kind == "diagonal":
            return saliency.diagonal_fisher(w, stats.sq_grad)
        assert stats.fisher is not None
        return saliency.block_fisher(w, stats.fisher, self.damp)

    def solve(
        self,
        key: Array,
        w: Array,
        stats: Stats | None,
        *,
        sparsity: Array | float | None = None,
        prev: State | None = None,
    ) -> State:
        """Projects the scores; "joint" re-chooses inside groups; see `Method.solve`."""
        state = super().solve(key, w, stats, sparsity=sparsity, prev=prev)
        support = state.fixed["support"]
        if self.kind != "joint" or support.regions is None:
            return state
        assert stats is not None and stats.fisher is not None
        inverse = subsets.inverse_blocks(stats.fisher, self.damp)
        within = None if prev is None else prev.fixed["support"].keep
        support = subsets.best_removal(w, inverse, support, within)
        share = masks.retained(self.score(w, stats), support.keep)
        return State(learned=(), fixed={"support": support, "retained": share})


def accumulate_gradients(stats: Stats, grad: Array, block: int | None = None) -> Stats:
    """Adds the gradient of one sample (or small batch) to the statistics.

    Args:
      stats: statistics of the weight, with or without earlier gradients.
      grad: [o, i], gradient of the loss with respect to the matrix.
      block: also sums g g^T over blocks of so many consecutive inputs; divides i.

    Returns:
      The statistics with `sq_grad`, and `fisher` if `block` was given. Pure; works
      under jit and scan once both fields are there.

    Raises:
      ValueError: statistics or a gradient of another kind or size, a block that does
        not divide the inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> from flexhinm_jax.types import Stats
      >>> none = jnp.zeros(4)
      >>> stats = Stats(sq_norm=none, mean=none, count=jnp.float32(0))
      >>> for grad in (jnp.ones((2, 4)), 2 * jnp.ones((2, 4))):
      ...     stats = accumulate_gradients(stats, grad)
      >>> float(stats.sq_grad[0, 0])
      5.0
    """
    if not isinstance(stats, Stats):
        raise ValueError(
            f"accumulate_gradients: stats is {arguments.shown(stats)}: need the Stats "
            "of one weight, as calibrate(...)[path]"
        )
    inputs = stats.sq_norm.shape[-1]
    if not hasattr(grad, "dtype") or grad.ndim < 2 or grad.shape[-1] != inputs:
        raise ValueError(
            f"accumulate_gradients: grad is {arguments.shown(grad)}: need the gradient "
            f"of one matrix [out, {inputs}], inputs last"
        )
    if block is not None:
        checks.divisible(inputs, block, "in", "block")
    g = grad.astype("float32")
    sq_grad = g * g if stats.sq_grad is None else stats.sq_grad + g * g
    if block is None:
        return dataclasses.replace(stats, sq_grad=sq_grad)
    o, i = g.shape
    parts = g.reshape(o, i // block, block)
    outer = parts[..., :, None] * parts[..., None, :]
    fisher = outer if stats.fisher is None else stats.fisher + outer
    return dataclasses.replace(stats, sq_grad=sq_grad, fisher=fisher)
