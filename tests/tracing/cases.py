"""Models with everything about them worked out by hand.

Each case has the function, its parameters and arguments, and per prunable leaf the axes
of its matrix and the inputs X it meets, computed without the library.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flexhinm_jax import kernels
from flexhinm_jax.tracing import views
from flexhinm_jax.types import Layout, PackedWeight, Plan, Regions, Support


class Leaf(NamedTuple):
    """What is known about one prunable leaf.

    Attributes:
      axes: (stack, out, in) as tuples of leaf axes.
      inputs: X of every use, [*stack, tokens, i]; columns in leaf order.
      bias: path of the bias, or None.
      count: number of tokens where that is not simply the length of the inputs.
    """

    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    inputs: list[Any]
    bias: str | None = None
    count: Any = None


class Case(NamedTuple):
    apply_fn: Callable
    params: Any
    args: tuple
    leaves: dict[str, Leaf]
    differentiable: bool = True


def normal(*shape: int) -> np.ndarray:
    """Numpy, because answers worked out by hand need no compiler."""
    rng = np.random.default_rng(sum(shape))
    return rng.standard_normal(shape).astype(np.float32)


def rows(x: Any, contracted: int = 1) -> np.ndarray:
    """[tokens, in] with the last `contracted` axes as inputs."""
    return np.asarray(x).reshape(-1, math.prod(x.shape[-contracted:]))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def initial(module: nn.Module, *args: Any) -> Any:
    """Random parameters, biases too, so that a lost bias shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return jax.tree.map(lambda x: 0.4 * normal(*x.shape), shapes)


def intermediates(module: nn.Module, params: Any, *args: Any) -> Any:
    """Outputs of all submodules as numpy."""
    run = jax.jit(lambda p, *a: module.apply(p, *a, capture_intermediates=True)[1])
    return jax.device_get(run(params, *args))["intermediates"]


def linen_attention() -> Case:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.LayerNorm()(nn.Dense(12)(x)))
            x = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12)(x)
            return nn.Dense(4)(x)

    x = normal(2, 3, 8)
    module, params = Net(), initial(Net(), x)
    inner = intermediates(module, params, x)
    a = relu(inner["LayerNorm_0"]["__call__"][0])
    heads = inner["MultiHeadDotProductAttention_0"]
    q, k, v = (heads[name]["__call__"][0] for name in ("query", "key", "value"))
    weights = softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / 2)
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, v)
    att = "MultiHeadDotProductAttention_0"
    leaves = {
        "Dense_0/kernel": Leaf(((), (1,), (0,)), [rows(x)], "Dense_0/bias"),
        "Dense_1/kernel": Leaf(
            ((), (1,), (0,)), [rows(heads["__call__"][0])], "Dense_1/bias"
        ),
        f"{att}/out/kernel": Leaf(
            ((), (2,), (0, 1)), [rows(mixed, 2)], f"{att}/out/bias"
        ),
    }
    for name in ("query", "key", "value"):
        leaf = Leaf(((), (1, 2), (0,)), [rows(a)], f"{att}/{name}/bias")
        leaves[f"{att}/{name}/kernel"] = leaf
    return Case(module.apply, params, (x,), leaves)


def linen_conv() -> Case:
    module = nn.Sequential(
        [
            nn.Conv(6, (3, 3), strides=2),
            nn.silu,
            nn.Conv(6, (2, 3), feature_group_count=3),
        ]
    )
    image = normal(2, 7, 5, 4)
    params = initial(module, image)
    pad = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    first = np.stack(
        [
            pad[:, i : i + 3, j : j + 3].reshape(2, -1)
            for i in (0, 2, 4, 6)
            for j in (0, 2, 4)
        ]
    )
    h = intermediates(module, params, image)["layers_0"]["__call__"][0]
    h = h / (1 + np.exp(-h))
    pad = np.pad(h, ((0, 0), (0, 1), (1, 1), (0, 0)))
    second = [
        [
            pad[:, i : i + 2, j : j + 3, g : g + 2].reshape(2, -1)
            for i in range(4)
            for j in range(3)
        ]
        for g in (0, 2, 4)
    ]
    second = np.stack([rows(np.stack(group)) for group in second])
    leaves = {
        "layers_0/kernel": Leaf(((), (3,), (0, 1, 2)), [rows(first)], "layers_0/bias"),
        "layers_2/kernel": Leaf(((3,), (3,), (0, 1, 2)), [second], "layers_2/bias"),
    }
    return Case(module.apply, params, (image,), leaves)


