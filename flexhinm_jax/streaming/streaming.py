"""Prunes a decoder directory block by block, in bounded memory.

One block at a time is loaded, pruned in order of execution (`prune_sequential` on the
block alone), written out, and run: the hidden states of the calibration text behind the
pruned block are the input of the next. For the targets "asym" and "resid" those of the
dense model go beside. Blocks are equal programs, so everything is compiled once. The
result is that of `prune_sequential` on the whole model; embedding, last norm and head
are copied unchanged.

A run keeps its state in `OUT.partial` beside the output: the files written so far, the
hidden states behind the last finished block, and the matrices finished since. A run
with the same arguments goes on from there, with the same result to the bit. OUT itself
appears at the end, complete, or not at all.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from flexhinm_jax import kernels
from flexhinm_jax.io import atomic, fingerprint, huggingface, packed, shards
from flexhinm_jax.io.shelf import Shelf
from flexhinm_jax.methods import Method
from flexhinm_jax.pruning.allocate import Mode, check_mode
from flexhinm_jax.pruning.report import Report, Row, report
from flexhinm_jax.sequential import memory, solver
from flexhinm_jax.sequential.cuts import Layer, Programs, Walk
from flexhinm_jax.sequential.finished import Finished
from flexhinm_jax.sequential.sequential import Target, check_target
from flexhinm_jax.streaming.blocks import Blocks, Dtype, open_blocks
from flexhinm_jax.streaming.budget import Budget, budget, check_all
from flexhinm_jax.streaming.states import States
from flexhinm_jax.streaming.survey import Allocated, Surveyed, first_targets, survey
from flexhinm_jax.streaming.work import Setting, Work
from flexhinm_jax.types import Plan

__all__ = ["Allocated", "Block", "Streamed", "Surveyed", "stream"]

PACKED = "packed"


@dataclasses.dataclass(frozen=True)
class Block:
    """One block is done.

    Attributes:
      layer: which, from 0.
      total: blocks in all.
      error: mean over its matrices of || X (W' - W) ||^2 / || X W ||^2.
      seconds: wall time.
      peak: most bytes resident in this process during the block; 0 where unknown.
      left: seconds that the blocks still to do will take, at this pace.
    """

    layer: int
    total: int
    error: float
    seconds: float
    peak: int
    left: float


Told = Block | Surveyed | Allocated


@dataclasses.dataclass(frozen=True)
class Streamed:
    """What `stream` returns.

    Attributes:
      report: rows of all pruned leaves.
      errors: key -> || X (W' - W) ||^2 / || X W ||^2 on the inputs of the pruned model.
      targets: key -> sparsity that was allocated; empty where none was.
    """

    report: Report
    errors: dict[str, float]
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)


def stream(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokens: np.ndarray,
    method: Method,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    allocate: Mode = "uniform",
    exceptions: Mapping[str, float] | None = None,
    key: Array,
    target: Target = "seq",
    center: bool = True,
    rules: Mapping[str, Any] | None = None,
    memory_limit: int | None = None,
    batch: int = 4,
    dtype: Dtype = "checkpoint",
    pack: bool = False,
    overwrite: bool = False,
    planned: Callable[[Budget], None] | None = None,
    progress: Callable[[Layer | Told], None] | None = None,
    extra: Callable[[Streamed], Mapping[str, str]] | None = None,
) -> Streamed:
    """Prunes a decoder directory block by block.

    Args:
      directory: Hugging Face directory of a supported family.
      out: directory to write.
      tokens: i32[samples, length], the calibration text.
      method: what to prune with, such as `SparseGPT(NM(2, 4))`.
      sparsity: fraction of weights removed, one for all or one per key of the
        checkpoint; None for a pattern that has only one.
      allocate: how one sparsity is spread over the matrices, see
        `pruning.allocate`: "global" and "owl" begin with a pass of the dense model.
      exceptions: {regex: sparsity} on keys of the checkpoint, the first match wins;
        the other matrices make up for them.
      key: PRNG key, consumed; a leaf uses the same as in `prune_sequential`.
      target: what to fit to, as in `prune_sequential`.
      center: as in `prune_sequential`.
      rules: {regex: pattern or "skip"} on keys of the checkpoint; the first match wins.
      memory_limit: bytes, besides those of the interpreter and its libraries; what does
        not fit of the hidden states goes to disk. None for any amount.
      batch: samples in one step; rounded down to a divisor of the number of samples.
      dtype: what to compute in; stored are the dtypes of the checkpoint.
      pack: writes the packed form too, one file per block in the folder `packed`.
      overwrite: replaces `out` if it is a model directory.
      planned: called with the plan of memory before anything is computed.
      progress: called with a `Surveyed` for every block of the pass of the dense
        model, an `Allocated` behind it, a `Layer` for every matrix and a `Block` for
        every block.
      extra: file name -> text to write beside the model, given the result.

    Returns:
      The report and the errors of all pruned leaves.

    Raises:
      FileNotFoundError: a part of the directory is missing.
      FileExistsError: `out` exists and may not be replaced.
      ValueError: a directory that is not a supported decoder or is damaged, tokens out
        of range, budgets out of reach, a plan over the limit, NaN (the leaf is named),
        or an `OUT.partial` of another run.
      InUse: another process writes `out`.
      OSError: no space.
    """
    check_target(target, method)
    check_mode(allocate)
    atomic.check_directory(out, overwrite=overwrite)
    huggingface.check_copy(Path(directory), Path(out))
    blocks = open_blocks(Path(directory), dtype)
    shards.check_space(Path(out), blocks.index.size - Work.taken(Path(out)))
    setting = Setting(
        blocks,
        blocks.uses(rules),
        split(tokens, batch, blocks),
        method,
        sparsity,
        allocate,
        dict(exceptions or {}),
        key,
        target,
        center,
        pack,
        Programs(solver.Ahead()),
    )
    setting = dataclasses.replace(setting, targets=first_targets(setting))
    check_all(setting)
    plan = budget(setting, memory_limit)
    if planned is not None:
        planned(plan)
    plan.check()
    work = Work(Path(out), setting)
    with atomic.locked(out), work.kept(blocks.index.size + plan.on_disk):
        if allocate != "uniform":
            found = survey(setting, work, plan.shelf, progress)
            setting = dataclasses.replace(setting, targets=found)
        if progress is not None and isinstance(setting.targets, dict):
            progress(Allocated(setting.targets))
        rows: list[Row] = []
        errors: dict[str, float] = {}
        states = States(work.states, plan.shelf)
        first = work.resumed()
        for layer in range(first):
            mine, lost = work.rows(layer)
            rows, errors = rows + mine, errors | lost
        if first < blocks.count:
            if first:
                states.load(first)
            else:
                states.begin(blocks.embedded(setting.batches))
        began = time.perf_counter()
        for layer in range(first, blocks.count):
            memory.reset_peak()
            started = time.perf_counter()
            mine, lost = prune_block(layer, setting, work, states, plan, progress)
            work.done(layer, mine, lost)
            now = time.perf_counter()
            rows, errors = rows + mine, errors | lost
            states.forget(layer)
            pace = (now - began) / (layer + 1 - first)
            if progress is not None:
                progress(
                    Block(
                        layer,
                        blocks.count,
                        float(np.mean([*lost.values()])) if lost else 0.0,
                        now - started,
                        memory.resident_peak(),
                        pace * (blocks.count - 1 - layer),
                    )
                )
        targets = setting.targets if isinstance(setting.targets, dict) else {}
        result = Streamed(total(setting, rows), errors, targets)
        work.finish({} if extra is None else extra(result))
    return result


def split(tokens: np.ndarray, batch: int, blocks: Blocks) -> list[np.ndarray]:
    """Equal batches of the tokens.

    Raises:
      ValueError: tokens of another form, or that the model does not know.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens: need integers [samples, length], got {tokens.dtype}"
            f"{list(tokens.shape)}"
        )
    low, high, known = tokens.min(), tokens.max(), blocks.config.vocab_size
    if low < 0 or high >= known:
        raise ValueError(
            f"tokens from {low} to {high}, but the model has vocab_size={known}; they"
            " belong to another tokenizer"
        )
    count = len(tokens)
    size = max(n for n in range(1, min(batch, count) + 1) if count % n == 0)
    return list(tokens.astype(np.int32).reshape(-1, size, tokens.shape[1]))


def prune_block(
    layer: int,
    setting: Setting,
    work: Work,
    states: States,
    plan: Budget,
    progress: Callable[[Layer | Told], None] | None,
) -> tuple[list[Row], dict[str, float]]:
    """Prunes and writes a block; `states` are then those behind it."""
    blocks, uses = setting.blocks, setting.uses.of(layer)
    now, twins = states.take()
    job = setting.job(layer, blocks.load(layer), now)
    job.finished = Finished(work.solved(layer), fingerprint.record(layer=layer))
    walk = Walk(
        job,
        setting.target,
        Shelf(plan.shelf, work.folder),
        twins=None if twins is None else [(h,) for h in twins],
        programs=setting.programs,
        to_end=True,
    )
    job.batches.clear()
    del now, twins
    rows: list[Row] = []
    errors: dict[str, float] = {}
    leaves: dict[str, Any] = {}

    def taken(path: str, plan: Plan) -> None:
        row, leaf = described(path, plan, uses.leaves[path].layout, setting.pack)
        rows.append(row)
        if setting.pack:
            leaves[path] = leaf

    def step(done: Layer) -> None:
        errors[done.path] = done.error
        if progress is not None:
            progress(done)

    walk.run(step, taken)
    for key, leaf in job.current.items():
        stored = blocks.index.read(key).dtype
        work.writer.put(key, np.asarray(leaf).astype(stored, copy=False))
    if setting.pack:
        others = {k: np.asarray(x) for k, x in job.current.items() if k not in leaves}
        folder = work.model / PACKED
        folder.mkdir(exist_ok=True)
        path = folder / f"block-{layer:05d}.safetensors"
        packed.write_packed(path, {**others, **leaves}, overwrite=True)
    del job
    states.next(layer + 1, walk.outputs(), setting.beside)
    return rows, errors


def described(path: str, plan: Plan, layout: Any, pack: bool) -> tuple[Row, Any]:
    """(row of the report, packed leaf or None) of a finished leaf."""
    leaf: Any = plan.weight
    if pack and plan.support.regions is not None:
        leaf = kernels.pack(plan, layout)
    row = report({path: plan}, {path: leaf}).rows[0]
    if not pack:
        row = dataclasses.replace(row, note="not packed: streamed without pack")
    return row, leaf


def total(setting: Setting, rows: list[Row]) -> Report:
    """The report of the whole model."""
    blocks = setting.blocks
    pruned = {row.path for row in rows}
    reasons: dict[str, str] = {}
    for layer in range(blocks.count):
        reasons |= setting.uses.of(layer).skipped
    skipped = {
        key: reasons.get(key, "outside the blocks: copied unchanged")
        for key in blocks.index.files
        if key not in pruned
    }
    size = blocks.index.size
    saved = sum(row.dense_bytes - row.packed_bytes for row in rows)
    return Report(tuple(rows), skipped, size, size - saved)
