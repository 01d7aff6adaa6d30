"""Everything that depends on the version of jax: tested on the oldest and the newest.

jax 0.10 keeps open and closed jaxprs apart, returns `(subfuns, params)` from
`get_bind_params` and counts the operands of a scan; from 0.11 on there is one jaxpr
class, one dict of parameters and a tree of scan operands. The rest of the package sees
neither.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import source_info_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Runs one equation as it is written.

    Args:
      eqn: equation of a jaxpr.
      operands: one value per input of the equation.

    Returns:
      One value per output. Derivative rules, shardings, name stack and mesh are those
      of the equation.
    """
    params = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = params if isinstance(params, tuple) else ((), params)
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    trace = eqn.source_info.traceback
    with source_info_util.user_context(trace, name_stack=names), eqn.ctx.manager:
        results = eqn.primitive.bind(*subfuns, *operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def on_device(x: Any) -> Any:
    """An array of the host on the default device, 64 bits narrowed as JAX does.

    `jnp.asarray` compiles a program for the copy of every shape it has not met, 20 ms
    each, and packed weights have as many shapes as a model has matrices.

    Args:
      x: host array, or anything else that `jnp.asarray` takes.
    """
    if not isinstance(x, np.ndarray):
        return jnp.asarray(x)
    return jax.device_put(x.copy())  # a CPU takes the memory as its own


def with_shapes(eqn: Any, operands: Sequence[Any]) -> Any:
    """The same equation for operands of other shapes.

    Args:
      eqn: equation of a jaxpr.
      operands: one array or `jax.ShapeDtypeStruct` per input.
    """
    traced = jax.make_jaxpr(lambda *xs: bind(eqn, xs))(*operands)
    return opened(traced)[0].eqns[-1]


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr, and the values of its `constvars`."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def scan_operands(params: dict[str, Any], operands: list) -> tuple[list, list, list]:
    """Operands of a scan as (constants, initial carry, scanned arrays)."""
    if "ft_in" in params:
        consts, carry, xs = params["ft_in"].update(operands).unpack()
        return list(consts), list(carry), list(xs)
    first = params["num_consts"]
    last = first + params["num_carry"]
    return operands[:first], operands[first:last], operands[last:]


def called_jaxpr(params: dict[str, Any]) -> Any:
    """The jaxpr of a call-like equation."""
    return params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]


def function_name(params: dict[str, Any]) -> str:
    """Name of the Python function behind a call-like equation."""
    info = getattr(opened(called_jaxpr(params))[0], "debug_info", None)
    return getattr(info, "func_name", None) or "unknown"


def shard_map(f: Callable, params: dict[str, Any], in_specs: Any, out_specs: Any):
    """`f` mapped over the mesh and manual axes of a shard_map equation."""
    return jax.shard_map(
        f,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=frozenset(manual_axes(params)),
        check_vma=params["check_vma"],
    )


def manual_axes(params: dict[str, Any]) -> tuple[str, ...]:
    """Mesh axes that a shard_map equation makes manual, in the order of the mesh."""
    axes = params["newly_manual_axes"]
    return tuple(name for name in params["mesh"].axis_names if name in axes)


def varying_axes(x: Any) -> frozenset[str]:
    """Manual mesh axes over which the value of `x` differs from device to device."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def varying(x: Array, axes: Sequence[str]) -> Array:
    """`x` seen as a value that may differ along the manual mesh axes `axes`."""
    missing = tuple(a for a in axes if a not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def varying_alike(tree: Any) -> Any:
    """`tree`, every array varying over all manual mesh axes that one varies over."""
    own = map(varying_axes, jax.tree.leaves(tree))
    axes = sorted(frozenset[str]().union(*own))
    return jax.tree.map(lambda leaf: varying(leaf, axes), tree)


def varying_over(tree: Any, axis_name: str) -> Any:
    """`tree`, every array varying over a mapped axis, so that gradients do too.

    Inside a `jax.shard_map` that checks what varies (`check_vma`), the gradient with
    respect to a value that is equal on all devices is summed over them at once. Other
    maps, and a `shard_map` that does not check, leave the tree as it is.
    """
    if axis_name not in context_manual_axes():
        return tree
    return jax.tree.map(lambda leaf: varying(leaf, (axis_name,)), tree)


def explicit_mesh(tree: Any) -> Any:
    """The mesh with explicit axes on which some array of `tree` lives, or None."""
    for x in jax.tree.leaves(tree):
        mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def replicated(tree: Any, mesh: Any) -> Any:
    """`tree` with every array replicated over an explicit mesh."""
    return jax.sharding.reshard(tree, NamedSharding(mesh, PartitionSpec()))


def automatic(f: Callable, out: Any, *args: Any) -> Any:
    """f(*args), letting the compiler choose the shardings inside `f`.

    Under an explicit mesh every operation must say how its result is sharded, which
    code written for any shape cannot. Everything array-valued that `f` reads must come
    in through `args`.

    Args:
      f: function of arrays.
      out: shardings or specs of the results, a prefix of their tree; results without
        one on the mesh are replicated. None for all.
      *args: trees of arrays.

    Returns:
      What `f` returns.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return f(*args)

    def placed(where: Any) -> NamedSharding:
        if isinstance(where, PartitionSpec):
            return NamedSharding(mesh, where)
        on_mesh = getattr(where, "mesh", None) == mesh
        return where if on_mesh else NamedSharding(mesh, PartitionSpec())

    out = placed(None) if out is None else jax.tree.map(placed, out)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    return jax.sharding.auto_axes(f, axes=axes, out_sharding=out)(*args)


def context_manual_axes() -> dict[str, int]:
    """Axis name -> size of the mesh axes that are manual here, inside shard_maps."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in mesh.manual_axes}