def scanned(axis: int, remat: bool) -> Case:
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(8)(x)), None

    module = nn.scan(
        nn.remat(Cell) if remat else Cell,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=3,
    )()
    x = normal(2, 3, 8)
    params = initial(module, x, None)
    (name,) = params["params"]
    p = params["params"][name]
    hidden = [x]
    for k in range(2):
        kernel, bias = (np.take(p[key], k, axis) for key in ("kernel", "bias"))
        hidden.append(np.tanh(hidden[-1] @ kernel + bias))
    inputs = np.stack([rows(h) for h in hidden])
    others = [d for d in range(3) if d != axis]
    # A bias stacked on its second axis is not [stack, out] in memory.
    bias = f"{name}/bias" if axis == 0 else None
    leaf = Leaf(((axis,), (others[1],), (others[0],)), [inputs], bias)
    apply_fn = lambda v, x: module.apply(v, x, None)[0]  # noqa: E731
    return Case(apply_fn, params, (x,), {f"{name}/kernel": leaf})


def nnx_model() -> Case:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(8, 6, rngs=rngs), nnx.gelu, nnx.Linear(6, 4, rngs=rngs)
    )
    graph, state = nnx.split(model)
    x = normal(2, 3, 8)
    h = jax.jit(lambda x: nnx.gelu(model.layers[0](x)))(x)
    leaves = {
        "layers/0/kernel": Leaf(((), (1,), (0,)), [rows(x)], "layers/0/bias"),
        "layers/2/kernel": Leaf(((), (1,), (0,)), [rows(h)], "layers/2/bias"),
    }
    return Case(lambda s, x: nnx.merge(graph, s)(x), state, (x,), leaves)


def equinox_model() -> Case:
    import pytest

    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 4, 6, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    x = normal(5, 8)
    first = jax.device_get(model.layers[0])
    h = relu(x @ first.weight.T + first.bias)
    leaves = {
        "layers/0/weight": Leaf(((), (0,), (1,)), [x], "layers/0/bias"),
        "layers/1/weight": Leaf(((), (0,), (1,)), [h], "layers/1/bias"),
    }
    apply_fn = lambda p, x: jax.vmap(eqx.combine(p, static))(x)  # noqa: E731
    return Case(apply_fn, params, (x,), leaves)


def torch_style() -> Case:
    p, x = {"up": normal(6, 8), "down": normal(8, 6)}, normal(2, 3, 8)
    leaves = {
        "up": Leaf(((), (0,), (1,)), [rows(x)]),
        "down": Leaf(((), (0,), (1,)), [rows(relu(x @ p["up"].T))]),
    }
    apply_fn = lambda p, x: jax.nn.relu(x @ p["up"].T) @ p["down"].T  # noqa: E731
    return Case(apply_fn, p, (x,), leaves)


def two_contracted_axes() -> Case:
    p, y = {"o": normal(3, 4, 8)}, normal(2, 5, 3, 4)
    leaf = Leaf(((), (2,), (0, 1)), [rows(y, 2)])
    apply_fn = lambda p, y: jnp.einsum("bthd,hdo->bto", y, p["o"])  # noqa: E731
    return Case(apply_fn, p, (y,), {"o": leaf})


def weight_first() -> Case:
    p, y = {"o": normal(3, 4, 8)}, normal(2, 5, 3, 4)
    leaf = Leaf(((), (2,), (0, 1)), [rows(y, 2)])

    def apply_fn(p, y):
        return jnp.einsum("dho,bthd->bot", p["o"].transpose(1, 0, 2), y)

    return Case(apply_fn, p, (y,), {"o": leaf})


def used_twice() -> Case:
    p, x = {"w": normal(8, 8)}, normal(2, 3, 8)
    leaf = Leaf(((), (1,), (0,)), [rows(x), rows(np.tanh(x @ p["w"]))])
    apply_fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]  # noqa: E731
    return Case(apply_fn, p, (x,), {"w": leaf})


def tied_autoencoder() -> Case:
    p, x = {"w": normal(8, 6)}, normal(2, 3, 8)
    # The transposed use has other inputs: it runs sparse but has no statistics.
    leaf = Leaf(((), (1,), (0,)), [rows(x)])
    return Case(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, p, (x,), {"w": leaf})


def jitted_block() -> Case:
    p, x = {"w": normal(8, 6), "b": normal(6)}, normal(2, 3, 8)
    act = jax.custom_jvp(lambda x: jnp.maximum(x, 0))
    act.defjvp(lambda x, t: (act(x[0]), 3 * t[0] * (x[0] > 0)))
    block = jax.jit(lambda w, b, x: act(x @ w + b))
    leaf = Leaf(((), (1,), (0,)), [rows(x)], "b")
    return Case(lambda p, x: block(p["w"], p["b"], x), p, (x,), {"w": leaf})


