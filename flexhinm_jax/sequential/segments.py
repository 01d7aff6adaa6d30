"""Runs a line of equations cut by cut over all calibration batches.

Between two cuts lies a segment: a jitted function of the parameters it reads and of the
values that are alive at the first cut. Values that nobody reads any more are freed.
Where the dense model runs beside the pruned one, values that the pruning cannot have
changed are computed and kept once.

Equal segments (the layers of a network) are compiled once: a segment is known by its
equations with the variables numbered.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from flexhinm_jax import jax_versions
from flexhinm_jax.io.shelf import Shelf
from flexhinm_jax.sequential.straight import Cut, Line, dependent, variables


@dataclasses.dataclass(frozen=True)
class Segment:
    """The equations between two cuts that later cuts depend on.

    Attributes:
      fixed: equations of parameters alone, run once and not per batch.
      eqns: the others, in order.
      statics: what `eqns` read of parameters, constants and results of `fixed`.
      inputs: values of the batch that are read.
      outputs: values that are read later.
      alive: values of the batch that are kept after the segment, outputs included.
    """

    fixed: list[Any]
    eqns: list[Any]
    statics: list[Any]
    inputs: list[Any]
    outputs: list[Any]
    alive: set[Any]


def cut(line: Line, outputs: Iterable[Any] = ()) -> list[Segment]:
    """The segment before every cut, and one from the last cut to the end.

    Args:
      line: the program.
      outputs: variables of the batch that are wanted at the end.
    """
    maker = {v: eqn for eqn in line.eqns if eqn is not None for v in eqn.outvars}
    known = {*line.params, *line.consts}
    starts = [0, *(c.position for c in line.cuts), len(line.eqns)]
    parts: list[Segment] = []
    later: set[Any] = set()
    for k in reversed(range(len(starts) - 1)):
        alive = later | (read_at(line.cuts[k]) if k < len(line.cuts) else {*outputs})
        wanted, eqns = set(alive), []
        for eqn in reversed(line.eqns[starts[k] : starts[k + 1]]):
            if eqn is None or not any(v in wanted for v in eqn.outvars):
                continue
            if not any(v in line.data for v in variables(eqn)):
                continue
            eqns.insert(0, eqn)
            wanted.difference_update(eqn.outvars)
            wanted.update(v for v in variables(eqn) if v in line.data)
        own = {v for eqn in eqns for v in eqn.outvars}
        static = static_part(eqns, line.data, maker, known)
        read = ordered(v for eqn in eqns for v in variables(eqn))
        inputs = [v for v in read if v in line.data and v not in own]
        statics = [v for v in read if v not in line.data]
        outputs = ordered(v for eqn in eqns for v in eqn.outvars if v in alive)
        parts.insert(0, Segment(static, eqns, statics, inputs, outputs, alive))
        later = wanted
    return parts


def read_at(cut: Cut) -> set[Any]:
    """The values that are read at a cut."""
    streams = {m.stream.var for m in cut.members if m.stream is not None}
    read = {v for v in (cut.operand, cut.routes, cut.valid) if v is not None}
    return streams | read


def static_part(
    eqns: Sequence[Any], data: set[Any], maker: Mapping[Any, Any], known: set[Any]
) -> list[Any]:
    """The equations of the parameters alone that `eqns` depend on, in order."""
    needed: dict[int, Any] = {}

    def need(v: Any) -> None:
        if v in data or v in known or id(maker[v]) in needed:
            return
        eqn = maker[v]
        for w in variables(eqn):
            need(w)
        needed[id(eqn)] = eqn

    for eqn in eqns:
        for v in variables(eqn):
            need(v)
    return list(needed.values())


def fixed(line: Line, segment: Segment, params: Sequence[Any]) -> list[Any]:
    """The values of `segment.statics` for these arrays of the parameters."""
    env = {**dict(zip(line.params, params, strict=True)), **line.consts}
    for eqn in segment.fixed:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        env.update(zip(eqn.outvars, jax_versions.bind(eqn, values), strict=True))
    return [env[v] for v in segment.statics]


def ordered(values: Iterable[Any]) -> list[Any]:
    """The values without repetitions."""
    return list(dict.fromkeys(values))


class Compiler:
    """Jits functions given as equations; equal ones share one function.

    Attributes:
      known: signature -> function.
    """

    def __init__(self, before: "Compiler | None" = None):
        """Starts with the functions of an earlier one, which has them in common."""
        self.known: dict[Any, Callable] = {} if before is None else before.known
        # Signatures name objects by id, so these must stay alive.
        self.kept: list[Any] = [] if before is None else before.kept
        self.segments: dict[int, tuple[Segment, Callable]] = {}
        self.traced: dict[Any, tuple[Callable, Any]] = {}

    def segment(self, segment: Segment) -> Callable:
        """(statics, inputs) -> outputs."""
        if id(segment) not in self.segments:
            inputs = [*segment.statics, *segment.inputs]
            run = self.function(segment.eqns, inputs, segment.outputs)
            self.segments[id(segment)] = segment, run
        run = self.segments[id(segment)][1]
        return lambda statics, values: run(*statics, *values)

    def memo(self, name: Any, f: Callable, *args: Any, donate: int = 0) -> list[Any]:
        """f(*args), where equal names mean equal functions and shapes.

        Args:
          name: hashable.
          f: function of arrays that returns a list of arrays.
          *args: arrays.
          donate: the first so many arguments may be overwritten.
        """
        if name not in self.traced:
            body, consts = jax_versions.opened(jax.make_jaxpr(f)(*args))
            inputs = [*body.constvars, *body.invars]
            donated = range(len(consts), len(consts) + donate)
            run = self.function(body.eqns, inputs, body.outvars, tuple(donated))
            self.traced[name] = run, consts
        run, consts = self.traced[name]
        return run(*consts, *args)

    def function(
        self,
        eqns: Any,
        inputs: list[Any],
        outputs: list[Any],
        donated: tuple[int, ...] = (),
    ) -> Callable:
        """A jitted function of the values of `inputs`, some of them donated."""
        key = signature(eqns, inputs, outputs), donated
        if key not in self.known:
            self.kept.append((eqns, inputs, outputs))

            def run(*values: Any) -> list[Any]:
                env = dict(zip(inputs, values, strict=True))
                read = lambda v: v.val if isinstance(v, Literal) else env[v]  # noqa: E731
                for eqn in eqns:
                    results = jax_versions.bind(eqn, [read(v) for v in eqn.invars])
                    env.update(zip(eqn.outvars, results, strict=True))
                return [read(v) for v in outputs]

            # What is rounded to bfloat16 is so wherever programs begin and end: a
            # model cut into blocks gives the same as a whole one.
            self.known[key] = jax.jit(
                run,
                donate_argnums=donated,
                compiler_options={"xla_allow_excess_precision": False},
            )
        return self.known[key]


def signature(eqns: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple:
    """Equal for equations that compute the same, whatever their variables are."""
    number = itertools.count()
    names = {v: next(number) for v in inputs}

    def name(v: Any) -> Any:
        if isinstance(v, Literal):
            return described(v.val), str(v.aval)
        return names[v]

    rows = []
    for eqn in eqns:
        inputs_of = tuple(map(name, eqn.invars))
        names.update((v, next(number)) for v in eqn.outvars)
        out = tuple(str(v.aval) for v in eqn.outvars)
        rows.append((eqn.primitive.name, inputs_of, described(eqn.params), out))
    avals = tuple(str(v.aval) for v in inputs)
    return avals, tuple(rows), tuple(map(name, outputs))


def described(x: Any) -> Any:
    """A hashable description: by content where that is known, by identity elsewhere."""
    if isinstance(x, str | bytes | int | float | bool | complex | type | None):
        return type(x).__name__, x
    if isinstance(x, np.ndarray | np.generic | jax.Array):
        value = np.asarray(x)
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(x, Mapping):
        return tuple((str(k), described(v)) for k, v in sorted(x.items(), key=str))
    if isinstance(x, tuple | list):
        return type(x).__name__, tuple(map(described, x))
    if hasattr(x, "eqns") or hasattr(x, "jaxpr"):
        body, consts = jax_versions.opened(x)
        inside = signature(body.eqns, [*body.constvars, *body.invars], body.outvars)
        return inside, described(list(consts))
    if isinstance(x, np.dtype) or type(x).__module__.split(".")[0] in ("jax", "jaxlib"):
        if type(x).__hash__ is not object.__hash__ and not callable(x):
            try:
                return hash(x), x
            except TypeError:
                pass
    return "object", id(x)


class Runner:
    """One batch on its way along a line.

    Attributes:
      values: those of the pruned model.
      dense: those of the dense model, where pruning may have changed them.
      ahead: those of a model that is pruned as far as `values` have come, and goes on.
    """

    def __init__(
        self,
        line: Line,
        segments: list[Segment],
        batch: Sequence[Any],
        changing: set[Any] | None,
        shelf: Shelf,
        compiler: Compiler,
        twins: Sequence[Any] | None = None,
    ):
        """Places a batch at the start.

        Args:
          line: the program for the shape of this batch.
          segments: from `cut`.
          batch: one array per input of the line.
          changing: variables that pruning may change, whose dense values are kept
            beside the pruned ones; None keeps no dense values.
          shelf: where values are kept.
          compiler: compiles segments.
          twins: the batch as the dense model has it where that differs, None for an
            array that is the same; None for all the same.
        """
        self.line, self.segments, self.compiler = line, segments, compiler
        self.changing, self.shelf = changing, shelf
        self.values = dict(zip(line.inputs, map(shelf.put, batch), strict=True))
        pairs = () if twins is None else zip(line.inputs, twins, strict=True)
        self.dense = {v: shelf.put(x) for v, x in pairs if x is not None}
        self.ahead: dict[Any, Any] = {}

    def advance(self, k: int, now: Sequence[Any]) -> None:
        """Runs the segment before cut `k`; one behind the last cut runs to the end.

        Args:
          k: the cut; they are reached in order.
          now: what `fixed` gives for the parameters now.
        """
        self.back()
        outputs = self.run(self.segments[k], now, self.value)
        self.values.update((v, self.shelf.put(x)) for v, x in outputs.items())
        self.free(self.values, self.segments[k].alive)

    def look(self, k: int, now: Sequence[Any]) -> None:
        """As `advance`, but the values of the pruned model stay where they are."""
        outputs = self.run(self.segments[k], now, self.value)
        self.ahead.update((v, self.shelf.put(x)) for v, x in outputs.items())
        self.free(self.ahead, self.segments[k].alive)

    def back(self) -> None:
        """Forgets the looks since the last advance."""
        self.free(self.ahead, ())

    def advance_dense(self, k: int, dense: Sequence[Any]) -> None:
        """Runs the segment before cut `k` of the dense model, before the pruned one."""
        segment = self.segments[k]
        moved: dict[Any, Any] = {}
        if self.changing is not None and not self.changing.isdisjoint(segment.outputs):
            moved = self.run(segment, dense, self.dense_value)
        self.dense.update(
            (v, self.shelf.put(x)) for v, x in moved.items() if self.changed(v)
        )
        self.free(self.dense, segment.alive)

    def run(
        self, segment: Segment, statics: Sequence[Any], read: Callable[[Any], Any]
    ) -> dict[Any, Any]:
        """The outputs of a segment for these parameters."""
        if not segment.eqns:
            return {}
        f = self.compiler.segment(segment)
        outs = f(statics, [read(v) for v in segment.inputs])
        self.shelf.wait(outs)
        return dict(zip(segment.outputs, outs, strict=True))

    def free(self, kept: dict[Any, Any], alive: Collection[Any]) -> None:
        """Frees the values that nobody reads any more."""
        for v in [v for v in kept if v not in alive]:
            self.shelf.drop(kept.pop(v))

    def value(self, v: Any) -> Any:
        """A value of the pruned model, as far as it was run."""
        return self.shelf.get(self.ahead[v] if v in self.ahead else self.values[v])

    def dense_value(self, v: Any) -> Any:
        """The same value of the dense model."""
        return self.shelf.get(self.dense[v]) if v in self.dense else self.value(v)

    def changed(self, v: Any) -> bool:
        """Whether the dense model may have another value than the pruned one."""
        return self.changing is not None and v in self.changing

    def release(self) -> None:
        """Frees all values."""
        for kept in (self.values, self.dense, self.ahead):
            self.free(kept, ())


def changing(line: Line, moved: Iterable[Any]) -> set[Any]:
    """The variables that change with the parameters in `moved`."""
    return dependent(line.eqns, list(moved))
