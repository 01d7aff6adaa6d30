"""A program as one straight line of equations, with the places where to cut it.

In goes a traced program with the layouts of the leaves to prune, out comes a `Line`:
the equations one after the other, and the cuts between them. Of two blocks

    for k in range(2):
        h = jax.nn.relu(x @ p["gate"][k]) * (x @ p["up"][k])
        x = x + h @ p["down"][k]

the line is `dot relu dot mul dot add` twice, but for the slices of the weights, with
two cuts in each: one before the first dot, whose members are ("gate", (k,)) and ("up",
(k,)), and one before the last, with ("down", (k,)). A cut lies where the input of its
members is known; one Gram matrix serves them all. The stream of "down" is x, to which
its result is added.

Calls are inlined and scans over stacked weights unrolled, so that almost every product
with a weight becomes an equation of the line. What cannot be cut (weights inside a
`while`, a `cond` or a scan over time, weights that are used on several inputs) is
listed with the reason.

A walk with a `Marker` leaves marks in the trace of the program, at the input and at the
result of every product; `find_cuts` reads them off the line.
"""

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.extend.core import Literal, Primitive

from flexhinm_jax import jax_versions
from flexhinm_jax.pruning.statistics import warn_missed
from flexhinm_jax.tracing import control_flow
from flexhinm_jax.tracing.contractions import (
    RESHAPES,
    Product,
    Tracked,
    equation,
    plain,
)
from flexhinm_jax.tracing.masks import Masks
from flexhinm_jax.tracing.program import Program, run
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.tracing.values import ALIASES, Dependence, Numbering, dependence
from flexhinm_jax.tracing.views import Where
from flexhinm_jax.tracing.walker import Visitor
from flexhinm_jax.types import Layout

UNKNOWN_FACTOR = (
    'target "asym": the weight is multiplied with a number that the program computes, '
    "so what the stream lacks cannot be put in terms of it"
)

#: Leaves a position in a traced program; never part of a program that runs.
mark = Primitive("flexhinm_mark")
mark.multiple_results = True
mark.def_impl(lambda *values, **params: [])
mark.def_abstract_eval(lambda *values, **params: [])


