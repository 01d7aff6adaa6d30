"""Training on many devices: meshes, legal shardings, where every array lives.

One step runs everywhere: on one device, under `jax.pmap`, and under `jit` on a mesh
with automatic or explicit axes. Masks are chosen on gathered weights from the same key,
so they are equal on every device and process. A weight may be sharded for the training
as long as no shard splits a group, a vector or a tile: packing and kernels work on
those.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexhinm_jax import arguments
from flexhinm_jax.methods import Method
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.patterns import Pattern
from flexhinm_jax.pruning import solve
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import AxisFactor, Use, Uses


def make_mesh(
    data: int, model: int = 1, *, explicit: bool = False, devices: Any = None
) -> Mesh:
    """A mesh with the axes "data" and "model".

    Args:
      data: devices that share a batch.
      model: devices that share a weight.
      explicit: axes of type Explicit (shardings are part of types) instead of Auto.
      devices: to choose from; None for all.

    Raises:
      ValueError: fewer devices than asked for.
    """
    arguments.count(data, "data", 1)
    arguments.count(model, "model", 1)
    devices = jax.devices() if devices is None else list(devices)
    if data * model > len(devices):
        raise ValueError(
            f"data={data}, model={model}: need {data * model} devices and there are "
            f"{len(devices)}; ask for fewer, or start with XLA_FLAGS="
            f"--xla_force_host_platform_device_count={data * model} to try it on a CPU"
        )
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(kind, kind),
        devices=devices[: data * model],
    )


def shard_batch(batch: Any, mesh: Mesh, axis: str = "data") -> Any:
    """The batch with its first axis over the devices of a mesh axis.

    With several processes every process gives its own part of the batch.

    Raises:
      ValueError: a leaf whose first axis the devices do not divide.
    """
    if axis not in mesh.shape:
        raise ValueError(
            f"axis={axis!r}: the mesh has the axes {', '.join(mesh.axis_names)}"
        )
    count = mesh.shape[axis] // jax.process_count()
    sharding = NamedSharding(mesh, P(axis))

    def put(path: tuple, x: Any) -> jax.Array:
        rows = np.shape(x)[0] if np.ndim(x) else 0
        _check_rows(rows, max(count, 1), jax.tree_util.keystr(path) or "batch")
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree_util.tree_map_with_path(put, batch)


def split_batch(batch: Any, devices: int, axis: int = 0) -> Any:
    """The batch with a leading device axis, for `jax.pmap`.

    Args:
      batch: tree of arrays.
      devices: how many share it, each a whole part.
      axis: of the examples.

    Raises:
      ValueError: a leaf whose axis of examples the devices do not divide.
    """
    arguments.count(devices, "devices", 1)

    def split(path: tuple, x: Any) -> Any:
        rows = np.shape(x)[axis] if np.ndim(x) > axis else 0
        _check_rows(rows, devices, jax.tree_util.keystr(path) or "batch")
        parts = devices, rows // devices
        cut = x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1 :])
        return np.moveaxis(cut, axis, 0)

    return jax.tree_util.tree_map_with_path(split, batch)


def check_sharding(params: Any, uses: Uses, method: Method) -> None:
    """Raises ValueError where a shard splits a group, a vector or a tile.

    Args:
      params: parameters with their shardings; single devices and numpy pass.
      uses: from `discover`.
      method: for its pattern, or that of a rule.

    Raises:
      ValueError: naming the leaf, what is split, and a legal sharding.
    """
    check_method(method)
    leaves = Leaves.of(params).dense(uses)
    for path, use in uses.leaves.items():
        where = getattr(leaves[path], "sharding", None)
        if isinstance(where, NamedSharding):
            pattern = solve.method_for(method, use).pattern
            _check_leaf(path, use, where, pattern)


def gather(x: Any) -> Any:
    """Every array of a tree that lives on a mesh, whole on each of its devices."""
    mesh = mesh_of(x)
    return x if mesh is None else put(x, jax.tree.map(lambda _: P(), x), mesh)


def put(x: Any, specs: Any, mesh: Mesh) -> Any:
    """A tree on a mesh, also across processes."""
    shardings = jax.tree.map(lambda _, s: NamedSharding(mesh, s), x, specs)
    if jax.process_count() == 1:
        return jax.device_put(x, shardings)
    x = jax.tree.map(lambda a, s: _global(a, s), x, shardings)
    return jax.jit(lambda x: x, out_shardings=shardings)(x)


def mesh_of(x: Any) -> Mesh | None:
    """The mesh of more than one device that arrays of a tree live on, or None."""
    for leaf in jax.tree.leaves(x):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            mesh = sharding.mesh
            assert isinstance(mesh, Mesh)
            return mesh
    return None


def matrix_spec(use: Use, sharding: NamedSharding) -> P:
    """The spec of the matrix form `[*stack, o, i]` of a leaf with the given sharding.

    Axes of the leaf that are a factor of a group stay sharded only as its major part.
    """
    spec = [*sharding.spec, *[None] * (len(use.layout.shape) - len(sharding.spec))]

    def group(factors: Sequence[AxisFactor]) -> Any:
        return spec[factors[0].axis] if len(factors) == 1 else None

    stack = [group([f]) for f in use.layout.stack]
    whole = [group(use.layout.out), group(use.layout.inputs)]
    sides = [use.layout.out, use.layout.inputs]
    for k, factors in enumerate(sides):
        if len(factors) != 1 or factors[0].size != use.layout.shape[factors[0].axis]:
            whole[k] = None
    return P(*stack, *whole)


def learned_spec(shape: tuple[int, ...], tiles: int | None, use: Use, spec: P) -> P:
    """Where an array that a method learns lives: with its part of the weight.

    Args:
      shape: [*stack, t, v, groups, ...] or [*stack, o, groups, ...], one entry per row
        and group, or [*stack, tiles of rows, tiles of columns].
      tiles: t, or None where rows have no tiles.
      use: of the weight.
      spec: of its matrix form, see `matrix_spec`.

    Returns:
      The spec; everywhere for other shapes. Groups that shards do not divide are
      whole, which `check_sharding` refuses before.
    """
    n = len(use.layout.stack)
    o, i = use.layout.matrix_shape
    stack, rows, columns = spec[:n], spec[n], spec[n + 1]
    own = list(shape[n:])
    if shape == (*use.layout.stack_shape, o, i):
        return spec
    if tiles is not None and own[:2] == [tiles, o // tiles] and len(own) > 2:
        # a single tile is not cut, its rows are
        lead = (None, rows) if tiles == 1 else (rows, None)
        return P(*stack, *lead, columns if i % own[2] == 0 else None)
    fits = len(own) > 1 and o % own[0] == 0 and i % own[1] == 0
    if fits and (own[0] == o or len(own) == 2):
        return P(*stack, rows, columns)
    return P()


def divided(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The spec without the axes that its devices do not divide."""

    def whole(axis: int, names: Any) -> Any:
        if names is None:
            return None
        all_names = names if isinstance(names, tuple) else (names,)
        shards = math.prod(mesh.shape[name] for name in all_names)
        return names if shape[axis] % shards == 0 else None

    return P(*(whole(axis, names) for axis, names in enumerate(spec)))


