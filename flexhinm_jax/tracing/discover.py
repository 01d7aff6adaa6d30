"""Finds which leaves of a parameter tree are contracted, with what, along which axes.

In go a function, its parameters and a batch; out come `Uses`. Of

    def f(p, x): return jax.nn.relu(x @ p["up"] + p["b"]) @ p["down"]

"up" and "down" have one use each, [o, i] with inputs along axis 0, and "b" is skipped:
it is the bias of "up". The function is traced and walked once without running it
(`Traced.find`). The walk records in a `Finder` every contraction of a leaf, which
products read the same input, which leaf is the bias of a product, and what stops the
others. From that `discover` makes a `Use` of every contraction of a leaf that can be
pruned; every other leaf is skipped for a reason that a person can act on.
"""

import dataclasses
import difflib
import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from flexhinm_jax import arguments
from flexhinm_jax.patterns import Pattern
from flexhinm_jax.tracing import contractions, scales
from flexhinm_jax.tracing.contractions import (
    Followed,
    Kind,
    Part,
    Product,
    Stop,
    Tracked,
)
from flexhinm_jax.tracing.program import (
    Program,
    form_of,
    is_array,
    run,
    shapes_of,
    trace,
)
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.tracing.values import (
    ALIASES,
    Dependence,
    Numbering,
    dependence,
)
from flexhinm_jax.tracing.views import Where
from flexhinm_jax.tracing.walker import Visitor
from flexhinm_jax.types import ChannelScale, Layout, Use, Uses

logger = logging.getLogger("flexhinm_jax")

SCALED = Stop("scaled by a value of the batch", Kind.PRIMITIVE)
TIED = Stop(
    "tied: read by gather (embedding) and contracted (head); a rule with a pattern or "
    '"prune" prunes it',
    Kind.LOOKUP,
)


def discover(
    apply_fn: Callable,
    params: Any,
    *batch: Any,
    rules: dict[str, Pattern | str] | None = None,
) -> Uses:
    """Finds the matrices of a model.

    Args:
      apply_fn: pure function, called as apply_fn(params, *batch).
      params: any tree of arrays or `jax.ShapeDtypeStruct`s.
      *batch: the other arguments, arrays or abstract arrays; anything else is static.
      rules: regex -> a pattern for the leaves it matches, "skip" to leave them dense,
        or "prune" to prune a leaf that is skipped by default. The first rule whose
        `re.search` on the normalised path succeeds wins. A leaf that is read as an
        embedding and also contracted (a tied head) is skipped unless a rule asks for
        it. A leaf whose dense value is also needed otherwise, or that is contracted in
        different layouts, is skipped unless a rule says "prune".

    Returns:
      Every leaf, as uses that can be pruned or as skipped with a reason.

    Raises:
      ValueError: a rule that matches no leaf, is neither a pattern nor a known word, or
        whose leaves can all not be pruned.
    """
    arguments.parameters(params)
    return discover_leaves(Traced.of(apply_fn), Leaves.of(params), batch, rules)


def discover_leaves(
    traced: "Traced",
    leaves: Leaves,
    batch: tuple[Any, ...],
    rules: Mapping[str, Pattern | str] | None,
) -> Uses:
    """`discover` of arguments that are what they should be."""
    chosen = choose(rules or {}, list(leaves))
    uses = uses_of(traced.find(leaves, batch), leaves, chosen)
    check_reached(rules or {}, chosen, uses.skipped)
    return uses


