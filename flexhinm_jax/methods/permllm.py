"""PermLLM: a learned input order for N:M masks of frozen weights.

Zou et al. 2025 (arXiv:2510.10136): channels are permuted inside blocks, the permutation
is relaxed by Sinkhorn scaling and hardened by the Hungarian algorithm with a
straight-through gradient, and so is the mask in the permuted order. With
variant="cost" the permutation stays relaxed while it is learned: the entropic
assignment of the cost predictor (arXiv:2601.22980), annealed until it is hard.

Departures. Scores are divided by the mean of their group before the softmax, so that
the relaxation does not depend on the unit of the score. Learning starts from a searched
order, to which the identity belongs, and the best choice seen is kept: published code
starts from a random order and keeps the last one. Weights are in original channel
order throughout: nothing is permuted at run time but the gather of the packed form.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.ops import assignment, gates, gram, masks, saliency
from flexhinm_jax.patterns import NM, ChannelSearch, Pattern
from flexhinm_jax.types import Plan, Regions, State, Stats, Support

#: (at the beginning, at the end): linear for Sinkhorn, geometric for the cost variant.
TEMPERATURES = {"sinkhorn": (1.0, 0.1), "cost": (1.0, 0.05)}

SCORES = ("wanda", "ria", "squared")


@dataclasses.dataclass(frozen=True)
class PermLLM(LearnedMethod):
    """Learns which inputs share an N:M group; weights and scores stay.

    `solve` searches an order, then fits the logits to the layer's own output error on
    the Gram; it never returns an order with a larger error than the searched one. The
    published gain comes from a loss of the whole model: `training.fit` moves the logits
    of all matrices from there.

    The state has learned = {"logits": f32[k, b, b]}, zero where nothing has been
    learned since the order was set, and fixed = {"order": i32[i] the order that blocks
    of b positions permute, "scores": f32[o, i], "temperature": f32[], "hard": f32[],
    "error": f32[2] relative output error of the start and of what solve returns}.

    Attributes:
      pattern: NM; with permute=ChannelSearch() learning starts from a searched order,
        with None from the natural one. An order in the statistics (`share_orders`)
        replaces both.
      block: channels that are permuted among themselves; divides the inputs and is a
        multiple of m. A block of at least the inputs is one block.
      scores: "wanda", "ria" or "squared" (squared Wanda).
      variant: "sinkhorn" (PermLLM), or "cost" (the cost predictor, hard at the end).
      groups: with "cost", the number of equal blocks; replaces `block`.
      steps: updates of the layer's own fit; 0 leaves the searched order.
      learning_rate: of that fit, with cosine decay.
      bias: logit of the identity where nothing has been learned.
      rounds: Sinkhorn rounds.
      mask_temperature: of the softmax over the scaled scores of a group.
    """

    pattern: Pattern = NM(2, 4, permute=ChannelSearch())
    _: dataclasses.KW_ONLY
    block: int = 64
    scores: Literal["wanda", "ria", "squared"] = "wanda"
    variant: Literal["sinkhorn", "cost"] = "sinkhorn"
    groups: int = 4
    steps: int = 100
    learning_rate: float = 0.02
    bias: float = 1.0
    rounds: int = 5
    mask_temperature: float = 0.5

    needs: ClassVar[Literal["nothing", "norms", "gram"]] = "gram"
    solve_learns: ClassVar[bool] = True
    one_order: ClassVar[bool] = True
    follows_order: ClassVar[bool] = True
    frozen_weights: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if self.scores not in SCORES or self.variant not in TEMPERATURES:
            raise ValueError(
                f"scores={self.scores!r}, variant={self.variant!r}: choose one of "
                f"{', '.join(SCORES)} and one of {', '.join(TEMPERATURES)}"
            )
        if self.block < 1 or self.groups < 1 or self.steps < 0 or self.rounds < 0:
            raise ValueError(
                f"block={self.block}, groups={self.groups}, steps={self.steps}, "
                f"rounds={self.rounds}: need at least 1, 1, 0 and 0"
            )
        positive = (self.learning_rate, self.bias, self.mask_temperature)
        if not min(positive) > 0:
            raise ValueError(
                f"learning_rate={self.learning_rate}, bias={self.bias}, "
                f"mask_temperature={self.mask_temperature}: need numbers > 0"
            )

    @property
    def form(self) -> tuple[int, int]:
        """(n, m) of a group."""
        assert self.pattern.form is not None
        return self.pattern.form

    def sides(self, inputs: int, path: str = "weight") -> tuple[int, int]:
        """(number of blocks, channels of a block) for that many inputs.

        Raises:
          ValueError: blocks that do not divide the inputs, or groups of m that do not
            divide a block.
        """
        if self.variant == "cost":
            what, b = f"groups={self.groups}", -(-inputs // self.groups)
        else:
            what, b = f"block={self.block}", min(self.block, inputs)
        if inputs % b or (self.variant == "cost" and b * self.groups != inputs):
            raise ValueError(
                f"{path}: in={inputs} is not a multiple of {what}; choose a divisor"
            )
        if b % self.form[1]:
            raise ValueError(
                f"{path}: blocks of {b} channels ({what}) are no multiple of the "
                f"groups of {self.pattern}; choose another block"
            )
        return inputs // b, b

    def check(
        self,
        w: Any,
        stats: Stats | None,
        sparsity: Array | float | None,
        path: str = "weight",
    ) -> None:
        """Raises ValueError also where blocks do not fit; see `Method.check`."""
        super().check(w, stats, sparsity, path)
        self.sides(w.shape[-1], path)

    def score(self, w: Array, stats: Stats) -> Array:
        """Importance of every weight, f32[o, i]."""
        if self.scores == "ria":
            return saliency.relative_importance(w, stats.sq_norm, 0.5)
        scores = saliency.wanda(w, stats.sq_norm)
        return jnp.square(scores) if self.scores == "squared" else scores

    def order_scores(self, w: Array, stats: Stats | None) -> Array:
        """The score."""
        assert stats is not None
        return self.score(w, stats)

    def solve(
        self,
        key: Array,
        w: Array,
        stats: Stats | None,
        *,
        sparsity: Array | float | None = None,
        prev: State | None = None,
    ) -> State:
        """Searches an order and fits it to the layer; see `Method.solve`.

        With `prev` nothing changes: no smaller support has the pattern.
        """
        self.check(w, stats, sparsity)
        assert stats is not None
        return prev if prev is not None else self._solve(key, w, stats)

    @functools.partial(jax.jit, static_argnums=0)
    def _solve(self, key: Array, w: Array, stats: Stats) -> State:
        scores = self.score(w, stats)
        order = stats.order
        if order is None:
            regions = self.pattern.project(key, scores).regions
            assert regions is not None
            order = regions.in_order[0]
        k, b = self.sides(w.shape[1])
        fixed = {
            "order": order,
            "scores": scores,
            "temperature": jnp.asarray(TEMPERATURES[self.variant][0], jnp.float32),
            "hard": jnp.zeros((), jnp.float32),
            "error": jnp.zeros((2,), jnp.float32),
        }
        state = State({"logits": jnp.zeros((k, b, b), jnp.float32)}, fixed)
        return self._fit(state, output_error(w, stats))

    def _fit(self, state: State, error: Any) -> State:
        """Fits the logits to the layer; the best order seen becomes the start."""

        def loss(learned, progress):
            now = self.anneal(State(learned, state.fixed), progress)
            keep, choice = self.relaxed(now)
            # In the Sinkhorn variant the value is that of the hard choice already.
            hard = keep if self.variant == "sinkhorn" else self.support(now, choice)
            return error(keep), (error(hard), choice)

        start = jnp.broadcast_to(
            jnp.arange(state.learned["logits"].shape[-1], dtype=jnp.int32),
            state.learned["logits"].shape[:-1],
        )
        first = error(self.support(state, start))
        tx = optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps + 1))

        def step(carry, progress):
            learned, opt, best, order = carry
            slope, (reached, choice) = jax.grad(loss, has_aux=True)(learned, progress)
            better = reached < best
            best = jnp.where(better, reached, best)
            order = jnp.where(better, choice, order)
            updates, opt = tx.update(slope, opt)
            return (optax.apply_updates(learned, updates), opt, best, order), None

        carry = state.learned, tx.init(state.learned), first, start
        if self.steps:
            progress = jnp.linspace(0, 1, self.steps, dtype=jnp.float32)
            carry = lax.scan(step, carry, progress)[0]
        _, _, best, order = carry
        error_ = jnp.stack([first, best])
        return self._absorb(
            dataclasses.replace(state, fixed=state.fixed | {"error": error_}), order
        )

    def _absorb(self, state: State, choice: Array) -> State:
        """The state whose order includes `choice` i32[k, b]; its logits are zero."""
        blocks = state.fixed["order"].reshape(choice.shape)
        order = jnp.take_along_axis(blocks, choice, axis=1).reshape(-1)
        return State(
            jax.tree.map(jnp.zeros_like, state.learned), state.fixed | {"order": order}
        )

    def relaxed(self, state: State) -> tuple[Array, Array]:
        """The mask that the loss sees, and the permutation nearest to the relaxed one.

        Args:
          state: the state; differentiable in its logits.

        Returns:
          f32[o, i] in original order, with the gradient of the relaxation, and i32
          [k, b], the channel of its block at every position. The mask is 0 or 1 in the
          Sinkhorn variant and after `harden`, between them otherwise.

        Source: arXiv:2510.10136, section 4; arXiv:2601.22980.
        """
        logits = state.learned["logits"]
        k, b = logits.shape[:2]
        n, m = self.form
        logits = logits + self.bias * jnp.eye(b, dtype=jnp.float32)
        if self.variant == "cost":  # a cost of any unit: the largest counts as one
            top = jnp.max(jnp.abs(logits), axis=(1, 2), keepdims=True)
            logits = logits / lax.stop_gradient(top)
        soft = assignment.sinkhorn(logits / state.fixed["temperature"], self.rounds)
        choice = assignment.nearest(soft)
        p = gates.straight_through(soft, assignment.one_hot(choice))
        if self.variant == "cost":
            p = jnp.where(state.fixed["hard"] > 0, p, soft)
        order = state.fixed["order"]
        scores = state.fixed["scores"][:, order].reshape(-1, k, b)
        exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
        groups = exact("okb,kbc->okc", scores, p)
        groups = groups.reshape(*groups.shape[:2], -1, m)
        mean = lax.stop_gradient(jnp.mean(groups, axis=-1, keepdims=True))
        scaled = groups / jnp.where(mean > 0, mean, 1)
        hard = masks.group_ranks(groups) < n
        mask = gates.straight_through(
            n * jax.nn.softmax(scaled / self.mask_temperature, axis=-1), hard
        )
        keep = exact("okc,kbc->okb", mask.reshape(-1, k, b), p)
        return keep.reshape(-1, k * b)[:, jnp.argsort(order)], choice

    def support(self, state: State, choice: Array) -> Array:
        """bool[o, i]: the hard mask of the order composed with `choice`."""
        return self._support(self._absorb(state, choice)).keep

    def _support(self, state: State) -> Support:
        """The support of the state's order alone."""
        order, scores = state.fixed["order"], state.fixed["scores"]
        n, m = self.form
        keep = masks.n_of_m(scores[:, order], n=n, m=m)
        o, i = scores.shape
        ends = jnp.zeros((1,), jnp.int32), jnp.full((1,), i, jnp.int32)
        rows = jnp.arange(o, dtype=jnp.int32)
        regions = Regions(rows, order[None], *ends, n, m)
        return Support(keep[:, jnp.argsort(order)], regions)

    def decide(self, state: State, w: Array, *, key: Array | None = None) -> Plan:
        """The plan; with a key the relaxation, which samples nothing from it."""
        if key is None:
            support = self._support(self.harden(state, w))
            weight = jnp.where(support.keep, w, jnp.zeros((), w.dtype))
        else:
            keep, choice = self.relaxed(state)
            support = self._support(self._absorb(state, choice))
            weight = (w.astype(jnp.float32) * keep).astype(w.dtype)
        retained = masks.retained(state.fixed["scores"], support.keep)
        return Plan(weight=weight, support=support, retained=retained)

    def penalty(self, state: State, w: Array, *, key: Array) -> dict[str, Array]:
        """No terms: the loss of the model is all."""
        del state, w, key
        return {}

    def anneal(self, state: State, progress: Array | float) -> State:
        """Sets the temperature: linear, or geometric for the cost variant."""
        first, last = TEMPERATURES[self.variant]
        progress = jnp.asarray(progress, jnp.float32)
        if self.variant == "cost":
            value = first * (last / first) ** progress
        else:
            value = first + (last - first) * progress
        fixed = state.fixed | {"temperature": value.astype(jnp.float32)}
        return dataclasses.replace(state, fixed=fixed)

    def harden(self, state: State, w: Array) -> State:
        """Puts the nearest permutation into the order; the logits start anew."""
        del w
        _, choice = self.relaxed(state)
        hard = self._absorb(state, choice)
        fixed = hard.fixed | {"hard": jnp.ones((), jnp.float32)}
        return dataclasses.replace(hard, fixed=fixed)


def output_error(w: Array, stats: Stats) -> Any:
    """The relative squared output error as a function of a mask.

    Args:
      w: [o, i].
      stats: with a Gram H; means and targets are not looked at.

    Returns:
      keep f32 or bool[o, i] -> tr(D H D^T) / tr(W H W^T), D = W * (1 - keep).
    """
    w = w.astype(jnp.float32)
    assert stats.gram is not None
    h = stats.gram.astype(jnp.float32)
    total = gram.energy(w, h)
    total = jnp.where(total > 0, total, 1)

    def error(keep: Array) -> Array:
        lost = w * (1 - keep.astype(jnp.float32))
        return gram.energy(lost, h) / total

    return error