def places(x: Any) -> Any:
    """Where every array of a tree lives, if that is a mesh: results go back there."""
    kinds = jax.tree.map(lambda leaf: leaf.sharding, x)
    on_mesh = [k for k in jax.tree.leaves(kinds) if isinstance(k, NamedSharding)]
    return kinds if on_mesh else None


def _check_rows(rows: int, devices: int, name: str) -> None:
    if rows == 0 or rows % devices:
        raise ValueError(
            f"{name}: {rows} rows do not divide over {devices} devices; choose a batch "
            f"size that is a multiple of {devices}, such as "
            f"{max(round(rows / devices), 1) * devices}"
        )


def _check_leaf(path: str, use: Use, sharding: NamedSharding, pattern: Pattern) -> None:
    units = pattern.units()
    for side, factors, unit in (
        ("outputs", use.layout.out, units.rows),
        ("inputs", use.layout.inputs, units.columns),
    ):
        run = _run(use, sharding, factors)
        if run is None or (unit is not None and run % unit == 0):
            continue
        what, why = _reason(pattern, side, unit, run)
        legal = _proposal(pattern, use, sharding)
        raise ValueError(
            f"{path}: sharding {sharding.spec} on a mesh of {dict(sharding.mesh.shape)}"
            f" splits {what}: {why}. {legal}"
        )


def _run(
    use: Use, sharding: NamedSharding, factors: Sequence[AxisFactor]
) -> int | None:
    """Consecutive channels that one shard holds; None when the side is whole."""
    minor, consecutive = 1, None
    for factor in reversed(factors):
        spec = sharding.spec
        names = spec[factor.axis] if factor.axis < len(spec) else None
        names = () if names is None else names if isinstance(names, tuple) else (names,)
        shards = math.prod(sharding.mesh.shape[name] for name in names)
        length = use.layout.shape[factor.axis] // shards  # of the leaf axis, per shard
        inside = max(1, min(factor.size, length // factor.stride))
        if inside < factor.size and consecutive is None:
            consecutive = inside * minor
        minor *= factor.size
    return consecutive


def _reason(pattern: Pattern, side: str, unit: int | None, run: int) -> tuple[str, str]:
    units = pattern.units()
    part = units.row_part if side == "outputs" else units.column_part
    if unit is not None:
        return part, f"a shard holds {run} consecutive {side}, not a multiple of {unit}"
    if side == "inputs":
        return part, f"{pattern} chooses columns among all {side}"
    return part, f"{pattern} puts rows of all shards into one tile"


def _proposal(pattern: Pattern, use: Use, sharding: NamedSharding) -> str:
    """A sharding that is legal, in words and as a spec."""
    rows = pattern.units().rows
    out = use.layout.out[0].axis
    spec: list[Any] = [None] * len(use.layout.shape)
    names = [n for n in sharding.mesh.axis_names if sharding.mesh.shape[n] > 1]
    outputs = math.prod(f.size for f in use.layout.out)
    fits = [
        n
        for n in names
        if rows is not None
        and use.layout.shape[out] % sharding.mesh.shape[n] == 0
        and (outputs // sharding.mesh.shape[n]) % rows == 0
    ]
    if not fits:
        text = f"Replicate it: {P(*spec)}"
        if rows is None:
            text += ", or use permute=None and shard the outputs"
        return text
    name = "model" if "model" in fits else fits[-1]
    spec[out] = name
    return f"Legal is {P(*spec)}, the outputs over {name!r}"


def _global(x: Any, sharding: NamedSharding) -> Any:
    """An array of this process alone as a global one; a global one as it is."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _global(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    replicated = NamedSharding(sharding.mesh, P())
    value = np.asarray(x)
    return jax.make_array_from_callback(
        value.shape, replicated, lambda index: value[index]
    )
