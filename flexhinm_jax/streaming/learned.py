"""Learns the masks of a decoder directory block by block, in bounded memory.

One block at a time is loaded, and the masks of its weights are learned so that the
block gives what the dense block gives: on the hidden states behind the pruned blocks
before it (target "seq"), or what the dense model gives there ("asym"). With the window
"part" the residual stream between attention and feed-forward counts as well. The
weights stay. The loss is the squared error over the squared outputs, and the training
is a `Run` of the training room: the best hard masks seen are kept, the first ones among
them, so no block ends worse than it began. With an optimiser of its own what stays of
the weights moves along with the masks, norms and biases too, as in FlexHiNM-GP.

Blocks of one kind are one program, under keys without the number of the layer, so
every kind is compiled once. Resuming, writing and packing are those of `streaming`; a
run that is killed goes on in the middle of a block too, with the same result.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.io import records
from flexhinm_jax.io.checkpoints import Checkpoints
from flexhinm_jax.io.shelf import Shelf
from flexhinm_jax.methods import LearnedMethod, Method
from flexhinm_jax.models import decoder
from flexhinm_jax.pruning import apply
from flexhinm_jax.pruning.apply import output_errors
from flexhinm_jax.pruning.report import Row
from flexhinm_jax.pruning.statistics import calibrate
from flexhinm_jax.sequential.request import Request
from flexhinm_jax.streaming import memory, streaming
from flexhinm_jax.streaming.blocks import BlockProgram
from flexhinm_jax.streaming.learning_memory import learning_budget
from flexhinm_jax.streaming.memory import Budget
from flexhinm_jax.streaming.states import States
from flexhinm_jax.streaming.streaming import Limits, Output, Streamed
from flexhinm_jax.streaming.work import Setting, Work
from flexhinm_jax.training import few_steps, model_gates
from flexhinm_jax.training.objectives import Teacher, output_error
from flexhinm_jax.training.phases import Judge, Phase
from flexhinm_jax.training.run import NotFinite, Run
from flexhinm_jax.training.state import Training, frozen, init_training
from flexhinm_jax.training.step import make_step
from flexhinm_jax.types import Plan, State, Stats

__all__ = ["Judged", "Learned", "Learning", "learn_blocks"]

SAVE_SECONDS = 120.0
"""Wall time between two checkpoints inside a block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learning:
    """How the masks of every block are learned.

    Attributes:
      tx: optimiser of what the method learns; begins anew in every block.
      steps: updates per block.
      start: method whose plans come first, for one that adopts plans; None for the
        method's own start.
      looks: evaluations of the hard masks per block, besides the first.
      held: share of the batches that judges the masks and is not learned from; at
        least one, unless there is only one batch.
      config: plain values that explain `tx`: a run that goes on must give the same.
      weights_tx: optimiser of the weights that stay, norms and biases, for a method
        that does not freeze them (HardConcrete, GumbelPatterns); None leaves them.
      window: whose output is compared: "block", or "part" for both halves of a block,
        the residual stream behind its attention and behind its end.
    """

    tx: optax.GradientTransformation
    steps: int
    start: Method | None = None
    looks: int = 10
    held: float = 0.125
    config: Any = None
    weights_tx: optax.GradientTransformation | None = None
    window: Literal["block", "part"] = "block"

    def __post_init__(self):
        """Validates the fields."""
        arguments.optimiser(self.tx, "tx")
        if self.weights_tx is not None:
            arguments.optimiser(self.weights_tx, "weights_tx")
        arguments.count(self.steps, "steps", 1)
        arguments.count(self.looks, "looks", 1)
        if not 0 < self.held < 1:
            raise ValueError(f"held={self.held!r}: need a share between 0 and 1")
        if self.window not in ("block", "part"):
            raise ValueError(f"window={self.window!r}: choose 'block' or 'part'")


