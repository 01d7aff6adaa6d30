"""A grammar of small programs, and in NumPy what every weight of them really saw.

A program is a chain of steps from activations [batch, length, features] to activations.
A step is written twice: in JAX, as a user might, and in NumPy, where it also tells the
`Truth` which inputs each of its weights multiplied. The second form knows nothing of
the library: it is the independent answer that the fuzzer compares with.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from ml_dtypes import bfloat16

BATCH, LENGTH, WIDTH = 2, 4, 8
EXPERTS, LAYERS = 3, 2

Params = dict[str, Any]


@dataclasses.dataclass
class Leaf:
    """What is true of one weight.

    Attributes:
      shape: shape of the leaf.
      matrix: leaf -> [*stack, o, i], the part of it that multiplies inputs; columns in
        the order in which groups of inputs are counted.
      stack: shape of the stack.
      inputs: number of inputs.
      expected: "pruned", "skipped", or "either" where both are right.
    """

    shape: tuple[int, ...]
    matrix: Callable[[Any], Any]
    stack: tuple[int, ...]
    inputs: int
    expected: str = "pruned"

    def __post_init__(self):
        """Empty sums."""
        self.gram = np.zeros((*self.stack, self.inputs, self.inputs))
        self.total = np.zeros((*self.stack, self.inputs))
        self.count = np.zeros(self.stack)
        self.counted: set[Any] = set()


@dataclasses.dataclass
class Truth:
    """Sums over the inputs of every weight, filled by the NumPy form of a program."""

    leaves: dict[str, Leaf]

    def see(
        self, name: str, x: np.ndarray, rows: Any = None, at: Any = (), once: Any = None
    ) -> None:
        """Weight `name` multiplies the rows of x.

        Args:
          name: the leaf.
          x: [*rest of the stack, tokens, i].
          rows: bool[tokens], the rows that count; None for all.
          at: position in the leading axes of the stack.
          once: inputs with an equal label are counted once.
        """
        leaf = self.leaves[name]
        if once is not None:
            if once in leaf.counted:
                return
            leaf.counted.add(once)
        x = np.asarray(x, np.float64)
        if rows is not None:
            x = x[..., np.asarray(rows, bool), :]
        leaf.gram[at] += np.swapaxes(x, -1, -2) @ x
        leaf.total[at] += x.sum(-2)
        leaf.count[at] += x.shape[-2]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a program.

    Attributes:
      name: for messages.
      run: (params, h) -> h in JAX.
      told: (params, h, truth, mask) -> h in NumPy; mask is bool[batch, length].
      pointwise: whether every token goes its own way, so that masks can be followed.
      reversible: whether JAX can differentiate it in reverse mode.
    """

    name: str
    run: Callable[[Params, Array], Array]
    told: Callable[[Params, np.ndarray, Truth, np.ndarray], np.ndarray]
    pointwise: bool = True
    reversible: bool = True


@dataclasses.dataclass
class Program:
    """A generated program with its data.

    Attributes:
      steps: what it does, in order.
      params: flat dict of arrays.
      leaves: what is true of the weights among them.
      x: f32[batch, length, features].
      mask: bool[batch, length] or None for no token mask.
      rules: for the weights that are pruned only when a rule asks for it.
    """

    steps: list[Step]
    params: Params
    leaves: dict[str, Leaf]
    x: np.ndarray
    mask: np.ndarray | None
    rules: dict[str, Any]

    @property
    def reversible(self) -> bool:
        """Whether JAX can differentiate the program in reverse mode."""
        return all(step.reversible for step in self.steps)

    @property
    def text(self) -> str:
        """The steps by name."""
        return " > ".join(step.name for step in self.steps)

    def apply(self, params: Params, x: Array, mask: Array | None = None) -> Array:
        """The program in JAX."""
        del mask
        for step in self.steps:
            x = step.run(params, x)
        return x

    def truth(self) -> Truth:
        """The sums of all weights, and nothing of the library in them."""
        truth, h = Truth(self.leaves), self.x
        mask = np.ones(h.shape[:2], bool) if self.mask is None else self.mask
        for step in self.steps:
            h = step.told(self.params, h, truth, mask).astype(np.float32)
        return truth


