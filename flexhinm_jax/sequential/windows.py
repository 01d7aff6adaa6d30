"""Windows of a walk: what lies between two places of a program, as a function.

A window is a run of cuts whose weights belong together, such as those of a block. In go
a `Line` and which block every cut is of; `divide` puts a border, a cut without members,
where each window begins and where the last one ends, and `window` makes of the segments
between two borders a function

    outputs = f(*sources, *frozen, *inputs)

Of `x = x + relu(x @ p["up"][k]) @ p["down"][k]`, block by block, the window of block 3
has the sources ("up", row 3) and ("down", row 3), no frozen values, the input x where
block 3 begins and the output x where it ends. A border lies where least is alive,
behind a residual addition and not inside of it. Sources are the parameters that the
window alone reads; `Trainer` says how they are fitted.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.extend.core import Literal as Constant

from flexhinm_jax import jax_versions
from flexhinm_jax.sequential import segments
from flexhinm_jax.sequential.straight import Cut, Line, dependent, variables

PART = r"^.*?[^./]*\d[./][^./]+"
"""A block and the next part of the path: "model.layers.3.mlp"."""


class Source(NamedTuple):
    """A parameter that a window alone reads.

    Attributes:
      path: the leaf.
      row: position along the first axis, where the window reads no other one; None for
        the whole leaf.
      read: the variables of the program that hold it.
    """

    path: str
    row: int | None
    read: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Window:
    """What lies between two cuts, as a function.

    Attributes:
      name: of the window.
      sources: the parameters that may move, by path and row.
      frozen: parameters and constants that stay.
      inputs: values of the batch where it begins.
      outputs: values where it ends that the sources decide about.
      eqns: in order.
    """

    name: str
    sources: list[Source]
    frozen: list[Any]
    inputs: list[Any]
    outputs: list[Any]
    eqns: list[Any]


class Batch(NamedTuple):
    """One batch at a window.

    Attributes:
      frozen: values of `Window.frozen`.
      inputs: those of `Window.inputs`, of the pruned model.
      goals: those of `Window.outputs` that are wanted.
      valid: bool over leading axes of the goals, which tokens count; None for all.
    """

    frozen: Any
    inputs: Any
    goals: Any
    valid: Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a trainer is given.

    Attributes:
      name: of the window.
      sources: arrays to begin with.
      keep: per source which weights may be other than zero; None for all.
      count: number of batches.
      program: number of a batch -> function of (*sources, *frozen, *inputs) that
        returns the outputs; equal functions are the same object.
      batch: number -> the batch.
      key: PRNG key.
      known: kept from window to window, for what was compiled.
    """

    name: str
    sources: list[Array]
    keep: list[Array | None]
    count: int
    program: Callable[[int], Callable[..., list[Array]]]
    batch: Callable[[int], Batch]
    key: Array
    known: dict[Hashable, Any]


class Fit(NamedTuple):
    """What a trainer returns.

    Attributes:
      sources: arrays, zero outside their supports.
      before: || y - goal ||^2 / || goal ||^2 on all batches at the start.
      after: the same with the returned arrays, not more.
    """

    sources: Sequence[Any]
    before: float
    after: float


class Trainer(Protocol):
    """How the parameters of a window are fitted.

    Attributes:
      window: which cuts belong together: "block", "part", a number of blocks, or a
        regular expression on leaf paths.
      target: "asym" for what the dense model has where the window ends, "seq" for what
        the window with dense weights gives for the inputs of the pruned model.
    """

    @property
    def window(self) -> int | str:
        """See above."""
        ...

    @property
    def target(self) -> Literal["seq", "asym"]:
        """See above."""
        ...

    def fit(self, problem: Problem) -> Fit:
        """Fits the parameters of a window."""
        ...


def divide(
    line: Line,
    outputs: Sequence[Any],
    paths: Sequence[str],
    name: Callable[[Cut], Hashable],
    count: int,
) -> list[str]:
    """Puts a cut without members where each window begins, and where the last ends.

    Args:
      line: the program; its cuts are changed.
      outputs: variables that are wanted at the end.
      paths: path per variable of `line.params`.
      name: cut -> which block it belongs to.
      count: how many of these make a window.

    Returns:
      The names of the windows, those of their first blocks.
    """
    groups = [list(same) for _, same in itertools.groupby(line.cuts, name)]
    chunks = [groups[k : k + count] for k in range(0, len(groups), count)]
    alive, places = alive_bytes(line, outputs), readers(line, paths)

    def narrowest(first: int, last: int, late: int) -> Cut:
        # Before the batch becomes numbers, as by a table of words, nothing is fitted.
        floating = [p for p in range(first, last + 1) if alive[p].floating] or [last]
        place = min(floating, key=lambda p: (alive[p].size, -late * p))
        return Cut(place, None, None, None, (), {})

    def behind(last: int) -> int:
        """The first place behind the products so far."""
        read = (k for cut in cuts for path in leaves(cut) for k in places[path])
        return max((k + 1 for k in read if k < last), default=last)

    cuts: list[Cut] = []
    for chunk in chunks:
        start = chunk[0][0].position
        border = narrowest(behind(start), start, 1) if cuts else narrowest(0, start, -1)
        cuts += [border, *itertools.chain(*chunk)]
    end = len(line.eqns)
    cuts.append(narrowest(behind(end), end, 1))
    line.cuts[:] = cuts
    return [str(name(chunk[0][0])) for chunk in chunks]


