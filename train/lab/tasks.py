"""What a program trains: parameters, their uses, a loss, batches and an evaluation.

Several seeds are trained at once, as lanes of one program: every leaf has a leading
axis over the seeds. To the library such a leaf is a stack of matrices, so methods,
masks and optimisers treat the lanes independently and nothing is compiled per seed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax.paths import leaf_paths
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.types import AxisFactor, Layout, Use, Uses


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and its data, over `lanes` seeds at once.

    Attributes:
      name: for titles and file names.
      digest: fingerprint of the data and seeds.
      lanes: number of seeds; every leaf of `params` has it as its first axis.
      params: the start.
      uses: what can be pruned, with the lanes as a stack.
      loss_fn: (params, batch) -> f32[], mean over the lanes.
      batch_at: step -> batch; the same batch for the same step.
      evaluate: params -> metric -> one number per lane.
    """

    name: str
    digest: str
    lanes: int
    params: Any
    uses: Uses
    loss_fn: Callable[[Any, Any], Array]
    batch_at: Callable[[int], Any]
    evaluate: Callable[[Any], dict[str, np.ndarray]]


def lift(uses: Uses, lanes: int) -> Uses:
    """The uses of a model whose leaves got a leading axis over lanes.

    Args:
      uses: of the model without lanes.
      lanes: length of the new axis.
    """

    def shifted(factors: tuple[AxisFactor, ...]) -> tuple[AxisFactor, ...]:
        return tuple(dataclasses.replace(f, axis=f.axis + 1) for f in factors)

    def lifted(use: Use) -> Use:
        old = use.layout
        layout = Layout(
            shape=(lanes, *old.shape),
            stack=(AxisFactor(0, 1, lanes), *shifted(old.stack)),
            out=shifted(old.out),
            inputs=shifted(old.inputs),
        )
        return dataclasses.replace(use, layout=layout, at=(None, *use.at))

    return Uses(tuple(map(lifted, uses.prunable)), uses.skipped)


def started(
    init: Callable[[Array], Any],
    apply_fn: Callable[..., Any],
    example: Any,
    rules: Sequence[tuple[str, Any]],
    seeds: Sequence[int],
) -> tuple[Any, Uses]:
    """The parameters of a model, one lane per seed, and their uses.

    Args:
      init: key -> parameters of one lane.
      apply_fn: (parameters of one lane, input) -> output.
      example: an input, may be abstract.
      rules: as in `fh.discover`.
      seeds: of the lanes.
    """
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    params = jax.jit(jax.vmap(init))(keys)
    one = jax.tree.map(lambda x: x[0], params)
    uses = discover(apply_fn, one, example, rules=dict(rules))
    return params, lift(uses, len(seeds))


def over_lanes(
    run: Callable[..., Any], lanes: int, shared: bool = False
) -> Callable[..., Any]:
    """`run(params, *batch)` for every lane; results get a leading axis over them.

    Args:
      run: for one lane.
      lanes: number of lanes.
      shared: whether all lanes get the same batch, which then has no axis over them.
    """

    # A batched product or convolution costs more than a plain one.
    def one(params: Any, *batch: Any) -> Any:
        first = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
        found = run(first(params), *(batch if shared else first(batch)))
        return jax.tree.map(lambda x: x[None], found)

    def several(params: Any, *batch: Any) -> Any:
        axes = (0, *(None if shared else 0 for _ in batch))
        return jax.vmap(run, axes)(params, *batch)

    return one if lanes == 1 else several


def zeros(task: Task, params: Any) -> np.ndarray:
    """Fraction of the prunable weights that are exactly zero, per lane."""
    return 1 - _kept(task, params).mean(1)


def moved(task: Task, start: Any, params: Any) -> np.ndarray:
    """Fraction of the weights kept in `params` that were zero in `start`, per lane."""
    before, after = _kept(task, start), _kept(task, params)
    return (after & ~before).sum(1) / np.maximum(after.sum(1), 1)


def _kept(task: Task, params: Any) -> np.ndarray:
    """bool[lanes, prunable weights], True where a weight is not zero."""
    leaves = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
    found = [np.asarray(leaves[path] != 0) for path in task.uses.leaves]
    return np.concatenate([x.reshape(task.lanes, -1) for x in found], axis=1)
