"""PATCH: learns which tiles stay dense and which patterns the other groups keep.

PATCH (arXiv:2509.23410) puts a gate on every tile next to MaskLLM's choice inside it,

    mask = g + (1 - g) * inner,  g = sigmoid((scale * P + logistic) / temperature)

so any sparsity between dense and n:m can be learned, weights frozen. The schedules
are those of the paper's joint mode.

Departures: every relaxed group sums to n, so the density is n / m + (1 - n / m) times
the mean tile probability, and the term that pulls it to the target uses the
probabilities instead of a sample; the reward for large kept weights is squared and
normalised, as in the paper's text; hardening keeps exactly the number of dense tiles
that the target asks for, ranked over the model or per weight, instead of all P > 0.

Beyond the paper: `relaxation` "expected" and "decided" free patterns and tiles from
noise, and `tile_prior` "shares" starts from logits that weights can be compared by,
where the paper gives every weight the same share of dense tiles.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax.methods import gated
from flexhinm_jax.methods.base import ScoreMethod
from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.methods.wanda import Wanda
from flexhinm_jax.ops import gates, masks
from flexhinm_jax.patterns import Pattern, Tiles
from flexhinm_jax.types import Plan, State, Stats, Support


@dataclasses.dataclass(frozen=True)
class Patch(LearnedMethod):
    """Learns a gate per tile and, in joint mode, a pattern per group.

    `State.learned` is {"tiles": f32[o / rows, i / columns]} and, when joint, {"logits":
    f32[o, i / m, C(m, n)]}.

    Attributes:
      pattern: the tiles.
      scores: the one-shot method whose support is the prior of both.
      mode: "joint" learns tiles and patterns, "tile" only the tiles around the fixed
        n:m mask of the scores.
      target: "global" lets tiles move between the weights of a model, "layer" gives
        every weight the sparsity asked for.
      density_weight: weight of |density - target|, the paper's l1.
      reward: weight of the share of squared weights kept, the paper's l2; fades to 0.
        The paper has 10 beside the loss of a language model; with a loss well below 1
        that hides it.
      tile_prior: "signs" as in the paper: logits +-start, plus for the tiles that
        are dense in the support of the scores. "shares": start times the logarithm of
        the share of its weight's scores that a tile loses under n:m; with a global
        target `settle` then deals the tiles by relative losses of the layers.
      tile_start: first scale x initial logit of a tile; with "signs" at 1.05 the
        prior's tiles begin with probability .74.
      tile_temperature: first and last temperature of the tiles, linear.
      tile_scale: first and last factor on the tile logits, linear.
      start: first scale x initial logit of the prior's pattern.
      temperature: first and last temperature of the patterns, linear.
      scale: first and last factor on the pattern logits, linear.
      relaxation: what training sees of the patterns, see `ops.gates.pattern_mask`, and
        of the tiles: gates under noise with "soft" and "straight_through", their
        probabilities with "expected", and with "decided" the dense tiles themselves,
        with the gradient of the gates.
    """

    pattern: Pattern = Tiles(128)
    _: dataclasses.KW_ONLY
    scores: ScoreMethod = Wanda()
    mode: Literal["joint", "tile"] = "joint"
    target: Literal["global", "layer"] = "global"
    density_weight: float = 7.0
    reward: float = 0.1
    tile_prior: Literal["signs", "shares"] = "signs"
    tile_start: float = 1.05
    tile_temperature: tuple[float, float] = (2.0, 0.05)
    tile_scale: tuple[float, float] = (25.0, 350.0)
    start: float = 3.0
    temperature: tuple[float, float] = (4.0, 0.05)
    scale: tuple[float, float] = (100.0, 500.0)
    relaxation: gates.Relaxation = "soft"

    accepts: ClassVar[tuple[type[Pattern], ...]] = (Tiles,)
    frozen_weights: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration and gives the scores the pattern."""
        super().__post_init__()
        if self.mode not in ("joint", "tile"):
            raise ValueError(f"mode={self.mode!r}: choose 'joint' or 'tile'")
        gates.check_relaxation(self.relaxation)
        if not isinstance(self.scores, ScoreMethod):
            raise ValueError(
                f"scores={self.scores!r}: need a method that scores, such as Wanda"
            )
        if self.target not in ("global", "layer"):
            raise ValueError(f"target={self.target!r}: choose 'global' or 'layer'")
        if self.tile_prior not in ("signs", "shares"):
            raise ValueError(
                f"tile_prior={self.tile_prior!r}: choose 'signs' or 'shares'"
            )
        for name in ("tile_temperature", "tile_scale", "temperature", "scale"):
            ends = getattr(self, name)
            if len(ends) != 2 or min(ends) <= 0:
                raise ValueError(f"{name}={ends}: need (first, last), both above 0")
        if min(self.density_weight, self.reward) < 0:
            raise ValueError(
                f"density_weight={self.density_weight}, reward={self.reward}: need "
                "numbers >= 0"
            )
        object.__setattr__(self, "scores", self.scores.with_pattern(self.pattern))

    @property
    def needs(self) -> Any:
        """What the scores read of the statistics."""
        return self.scores.needs

    @property
    def tiles(self) -> Tiles:
        """The pattern."""
        return cast(Tiles, self.pattern)

    def solve(
        self,
        key: Array,
        w: Array,
        stats: Stats | None,
        *,
        sparsity: Array | float | None = None,
        prev: State | None = None,
    ) -> State:
        """Starts at the support of the scores; see `Method.solve`.

        With `prev` only tiles that were dense may stay dense, and only their groups
        choose again.
        """
        self.check(w, stats, sparsity)
        scores = self.scores.score(w, stats)
        before = None if prev is None else self.choice(prev)
        within = jnp.ones(w.shape, bool) if before is None else before.keep
        support = self.tiles.project(key, scores, sparsity, before)
        n, m = self.tiles.n, self.tiles.m
        inner = masks.n_of_m(jnp.where(within, scores, -1.0), n=n, m=m)
        dense = self.tiles.tiles(support.keep).all(-1)
        prior = jnp.where(dense, 1.0, -1.0).astype(jnp.float32)
        if self.tile_prior == "shares":
            prior = self._shares(scores, inner)
        learned = {"tiles": self.tile_start / self.tile_scale[0] * prior}
        if self.mode == "joint":
            prior = self.start / self.scale[0]
            learned["logits"] = gates.initial_logits(
                inner.reshape(len(inner), -1, m), n=n, m=m, prior=prior
            )
        fixed = {
            "inner": inner,
            "may": self.tiles.tiles(within).all(-1),
            "dense_tiles": jnp.sum(dense, dtype=jnp.int32),
            "target": 1 - jnp.asarray(sparsity, jnp.float32),
        }
        return self.anneal(State(learned, fixed), 0.0)

    def decide(self, state: State, w: Array, *, key: Array | None = None) -> Plan:
        """The masked weight: hard without a key, a relaxed sample with one."""
        support = self.choice(state)
        if key is None:
            weight = jnp.where(support.keep, w, jnp.zeros((), w.dtype))
        else:
            weight = (w * self.mask(state, key)).astype(w.dtype)
        retained = masks.retained(jnp.square(w.astype(jnp.float32)), support.keep)
        return Plan(weight, support, retained)

    def sample(
        self, state: State, w: Array, *, key: Array
    ) -> tuple[Plan, dict[str, Array]]:
        """The sampled plan, its density and the share of the squared weights kept."""
        plan = self.decide(state, w, key=key)
        reward = gated.reward(self, state, plan.weight, w)
        density, target = self.density(state), state.fixed["target"]
        if self.target == "layer":
            off = self.density_weight * jnp.abs(density - target)
            return plan, {"density": off, "reward": reward}
        return plan, {"density": density, "target": target, "reward": reward}

    def penalty(self, state: State, w: Array, *, key: Array) -> dict[str, Array]:
        """The terms of the sample."""
        return self.sample(state, w, key=key)[1]

    def combine(self, terms: Mapping[str, Array]) -> dict[str, Array]:
        """With a global target, |mean density - mean target| of the whole model."""
        if self.target == "layer":
            return dict(terms)
        off = jnp.abs(terms["density"] - terms["target"])
        return {"density": self.density_weight * off, "reward": terms["reward"]}

    def settle(self, states: Mapping[str, State]) -> dict[str, State]:
        """Deals the dense tiles of all weights to the largest logits of the model.

        Their number is the one that the targets ask for, rounded once for the model.
        With a layer target nothing changes.

        Args:
          states: path -> state, arrays with leading stack axes.
        """
        if self.target == "layer":
            return dict(states)
        ranked = [self._ranked(state) for state in states.values()]
        flat = jnp.concatenate([x.reshape(-1) for x in ranked])
        inner, total = self.tiles.n / self.tiles.m, jnp.zeros((), jnp.float32)
        for state, x in zip(states.values(), ranked, strict=True):
            share = (state.fixed["target"] - inner) / (1 - inner)
            total += jnp.sum(share) * (x.shape[-2] * x.shape[-1])
        may = jnp.sum(flat > -jnp.inf, dtype=jnp.int32)
        total = jnp.minimum(jnp.round(total).astype(jnp.int32), may)
        dense, start, settled = masks.top_k(flat, total), 0, {}
        for (path, state), x in zip(states.items(), ranked, strict=True):
            own = dense[start : start + x.size].reshape(x.shape)
            count = jnp.sum(own, axis=(-2, -1), dtype=jnp.int32)
            fixed = state.fixed | {"dense_tiles": count}
            settled[path] = dataclasses.replace(state, fixed=fixed)
            start += x.size
        return settled

    def choice(self, state: State) -> Support:
        """The dense tiles with the largest logits, and the patterns on top."""
        dense, inner = self._dense(state), state.fixed["inner"]
        if self.mode == "joint":
            n, m = self.tiles.n, self.tiles.m
            best = gates.best_pattern(state.learned["logits"], n, m)
            free = self.tiles.spread(state.fixed["may"])
            inner = jnp.where(free, best.reshape(inner.shape), inner)
        return self.tiles.support(dense, inner)

    def mask(self, state: State, key: Array) -> Array:
        """A relaxed mask, f32[o, i]; differentiable in `learned`."""
        tile_key, group_key = jax.random.split(key)
        fixed, learned = state.fixed, state.learned
        gate = self.tiles.spread(self._gates(tile_key, state))
        inner = fixed["inner"].astype(jnp.float32)
        if self.mode == "joint":
            mixed = gates.pattern_mask(
                group_key,
                fixed["scale"] * learned["logits"],
                fixed["temperature"],
                n=self.tiles.n,
                m=self.tiles.m,
                relaxation=self.relaxation,
            ).reshape(inner.shape)
            inner = jnp.where(self.tiles.spread(fixed["may"]), mixed, inner)
        return gate + (1 - gate) * inner

    def density(self, state: State) -> Array:
        """Expected kept fraction, from the tile probabilities alone, f32[]."""
        p = jax.nn.sigmoid(state.fixed["tile_scale"] * state.learned["tiles"])
        return self._density(jnp.mean(jnp.where(state.fixed["may"], p, 0.0)))

    def anneal(self, state: State, progress: Array | float) -> State:
        """All temperatures and scales, linear in the progress."""
        names = "tile_temperature", "tile_scale", "temperature", "scale"
        return gated.scheduled(self, state, progress, *names)

    def harden(self, state: State, w: Array) -> State:
        """Logits that leave no doubt about tiles and patterns."""
        del w
        support = self.choice(state)
        dense = self.tiles.tiles(support.keep).all(-1)
        learned = {"tiles": jnp.where(dense, CERTAIN, -CERTAIN).astype(jnp.float32)}
        if self.mode == "joint":
            n, m = self.tiles.n, self.tiles.m
            best = gates.best_pattern(state.learned["logits"], n, m)
            learned["logits"] = gates.initial_logits(best, n=n, m=m, prior=CERTAIN)
        return dataclasses.replace(state, learned=learned)

    def metrics(self, state: State) -> dict[str, Array]:
        """Expected sparsity, and how decided the tiles are (0.5 to 1)."""
        p = jax.nn.sigmoid(state.fixed["tile_scale"] * state.learned["tiles"])
        return {
            "expected_sparsity": 1 - self.density(state),
            "tile_confidence": jnp.mean(jnp.maximum(p, 1 - p)),
        }

    def _gates(self, key: Array, state: State) -> Array:
        """How dense every tile is under the relaxation, f32[...] in [0, 1]."""
        fixed = state.fixed
        scaled = fixed["tile_scale"] * state.learned["tiles"]
        if self.relaxation in gates.NOISY:
            scaled += gates.logistic(key, scaled.shape)
        gate = jax.nn.sigmoid(scaled / fixed["tile_temperature"])
        if self.relaxation == "decided":
            gate = gates.straight_through(gate, self._dense(state))
        return jnp.where(fixed["may"], gate, 0.0)

    def _shares(self, scores: Array, inner: Array) -> Array:
        """Logarithm of the share of all scores that each tile drops."""
        scores = scores.astype(jnp.float32)
        dropped = jnp.sum(self.tiles.tiles(jnp.where(inner, 0.0, scores)), axis=-1)
        tiny = jnp.finfo(jnp.float32).tiny
        share = dropped / jnp.maximum(jnp.sum(scores), tiny)
        return jnp.log(jnp.maximum(share, LEAST))

    def _dense(self, state: State) -> Array:
        """The tiles that are dense now, bool[o / rows, i / columns]."""
        ranked = self._ranked(state)
        dense = masks.top_k(ranked.reshape(-1), state.fixed["dense_tiles"])
        return dense.reshape(ranked.shape)

    def _density(self, dense: Array) -> Array:
        """Kept fraction for a fraction of dense tiles."""
        inner = self.tiles.n / self.tiles.m
        return inner + (1 - inner) * dense

    def _ranked(self, state: State) -> Array:
        """Tile logits, below all others where a tile may not be dense."""
        return jnp.where(state.fixed["may"], state.learned["tiles"], -jnp.inf)


#: Logit of a choice that is made: with any scale it leaves the others no probability.
CERTAIN = 1e4

#: Smallest share that a prior tells from none.
LEAST = 1e-12
