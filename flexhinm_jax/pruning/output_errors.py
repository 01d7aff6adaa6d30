"""How much of the outputs of every weight is lost, from Gram matrices alone."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from flexhinm_jax.ops import gram
from flexhinm_jax.pruning import apply
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Plan, Stats, Uses


def output_errors(
    plans: Mapping[str, Plan],
    params: Any,
    uses: Uses,
    stats: Mapping[str, Stats] | None,
) -> dict[str, float]:
    """Relative errors of the outputs, where the Gram matrix of the inputs is known.

    Args:
      plans: path -> plan, from `decide`.
      params: the dense parameters.
      uses: from `discover`.
      stats: from `calibrate`; None gives no errors.

    Returns:
      Path -> || X (W' - W) ||^2 / || X W ||^2.
    """
    errors, leaves = {}, Leaves.of(params)
    for path, use in uses.leaves.items():
        h = None if stats is None or path not in stats else stats[path].gram
        if h is not None:
            before = leaves.matrix(use).astype(jnp.float32)
            lost = apply.dense_weight(plans[path]).astype(jnp.float32) - before
            # A weight that saw no input has lost nothing of its outputs.
            total = max(float(jnp.sum(gram.energy(before, h))), 1e-30)
            errors[path] = float(jnp.sum(gram.energy(lost, h))) / total
    return errors
