"""HyperPrune: a net shared by all groups chooses their patterns, weights frozen.

HyperPrune, ICLR 2026 (openreview lqjQs2lVNm). The logits of a group are a prior from a
one-shot mask plus the output of a small net on the group's weights, the energies of
its inputs, the price of each weight and embeddings of layer and component; see
`ops.hypernet`. Layer by layer the net is fitted to the reconstruction of the outputs
under Gumbel-softmax masks, rewarded for keeping weights of strong inputs, and held
where it was on groups of earlier layers. Nothing is learned per weight.

Departures: the reconstruction is that of every projection by its Gram instead of that
of the decoder layer; the net also sees the price of each weight, what removing it adds
to the error beside the prior's mask, because nothing else tells it about correlations
between inputs; all terms are relative, so that their weights have no unit; the best
hard mask seen is kept, the prior among them, so that no layer ends worse than its prior
(the released code ends worse in deep layers). The paper leaves width, schedules and
weights of the terms open: ours are in the arguments.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from flexhinm_jax import arguments
from flexhinm_jax.methods.reconstruction import Solved
from flexhinm_jax.methods.wrapper import Nested
from flexhinm_jax.ops import descent, gates, gram, hypernet
from flexhinm_jax.ops.hypernet import Layer
from flexhinm_jax.patterns import Pattern
from flexhinm_jax.types import State, Stats, Support

NEVER = -1e9  # logit of a pattern that an earlier stage has ruled out


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A value that is part of the program."""

    value: Any


