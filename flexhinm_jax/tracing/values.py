"""Which values of a program are the same value.

The operands of two products are compared by identity and, through cheap primitives, by
how they were computed: two layers that both cast x to bfloat16 read the same input.
Serves arrays and tracers of a walk as well as the variables of a jaxpr.
"""

from typing import Any

import numpy as np
from jax.extend.core import Literal

from flexhinm_jax.tracing import views

#: Primitives whose result is their operand, up to rounding.
ALIASES = views.IDENTITY | frozenset(
    "convert_element_type reduce_precision stop_gradient".split()
)

#: Primitives that are numbered by what they compute instead of by their result.
CHEAP = ALIASES | frozenset(
    "reshape transpose squeeze broadcast_in_dim slice "
    "lt add select_n concatenate".split()  # what makes a position of an index
)


class Numbering:
    """Numbers values, so that the same number means the same value."""

    def __init__(self):
        """Starts without any value."""
        self.numbers: dict[Any, int] = {}
        # The first value of every number; keeps it alive, so that ids stay unique.
        self.first: list[Any] = []
        self.alive: list[Any] = []

    def of(self, value: Any) -> int:
        """The number of a value; scalars of the program are known by content."""
        value = value.val if isinstance(value, Literal) else value
        if isinstance(value, np.generic | np.ndarray) and np.ndim(value) == 0:
            return self.of_key(("scalar", str(value.dtype), value.item()))
        return self._number(id(value), value)

    def of_key(self, key: tuple) -> int:
        """The number of a hashable description."""
        return self._number(key, key)

    def same(self, value: Any) -> Any:
        """The first value that is the same as `value`."""
        return self.first[self.of(value)]

    def computed(self, eqn: Any, operands: list, results: list) -> None:
        """Gives the results of equal cheap equations equal numbers."""
        if eqn.primitive.name not in CHEAP:
            return
        params = str(sorted(eqn.params.items(), key=str))
        key = eqn.primitive.name, params, *map(self.of, operands)
        for k, value in enumerate(results):
            self.alive.append(value)
            self.numbers[id(value)] = self._number((*key, k), value)

    def _number(self, key: Any, value: Any) -> int:
        if key not in self.numbers:
            self.numbers[key] = len(self.first)
            self.first.append(value)
        return self.numbers[key]
