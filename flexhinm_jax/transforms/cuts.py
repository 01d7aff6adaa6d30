"""All batches from cut to cut: statistics are taken, matrices solved, and on they go.

Only one cut's Gram matrices exist at a time.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from flexhinm_jax.transforms import moments, segments, solver
from flexhinm_jax.transforms.calibrate import calibrate
from flexhinm_jax.transforms.facts import note, worst
from flexhinm_jax.transforms.job import Job
from flexhinm_jax.transforms.programs import is_array, split, trace
from flexhinm_jax.transforms.straight import Cut, straighten
from flexhinm_jax.types import Plan, Uses

logger = logging.getLogger("flexhinm_jax")


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
    """The batches on their way from cut to cut."""

    def __init__(self, job: Job, target: str, shelf: segments.Shelf):
        """Traces the function once per shape of a batch."""
        self.job, self.target, self.shelf = job, target, shelf
        self.compiler = segments.Compiler()
        layouts = {path: use.layout for path, use in job.uses.leaves.items()}
        moved = {*layouts, *job.bias.values()}
        names = [p for p in job.paths if is_array(job.leaves[p])]
        lines: dict[Any, tuple] = {}
        self.runners: list[segments.Runner] = []
        self.masks: list[np.ndarray | None] = []
        params = job.tree(job.leaves)
        for batch in job.batches:
            arrays, skeleton = split(batch)
            shapes = tuple((x.shape, str(x.dtype)) for x in arrays)
            if (shapes, skeleton) not in lines:
                program = trace(job.apply_fn, params, batch, {})
                line = straighten(program, params, job.paths, layouts)
                pairs = zip(names, line.params, strict=True)
                sources = [v for name, v in pairs if name in moved]
                changing = segments.changing(line, sources)
                lines[shapes, skeleton] = line, segments.cut(line), changing
            line, parts, changing = lines[shapes, skeleton]
            self.runners.append(
                segments.Runner(
                    line,
                    parts,
                    arrays,
                    None if target == "seq" else changing,
                    shelf,
                    self.compiler,
                )
            )
            mask = None if job.token_mask is None else job.token_mask(*batch)
            self.masks.append(None if mask is None else np.asarray(mask) != 0)
        self.lines = [(line, parts) for line, parts, _ in lines.values()]
        self.cuts = self.lines[0][0].cuts
        self.check(layouts)

    def check(self, layouts: Mapping[str, Any]) -> None:
        """Raises ValueError where the shapes of batches disagree about the cuts."""
        names = [[cut.names for cut in line.cuts] for line, _ in self.lines]
        if any(other != names[0] for other in names):
            raise ValueError(
                "batches of different shapes use different weights, or in another "
                "order; give batches that take the same way through the function"
            )
        found = {m.path for cut in self.cuts for m in cut.members}
        found.update(path for cut in self.cuts for path in cut.plain)
        missing = [path for path in layouts if path not in found]
        if missing:
            raise ValueError(
                f"{missing[0]}: its products read it in different ways; exclude it "
                "with rules={...: 'skip'}"
            )

    def run(self, progress: Callable[[Layer], None] | None) -> dict[str, Plan]:
        """Solves everything: path -> plan."""
        job, first = self.job, self.cuts
        total = sum(len(cut.members) + len(cut.plain) for cut in first)
        done, started = 0, time.perf_counter()
        try:
            for k, cut in enumerate(first):
                now, before = job.arrays(job.current), job.arrays(job.leaves)
                fixed = {
                    id(line): [segments.fixed(line, parts[k], x) for x in (now, before)]
                    for line, parts in self.lines
                }
                for runner in self.runners:
                    runner.advance(k, *fixed[id(runner.line)])
                solved = self.members(k) if cut.members else self.plain(cut)
                for (path, at), found in solved.items():
                    job.apply(path, at, found.plan)
                    done += 1
                    seconds, started = since(started)
                    numbers = worst(found.facts)
                    layer = Layer(
                        path,
                        at,
                        float(found.error),
                        seconds,
                        self.shelf.held,
                        done,
                        total,
                        self.note(path, cut, numbers),
                        numbers,
                    )
                    logger.info("%s", layer)
                    if layer.note:
                        logger.warning("%s: %s", path, layer.note)
                    if progress is not None:
                        progress(layer)
        finally:
            for runner in self.runners:
                runner.release()
            self.shelf.close()
        return job.assembled()

    def note(self, path: str, cut: Cut, numbers: Mapping[str, Any]) -> str:
        """What a person should know about a leaf of a cut."""
        parts = [note(self.job.methods[path], numbers)]
        if path in cut.plain:
            parts.insert(0, f"solved on a plain run: {cut.plain[path]}")
        return "; ".join(filter(None, parts))

    def members(self, k: int) -> dict[tuple, solver.Solved]:
        """Solves the members of cut `k`."""
        names = list(self.cuts[k].names[0])
        known = solver.restore(self.job, names)
        if known is not None:
            return known
        sums: Any = None
        for runner, mask in zip(self.runners, self.masks, strict=True):
            sums = self.add(k, sums, runner, mask)
        stats = moments.finish(self.job, self.cuts[k], sums)
        if self.target != "seq":
            # Explicit targets everywhere: one program per shape instead of two.
            stats = {
                n: moments.with_targets(self.job.weight(*n), s)
                for n, s in stats.items()
            }
        return solver.solve(self.job, stats)

    def add(
        self, k: int, sums: Any, runner: segments.Runner, mask: np.ndarray | None
    ) -> Any:
        """Adds the tokens of one batch to the sums of cut `k`."""
        job, cut = self.job, runner.line.cuts[k]
        differs = cut.operand in runner.dense
        streams = {}
        for n, m in enumerate(cut.members):
            if self.target == "resid" and m.stream and m.stream.var in runner.dense:
                streams[n] = (
                    runner.dense_value(m.stream.var),
                    runner.value(m.stream.var),
                )
        o = sum(m.product.layout.matrix_shape[0] for m in cut.members)
        i = cut.members[0].product.layout.matrix_shape[1]
        direct = {n: job.weight(m.path, m.at) for n, m in enumerate(cut.members)}
        if not (differs and 2 * o < i):
            direct = {n: w for n, w in direct.items() if n in streams}
        inputs = {
            "x": runner.value(cut.operand),
            "dense": runner.dense_value(cut.operand) if differs else None,
            "streams": streams,
            "direct": direct,
            "rows": moments.rows(mask, cut.members[0].product.free),
        }
        if sums is None:
            sums = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype),
                jax.eval_shape(functools.partial(moments.tokens_of, cut), inputs),
            )
        leaves, structure = jax.tree.flatten((sums, inputs))
        memo = k, id(runner.line), structure, tuple(x.shape for x in leaves)

        def flat(*leaves: Any) -> list[Any]:
            sums, inputs = jax.tree.unflatten(structure, leaves)
            return jax.tree.leaves(
                jax.tree.map(jnp.add, sums, moments.tokens_of(cut, inputs))
            )

        outs = self.compiler.memo(memo, flat, *leaves)
        return jax.tree.unflatten(jax.tree.structure(sums), outs)

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
            job.tree(job.current),
            uses,
            job.batches,
            token_mask=job.token_mask,
        )
        solved: dict[tuple, solver.Solved] = {}
        for path in cut.plain:
            solved |= solver.solve(job, {(path, at[path]): stats[path]})
        return solved


def since(started: float) -> tuple[float, float]:
    """(seconds since `started`, now)."""
    now = time.perf_counter()
    return now - started, now
