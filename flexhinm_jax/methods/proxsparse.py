"""ProxSparse: moves the weights with a 2:4 regulariser to learn a mask, then undoes it.

ProxSparse, ICML 2025 (arXiv:2502.00258). After every update of the optimiser the
proximal operator of the regulariser pulls the two smallest weights of a group towards
zero. The two largest of every group are the mask, which is applied to the ORIGINAL
weights. The operator keeps the order of magnitudes, so without gradients the mask is
that of magnitude: a strength that is too large, or too few steps, is magnitude pruning.

Departure: the strength is relative to the rms of the weight. The published values
differ a hundredfold between models, because the operator is scale equivariant.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.ops import masks, prox
from flexhinm_jax.patterns import NM, Pattern
from flexhinm_jax.types import Plan, State, Stats, Support


@dataclasses.dataclass(frozen=True)
class ProxSparse(LearnedMethod):
    """Learns a 2:4 mask by moving a copy of the weights.

    `State.learned` is {"weight": f32[o, i]}; the weights of the model stay. Use a rate
    for it as for fine-tuning, such as `mask_tx=optax.adamw(1e-4)`.

    Attributes:
      pattern: NM(2, 4) in natural order.
      strength: of the proximal step, relative: times 1 / rms of the weight. The
        released LLaMA-2-7B setting corresponds to 0.005.
      anchor: weight of the term that keeps the surviving weights near the original;
        mean over the weights of ((w / w0) (w - w0))^2 / rms^2. 0 as published for 7B.
      softness: added to |w0| there, relative to the rms.
      sweeps: of the proximal operator.
    """

    _: dataclasses.KW_ONLY
    strength: float = 0.005
    anchor: float = 0.0
    softness: float = 0.5
    sweeps: int = 20

    accepts: ClassVar[tuple[type[Pattern], ...]] = (NM,)
    frozen_weights: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if min(self.strength, self.anchor, self.softness) < 0 or self.sweeps < 1:
            raise ValueError(
                f"strength={self.strength}, anchor={self.anchor}, softness="
                f"{self.softness}, sweeps={self.sweeps}: need numbers >= 0 and at "
                "least one sweep"
            )

    @classmethod
    def fits(cls, pattern: Pattern) -> bool:
        """The regulariser is that of 2:4 in natural order."""
        return pattern == NM(2, 4)

    def solve(
        self,
        key: Array,
        w: Array,
        stats: Stats | None,
        *,
        sparsity: Array | float | None = None,
        prev: State | None = None,
    ) -> State:
        """Copies the weights, those pruned before as zeros; needs no statistics."""
        del key
        self.check(w, stats, sparsity)
        original = w.astype(jnp.float32)
        mean = jnp.mean(jnp.square(original))
        rms = jnp.sqrt(jnp.where(mean > 0, mean, 1.0))
        within = jnp.ones(w.shape, bool) if prev is None else self._keep(prev)
        learned = {"weight": jnp.where(within, original, 0)}
        return State(learned, {"rms": rms, "within": within})

    def decide(self, state: State, w: Array, *, key: Array | None = None) -> Plan:
        """Hard: the mask on `w`. With a key: the moved weights, not yet sparse."""
        keep = self._keep(state)
        # natural order: no search, so the key is not read
        support = self.pattern.project(jax.random.key(0), keep.astype(jnp.float32))
        if key is None:
            weight = jnp.where(keep, w, jnp.zeros((), w.dtype))
        else:
            weight = state.learned["weight"].astype(w.dtype)
        retained = masks.retained(jnp.square(w.astype(jnp.float32)), keep)
        return Plan(weight, Support(keep, support.regions), retained)

    def penalty(self, state: State, w: Array, *, key: Array) -> dict[str, Array]:
        """The distance of surviving weights from the original, when configured."""
        del key
        if self.anchor == 0:
            return {}
        rms, original = state.fixed["rms"], w.astype(jnp.float32)
        moved = state.learned["weight"]
        sign = jnp.where(original < 0, -1.0, 1.0)
        ratio = moved / (original + self.softness * rms * sign)
        off = jnp.mean(jnp.square(ratio * (moved - original) / rms))
        return {"anchor": self.anchor * off}

    def anneal(self, state: State, progress: Array | float) -> State:
        """Nothing changes with the progress."""
        del progress
        return state

    def constrain(self, state: State) -> State:
        """The proximal step; what was pruned before stays zero."""
        moved = jnp.where(state.fixed["within"], state.learned["weight"], 0)
        groups = moved.reshape(moved.shape[0], -1, 4)
        strength = self.strength / state.fixed["rms"]
        pulled = prox.prox24(groups, strength, sweeps=self.sweeps)
        learned = {"weight": pulled.reshape(moved.shape)}
        return dataclasses.replace(state, learned=learned)

    def harden(self, state: State, w: Array) -> State:
        """The original weights under the mask."""
        weight = jnp.where(self._keep(state), w.astype(jnp.float32), 0)
        return dataclasses.replace(state, learned={"weight": weight})

    def metrics(self, state: State) -> dict[str, Array]:
        """`sparse_groups`: share of the groups with at most two non-zero weights."""
        moved = state.learned["weight"]
        alive = jnp.sum(moved.reshape(moved.shape[0], -1, 4) != 0, axis=-1)
        return {"sparse_groups": jnp.mean(alive <= 2, dtype=jnp.float32)}

    def _keep(self, state: State) -> Array:
        """bool[o, i], the two largest of every group."""
        moved = jnp.abs(state.learned["weight"])
        moved = jnp.where(state.fixed["within"], moved, -1.0)
        return masks.n_of_m(moved, n=2, m=4)