class Builder:
    """Makes parameters and draws choices."""

    def __init__(self, rng: np.random.Generator):
        """Starts without parameters."""
        self.rng, self.params, self.leaves, self.rules = rng, {}, {}, {}
        self.names = (f"w{k}" for k in itertools.count())

    def one(self, *options: Any) -> Any:
        """One of the options."""
        return options[self.rng.integers(len(options))]

    def chance(self, share: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < share)

    def order(self, letters: str) -> str:
        """The letters in a random order."""
        return "".join(self.rng.permutation(list(letters)))

    def array(self, *shape: int) -> np.ndarray:
        """Random values of a scale that keeps activations near 1."""
        return (0.4 * self.rng.standard_normal(shape)).astype(np.float32)

    def plain(self, *shape: int) -> str:
        """A parameter that cannot be pruned."""
        name = next(self.names)
        self.params[name] = self.array(*shape)
        self.leaves[name] = Leaf(shape, lambda w: w, (), 1, "skipped")
        return name

    def weight(
        self,
        letters: str,
        stack: str,
        out: str,
        inputs: str,
        sizes: dict[str, int],
        expected: str = "pruned",
    ) -> str:
        """A leaf with the axes `letters`, a matrix over `stack`, `out` and `inputs`."""
        shape = tuple(sizes[c] for c in letters)
        size = functools.partial(_product, sizes)
        order = [letters.index(c) for c in stack + out + inputs]
        to = (*(sizes[c] for c in stack), size(out), size(inputs))
        name = next(self.names)
        self.params[name] = self.array(*shape)
        self.leaves[name] = Leaf(
            shape,
            lambda w: w.transpose(order).reshape(to),
            to[:-2],
            to[-1],
            expected,
        )
        return name


def _product(sizes: dict[str, int], letters: str) -> int:
    out = 1
    for c in letters:
        out *= sizes[c]
    return out


def leaf_order(letters: str, among: str) -> str:
    """Those letters of `among` in the order in which they stand in `letters`."""
    return "".join(c for c in letters if c in among)


def flat(x: np.ndarray) -> np.ndarray:
    """[tokens, features]."""
    return x.reshape(-1, x.shape[-1])


SIZES = {
    "b": BATCH,
    "t": LENGTH,
    "i": WIDTH,
    "o": WIDTH,
    "h": 2,
    "k": 4,
    "e": EXPERTS,
    "l": LAYERS,
}


# Steps. Each takes the builder and returns a Step.


def dense(make: Builder) -> Step:
    """One product, its axes in any order, on either side."""
    letters = make.order("io")
    name = make.weight(letters, "", "o", "i", SIZES)
    bias = make.plain(WIDTH) if make.chance(0.5) else None
    form = make.one("einsum", "left", "matmul", "tokens", "vmap", "cast")

    def product(w: Array, x: Array) -> Array:
        if form == "einsum":
            return jnp.einsum(f"bti,{letters}->bto", x, w)
        w = w if letters == "io" else w.T
        if form == "left":
            return lax.dot_general(w, x, (((0,), (2,)), ((), ()))).transpose(1, 2, 0)
        if form == "tokens":
            return (x.reshape(-1, WIDTH) @ w).reshape(*x.shape[:2], WIDTH)
        if form == "vmap":
            return jax.vmap(jax.vmap(lambda row: row @ w))(x)
        if form == "cast":
            low = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
            return low.astype(jnp.float32)
        return x @ w

    def run(p, x):
        y = product(p[name], x)
        return jnp.tanh(y if bias is None else y + p[bias])

    def told(p, x, truth, mask):
        w = p[name] if letters == "io" else p[name].T
        if form == "cast":
            x = x.astype(bfloat16).astype(np.float32)
            w = w.astype(bfloat16).astype(np.float32)
        truth.see(name, flat(x), mask.reshape(-1))
        y = x @ w
        if form == "cast":
            y = y.astype(bfloat16).astype(np.float32)
        return np.tanh(y if bias is None else y + p[bias])

    return Step(f"dense {letters} {form}", run, told)