def uses_of(
    finder: "Finder", leaves: Leaves, chosen: Mapping[str, tuple[str, Any]]
) -> Uses:
    """Every leaf, as uses that can be pruned or as skipped with a reason.

    Args:
      finder: what the walk found.
      leaves: all leaves.
      chosen: from `choose`; a rule whose leaves can all not be pruned is no error here.
    """
    reasons = {path: reason(finder, leaves, path, chosen.get(path)) for path in leaves}
    skipped = {path: text for path, text in reasons.items() if text is not None}
    uses = []
    for _, use in finder.uses:
        if use.path not in skipped:
            _, action = chosen.get(use.path, (None, None))
            pattern = action if isinstance(action, Pattern) else None
            uses.append(dataclasses.replace(use, pattern=pattern))
    logger.info(
        "%d leaves prunable, %d skipped", len(leaves) - len(skipped), len(skipped)
    )
    for path in dict.fromkeys(use.path for use in uses):
        if len({c.unknown for c in finder.of(path)}) > 1:
            logger.warning(
                "%s: used several times, multiplied with numbers that the program "
                "computes; all its inputs count as if these were the same",
                path,
            )
    dense = {path: leaves[path].size for path in skipped if is_weight(leaves, path)}
    return Uses(tuple(renumbered(uses)), skipped, dense)


def reason(
    finder: "Finder", leaves: Leaves, path: str, choice: tuple[str, Any] | None
) -> str | None:
    """Why a leaf is skipped; None if it is to be pruned.

    Args:
      finder: what the walk found.
      leaves: all leaves.
      path: of the leaf.
      choice: (rule, action) of the first rule that matches it, or None.
    """
    rule, action = choice or (None, None)
    if action == "skip":
        return f"skipped by rule {rule!r}"
    if not finder.of(path):
        return finder.reason(path, leaves[path], path in leaves.on_grid)
    hindrance = None if action == "prune" else finder.hindrance(path)
    # A rule may ask for a leaf against which nothing but a lookup of rows speaks.
    if hindrance is None or (action and hindrance.kind is Kind.LOOKUP):
        return None
    return hindrance.text


def check_reached(
    rules: Mapping[str, Any],
    chosen: Mapping[str, tuple[str, Any]],
    skipped: Mapping[str, str],
) -> None:
    """Raises ValueError for a rule whose leaves can all not be pruned."""
    for rule, action in rules.items():
        hits = [path for path, (first, _) in chosen.items() if first == rule]
        if action != "skip" and hits and all(path in skipped for path in hits):
            reasons = "; ".join(f"{path}: {skipped[path]}" for path in hits[:3])
            raise ValueError(f"rule {rule!r} asks to prune what cannot be: {reasons}")


def is_weight(leaves: Leaves, path: str) -> bool:
    """Whether a leaf is floating, or of eight bits, and has two or more axes."""
    leaf = leaves[path]
    if not is_array(leaf) or len(leaf.shape) < 2:
        return False
    return path in leaves.on_grid or bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def choose(
    rules: Mapping[str, Pattern | str], paths: list[str]
) -> dict[str, tuple[str, Pattern | str]]:
    """Leaf path -> (rule, action) of the first rule that matches the path.

    Raises:
      ValueError: a rule that matches no path, or an unknown action.
    """
    if not isinstance(rules, Mapping):
        raise ValueError(
            f"rules is {arguments.shown(rules)}: need {{regex on leaf paths: pattern, "
            '"skip" or "prune"}'
        )
    for rule, action in rules.items():
        if not isinstance(rule, str):
            raise ValueError(
                f"rules: {arguments.shown(rule)} is no regular expression on leaf "
                "paths; write it as text"
            )
        if not isinstance(action, Pattern) and action not in ("skip", "prune"):
            raise ValueError(
                f'rule {rule!r}: expected a pattern, "skip" or "prune", got {action!r};'
                " patterns.parse reads the text form of a pattern"
            )
        try:
            re.compile(rule)
        except re.error as error:
            raise ValueError(
                f"rule {rule!r} is no regular expression: {error}; re.escape makes "
                "one of a path"
            ) from error
        if not any(re.search(rule, path) for path in paths):
            near = difflib.get_close_matches(rule, paths, n=3, cutoff=0.0)
            raise ValueError(
                f"rule {rule!r} matches no leaf; the nearest paths are {near}"
            )
    out = {}
    for path in paths:
        for rule, action in rules.items():
            if path not in out and re.search(rule, path):
                out[path] = rule, action
    return out


