"""How many bytes every cut of a walk will take, known before the walk begins.

Activations are counted from the traced program; what a step, a sum of outer products
or a solver takes besides is what the compiler says about the programs that will run.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from flexhinm_jax.pruning.statistics import blank
from flexhinm_jax.sequential import segments, solver, targets
from flexhinm_jax.sequential.cuts import Walk


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one cut takes, in bytes.

    Attributes:
      paths: the leaves that are solved here.
      held: activations of all batches that are kept at the cut.
      step: running the segment before the cut for one batch, inputs and results
        included.
      gram: the sums over tokens and what adding to them takes.
      stats: the statistics while matrices are solved.
      solver: the largest of the programs that solve, results included.
    """

    paths: tuple[str, ...]
    held: int
    step: int
    gram: int
    stats: int
    solver: int

    @property
    def working(self) -> int:
        """The most at any moment, activations of all batches apart."""
        return max(self.step, self.gram, self.stats + self.solver)


class Ledger:
    """Stands for a `Shelf` where there is nothing but shapes."""

    def put(self, x: Any) -> Any:
        """Keeps a shape."""
        return x


def stages(walk: Walk, ahead: solver.Ahead) -> list[Stage]:
    """The stages of a walk over one shape of batches; the last is behind all cuts.

    Args:
      walk: of a job whose arrays may be abstract, on a `Ledger`.
      ahead: where the solvers are compiled, for the walk itself to use.
    """
    (line, parts), *_ = walk.lines
    runner, count = walk.runners[0], len(walk.runners)
    dense = 2 if walk.target != "seq" else 1
    found = []
    for k, segment in enumerate(parts):
        twice = sum(size(v) for v in segment.alive if runner.changed(v))
        held = count * (sum(map(size, segment.alive)) + twice)
        step = dense * running(walk, segment)
        gram = stats = most = 0
        if k < len(line.cuts) and line.cuts[k].members:
            gram, stats, most = solving(walk, k, ahead)
        paths = (
            tuple(m.path for m in line.cuts[k].members) if k < len(line.cuts) else ()
        )
        found.append(Stage(paths, held, step, gram, stats, most))
    return found


def size(v: Any) -> int:
    """Bytes of a variable of a program."""
    return math.prod(v.aval.shape) * np.dtype(v.aval.dtype).itemsize


def like(v: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a variable."""
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def running(walk: Walk, segment: segments.Segment) -> int:
    """Bytes of a segment's data, results and scratch, for one batch."""
    if not segment.eqns:
        return 0
    given = [*segment.statics, *segment.inputs]
    run: Any = walk.compiler.function(segment.eqns, given, segment.outputs)
    known = walk.programs.measured
    if run not in known:
        known[run] = run.lower(*map(like, given)).compile().memory_analysis()
    inputs = sum(map(size, segment.inputs))
    return inputs + known[run].output_size_in_bytes + known[run].temp_size_in_bytes


def solving(walk: Walk, k: int, ahead: solver.Ahead) -> tuple[int, int, int]:
    """(summing, statistics, solving) of a cut."""
    job, cut, runner = walk.job, walk.lines[0][0].cuts[k], walk.runners[0]
    inputs = targets.inputs(
        cut, runner.changed, walk.target == "resid", like, like, job.like, None
    )
    made = functools.partial(targets.tokens_of, cut)
    sums = jax.eval_shape(made, inputs)

    def add(sums: Any, inputs: Any) -> Any:
        return jax.tree.map(jnp.add, sums, made(inputs))

    known, name = walk.programs.measured, str(jax.make_jaxpr(add)(sums, inputs))
    if name not in known:
        program = jax.jit(add, donate_argnums=0).lower(sums, inputs).compile()
        known[name] = program.memory_analysis()
    memory = known[name]
    gram = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    o_i = [job.like(m.path, m.at) for m in cut.members]
    shared = blank(o_i[0].shape[-1], o_i[0].shape[:-2])
    assert shared.gram is not None
    square = 4 * math.prod(shared.gram.shape)
    stats = {}
    for m, w in zip(cut.members, o_i, strict=True):
        stats[m.path, m.at] = shared
        if walk.target != "seq":
            stats[m.path, m.at] = dataclasses.replace(
                shared,
                cross=jax.ShapeDtypeStruct(w.shape, jnp.float32),
                target_mean=jax.ShapeDtypeStruct(w.shape[:-1], jnp.float32),
            )
    crosses = 0 if walk.target == "seq" else 4 * sum(math.prod(w.shape) for w in o_i)
    mixed = square if any("mixed" in part for part in [sums]) else 0
    most = ahead.bytes_for(job, stats)
    # Making the statistics symmetric takes a second matrix for a moment.
    return max(gram, 2 * square + mixed + crosses), square + mixed + crosses, most


def reset_peak() -> None:
    """Lets `resident_peak` start again, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """Most bytes of this process that were in memory since `reset_peak`, or ever."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return 0
