"""Statistics of the inputs of every weight, streamed over calibration batches.

The function runs as it is; at every contraction of a leaf the other operand is read as
tokens `[*stack, tokens, i]` and X^T X is added to a running sum. A constant that the
program multiplies the leaf with goes to the tokens: they are what the leaf itself is
contracted with. Activations are never kept. Leaves that contract the same inputs share
one sum. What a product saw, which of its tokens count, and what sums become of them is
the same where a model is pruned in one pass (`sequential`).
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexhinm_jax import arguments, checks, jax_versions, promotion
from flexhinm_jax.tracing.contractions import Chunk, Product, equation
from flexhinm_jax.tracing.discover import Finder, Traced
from flexhinm_jax.tracing.masks import Masks
from flexhinm_jax.tracing.program import Skeleton, is_array, run, split
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.tracing.views import Where
from flexhinm_jax.tracing.walker import Visitor
from flexhinm_jax.types import Stats, Use, Uses

logger = logging.getLogger("flexhinm_jax")

#: What the patches of a convolution may take at a time.
CHUNK_BYTES = 1 << 26

Sums = dict[str, dict[str, Array]]

HIGHEST: dict[str, Any] = {
    "precision": lax.Precision.HIGHEST,
    "preferred_element_type": jnp.float32,
}

#: Inputs from which on a Gram matrix is summed in bands.
MIN_BANDED_WIDTH = 768


@promotion.usual()
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
    (windows of a fused projection) count it once. What a window of the inputs of a leaf
    sees are tokens with zeros elsewhere. A constant that the program multiplies a
    leaf with is part of the inputs. A branch of a cond that is not taken adds no
    tokens; a loop adds those of every step, under `jax.vmap` until the element ends.

    Args:
      apply_fn: pure function, called as apply_fn(params, *batch).
      params: dense parameters.
      uses: what `discover` found for the same function.
      batches: tuples of the other arguments, or single arguments; read once, in order.
        Traced once per batch shape.
      gram: take X^T X; False keeps the norms and means alone.
      memory_limit: bytes that the statistics may take, None for any; the patches of
        convolutions, made for some images or rows at a time, fit into the rest.
      token_mask: called as token_mask(*batch), gives booleans over leading axes of the
        batch, such as [batch, length]; tokens with False are left out. The mask follows
        the values through reshapes, transposes, sorts, gathers, loops and contractions
        to every product; leaves that it cannot be followed to are named in a warning,
        and all their tokens count.

    Returns:
      leaf path -> statistics, each array with the stack axes of the leaf in front.
      Leaves that share inputs share the arrays.

    Raises:
      ValueError: no batches or an empty one, more memory than the limit, a batch whose
        program lacks a use, a token mask that is not boolean or reaches no product, or
        statistics that are not finite.
    """
    arguments.found(uses)
    arguments.batches(batches)
    arguments.parameters(params)
    arguments.concrete(params)
    options = {"gram": gram, "memory_limit": memory_limit, "token_mask": token_mask}
    leaves = Leaves.of(params)
    return calibrate_leaves(Traced.of(apply_fn), leaves, uses, batches, **options)


