"""Traced functions of parameters: the door through which a transform walks in."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from flexhinm_jax import arguments, jax_versions, promotion
from flexhinm_jax.kernels import unpack
from flexhinm_jax.tracing import meshes, views
from flexhinm_jax.tracing.contractions import Tracked, plain
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.tracing.walker import Visitor, walk
from flexhinm_jax.types import Layout, PackedWeight


class Skeleton(NamedTuple):
    """A tree without its arrays; hashable when its static leaves are."""

    tree: Any
    leaves: tuple[Any, ...]

    def fill(self, arrays: Sequence[Any]) -> Any:
        """The tree with `arrays` in place."""
        it = iter(arrays)
        return self.tree.unflatten([next(it) if x is ARRAY else x for x in self.leaves])


ARRAY = type("Array", (), {"__repr__": lambda self: "<array>"})()


def is_array(x: Any) -> bool:
    """Whether a leaf is data rather than configuration."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def split(tree: Any) -> tuple[list[Any], Skeleton]:
    """(arrays, everything else) of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [x for x in leaves if is_array(x)]
    return arrays, Skeleton(
        structure, tuple(ARRAY if is_array(x) else x for x in leaves)
    )


class Program(NamedTuple):
    """A traced function.

    Attributes:
      jaxpr: the closed jaxpr; its inputs are the arrays of the parameters, then the
        rest.
      out: structure of the outputs.
      arrays: one array per input; abstract for a packed leaf.
      parameters: how many of them are parameters.
    """

    jaxpr: Any
    out: Any
    arrays: list[Any]
    parameters: int


def trace(apply_fn: Callable, leaves: Leaves, args: tuple, kwargs: dict) -> Program:
    """Traces apply_fn(params, *args, **kwargs) with packed leaves made abstract."""
    arguments.apply_function(apply_fn)
    changed = {path: abstract(leaves[path]) for path in leaves.packed}
    arrays, skeleton = split((leaves.tree(changed), args, kwargs))
    count = sum(map(is_array, leaves.values())) + len(changed)

    def flat_fn(*arrays: Any) -> Any:
        params, args, kwargs = skeleton.fill(arrays)
        with arguments.calling("apply_fn(params, *batch)", args):
            return apply_fn(params, *args, **kwargs)

    jaxpr, out = jax.make_jaxpr(flat_fn, return_shape=True)(*arrays)
    return Program(jaxpr, jax.tree.structure(out), arrays, count)


def shapes_of(arrays: Sequence[Any]) -> list[Any]:
    """Shapes and dtypes; arrays on a mesh with explicit axes as they are."""
    return [
        x
        if meshes.explicit(x) is not None
        else jax.ShapeDtypeStruct(
            x.shape, x.dtype, weak_type=getattr(x, "weak_type", False)
        )
        for x in arrays
    ]


def form_of(tree: Any) -> Any:
    """Hashable, and equal for arguments with which one program can be run."""
    leaves, structure = jax.tree.flatten(tree)
    forms = tuple(
        (x.shape, x.dtype, getattr(x, "weak_type", False), meshes.explicit(x))
        if hasattr(x, "dtype")
        else (type(x), x)
        for x in leaves
    )
    try:
        hash(forms)
    except TypeError:  # something static that cannot be compared: traced every time
        return object()
    return structure, forms


def abstract(packed: PackedWeight) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the dense form of a packed leaf."""
    return jax.ShapeDtypeStruct(layout_of(packed).shape, packed.dtype)


def layout_of(packed: PackedWeight) -> Layout:
    """The layout of a packed leaf, also when it is a plain `[o, i]` matrix."""
    if packed.layout is not None:
        return packed.layout
    return views.plain_layout((*packed.out_order.shape[:-1], *packed.shape))


def dense_leaf(packed: PackedWeight) -> jax.Array:
    """A packed leaf as the array it came from."""

    def run(packed: PackedWeight) -> jax.Array:
        return views.leaf(unpack(packed), layout_of(packed))

    return jax_versions.automatic(run, None, packed)


def run(
    program: Program,
    leaves: Leaves,
    visitor: Visitor,
    state: Any,
    arrays: Sequence[Any] | None = None,
) -> tuple[list[Any], Any]:
    """Walks a traced program with its weights tracked: floating, or of eight bits.

    Args:
      program: the program.
      leaves: of the parameters, dense or packed.
      visitor: what to do at each product.
      state: what the visitor accumulates, any tree of arrays.
      arrays: values for the inputs of the program; those it was traced with by default.

    Returns:
      (flat outputs, state).
    """
    operands = list(program.arrays if arrays is None else arrays)
    inputs, on_grid = iter(range(len(operands))), leaves.on_grid
    for path, leaf in leaves.items():
        if path in leaves.packed:
            layout, k = layout_of(leaf), next(inputs)
            operands[k] = Tracked(
                path,
                layout.shape,
                views.whole(layout.shape),
                lambda leaf=leaf: dense_leaf(leaf),
                leaf,
                layout.stack,
                path in on_grid,
            )
        elif is_array(leaf):
            k = next(inputs)
            if path in on_grid or jnp.issubdtype(leaf.dtype, jnp.floating):
                value, shape = operands[k], tuple(leaf.shape)
                operands[k] = Tracked(
                    path,
                    shape,
                    views.whole(shape),
                    lambda value=value: value,
                    on_grid=path in on_grid,
                )
    with promotion.usual():  # what the visitor does; the program has its dtypes
        outs, state = walk(program.jaxpr, operands, visitor, state)
        return plain(outs), state