def fused_qkv() -> Case:
    p, x = {"qkv": normal(8, 24), "o": normal(8, 8)}, normal(2, 3, 8)

    def apply_fn(p, x):
        q, k, v = jnp.split(x @ p["qkv"], 3, -1)
        again = x @ p["qkv"][:, 8:16] + x @ p["qkv"].reshape(8, 3, 8)[:, 2]
        return (q * k + v + again) @ p["o"]

    q, k, v = np.split(x @ p["qkv"], 3, -1)
    leaves = {
        "qkv": Leaf(((), (1,), (0,)), [rows(x)]),  # one input, counted once
        "o": Leaf(((), (1,), (0,)), [rows(q * k + 2 * v + k)]),
    }
    return Case(apply_fn, p, (x,), leaves)


def input_window() -> Case:
    p, x = {"w": normal(8, 6)}, normal(2, 3, 4)
    padded = np.pad(rows(x), ((0, 0), (2, 2)))
    leaf = Leaf(((), (1,), (0,)), [padded])
    return Case(lambda p, x: x @ p["w"][2:6], p, (x,), {"w": leaf})


def experts() -> Case:
    p, x = {"experts": normal(3, 8, 4), "bias": normal(3, 4)}, normal(3, 5, 8)

    def apply_fn(p, x):
        return jnp.einsum("eti,eio->eto", x, p["experts"]) + p["bias"][:, None]

    leaf = Leaf(((0,), (2,), (1,)), [x], "bias")
    return Case(apply_fn, p, (x,), {"experts": leaf})


def vmapped_weights() -> Case:
    p, x = {"w": normal(4, 3, 8), "b": normal(4, 3)}, normal(3, 5, 8)
    one = lambda w, b, x: x @ w.T + b  # noqa: E731
    f = jax.vmap(one, in_axes=(1, 1, 0))
    leaf = Leaf(((1,), (0,), (2,)), [x])  # bias [out, stack]: another order in memory
    return Case(lambda p, x: f(p["w"], p["b"], x), p, (x,), {"w": leaf})


def unrolled_stack() -> Case:
    p, x = {"layers": normal(3, 8, 8), "b": normal(3, 8)}, normal(2, 3, 8)

    def apply_fn(p, x):
        h = x @ p["layers"][0] + p["b"][0]
        return h @ p["layers"][2] + p["b"][2]

    h = x @ p["layers"][0] + p["b"][0]
    inputs = np.stack([rows(x), 0 * rows(x), rows(h)])
    return Case(
        apply_fn,
        p,
        (x,),
        {"layers": Leaf(((0,), (2,), (1,)), [inputs], "b", [6, 0, 6])},
    )


def unit_stack() -> Case:
    p, x = {"w": normal(1, 8, 8)}, normal(2, 3, 8)

    def apply_fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    return Case(apply_fn, p, (x,), {"w": Leaf(((), (2,), (1,)), [rows(x)])})


def loops() -> Case:
    p, x = {"layers": normal(3, 8, 8), "w": normal(8, 8)}, normal(2, 3, 8)

    def apply_fn(p, x):
        def layer(i, h):
            return jnp.tanh(h @ p["layers"][i])

        def turn(c):
            return c[0] + 1, jnp.sin(c[1] @ c[2]), c[2]

        x = lax.fori_loop(0, 3, layer, x)
        x = lax.while_loop(lambda c: c[0] < 2, turn, (0, x, p["w"]))[1]
        taken = lambda h: jnp.cos(h) @ p["w"]  # noqa: E731
        return lax.cond(x.sum() > 1e9, lambda h: h @ p["w"], taken, x)

    h, hidden = x, []
    for i in range(3):
        hidden.append(rows(h))
        h = np.tanh(h @ p["layers"][i])
    inputs = [rows(h), rows(np.sin(h @ p["w"]))]
    inputs.append(rows(np.cos(np.sin(np.sin(h @ p["w"]) @ p["w"]))))
    leaves = {
        "layers": Leaf(((0,), (2,), (1,)), [np.stack(hidden)]),
        "w": Leaf(((), (1,), (0,)), inputs),
    }
    return Case(apply_fn, p, (x,), leaves, differentiable=False)


