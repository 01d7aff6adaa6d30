"""The contract of a method: where scores come from, and whether weights move.

Two verbs on one matrix. `solve` finds everything that needs no gradient, `decide` turns
that into a plan. Both are pure; stacks are vmapped by `pruning.solve`. A method is a
frozen, hashable configuration and travels as a static argument.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jax import Array

from flexhinm_jax import arguments, checks
from flexhinm_jax.ops import masks, saliency
from flexhinm_jax.patterns import NM, Pattern
from flexhinm_jax.types import Plan, State, Stats


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A way to prune one matrix.

    Attributes:
      pattern: the supports to choose from.
    """

    pattern: Pattern = NM(2, 4)

    #: What `solve` reads of the statistics; "norms" works with `calibrate(gram=False)`.
    needs: ClassVar[Literal["nothing", "norms", "gram", "gradients"]] = "nothing"

    #: The families of supports that the method can choose from.
    accepts: ClassVar[tuple[type[Pattern], ...]] = (Pattern,)

    #: Whether the pattern must let every row choose without looking at other rows.
    free_rows: ClassVar[bool] = False

    #: Whether these choices must be n of every m.
    chooses_groups: ClassVar[bool] = False

    #: Whether the groups must be along one order of the inputs that all rows share.
    one_order: ClassVar[bool] = False

    #: Whether training can begin from any plan of the pattern, see `adopt`.
    adopts_plans: ClassVar[bool] = False

    #: Whether it puts its groups along `Stats.order`.
    follows_order: ClassVar[bool] = False

    #: By whose inputs a sequential pass judges a weight where nothing is asked for.
    statistics: ClassVar[Literal["sequential", "block"]] = "sequential"

    def __post_init__(self):
        """Validates the configuration."""
        arguments.configuration(self)
        if not isinstance(self.pattern, Pattern):
            raise ValueError(
                f"pattern={arguments.shown(self.pattern)}: need a Pattern such as "
                "NM(2, 4), or "
                'patterns.parse("2:4") for its text form'
            )
        if not self.fits(self.pattern):
            raise ValueError(
                f"{type(self).__name__} works with {self.works_with()}, not with "
                f"{self.pattern}; give such a pattern, or another method"
            )

    @classmethod
    def fits(cls, pattern: Pattern) -> bool:
        """Whether the method works with a pattern: what it has, and its family."""
        free = pattern.free_rows or not (cls.free_rows or cls.chooses_groups)
        groups = pattern.form is not None or not cls.chooses_groups
        order = pattern.one_order or not cls.one_order
        return free and groups and order and isinstance(pattern, cls.accepts)

    @classmethod
    def works_with(cls) -> str:
        """The patterns that `fits` lets through, in words."""
        if cls.chooses_groups:
            return "NM or HiNM or FlexHiNM, where every row chooses n of m in groups"
        if cls.free_rows:
            return "patterns where every row chooses alone, such as NM or FlexHiNM"
        if cls.one_order:
            return "NM, where all rows share one order of the inputs"
        return " or ".join(family.__name__ for family in cls.accepts)

    def with_pattern(self, pattern: Pattern) -> "Method":
        """The same method with another pattern."""
        return dataclasses.replace(self, pattern=pattern)

    @abc.abstractmethod
    def solve(
        self,
        key: Array,
        w: Array,
        stats: Stats | None,
        *,
        sparsity: Array | float | None = None,
        prev: State | None = None,
    ) -> State:
        """Finds everything that is found without gradients.

        Args:
          key: PRNG key, consumed.
          w: [o, i], any floating dtype.
          stats: statistics of its inputs; may be None when `needs` is "nothing".
          sparsity: fraction of weights removed; None for a pattern that has only one.
          prev: an earlier state of this weight; the kept set only shrinks.

        Returns:
          The state.

        Raises:
          ValueError: missing statistics, shapes or a target that the pattern refuses.
        """

    @abc.abstractmethod
    def decide(self, state: State, w: Array, *, key: Array | None = None) -> Plan:
        """The plan for a state.

        Args:
          state: from `solve`, perhaps with `learned` moved by an optimiser.
          w: [o, i], the weight now.
          key: None for the hard, deterministic plan; a key for a sampled relaxation
            where the method has one.

        Returns:
          The plan; its weight has the dtype of `w`.
        """

    def importance(self, w: Array, stats: Stats | None) -> Array:
        """What budgets weigh a weight by: the Wanda score, unless it has its own.

        Args:
          w: [o, i].
          stats: statistics of its inputs, or None for magnitudes.

        Returns:
          f32[o, i], non-negative; larger stays.
        """
        if stats is None:
            return saliency.magnitude(w)
        return saliency.wanda(w, stats.sq_norm)

    def order_scores(self, w: Array, stats: Stats | None) -> Array:
        """What a searched order of inputs is to retain: the squared Wanda score.

        Args:
          w: [o, i].
          stats: statistics of its inputs, or None for squared magnitudes.

        Returns:
          f32[o, i], non-negative.
        """
        if stats is None:
            return saliency.squared(w)
        return jnp.square(saliency.wanda(w, stats.sq_norm))

    def for_fixed_weights(self) -> "Method":
        """The method for a support whose kept weights stay as they are."""
        return self

    def diagnostics(self, state: State) -> dict[str, Array]:
        """How the solving went; nothing, unless a method has something to report.

        Args:
          state: from `solve`.

        Returns:
          Name -> array with the leading axes of the state, such as the damping that
          the Gram matrix needed; bool where True means that all went well.
        """
        del state
        return {}

    def note(self, diagnostics: Mapping[str, Any]) -> str:
        """What a person should know about how the solving went; "" for nothing.

        Args:
          diagnostics: concrete numbers of `diagnostics`; of a stack, the worst ones.
        """
        del diagnostics
        return ""

    def centered(self, center: bool, *, has_bias: bool) -> "Method":
        """The method that works on centred inputs where a bias can take up the means.

        Args:
          center: whether to centre also where the configuration does not ask for it.
          has_bias: whether the weight has a bias of its own.

        Returns:
          The same method unless it fits outputs.
        """
        del center, has_bias
        return self

    def check(
        self,
        w: Array,
        stats: Stats | None,
        sparsity: Array | float | None,
        path: str = "weight",
    ) -> None:
        """Raises ValueError when weight, statistics or target do not fit.

        Args:
          w: [o, i], or a shape with a dtype.
          stats: statistics or None.
          sparsity: the target or None.
          path: leaf path for the message.
        """
        if not hasattr(w, "dtype") or not jnp.issubdtype(w.dtype, jnp.floating):
            raise ValueError(
                f"{path}: {arguments.shown(w)} cannot be pruned; need a floating array"
            )
        self.pattern.check(w.shape, sparsity, path)
        checks.stats(stats, w.shape, self.needs, path)


