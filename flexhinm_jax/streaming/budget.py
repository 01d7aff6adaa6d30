"""How much memory and disk a streamed pruning run will take, known before it begins."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from flexhinm_jax import arguments
from flexhinm_jax.pruning.gains import scoring_bytes
from flexhinm_jax.sequential import memory
from flexhinm_jax.sequential.cuts import Walk
from flexhinm_jax.streaming.blocks import TABLE
from flexhinm_jax.streaming.work import Setting

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
      setting: what to do; its programs take the compiled solvers, so their solver is a
        `solver.Ahead`.
      limit: bytes.

    Raises:
      ValueError: a leaf that does not fit the method.
    """
    blocks, uses, method = setting.blocks, setting.uses, setting.method
    count, (samples, length) = len(setting.batches), setting.batches[0].shape
    width, dtype = blocks.config.hidden_size, blocks.computed(TABLE)
    h = jax.ShapeDtypeStruct((samples, length, width), dtype)
    states = count * samples * length * width * dtype.itemsize
    beside, programs = setting.beside, setting.programs
    found: list[tuple[int, Budget]] = []
    ahead: Any = programs.solver
    for layer in uses.kinds().values():
        # The first block has no dense twin of its input yet; others need more.
        job = setting.job(layer, blocks.like(layer), [h] * count)
        twins = [(h,)] * count if beside else None
        ledger: Any = memory.Ledger()
        walk = Walk(
            job, setting.target, ledger, twins=twins, programs=programs, to_end=True
        )
        stages = memory.stages(walk, ahead)
        sizes = [math.prod(x.shape) * x.dtype.itemsize for x in job.leaves.values()]
        # A finished matrix is on the device and on the host for a moment.
        weights = sum(sizes) * (2 if beside else 1) + 2 * max(sizes)
        most = max(stages, key=lambda stage: stage.working)
        solving = max(stages, key=lambda stage: stage.stats + stage.solver)
        scoring = 0
        if setting.allocate == "global":
            mine = job.uses.leaves.items()
            each = [scoring_bytes(method, u, job.leaves[p].dtype) for p, u in mine]
            scoring = max(each, default=0)
        made = Budget(
            limit=limit,
            weights=weights,
            gram=max(solving.stats, most.gram if most.gram == most.working else 0),
            solver=max(solving.solver, scoring),
            step=max(stage.step for stage in stages),
            working=max(most.working, scoring),
            hidden=max([states * (1 + beside), *(stage.held for stage in stages)]),
            files=2 * states * (1 + beside),
            leaf=(most.paths or ("the end of the block",))[-1],
        )
        found.append((made.least, made))
    return max(found, key=lambda pair: pair[0])[1]


def check_all(setting: Setting) -> None:
    """Checks every leaf of every block.

    Raises:
      ValueError: a leaf that does not fit, or nothing to prune.
    """
    total = 0
    for layer in range(setting.blocks.count):
        h = np.zeros((), np.float32)
        job = setting.job(layer, setting.blocks.like(layer), [h])
        total += len(job.uses.leaves)
    if not total:
        raise ValueError(
            "no weight is left to prune; the rules skip too many:"
            f" {arguments.say('describe')} lists them all"
        )
