"""All batches from cut to cut: statistics are taken, matrices solved, and on they go.

In goes a `Job` (function, parameters, batches, request), out come plans by leaf path.
`Walk` traces the function once per shape of a batch into a `Line` (`straight`), cuts it
into segments, and takes all batches from cut to cut. A block `relu(x @ a) @ b` has two:

    advance(0)  members(0)  -> the sums of x over all batches, then the plan of a
    advance(1)  members(1)  -> those of relu(x @ a) with a pruned, then the plan of b

Only one cut's Gram matrices exist at a time. Within a span (`spans`) the batches look
ahead with its dense weights; with the pruned ones they walk the same way again.
"""

import dataclasses
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend.core import Literal

from flexhinm_jax import arguments, jax_versions
from flexhinm_jax.io.shelf import Shelf
from flexhinm_jax.pruning.report import worst
from flexhinm_jax.pruning.statistics import booleans, calibrate, unseen_note
from flexhinm_jax.sequential import segments, solver, spans, targets, windows
from flexhinm_jax.sequential.job import Job
from flexhinm_jax.sequential.share import Share
from flexhinm_jax.sequential.straight import Cut, Line, straighten
from flexhinm_jax.sequential.trained import Training
from flexhinm_jax.tracing import meshes
from flexhinm_jax.tracing.discover import Traced
from flexhinm_jax.tracing.program import is_array, split
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import Layout, Plan, Uses

logger = logging.getLogger("flexhinm_jax")