def heads(make: Builder) -> Step:
    """Out to heads and back in: two outputs axes, then two inputs axes."""
    first, second = make.order("ihk"), make.order("hko")
    up = make.weight(first, "", leaf_order(first, "hk"), "i", SIZES)
    inputs = leaf_order(second, "hk")
    down = make.weight(second, "", "o", inputs, SIZES)
    merged = make.chance(0.3) and first.index("k") == first.index("h") + 1

    def run(p, x):
        if merged:
            w = p[up].reshape([WIDTH, -1] if first[0] == "i" else [-1, WIDTH])
            y = x @ w if first[0] == "i" else x @ w.T
            y = y.reshape(*x.shape[:2], 2, 4)
        else:
            y = jnp.einsum(f"bti,{first}->bthk", x, p[up])
        return jnp.einsum(f"bthk,{second}->bto", jnp.tanh(y), p[down])

    def told(p, x, truth, mask):
        rows = mask.reshape(-1)
        truth.see(up, flat(x), rows)
        y = np.tanh(np.einsum(f"bti,{first}->bthk", x, p[up]))
        columns = y if inputs == "hk" else y.swapaxes(2, 3)
        truth.see(down, columns.reshape(len(rows), -1), rows)
        return np.einsum(f"bthk,{second}->bto", y, p[down])

    return Step(f"heads {first} {second}{' merged' if merged else ''}", run, told)


def fused(make: Builder) -> Step:
    """One leaf with three windows, cut before or after the product."""
    letters = make.order("io")
    name = make.weight(letters, "", "o", "i", SIZES | {"o": 3 * WIDTH})
    before = make.chance(0.5)

    def parts(w: Any, x: Any) -> list[Any]:
        w = w if letters == "io" else w.T
        if before:
            cut = [w[:, k * WIDTH : (k + 1) * WIDTH] for k in range(3)]
            return [x @ c for c in cut]
        y = x @ w
        return [y[..., k * WIDTH : (k + 1) * WIDTH] for k in range(3)]

    def run(p, x):
        q, k, v = parts(p[name], x)
        return jnp.tanh(q * k) + v

    def told(p, x, truth, mask):
        truth.see(name, flat(x), mask.reshape(-1))
        q, k, v = parts(p[name], x)
        return np.tanh(q * k) + v

    return Step(f"fused {letters} {'before' if before else 'after'}", run, told)


def joined(make: Builder) -> Step:
    """Two leaves concatenated before one product, along outputs or along inputs."""
    along = make.one("outputs", "inputs")
    if along == "outputs":
        names = [make.weight("io", "", "o", "i", SIZES | {"o": 4}) for _ in range(2)]
    else:
        names = [make.weight("io", "", "o", "i", SIZES | {"i": 4}) for _ in range(2)]
    axis = 1 if along == "outputs" else 0

    def run(p, x):
        return jnp.tanh(x @ jnp.concatenate([p[n] for n in names], axis))

    def told(p, x, truth, mask):
        for k, n in enumerate(names):
            seen = x if along == "outputs" else x[..., 4 * k : 4 * k + 4]
            truth.see(n, flat(seen), mask.reshape(-1))
        return np.tanh(x @ np.concatenate([p[n] for n in names], axis))

    return Step(f"joined {along}", run, told)


def stacked(make: Builder) -> Step:
    """Two leaves stacked before a batched product."""
    names = [make.weight("io", "", "o", "i", SIZES) for _ in range(2)]

    def run(p, x):
        w = jnp.stack([p[n] for n in names])
        return jnp.tanh(jnp.einsum("bti,sio->sbto", x, w)).sum(0)

    def told(p, x, truth, mask):
        for n in names:
            truth.see(n, flat(x), mask.reshape(-1))
        return np.sum([np.tanh(x @ p[n]) for n in names], 0)

    return Step("stacked", run, told)


def layers(make: Builder) -> Step:
    """A stack of layers, scanned, unrolled or looped over."""
    letters = make.one("lio", "loi")
    name = make.weight(letters, "l", "o", "i", SIZES)
    form = make.one("scan", "unrolled", "loop", "remat scan")

    def layer(x: Array, w: Array) -> Array:
        return jnp.tanh(x @ (w if letters == "lio" else w.T))

    def run(p, x):
        if form == "unrolled":
            for k in range(LAYERS):
                x = layer(x, p[name][k])
            return x
        if form == "loop":
            return lax.fori_loop(0, LAYERS, lambda k, x: layer(x, p[name][k]), x)
        body = lambda x, w: (layer(x, w), None)  # noqa: E731
        body = jax.checkpoint(body) if form == "remat scan" else body
        return lax.scan(body, x, p[name])[0]

    def told(p, x, truth, mask):
        for k in range(LAYERS):
            truth.see(name, flat(x), mask.reshape(-1), at=(k,))
            w = p[name][k]
            x = np.tanh(x @ (w if letters == "lio" else w.T))
        return x

    return Step(f"layers {letters} {form}", run, told)


