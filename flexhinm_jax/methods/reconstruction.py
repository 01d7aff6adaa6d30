"""What methods that move weights share: the layer-wise problem in, a state out.

`LayerFit` poses the problem: targets, means, damping and dtypes are dealt with there.
A `Reconstruction` says how support and weight are found for one `gram.Problem`.
"""

import abc
import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import checks
from flexhinm_jax.methods.base import Method
from flexhinm_jax.ops import gram, masks, saliency
from flexhinm_jax.types import Plan, State, Stats, Support

REFIT = 10  # conjugate-gradient steps on an earlier support, before it shrinks


class Solved(NamedTuple):
    """What a method found for one problem.

    Attributes:
      weight: f[o, i], the pruned weight.
      support: what stays of it.
      diagnostics: name -> array[], how the solving went; kept in the state.
      lost: f[], squared distance of the outputs from those of the least-squares
        weight, where the method knows it.
    """

    weight: Array
    support: Support
    diagnostics: Mapping[str, Array] = types.MappingProxyType({})
    lost: Array | None = None


@dataclasses.dataclass(frozen=True)
class LayerFit(Method):
    """A method that fits the pruned layer to its targets.

    The state holds `support`, `weight`, `retained` (share of the squared Wanda score),
    `error` (relative squared error of the outputs on the damped Gram), `damping` (the
    fraction used; more than asked where the Gram was not definite) and, when centred,
    `bias`: what to add to the product so that the mean is that of the target. Without
    `stats.target_mean` the target is `W x`, so an existing bias is added to it.

    Attributes:
      damp: ridge towards the dense weight, as a fraction of the mean of the Gram's
        diagonal.
      center: works on centred inputs and targets and refits the bias.
      precision: dtype to compute in; "float64" needs `jax_enable_x64`.
    """

    _: dataclasses.KW_ONLY
    damp: float = 0.01
    center: bool = False
    precision: Literal["float32", "float64"] = "float32"

    needs: ClassVar[Literal["nothing", "norms", "gram"]] = "gram"

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if not self.damp > 0:
            raise ValueError(f"damp={self.damp}: need a fraction > 0, such as 0.01")
        if self.precision not in ("float32", "float64"):
            raise ValueError(
                f"precision={self.precision!r}: choose 'float32' or 'float64'"
            )

    #: Entries of `State.fixed` that say how the solving went; scalars per matrix.
    reports: ClassVar[tuple[str, ...]] = ("damping",)

    def diagnostics(self, state: State) -> dict[str, Array]:
        """The entries of `reports`, with the leading axes of the state."""
        return {name: state.fixed[name] for name in self.reports}

    def note(self, diagnostics: Mapping[str, Any]) -> str:
        """Says when the Gram needed more damping than asked for; see `Method.note`."""
        if not diagnostics:
            return ""
        used = float(np.max(diagnostics["damping"]))
        return gram.damping_message(used, self.damp)

    def centered(self, center: bool, *, has_bias: bool) -> "Method":
        """The method with `center` as a bias allows; see `Method.centered`."""
        return dataclasses.replace(self, center=(center or self.center) and has_bias)

    def problem(self, w: Array, stats: Stats) -> gram.Problem:
        """The problem that this configuration poses.

        Raises:
          ValueError: float64 without `jax_enable_x64`.
        """
        if jax.dtypes.canonicalize_dtype(self.precision) != self.precision:
            raise ValueError(
                "precision='float64' needs 64-bit mode: call "
                "jax.config.update('jax_enable_x64', True) first"
            )
        dtype = jnp.dtype(self.precision)
        return gram.problem(w, stats, damp=self.damp, center=self.center, dtype=dtype)

    def check(
        self,
        w: Array,
        stats: Stats | None,
        sparsity: Array | float | None,
        path: str = "weight",
    ) -> None:
        """Raises ValueError also for a concrete weight with NaN; see `Method.check`."""
        super().check(w, stats, sparsity, path)
        checks.finite(w, "weight", path)

    def solve(
        self,
        key: Array,
        w: Array,
        stats: Stats | None,
        *,
        sparsity: Array | float | None = None,
        prev: State | None = None,
    ) -> State:
        """Solves the layer-wise problem; see `Method.solve`."""
        self.check(w, stats, sparsity)
        if sparsity is not None:
            sparsity = jnp.asarray(sparsity, jnp.float32)
        return self._solve(key, w, stats, sparsity, prev)

    @abc.abstractmethod
    def _solve(self, key, w, stats, sparsity, prev) -> State:
        """`solve` after the checks: one program, also when called outside jit."""

    def state(
        self,
        w: Array,
        stats: Stats,
        task: gram.Problem,
        result: Solved,
    ) -> State:
        """Packs a solution, with its diagnostics."""
        solved, support = result.weight, result.support
        # Other targets have a least-squares weight that is not the dense one.
        lost = None if task.has_targets else result.lost
        scores = jnp.square(saliency.wanda(w, stats.sq_norm))
        fixed = {
            "support": support,
            "weight": jnp.where(support.keep, solved, 0).astype(jnp.float32),
            "retained": masks.retained(scores, support.keep),
            "error": gram.error(solved, task, lost).astype(jnp.float32),
            "damping": task.damping.astype(jnp.float32),
            **result.diagnostics,
        }
        if self.center:
            b = gram.bias(w.astype(solved.dtype), solved, stats)
            fixed["bias"] = b.astype(jnp.float32)
        return State(learned=(), fixed=fixed)

    def decide(self, state: State, w: Array, *, key: Array | None = None) -> Plan:
        """The solved weight; `key` is not used, and of `w` only the dtype."""
        del key
        bias = state.fixed.get("bias")
        return Plan(
            weight=state.fixed["weight"].astype(w.dtype),
            support=state.fixed["support"],
            retained=state.fixed["retained"],
            bias=None if bias is None else bias.astype(w.dtype),
        )


@dataclasses.dataclass(frozen=True)
class Reconstruction(LayerFit):
    """A method that finds support and weight from the problem alone."""

    @abc.abstractmethod
    def reconstruct(
        self,
        key: Array,
        task: gram.Problem,
        sparsity: Array | float | None,
        before: Support | None,
    ) -> Solved:
        """Finds the pruned weight and its support for one problem.

        Args:
          key: PRNG key, consumed.
          task: the problem.
          sparsity: fraction of weights removed, or None.
          before: a support to stay within, or None.
        """

    @functools.partial(jax.jit, static_argnums=0)
    def _solve(self, key, w, stats, sparsity, prev):
        """Poses the problem and reconstructs."""
        task = self.problem(w, stats)
        before = None if prev is None else prev.fixed["support"]
        return self.state(w, stats, task, self.reconstruct(key, task, sparsity, before))


def first_scores(task: gram.Problem, start: Array, before: Support | None) -> Array:
    """f32[o, i]: what the first support is chosen by.

    Scores of the dense solution; within an earlier support those of its refitted
    weights, which know what the removed ones left them to do.

    Args:
      task: the problem.
      start: f[o, i], the dense solution.
      before: an earlier support to stay within, or None.
    """
    if before is not None:
        b = jnp.where(before.keep, start, 0)
        start = gram.refit(b, before.keep, task.gram, task.cross, REFIT)
    return squared_scores(task, start)


def squared_scores(task: gram.Problem, weight: Array | None = None) -> Array:
    """f32[o, i]: w^2 H_jj, the error of removing one weight alone."""
    w = task.weight if weight is None else weight
    return (jnp.square(w) * jnp.diag(task.gram)).astype(jnp.float32)
