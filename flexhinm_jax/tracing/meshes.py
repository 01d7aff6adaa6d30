"""Arrays on meshes: explicit axes made automatic, arrays of several processes whole.

On a mesh with explicit axes every operation must say how its result is sharded, which
solvers written for one matrix cannot. So a model is traced and run on its mesh as it
is, and everything after that happens on the same devices under automatic axes; nothing
is copied.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flexhinm_jax import checks, promotion


def released(tree: Any) -> Any:
    """The tree with explicit axes made automatic; other leaves as they are."""

    def one(x: Any) -> Any:
        mesh = explicit(x)
        return x if mesh is None else relabelled(x, twin(mesh, AxisType.Auto))

    return mapped(one, tree)


def bound(tree: Any, mesh: Mesh) -> Any:
    """The tree with arrays of the automatic twin of a mesh on the mesh itself."""
    auto = twin(mesh, AxisType.Auto)

    def one(x: Any) -> Any:
        sharding = getattr(x, "sharding", None)
        on_twin = isinstance(sharding, NamedSharding) and sharding.mesh == auto
        return relabelled(x, mesh) if on_twin else x

    return mapped(one, tree)


def explicit(x: Any) -> Mesh | None:
    """The mesh with explicit axes that a concrete array lives on, or None."""
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return None
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    return sharding.mesh if AxisType.Explicit in sharding.mesh.axis_types else None


def twin(mesh: Mesh, kind: AxisType) -> Mesh:
    """The same mesh with axes of one type."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(kind,) * mesh.devices.ndim)


def relabelled(x: Array, mesh: Mesh) -> Array:
    """The same buffers as an array on another mesh of the same form."""
    sharding = NamedSharding(mesh, x.sharding.spec)  # type: ignore[attr-defined]
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.extended):
        return jax.device_put(x, sharding)
    parts = [part.data for part in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)


@contextlib.contextmanager
def automatic() -> Iterator[None]:
    """Inside, a mesh that `jax.set_mesh` has set has automatic axes."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # inside a jit it belongs to the caller
        mesh = None
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        yield
        return
    with jax.set_mesh(twin(mesh, AxisType.Auto)):
        yield


def under_automatic_axes(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, run under automatic axes where arrays it is given have explicit ones.

    Arrays that it returns are on the mesh that it was given.
    """

    @functools.wraps(f)
    @promotion.usual()
    def run(*args: Any, **options: Any) -> Any:
        meshes = map(explicit, jax.tree.leaves((args, options)))
        mesh = next((m for m in meshes if m is not None), None)
        if mesh is None:
            return f(*args, **options)
        args, options = released((args, options))
        with automatic():
            return bound(f(*args, **options), mesh)

    return run


def whole(tree: Any) -> Any:
    """The tree with every array readable in every process."""

    def one(x: Any) -> Any:
        if not spread(x):
            return x
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
        return jax.jit(lambda x: x, out_shardings=everywhere)(x)

    return mapped(one, tree)


def spread(x: Any) -> bool:
    """Whether an array has parts that this process cannot read."""
    concrete = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    return concrete and not (x.is_fully_addressable or x.is_fully_replicated)


def check_finite(w: Any, path: str) -> None:
    """Raises ValueError for a weight with NaN or infinity, wherever its parts are."""
    if not (spread(w) and bool(jax.numpy.isfinite(w).all())):
        checks.finite(whole(w), "weight", path)


def placed(x: Any, like: Array) -> Array:
    """An array that every process has whole, where another one lives.

    One that nobody has put there is not bound to its device either: a program that
    meets arrays of both kinds is compiled for each mixture of them.
    """
    if isinstance(like.sharding, NamedSharding):
        return jax.device_put(host(x), like.sharding)
    return jax.device_put(x, like.sharding if like.committed else None)


def host(tree: Any) -> Any:
    """The tree with numpy arrays."""
    return mapped(lambda x: np.asarray(whole(x)), tree)


def mapped(f: Callable[[Any], Any], tree: Any) -> Any:
    """`jax.tree.map`, but dictionaries keep the order of their keys."""
    if type(tree) is dict:
        return {key: mapped(f, x) for key, x in tree.items()}
    return jax.tree.map(f, tree)