def recurrent(make: Builder) -> Step:
    """A recurrence over the length: the same two weights at every position."""
    across = make.weight("io", "", "o", "i", SIZES)
    along = make.weight("io", "", "o", "i", SIZES)

    def run(p, x):
        def body(state, row):
            state = jnp.tanh(row @ p[across] + state @ p[along])
            return state, state

        start = jnp.zeros((x.shape[0], WIDTH), jnp.float32)
        return lax.scan(body, start, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    def told(p, x, truth, mask):
        state, out = np.zeros((len(x), WIDTH), np.float32), []
        for t in range(x.shape[1]):
            truth.see(across, x[:, t])
            truth.see(along, state)
            state = np.tanh(x[:, t] @ p[across] + state @ p[along])
            out.append(state)
        return np.stack(out, 1)

    return Step("recurrent", run, told, pointwise=False)


def repeated(make: Builder) -> Step:
    """One weight used twice on different inputs, or in a while loop."""
    name = make.weight("io", "", "o", "i", SIZES)
    form = make.one("twice", "while")

    def run(p, x):
        if form == "twice":
            return jnp.tanh(jnp.tanh(x @ p[name]) @ p[name])
        step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p[name]))  # noqa: E731
        return lax.while_loop(lambda c: c[0] < 2, step, (jnp.int32(0), x))[1]

    def told(p, x, truth, mask):
        for _ in range(2):
            truth.see(name, flat(x), mask.reshape(-1))
            x = np.tanh(x @ p[name])
        return x

    return Step(f"repeated {form}", run, told, reversible=form != "while")


def chosen(make: Builder) -> Step:
    """A condition on the whole batch: the branch not taken sees nothing."""
    names = [make.weight("io", "", "o", "i", SIZES) for _ in range(2)]
    always = make.weight("io", "", "o", "i", SIZES) if make.chance(0.5) else None
    flip = make.chance(0.5)

    def run(p, x):
        branches = [lambda x, n=n: jnp.tanh(x @ p[n]) for n in names]
        y = lax.cond((x[0, 0, 0] > 0) != flip, *branches, x)
        return y if always is None else y + x @ p[always]

    def told(p, x, truth, mask):
        n = names[0] if (x[0, 0, 0] > 0) != flip else names[1]
        truth.see(n, flat(x), mask.reshape(-1))
        y = np.tanh(x @ p[n])
        if always is not None:
            truth.see(always, flat(x), mask.reshape(-1))
            y = y + x @ p[always]
        return y

    return Step("chosen", run, told)


def route(x: Any, xp: Any) -> Any:
    """The expert of every token, i[...]."""
    return (x[..., 0] > 0) * 1 + xp.logical_and(x[..., 0] > 0, x[..., 1] > 0) * 1


def routed(make: Builder) -> Step:
    """A switch or a cond for every token inside a map or a scan."""
    names = [make.weight("io", "", "o", "i", SIZES) for _ in range(EXPERTS)]
    form = make.one("map", "scan")

    def run(p, x):
        tokens = x.reshape(-1, WIDTH)
        branches = [lambda v, n=n: jnp.tanh(v @ p[n]) for n in names]
        one = lambda v: lax.switch(route(v, jnp), branches, v)  # noqa: E731
        if form == "map":
            y = lax.map(one, tokens)
        else:
            y = lax.scan(lambda c, v: (c, one(v)), 0, tokens)[1]
        return y.reshape(x.shape)

    def told(p, x, truth, mask):
        tokens, to, y = flat(x), route(flat(x), np), np.zeros_like(flat(x))
        for e, n in enumerate(names):
            mine = to == e
            truth.see(n, tokens[mine], mask.reshape(-1)[mine])
            y[mine] = np.tanh(tokens[mine] @ p[n])
        return y.reshape(x.shape)

    return Step(f"routed {form}", run, told)