def calibrate_leaves(
    traced: Traced,
    leaves: Leaves,
    uses: Uses,
    batches: Iterable[Any],
    *,
    gram: bool = True,
    memory_limit: int | None = None,
    token_mask: Callable[..., Array] | None = None,
) -> dict[str, Stats]:
    """`calibrate` of leaves, uses and batches that are what they should be."""
    if token_mask is not None:
        arguments.function(token_mask, "token_mask", "token_mask(*batch)")
    if memory_limit is not None:
        arguments.count(memory_limit, "memory_limit", 0)
    owners, wanted = share(uses)
    need = bytes_of(uses, owners, gram)
    logger.info("statistics of %d leaves take %d bytes", len(owners), need)
    if memory_limit is not None and need > memory_limit:
        remedy = f"calibrate fewer leaves at a time with {arguments.say('skip')}"
        if gram:
            less = bytes_of(uses, owners, False)
            remedy += f", or pass gram=False ({less} bytes)"
        raise ValueError(
            f"the statistics take {need} bytes, more than memory_limit={memory_limit}; "
            f"raise the limit, {remedy}"
        )
    sums = zeros(uses, owners, leaves, gram)
    left = CHUNK_BYTES if memory_limit is None else memory_limit - need
    empty = True
    step = make_step(wanted, token_mask, min(CHUNK_BYTES, left))
    for batch in batches:
        batch = batch if isinstance(batch, tuple) else (batch,)
        arguments.untraced(batch, "a batch")
        finder = traced.find(leaves, batch)
        sums, empty = step(sums, *split((leaves, batch)), finder), False
    if empty:
        raise ValueError("batches is empty: give at least one batch to run")
    done = {}
    for path in dict.fromkeys(owners.values()):
        done[path] = finish(path, sums.pop(path), leaves)
    return {path: done[owners[path]] for path in uses.leaves}


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
    return bytes_of(uses, share(uses)[0], gram)


def bytes_of(uses: Uses, owners: Mapping[str, str], gram: bool) -> int:
    """`statistics_bytes` of leaves that share sums as `owners` says."""
    total = 0
    for path, use in uses.leaves.items():
        if owners[path] == path:
            i = use.layout.matrix_shape[1]
            per_matrix = i * i + i + 1 if gram else 2 * i + 1
            total += 4 * math.prod(use.layout.stack_shape) * per_matrix
    return total


def blank(size: int, stack: tuple[int, ...] = ()) -> Stats:
    """Shapes of the statistics that every product gets."""
    f32: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return Stats(
        sq_norm=f32((*stack, size)),
        mean=f32((*stack, size)),
        count=f32(stack),
        gram=f32((*stack, size, size)),
    )


def counted(uses: Uses) -> dict[str, list[Use]]:
    """Leaf path -> the uses that enter its statistics, one per distinct input."""
    out: dict[str, dict[tuple, Use]] = {}
    first = uses.leaves
    for use in uses.prunable:
        if use.layout == first[use.path].layout:
            out.setdefault(use.path, {}).setdefault((use.source, use.at), use)
    return {path: list(kept.values()) for path, kept in out.items()}


def share(uses: Uses) -> tuple[dict[str, str], list[Use]]:
    """Which leaves share sums, and what is added to them.

    Returns:
      Leaf path -> the first leaf with the very same inputs, which keeps the sums; the
      uses whose inputs are added up.
    """
    owners: dict[frozenset, str] = {}
    of, wanted = {}, []
    for path, kept in counted(uses).items():
        inputs = frozenset((use.source, use.at) for use in kept)
        of[path] = owners.setdefault(inputs, path)
        if of[path] == path:
            wanted += kept
    return of, wanted


