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
import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexhinm_jax import arguments, kernels
from flexhinm_jax.io import huggingface, packed, shards
from flexhinm_jax.io.shelf import Shelf
from flexhinm_jax.pruning.allocate import check_mode
from flexhinm_jax.pruning.report import Report, Row, report
from flexhinm_jax.pruning.solve import fitting
from flexhinm_jax.sequential.cuts import Layer, Programs, Walk
from flexhinm_jax.sequential.request import Request
from flexhinm_jax.sequential.share import Share
from flexhinm_jax.sequential.trained import Trained
from flexhinm_jax.streaming import memory
from flexhinm_jax.streaming.blocks import OUTSIDE, Blocks, Dtype, open_blocks
from flexhinm_jax.streaming.memory import Ahead, Budget
from flexhinm_jax.streaming.states import States
from flexhinm_jax.streaming.survey import Allocated, Surveyed, first_targets, survey
from flexhinm_jax.streaming.work import GoingOn, Setting, Spread, Work
from flexhinm_jax.types import Plan

__all__ = [
    "Allocated",
    "Block",
    "GoingOn",
    "Limits",
    "Output",
    "Request",
    "Spread",
    "Streamed",
    "Surveyed",
    "stream",
]

PACKED = "packed"


@dataclasses.dataclass(frozen=True)
class Limits:
    """How a run computes, and in how much memory.

    Attributes:
      memory: bytes, besides those of the interpreter and its libraries; what does not
        fit of the hidden states goes to disk. None for any amount.
      batch: samples in one step; rounded down to a divisor of the number of samples.
      dtype: what to compute in; stored are the dtypes of the checkpoint.
    """

    memory: int | None = None
    batch: int = 4
    dtype: Dtype = "checkpoint"


@dataclasses.dataclass(frozen=True)
class Output:
    """What a run writes besides the model.

    Attributes:
      pack: the packed form too, one file per block in the folder `packed`.
      overwrite: replaces an earlier model directory.
      extra: result -> {file name: text} to write beside the model, or in place of
        `report.json` and the card `README.md` that every run writes; or None.
      values: dtype of the packed values, as in `fh.pack`; None for that of the weights.
    """

    pack: bool = False
    overwrite: bool = False
    extra: "Callable[[Streamed], Mapping[str, str]] | None" = None
    values: str | None = None


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


Done = tuple[list[Row], dict[str, float]]
"""Rows of the report, and errors by key."""

Told = Budget | GoingOn | Surveyed | Allocated | Layer | Trained | Block
"""What a run tells: its plan of memory, then how far it has come."""


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
    request: Request,
    *,
    spread: Spread | None = None,
    limits: Limits | None = None,
    output: Output | None = None,
    progress: Callable[[Told], None] | None = None,
) -> Streamed:
    """Prunes a decoder directory block by block.

    Args:
      directory: Hugging Face directory of a supported family.
      out: directory to write.
      tokens: i32[samples, length], the calibration text.
      request: what to prune with; paths are keys of the checkpoint.
      spread: how one sparsity is spread; None for the same everywhere.
      limits: memory, batch and dtype; None for the defaults.
      output: what to write besides the model; None for nothing.
      progress: called with the `Budget` before anything is computed, a `GoingOn` where
        an earlier run is continued, a `Surveyed` for every block of the pass of the
        dense model, an `Allocated` after it, a `Layer` for every matrix, a `Trained`
        for every window that was reconstructed and a `Block` for every block.

    Returns:
      The report and the errors of all pruned leaves.

    Raises:
      FileNotFoundError: a part of the directory is missing.
      FileExistsError: `out` exists and may not be replaced, or `OUT.partial` is no
        folder of a run.
      ValueError: a directory that is not a supported decoder or is damaged, tokens out
        of range, budgets out of reach, a plan over the limit, NaN (the leaf is named),
        or an `OUT.partial` of another run.
      InUse: another process writes `out`.
      OSError: no space.
    """
    spread, limits, output = spread or Spread(), limits or Limits(), output or Output()
    tell = progress or (lambda told: None)
    request.check()
    check_mode(spread.mode)
    setting = opened(directory, out, tokens, request, limits, output)
    setting = dataclasses.replace(setting, spread=spread)
    check_blocks(setting)
    setting = dataclasses.replace(setting, targets=first_targets(setting))
    memory.check_all(setting)
    plan = memory.budget(setting, limits.memory)
    tell(plan)
    plan.check()
    work = Work(Path(out), setting)
    with work.kept(plan.on_disk, tell):
        if spread.mode != "uniform":
            targets = survey(setting, work, plan.shelf, tell)
            setting = dataclasses.replace(setting, targets=targets)
        allocated = setting.targets if isinstance(setting.targets, dict) else {}
        if allocated:
            tell(Allocated(allocated))
        rows, errors = prune_blocks(setting, work, plan, tell)
        result = Streamed(total(setting, rows, work), errors, allocated)
        work.finish(output.extra, result)
    return result


