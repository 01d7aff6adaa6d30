"""How solving went, per leaf: numbers, and a sentence where a person should know.

Methods that move weights leave scalars in their states, such as the damping that the
Gram matrix needed or the iterations that were done.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flexhinm_jax.methods import Method
from flexhinm_jax.pruning.solve import method_for
from flexhinm_jax.types import State, Uses


def worst(facts: Mapping[str, Any]) -> dict[str, float | bool]:
    """One number per name for a whole stack: the largest, or whether all are true."""
    arrays = {name: np.asarray(x) for name, x in facts.items()}
    return {
        name: bool(x.all()) if x.dtype == bool else x.max().item()
        for name, x in arrays.items()
    }


def facts(
    method: Method, states: Mapping[str, State], uses: Uses
) -> dict[str, dict[str, float | bool]]:
    """Path -> the worst numbers of every leaf; empty where a method reports none.

    Args:
      method: the method that solved.
      states: concrete states from `solve`.
      uses: from `discover`.
    """
    found = {}
    for path, state in states.items():
        found[path] = worst(method_for(method, uses.leaves[path]).diagnostics(state))
    return found


def notes(method: Method, states: Mapping[str, State], uses: Uses) -> dict[str, str]:
    """Path -> what a person should know, for the leaves that need a word.

    Args:
      method: the method that solved.
      states: concrete states from `solve`.
      uses: from `discover`.
    """
    found = {}
    for path, numbers in facts(method, states, uses).items():
        text = method_for(method, uses.leaves[path]).note(numbers)
        if text:
            found[path] = text
    return found
