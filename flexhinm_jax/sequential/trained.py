"""One window of a walk, from what its pruned weights give to what was wanted."""

import dataclasses
import time
import zlib
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from flexhinm_jax.sequential import windows
from flexhinm_jax.tracing import meshes
from flexhinm_jax.tracing.program import is_array


@dataclasses.dataclass(frozen=True)
class Trained:
    """The weights of one window are trained.

    Attributes:
      window: its name.
      before: || y - goal ||^2 / || goal ||^2 of its outputs, as it was pruned.
      after: the same after training.
      seconds: wall time.
      done: windows done so far.
      total: windows in all.
    """

    window: str
    before: float
    after: float
    seconds: float
    done: int
    total: int


class Training:
    """Trains the weights between two borders of a walk, all batches at the first."""

    def __init__(self, walk: Any, number: int, span: range):
        """Finds what the window reads and gives.

        Args:
          walk: a `cuts.Walk` whose request has something to reconstruct.
          number: of the window.
          span: its cuts, the border first.
        """
        self.walk, self.job, self.span = walk, walk.job, span
        self.number, self.name = number, walk.windows[number]
        self.trainer = self.job.request.reconstruct
        self.names = [p for p in self.job.paths if is_array(self.job.leaves[p])]
        self.end = span[-1] + 1
        self.windows = {}
        for line, parts in walk.lines:
            needed = {id(eqn) for part in parts for eqn in part.eqns}
            own = parts[span[0] + 1 : self.end + 1]
            window = windows.window(self.name, line, own, self.names, needed, walk.rows)
            self.windows[id(line)] = window
        self.first = self.windows[id(walk.lines[0][0])]
        self.goals: list[dict[Any, Any]] = []

    @property
    def goal_bytes(self) -> int:
        """Bytes of the goals of a batch that are kept while matrices are solved."""
        kept = self.first.outputs if self.trainer.target == "seq" else ()
        return sum(map(windows.size, kept))

    def begin(self) -> None:
        """Keeps what the dense weights give, where that is the goal."""
        walk, job = self.walk, self.job
        if self.trainer.target != "seq":
            return
        for k in range(self.span[0] + 1, self.end + 1):
            fixed = walk.fixed(k, job.leaves)
            for runner in walk.runners:
                runner.look(k, fixed[id(runner.line)])
        for runner in walk.runners:
            wanted = self.windows[id(runner.line)].outputs
            self.goals.append({v: runner.ahead.pop(v) for v in wanted})
            runner.back()

    def train(self, solved: list[tuple]) -> Trained | None:
        """Fits the weights of the window and lets the walk go on with them.

        Args:
          solved: (path, at) of the matrices that were pruned here.
        """
        walk, job, started = self.walk, self.job, time.perf_counter()
        walk.advance_dense(self.end)
        for runner in walk.runners:
            runner.back()
        told = None
        if self.first.sources and self.first.outputs:
            with meshes.automatic():
                fit = self.fit()
                for source, value in zip(self.first.sources, fit.sources, strict=True):
                    leaf = job.current[source.path]
                    job.replace(source.path, windows.with_source(leaf, source, value))
            told = Trained(
                self.name,
                float(fit.before),
                float(fit.after),
                time.perf_counter() - started,
                self.number + 1,
                len(walk.windows),
            )
        for path, at in solved:
            job.retrained(path, at)
        for runner, goals in zip(walk.runners, self.goals, strict=False):
            runner.free(goals, ())
        return told

    def fit(self) -> windows.Fit:
        """What the trainer gives, or what an earlier run has kept of it."""
        walk, job = self.walk, self.job
        sources = [
            windows.source_of(job.current[s.path], s) for s in self.first.sources
        ]
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), sources)
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        name = f"window {self.name}"
        if job.finished is not None:
            known = job.finished.load(name, (like, scalar, scalar))
            if known is not None:
                return windows.Fit(*known)
        fit = self.trainer.fit(
            windows.Problem(
                self.name,
                sources,
                [self.keep(source) for source in self.first.sources],
                len(walk.runners),
                self.program,
                self.batch,
                jax.random.fold_in(job.key, zlib.crc32(self.name.encode())),
                walk.programs.trained,
            )
        )
        if job.finished is not None:
            figures = np.float32(fit.before), np.float32(fit.after)
            job.finished.save(name, ([*fit.sources], *figures))
        return fit

    def keep(self, source: windows.Source) -> Array | None:
        """Where a source may be other than zero; None for everywhere."""
        keep = self.job.keep(source.path)
        return None if keep is None else windows.source_of(keep, source)

    def program(self, n: int) -> Any:
        """The window as a function, for the shape of a batch."""
        window = self.windows[id(self.walk.runners[n].line)]
        return windows.program(self.walk.compiler, window)

    def batch(self, n: int) -> windows.Batch:
        """What batch `n` has where the window begins, and what it should have."""
        runner = self.walk.runners[n]
        window = self.windows[id(runner.line)]
        paths = dict(zip(runner.line.params, self.names, strict=True))
        frozen = [
            self.job.current[paths[v]] if v in paths else runner.line.consts[v]
            for v in window.frozen
        ]
        if self.goals:
            goals = [runner.shelf.get(self.goals[n][v]) for v in window.outputs]
        else:
            goals = [runner.dense_value(v) for v in window.outputs]
        inputs = [runner.value(v) for v in window.inputs]
        return windows.Batch(frozen, inputs, goals, self.walk.masks[n])
