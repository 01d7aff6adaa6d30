"""Learns orders or masks of frozen weights with a loss of the whole model.

`fit` runs `make_step` for a method with `frozen_weights` and keeps the states whose
hard plans evaluate best, the first ones among them: learning never ends worse than it
began. PermLLM (arXiv:2510.10136) and the cost predictor (arXiv:2601.22980) train so.
"""

import dataclasses
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.pruning import apply
from flexhinm_jax.training import model_gates, sharding
from flexhinm_jax.training import resume as saved
from flexhinm_jax.training.optimizers import check_ties, tied
from flexhinm_jax.training.stages import NotFinite
from flexhinm_jax.training.state import Training, init_training
from flexhinm_jax.training.step import LOSS, loss_of, make_step
from flexhinm_jax.types import State, Uses

History = list[dict[str, float]]

ENTRY = ("step", "loss", "value")


class Stopped(NotFinite):
    """A loss or gradient was not finite, so `fit` ended early.

    Attributes:
      states: the hardened states with the best evaluation so far.
      history: the entries so far.
    """

    def __init__(self, message: str, states: dict[str, State], history: History):
        """Keeps what was found."""
        super().__init__(message)
        self.states, self.history = states, history


def fit(
    method: LearnedMethod,
    states: Mapping[str, State],
    loss_fn: Callable[..., Any],
    params: Any,
    uses: Uses,
    batches: Sequence[tuple[Any, ...]],
    *,
    key: Array,
    tx: optax.GradientTransformation,
    steps: int,
    evaluate: Callable[[Any], Any] | None = None,
    every: int = 10,
    ties: Mapping[str, str] | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
    checkpoints: str | os.PathLike | None = None,
    save_every: int = 100,
    keep_last: int = 2,
    resume: saved.Resume = False,
    config: Any = None,
) -> tuple[dict[str, State], History]:
    """Moves what the states have learned by the gradient of a loss of the whole model.

    A fit that is interrupted and resumed gives bit for bit the states and the history
    of one that was not.

    Args:
      method: the method that solved the states; it leaves the weights as they are.
      states: from `solve`.
      loss_fn: called as loss_fn(params, *batch), lower is better, f32[] or (f32[],
        metrics); gets the parameters with the relaxed weights in place. See
        `training.objectives` for some.
      params: the dense parameters.
      uses: from `discover`.
      batches: tuples of the other arguments, taken in turn. Batches of equal shapes
        share one compiled step.
      key: PRNG key, consumed.
      tx: optax optimiser of what is learned.
      steps: updates.
      evaluate: called with parameters under hard plans, returns a number, lower is
        better; None for the mean of `loss_fn` over all batches.
      every: updates between two evaluations; start and end are evaluated as well.
      ties: path -> path of the leaf whose updates it shares; see `tied`.
      progress: called with every entry of the history, after a checkpoint that is due.
      checkpoints: folder for checkpoints, or None. They hold what is learned, the
        optimiser, the best states, keys and history, not the frozen weights.
      save_every: updates between two of them; the end is saved as well.
      keep_last: how many to keep.
      resume: True continues the newest checkpoint, "auto" begins where there is none,
        "older" passes over damaged ones.
      config: plain values that explain the run, such as the rate of `tx`; a resumed
        run must give the same, and the same weights, states and key.

    Returns:
      The hardened states with the best evaluation, and the history: "step", "loss" (of
      the relaxation, mean since the last entry), "value" (of the evaluation) and the
      figures of the method, such as "expected_sparsity" or "confidence". Loss and
      figures are NaN in the first entry.

    Raises:
      ValueError: a method whose weights move, no batch, a tie to an unknown leaf, a
        sharding that splits a group, a checkpoint of another run.
      FileExistsError: a new run in a folder with checkpoints.
      FileNotFoundError: nothing to continue.
      Stopped: loss or gradient is NaN or infinite; it names the step and holds the
        best states. Noticed at the next evaluation or checkpoint.
    """
    check_method(method)
    if not isinstance(method, LearnedMethod) or not method.frozen_weights:
        raise ValueError(
            f"fit: {type(method).__name__} does not learn with frozen weights; train "
            "it with gradual or make_step, or apply its plans"
        )
    _check_batches(batches)
    arguments.key(key)
    arguments.optimiser(tx, "tx")
    arguments.function(loss_fn, "loss_fn", LOSS)
    if evaluate is not None:
        arguments.function(evaluate, "evaluate", "evaluate(params)")
    for count, name in ((every, "every"), (save_every, "save_every")):
        arguments.count(count, f"fit: {name}", 1)
    arguments.count(keep_last, "fit: keep_last", 1)
    arguments.count(steps, "fit: steps", 0)
    arguments.found(uses)
    arguments.by_path(states, State, "states", "solve()", uses.leaves)
    if not states:
        raise ValueError("fit: states is empty; solve at least one leaf")
    if ties is not None and not isinstance(ties, Mapping):
        raise ValueError(
            f"fit: ties is {arguments.shown(ties)}: need {{path: path of its leader}}"
        )
    saved.check_resume(resume)
    if resume and checkpoints is None:
        raise ValueError(f"fit: resume={resume!r} needs the folder: checkpoints=")
    if ties:
        check_ties(states, ties)
        tx = tied(tx, ties)
    sharding.check_sharding(params, uses, method)
    now = init_training(method, params, uses, states, None, key=key, mask_tx=tx)
    where = sharding.places(now)
    step = make_step(method, loss_fn, None, uses, mask_tx=tx, shardings=where)
    whole = sharding.gather(params)

    @jax.jit
    def hard(states, params):
        settled = model_gates.harden(method, states, params, uses)
        plans = apply.decide(method, settled, params, uses)
        return apply.densify(plans, params, uses)

    @jax.jit
    def value_of(params, *batch):
        return loss_of(loss_fn, params, batch)[0]

    def measure(states):
        sparse = hard(sharding.gather(states), whole)
        if evaluate is not None:
            value = evaluate(sparse)
            if np.shape(value) != () or value is None:
                raise ValueError(
                    f"fit: evaluate returned {arguments.shown(value)}: need one number"
                )
            return float(value)
        return float(np.mean([value_of(sparse, *batch) for batch in batches]))

    def hardened(states):
        # copied, because a step gives the memory of its argument away
        found = model_gates.harden(method, sharding.gather(states), whole, uses)
        return jax.tree.map(lambda x: jnp.array(x, copy=True), found)

    with apply.states_of(method):
        figures = jax.eval_shape(
            lambda s: model_gates.metrics(method, s, uses), now.states
        )
    names = (*ENTRY, *sorted(figures))
    with apply.states_of(method):
        first = hardened(now.states)
    run = _Run(now, first, steps, every, names)
    folder = None
    if checkpoints is not None:
        setting = {"steps": steps, "every": every, "batches": len(batches)}
        setting |= {"ties": dict(ties or {}), "start": _checksum((params, states))}
        setting |= {"method": method, "key": saved.key_words(key), "run": config}
        folder = _Folder(Path(checkpoints), setting, keep_last)
        if restored := saved.load(checkpoints, run.saved(), setting, resume):
            run.restore(restored[0], now.params)
    if not run.history:
        run.add(measure(run.best))
    while run.done < steps:
        k = run.done
        batch = batches[k % len(batches)]
        arguments.batch(batch, f"fit: batches[{k % len(batches)}]")
        now, metrics = step(run.now.at(k / max(steps - 1, 1)), *batch)
        run.took(now, metrics)
        last = run.done == steps
        evaluates = last or run.done % every == 0
        saves = folder is not None and (last or run.done % save_every == 0)
        if evaluates or saves:
            run.check_finite()
        if evaluates:
            value = measure(run.now.states)
            if run.add(value):
                run.best = hardened(run.now.states)
        if saves and folder is not None:
            folder.save(run)
        if evaluates and progress is not None:
            progress(run.history[-1])
    return run.best, run.history


