"""`prepare`: layouts that a backend reads faster, derived once from the packed form.

Compilers do not move such a reordering out of a program whose weights are arguments, so
it must not be a part of the product. Files hold the canonical arrays alone: prepare
after reading.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flexhinm_jax import promotion
from flexhinm_jax.kernels import cost, dense, dispatch, xla
from flexhinm_jax.paths import is_packed
from flexhinm_jax.types import PackedWeight

FEW, MANY = 1, 4096
"""Numbers of rows for which "auto" and "gpu" prepare."""


@promotion.usual()
def prepare(tree: Any, backend: str = "auto") -> Any:
    """Adds the layouts of a backend to every packed weight of a tree.

    The result is for inference: derivatives with respect to its inputs are fine, those
    with respect to its values are refused.

    Args:
      tree: a `PackedWeight` or any tree with some, such as `result.packed`; stacks
        keep their leading axes.
      backend: "auto" takes what the device at hand would run: on CPUs "xla", "dense"
        or both, on GPUs the kernels that "auto" may take, "dense" or both, whatever is
        predicted to be faster for some number of rows of x; products choose by theirs.
        "gpu" takes the GPU kernels alone, the name of a backend that one. "dense" holds
        the matrix itself and runs one dense product in place of the packed one, also in
        its gradients.

    Returns:
      The same tree with `layouts` filled. The layout of "xla" holds every stored value,
      2 bytes for its column and the bits of its position beside the canonical arrays,
      that of a GPU kernel the bytes of the canonical arrays once more, that of "dense"
      the matrix with its zeros; `packed.nbytes` counts all of it. In bfloat16 2:4 takes
      .56 of the bytes of the matrix, 1.56 with the matrix, 2.13 with a kernel, too.
      Where the matrix is too large to hold ask for "xla" on a CPU, for "gpu" on a GPU
      with a kernel; leave the weight as it is on others, which then write the matrix
      out in every product: memory in place of time.

    Raises:
      ValueError: an unknown backend.
      NotImplementedError: "gpu", and no kernel serves the chip.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> w = jnp.array([[4.0, 1, 0, 3], [0, 2, 5, 1]])
      >>> method = fh.Magnitude(fh.NM(2, 4))
      >>> packed = fh.kernels.pack(method.decide(method.solve(jax.random.key(0), w, None), w))
      >>> sorted(fh.kernels.prepare(packed, "xla").layouts)
      ['xla']
    """  # noqa: E501
    weights = filter(is_packed, jax.tree.leaves(tree, is_leaf=is_packed))
    cached = sum(map(_dense_bytes, weights)) <= cost.CACHE
    place = cost.Place(cached, cost.threads())

    def one(leaf: Any) -> Any:
        return _prepared(leaf, backend, place) if is_packed(leaf) else leaf

    return jax.tree.map(one, tree, is_leaf=is_packed)


def strip(tree: Any) -> Any:
    """The same tree without any layouts: what files and training want.

    Args:
      tree: any tree; leaves that are no `PackedWeight` stay.

    Returns:
      The tree as it was before `prepare`.
    """

    def one(leaf: Any) -> Any:
        return dataclasses.replace(leaf, layouts={}) if is_packed(leaf) else leaf

    return jax.tree.map(one, tree, is_leaf=is_packed)


def _dense_bytes(packed: PackedWeight) -> int:
    matrices = math.prod(packed.out_order.shape[:-1])
    return matrices * math.prod(packed.shape) * packed.dtype.itemsize


def _prepared(packed: PackedWeight, backend: str, place: cost.Place) -> PackedWeight:
    bare = strip(packed.core)
    known, layouts = dispatch.known(), dict(packed.layouts)
    for name in _names(bare, backend, place):
        layouts[name] = known[name].layout(bare)
    if backend == "auto" and dispatch.capability():
        if _runs_matrix(dataclasses.replace(bare, layouts=layouts)):
            layouts[dense.NAME] = known[dense.NAME].layout(bare)
    if (ready := layouts.get(xla.NAME)) is not None:
        layouts[xla.NAME] = dataclasses.replace(ready, place=place)
    return dataclasses.replace(packed, layouts=layouts)


def _names(packed: PackedWeight, backend: str, place: cost.Place) -> tuple[str, ...]:
    if backend not in ("auto", "gpu"):
        if backend not in dispatch.known():
            raise ValueError(
                f"backend={backend!r} is unknown; choose one of auto, gpu, "
                f"{', '.join(dispatch.known())}"
            )
        return (backend,)
    dtype = jnp.result_type(packed.dtype)
    if backend == "auto" and dispatch.capability() and not dispatch.opted_in():
        return ()
    rows = [jax.ShapeDtypeStruct((n, packed.shape[1]), dtype) for n in (FEW, MANY)]
    names = dict.fromkeys(name for x in rows for name in dispatch.served(x, packed))
    if not names and backend == "gpu":
        raise NotImplementedError(
            "no GPU kernel serves this weight here; see kernels.assume"
        )
    if names or dispatch.capability():
        return tuple(names)
    return _names_on_cpu(packed, place)


def _runs_matrix(packed: PackedWeight) -> bool:
    """Whether a GPU runs some number of rows of x fastest with the matrix itself."""
    layouts = packed.layouts | {dense.NAME: ()}
    held = dataclasses.replace(packed, layouts=layouts)
    for _ in range(packed.out_order.ndim - 1):
        held = jax.tree.map(lambda a: a[0], held)
    side, dtype = packed.shape[1], jnp.result_type(packed.dtype)
    rows = [jax.ShapeDtypeStruct((n, side), dtype) for n in (*cost.ROWS, MANY)]
    choices = [dispatch.choose("auto", x, held, transposed=False) for x in rows]
    return any(choice.cuda is None for choice in choices)


def _names_on_cpu(packed: PackedWeight, place: cost.Place) -> tuple[str, ...]:
    """What some number of rows of x runs fastest with."""
    if packed.values_dtype != jnp.float32:
        # The matrix would be widened in every product.
        return (xla.NAME,)
    holds = {cost.holds(rows, packed, place) for rows in cost.ROWS}
    return tuple(dense.NAME if held else xla.NAME for held in sorted(holds))