def experts(make: Builder) -> Step:
    """Experts in one leaf: ragged, gathered, by capacity, or each on all tokens."""
    form = make.one("ragged", "gathered", "capacity", "all")
    # Experts that all read every token are more outputs of one matrix.
    stack, out = ("", "eo") if form == "all" else ("e", "o")
    name = make.weight("eio", stack, out, "i", SIZES)

    def run(p, x):
        tokens = x.reshape(-1, WIDTH)
        to = route(tokens, jnp)
        if form == "ragged":
            order = jnp.argsort(to)
            sizes = jnp.bincount(to, length=EXPERTS).astype(jnp.int32)
            y = lax.ragged_dot(tokens[order], p[name], sizes)[jnp.argsort(order)]
        elif form == "gathered":
            y = jax.vmap(lambda v, e: v @ p[name][e])(tokens, to)
        elif form == "capacity":
            own = jnp.einsum("nd,ne->end", tokens, jax.nn.one_hot(to, EXPERTS))
            y = jnp.einsum("end,edo->eno", own, p[name]).sum(0)
        else:
            y = jnp.einsum("nd,edo->eno", tokens, p[name]).sum(0)
        return jnp.tanh(y).reshape(x.shape)

    def told(p, x, truth, mask):
        tokens, to, rows = flat(x), route(flat(x), np), mask.reshape(-1)
        y = np.zeros((len(tokens), WIDTH), np.float32)
        if form == "all":
            truth.see(name, tokens, rows)
            y = np.einsum("nd,edo->no", tokens, p[name])
        for e in range(EXPERTS) if form != "all" else ():
            mine = to == e
            if form == "capacity":
                truth.see(name, np.where(mine[:, None], tokens, 0), rows, at=(e,))
            else:
                truth.see(name, tokens[mine], rows[mine], at=(e,))
            y[mine] = tokens[mine] @ p[name][e]
        return np.tanh(y).reshape(x.shape)

    return Step(f"experts {form}", run, told)