def _check_batches(batches: Any) -> None:
    """Raises ValueError unless there are batches, and the first is a tuple.

    The others are looked at when it is their turn: a sequence may load them.
    """
    listed = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
    if not listed or hasattr(batches, "shape") or isinstance(batches, Mapping | str):
        raise ValueError(
            f"fit: batches is {arguments.shown(batches)}: need a list of tuples, the "
            "arguments after params, such as [(x,)]; it is gone through several times"
        )
    if not len(batches):
        raise ValueError("fit: batches is empty; give at least one")
    arguments.batch(batches[0], "fit: batches[0]")


@dataclasses.dataclass
class _Run:
    """Where a fit stands.

    Attributes:
      now: the training.
      best: the hardened states with the lowest value.
      steps: updates in all.
      every: updates between two entries.
      names: of the figures of an entry.
      history: entries, oldest first.
      losses: of the updates since the last entry, on the device.
      finite: whether the updates since the last check were.
      metrics: of the last update, on the device.
      done: updates so far.
    """

    now: Training
    best: dict[str, State]
    steps: int
    every: int
    names: tuple[str, ...]
    history: History = dataclasses.field(default_factory=list)
    losses: list[Any] = dataclasses.field(default_factory=list)
    finite: list[Any] = dataclasses.field(default_factory=list)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    done: int = 0

    def took(self, now: Training, metrics: Mapping[str, Array]) -> None:
        """Goes on after an update."""
        self.now, self.done = now, self.done + 1
        self.losses.append(metrics["loss"])
        self.finite.append(metrics["finite"])
        self.metrics = metrics

    def add(self, value: float) -> bool:
        """Adds an entry, and says whether it is the best."""
        if not self.history and not np.isfinite(value):
            raise ValueError(
                f"fit: the start evaluates to {value}; look at the weights, the "
                "batches and the loss before learning from them"
            )
        lowest = min((h["value"] for h in self.history), default=np.inf)
        losses = np.asarray([np.float32(x) for x in self.losses])
        loss = float(np.mean(losses)) if self.losses else float("nan")
        figures = {n: float(self.metrics.get(n, np.nan)) for n in self.names[3:]}
        entry = {"step": self.done, "loss": loss, "value": value}
        self.history.append(entry | figures)
        self.losses = []
        return value < lowest

    def check_finite(self) -> None:
        """Raises when an update since the last check was none."""
        finite = [bool(x) for x in self.finite]
        self.finite = []
        if all(finite):
            return
        bad = self.done - len(finite) + 1 + finite.index(False)
        raise Stopped(
            f"fit: step {bad}: loss or gradient is not finite. Lower the learning "
            "rate, clip gradients or look at the batch; the error holds the best "
            f"states so far, of step {self._best_step()}",
            self.best,
            self.history,
        )

    def saved(self) -> dict[str, Any]:
        """Everything that matters, with shapes that do not depend on the step."""
        entries = np.full((2 + self.steps // self.every, len(self.names)), np.nan)
        for row, entry in zip(entries, self.history, strict=False):
            row[:] = [entry[name] for name in self.names]
        losses = np.full((self.every,), np.nan, np.float32)
        losses[: len(self.losses)] = [np.float32(x) for x in self.losses]
        counts = [self.done, len(self.history), len(self.losses)]
        return {
            "training": dataclasses.replace(self.now, params=()),
            "best": self.best,
            "entries": entries,
            "losses": losses,
            "counts": np.asarray(counts, np.int32),
        }

    def restore(self, found: dict[str, Any], params: Any) -> None:
        """Goes on where `saved` was."""
        self.now = dataclasses.replace(found["training"], params=params)
        self.best = found["best"]
        self.done, entries, losses = (int(x) for x in found["counts"])
        self.history = [
            dict(zip(self.names, (int(row[0]), *map(float, row[1:])), strict=True))
            for row in found["entries"][:entries]
        ]
        self.losses = list(found["losses"][:losses])

    def _best_step(self) -> int:
        return int(min(self.history, key=lambda h: h["value"])["step"])


@dataclasses.dataclass(frozen=True)
class _Folder:
    """Where a fit is saved, what explains it, and how many checkpoints are kept."""

    path: Path
    setting: Any
    last: int

    def save(self, run: _Run) -> None:
        saved.save(self.path, run.saved(), run.done, self.setting, self.last)


def _checksum(x: Any) -> int:
    """Of all values that this process can read."""
    total = 0
    for leaf in jax.tree.leaves(x):
        if getattr(leaf, "is_fully_addressable", True):
            total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
    return total