class Programs:
    """What was compiled for one walk and serves the next over an equal function.

    Attributes:
      compiler: the segments.
      solver: solves stacks of matrices.
      measured: program, or its text -> what the compiler says about its memory.
      trained: what a `Trainer` keeps from window to window.
    """

    def __init__(self, solver: Callable[..., Any] = solver.solve_stack):
        """Starts with nothing compiled."""
        self.compiler = segments.Compiler()
        self.solver = solver
        self.measured: dict[Any, Any] = {}
        self.trained: dict[Any, Any] = {}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One matrix is done.

    Attributes:
      path: the leaf.
      at: position per stack axis of the leaf; None where the whole axis was solved.
      error: || X (W' - W) ||^2 / || X W ||^2 on the inputs of the pruned model.
      seconds: wall time since the previous record.
      held: bytes of activations in memory.
      done: matrices done so far.
      total: matrices in all.
      note: why the leaf could not be cut, or that its Gram matrix needed more damping
        than asked; "" for nothing to say.
      facts: how the solving went: "damping" (fraction used), "steps" and "settled" of
        ALPS; of a wrapped method "inner.damping" and so on; empty for a method that
        reports nothing.
    """

    path: str
    at: tuple[int | None, ...]
    error: float
    seconds: float
    held: int
    done: int
    total: int
    note: str = ""
    facts: Mapping[str, float | bool] = dataclasses.field(default_factory=dict)


class Walk:
    """The batches on their way from cut to cut.

    Attributes:
      runners: one per batch.
      masks: per batch, which tokens count; None for all.
      share: which batches of all processes these are.
      lines: per shape of a batch, the program and its segments.
      cuts: those of the first shape.
      spans: the cuts at which values wait until the weights up to the next are pruned.
      windows: names of what is trained together.
      unseen: path -> matrices that no input reached.
    """

    def __init__(
        self,
        job: Job,
        shelf: Shelf,
        *,
        twins: Sequence[Sequence[Any]] | None = None,
        programs: Programs | None = None,
        share: Share | None = None,
        to_end: bool = False,
    ):
        """Traces the function once per shape of a batch.

        Args:
          job: what to do.
          shelf: where values of the batches are kept.
          twins: per batch its arrays as the dense model has them, where they differ.
          programs: compiled before, in a walk of an equal function.
          share: which batches of all processes those of the job are; None for all.
          to_end: goes on behind the last cut, for `outputs`.
        """
        self.job, self.target, self.shelf = job, job.request.target, shelf
        self.programs = programs or Programs()
        self.share = share or Share(len(job.batches))
        self.compiler = segments.Compiler(self.programs.compiler)
        self.to_end = to_end
        self.reached = -1
        self.rows = windows.Rows()
        self.unseen: Counter[str] = Counter()
        shapes: dict[Any, Shape] = {}
        self.runners: list[segments.Runner] = []
        self.masks: list[Any] = []
        traced = Traced.of(job.apply_fn)
        for n, batch in enumerate(job.batches):
            arrays, skeleton = split(batch)
            twin = None if twins is None else [*twins[n]]
            mask = None
            if job.token_mask is not None:
                mask = booleans(job.token_mask, batch)
                arrays = [*arrays, mask]
                twin = None if twin is None else [*twin, None]
            self.masks.append(mask)
            key = tuple((x.shape, str(x.dtype)) for x in arrays), skeleton
            if key not in shapes:
                shapes[key] = self.shape(traced, batch, mask, twin)
            self.runners.append(self.runner(shapes[key], arrays, twin))
        self.lines = [(shape.line, shape.parts) for shape in shapes.values()]
        self.cuts = self.lines[0][0].cuts
        self.spans = spans.spans(job.request, self.cuts)
        self.check()

    def runner(
        self, shape: "Shape", arrays: list[Any], twin: list[Any] | None
    ) -> segments.Runner:
        """One batch at the start of its way."""
        return segments.Runner(
            shape.line,
            shape.parts,
            arrays,
            shape.changing if self.job.request.beside else None,
            self.shelf,
            self.compiler,
            twin,
        )

    def shape(self, traced: Traced, batch: Any, mask: Any, twin: Any) -> "Shape":
        """The line of all batches of one shape, cut; names the windows.

        Args:
          traced: the function.
          batch: one of them.
          mask: which of its tokens count, or None.
          twin: its inputs as the dense model has them, where they differ, or None.
        """
        job, request = self.job, self.job.request
        leaves, layouts = Leaves.of(job.tree(job.leaves)), layouts_of(job)
        line = straighten(traced.program(leaves, batch), leaves, layouts, mask)
        names = [p for p in job.paths if is_array(job.leaves[p])]
        moved = {*layouts, *job.bias.values()}
        if request.reconstruct is not None:
            moved.update(names)
        pairs = zip(names, line.params, strict=True)
        sources = [v for name, v in pairs if name in moved]
        if twin is not None:
            inputs = zip(line.inputs, twin, strict=True)
            sources += [v for v, x in inputs if x is not None]
        changing = segments.changing(line, sources)
        # A window may end where the function does.
        to_end = self.to_end or request.reconstruct is not None
        outputs = results(line) if to_end else []
        self.windows = spans.borders(request, line, outputs, names)
        return Shape(line, segments.cut(line, outputs), changing)

    def check(self) -> None:
        """Raises ValueError where the shapes of batches disagree about the cuts."""
        names = [[cut.names for cut in line.cuts] for line, _ in self.lines]
        if any(other != names[0] for other in names):
            raise ValueError(
                "batches of different shapes use different weights, or in another "
                "order; give batches that take the same way through the function"
            )
        solved = {m.path for cut in self.cuts for m in cut.members}
        solved.update(path for cut in self.cuts for path in cut.plain)
        missing = [path for path in layouts_of(self.job) if path not in solved]
        if missing:
            raise ValueError(
                f"{missing[0]}: its products read it in different ways; exclude it "
                f"with {arguments.say('skip')}"
            )

    def run(
        self,
        progress: Callable[[Any], None] | None,
        taken: Callable[[str, Plan], None] | None = None,
    ) -> dict[str, Plan]:
        """Solves everything: path -> plan.

        Args:
          progress: called with a `Layer` for every matrix that is done, and with a
            `Trained` for every window that is.
          taken: called with every leaf that is done and its plan, which is then
            forgotten and missing in the result.
        """
        total = sum(len(cut.members) + len(cut.plain) for cut in self.cuts)
        tell = functools.partial(self.tell, progress, Clock(total))
        walks_on = not self.job.request.dense_only  # with pruned weights
        try:
            trainers: list[Any] = self.trainers() or [None] * len(self.spans)
            for span, trainer in zip(self.spans, trainers, strict=True):
                self.advance(span[0])
                if trainer is not None:
                    trainer.begin()
                solved = self.solve(span, tell)
                trained = None if trainer is None else trainer.train(solved)
                if progress is not None and trained is not None:
                    progress(trained)
                self.hand_over(solved, taken)
                for k in span[1:] if walks_on else ():
                    self.advance(k)
            if self.to_end and walks_on:
                reached = self.spans[-1][-1] + 1 if self.spans else 0
                for k in range(reached, len(self.cuts) + 1):
                    self.advance(k)
        except BaseException:
            self.close()
            raise
        if not self.to_end:
            self.close()
        return {path: self.job.assembled(path) for path in self.job.plans}

    def solve(self, span: range, tell: Callable[..., None]) -> list[tuple]:
        """Solves the cuts of a span; the (path, at) of what was."""
        names: list[tuple] = []
        dense_only = self.job.request.dense_only
        for group in spans.groups(self.job.request, self.cuts, span):
            plans: dict[tuple, Plan] = {}
            if names and len(group) > 1:
                self.look_again(span, group[0])
            for k in group:
                if k > span[0]:
                    self.advance(k, look=not dense_only)
                cut = self.cuts[k]
                solved = self.members(k) if cut.members else {}
                solved |= self.plain(cut) if cut.plain else {}
                for path, at in list(solved):
                    result = solved.pop((path, at))
                    plans[path, at] = result.plan
                    tell(cut, path, at, result)
            if self.to_end and dense_only:
                self.advance(len(self.cuts))
            for (path, at), plan in plans.items():
                with meshes.automatic():
                    self.job.apply(path, at, plan)
            names += plans
        return names

    def look_again(self, span: range, stop: int) -> None:
        """Looks from the start of a span to before a cut, with the weights as they are.

        What came before was seen with dense weights of a block that is pruned now.
        """
        for runner in self.runners:
            runner.back()
        for k in range(span[0] + 1, stop):
            self.advance(k, look=True)

    def hand_over(
        self, names: list[tuple], taken: Callable[[str, Plan], None] | None
    ) -> None:
        """Gives the plans of leaves that are done away."""
        job = self.job
        for path in dict.fromkeys(path for path, _ in names):
            if taken is not None and job.complete(path):
                taken(path, job.assembled(path))
                del job.plans[path]

    def trainers(self) -> list[Training]:
        """What trains the weights of the spans; empty where nothing does."""
        if self.job.request.reconstruct is None:
            return []
        numbered = enumerate(self.spans)
        return [Training(self, number, span) for number, span in numbered]

    def tell(
        self,
        progress: Callable[[Layer], None] | None,
        clock: "Clock",
        cut: Cut,
        path: str,
        at: tuple,
        result: solver.Solved,
    ) -> None:
        """Says that a matrix is done."""
        self.unseen[path] += int(np.sum(result.unseen))
        numbers = worst(result.facts)
        layer = Layer(
            path,
            at,
            float(result.error),
            clock.lap(),
            self.shelf.held,
            clock.done,
            clock.total,
            self.note(path, cut, numbers, result.unseen),
            numbers,
        )
        logger.info("%s", layer)
        if layer.note:
            logger.warning("%s: %s", path, layer.note)
        if progress is not None:
            progress(layer)

    def advance(self, k: int, *, look: bool = False) -> None:
        """All batches to cut `k`, or to the end behind the last.

        Args:
          k: the cut.
          look: with the values of the pruned model kept where they are.
        """
        self.advance_dense(k)
        fixed = self.fixed(k, self.job.current)
        for runner in self.runners:
            run = runner.look if look else runner.advance
            run(k, fixed[id(runner.line)])

    def advance_dense(self, k: int) -> None:
        """The batches of the dense model to cut `k`, unless they are there."""
        if self.reached >= k or not self.job.request.beside:
            return
        self.reached = k
        fixed = self.fixed(k, self.job.leaves)
        for runner in self.runners:
            runner.advance_dense(k, fixed[id(runner.line)])

    def fixed(self, k: int, leaves: Mapping[str, Any]) -> dict[int, list[Any]]:
        """What the segment before cut `k` reads of parameters, per line."""
        arrays = self.job.arrays(leaves)
        return {
            id(line): segments.fixed(line, parts[k], arrays)
            for line, parts in self.lines
        }

    def outputs(self) -> Iterator[tuple[list[Any], list[Any] | None]]:
        """Per batch what the pruned model and the dense one return, freed behind.

        The second is None where no dense model runs beside.
        """
        for runner in self.runners:
            wanted = results(runner.line)
            now = [runner.value(v) for v in wanted]
            dense = None
            if self.job.request.beside:
                dense = [runner.dense_value(v) for v in wanted]
            runner.release()
            yield now, dense
        self.close()

    def close(self) -> None:
        """Frees all values."""
        for runner in self.runners:
            runner.release()
        self.shelf.close()

    def note(self, path: str, cut: Cut, numbers: Mapping[str, Any], unseen: Any) -> str:
        """What a person should know about a leaf of a cut."""
        parts = [self.job.methods[path].note(numbers), unseen_note(unseen)]
        if path in cut.plain:
            parts.insert(0, f"solved on a plain run: {cut.plain[path]}")
        if self.target == "resid":
            parts += dict.fromkeys(m.lost for m in cut.members if m.path == path)
        return "; ".join(filter(None, parts))

    def members(self, k: int) -> dict[tuple, solver.Solved]:
        """Solves the members of cut `k`."""
        names = list(self.cuts[k].names[0])
        known = solver.restore(self.job, names)
        seen = self.share.said(known is not None)
        if known is not None and all(seen):
            return known
        sums, job = meshes.released(self.sums(k)), self.job.released()
        with meshes.automatic():
            stats = targets.finish(job, self.cuts[k], sums)
            del sums
            self.shelf.trim()
            if self.target != "seq":
                # Explicit targets everywhere: one program per shape instead of two.
                stats = {
                    n: targets.with_targets(job.weight(*n), s) for n, s in stats.items()
                }
            return solver.solve(job, stats, self.programs.solver)

    def sums(self, k: int) -> Any:
        """The sums over the tokens of all batches at cut `k`."""
        return self.share.sums(functools.partial(self.add, k), self.runners)

    def add(self, k: int, sums: Any, runner: segments.Runner) -> Any:
        """Adds the tokens of one batch to the sums of cut `k`."""
        cut = runner.line.cuts[k]
        request = self.job.request
        judged_dense = request.judged_dense and not request.dense_only
        inputs = targets.inputs(
            cut,
            self.differs(runner),
            self.target == "resid",
            runner.dense_value if judged_dense else runner.value,
            runner.dense_value,
            self.job.weight,
        )
        tokens = functools.partial(targets.tokens_of, cut)
        sums_of = functools.partial(jax_versions.automatic, tokens, None)
        if sums is None:
            like = jax.eval_shape(sums_of, inputs)
            sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
        count = len(jax.tree.leaves(sums))
        leaves, structure = jax.tree.flatten((sums, inputs))
        memo = k, id(runner.line), structure, tuple(x.shape for x in leaves)

        def flat(*leaves: Any) -> list[Any]:
            sums, inputs = jax.tree.unflatten(structure, leaves)
            return jax.tree.leaves(jax.tree.map(jnp.add, sums, sums_of(inputs)))

        outs = self.compiler.memo(memo, flat, *leaves, donate=count)
        self.shelf.wait(outs)
        return jax.tree.unflatten(jax.tree.structure(sums), outs)

    def differs(self, runner: segments.Runner) -> Callable[[Any], bool]:
        """Of a variable, whether targets are made of another value than inputs are."""
        return runner.changed if self.target != "seq" else lambda v: False

    def plain(self, cut: Cut) -> dict[tuple, solver.Solved]:
        """Solves leaves that cannot be cut, on a plain run of the model as it is."""
        job = self.job
        uses = Uses(tuple(use for use in job.uses if use.path in cut.plain), {})
        at = {p: (None,) * len(u.layout.stack) for p, u in uses.leaves.items()}
        known = solver.restore(job, [(path, at[path]) for path in cut.plain])
        if known is not None:
            return known
        stats = calibrate(
            job.apply_fn,
            job.tree(job.leaves if job.request.judged_dense else job.current),
            uses,
            job.batches,
            token_mask=job.token_mask,
        )
        solved: dict[tuple, solver.Solved] = {}
        stats, free = meshes.released(stats), job.released()
        with meshes.automatic():
            for path in cut.plain:
                own = {(path, at[path]): stats[path]}
                solved |= solver.solve(free, own, self.programs.solver)
        return solved


class Shape(NamedTuple):
    """What batches of one shape share.

    Attributes:
      line: the program.
      parts: its segments, one before every cut and one behind the last.
      changing: the variables that pruning changes.
    """

    line: Line
    parts: list[segments.Segment]
    changing: Any


def layouts_of(job: Job) -> dict[str, Layout]:
    """Leaf path -> layout of what is pruned."""
    return {path: use.layout for path, use in job.uses.leaves.items()}


def results(line: Line) -> list[Any]:
    """The outputs of a line that depend on the batch."""
    return [v for v in line.outputs if not isinstance(v, Literal) and v in line.data]


class Clock:
    """Counts matrices, and the seconds since the one before."""

    def __init__(self, total: int):
        """Starts with none of so many."""
        self.total, self.done, self.started = total, 0, time.perf_counter()

    def lap(self) -> float:
        """One more; its seconds."""
        before, self.started = self.started, time.perf_counter()
        self.done += 1
        return self.started - before