def check_method(method: Any) -> None:
    """Raises ValueError unless the argument is a configured method."""
    if not isinstance(method, Method):
        raise ValueError(
            f"method={arguments.shown(method)}: need a method with its pattern, such "
            'as Wanda(NM(2, 4)), or methods.parse("wanda", pattern) for its text form'
        )


@dataclasses.dataclass(frozen=True)
class ScoreMethod(Method):
    """A method that scores every weight, keeps the best support and moves nothing."""

    @abc.abstractmethod
    def score(self, w: Array, stats: Stats | None) -> Array:
        """Importance of every weight, f32[o, i], non-negative; larger stays."""

    def importance(self, w: Array, stats: Stats | None) -> Array:
        """The score."""
        return self.score(w, stats)

    def order_scores(self, w: Array, stats: Stats | None) -> Array:
        """The score."""
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
        """Projects the scores onto the pattern; see `Method.solve`."""
        self.check(w, stats, sparsity)
        checks.finite(w, "weight")
        scores = self.score(w, stats)
        before = None if prev is None else prev.fixed["support"]
        support = self.pattern.project(key, scores, sparsity, before)
        share = masks.retained(scores, support.keep)
        return State(learned=(), fixed={"support": support, "retained": share})

    def decide(self, state: State, w: Array, *, key: Array | None = None) -> Plan:
        """Masks the weight; `key` is not used."""
        del key
        support = state.fixed["support"]
        return Plan(
            weight=jnp.where(support.keep, w, jnp.zeros((), w.dtype)),
            support=support,
            retained=state.fixed["retained"],
        )