def renumbered(uses: Iterable[Use]) -> list[Use]:
    """The uses with sources counted from 0 in order of execution."""
    numbers: dict[int, int] = {}
    return [
        dataclasses.replace(use, source=numbers.setdefault(use.source, len(numbers)))
        for use in uses
    ]


class Traced:
    """A function of parameters that is traced and searched once per shape of a batch.

    Whatever takes a function of (params, *batch) takes its `Traced` as well: what is
    found is handed on from `discover` to what sums and solves.
    """

    def __init__(self, apply_fn: Callable[..., Any]):
        """Starts with nothing traced; `of` takes a function that may be one of these.

        Args:
          apply_fn: pure function, called as apply_fn(params, *batch).
        """
        self.apply_fn = apply_fn
        self.programs: dict[Any, Program] = {}
        self.finders: dict[int, Finder] = {}  # by the identity of a program

    @classmethod
    def of(cls, apply_fn: Callable[..., Any]) -> "Traced":
        """The function with what is known about it."""
        return apply_fn if isinstance(apply_fn, Traced) else cls(apply_fn)

    def __call__(self, params: Any, *batch: Any) -> Any:
        """The function."""
        return self.apply_fn(params, *batch)

    def program(self, leaves: Leaves, batch: tuple[Any, ...]) -> Program:
        """The program of a batch of this shape."""
        key = form_of((leaves, batch))
        if key not in self.programs:
            program = trace(self.apply_fn, leaves, batch, {})
            shapes = shapes_of(program.arrays)  # keeps no arrays alive
            self.programs[key] = program._replace(arrays=shapes)
        return self.programs[key]

    def find(self, leaves: Leaves, batch: tuple[Any, ...]) -> "Finder":
        """What a walk through that program finds, which runs nothing."""
        program = self.program(leaves, batch)
        if id(program) not in self.finders:
            finder = Finder(program, dependence(program.jaxpr, program.parameters))

            def walked(*arrays: Any) -> list[Any]:
                outs = run(program, leaves, finder, (), arrays)[0]
                finder.read(outs)
                return outs

            jax.eval_shape(walked, *program.arrays)
            self.finders[id(program)] = finder
        return self.finders[id(program)]


@dataclasses.dataclass
class Contraction:
    """One matched product: what is left of it after the walk.

    Attributes:
      path: the leaf.
      where: position of the equation.
      readings: the ways to see it as a product with a matrix.
      auxiliary: no batch can change what the weight is multiplied with.
      scale: the leaf that scales this one, or its product, or None.
      unknown: positions of the equations that multiply the leaf with a number, where
        not all of them are constants.
    """

    path: str
    where: Where
    readings: list["Reading"]
    auxiliary: bool
    scale: ChannelScale | None = None
    unknown: tuple[Where, ...] = ()


@dataclasses.dataclass
class Reading:
    """One way to see a product as a product with a matrix.

    Attributes:
      layout: the matrix view of the leaf.
      at: static position per stack axis.
      source: number of what is contracted.
      window: which part of the outputs it has.
      bias: the leaf added to the result, or None.
    """

    layout: Layout
    at: tuple[int | None, ...]
    source: int
    window: tuple
    bias: "Bias | None" = None


class Result(NamedTuple):
    """What a value of the walk is to products.

    Attributes:
      products: positions of those whose result it is.
      moves: equations that moved the result around since.
      passed: numbers of the values on the way, itself included.
    """

    products: tuple[Where, ...] = ()
    moves: tuple[Any, ...] = ()
    passed: tuple[int, ...] = ()


class Bias(NamedTuple):
    """A leaf that is added to the result of a product, output by output.

    Attributes:
      path: the leaf.
      factor: the constant that the program multiplies the leaf with.
      passed: numbers of the values on the way from the product to the sum.
    """

    path: str
    factor: float
    passed: tuple[int, ...]