@dataclasses.dataclass(frozen=True)
class Judged:
    """The hard masks of a block were evaluated.

    Attributes:
      layer: which block, from 0.
      total: blocks in all.
      step: updates done.
      steps: updates of the block.
      loss: mean of the relaxation since the last look; NaN at the first.
      value: loss of the hard masks on the batches that judge.
    """

    layer: int
    total: int
    step: int
    steps: int
    loss: float
    value: float


@dataclasses.dataclass(frozen=True)
class Learned(Streamed):
    """What `learn_blocks` returns.

    Attributes:
      values: loss of the first and of the best masks of every block; empty pairs for a
        method with a loop of its own.
    """

    values: tuple[tuple[float, ...], ...] = ()


Told = streaming.Told | Judged

Kept = tuple[dict[str, State], Any]
"""Hard states, and the weights where they are trained, else None."""


def learn_blocks(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokens: np.ndarray,
    request: Request,
    learning: Learning,
    *,
    limits: Limits | None = None,
    output: Output | None = None,
    progress: Callable[[Told], None] | None = None,
) -> Learned:
    """Learns the masks of a decoder directory block by block.

    Args:
      directory: Hugging Face directory of a supported family.
      out: directory to write.
      tokens: i32[samples, length], the calibration text.
      request: method, sparsity, rules and key; target "seq" or "asym". A learned
        method, or one with a loop of its own such as HyperPrune.
      learning: optimiser, steps and start.
      limits: memory, batch and dtype; None for the defaults.
      output: what to write besides the model; None for nothing.
      progress: called with the `Budget` before anything is computed, a `GoingOn` where
        an earlier run is continued, a `Judged` for every look at the masks and a
        `Block` for every block.

    Returns:
      The report, the errors of all pruned leaves, and what every block gained.

    Raises:
      FileNotFoundError: a part of the directory is missing.
      FileExistsError: `out` exists and may not be replaced.
      ValueError: as `streaming.stream`; another target, or a loss that is not finite.
      InUse: another process writes `out`.
    """
    limits, output = limits or Limits(), output or Output()
    tell = progress or (lambda told: None)
    request.check()
    if request.target == "resid" or request.statistics != "sequential":
        raise ValueError(
            f"target={request.target!r}, statistics={request.statistics!r}: masks are"
            " learned for the output of a block, with target 'seq' (the dense block on"
            " the same input) or 'asym' (the dense model)"
        )
    setting = streaming.opened(directory, out, tokens, request, limits, output)
    setting.share.alone("learning masks")
    how = {f.name: getattr(learning, f.name) for f in dataclasses.fields(learning)}
    setting = dataclasses.replace(
        setting,
        targets=request.sparsity,
        more={k: v for k, v in how.items() if k not in ("tx", "weights_tx")},
    )
    memory.check_all(setting)
    _check_method(setting, learning)
    plan = learning_budget(
        setting,
        limits.memory,
        trained=learning.weights_tx is not None,
        goals=1 + (learning.window == "part"),
    )
    tell(plan)
    plan.check()
    work = Work(Path(out), setting)
    task = _Task(setting, learning, work, plan, tell)
    with work.kept(plan.on_disk, tell):
        rows, errors = streaming.prune_blocks(setting, work, plan, tell, task.block)
        values = tuple(task.values(n) for n in range(setting.blocks.count))
        report = streaming.total(setting, rows, work)
        result = Learned(report, errors, values=values)
        work.finish(output.extra, result)
    return result


def _check_method(setting: Setting, learning: Learning) -> None:
    """Refuses what the method does not take, and weights that round steps away."""
    method = setting.request.method
    if learning.window != "block" and not isinstance(method, LearnedMethod):
        raise ValueError(
            f"window={learning.window!r}: {type(method).__name__} has a loop of its"
            " own, on the Gram of every weight, and compares no outputs; leave it out"
        )
    if learning.weights_tx is None:
        return
    if frozen(method) or not isinstance(method, LearnedMethod):
        raise ValueError(
            f"{type(method).__name__} keeps the weights as they are; leave their"
            " optimiser out, or take a method that trains them, such as HardConcrete"
        )
    for layer in setting.uses.kinds().values():
        for path, like in setting.blocks.like(layer).items():
            if like.dtype.itemsize < 4:
                raise ValueError(
                    f"{path}: {like.dtype} rounds small steps of training away; compute"
                    " in float32 (Limits(dtype='float32'), --dtype float32)"
                )


