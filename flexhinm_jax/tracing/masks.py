"""Which entries of every value of a program belong to tokens that count.

A token mask is given for axes of the batch. Every value computed from the batch gets
booleans of its own, broadcastable against it: size 1 along axes that are no token
axes. Primitives that move values around move their booleans the same way; elementwise
ones take what all operands say; a contraction or reduction keeps a result to which some
token that counts contributes. What none of this fits is `Lost`, and whoever needs it is
told so.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from flexhinm_jax import jax_versions
from flexhinm_jax.tracing.contractions import Followed, Product
from flexhinm_jax.tracing.convolutions import Window, window_params
from flexhinm_jax.tracing.views import Where


class Lost(NamedTuple):
    """The mask of a value is not known. A tree without arrays."""


#: Booleans broadcastable against a value, `Lost`, or None where no mask applies.
Keep = Any


class Masks:
    """The masks of the values of a walk.

    Attributes:
      mask: the token mask of the batch.
      known: id of a value -> its mask.
      reached: (leaf, position of a product) -> whether the mask reaches its tokens.
    """

    def __init__(self, mask: Array, batch: Sequence[Any]):
        """Gives the mask to every array of the batch whose leading axes it has."""
        self.mask = mask = jax_versions.automatic(jnp.asarray, None, mask)
        self.known: dict[int, Keep] = {}
        self.alive: list[Any] = []
        self.reached: dict[tuple[str, Where], bool] = {}
        for x in batch:
            if tuple(x.shape[: mask.ndim]) == tuple(mask.shape):
                ones = (1,) * (x.ndim - mask.ndim)
                self.put(x, mask.reshape(mask.shape + ones))

    def tokens(self, where: Where, product: Product, varies: bool) -> Array | None:
        """Which tokens of a product count, as `Product.kept`; None for all.

        Where the mask of the operand is not known, its token axes are compared with
        those of the mask.

        Args:
          where: position of the product.
          product: the product.
          varies: whether the operand depends on the batch.
        """
        keep, mask = self.of(product.operand), self.mask
        valid = None
        if keep is not None and not isinstance(keep, Lost):
            valid = jax_versions.automatic(product.kept, None, keep)
        # Lost, but the token axes have the shape of the mask: most programs keep them.
        elif tuple(mask.shape) == product.free[: mask.ndim]:
            rest = (1,) * (len(product.free) - mask.ndim)
            valid = jnp.broadcast_to(mask.reshape(mask.shape + rest), product.free)
            valid = valid.reshape(-1)
        self.reached[product.weight.path, where] = valid is not None or not varies
        return valid

    def missed(self, paths: Iterable[str]) -> list[str]:
        """Those of the leaves with a product that the mask does not reach.

        Raises:
          ValueError: it reaches none of all leaves.
        """
        if self.reached and not any(self.reached.values()):
            raise ValueError(
                f"token_mask gave booleans of shape {list(self.mask.shape)}, which are "
                "no leading axes of what any weight multiplies; give one of the shape "
                "of the tokens, such as [batch, length]"
            )
        lost = {path for (path, _), good in self.reached.items() if not good}
        return [path for path in paths if path in lost]

    def of(self, value: Any) -> Keep:
        """The mask of a value."""
        return None if isinstance(value, Followed) else self.known.get(id(value))

    def put(self, value: Any, keep: Keep) -> None:
        """Notes the mask of a value."""
        if keep is not None and not isinstance(value, Followed):
            self.alive.append(value)
            self.known[id(value)] = keep

    def follow(self, eqn: Any, operands: list, results: list) -> None:
        """Notes the masks of what an equation returns."""
        keeps = [self.of(v) for v in operands]
        if all(keep is None for keep in keeps):
            return
        shapes = [tuple(v.aval.shape) for v in eqn.invars]
        if any(0 in shape for shape in shapes):
            return
        arrays = [None if isinstance(v, Followed) else v for v in operands]
        find = functools.partial(_result, eqn, shapes)
        masks = jax_versions.automatic(find, None, keeps, arrays)
        for value, keep in zip(results, masks, strict=True):
            self.put(value, keep)


def has_program(eqn: Any) -> bool:
    """Whether an equation runs another program."""
    values = jax.tree.leaves(list(eqn.params.values()))
    return any(hasattr(v, "eqns") or hasattr(v, "jaxpr") for v in values)


def join(*keeps: Keep) -> Keep:
    """One form for masks of a value that takes several ways to one place."""
    if any(isinstance(k, Lost) for k in keeps):
        return Lost()
    shapes = [k.shape for k in keeps if k is not None]
    if not shapes:
        return None
    return jax.ShapeDtypeStruct(np.broadcast_shapes(*shapes), np.bool_)


def shaped(keep: Keep, like: Keep) -> Keep:
    """A mask in the form that `join` found."""
    if like is None or isinstance(like, Lost):
        return like
    keep = jnp.ones((), bool) if keep is None else keep
    return jnp.broadcast_to(keep, like.shape)


def both(*keeps: Keep) -> Keep:
    """What all masks agree on; the known ones decide."""
    known = [k for k in keeps if k is not None and not isinstance(k, Lost)]
    if known:
        return functools.reduce(jnp.logical_and, known)
    return Lost() if any(isinstance(k, Lost) for k in keeps) else None


def _result(eqn: Any, shapes: list, keeps: list, operands: list) -> list[Keep]:
    """The masks of the results of an equation; an operand that is a leaf is None."""
    name, outs = eqn.primitive.name, [tuple(v.aval.shape) for v in eqn.outvars]
    if has_program(eqn):
        return [Lost() for _ in outs]
    rule = RULES.get(name)
    if rule is not None and name not in JOINING and isinstance(keeps[0], Lost):
        return [Lost() for _ in outs]
    if rule is not None:
        masks = rule(eqn, shapes, keeps, operands)
        return masks if isinstance(masks, list) else [masks]
    if name not in MIXING and len(outs) == 1 and _is_elementwise(shapes, outs[0]):
        return [both(*keeps)]
    return [Lost() for _ in outs]


def _is_elementwise(shapes: list, out: tuple[int, ...]) -> bool:
    """Whether operands are scalars or have the shape of the result, ones aside."""
    whole = [shape for shape in shapes if shape]
    if any(len(shape) != len(out) for shape in whole):
        return False
    return all(n in (1, m) for shape in whole for n, m in zip(shape, out, strict=True))


def _reshape(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    del operands
    keep, old, new = keeps[0], shapes[0], tuple(eqn.outvars[0].aval.shape)
    if eqn.params.get("dimensions") is not None:
        return Lost()
    wide, out = [], []
    for before, after in _groups(old, new):
        masked = any(keep.shape[d] != 1 for d in before)
        wide += [old[d] if masked else 1 for d in before]
        out += [new[d] if masked else 1 for d in after]
    return jnp.broadcast_to(keep, wide).reshape(out)


def _groups(old: tuple, new: tuple) -> list[tuple[range, range]]:
    """The least groups of consecutive axes that a reshape turns into each other."""
    i = j = 0
    groups = []
    while i < len(old) or j < len(new):
        first, second, before, after = i, j, 1, 1
        if i < len(old):
            before, i = old[i], i + 1
        if j < len(new):
            after, j = new[j], j + 1
        while before != after:
            if before < after:
                before, i = before * old[i], i + 1
            else:
                after, j = after * new[j], j + 1
        groups.append((range(first, i), range(second, j)))
    return groups


def _transpose(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    del shapes, operands
    return keeps[0].transpose(eqn.params["permutation"])


def _broadcast(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    del shapes, operands
    out = [1] * eqn.outvars[0].aval.ndim
    for d, n in zip(eqn.params["broadcast_dimensions"], keeps[0].shape, strict=True):
        out[d] = n
    return keeps[0].reshape(out)


def _slice(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    del operands
    p, keep = eqn.params, keeps[0]
    strides = p["strides"] or (1,) * keep.ndim
    spans = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    cut = [
        slice(*span) if n == full else slice(None)
        for span, n, full in zip(spans, keep.shape, shapes[0], strict=True)
    ]
    return keep[tuple(cut)]


def _split(eqn: Any, shapes: list, keeps: list, operands: list) -> list[Keep]:
    del operands
    keep, axis, sizes = keeps[0], eqn.params["axis"], eqn.params["sizes"]
    if keep.shape[axis] != shapes[0][axis]:
        return [keep] * len(sizes)
    return jnp.split(keep, np.cumsum(sizes)[:-1], axis)


def _rev(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    del shapes, operands
    return jnp.flip(keeps[0], eqn.params["dimensions"])


def _dynamic_slice(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    keep, starts, sizes = keeps[0], list(operands[1:]), list(eqn.params["slice_sizes"])
    for d, (n, full) in enumerate(zip(keep.shape, shapes[0], strict=True)):
        if n != full:
            starts[d], sizes[d] = jnp.zeros_like(starts[d]), 1
    return lax.dynamic_slice(keep, starts, sizes)


def _full(keep: Keep, shape: Sequence[int]) -> Array:
    return jnp.broadcast_to(jnp.ones((), bool) if keep is None else keep, shape)


def _dynamic_update(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    del eqn
    if any(isinstance(k, Lost) for k in keeps[:2]):
        return Lost()
    whole, part = (_full(k, s) for k, s in zip(keeps, shapes[:2], strict=False))
    return lax.dynamic_update_slice(whole, part, operands[2:])


def _concatenate(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    del operands
    if any(isinstance(k, Lost) for k in keeps):
        return Lost()
    axis, out = eqn.params["dimension"], list(eqn.outvars[0].aval.shape)
    masked = [k.shape for k in keeps if k is not None]
    if all(shape[axis] == 1 for shape in masked) and None not in keeps:
        if len({k.shape for k in keeps}) == 1:
            return both(*keeps)
    wide = [
        n if any(shape[d] == n for shape in masked) else 1 for d, n in enumerate(out)
    ]
    parts = []
    for k, shape in zip(keeps, shapes, strict=True):
        wide[axis] = shape[axis]
        parts.append(_full(k, wide))
    return jnp.concatenate(parts, axis)


def _stack(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    del operands
    if any(isinstance(k, Lost) for k in keeps):
        return Lost()
    like = join(*(k for k in keeps))
    del shapes
    return jnp.stack([_full(k, like.shape) for k in keeps], eqn.params["axis"])


def _pad(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    del operands
    keep, config = keeps[0], eqn.params["padding_config"]
    pairs = zip(keep.shape, shapes[0], config, strict=True)
    own = [edge if n == full else (0, 0, 0) for n, full, edge in pairs]
    return lax.pad(keep, jnp.ones((), bool), own)


def _reduce(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    del shapes, operands
    return keeps[0].any(axis=tuple(eqn.params["axes"]))


def _top_k(eqn: Any, shapes: list, keeps: list, operands: list) -> list[Keep]:
    """Values and positions of the largest along the last axis."""
    keep, axis = keeps[0], eqn.params.get("axis", len(shapes[0]) - 1)
    if keep.shape[axis] == 1:
        return [keep, keep]
    value = operands[0]
    at = lax.top_k(jnp.moveaxis(value, axis, -1), eqn.params["k"])[1]
    whole = jnp.moveaxis(_full(keep, shapes[0]), axis, -1)
    picked = jnp.moveaxis(jnp.take_along_axis(whole, at, -1), -1, axis)
    return [picked, picked]


def _sort(eqn: Any, shapes: list, keeps: list, operands: list) -> list[Keep]:
    """Operands move together; where tokens are sorted, their mask moves with them."""
    axis, together = eqn.params["dimension"], both(*keeps)
    count = len(shapes)
    if any(v is None for v in operands):
        return [Lost()] * count
    if isinstance(together, Lost) or together.shape[axis] == 1:
        return [together] * count
    keys = {k: eqn.params[k] for k in ("dimension", "is_stable", "num_keys")}
    moved = lax.sort((*operands, _full(together, shapes[0])), **keys)[-1]
    return [moved] * count


def _gather(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    """Rows of the operand keep their mask, and those that a token asked for its own."""
    numbers, sizes = eqn.params["dimension_numbers"], list(eqn.params["slice_sizes"])
    out, masks = eqn.outvars[0].aval.ndim, []
    keep, ids = keeps[0], keeps[1]
    if keep is not None and not isinstance(keep, Lost):
        whole = [
            full if n != 1 or sizes[d] != full else 1
            for d, (n, full) in enumerate(zip(keep.shape, shapes[0], strict=True))
        ]
        own = [min(n, full) for n, full in zip(sizes, whole, strict=True)]
        masks.append(
            lax.gather(
                jnp.broadcast_to(keep, whole),
                operands[1],
                numbers,
                tuple(own),
                mode=lax.GatherScatterMode.CLIP,
            )
        )
    if ids is not None and not isinstance(ids, Lost):
        tokens = ids.any(axis=-1)
        rest = iter(tokens.shape)
        places = [1 if d in numbers.offset_dims else next(rest) for d in range(out)]
        masks.append(tokens.reshape(places))
    return both(*masks, *(k for k in (keep, ids) if isinstance(k, Lost)))


def _scatter(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    """Where something was written, some token that counts wrote it."""
    keep, ids, update = keeps
    if any(isinstance(k, Lost) for k in keeps):
        return Lost()
    numbers, updates = eqn.params["dimension_numbers"], shapes[2]
    if ids is not None:
        tokens = ids.any(axis=-1)
        rest = iter(tokens.shape)
        window = numbers.update_window_dims
        places = [1 if d in window else next(rest) for d in range(len(updates))]
        ids = tokens.reshape(places)
    wrote = _full(both(update, ids), updates).astype(jnp.float32)

    def added(values: Array) -> Array:
        zeros = jnp.zeros(shapes[0], jnp.float32)
        return lax.scatter_add(
            zeros, operands[1], values, numbers, mode=eqn.params["mode"]
        )

    written = added(jnp.ones(updates, jnp.float32)) > 0
    return jnp.where(written, added(wrote) > 0, _full(keep, shapes[0]))


def _dot(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    """A result counts if some token that counts contributes to it."""
    contracted, batch = eqn.params["dimension_numbers"]
    sides = []
    for k, keep in enumerate(keeps):
        free = [
            d for d in range(len(shapes[k])) if d not in (*contracted[k], *batch[k])
        ]
        sides.append((keep, contracted[k], batch[k], free))
    known = [s for s in sides if s[0] is not None and not isinstance(s[0], Lost)]
    if not known:
        return Lost()
    # Attention mixes tokens and keeps the queries' axis: a result is its query's. A sum
    # over tokens alone, as a dispatch to experts, has to ask who contributes.
    mixed = any(k.shape[d] != 1 for k, c, _, _ in known for d in c)
    stays = any(k.shape[d] != 1 for k, _, _, f in known for d in f)
    if mixed and not stays and all(v is not None for v in operands):
        return _contributes(eqn, shapes, keeps, operands)
    masks, ones = [], [len(side[3]) for side in sides]
    for keep, c, b, f in known:
        piece = keep.transpose([*b, *f, *c]).any(
            axis=tuple(range(len(b) + len(f), keep.ndim))
        )
        own = piece.shape[len(b) :]
        left = (1,) * ones[0]
        right = (1,) * ones[1]
        tail = (*own, *right) if f is sides[0][3] else (*left, *own)
        masks.append(piece.reshape(*piece.shape[: len(b)], *tail))
    return both(*masks)


def _contributes(eqn: Any, shapes: list, keeps: list, operands: list) -> Array:
    """Whether a token that counts is part of a sum over tokens, such as a dispatch."""
    left, right = [
        ((v != 0) & _full(None if isinstance(k, Lost) else k, shape)).astype(
            jnp.float32
        )
        for v, k, shape in zip(operands, keeps, shapes, strict=True)
    ]
    numbers = eqn.params["dimension_numbers"]
    return lax.dot_general(left, right, numbers, precision=lax.Precision.HIGHEST) > 0


def _convolution(eqn: Any, shapes: list, keeps: list, operands: list) -> Keep:
    """The result has the mask of its window; see `Window.kept`."""
    del operands
    if keeps[0] is None:
        return Lost()
    p, result = eqn.params, eqn.outvars[0].aval.shape
    lhs, rhs, out = p["dimension_numbers"]
    kernel = tuple(shapes[1][d] for d in rhs[2:])
    space = tuple(result[d] for d in out[2:])
    window = Window(tuple(lhs), kernel, 1, space, window_params(p))
    keep = window.kept(keeps[0], shapes[0])[:, None]
    return keep.transpose([int(d) for d in np.argsort(out)])


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("reshape", "squeeze"), _reshape),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "rev": _rev,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    **dict.fromkeys(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax "
        "argmin".split(),
        _reduce,
    ),
    "top_k": _top_k,
    "sort": _sort,
    "gather": _gather,
    **dict.fromkeys(
        "scatter scatter-add scatter_add scatter_mul scatter_min scatter_max".split(),
        _scatter,
    ),
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
}

#: Rules that decide themselves what an operand with a lost mask means.
JOINING = frozenset(
    "concatenate stack dynamic_update_slice gather scatter scatter-add scatter_add "
    "scatter_mul scatter_min scatter_max sort dot_general".split()
)

#: Primitives whose result has the shape of an operand, but not its positions.
MIXING = frozenset(
    "fft cholesky lu qr eigh eig svd schur triangular_solve tridiagonal_solve "
    "all_to_all ppermute pshuffle all_gather reduce_scatter reduce_window "
    "reduce_window_sum reduce_window_max reduce_window_min select_and_scatter_add "
    "select_and_gather_add rng_bit_generator random_bits threefry2x32".split()
)
