"""The contract of a method with something to learn: gates, logits, orders.

`solve` sets the start, an optimiser moves `State.learned` between `decide` calls, and
`harden` ends it. The verbs are pure and see one matrix; `training` calls them for a
whole model inside one jitted step.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jax import Array

from flexhinm_jax.methods.base import Method
from flexhinm_jax.types import Plan, State


@dataclasses.dataclass(frozen=True)
class LearnedMethod(Method):
    """A method whose `State.learned` is moved by an optimiser.

    `decide(state, w, key=key)` is the sampled relaxation, differentiable in
    `state.learned` and in `w`; `decide(state, w)` is the hard plan, which obeys the
    pattern exactly at every moment of the training.
    """

    #: Whether the weights stay as they are while the rest is learned.
    frozen_weights: ClassVar[bool] = False

    #: Whether `solve` learns by itself, so that its plan is worth applying.
    solve_learns: ClassVar[bool] = False

    @abc.abstractmethod
    def penalty(self, state: State, w: Array, *, key: Array) -> dict[str, Array]:
        """Terms to add to the loss of the model, weighted, f32[] each, by name.

        Args:
          state: the state.
          w: [o, i], the weight now.
          key: the key that `decide` gets in the same step: both see the same sample.

        Returns:
          Name -> term; differentiable in `state.learned`. A model's term is the mean
          over its weights, each weighted by its size, see `combine`.
        """

    def sample(
        self, state: State, w: Array, *, key: Array
    ) -> tuple[Plan, dict[str, Array]]:
        """`decide` and `penalty` with one key, for methods that can share the sample.

        Args:
          state: the state.
          w: [o, i], the weight now.
          key: consumed.
        """
        return self.decide(state, w, key=key), self.penalty(state, w, key=key)

    def combine(self, terms: Mapping[str, Array]) -> dict[str, Array]:
        """What is added to the loss of the model, from the means of its terms.

        A target for the whole model is a function of a mean, not a mean.

        Args:
          terms: name -> mean over the model of what `penalty` returned.
        """
        return dict(terms)

    @abc.abstractmethod
    def anneal(self, state: State, progress: Array | float) -> State:
        """The state with its schedules (temperature, ramps) at `progress`.

        Args:
          state: the state.
          progress: f32[] in [0, 1]: the finished fraction of the current stage.
        """

    def constrain(self, state: State) -> State:
        """The state after an optimiser step, with `learned` back in its range.

        Args:
          state: the state.
        """
        return state

    def settle(self, states: Mapping[str, State]) -> dict[str, State]:
        """The states before `harden`, when weights share a budget.

        Args:
          states: path -> state, arrays with leading stack axes.
        """
        return dict(states)

    @abc.abstractmethod
    def harden(self, state: State, w: Array) -> State:
        """The state with every choice made: sampled and hard plans are then equal.

        Args:
          state: the state.
          w: [o, i], the weight now.
        """

    def metrics(self, state: State) -> dict[str, Array]:
        """Figures worth logging, f32[] each, such as expected density; none by default.

        Args:
          state: the state.
        """
        del state
        return {}


class ScoreFunction(abc.ABC):
    """A learned method whose sample has no gradient: it is trained by `log_prob`.

    The gradient is that of the log-probability of the sample, times how much higher its
    loss is than that of the first choice, less a moving average (arXiv:2506.12876).
    """

    @abc.abstractmethod
    def log_prob(self, state: State, *, key: Array) -> Array:
        """Log-probability of what `decide` draws with this key, f32[]."""

    @abc.abstractmethod
    def baseline(self, state: State, w: Array) -> Plan:
        """The plan with whose loss samples are compared; the same at every step."""