class Finder(Visitor):
    """Records every product and every place where a leaf is needed dense."""

    def __init__(self, program: Program, dependence: Dependence):
        """Starts with nothing found.

        Args:
          program: what is walked.
          dependence: which of its operands depend on the batch.
        """
        self.program, self.dependence = program, dependence
        self.contractions: dict[tuple[str, Where], Contraction] = {}
        self.reasons: dict[str, dict[Stop, None]] = {}
        self.stops: dict[str, set[Where]] = {}
        self.added: dict[str, dict[Where, str]] = {}
        self.layouts: dict[str, Layout] = {}
        self.products: dict[Where, Product] = {}
        self.results: dict[int, Result] = {}  # by the identity of a value
        self.readers: Counter[int] = Counter()  # by the identity of a value
        self.numbering = Numbering()

    def product(self, where: Where, product: Product, state: Any) -> tuple[Any, Any]:
        """Records the product; it runs dense."""
        path, changes = product.weight.path, product.weight.view.changes
        scaled = [step.scaled_at for step in changes if step.scaled_at is not None]
        # The sums would be those of unscaled inputs, another scale for every batch.
        if any(any(self.dependence[at]) for at in scaled):
            self.stop(where, product.weight, SCALED)
            return None, state
        applied = [step.scale for step in changes if step.scale is not None]
        if len(applied) > 1:
            self.stop(where, product.weight, Stop("multiplied with several scales"))
            return None, state
        readings = [self.reading(p, where) for p in product.readings]
        auxiliary = not any(self.dependence[contractions.equation(where)])
        scale = applied[0] if applied else None
        unknown = () if product.weight.view.factor is not None else tuple(scaled)
        self.contractions[path, where] = Contraction(
            path, where, readings, auxiliary, scale, unknown
        )
        self.products[where] = product
        return None, state

    def reading(self, p: Product, where: Where) -> Reading:
        """Layout, static positions and source number of a product.

        Products share a source only inside one body: a branch that is not taken and a
        loop that runs again read what they read another number of times.
        """
        layout, columns, route, window = p.layout, p.columns, p.route, p.window
        index = [p.index.get(f) for f in layout.stack]
        traced = tuple(
            None if i is None or isinstance(i, int) else self.numbering.of(i)
            for i in index
        )
        at = tuple(i if isinstance(i, int) else None for i in index)
        read = self.numbering.of(p.operand), columns, layout.stack_shape, traced
        if route is not None:
            lookup = route[1]
            read = *read, self.numbering.of(lookup.source), lookup.key
        source = self.numbering.of_key((contractions.context(where), *read))
        return Reading(layout, at, source, window)

    def stop(self, where: Where, weight: Tracked, reason: Stop) -> None:
        """Collects the reason."""
        self.stops.setdefault(weight.path, set()).add(where)
        self.reasons.setdefault(weight.path, {})[reason] = None

    def bound(self, where: Where, eqn: Any, operands: list, results: list) -> None:
        """Follows values through casts and finds the biases."""
        self.read(operands)
        followed = [k for k, v in enumerate(operands) if isinstance(v, Followed)]
        name = eqn.primitive.name
        if products := self.products_at(where):
            self.remember(results[0], Result(products))
        elif not followed:
            self.numbering.computed(eqn, operands, results)
            if name == "transpose" or name in ALIASES:
                known = self.results.get(id(operands[0]), Result())
                if known.products:
                    moved = known._replace(moves=(*known.moves, eqn))
                    self.remember(results[0], moved)
        elif name in ("add", "mul") and len(followed) == 1:
            (k,) = followed
            known = self.results.get(id(operands[1 - k]), Result())
            leaves = operands[k].tracked
            if len(leaves) != len(known.products):
                return
            pairs = zip(leaves, known.products, strict=True)
            if name == "add":
                for leaf, at in pairs:
                    self.add(leaf, where, at, known)
            elif all([self.scale(leaf, at, known.moves) for leaf, at in pairs]):
                self.remember(results[0], known)

    def read(self, values: Iterable[Any]) -> None:
        """Counts the readers of every value."""
        self.readers.update(id(v) for v in values if id(v) in self.results)

    def products_at(self, where: Where) -> tuple[Where, ...]:
        """The products of one equation; of joined leaves only if all parts are one."""
        if where in self.products:
            return (where,)
        parts: list[Where] = []
        while (*where, Part(len(parts))) in self.products:
            parts.append((*where, Part(len(parts))))
        return tuple(parts)

    def add(self, leaf: Tracked, where: Where, at: Where, result: Result) -> None:
        """Notes that `leaf` is added, at `where`, to a result of the product at `at`.

        It is the bias of a reading whose statistics say what a change of the weight is
        to the sum: those of inputs times the factor of the weight.
        """
        product, factor = self.products[at], leaf.view.factor
        contraction = self.contractions[product.weight.path, at]
        seen = zip(product.readings, contraction.readings, strict=True)
        for p, reading in seen:
            if p.is_along_outputs(leaf, result.moves):
                self.added.setdefault(leaf.path, {})[where] = contraction.path
                known = p.factor is not None and p.factor == p.weight.view.factor
                if known and factor is not None:
                    reading.bias = Bias(leaf.path, factor, result.passed)

    def scale(self, leaf: Tracked, at: Where, moves: tuple[Any, ...]) -> bool:
        """Notes that a result of steps is multiplied with their scale.

        Args:
          leaf: what it is multiplied with.
          at: position of the product.
          moves: equations that moved its result around before that.

        Returns:
          Whether the result is now that of the weights, not of the steps.
        """
        product = self.products[at]
        contraction = self.contractions[product.weight.path, at]
        fitting = [p for p in product.readings if p.is_along_outputs(leaf, moves)]
        if not product.weight.on_grid or contraction.scale is not None or not fitting:
            return False
        contraction.scale = scales.of_outputs(leaf.path, fitting[0].layout)
        reason = Stop(f"the scale of {product.weight.path!r}")
        self.reasons.setdefault(leaf.path, {})[reason] = None
        return leaf.view.factor == 1

    def bias(self, path: str, reading: Reading) -> Bias | None:
        """The bias of a reading: what is added to all that is read of its result.

        None where that leaf, or the result without it, is used for something else.
        """
        own = reading.bias
        if own is None or self.of(own.path):
            return None
        added = self.added[own.path]
        other = self.stops[own.path] - {w for w, to in added.items() if to == path}
        alone = all(self.readers[number] == 1 for number in own.passed)
        return own if alone and not other else None

    def remember(self, value: Any, result: Result) -> None:
        """Notes that `value` is a result of products."""
        self.numbering.alive.append(value)
        passed = *result.passed, id(value)
        self.results[id(value)] = result._replace(passed=passed)

    def looked_up(self, path: str) -> bool:
        """Whether rows of a leaf are read as from an embedding."""
        return any(r.kind is Kind.LOOKUP for r in self.reasons.get(path, ()))

    def of(self, path: str) -> list[Contraction]:
        """The contractions of one leaf, in order of execution.

        Auxiliary ones say nothing about a leaf that has others.
        """
        own = [c for c in self.contractions.values() if c.path == path]
        return [c for c in own if not c.auxiliary] or own

    def layout(self, path: str) -> Layout:
        """The layout of a leaf with contractions; read after the walk."""
        if path not in self.layouts:
            self.layouts[path] = common_layout(self.of(path))
        return self.layouts[path]

    @functools.cached_property
    def uses(self) -> list[tuple[Where, Use]]:
        """All contractions as uses, in order of execution; read after the walk.

        All uses of a leaf have one layout, or its transpose, where they have one in
        common.
        """
        paths = dict.fromkeys(path for path, _ in self.contractions)
        own = {path: self.of(path) for path in paths}
        count: dict[str, int] = {}
        out = []
        for c in self.contractions.values():
            if c not in own[c.path]:
                continue
            want = self.layout(c.path)
            rank = [want, want.transposed]
            best = next(
                (r for layout in rank for r in c.readings if r.layout == layout),
                c.readings[0],
            )
            ordinal = count.get(c.path, 0)
            count[c.path] = ordinal + 1
            bias = self.bias(c.path, best)
            use = Use(
                c.path,
                ordinal,
                best.layout,
                best.at,
                best.source,
                None if bias is None else bias.path,
                scale=c.scale,
                bias_factor=1.0 if bias is None else bias.factor,
            )
            out.append((c.where, use))
        return out

    def hindrance(self, path: str) -> Stop | None:
        """Why a leaf with contractions is not pruned unless a rule asks; None if it is.

        What needs its dense value, or reads it in another way, would meet zeros that
        the pattern put there for the sake of the products.
        """
        contractions, layout = self.of(path), self.layout(path)
        texts = [
            r.text
            for r in self.reasons.get(path, ())
            if r.kind not in (Kind.LOOKUP, Kind.AUXILIARY)
        ]
        if in_layout(contractions, layout) < len(contractions):
            texts.append("contracted in different layouts")
        if len({c.scale for c in contractions}) > 1:
            texts.append("multiplied with different scales")
        if mixes(contractions, layout):
            texts.append("parts of its outputs read different inputs")
        if texts:
            also = "; ".join(dict.fromkeys(texts))
            return Stop(f'contracted, but also: {also}; a rule "prune" prunes it')
        if self.looked_up(path):
            return TIED
        return None

    def reason(self, path: str, leaf: Any, on_grid: bool) -> str:
        """Why a leaf without a contraction, of eight bits or not, cannot be pruned."""
        if not is_array(leaf):
            return f"not an array ({type(leaf).__name__})"
        floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        if not floating and not on_grid:
            return f"not floating point ({leaf.dtype})"
        owners = sorted(set(self.added.get(path, {}).values()))
        if owners:
            return f"bias of {', '.join(map(repr, owners))}"
        reasons = self.reasons.get(path, {})
        telling = [r.text for r in reasons if r.kind is not Kind.PRIMITIVE]
        telling = telling or [r.text for r in reasons]
        if len(leaf.shape) < 2:
            telling = [f"{len(leaf.shape)}-D", *telling]
        if not reasons:
            telling.append("never contracted with an input (bias, norm or unused)")
        return "; ".join(telling)


def common_layout(contractions: list[Contraction]) -> Layout:
    """The layout in which most contractions of a leaf read; the first of equals.

    One in which windows of the outputs read different inputs comes last.
    """
    layouts = [r.layout for c in contractions for r in c.readings]

    def fits(layout: Layout) -> tuple[int, bool]:
        return in_layout(contractions, layout), not mixes(contractions, layout)

    return max(dict.fromkeys(layouts), key=fits)


def in_layout(contractions: list[Contraction], layout: Layout) -> int:
    """How many contractions read a leaf in this layout or its transpose."""
    both = layout, layout.transposed
    return sum(any(r.layout in both for r in c.readings) for c in contractions)


def mixes(contractions: list[Contraction], layout: Layout) -> bool:
    """Whether windows of the outputs of one matrix read different inputs."""
    inputs: dict[tuple, dict[tuple, set[int]]] = {}
    for c in contractions:
        r = next((r for r in c.readings if r.layout == layout), None)
        if r is not None:
            windows = inputs.setdefault(r.at, {})
            windows.setdefault(r.window, set()).add(r.source)
    return any(
        other != first
        for windows in inputs.values()
        for first in [next(iter(windows.values()))]
        for other in windows.values()
    )