def mixed_precision() -> Case:
    p, x = {"w": normal(8, 6), "v": normal(8, 6)}, normal(2, 3, 8)
    half = jnp.bfloat16
    leaf = Leaf(((), (1,), (0,)), [rows(x.astype(half))])

    def apply_fn(p, x):
        y = x.astype(half) @ p["w"].astype(half) + x.astype(half) @ p["v"].astype(half)
        return y.astype(jnp.float32)

    return Case(apply_fn, p, (x,), {"w": leaf, "v": leaf})


CASES: dict[str, Callable[[], Case]] = {
    "linen attention": linen_attention,
    "linen conv": linen_conv,
    "linen scan": lambda: scanned(0, remat=False),
    "linen scan on axis 1, remat": lambda: scanned(1, remat=True),
    "nnx": nnx_model,
    "equinox": equinox_model,
    "torch style": torch_style,
    "two contracted axes": two_contracted_axes,
    "weight first": weight_first,
    "used twice": used_twice,
    "tied autoencoder": tied_autoencoder,
    "jit": jitted_block,
    "fused qkv": fused_qkv,
    "input window": input_window,
    "experts": experts,
    "vmapped weights": vmapped_weights,
    "unrolled stack": unrolled_stack,
    "stack of one": unit_stack,
    "loops": loops,
    "mixed precision": mixed_precision,
}


def packed_leaf(leaf: Any, layout: Layout, seed: int = 0) -> PackedWeight:
    """A leaf packed with random regions: half the columns dense, the rest 2 of 4."""
    w = views.matrix(np.asarray(leaf, np.float32), layout)
    rng = np.random.default_rng(seed)
    stack, (o, i) = layout.stack_shape, layout.matrix_shape
    t = 2 if o % 2 == 0 else 1
    dense = i - (i // 2) // 4 * 4 if i >= 8 else i - i // 4 * 4
    keep = np.zeros((*stack, o, i), bool)
    out_order = np.zeros((*stack, o), np.int32)
    in_order = np.zeros((*stack, t, i), np.int32)
    for s in np.ndindex(*stack):
        out_order[s] = rng.permutation(o)
        for k in range(t):
            in_order[s][k] = order = rng.permutation(i)
            for row in out_order[s].reshape(t, -1)[k]:
                keep[s][row, order[:dense]] = True
                for group in order[dense:].reshape(-1, 4):
                    keep[s][row, rng.permutation(group)[:2]] = True
    ends = np.zeros((*stack, t), np.int32)
    regions = Regions(out_order, in_order, ends + dense, ends + i, n=2, m=4)
    weight = np.where(keep, w, 0).astype(leaf.dtype)
    plan = Plan(weight, Support(keep, regions), np.ones(stack, np.float32))
    f = kernels.pack_to
    for _ in stack:
        f = jax.vmap(f, in_axes=(0, None, None, None))
    return jax.jit(f, static_argnums=(1, 2, 3))(plan, dense, i - dense, layout)


def unpacked(x: Any) -> Any:
    """A leaf, dense again."""
    if not isinstance(x, PackedWeight):
        return x
    f = kernels.unpack
    for _ in x.layout.stack:
        f = jax.vmap(f)
    return views.leaf(f(x), x.layout)


def packed_tree(params: Any, uses: Any, paths: list[str]) -> Any:
    """The parameters with every prunable leaf packed."""
    leaves, tree = jax.tree.flatten(params)
    found = uses.leaves
    return tree.unflatten(
        [
            packed_leaf(x, found[path].layout, seed) if path in found else x
            for seed, (path, x) in enumerate(zip(paths, leaves, strict=True))
        ]
    )


def dense_tree(packed: Any) -> Any:
    """The parameters with every packed leaf made dense."""
    is_packed = lambda x: isinstance(x, PackedWeight)  # noqa: E731
    return jax.tree.map(unpacked, packed, is_leaf=is_packed)


def outcome(apply_fn: Any, *args: Any, argnums: Any = 0) -> Any:
    """The output, and the gradients of the sum of its sines in `argnums`.

    One program, in which the output is computed once: several outcomes in one program
    take longer to compile than each by itself.
    """

    @jax.jit
    def run(*args: Any) -> Any:
        def loss(*args: Any) -> Any:
            y = apply_fn(*args)
            return jnp.sin(y).sum(), y

        gradients, y = jax.grad(loss, argnums, has_aux=True, allow_int=True)(*args)
        leaves = jax.tree.leaves(gradients)
        return y, [g for g in leaves if g.dtype != jax.float0]

    return run(*args)


def assert_close(actual: Any, expected: Any, tol: float = 1e-5) -> None:
    """Equal up to `tol` of the largest entry."""
    expected = np.asarray(expected, np.float32)
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), expected, rtol=tol, atol=tol * scale
    )
