"""How many bytes a streamed pruning run will take, known before it begins.

Activations are counted from the traced program of a block. What a step, a sum of outer
products, a solver or the scores of a leaf take besides is what the compiler says about
the programs that will run.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from flexhinm_jax import arguments
from flexhinm_jax.methods import Method
from flexhinm_jax.models.decoder_parameters import TABLE
from flexhinm_jax.pruning.gains import scoring_program
from flexhinm_jax.pruning.statistics import blank
from flexhinm_jax.sequential import segments, targets
from flexhinm_jax.sequential.cuts import Walk
from flexhinm_jax.sequential.job import Job
from flexhinm_jax.sequential.share import COPIES
from flexhinm_jax.sequential.solver import solve_stack, solved
from flexhinm_jax.sequential.trained import Training
from flexhinm_jax.sequential.windows import size
from flexhinm_jax.streaming.work import Setting
from flexhinm_jax.tracing.describe import none_left
from flexhinm_jax.types import Stats

GIB = 1 << 30

SLACK = 512 << 20
"""Bytes for compiling, compiled programs and what is not counted: .3 to .5 GiB."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Planned bytes of a run, besides those of the interpreter and its libraries.

    Attributes:
      limit: what may be used; None for any amount.
      weights: one block, dense beside pruned where the target needs both.
      gram: statistics of the cut that takes most, while matrices are solved or sums
        are made.
      solver: the largest program that solves, its scratch and its results.
      step: running a piece of a block on one batch.
      working: the most of gram, solver and step together at any moment.
      hidden: hidden states and activations of all batches, where they take most.
      files: hidden states that are kept on disk so that a killed run can go on.
      leaf: name of the matrix whose cut takes most.
    """

    limit: int | None
    weights: int
    gram: int
    solver: int
    step: int
    working: int
    hidden: int
    files: int
    leaf: str

    @property
    def least(self) -> int:
        """Bytes needed with all hidden states on disk."""
        return self.weights + self.working + SLACK

    @property
    def shelf(self) -> int | None:
        """Bytes of hidden states that may be kept in memory; None for all."""
        return None if self.limit is None else max(0, self.limit - self.least)

    @property
    def in_memory(self) -> int:
        """Bytes of hidden states that are kept in memory."""
        return self.hidden if self.shelf is None else min(self.hidden, self.shelf)

    @property
    def on_disk(self) -> int:
        """Bytes of hidden states and activations that go to disk."""
        return self.hidden - self.in_memory + self.files

    @property
    def total(self) -> int:
        """Planned peak."""
        return self.least + self.in_memory

    def check(self) -> None:
        """Raises ValueError for a plan over the limit, saying what to change."""
        if self.limit is None or self.least <= self.limit:
            return
        if self.step >= self.gram + self.solver:
            advice = f"{arguments.say('batch')} or {arguments.say('length')}"
        elif self.working > self.weights:
            advice = "a cheaper method (magnitude and wanda take less than sparsegpt, "
            advice += "sparsegpt less than alps), or skip this matrix with "
            advice += arguments.say("skip")
        else:
            advice = arguments.say("target")
        raise ValueError(
            f"the plan needs {self.least / GIB:.2f} GiB, the limit is"
            f" {self.limit / GIB:.2f} GiB: block weights {self.weights / GIB:.2f},"
            f" statistics {self.gram / GIB:.2f} and solver {self.solver / GIB:.2f} (at"
            f" {self.leaf}), one batch {self.step / GIB:.2f}, programs"
            f" {SLACK / GIB:.2f}; hidden states, {self.hidden / GIB:.2f}, would be on"
            f" disk. Allow {self.least / GIB + 0.01:.2f} GiB"
            f" ({arguments.say('memory', self.least)}), or take {advice}"
        )

    def rows(self) -> list[tuple[str, int]]:
        """(part, bytes) for people."""
        return [
            ("block weights", self.weights),
            ("statistics (Gram)", self.gram),
            ("solver workspace", self.solver),
            ("one batch through a block", self.step),
            ("programs", SLACK),
            ("hidden states in memory", self.in_memory),
            ("planned peak", self.total),
            ("hidden states on disk", self.on_disk),
        ]


def budget(setting: Setting, limit: int | None) -> Budget:
    """Plans a run; compiles its solvers.

    Args:
      setting: what to do; its programs take the compiled solvers, so their solver is an
        `Ahead`.
      limit: bytes.

    Raises:
      ValueError: a leaf that does not fit the method.
    """
    plans = [_block_budget(setting, n, limit) for n in setting.uses.kinds().values()]
    return max(plans, key=lambda plan: plan.least)


def _block_budget(setting: Setting, layer: int, limit: int | None) -> Budget:
    """What pruning one block takes."""
    blocks, beside, programs = setting.blocks, setting.request.beside, setting.programs
    count, (samples, length) = len(setting.own), setting.batches[0].shape
    width, dtype = blocks.config.hidden_size, blocks.computed(TABLE)
    h = jax.ShapeDtypeStruct((samples, length, width), dtype)
    states = count * samples * length * width * dtype.itemsize
    # The first block has no dense twin of its input yet; others need more.
    job = setting.job(layer, blocks.like(layer), [h] * count)
    ledger: Any = Ledger()
    walk = Walk(
        job,
        ledger,
        twins=[(h,)] * count if beside else None,
        programs=programs,
        share=setting.share,
        to_end=True,
    )
    ahead: Any = programs.solver
    parts = stages(walk, ahead)
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in job.leaves.values()]
    most = max(parts, key=lambda stage: stage.working)
    solving = max(parts, key=lambda stage: stage.stats + stage.solver)
    trainers = walk.trainers()
    training = max(map(trained, trainers), default=0)
    goals = max((count * t.goal_bytes for t in trainers), default=0)
    scoring = _scoring(setting, job) if setting.spread.mode == "global" else 0
    return Budget(
        limit=limit,
        # A finished matrix is on the device and on the host for a moment, and plans
        # wait for the end of their span.
        weights=sum(sizes) * (2 if beside else 1) + 2 * max(sizes) + waiting(walk),
        gram=max(solving.stats, most.gram if most.gram == most.working else 0),
        solver=max(solving.solver, scoring),
        step=max(training, *(stage.step for stage in parts)),
        working=max(most.working, scoring, training),
        hidden=max([states * (1 + beside), *(stage.held for stage in parts)]) + goals,
        files=2 * states * (1 + beside),
        leaf=(most.paths or ("the end of the block",))[-1],
    )


def _scoring(setting: Setting, job: Job) -> int:
    """Bytes that the scores of one leaf take while sparsity is spread."""
    sizes = [0]
    for path, use in job.uses.leaves.items():
        dtype = job.leaves[path].dtype
        program = scoring_program(setting.request.method, use, dtype)
        if program is not None:
            sizes.append(taken(program.compile().memory_analysis()))
    return max(sizes)


def check_all(setting: Setting) -> None:
    """Checks every leaf of every block.

    Raises:
      ValueError: a leaf that does not fit, or nothing to prune.
    """
    every = []
    for layer in range(setting.blocks.count):
        h = np.zeros((), np.float32)
        every.append(setting.job(layer, setting.blocks.like(layer), [h]).uses)
    if not any(uses.leaves for uses in every):
        raise ValueError(none_left(every))


class Ahead:
    """`solve_stack`, compiled before it runs, so that its memory is known."""

    def __init__(self):
        """Starts with nothing compiled."""
        self.known: dict[Any, Any] = {}

    def compiled(self, stats: Stats, method: Method, *args: Any) -> Any:
        """The program for arrays, concrete or abstract, of these shapes."""
        leaves, structure = jax.tree.flatten((stats, args))
        key = method, structure, tuple((x.shape, str(x.dtype)) for x in leaves)
        if key not in self.known:
            like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
            stats, args = jax.tree.unflatten(structure, like)
            self.known[key] = solve_stack.lower(stats, method, *args).compile()
        return self.known[key]

    def __call__(self, stats: Stats, method: Method, *args: Any) -> Any:
        """What `solve_stack` returns."""
        return self.compiled(stats, method, *args)(stats, *args)

    def bytes_for(self, job: Job, stats: Mapping[tuple, Stats]) -> int:
        """Bytes that the largest stack of these matrices takes, results included."""
        sizes = []

        def measure(shared: Stats, method: Method, w: Any, *args: Any) -> Any:
            program = self.compiled(shared, method, w, *args)
            # Without the statistics, which are counted where they are made.
            sizes.append(taken(program.memory_analysis()) + w.size * w.dtype.itemsize)
            return solve_stack(shared, method, w, *args)

        def run(stats: Any, weights: Any) -> Any:
            return [*solved(job, stats, lambda *name: weights[name], measure)]

        weights = {name: job.like(*name) for name in stats}
        jax.eval_shape(run, dict(stats), weights)
        return max(sizes)


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


def stages(walk: Walk, ahead: Ahead) -> list[Stage]:
    """The stages of a walk over one shape of batches; the last is behind all cuts.

    Args:
      walk: of a job whose arrays may be abstract, on a `Ledger`.
      ahead: where the solvers are compiled, for the walk itself to use.
    """
    (line, parts), *_ = walk.lines
    runner, count = walk.runners[0], len(walk.runners)
    dense = 2 if walk.job.request.beside else 1
    # The values at the first cut of a span wait for the pruned weights.
    spans = [] if walk.job.request.dense_only else walk.spans
    start = {k: span[0] for span in spans for k in span[1:]}
    every = []
    for k, segment in enumerate(parts):
        twice = sum(size(v) for v in segment.alive if runner.changed(v))
        kept = parts[start[k]].alive - segment.alive if k in start else ()
        held = count * (sum(map(size, {*segment.alive, *kept})) + twice)
        step = dense * running(walk, segment)
        gram = stats = most = 0
        if k < len(line.cuts) and line.cuts[k].members:
            gram, stats, most = solving(walk, k, ahead)
        paths = (
            tuple(m.path for m in line.cuts[k].members) if k < len(line.cuts) else ()
        )
        every.append(Stage(paths, held, step, gram, stats, most))
    return every


def waiting(walk: Walk) -> int:
    """Bytes of the plans that wait while others are solved on the same weights."""
    sizes = [0]
    for span in walk.spans:
        names = (name for k in span if span[1:] for name in walk.cuts[k].names[0])
        shapes = [walk.job.like(*name) for name in names]
        # The weight and its support.
        sizes.append(sum(math.prod(w.shape) * (w.dtype.itemsize + 1) for w in shapes))
    return max(sizes)


def trained(training: Training) -> int:
    """Bytes that training a window takes, from above.

    In float32: weights, gradients, updates, two moments, the best so far and what
    becomes of all of them in a step; and every value of one batch with its gradient.
    """
    window = training.first
    weights = sum(4 * math.prod(s.read[0].aval.shape) for s in window.sources)
    values = {v for eqn in window.eqns for v in eqn.outvars if math.prod(v.aval.shape)}
    return 12 * weights + 2 * sum(map(size, values))


def like(v: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a variable."""
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def running(walk: Walk, segment: segments.Segment) -> int:
    """Bytes of a segment's data, results and scratch, for one batch."""
    if not segment.eqns:
        return 0
    read = [*segment.statics, *segment.inputs]
    run: Any = walk.compiler.function(segment.eqns, read, segment.outputs)
    known = walk.programs.measured
    if run not in known:
        known[run] = run.lower(*map(like, read)).compile().memory_analysis()
    return sum(map(size, segment.inputs)) + taken(known[run])


def taken(memory: Any) -> int:
    """Bytes of the results and the scratch of a compiled program."""
    return memory.output_size_in_bytes + memory.temp_size_in_bytes


def solving(walk: Walk, k: int, ahead: Ahead) -> tuple[int, int, int]:
    """(summing, statistics, solving) of a cut."""
    job, cut, runner = walk.job, walk.lines[0][0].cuts[k], walk.runners[0]
    cut = dataclasses.replace(cut, valid=None)  # its tokens are known at run time
    inputs = targets.inputs(
        cut, walk.differs(runner), walk.target == "resid", like, like, job.like
    )
    sums_of = functools.partial(targets.tokens_of, cut)
    sums = jax.eval_shape(sums_of, inputs)

    def add(sums: Any, inputs: Any) -> Any:
        return jax.tree.map(jnp.add, sums, sums_of(inputs))

    known, name = walk.programs.measured, str(jax.make_jaxpr(add)(sums, inputs))
    if name not in known:
        program = jax.jit(add, donate_argnums=0).lower(sums, inputs).compile()
        known[name] = program.memory_analysis()
    memory = known[name]
    gram = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    if walk.share.processes > 1:
        gram += COPIES * sum(4 * math.prod(x.shape) for x in jax.tree.leaves(sums))
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