def opened(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokens: np.ndarray,
    request: Request,
    limits: Limits,
    output: Output,
) -> Setting:
    """A directory, its text and where it goes, checked before anything is computed.

    Args:
      directory: Hugging Face directory of a supported family.
      out: directory to write.
      tokens: i32[samples, length], the calibration text.
      request: what to do.
      limits: memory, batch and dtype.
      output: what to write.
    """
    huggingface.check_place(out, overwrite=output.overwrite)
    huggingface.check_copy(Path(directory), Path(out))
    Work.check(Path(out))
    blocks = open_blocks(Path(directory), limits.dtype)
    shards.check_space(Path(out), blocks.index.size - Work.taken(Path(out)))
    batches = split(tokens, limits.batch, blocks)
    return Setting(
        blocks,
        blocks.uses(
            request.rules,
            lambda uses: fitting(request.method, uses, request.on_mismatch),
        ),
        batches,
        Share.here(len(batches)),
        request,
        Spread(),
        output.pack,
        Programs(Ahead()),
        values=output.values,
    )


def check_blocks(setting: Setting) -> None:
    """Refuses blocks and windows that are none, or never here as a whole.

    Raises:
      ValueError: the request names no weights, or those of two blocks of the checkpoint
        alike.
    """
    request, named = setting.request, {}
    layers = range(setting.blocks.count)
    request.check_names([x for k in layers for x in setting.uses.of(k).leaves])
    if request.statistics == "block":
        named["block", request.block] = request.block_of
    if request.reconstruct is not None:
        setting.share.alone("reconstruct")
        window = request.reconstruct.window
        if isinstance(window, int) and window > 1:
            raise ValueError(
                f"{arguments.say('window', window)}: streaming has one block at a time;"
                " give 'block' or 'part', or call prune_sequential"
            )
        named["window", window] = request.window_of
    for (option, value), name_of in named.items():
        owners: dict[Any, int] = {}
        for layer in layers:
            for path in setting.uses.of(layer).leaves:
                name = name_of(path)
                if owners.setdefault(name, layer) != layer:
                    raise ValueError(
                        f"{arguments.say(option, value)}: {name!r} has weights of two"
                        f" blocks of the checkpoint, {owners[name]} and {layer};"
                        " streaming has one at a time: give a finer one, or call"
                        " prune_sequential"
                    )