def leaves(cut: Cut) -> list[str]:
    """The leaves that are solved at a cut."""
    return [*(m.path for m in cut.members), *cut.plain]


def readers(line: Line, paths: Sequence[str]) -> dict[str, list[int]]:
    """Path -> positions of the equations of the batch that read a parameter."""
    place = {id(eqn): k for k, eqn in enumerate(line.eqns) if eqn is not None}
    return {
        path: [place[one] for eqn in line.users[v] for one in reach(line, eqn)]
        for path, v in zip(paths, line.params, strict=True)
    }


def is_border(cut: Cut) -> bool:
    """Whether nothing is solved at a cut."""
    return not cut.members and not cut.plain


class Alive(NamedTuple):
    """What is alive at a place of a program.

    Attributes:
      size: bytes.
      floating: whether there is a floating-point value.
    """

    size: int
    floating: bool


def alive_bytes(line: Line, outputs: Sequence[Any]) -> list[Alive]:
    """The values of the batch that are alive before every equation, and at the end."""
    alive, counted = set(outputs), []
    read: dict[int, set[Any]] = {}
    for cut in line.cuts:
        read.setdefault(cut.position, set()).update(segments.read_at(cut))
    for k in reversed(range(len(line.eqns) + 1)):
        eqn = line.eqns[k] if k < len(line.eqns) else None
        if eqn is not None and any(v in alive for v in eqn.outvars):
            alive.difference_update(eqn.outvars)
            alive.update(v for v in variables(eqn) if v in line.data)
        alive |= read.get(k, set())
        floating = any(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in alive)
        counted.append(Alive(sum(map(size, alive)), floating))
    return counted[::-1]


def size(v: Any) -> int:
    """Bytes of a variable of a program."""
    return math.prod(v.aval.shape) * np.dtype(v.aval.dtype).itemsize


def window(
    name: str,
    line: Line,
    parts: Sequence[segments.Segment],
    paths: Sequence[str],
    needed: set[int],
    rows: "Rows",
) -> Window:
    """The function of some segments.

    Args:
      name: of the window.
      line: the program.
      parts: the segments from its first cut to where it ends.
      paths: path per variable of `line.params`.
      needed: ids of the equations of all segments.
      rows: which row of a parameter an equation reads.
    """
    fixed = {id(eqn): eqn for part in parts for eqn in part.fixed}
    of_batch = [eqn for part in parts for eqn in part.eqns]
    eqns = [*fixed.values(), *of_batch]
    path_of = dict(zip(line.params, paths, strict=True))
    inside = {id(eqn) for eqn in of_batch}
    sources, taking = sources_of(line, eqns, path_of, inside, needed, rows)
    eqns = [eqn for eqn in eqns if id(eqn) not in taking]
    moving = [v for source in sources for v in source.read]
    inner = {v for eqn in eqns for v in eqn.outvars} | set(moving)
    outside = segments.ordered(
        v for eqn in eqns for v in variables(eqn) if v not in inner
    )
    decided = dependent(eqns, moving)
    outputs = [
        v
        for part in parts
        for v in part.outputs
        if v in parts[-1].alive
        and v in decided
        and jnp.issubdtype(v.aval.dtype, jnp.floating)
    ]
    return Window(
        name,
        sources=sources,
        frozen=[v for v in outside if v not in line.data],
        inputs=[v for v in outside if v in line.data],
        outputs=outputs,
        eqns=eqns,
    )


def sources_of(
    line: Line,
    eqns: Sequence[Any],
    path_of: Mapping[Any, str],
    inside: set[int],
    needed: set[int],
    rows: "Rows",
) -> tuple[list[Source], set[int]]:
    """The parameters that a window alone reads, and what takes rows of them.

    Args:
      line: the program.
      eqns: of the window, those of parameters alone among them.
      path_of: variable of a parameter -> its path.
      inside: ids of the equations of the batch in the window.
      needed: those of all segments.
      rows: which row of a parameter an equation reads.

    Returns:
      The sources, and the ids of the equations whose results they are.
    """
    read: dict[tuple[str, int | None], list[Any]] = {}
    taking: set[int] = set()
    for v in dict.fromkeys(v for eqn in eqns for v in variables(eqn) if v in path_of):
        for row, eqn in alone(line, v, inside, needed, rows):
            own = read.setdefault((path_of[v], row), [])
            own += [v] if eqn is None else eqn.outvars
            if eqn is not None:
                taking.add(id(eqn))
    sources = [Source(*key, tuple(read[key])) for key in sorted(read, key=str)]
    return sources, taking


