"""Checks on eight fake devices; run as a program by `test_meshes.py`, one name per
call.

The number of devices is fixed when jax starts, so these cannot share a process with the
other tests.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flexhinm_jax as fh
from flexhinm_jax.paths import leaf_paths
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.tracing.sparsify import sparsify
from tests.tracing.cases import assert_close, dense_tree, normal, packed_tree

EXPLICIT = jax.make_mesh((4, 2), ("data", "model"))
AUTO = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
X = normal(8, 3, 8)


def put(tree, mesh, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def compare(apply_fn, sharded, params, args, plain_fn=None, gradient=False):
    """Everything on the mesh equals everything on one device."""
    plain_fn = plain_fn or apply_fn
    mesh_params, mesh_args = sharded
    uses = discover(apply_fn, mesh_params, *mesh_args)
    want_uses = discover(plain_fn, params, *args)
    assert {u.path for u in uses} <= {u.path for u in want_uses}, uses
    traces = []

    def counted(p, *args):
        traces.append(1)
        return apply_fn(p, *args)

    got = calibrate(counted, mesh_params, uses, [mesh_args, mesh_args])
    assert len(traces) == 1, f"traced {len(traces)} times"
    want = calibrate(plain_fn, params, want_uses, [args, args])
    for path in got:
        jax.tree.map(assert_close, got[path], want[path])
    packed = packed_tree(params, uses, leaf_paths(params))
    dense = dense_tree(packed)

    def loss(f):
        return lambda p, *a: jnp.sin(f(p, *a)).sum()

    mesh = jax.tree.leaves(mesh_params)[0].sharding.mesh
    placed = put(packed, mesh, P())
    f = sparsify(apply_fn)
    n = str(jax.make_jaxpr(f)(placed, *mesh_args)).count("name=sparse_product")
    assert n >= len(uses), n
    assert_close(jax.jit(f)(placed, *mesh_args), plain_fn(dense, *args))
    if not gradient:
        return uses
    grads = jax.jit(jax.grad(loss(f), allow_int=True))(placed, *mesh_args)
    unpack = lambda p, *a: plain_fn(dense_tree(p), *a)  # noqa: E731
    expected = jax.jit(jax.grad(loss(unpack), allow_int=True))(packed, *args)
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True)
    for g, e in pairs:
        if g.dtype != jax.dtypes.float0:
            assert_close(g, e, 1e-4)
    return uses


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(12)(x))
        x = nn.Conv(4, (3,), padding="SAME")(x)
        return nn.Dense(8)(x)


def block_params():
    shapes = jax.eval_shape(Block().init, jax.random.key(0), X)
    return jax.tree.map(lambda x: 0.4 * normal(*x.shape), shapes)


def mlp(p, x):
    h = jax.nn.relu(x @ p["up"] + p["b"])
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h @ p["down"], p["stack"])[0]


MLP = {
    "up": normal(8, 12),
    "b": normal(12),
    "down": normal(12, 8),
    "stack": normal(3, 8, 8),
}


def explicit():
    x = put(X, EXPLICIT, P("data"))
    compare(mlp, (put(MLP, EXPLICIT, P()), (x,)), MLP, (X,), gradient=True)


def explicit_with_set_mesh():
    with jax.set_mesh(EXPLICIT):
        explicit()


def explicit_with_sharded_weights():
    specs = {"up": P(None, "model"), "b": P("model"), "down": P(), "stack": P()}
    params = {k: put(v, EXPLICIT, specs[k]) for k, v in MLP.items()}

    def apply_fn(p, x):
        h = jax.nn.relu(x @ p["up"] + p["b"])
        h = jax.sharding.reshard(h, P("data"))
        h = h @ p["down"]
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])[0]

    with jax.set_mesh(EXPLICIT):
        x = put(X, EXPLICIT, P("data"))
        uses = discover(apply_fn, params, x)
        stats = calibrate(apply_fn, params, uses, [(x,)])
    want = calibrate(mlp, MLP, discover(mlp, MLP, X), [(X,)])
    for path in want:
        jax.tree.map(assert_close, stats[path], want[path])


def masked_on_an_explicit_mesh():
    """Masks follow sharded tokens, also through an axis order that moves them."""
    x, mask = normal(8, 3, 8), np.arange(24).reshape(8, 3) % 3 > 0
    params = {"w": normal(8, 8)}
    f = lambda p, x, m: x.swapaxes(0, 1) @ p["w"]  # noqa: E731
    sharded = put((x, mask), EXPLICIT, P("data"))
    placed = put(params, EXPLICIT, P())
    uses = discover(f, placed, *sharded)
    stats = calibrate(f, placed, uses, [sharded], token_mask=lambda x, m: m)["w"]
    assert float(stats.count) == mask.sum()
    assert_close(stats.gram, x[mask].T @ x[mask])


def explicit_convolution():
    params = block_params()
    with jax.set_mesh(EXPLICIT):
        x = put(X, EXPLICIT, P())
        f = lambda p, x: Block().apply(p, x)  # noqa: E731
        compare(f, (put(params, EXPLICIT, P()), (x,)), params, (X,))


def automatic():
    params = block_params()
    x = put(X, AUTO, P("data"))
    compare(Block().apply, (put(params, AUTO, P()), (x,)), params, (X,))


def in_shard_map(mesh, spec_x, body, **options):
    return jax.shard_map(
        body, mesh=mesh, in_specs=(P(), spec_x), out_specs=spec_x, **options
    )


def shard_map():
    for mesh, spec in ((AUTO, P("data")), (EXPLICIT, P(("data", "model")))):
        f = in_shard_map(mesh, spec, mlp)
        sharded = put(MLP, mesh, P()), (put(X, mesh, spec),)
        compare(f, sharded, MLP, (X,), mlp, gradient=True)


def shard_map_over_one_axis():
    f = in_shard_map(AUTO, P("data"), mlp, axis_names={"data"})
    f = jax.jit(f)
    sharded = put(MLP, AUTO, P()), (put(X, AUTO, P("data")),)
    compare(f, sharded, MLP, (X,), mlp, gradient=True)


def shard_map_with_branches():
    """Devices take different branches: nothing may wait for a device that is elsewhere.

    No gradient: that of the dense program is wrong in jax itself (0.10.2 and 0.12.0.1),
    which puts the psum of the transposed pvary inside the branches.
    """

    def body(p, x):
        first = lax.axis_index("data") == 0
        return lax.cond(first, lambda x: x @ p["w"], lambda x: jnp.sin(x) @ p["v"], x)

    def plain(p, x):
        return jnp.concatenate([x[:2] @ p["w"], jnp.sin(x[2:]) @ p["v"]])

    p = {"w": normal(8, 6), "v": normal(8, 6)}
    f = in_shard_map(AUTO, P("data"), body)
    sharded = put(p, AUTO, P()), (put(X, AUTO, P("data")),)
    compare(f, sharded, p, (X,), plain)


def shard_map_inside_scan():
    def forward(mesh):
        def layer(h, w):
            if mesh is None:
                return jnp.tanh(h @ w), None
            mapped = in_shard_map(mesh, P("data"), lambda w, h: jnp.tanh(h @ w))
            return mapped(w, h), None

        return lambda p, x: lax.scan(layer, x, p["stack"])[0]

    p = {"stack": MLP["stack"]}
    sharded = put(p, AUTO, P()), (put(X, AUTO, P("data")),)
    compare(forward(AUTO), sharded, p, (X,), forward(None))


def shard_map_that_splits_weights():
    def body(p, x):
        return lax.psum(x @ p["w"], "model") @ p["v"]

    p = {"w": normal(8, 6), "v": normal(6, 8)}
    specs = {"w": P("model"), "v": P()}
    f = jax.shard_map(
        body, mesh=AUTO, in_specs=(specs, P("data", None, "model")), out_specs=P("data")
    )
    x = put(X, AUTO, P("data", None, "model"))
    placed = {k: put(v, AUTO, specs[k]) for k, v in p.items()}
    plain = lambda p, x: (x @ p["w"]) @ p["v"]  # noqa: E731
    uses = compare(f, (placed, (x,)), p, (X,), plain)
    assert set(uses.leaves) == {"v"}
    assert uses.skipped["w"] == "inside a shard_map over mesh axes ['model']"


def shard_map_without_check_vma():
    f = in_shard_map(AUTO, P("data"), mlp, check_vma=False)
    params, x = put(MLP, AUTO, P()), put(X, AUTO, P("data"))
    uses = discover(f, params, x)
    assert not uses and "check_vma=False" in uses.skipped["up"]
    packed = packed_tree(MLP, discover(mlp, MLP, X), leaf_paths(MLP))
    got = jax.jit(sparsify(f))(put(packed, AUTO, P()), x)
    assert_close(got, mlp(dense_tree(packed), X))


def prunes(mesh, method, apply_fn=mlp):
    """Rows of a weight stay where they live, and masks are those of one device."""
    specs = {"up": P(None, "model"), "b": P("model"), "down": P(), "stack": P()}
    batches, key = [normal(8, 3, 8), normal(8, 3, 8)], jax.random.key(0)
    params = {k: put(v, mesh, specs[k]) for k, v in MLP.items()}
    placed = [put(b, mesh, P("data")) for b in batches]
    for prune in (fh.prune, fh.prune_sequential):
        want = prune(mlp, MLP, batches, method, key=key)
        got = prune(apply_fn, params, placed, method, key=key)
        for name, leaf in got.params.items():
            np.testing.assert_array_equal(leaf != 0, want.params[name] != 0)
            assert_close(leaf, want.params[name], 1e-4)
            same = leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)
            assert same, (prune.__name__, leaf.sharding)
            kinds = leaf.sharding.mesh.axis_types
            assert kinds == mesh.axis_types, (name, kinds)


def pruning():
    prunes(AUTO, fh.SparseGPT(fh.NM(2, 4)))


def resharding_mlp(p, x):
    """The function that explicit axes need where weights are sharded."""
    h = jax.nn.relu(x @ p["up"] + p["b"])
    h = jax.sharding.reshard(h, P("data")) @ p["down"]
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])[0]


def explicit_pruning():
    with jax.set_mesh(EXPLICIT):
        prunes(EXPLICIT, fh.SparseGPT(fh.NM(2, 4)), resharding_mlp)


def steps_on_an_explicit_mesh():
    """Every verb takes and gives arrays of the mesh, set or not."""
    params, x = put(MLP, EXPLICIT, P()), put(X, EXPLICIT, P("data"))
    method, key = fh.Wanda(fh.NM(2, 4)), jax.random.key(0)
    uses = discover(mlp, params, x)
    stats = calibrate(mlp, params, uses, [(x,)])
    plans = fh.decide(method, fh.solve(method, key, params, uses, stats), params, uses)
    dense = fh.densify(plans, params, uses)
    keep = fh.keep_tree(plans, params, uses)
    for tree in (plans, dense, keep, fh.pack(plans, params, uses)):
        for leaf in jax.tree.leaves(tree):
            assert leaf.sharding.mesh == EXPLICIT, leaf.sharding
    want = fh.prune(mlp, MLP, [X], method, key=key)
    jax.tree.map(np.testing.assert_array_equal, dense, want.params)


CHECKS = [
    pruning,
    explicit_pruning,
    steps_on_an_explicit_mesh,
    explicit,
    explicit_with_set_mesh,
    explicit_with_sharded_weights,
    masked_on_an_explicit_mesh,
    explicit_convolution,
    automatic,
    shard_map,
    shard_map_over_one_axis,
    shard_map_with_branches,
    shard_map_inside_scan,
    shard_map_that_splits_weights,
    shard_map_without_check_vma,
]

if __name__ == "__main__":
    import traceback

    assert jax.device_count() == 8
    np.testing.assert_equal(len({check.__name__ for check in CHECKS}), len(CHECKS))
    for check in CHECKS:
        if len(sys.argv) > 1 and check.__name__ not in sys.argv[1:]:
            continue
        try:
            check()
            print("@ok", check.__name__, flush=True)
        except Exception:
            print("@FAILED", check.__name__, traceback.format_exc(), flush=True)