@dataclasses.dataclass(frozen=True)
class Stream:
    """A value of the program to which the result of a product is added.

    Attributes:
      var: the value.
      back: a value of its shape -> [*stacked, tokens, o], as the product sees it.
    """

    var: Any
    back: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Member:
    """One product at a cut.

    Attributes:
      path: the leaf.
      at: position per stack axis of the leaf; None where the whole axis takes part.
      product: the product, in terms of the layout of the leaf.
      stream: what its result is added to, or None.
      lost: why there is a stream that cannot be taken into account; "" for no such.
    """

    path: str
    at: tuple[int | None, ...]
    product: Product
    stream: Stream | None
    lost: str = ""


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where the walk stops to solve matrices.

    Attributes:
      position: the cut lies before this equation.
      operand: the common input of all members; None without members.
      routes: which entry of their stack every token meets, or None.
      valid: which tokens count, or None for all.
      members: products with this input.
      plain: leaf -> why it cannot be cut; solved here on statistics of a plain walk.
    """

    position: int
    operand: Any
    routes: Any
    valid: Any
    members: tuple[Member, ...]
    plain: Mapping[str, str]

    @property
    def names(self) -> tuple:
        """What is solved here; equal for all batch shapes of one model."""
        return tuple((m.path, m.at) for m in self.members), tuple(self.plain)


@dataclasses.dataclass(frozen=True)
class Line:
    """A program without calls.

    Attributes:
      eqns: the equations, marks included as gaps (None).
      params: variables of the parameters, one per array leaf.
      inputs: variables of the batch, one per array.
      consts: variable -> value of the constants.
      data: variables that depend on the batch.
      place: variable -> position of its equation, -1 for the batch.
      users: variable -> the equations that read it.
      cuts: where to cut, in order.
      outputs: what the program returns, one variable (or literal) per array.
    """

    eqns: list[Any]
    params: list[Any]
    inputs: list[Any]
    consts: dict[Any, Any]
    data: set[Any]
    place: dict[Any, int]
    users: dict[Any, list[Any]]
    cuts: list[Cut]
    outputs: list[Any]


def straighten(
    program: Program,
    leaves: Leaves,
    layouts: Mapping[str, Layout],
    mask: Any = None,
) -> Line:
    """Traces a program into a line and finds its cuts.

    Args:
      program: the traced function.
      leaves: its parameters, dense.
      layouts: leaf path -> layout, for the leaves to prune.
      mask: the token mask of the batch, which becomes the last input of the line.
    """
    count = program.parameters
    marker = Marker(layouts, dependence(program.jaxpr, count))
    body, consts = marked(program, leaves, marker, mask)
    warn_missed(marker.masks, layouts)
    eqns, places = without_marks(body.eqns)
    inputs = list(body.invars[count:])
    place: dict[Any, int] = dict.fromkeys(inputs, -1)
    users: dict[Any, list[Any]] = defaultdict(list)
    for k, eqn in enumerate(eqns):
        if eqn is not None:
            place.update(dict.fromkeys(eqn.outvars, k))
            for v in variables(eqn):
                users[v].append(eqn)
    line = Line(
        eqns=eqns,
        params=list(body.invars[:count]),
        inputs=inputs,
        consts=dict(zip(body.constvars, consts, strict=True)),
        data=dependent(eqns, inputs),
        place=place,
        users=users,
        cuts=[],
        outputs=list(body.outvars),
    )
    line.cuts.extend(find_cuts(line, marker, places))
    return line


def marked(
    program: Program, leaves: Leaves, marker: "Marker", mask: Any
) -> tuple[Any, Any]:
    """(the program without calls and with marks, an open jaxpr; its constants)."""

    def flat(*arrays: Any) -> list[Any]:
        if mask is not None:
            *arrays, tokens = arrays  # type: ignore[assignment]
            marker.masks = Masks(tokens, arrays[program.parameters :])
        return run(program, leaves, marker, (), arrays)[0]

    arrays = [*program.arrays, *([] if mask is None else [mask])]
    return jax_versions.opened(jax.make_jaxpr(flat)(*arrays))


Places = Mapping[tuple[str, int], tuple[int, list[Any]]]
"""(role, index) of a mark -> its position and what it marks."""


def without_marks(eqns: Sequence[Any]) -> tuple[list[Any], Places]:
    """(the equations with None in the place of marks, where the marks were)."""
    kept: list[Any] = []
    places: dict[tuple[str, int], tuple[int, list[Any]]] = {}
    for k, eqn in enumerate(eqns):
        is_mark = eqn.primitive is mark
        kept.append(None if is_mark else eqn)
        if is_mark:
            key = eqn.params["role"], eqn.params["index"]
            places.setdefault(key, (k, list(eqn.invars)))
    return kept, places


def dependent(eqns: Sequence[Any], sources: Sequence[Any]) -> set[Any]:
    """The variables that depend on `sources`, which are among them."""
    reached = set(sources)
    for eqn in eqns:
        if eqn is not None and any(v in reached for v in variables(eqn)):
            reached.update(eqn.outvars)
    return reached


def variables(eqn: Any) -> list[Any]:
    """The inputs of an equation that are not literals."""
    return [v for v in eqn.invars if not isinstance(v, Literal)]


class Marker(Visitor):
    """Marks the input and the result of every product with a wanted leaf.

    Attributes:
      products: product per index of a mark.
      hidden: leaf -> (reason, index of the block mark) where products are out of reach.
    """

    def __init__(self, layouts: Mapping[str, Layout], dependence: Dependence):
        """Wants the leaves of `layouts`; knows which operands depend on the batch."""
        self.layouts, self.dependence = layouts, dependence
        self.products: list[Product] = []
        self.hidden: dict[str, tuple[str, int]] = {}
        self.places: dict[Where, int] = {}
        self.computed: dict[tuple, tuple[Any, Any]] = {}
        self.blocks = 0
        self.reason: str | None = None
        self.rules = RULES

    def product(self, where: Where, product: Product, state: Any) -> tuple[Any, Any]:
        """Marks the input; the product runs dense."""
        path, valid = product.weight.path, None
        if self.masks is not None:
            layout = self.layouts.get(path)
            fitted = None if layout is None else product.fit(layout)
            valid = self.masks.tokens(where, fitted or product, self.varies(where))
        if path not in self.layouts:
            return None, state
        if self.reason is not None:
            self.hidden.setdefault(path, (self.reason, self.blocks - 1))
            return None, state
        self.places[where] = len(self.products)
        routes = self.routes(product)
        read = [product.operand] if routes is None else [product.operand, routes]
        mark.bind(*read, role="input", index=len(self.products))
        if valid is not None:
            mark.bind(valid, role="valid", index=len(self.products))
        self.products.append(product)
        return None, state

    def varies(self, where: Where) -> bool:
        """Whether an operand of a product depends on the batch; if unknown, it does."""
        return any(self.dependence.get(equation(where), [True]))

    def routes(self, product: Product) -> Any:
        """The routes of a product, computed once for all that share them."""
        if product.route is None:
            return None
        _, lookup = product.route
        key = id(lookup.source), lookup.key, product.routed.tobytes()  # type: ignore
        if key not in self.computed:
            # The source is kept, so that its id stays its own.
            self.computed[key] = product.routes(), lookup.source
        return self.computed[key][0]

    def bound(self, where: Where, eqn: Any, operands: list, results: list) -> None:
        """Marks the result of a product."""
        del operands
        at = self.places.get(where)
        if at is not None and eqn.primitive.name != mark.name:
            mark.bind(results[0], role="result", index=at)

    @contextlib.contextmanager
    def hiding(self, reason: str) -> Iterator[None]:
        """Products inside cannot be cut, because of `reason`."""
        before = self.reason
        if before is None:
            mark.bind(role="block", index=self.blocks)
            self.blocks += 1
            self.reason = reason
        try:
            yield
        finally:
            self.reason = before


def inlined(
    eqn: Any, operands: list, visitor: Any, state: Any, where: tuple, sub: Callable
) -> control_flow.Result:
    """Nothing is differentiated here, so a rematerialised body needs no border."""
    del visitor, where
    return sub(eqn.params["jaxpr"], operands, state)


def opaque(rule: Callable, reason: str) -> Callable:
    """A rule whose products are out of reach."""

    def visit(eqn, operands, visitor, state, where, sub):
        with visitor.hiding(reason):
            return rule(eqn, operands, visitor, state, where, sub)

    return visit


def visit_scan(
    eqn: Any, operands: list, visitor: Any, state: Any, where: tuple, sub: Callable
) -> control_flow.Result:
    """A scan over stacked weights becomes its steps; one over time stays."""
    p = eqn.params
    consts, carry, xs = jax_versions.scan_operands(p, operands)
    if visitor.reason is not None or not any(is_stack(x, visitor.layouts) for x in xs):
        rule = opaque(control_flow.visit_scan, "inside a scan that does not stack it")
        return rule(eqn, operands, visitor, state, where, sub)
    steps = range(p["length"])
    results: list[list[Any]] = [[] for _ in steps]
    for k in reversed(steps) if p["reverse"] else steps:
        parts = [control_flow.row(x, position(plain([x])[0], k), k) for x in xs]
        outs, state = sub(p["jaxpr"], [*consts, *carry, *parts], state, k)
        carry, results[k] = outs[: len(carry)], plain(outs[len(carry) :])
    return [*carry, *(jnp.stack(ys) for ys in zip(*results, strict=True))], state


def position(x: Any, k: int) -> Any:
    """x[k] along the first axis."""
    return jax.lax.dynamic_index_in_dim(x, np.int32(k), 0, keepdims=False)


def is_stack(x: Any, layouts: Mapping[str, Layout]) -> bool:
    """Whether a scanned operand is a wanted leaf with one matrix per step."""
    wanted = isinstance(x, Tracked) and x.path in layouts
    return wanted and control_flow.scannable(x) and bool(x.view.dims[0])


RULES = {
    **control_flow.RULES,
    **dict.fromkeys(("remat2", "remat", "checkpoint"), inlined),
    "scan": visit_scan,
    "cond": opaque(control_flow.visit_cond, "inside a cond"),
    "while": opaque(control_flow.visit_while, "inside a while loop"),
    "shard_map": opaque(control_flow.visit_shard_map, "inside a shard_map"),
}


class Reading(NamedTuple):
    """A product that reads its leaf in the wanted layout, with its marks on the line.

    Attributes:
      path: the leaf.
      at: position per stack axis of the leaf; None where the whole axis takes part.
      read: the input, and the routes if there are any; equal for equal inputs.
      where: position from which on the input is known.
      result: the variable of the result, or None.
      valid: the variable that says which tokens count, or None.
      product: the product.
    """

    path: str
    at: tuple[int | None, ...]
    read: tuple[Any, ...]
    where: int
    result: Any
    valid: Any
    product: Product


def find_cuts(line: Line, marker: Marker, places: Places) -> list[Cut]:
    """The cuts of a line, in order; every wanted leaf that is used is in one."""
    hidden = marker.hidden.items()
    first = {path: places["block", block][0] for path, (_, block) in hidden}
    reasons = {path: reason for path, (reason, _) in hidden}
    by_leaf = readings(line, marker, places, first, reasons)
    by_input: dict[tuple, list[Reading]] = defaultdict(list)
    for path, own in by_leaf.items():
        reason = reasons.get(path) or overlap(own, marker.layouts[path])
        if reason is not None:
            reasons[path] = reason
            continue
        for reading in own:
            by_input[reading.read, reading.product.columns].append(reading)
    cuts = [together(line, same) for same in by_input.values()]
    plain_at: dict[int, dict[str, str]] = defaultdict(dict)
    for path, reason in reasons.items():
        plain_at[first[path]][path] = reason
    cuts += [
        Cut(where, None, None, None, (), leaves) for where, leaves in plain_at.items()
    ]
    return sorted(cuts, key=lambda cut: cut.position)


def readings(
    line: Line,
    marker: Marker,
    places: Places,
    first: dict[str, int],
    reasons: dict[str, str],
) -> dict[str, list[Reading]]:
    """Leaf -> its products, one for each input and part of the leaf.

    Args:
      line: the program.
      marker: what it met.
      places: where the marks are.
      first: leaf -> where it is read first; gets those of all products.
      reasons: leaf -> why it cannot be cut; gets those that are found here.
    """
    same, constant = numbered(line), []
    by_leaf: dict[str, dict[tuple, Reading]] = defaultdict(dict)
    for k, met in enumerate(marker.products):
        path, layout = met.weight.path, marker.layouts[met.weight.path]
        product = met.fit(layout)
        if product is None or product.layout != layout:
            continue  # another reading of a tied leaf: not counted, as in calibrate
        where, (operand, *routes) = places["input", k]
        first[path] = min(where, first.get(path, where))
        at = tuple(product.index.get(f) for f in layout.stack)
        if any(i is not None and not isinstance(i, int) for i in at):
            reasons.setdefault(path, "indexed by a computed position")
        elif operand not in line.data:
            constant.append(path)
        elif not line.data.issuperset(routes):
            reasons.setdefault(path, "its tokens are routed whatever the batch is")
        else:
            read = (same.same(operand), *routes)
            (result,) = places.get(("result", k), (0, [None]))[1]
            (valid,) = places.get(("valid", k), (0, [None]))[1]
            reading = Reading(path, at, read, where, result, valid, product)
            by_leaf[path].setdefault((at, read, product.columns), reading)
    for path in constant:
        if path not in by_leaf:  # beside others it is an auxiliary product
            reasons.setdefault(path, "its input does not depend on the batch")
    return {path: list(own.values()) for path, own in by_leaf.items()}


def together(line: Line, same: Sequence[Reading]) -> Cut:
    """The cut of products with one input, where the first of them has it."""
    first = min(same, key=lambda reading: reading.where)
    members = tuple(member(line, r, first.where) for r in same)
    operand, *routes = first.read
    route = routes[0] if routes else None
    return Cut(first.where, operand, route, first.valid, members, {})


def member(line: Line, reading: Reading, before: int) -> Member:
    """A product at the cut that lies at `before`."""
    product = reading.product
    found = stream(line, reading.result, product, before)
    if found is None or product.factor is not None:
        return Member(reading.path, reading.at, product, found)
    return Member(reading.path, reading.at, product, None, UNKNOWN_FACTOR)


def numbered(line: Line) -> Numbering:
    """Numbers that tell which variables have the same value."""
    numbering = Numbering()
    for eqn in line.eqns:
        if eqn is not None:
            numbering.computed(eqn, eqn.invars, eqn.outvars)
    return numbering


def overlap(own: Sequence[Reading], layout: Layout) -> str | None:
    """Why the products of a leaf are not its matrices, each once; None if they are."""
    positions = [reading.at for reading in own]
    if len(set(positions)) < len(positions):
        return f"used on {len(positions)} different inputs"
    whole = {tuple(i is None for i in at) for at in positions}
    steps = [
        f.size for f, i in zip(layout.stack, positions[0], strict=True) if i is not None
    ]
    if len(whole) > 1 or len(positions) != math.prod(steps):
        return "not used matrix by matrix"
    return None


def stream(line: Line, result: Any, product: Product, before: int) -> Stream | None:
    """What the result of a product is added to, when it is known before the cut.

    Follows the result through biases, casts and changes of shape, as long as nothing
    else reads it.
    """
    if result is None or not product.whole:
        return None
    moves: list[Any] = []
    while len(line.users[result]) == 1 and not is_output(line, result):
        eqn = line.users[result][0]
        name = eqn.primitive.name
        if name == "transpose" or name in RESHAPES or name in ALIASES:
            moves.append(eqn)
        elif name in ("add", "add_any"):
            other = eqn.invars[1] if eqn.invars[0] is result else eqn.invars[0]
            known = not isinstance(other, Literal) and other in line.data
            if known and line.place[other] < before:
                return Stream(other, reverse(product, moves))
        else:
            return None
        result = eqn.outvars[0]
    return None


def is_output(line: Line, var: Any) -> bool:
    """Whether the program returns this very value."""
    return any(v is var for v in line.outputs)


def reverse(product: Product, moves: Sequence[Any]) -> Callable[[Array], Array]:
    """The way back from the shape after `moves` to [*stacked, tokens, o]."""
    layout = product.layout
    stacked = [f.size for f in product.stacked]
    tokens, o = math.prod(product.free), layout.matrix_shape[0]

    def back(d: Array) -> Array:
        shape = jax.ShapeDtypeStruct((*stacked, tokens, o), jnp.float32)
        (y,) = jax.linear_transpose(lambda y: product.moved(y, moves), shape)(
            d.astype(jnp.float32)
        )
        return y

    return back