def zeros(uses: Uses, owners: dict[str, str], leaves: Leaves, gram: bool) -> Sums:
    """Empty sums, replicated over the mesh of the parameters if they have one."""
    shapes = {}
    for path, use in uses.leaves.items():
        if owners[path] == path:
            stack, i = use.layout.stack_shape, use.layout.matrix_shape[1]
            second = {"gram": (*stack, i, i)} if gram else {"sq_norm": (*stack, i)}
            shapes[path] = {"total": (*stack, i), "count": stack, **second}
    shardings = [getattr(x, "sharding", None) for x in leaves.values()]
    meshes = [getattr(sharding, "mesh", None) for sharding in shardings]
    meshes = [mesh for mesh in meshes if isinstance(mesh, Mesh)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None

    def build() -> Sums:
        return jax.tree.map(
            lambda shape: jnp.zeros(shape, jnp.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    return jax.jit(build, out_shardings=everywhere)() if meshes else build()


def make_step(
    wanted: list[Use],
    token_mask: Callable[..., Array] | None,
    chunk_bytes: int,
) -> Callable[..., Sums]:
    """A jitted (sums, arrays, skeleton, finder) -> sums that adds one batch.

    Args:
      wanted: the uses whose inputs are added up.
      token_mask: as in `calibrate`.
      chunk_bytes: of tokens that are read at a time.
    """

    @functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
    def step(sums: Sums, arrays: list[Any], skeleton: Skeleton, finder: Finder) -> Sums:
        leaves, batch = skeleton.fill(arrays)
        mesh = jax_versions.explicit_mesh(arrays)
        if mesh is not None:
            sums = jax_versions.replicated(sums, mesh)
        of_batch, masks = arrays[finder.program.parameters :], None
        if token_mask is not None:
            masks = Masks(booleans(token_mask, batch), of_batch)
        visitor = Accumulate(places(finder, wanted), finder, chunk_bytes, masks)
        sums = run(finder.program, leaves, visitor, sums, arrays)[1]
        warn_missed(masks, dict.fromkeys(use.path for use in wanted))
        return sums

    return step


def places(finder: Finder, wanted: list[Use]) -> dict[tuple[str, Where], Use]:
    """(leaf path, position in the program of a batch) -> wanted use.

    Raises:
      ValueError: the program lacks one of them.
    """
    here = {use.key: (where, use) for where, use in finder.uses}
    out = {}
    for use in wanted:
        where, same = here.get(use.key, ((), None))
        if same is None or same.layout != use.layout:
            raise ValueError(
                f"the program of this batch has no use {use.ordinal} of {use.path!r} "
                "as discover found it; call discover with a batch like this one"
            )
        out[use.path, where] = use
    return out


@dataclasses.dataclass
class Accumulate(Visitor):
    """Adds the tokens of every wanted product to the sums.

    Attributes:
      places: (leaf path, position of the equation) -> use.
      finder: what the program does.
      chunk_bytes: what patches of a convolution may take at a time.
      masks: the token masks of the values, or None.
    """

    places: dict[tuple[str, Where], Use]
    finder: Finder
    chunk_bytes: int
    masks: Masks | None = None
    counts = True

    def product(self, where: Where, product: Product, state: Sums) -> tuple[Any, Sums]:
        """Adds one product; it runs dense."""
        use = self.places.get((product.weight.path, where))
        fitted = None if use is None else product.fit(use.layout)
        valid = None
        if self.masks is not None:
            varies = any(self.finder.dependence[equation(where)])
            valid = self.masks.tokens(where, fitted or product, varies)
        if use is None:
            return None, state
        assert fitted is not None, "find and walk disagree"
        if fitted.least_bytes > self.chunk_bytes:
            raise ValueError(
                f"{use.path}: one row of the patches of this convolution takes "
                f"{fitted.least_bytes} bytes, and memory_limit leaves "
                f"{self.chunk_bytes} beside the statistics; raise it"
            )
        routes = fitted.routes()
        index = [fitted.index.get(f) for f in use.layout.stack]

        def add(
            own: dict,
            operand: Array,
            index: list,
            valid: Array | None,
            routes: Array | None,
        ) -> dict:
            at = tuple(slice(None) if i is None else i for i in index)
            tokens = None if valid is None else Tokens(valid)

            def moments(chunk: Chunk) -> dict:
                own_tokens = part(chunk, tokens)
                x = read(chunk, operand, own_tokens, fitted.factor)
                return sums_of(x, own_tokens, "gram" in own)

            new = fitted.summed(moments, self.chunk_bytes, routes)
            # Every device that holds these tokens adds them; `leave` sums over devices.
            share = 1.0 / copies(operand)
            return {k: own[k].at[at].add(share * new[k]) for k in own}

        own = jax_versions.automatic(
            add,
            None,
            state[use.path],
            product.operand,
            index,
            valid,
            routes,
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


class Tokens(NamedTuple):
    """Which tokens of a product count.

    Attributes:
      valid: bool[t], or bool[*stacked, t], whether each one does.
      positions: i32[t], which tokens are meant, or None for all of them in order.
    """

    valid: Any
    positions: Any = None


def part(chunk: Chunk, tokens: Tokens | None) -> Tokens | None:
    """Which tokens of a chunk count; one with positions is the whole product."""
    members = chunk.members
    if tokens is None:
        return None if members is None else Tokens(members)
    valid = tokens.valid
    if tokens.positions is None:
        valid = chunk.rows(valid, axis=-1)
    elif members is not None:
        members = members[tokens.positions]
    return tokens._replace(valid=valid if members is None else valid & members)


def booleans(token_mask: Callable[..., Array], batch: tuple) -> Array:
    """What a token mask gives for a batch.

    Raises:
      ValueError: no booleans.
    """
    mask = jnp.asarray(token_mask(*batch))
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"token_mask gave {mask.dtype}{list(mask.shape)}, need booleans, True for "
            "every token that counts, such as `mask != 0`"
        )
    return mask


def warn_missed(masks: Masks | None, paths: Iterable[str]) -> None:
    """Says which leaves a token mask does not reach."""
    missed = [] if masks is None else masks.missed(paths)
    if missed:
        logger.warning(
            "token_mask cannot be followed to the inputs of %s: all their tokens count",
            ", ".join(missed),
        )


def read(
    chunk: Chunk, operand: Array, tokens: Tokens | None, factor: float | None
) -> Array:
    """What the leaf of a product is multiplied with; a token that counts not is zero.

    Args:
      chunk: which tokens.
      operand: of the product.
      tokens: which of them count; None for all.
      factor: of the product; with one that is not known the tokens stay as they are.

    Returns:
      f32[*stacked, t, i].
    """
    x = chunk.tokens(operand).astype(jnp.float32)
    x = x if factor in (None, 1.0) else x * factor
    return picked(x, tokens)


def picked(x: Array, tokens: Tokens | None) -> Array:
    """The tokens of [*stacked, t, ...] that count, the others zero or left out."""
    if tokens is None:
        return x
    if tokens.positions is not None:
        x = jnp.take(x, tokens.positions, axis=-2)
    return jnp.where(tokens.valid[..., None], x, 0.0)


def sums_of(x: Array, tokens: Tokens | None, gram: bool = True) -> dict[str, Array]:
    """What tokens add to the statistics of their product.

    Args:
      x: f32[*stacked, t, i], from `read`.
      tokens: which of them count; None for all.
      gram: with X^T X; False keeps its diagonal alone.

    Returns:
      "total" f32[*stacked, i]; "count" f32[]; "gram" f32[*stacked, i, i], of which only
      the part on and above the diagonal is right, or "sq_norm" f32[*stacked, i].
    """
    count = jnp.full((), x.shape[-2], jnp.float32)
    if tokens is not None:
        count = jnp.sum(tokens.valid, axis=-1, dtype=jnp.float32)
    squares = upper(x) if gram else jnp.sum(jnp.square(x), axis=-2)
    name = "gram" if gram else "sq_norm"
    return {"total": jnp.sum(x, axis=-2), "count": count, name: squares}


def across(t: Array, x: Array) -> Array:
    """T^T X over tokens, f32[*stacked, o, i]."""
    return jnp.einsum("...to,...ti->...oi", t, x, **HIGHEST)


def upper(x: Array) -> Array:
    """X^T X on and above the diagonal; wide ones in bands, which saves a third."""
    size = x.shape[-1]
    if size < MIN_BANDED_WIDTH:
        return across(x, x)
    edges = np.linspace(0, size, 5).astype(int)
    bands = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = across(x[..., low:high], x[..., low:])
        bands.append(jnp.pad(band, [(0, 0)] * (band.ndim - 1) + [(int(low), 0)]))
    return jnp.concatenate(bands, axis=-2)


@functools.partial(jax.jit, donate_argnums=0)
def symmetric(upper: Array) -> Array:
    """The matrix of which only the part on and above the diagonal is right."""
    return jnp.triu(upper) + jnp.swapaxes(jnp.triu(upper, 1), -1, -2)


def finish(path: str, sums: dict[str, Array], params: Any) -> Stats:
    """The sums of the inputs of one leaf as its statistics; uses them up.

    Args:
      path: the leaf, for the message.
      sums: "total", "count" and "gram" or "sq_norm", as `sums_of` names them.
      params: the parameters, which are searched when the sums are not finite.

    Raises:
      ValueError: a sum that is not finite, by the parameter or the leaf.
    """
    # One number first, so that a healthy leaf costs one transfer; its overflow alone is
    # no fault of the sums.
    if not np.isfinite(jax.device_get(sum(x.sum() for x in sums.values()))):
        bad = [name for name, x in sums.items() if not bool(jnp.isfinite(x).all())]
        if bad:
            finite_parameters(params)
            raise ValueError(
                f"the inputs of {path!r} contain NaN or Inf, or overflow in "
                f"{', '.join(bad)}; look at the calibration batches and at the "
                "activations before this leaf (the parameters are finite)"
            )
    total, gram = sums["total"], None
    count = jnp.broadcast_to(sums["count"], total.shape[:-1])
    if "gram" in sums:
        gram = symmetric(sums.pop("gram"))
        sums["sq_norm"] = jnp.diagonal(gram, axis1=-2, axis2=-1)
    mean = total / jnp.maximum(count, 1.0)[..., None]
    return Stats(sq_norm=sums["sq_norm"], mean=mean, count=count, gram=gram)


def unseen_counts(stats: Mapping[str, Stats] | None) -> dict[str, int]:
    """Leaf path -> how many of its matrices no input reached."""
    return {path: int(unseen(own).sum()) for path, own in (stats or {}).items()}


def unseen(stats: Stats) -> Any:
    """Which matrices of a stack no input reached, bool[*stack]; traced in a trace.

    Their count is 0, or the squares of their inputs are 0 or underflow.
    """
    least = stats.sq_norm.shape[-1] * np.finfo(np.float32).tiny
    squares = jnp.sum(stats.sq_norm, axis=-1)
    if not checks.is_concrete(squares):
        return (stats.count <= 0) | (squares < jnp.float32(least))
    count, squares = jax.device_get((stats.count, squares))
    return (np.asarray(count) <= 0) | (np.asarray(squares, np.float64) < least)


def informed(stats: Stats, blind: Any, weight: Callable[[], Array]) -> Stats:
    """Statistics of unit inputs, all alike, for the matrices that no input reached.

    With them every method decides by the weights alone, under the same pattern, and
    moves none: what was never seen is no reason to remove a weight.

    Args:
      stats: of one leaf.
      blind: from `unseen`.
      weight: gives the matrices of the leaf, [*stack, o, i].
    """
    if checks.is_concrete(blind) and not blind.any():
        return stats

    def instead(known: Any, value: Callable[[Array], Any]) -> Any:
        if known is None:
            return None
        at = jnp.asarray(blind).reshape(blind.shape + (1,) * (known.ndim - blind.ndim))
        return jnp.where(at, jnp.asarray(value(known), known.dtype), known)

    def identity(x: Array) -> Array:
        return jnp.eye(x.shape[-1], dtype=x.dtype)

    return dataclasses.replace(
        stats,
        sq_norm=instead(stats.sq_norm, lambda _: 1.0),
        mean=instead(stats.mean, lambda _: 0.0),
        count=instead(stats.count, lambda _: 1.0),
        gram=instead(stats.gram, identity),
        cross=instead(stats.cross, lambda _: weight()),
        target_mean=instead(stats.target_mean, lambda _: 0.0),
        sq_grad=instead(stats.sq_grad, lambda _: 1.0),
        fisher=instead(stats.fisher, identity),
    )


def unseen_note(blind: np.ndarray) -> str:
    """What a person should know about matrices that no input reached; "" for none."""
    if not blind.any():
        return ""
    places = [tuple(map(int, at)) for at in np.argwhere(blind)]
    names = ", ".join(str(at[0] if len(at) == 1 else at) for at in places[:8])
    more = f" and {len(places) - 8} more" * (len(places) > 8)
    which = f"matrices {names}{more} of its stack" if not blind.all() else "it"
    return (
        f"no calibration input reached {which}, so weights are kept by magnitude; give "
        "batches that reach it"
    )