class _Programs:
    """What is compiled once for all blocks of a kind.

    Attributes:
      block: their program.
      run: (parameters, hidden states) -> what is compared; the block's output last.
      weights_tx: of the weights; None where the method keeps them as they are.
      step: of a `Phase`.
      value: (states, parameters, *batch) -> loss under the hard masks.
    """

    def __init__(self, block: BlockProgram, method: Any, learning: Learning):
        """Compiles nothing yet."""
        one = lambda params, h: (block.apply(params, h),)  # noqa: E731
        compared = block.parts if learning.window == "part" else one
        loss, self.block, self.run = output_error(compared), block, jax.jit(compared)
        moving, tx = learning.weights_tx or optax.set_to_zero(), learning.tx
        self.weights_tx = None if frozen(method) else moving
        if isinstance(method, LearnedMethod):
            self.step = make_step(method, loss, self.weights_tx, block.uses, mask_tx=tx)

        @jax.jit
        def value(states: dict[str, State], params: Any, *batch: Any) -> Array:
            plans = apply.decide(method, states, params, block.uses)
            return loss(apply.densify(plans, params, block.uses), *batch)

        self.value = value


class _Task:
    """Learns one block after the other; `block` is what `prune_blocks` calls."""

    def __init__(
        self,
        setting: Setting,
        learning: Learning,
        work: Work,
        plan: Budget,
        tell: Callable[[Told], None],
    ):
        """Keeps what every block needs."""
        self.setting, self.learning, self.work = setting, learning, work
        self.plan, self.tell = plan, tell
        self.known: dict[Any, _Programs] = {}

    def values(self, layer: int) -> tuple[float, ...]:
        """Loss of the first and of the best masks of a block that is done."""
        return tuple(records.read(self._values(layer))["values"])

    def _values(self, layer: int) -> Path:
        return self.work.folder / f"learned-{layer:05d}.json"

    def programs(self, layer: int) -> _Programs:
        """The programs of the kind of a block."""
        kind = self.setting.uses.kind(layer)
        if kind not in self.known:
            block = self.setting.uses.program(layer)
            method = self.setting.request.method
            self.known[kind] = _Programs(block, method, self.learning)
        return self.known[kind]

    def block(self, layer: int, states: States) -> tuple[list[Row], dict[str, float]]:
        """Learns and writes a block; `states` are then those after it."""
        setting, programs = self.setting, self.programs(layer)
        block = programs.block
        params = decoder.block_params(setting.blocks.load(layer), layer)
        inputs, twins = states.take()
        shelf = Shelf(self.plan.shelf, self.work.folder)
        goals = [
            [shelf.put(x) for x in programs.run(params, jnp.asarray(h))]
            for h in (inputs if twins is None else twins)
        ]

        def batch(k: int) -> tuple[Array, Teacher]:
            wanted = tuple(jnp.asarray(shelf.get(goal)) for goal in goals[k])
            return jnp.asarray(inputs[k]), Teacher(wanted)

        batches = ((jnp.asarray(h),) for h in inputs)
        stats = calibrate(block.apply, params, block.uses, batches)
        hard, weights = self._learned(layer, params, stats, batch, len(inputs))
        plans = apply.decide(setting.request.method, hard, weights, block.uses)
        errors = output_errors(plans, params, block.uses, stats)
        sparse = apply.densify(plans, weights, block.uses)
        rows = self._written(layer, plans, sparse)
        after = (
            (programs.run(sparse, jnp.asarray(h))[-1:], [shelf.get(parts[-1])])
            for h, parts in zip(inputs, goals, strict=True)
        )
        states.next(layer + 1, after, setting.request.beside)
        shelf.close()
        prefix = decoder.block_prefix(layer)
        return rows, {prefix + path: error for path, error in errors.items()}

    def _learned(
        self,
        layer: int,
        params: Any,
        stats: Mapping[str, Stats],
        batch: Callable[[int], tuple[Array, Teacher]],
        count: int,
    ) -> tuple[dict[str, State], Any]:
        """The hard states of a block and its weights; records what that gained."""
        method, uses = self.setting.request.method, self.programs(layer).block.uses
        solve_key, key = jax.random.split(
            jax.random.fold_in(self.setting.request.key, layer)
        )
        start, targets = self.learning.start, self.setting.targets
        hard = few_steps.first_states(
            method, start, solve_key, params, uses, stats, targets
        )
        self.work.solved(layer).mkdir(parents=True, exist_ok=True)
        values, weights = (), params
        if isinstance(method, LearnedMethod):
            run = self._run(layer, params, hard, batch, count, key)
            (hard, moved), values = self._finished(layer, run)
            weights = params if moved is None else moved
        records.write(self._values(layer), {"values": list(values)})
        return hard, weights

    def _written(
        self, layer: int, plans: Mapping[str, Plan], sparse: Mapping[str, Array]
    ) -> list[Row]:
        """Writes a block; the rows of the report about it."""
        rows, leaves, prefix = [], {}, decoder.block_prefix(layer)
        uses = self.programs(layer).block.uses
        for path, plan in plans.items():
            layout = uses.leaves[path].layout
            row, leaf = streaming.described(prefix + path, plan, layout, self.setting)
            rows.append(row)
            leaves[prefix + path] = leaf
        whole = {prefix + name: x for name, x in sparse.items()}
        streaming.write_block(layer, self.setting, self.work, whole, leaves)
        return rows

    def _run(
        self,
        layer: int,
        params: Any,
        begun: dict[str, State],
        batch: Callable[[int], tuple[Array, Teacher]],
        count: int,
        key: Array,
    ) -> Run:
        """The training of a block."""
        mix_key, key = jax.random.split(key)
        order = np.asarray(jax.random.permutation(mix_key, count)).tolist()
        held = math.ceil(self.learning.held * count) if count > 1 else 0
        judging, learning = order[:held] or order, order[held:]
        programs, method = self.programs(layer), cast(Any, self.setting.request.method)
        uses = programs.block.uses
        trains = self.learning.weights_tx is not None

        def hard(training: Training) -> Kept:
            now = training.params if trains else params
            states = model_gates.harden(method, training.states, now, uses)
            return states, now if trains else None

        def value(kept: Kept) -> float:
            states, now = kept
            weights = params if now is None else now
            losses = [programs.value(states, weights, *batch(k)) for k in judging]
            return float(np.mean([float(x) for x in losses]))

        start = init_training(
            method,
            params,
            uses,
            begun,
            programs.weights_tx,
            key=key,
            mask_tx=self.learning.tx,
        )
        return Run(
            start,
            [Phase(programs.step, self.learning.steps)],
            lambda step: batch(learning[step % len(learning)]),
            judge=Judge(hard, value),
            every=max(1, self.learning.steps // self.learning.looks),
            saves=Checkpoints(
                self.work.solved(layer) / "training",
                every=None,
                seconds=SAVE_SECONDS,
                keep=1,
                resume="auto",
            ),
            config={"layer": layer, "steps": self.learning.steps},
        )

    def _finished(self, layer: int, run: Run) -> tuple[Kept, tuple[float, float]]:
        """What was best, and the loss of the first and of the best masks."""
        total, steps = self.setting.blocks.count, self.learning.steps
        try:
            for row in run:
                if "value" in row:
                    loss, value = row.get("loss", math.nan), row["value"]
                    self.tell(Judged(layer, total, row["step"], steps, loss, value))
        except NotFinite as error:
            raise ValueError(f"block {layer + 1} of {total}: {error}") from error
        assert run.best is not None  # a run with a judge has looked at its start
        return run.best, (run.rows[0]["value"], run.lowest)
