"""Statistics of the inputs of every weight, streamed over calibration batches.

The function runs as it is; at every contraction of a leaf the other operand is read as
tokens `[*stack, tokens, i]` and X^T X is added to a running sum. Activations are never
kept. Leaves that contract the same inputs share one sum.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexhinm_jax import arguments, checks
from flexhinm_jax.paths import leaf_paths
from flexhinm_jax.tracing import jax_versions
from flexhinm_jax.tracing.contractions import Product
from flexhinm_jax.tracing.finder import find
from flexhinm_jax.tracing.program import Skeleton, is_array, run, split, trace
from flexhinm_jax.tracing.stops import Where
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.tracing.walker import Visitor
from flexhinm_jax.types import Stats, Use, Uses

logger = logging.getLogger("flexhinm_jax")

Sums = dict[str, dict[str, Array]]


def calibrate(
    apply_fn: Callable,
    params: Any,
    uses: Uses,
    batches: Iterable[Any],
    *,
    gram: bool = True,
    memory_limit: int | None = None,
    token_mask: Callable[..., Array] | None = None,
) -> dict[str, Stats]:
    """Takes the statistics of the inputs of every prunable leaf.

    Sums are float32 with the highest matmul precision. All uses of a leaf that read it
    in the layout of its first use are summed; several that contract the same input
    (windows of a fused projection) count it once. A branch of a cond that is not taken
    adds no tokens; a loop adds those of every step.

    Args:
      apply_fn: pure function, called as apply_fn(params, *batch).
      params: dense parameters.
      uses: what `discover` found for the same function.
      batches: tuples of the other arguments, or single arguments; read once, in order.
        Traced once per batch shape.
      gram: take X^T X; False keeps the norms and means alone.
      memory_limit: bytes that the statistics may take, None for any.
      token_mask: called as token_mask(*batch), gives booleans whose shape is a prefix
        of the token axes, such as [batch, length]; tokens with False are left out.
        Where the shape is not a prefix of the token axes of a product, all its tokens
        count.

    Returns:
      leaf path -> statistics, each array with the stack axes of the leaf in front.
      Leaves that share inputs share the arrays.

    Raises:
      ValueError: no batches, more memory than the limit, a batch whose program lacks a
        use, or statistics that are not finite.
    """
    arguments.found(uses)
    arguments.batches(batches)
    arguments.concrete(params)
    if token_mask is not None:
        arguments.function(token_mask, "token_mask", "token_mask(*batch)")
    if memory_limit is not None:
        arguments.count(memory_limit, "memory_limit", 0)
    owners = share(uses)
    need = statistics_bytes(uses, gram=gram)
    logger.info("statistics of %d leaves take %d bytes", len(owners), need)
    if memory_limit is not None and need > memory_limit:
        remedy = "calibrate fewer leaves at a time with rules={...: 'skip'}"
        if gram:
            less = statistics_bytes(uses, gram=False)
            remedy += f", or pass gram=False ({less} bytes)"
        raise ValueError(
            f"the statistics take {need} bytes, more than memory_limit={memory_limit}; "
            f"raise the limit, {remedy}"
        )
    sums = zeros(uses, owners, params, gram)
    step = make_step(apply_fn, uses, owners, token_mask)
    empty = True
    for batch in batches:
        arrays, skeleton = split(
            (params, batch if isinstance(batch, tuple) else (batch,))
        )
        sums, empty = step(sums, arrays, skeleton), False
    if empty:
        raise ValueError("batches is empty: give at least one batch to run")
    return finish(sums, uses, owners, params)


def finite_parameters(params: Any) -> None:
    """Raises ValueError for the first leaf that has a NaN or an infinity."""
    for path, leaf in Leaves.of(params).items():
        floating = is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        if floating and getattr(leaf, "is_fully_addressable", True):
            checks.finite(leaf, "the parameter", path)


def statistics_bytes(uses: Uses, gram: bool = True) -> int:
    """Bytes that the statistics of `uses` take; shared statistics count once.

    Args:
      uses: from `discover`.
      gram: with the Gram matrices, which take nearly all of it.

    Returns:
      Bytes of float32 sums on the device, known before anything is computed.

    Example:
      >>> import jax.numpy as jnp
      >>> from flexhinm_jax.tracing.discover import discover
      >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
      >>> statistics_bytes(discover(lambda p, x: x @ p["w"], params, x))
      292
    """
    arguments.found(uses)
    owners = share(uses)
    total = 0
    for path, use in uses.leaves.items():
        if owners[path] == path:
            i = use.layout.matrix_shape[1]
            per_matrix = i * i + i + 1 if gram else 2 * i + 1
            total += 4 * math.prod(use.layout.stack_shape) * per_matrix
    return total


def blank(size: int, stack: tuple[int, ...] = ()) -> Stats:
    """Shapes of the statistics that every product gets."""
    made: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return Stats(
        sq_norm=made((*stack, size)),
        mean=made((*stack, size)),
        count=made(stack),
        gram=made((*stack, size, size)),
    )


def counted(uses: Uses) -> dict[str, list[Use]]:
    """Leaf path -> the uses that enter its statistics, one per distinct input."""
    out: dict[str, dict[tuple, Use]] = {}
    first = uses.leaves
    for use in uses:
        if use.layout == first[use.path].layout:
            out.setdefault(use.path, {}).setdefault((use.source, use.at), use)
    return {path: list(kept.values()) for path, kept in out.items()}


def share(uses: Uses) -> dict[str, str]:
    """Leaf path -> the first leaf with the very same inputs, which keeps the sums."""
    owners: dict[frozenset, str] = {}
    out = {}
    for path, kept in counted(uses).items():
        inputs = frozenset((use.source, use.at) for use in kept)
        out[path] = owners.setdefault(inputs, path)
    return out


def zeros(uses: Uses, owners: dict[str, str], params: Any, gram: bool) -> Sums:
    """Empty sums, replicated over the mesh of the parameters if they have one."""
    shapes = {}
    for path, use in uses.leaves.items():
        if owners[path] == path:
            stack, i = use.layout.stack_shape, use.layout.matrix_shape[1]
            second = {"gram": (*stack, i, i)} if gram else {"sq_norm": (*stack, i)}
            shapes[path] = {"total": (*stack, i), "count": stack, **second}
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(params)]
    meshes = [getattr(sharding, "mesh", None) for sharding in shardings]
    meshes = [mesh for mesh in meshes if isinstance(mesh, Mesh)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None

    def build() -> Sums:
        return jax.tree.map(
            lambda shape: jnp.zeros(shape, jnp.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    return jax.jit(build, out_shardings=everywhere)()


def make_step(
    apply_fn: Callable,
    uses: Uses,
    owners: dict[str, str],
    token_mask: Callable[..., Array] | None,
) -> Callable:
    """A jitted (sums, arrays, skeleton) -> sums that adds one batch."""
    wanted = {
        use.key: use
        for path, kept in counted(uses).items()
        if owners[path] == path
        for use in kept
    }

    @functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
    def step(sums: Sums, arrays: list[Any], skeleton: Skeleton) -> Sums:
        params, batch = skeleton.fill(arrays)
        program, paths = trace(apply_fn, params, batch, {}), leaf_paths(params)
        here = {use.key: (at, use) for at, use in find(program, params, paths).uses()}
        for key, use in wanted.items():
            if key not in here or here[key][1].layout != use.layout:
                raise ValueError(
                    f"the program of this batch has no use {key[1]} of {key[0]!r} as "
                    "discover found it; call discover with a batch like this one"
                )
        places = {(key[0], here[key][0]): use for key, use in wanted.items()}
        mask = None if token_mask is None else jnp.asarray(token_mask(*batch))
        mesh = jax_versions.explicit_mesh(arrays)
        if mesh is not None:
            sums = jax_versions.replicated(sums, mesh)
        return run(program, params, paths, Accumulate(places, mask), sums)[1]

    return step


@dataclasses.dataclass
class Accumulate(Visitor):
    """Adds the tokens of every wanted product to the sums.

    Attributes:
      places: (leaf path, position of the equation) -> use.
      mask: booleans over leading token axes, or None.
    """

    places: dict[tuple[str, Where], Use]
    mask: Array | None

    def product(self, where: Where, product: Product, state: Sums) -> tuple[Any, Sums]:
        """Adds one product; it runs dense."""
        use = self.places.get((product.weight.path, where))
        if use is None:
            return None, state
        fitted = product.fit(use.layout)
        assert fitted is not None, "find and walk disagree"
        index = [fitted.index.get(f) for f in use.layout.stack]

        def add(own: dict, operand: Array, index: list, mask: Array | None) -> dict:
            at = tuple(slice(None) if i is None else i for i in index)
            x, n = read(fitted, operand, mask)
            highest = {
                "precision": lax.Precision.HIGHEST,
                "preferred_element_type": jnp.float32,
            }
            found = {"total": x.sum(axis=-2), "count": n}
            if "gram" in own:
                found["gram"] = jnp.einsum("...ti,...tj->...ij", x, x, **highest)
            else:
                found["sq_norm"] = jnp.square(x).sum(axis=-2)
            share = 1.0 / copies(operand)
            return {k: own[k].at[at].add(share * found[k]) for k in own}

        own = jax_versions.automatic(
            add, None, state[use.path], product.operand, index, self.mask
        )
        return None, {**state, use.path: own}

    def enter(self, state: Sums, axes: tuple[str, ...]) -> Sums:
        """Every device of a shard_map starts from zero."""
        del axes
        manual = tuple(jax_versions.context_manual_axes())
        return jax.tree.map(
            lambda x: jax_versions.varying(jnp.zeros(x.shape, x.dtype), manual), state
        )

    def leave(self, state: Sums, local: Sums, axes: tuple[str, ...]) -> Sums:
        """The sums of all devices."""
        return jax.tree.map(lambda x, y: x + lax.psum(y, axes), state, local)


def copies(x: Array) -> int:
    """How many devices of the surrounding shard_maps hold these same tokens."""
    varying, sizes = jax_versions.varying_axes(x), jax_versions.context_manual_axes()
    return math.prod(n for axis, n in sizes.items() if axis not in varying)


def read(product: Product, operand: Array, mask: Array | None) -> tuple[Array, Array]:
    """(tokens f32[*stacked, t, i] with those masked out zero, their number)."""
    x = product.tokens(operand).astype(jnp.float32)
    count = math.prod(product.free)
    if mask is None or mask.shape != product.free[: mask.ndim]:
        return x, jnp.full((), count, jnp.float32)
    rest = product.free[mask.ndim :]
    keep = mask.reshape(mask.shape + (1,) * len(rest))
    keep = jnp.broadcast_to(keep, product.free).reshape(-1)
    return jnp.where(keep[:, None], x, 0.0), keep.sum(dtype=jnp.float32)


def finish(
    sums: Sums, uses: Uses, owners: dict[str, str], params: Any = ()
) -> dict[str, Stats]:
    """The sums as statistics.

    Raises:
      ValueError: a statistic that is not finite, by the parameter or the leaf.
    """
    done: dict[str, Stats] = {}
    for path in dict.fromkeys(owners.values()):
        own = sums.pop(path)
        if not np.isfinite(jax.device_get(sum(x.sum() for x in own.values()))):
            bad = [name for name, x in own.items() if not bool(jnp.isfinite(x).all())]
            if bad:
                finite_parameters(params)
                raise ValueError(
                    f"the inputs of {path!r} contain NaN or Inf, or overflow in "
                    f"{', '.join(bad)}; look at the calibration batches and at the "
                    "activations before this leaf (the parameters are finite)"
                )
        gram = own.get("gram")
        diagonal = None if gram is None else jnp.diagonal(gram, axis1=-2, axis2=-1)
        done[path] = Stats(
            sq_norm=own["sq_norm"] if diagonal is None else diagonal,
            mean=own["total"] / jnp.maximum(own["count"], 1.0)[..., None],
            count=own["count"],
            gram=gram,
        )
    return {path: done[owners[path]] for path in uses.leaves}