def alone(
    line: Line, v: Any, inside: set[int], needed: set[int], rows: "Rows"
) -> list[tuple[int | None, Any]]:
    """What a window alone reads of a parameter.

    Args:
      line: the program.
      v: the variable of the parameter.
      inside: ids of the equations of the batch in the window.
      needed: those of all segments.
      rows: which row of a parameter an equation reads.

    Returns:
      [(None, None)] for the whole parameter; (row, the equation that takes it) for some
      rows of it; [] where other windows read the same, or it is not floating.
    """
    if not jnp.issubdtype(v.aval.dtype, jnp.floating):
        return []
    reached = [(eqn, reach(line, eqn) & needed) for eqn in line.users[v]]
    elsewhere = {rows.of(eqn, v) for eqn, ids in reached if ids - inside}
    if not elsewhere:
        return [(None, None)]
    here = [(rows.of(eqn, v), eqn) for eqn, ids in reached if ids & inside]
    shapes = {eqn.outvars[0].aval.shape for _, eqn in here}
    shared = any(row is None or row in elsewhere for row, _ in here)
    return [] if None in elsewhere or shared or len(shapes) > 1 else here


def reach(line: Line, eqn: Any) -> set[int]:
    """Ids of the equations of the batch that an equation of parameters decides about.

    That of an equation of the batch is its own.
    """
    reached, left = set(), [eqn]
    while left:
        one = left.pop()
        if any(v in line.data for v in one.outvars):
            reached.add(id(one))
        else:
            left += [user for v in one.outvars for user in line.users.get(v, ())]
    return reached


class Rows:
    """Which row of a stacked parameter an equation reads, found by running it."""

    def __init__(self):
        """Knows none."""
        self.known: dict[tuple[int, Any], int | None] = {}

    def of(self, eqn: Any, v: Any) -> int | None:
        """Row k where the equation gives v[k] or v[k:k+1]; None where it does not."""
        key = id(eqn), v
        if key not in self.known:
            self.known[key] = self._find(eqn, v)
        return self.known[key]

    def _find(self, eqn: Any, v: Any) -> int | None:
        shape = v.aval.shape
        if not shape or variables(eqn) != [v] or len(eqn.outvars) != 1:
            return None
        if eqn.outvars[0].aval.shape not in (shape[1:], (1, *shape[1:])):
            return None
        # Every element is the number of its row, then its number within the row.
        row = math.prod(shape[1:])
        numbers = np.arange(shape[0] * row, dtype=np.int64).reshape(shape)
        first = self._run(eqn, numbers // row, v)
        if first.size == 0 or (first != first.flat[0]).any():
            return None
        for digits in (numbers % row % 251, numbers % row // 251 % 251):
            row_of = self._run(eqn, digits, v)
            if (row_of.reshape(-1) != digits[int(first.flat[0])].reshape(-1)).any():
                return None
        return int(first.flat[0])

    def _run(self, eqn: Any, numbers: np.ndarray, v: Any) -> np.ndarray:
        x = jnp.asarray(numbers, v.aval.dtype)
        values = [a.val if isinstance(a, Constant) else x for a in eqn.invars]
        return np.asarray(jax_versions.bind(eqn, values)[0]).astype(np.int64)


def source_of(leaf: Any, source: Source) -> Any:
    """The array of a source, in the shape that the program reads."""
    whole = leaf if source.row is None else leaf[source.row]
    return jnp.asarray(whole).reshape(source.read[0].aval.shape)


def with_source(leaf: Any, source: Source, value: Any) -> Any:
    """A leaf with another value of a source."""
    if source.row is None:
        return jnp.asarray(value).reshape(leaf.shape)
    return leaf.at[source.row].set(jnp.asarray(value).reshape(leaf.shape[1:]))


def program(
    compiler: segments.Compiler, window: Window
) -> Callable[..., list[jax.Array]]:
    """A window as a function of (*sources, *frozen, *inputs), to be differentiated.

    Equal windows are the same object.
    """
    # A source that is read through several variables is the first one everywhere.
    alias = {v: s.read[0] for s in window.sources for v in s.read[1:]}
    eqns = [renamed(eqn, alias) for eqn in window.eqns] if alias else window.eqns
    heads = [source.read[0] for source in window.sources]
    inputs = [*heads, *window.frozen, *window.inputs]
    return inspect.unwrap(compiler.function(eqns, inputs, window.outputs))


def renamed(eqn: Any, alias: Mapping[Any, Any]) -> Any:
    """An equation that reads other variables."""
    invars = [v if isinstance(v, Constant) else alias.get(v, v) for v in eqn.invars]
    return eqn.replace(invars=invars)