def prune_blocks(
    setting: Setting,
    work: Work,
    plan: Budget,
    tell: Callable[[Any], None],
    prune: Callable[[int, States], Done] | None = None,
) -> Done:
    """Rows and errors of all blocks, of those too that an earlier run has done.

    Args:
      setting: what to do.
      work: the folder.
      plan: of the memory.
      tell: called with a `Block` after every block.
      prune: prunes and writes a block, see `prune_block`, which None stands for.
    """
    if prune is None:
        prune = functools.partial(
            prune_block, setting=setting, work=work, plan=plan, tell=tell
        )
    blocks, numbers = setting.blocks, setting.share.numbers
    states = States(work.states, plan.shelf, numbers)
    rows: list[Row] = []
    errors: dict[str, float] = {}
    first = work.resumed()
    for layer in range(first):
        own, lost = work.rows(layer)
        rows, errors = rows + own, errors | lost
    if first < blocks.count:
        if first:
            states.load(first)
        else:
            states.begin(blocks.embedded(setting.own))
    began = time.perf_counter()
    for layer in range(first, blocks.count):
        memory.reset_peak()
        started = time.perf_counter()
        own, lost = prune(layer, states)
        work.done(layer, own, lost)
        now = time.perf_counter()
        rows, errors = rows + own, errors | lost
        states.forget(layer)
        pace = (now - began) / (layer + 1 - first)
        tell(
            Block(
                layer,
                blocks.count,
                float(np.mean([*lost.values()])) if lost else 0.0,
                now - started,
                memory.resident_peak(),
                pace * (blocks.count - 1 - layer),
            )
        )
    return rows, errors


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
    states: States,
    *,
    setting: Setting,
    work: Work,
    plan: Budget,
    tell: Callable[[Told], None],
) -> Done:
    """Prunes and writes a block; `states` are then those after it."""
    blocks, uses = setting.blocks, setting.uses.of(layer)
    now, twins = states.take()
    job = setting.job(layer, blocks.load(layer), now)
    job.finished = work.finished(layer)
    walk = Walk(
        job,
        Shelf(plan.shelf, work.folder),
        twins=None if twins is None else [(h,) for h in twins],
        programs=setting.programs,
        share=setting.share,
        to_end=True,
    )
    job.batches.clear()
    del now, twins
    rows: list[Row] = []
    errors: dict[str, float] = {}
    leaves: dict[str, Any] = {}

    def taken(path: str, plan: Plan) -> None:
        row, leaf = described(path, plan, uses.leaves[path].layout, setting)
        rows.append(row)
        if setting.pack:
            leaves[path] = leaf

    def step(done: Layer | Trained) -> None:
        if isinstance(done, Layer):
            errors[done.path] = done.error
        tell(done)

    walk.run(step, taken)
    write_block(layer, setting, work, job.current, leaves)
    del job
    states.next(layer + 1, walk.outputs(), setting.request.beside)
    return rows, errors


def write_block(
    layer: int,
    setting: Setting,
    work: Work,
    arrays: Mapping[str, Any],
    leaves: Mapping[str, Any],
) -> None:
    """Writes a block, its packed form too where that is asked for.

    Args:
      layer: which.
      setting: what to do.
      work: the folder.
      arrays: key -> array with zeros in place, all of the block.
      leaves: key -> packed leaf; not read without packing.
    """
    if not setting.share.writes:
        return
    stored = {
        key: np.asarray(leaf).astype(setting.blocks.stored(key), copy=False)
        for key, leaf in arrays.items()
    }
    for key, leaf in stored.items():
        work.writer.put(key, leaf)
    if setting.pack:
        others = {key: leaf for key, leaf in stored.items() if key not in leaves}
        folder = work.model / PACKED
        folder.mkdir(exist_ok=True)
        path = folder / f"block-{layer:05d}.safetensors"
        packed.write_packed(path, {**others, **leaves}, overwrite=True)


def described(path: str, plan: Plan, layout: Any, setting: Setting) -> tuple[Row, Any]:
    """(row of the report, packed leaf or the weight) of a finished leaf, as stored."""
    weight = plan.weight.astype(setting.blocks.stored(path))
    plan, leaf = dataclasses.replace(plan, weight=weight), weight
    if setting.pack and plan.support.regions is not None:
        leaf = kernels.pack(plan, layout, setting.values)
    row = report({path: plan}, {path: leaf}).rows[0]
    if not setting.pack:
        row = dataclasses.replace(row, note="not packed: streamed without pack")
    return row, leaf


def total(setting: Setting, rows: list[Row], work: Work) -> Report:
    """The report of the whole model.

    Args:
      setting: what was done.
      rows: of all blocks.
      work: the folder, all blocks written.
    """
    blocks = setting.blocks
    pruned = {row.path for row in rows}
    reasons: dict[str, str] = {}
    for layer in range(blocks.count):
        reasons |= setting.uses.of(layer).skipped
    skipped = {
        key: reasons.get(key, OUTSIDE)
        for key in blocks.index.files
        if key not in pruned
    }
    size = blocks.index.size
    saved = sum(row.dense_bytes - row.packed_bytes for row in rows)
    dense = {
        key: math.prod(blocks.index.shape(key))
        for key in skipped
        if len(blocks.index.shape(key)) > 1
    }
    return Report(tuple(rows), skipped, size, size - saved, dense, work.moved(skipped))