@dataclasses.dataclass(frozen=True)
class HyperPrune(Nested):
    """Learns the masks of N:M groups with a net; the weights stay as they are.

    As a method every matrix has a net of its own. `training.hyper.hyper_prune` shares
    one net over a model, with the embeddings and the continual term.

    The state also has `prior_error`, the `error` of the inner method's support under
    the dense weights.

    Attributes:
      inner: the method whose support is the prior; its weights are not used.
      prior: logit by which the prior exceeds a pattern with one weight less in common.
      hidden: width of the three hidden layers.
      embedding: length of the embeddings of layer and component; 0 for none.
      steps: updates per matrix, rounded up to a multiple of `checks`.
      learning_rate: of Adam, with cosine decay.
      rows: of a matrix, a run of them for every update; whole tiles, at least one.
      temperature: first and last temperature of a matrix, linear.
      outlier: weight of the reward for the share of w^2 E[x^2] that is kept.
      continual: weight of the mean squared change of logits of earlier layers. At 1
        the net hardly learns from later layers any more.
      cache: groups of earlier layers to remember.
      checks: hard masks that are compared per matrix, besides the prior.
    """

    _: dataclasses.KW_ONLY
    prior: float = 3.0
    hidden: int = 64
    embedding: int = 16
    steps: int = 300
    learning_rate: float = 2e-2
    rows: int = 16
    temperature: tuple[float, float] = (4.0, 0.05)
    outlier: float = 0.05
    continual: float = 0.001
    cache: int = 1024
    checks: int = 6

    chooses_groups: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        for name in ("hidden", "steps", "rows", "cache", "checks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: need at least 1")
        for name in ("prior", "embedding", "outlier", "continual"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: need a number >= 0")
        ends = self.temperature
        if len(ends) != 2 or not min(ends) > 0:
            raise ValueError(f"temperature={ends}: need (first, last), both above 0")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: need a number > 0")

    @classmethod
    def fits(cls, pattern: Pattern) -> bool:
        """Patterns with groups, at most 70 choices in each."""
        if not super().fits(pattern) or pattern.form is None:
            return False
        n, m = pattern.form
        return math.comb(m, n) <= descent.MAX_PATTERNS

    @property
    def form(self) -> dict[str, int]:
        """The n and m of a group."""
        assert self.pattern.form is not None
        return dict(zip(("n", "m"), self.pattern.form, strict=True))

    def net(self, key: Array, layers: int = 0, components: int = 0) -> hypernet.Theta:
        """The net at its start; without embeddings when there are no layers."""
        return hypernet.initial(
            key,
            m=self.form["m"],
            patterns=math.comb(self.form["m"], self.form["n"]),
            hidden=self.hidden,
            embedding=self.embedding if layers else 0,
            layers=layers,
            components=components,
        )

    @functools.partial(jax.jit, static_argnums=0)
    def _solve(self, key, w, stats, sparsity, prev):
        """Solves with a net for this matrix alone."""
        net_key, key = jax.random.split(key)
        args = key, w, stats, sparsity, prev
        return self.solve_with(self.net(net_key), None, None, *args)[0]

    def solve_with(
        self,
        theta: hypernet.Theta,
        cache: hypernet.Cache | None,
        place: hypernet.Place | None,
        key: Array,
        w: Array,
        stats: Stats,
        sparsity: Array | float | None,
        prev: State | None,
    ) -> tuple[State, hypernet.Theta, hypernet.Cache | None]:
        """Solves one matrix with a net that goes on to the next.

        Args:
          theta: the net.
          cache: groups of the matrices before; None to remember nothing.
          place: which embeddings are those of the matrix; None for a net without.
          key: consumed.
          w: [o, i].
          stats: statistics of its inputs, with a Gram.
          sparsity: for patterns that need one.
          prev: an earlier state of this weight.

        Returns:
          The state, and net and cache after it.
        """
        inner_key, learn_key, cache_key = jax.random.split(key, 3)
        before, inner = self._first(inner_key, w, stats, sparsity, prev)
        support = self.inner.decide(inner, w).support
        task = self.problem(w, stats)
        layer = hypernet.build_layer(task, support, before)
        theta, keep = self.learn(learn_key, theta, layer, cache, place)
        if cache is not None:
            cache = self._remember(cache_key, cache, layer, place)
        assert support.regions is not None
        keep = hypernet.original(keep, support.regions)
        prior = jnp.where(support.keep, task.weight, 0)
        solved = Solved(
            jnp.where(keep, task.weight, 0),
            Support(keep, support.regions),
            {"prior_error": gram.error(prior, task).astype(jnp.float32)},
        )
        state = self.state(w, stats, task, solved)
        return State((), state.fixed | {"inner": inner}), theta, cache

    def learn(
        self,
        key: Array,
        theta: hypernet.Theta,
        layer: Layer,
        cache: hypernet.Cache | None,
        place: hypernet.Place | None,
    ) -> tuple[hypernet.Theta, Array]:
        """Fits the net to one matrix.

        Args:
          key: consumed.
          theta: the net.
          layer: the matrix.
          cache: what the net must not forget; None for nothing.
          place: which embeddings are those of the matrix.

        Returns:
          The net afterwards, and the best hard mask on the way, bool[k, c, i]; the
          prior when no other was better.
        """
        # One matrix at a time also under vmap: memory is that of one, and the result
        # does not depend on what is solved beside it.
        learn = jax.custom_batching.sequential_vmap(self._learn)
        data, impl = jax.random.key_data(key), jax.random.key_impl(key)
        return learn(data, theta, layer, cache, place, _Static(str(impl)))

    def _learn(self, data, theta, layer, cache, place, impl):
        key = jax.random.wrap_key_data(data, impl=impl.value)
        checks = min(self.checks, self.steps)
        length = -(-self.steps // checks)
        steps = checks * length
        tx = optax.adam(optax.cosine_decay_schedule(self.learning_rate, steps))
        parts, rows, _ = layer.weight.shape
        count = min(parts, max(1, self.rows // rows))
        first, last = self.temperature
        before = None
        if cache is not None:
            before = hypernet.logits(theta, cache.features, cache.place)
            before = lax.stop_gradient(before)

        def loss(theta, key, at):
            part_key, noise = jax.random.split(key)
            part = layer
            if count < parts:
                start = jax.random.randint(part_key, (), 0, parts, jnp.int32)
                index = jnp.arange(count, dtype=jnp.int32)
                part = hypernet.take_parts(layer, (start + index) % parts)
            tau = first + (last - first) * at / max(steps - 1, 1)
            terms = self.terms(theta, part, place, noise, tau)
            total = terms["reconstruction"] - self.outlier * terms["outlier"]
            if cache is None or before is None:
                return total
            return total + self.continual * hypernet.drift(theta, cache, before)

        def update(carry, at):
            theta, opt, key = carry
            key, own = jax.random.split(key)
            grads = jax.grad(loss)(theta, own, at)
            updates, opt = tx.update(grads, opt, theta)
            return (optax.apply_updates(theta, updates), opt, key), None

        def segment(carry, at):
            moving, best, lowest = carry
            moving, _ = lax.scan(update, moving, at)
            best, lowest = self._better(moving[0], layer, place, best, lowest)
            return (moving, best, lowest), None

        at = jnp.arange(steps, dtype=jnp.float32).reshape(checks, length)
        start = (theta, tx.init(theta), key), layer.keep, layer.lost
        ((theta, _, _), best, _), _ = lax.scan(segment, start, at)
        return theta, best

    def terms(
        self,
        theta: hypernet.Theta,
        part: Layer,
        place: hypernet.Place | None,
        key: Array,
        temperature: Array | float,
    ) -> dict[str, Array]:
        """The terms of the loss on some parts, under a sampled relaxation.

        Args:
          theta: the net.
          part: from `take`.
          place: which embeddings are those of the matrix.
          key: consumed.
          temperature: f32[], above 0.

        Returns:
          "reconstruction", relative to all outputs, and "outlier", the share kept of
          w^2 E[x^2]; f32[] each.
        """
        logits = self.logits(theta, part, place)
        tau = jnp.asarray(temperature, jnp.float32)
        n, m = self.form["n"], self.form["m"]
        mixed = gates.pattern_mask(key, logits, tau, n=n, m=m)
        mask = hypernet.where_live(part, mixed, part.keep.astype(jnp.float32))
        kept = part.weight * mask
        share = jnp.sum(jnp.square(kept) * part.energy[:, None])
        whole = jnp.sum(jnp.square(part.weight) * part.energy[:, None])
        return {
            "reconstruction": hypernet.lost(part, kept) / part.total,
            "outlier": share / jnp.where(whole > 0, whole, 1),
        }

    def logits(
        self, theta: hypernet.Theta, part: Layer, place: hypernet.Place | None
    ) -> Array:
        """Logits of every group, f32[k, c, i / m, C(m, n)]: the prior plus the net."""
        m = self.form["m"]
        keep, w = (
            hypernet.grouped(part.keep, m),
            hypernet.grouped(part.weight / part.rms, m),
        )
        mean = jnp.mean(part.energy, axis=-1, keepdims=True)
        scale = jnp.log1p(part.energy / jnp.where(mean > 0, mean, 1))
        price = hypernet.grouped(part.price, m)
        x = hypernet.features(w, hypernet.grouped(scale[:, None], m), price)
        out = self.prior * gates.similarity(keep, **self.form)
        out += hypernet.logits(theta, x, place)
        if part.within is None:
            return out
        table = jnp.asarray(gates.pattern_table(**self.form))
        outside = ~hypernet.grouped(part.within, m)
        barred = jnp.any(table & outside[..., None, :], axis=-1)
        return jnp.where(barred, NEVER, out)

    def _hard(
        self, theta: hypernet.Theta, part: Layer, place: hypernet.Place | None
    ) -> Array:
        """The patterns with the largest logits, bool[k, c, i]."""
        best = gates.best_pattern(self.logits(theta, part, place), **self.form)
        return hypernet.where_live(part, best, part.keep)

    def _better(self, theta, layer, place, best, lowest):
        """The hard mask of the net and its error, if that is lower."""
        keep, error = self._over_parts(
            layer, lambda part: self._hard(theta, part, place)
        )
        wins = error < lowest
        return jnp.where(wins, keep, best), jnp.where(wins, error, lowest)

    def _over_parts(self, layer: Layer, hard: Any) -> tuple[Array, Array]:
        """Hard masks and their error, few rows at a time."""
        parts, rows, _ = layer.weight.shape
        count = min(parts, max(1, self.rows // rows))
        steps = -(-parts // count)
        index = jnp.arange(steps * count, dtype=jnp.int32).reshape(steps, count)

        def one(index):
            part = hypernet.take_parts(layer, jnp.minimum(index, parts - 1))
            keep = hard(part)
            kept = jnp.where(keep, part.weight, 0)
            # a part that fills up the last round has no weight
            there = (index < parts)[:, None, None]
            part = part._replace(target=jnp.where(there, part.target, 0))
            return keep, hypernet.lost(part, jnp.where(there, kept, 0))

        keep, lost = lax.map(one, index)
        return keep.reshape(-1, *keep.shape[2:])[:parts], jnp.sum(lost)

    def _remember(self, key, cache, layer, place):
        """The cache with groups of this matrix."""
        m = self.form["m"]
        parts, rows, columns = layer.weight.shape
        shape = parts, rows, columns // m
        live = layer.live[:, None, ::m][..., : shape[2]]

        def x(at):
            j, r, g = jnp.unravel_index(at, shape)
            w = hypernet.grouped(layer.weight, m)[j, r, g] / layer.rms
            t = j if layer.energy.shape[0] == parts else jnp.zeros_like(j)
            mean = jnp.mean(layer.energy, axis=-1)[t]
            energy = hypernet.grouped(layer.energy, m)[t, g]
            mean = jnp.where(mean > 0, mean, 1)[:, None]
            price = hypernet.grouped(layer.price, m)[j, r, g]
            return hypernet.features(w, jnp.log1p(energy / mean), price)

        flat = jnp.broadcast_to(live, shape).reshape(-1)
        return hypernet.remember(key, cache, x, flat, place)


def check_hyperprune(method: Any) -> None:
    """Raises ValueError unless the argument is a configured HyperPrune."""
    if not isinstance(method, HyperPrune):
        raise ValueError(
            f"method={arguments.shown(method)}: need HyperPrune(inner), such as "
            "HyperPrune(Wanda(NM(2, 4)))"
        )