def convolution(make: Builder) -> Step:
    """A convolution over the length, in any layout, with groups, stride and padding."""
    width, groups = make.one(1, 2, 3), make.one(1, 1, 2)
    spec, image = make.order("oiw"), make.one("NWC", "NCW")
    stride, dilation = make.one(1, 1, 2), make.one(1, 1, 2)
    depthwise = make.chance(0.3)
    groups = WIDTH if depthwise else groups
    multiplier = make.one(1, 2) if depthwise else 1
    outputs = WIDTH * multiplier
    sizes = {"o": outputs, "i": WIDTH // groups, "w": width}
    shape = tuple(sizes[c] for c in spec)
    name = next(make.names)
    make.params[name] = make.array(*shape)

    def matrix(w: Any) -> Any:
        w = w.transpose([spec.index(c) for c in "owi"])
        w = w.reshape(groups, outputs // groups, -1)
        return w if groups > 1 else w[0]

    def merged(y: Any) -> Any:
        return y.reshape(*y.shape[:2], WIDTH, multiplier).sum(-1)

    make.leaves[name] = Leaf(
        shape,
        matrix,
        (groups,) if groups > 1 else (),
        width * WIDTH // groups,
        "skipped" if depthwise else "pruned",
    )
    span = dilation * (width - 1)
    low = (span + 1) // 2
    padding = [(low, span - low)]

    def run(p, x):
        x = x if image == "NWC" else x.swapaxes(1, 2)
        y = lax.conv_general_dilated(
            x,
            p[name],
            (stride,),
            padding,
            rhs_dilation=(dilation,),
            dimension_numbers=(image, spec.upper(), image),
            feature_group_count=groups,
        )
        y = y if image == "NWC" else y.swapaxes(1, 2)
        return jnp.tanh(jnp.repeat(merged(y), stride, 1)[:, :LENGTH])

    def told(p, x, truth, mask):
        pad = np.pad(x, ((0, 0), *padding, (0, 0)))
        starts = range(0, x.shape[1], stride)
        taken = [pad[:, s : s + span + 1 : dilation] for s in starts]
        windows = np.stack(taken, 1)  # [b, places, w, c]
        split = windows.reshape(*windows.shape[:3], groups, -1)
        split = np.moveaxis(split, 3, 0).reshape(groups, -1, width * WIDTH // groups)
        w = matrix(p[name]).reshape(groups, outputs // groups, -1)
        truth.see(name, split if groups > 1 else split[0])
        y = np.moveaxis(split @ w.swapaxes(-1, -2), 0, 1)
        y = y.reshape(*windows.shape[:2], outputs)
        return np.tanh(np.repeat(merged(y), stride, 1)[:, :LENGTH])

    text = f"conv {spec} {image} w{width} g{groups} s{stride} d{dilation} m{multiplier}"
    return Step(text, run, told, pointwise=False)


def tied(make: Builder) -> Step:
    """A table that is read by position and multiplied at the end."""
    asked = make.chance(0.7)
    expected = "pruned" if asked else "skipped"
    name = make.weight("oi", "", "o", "i", SIZES, expected)
    if asked:
        make.rules[name] = "prune"

    def run(p, x):
        rows = p[name][(x[..., 0] > 0) * 1]
        return jnp.tanh((x + rows) @ p[name].T)

    def told(p, x, truth, mask):
        x = x + p[name][(x[..., 0] > 0) * 1]
        truth.see(name, flat(x), mask.reshape(-1))
        return np.tanh(x @ p[name].T)

    return Step("tied", run, told)


def elementwise(make: Builder) -> Step:
    """A weight that multiplies inputs and is also needed for something else."""
    form = make.one("penalty", "scaled", "normed", "window", "transposed")
    sizes = SIZES | ({"i": WIDTH + 1} if form == "window" else {})
    expected = "pruned" if form in ("scaled", "normed") else "either"
    name = make.weight("io", "", "o", "i", sizes, expected)
    if form == "window":  # the last row is a bias: it must stay as it is
        window = lambda w: w[:WIDTH].T  # noqa: E731
        make.leaves[name] = Leaf((WIDTH + 1, WIDTH), window, (), WIDTH, expected)

    def parts(w: Any, x: Any, xp: Any) -> Any:
        if form == "penalty":
            return xp.tanh(x @ w) + 0.01 * xp.sum(w * w)
        if form == "scaled":
            return xp.tanh(x @ (w * xp.float32(0.5)))
        if form == "normed":
            along = w @ xp.ones(WIDTH, xp.float32)
            return xp.tanh(x @ (w / xp.sqrt(along @ along)))
        if form == "window":
            return xp.tanh(x @ w[:WIDTH] + w[WIDTH])
        return xp.tanh(xp.tanh(x @ w) @ w.T)

    def run(p, x):
        return parts(p[name], x, jnp)

    def told(p, x, truth, mask):
        seen = x * np.float32(0.5) if form == "scaled" else x
        truth.see(name, flat(seen), mask.reshape(-1))  # of its first layout
        return parts(p[name], x, np)

    return Step(f"also {form}", run, told)


def frozen(make: Builder) -> Step:
    """A primitive between the weight and its product that changes more than layout."""
    form = make.one("stop_gradient", "reduce_precision", "barrier", "float16")
    name = make.weight("io", "", "o", "i", SIZES, "either")

    def run(p, x):
        w = p[name]
        if form == "stop_gradient":
            w = lax.stop_gradient(w)
        elif form == "reduce_precision":
            w = lax.reduce_precision(w, 5, 3)
        elif form == "barrier":
            w, x = lax.optimization_barrier((w, x))
        else:
            w = w.astype(jnp.float16).astype(jnp.float32)
        return jnp.tanh(x @ w)

    def told(p, x, truth, mask):
        w = p[name]
        if form == "reduce_precision":
            w = np.asarray(lax.reduce_precision(w, 5, 3))
        elif form == "float16":
            w = w.astype(np.float16).astype(np.float32)
        truth.see(name, flat(x), mask.reshape(-1))
        return np.tanh(x @ w)

    return Step(f"frozen {form}", run, told)


def shaped(make: Builder) -> Step:
    """A leaf in another shape than its matrix: split, merged or moved axes."""
    form = make.one("split inputs", "moved", "broadcast", "rows")
    if form == "split inputs":
        name = make.weight("hko", "", "o", "hk", SIZES)
    elif form == "moved":
        name = make.weight("kho", "", "o", "kh", SIZES)
    else:
        expected = "either" if form == "broadcast" else "pruned"
        name = make.weight("io", "", "o", "i", SIZES, expected)

    def matrix(w: Any) -> Any:
        if form == "split inputs":
            return w.reshape(WIDTH, WIDTH)
        return w.transpose(1, 0, 2).reshape(WIDTH, WIDTH) if form == "moved" else w

    def run(p, x):
        w = matrix(p[name])
        if form == "broadcast":
            w = jnp.broadcast_to(w, (x.shape[0], WIDTH, WIDTH))
            return jnp.tanh(jnp.einsum("bti,bio->bto", x, w))
        if form == "rows":
            y = jnp.concatenate([x[:, :1] @ w, x[:, 1:] @ w], 1)
            return jnp.tanh(y)
        return jnp.tanh(x @ w)

    def told(p, x, truth, mask):
        seen = x
        if form == "moved":  # the leaf has k before h, the inputs h before k
            seen = x.reshape(*x.shape[:2], 2, 4).swapaxes(2, 3).reshape(x.shape)
        truth.see(name, flat(seen), mask.reshape(-1))
        return np.tanh(x @ matrix(p[name]))

    return Step(f"shaped {form}", run, told)


def turned(make: Builder) -> Step:
    """Tokens whose axes are in another order while they meet the weight."""
    name = make.weight("io", "", "o", "i", SIZES)
    form = make.one("length first", "flat", "features first")

    def run(p, x):
        if form == "features first":
            y = lax.dot_general(p[name], x.T, (((0,), (0,)), ((), ()))).T
        elif form == "flat":
            y = x.swapaxes(0, 1).reshape(-1, WIDTH) @ p[name]
            y = y.reshape(x.shape[1], x.shape[0], WIDTH).swapaxes(0, 1)
        else:
            y = (x.swapaxes(0, 1) @ p[name]).swapaxes(0, 1)
        return jnp.tanh(y)

    def told(p, x, truth, mask):
        truth.see(name, flat(x), mask.reshape(-1))
        return np.tanh(x @ p[name])

    return Step(f"turned {form}", run, told)


def gained(make: Builder) -> Step:
    """A norm with a gain: nothing to prune."""
    name = make.plain(WIDTH)

    def run(p, x):
        scale = lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-3)
        return x * scale * (1 + p[name])

    def told(p, x, truth, mask):
        scale = 1 / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-3)
        return x * scale * (1 + p[name])

    return Step("gained", run, told)


STEPS = (
    dense,
    heads,
    fused,
    joined,
    stacked,
    layers,
    recurrent,
    repeated,
    chosen,
    routed,
    experts,
    convolution,
    tied,
    elementwise,
    frozen,
    shaped,
    turned,
    gained,
)


def wrapped(make: Builder, step: Step) -> Step:
    """The step inside a jit, a remat, a vmap over the batch, or beside a residual."""
    form = make.one("", "", "jit", "remat", "residual", "custom")
    if form == "residual":
        run = lambda p, x: x + step.run(p, x)  # noqa: E731
        told = lambda p, x, t, m: x + step.told(p, x, t, m)  # noqa: E731
        return dataclasses.replace(step, name=f"{step.name}+x", run=run, told=told)
    if form == "jit":
        return dataclasses.replace(
            step, name=f"jit({step.name})", run=jax.jit(step.run)
        )
    if form == "remat":
        run = jax.checkpoint(step.run)
        return dataclasses.replace(step, name=f"remat({step.name})", run=run)
    if form == "custom":
        run = lambda p, x: step.run(p, _doubled(x))  # noqa: E731
        told = lambda p, x, t, m: step.told(p, 2 * x, t, m)  # noqa: E731
        return dataclasses.replace(
            step, name=f"custom({step.name})", run=run, told=told
        )
    return step


@jax.custom_jvp
def _doubled(x):
    return 2 * x


@_doubled.defjvp
def _doubled_jvp(primals, tangents):
    return _doubled(*primals), 2 * tangents[0]


def program(seed: int, length: int = 3) -> Program:
    """The program of a seed, with 1 to `length` steps."""
    rng = np.random.default_rng(seed)
    make = Builder(rng)
    masked = make.chance(0.25)
    steps: list[Step] = []
    for _ in range(int(rng.integers(1, length + 1))):
        before = dict(make.leaves)
        step = wrapped(make, make.one(*STEPS)(make))
        if masked and not step.pointwise:
            for name in make.leaves.keys() - before.keys():
                del make.leaves[name], make.params[name]
                make.rules.pop(name, None)
            continue
        steps.append(step)
    if not steps:
        steps.append(dense(make))
    x = rng.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
    mask = rng.random((BATCH, LENGTH)) < 0.6 if masked else None
    if mask is not None:
        mask[0, 0] = True
    return Program(steps, make.params, make.leaves, x, mask, make.rules)


def programs(first: int, count: int) -> Iterator[Program]:
    """The programs of `count` seeds."""
    for seed in range(first, first + count):
        yield program(seed)
