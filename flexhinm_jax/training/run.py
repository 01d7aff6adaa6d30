"""One loop for every training: steps or a clock, rows, looks, checkpoints.

`Run` knows nothing of methods. It gets the training before its first step, phases (a
step function each, and what happens where they begin and end) and the batch of every
step. `fit` and `gradual` set one up; a loop of one's own does so in a few lines.

A run whose length counts steps is reproducible to the last bit, also when it was killed
and resumed in between. One that counts time reaches the end of its schedules however
fast the machine is.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flexhinm_jax import arguments
from flexhinm_jax.io import records
from flexhinm_jax.training.optimizers import owned
from flexhinm_jax.training.phases import At, Duration, Judge, Options, Phase, Row
from flexhinm_jax.training.state import Training

ROWS = "rows.jsonl"


class NotFinite(RuntimeError):
    """A loss or gradient was NaN or infinite."""


class Run:
    """A training from its start to its end, row by row: iterate over it to run it.

    Rows are dicts: "step" (steps done), "kind" ("step", or "stage" where a phase ends),
    "stage" (number of the phase), "progress" and "part" (see `At`, of the last step),
    "loss" (mean since the last row), the other metrics of the last step, "value" after
    a look, and "seconds" per step. A run with checkpoints keeps them in `rows.jsonl` of
    the folder.

    Attributes:
      training: the training now; None before the first row.
      phase: number of the phase.
      done: steps done in the phase.
      step: steps done in all.
      begun: steps done where the run began or continued.
      spent: seconds of the duration's clock; what is set before the first row counts
        as spent already.
      rows: all rows so far, those before an interruption too.
      lowest: value of the best look so far.
      best: what the judge kept of it.
      last: path of the last checkpoint.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flexhinm_jax as fh
      >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
      >>> loss_fn = lambda p, x: jnp.mean((x @ p["w"]) ** 2)
      >>> uses, tx = fh.discover(loss_fn, params, x), optax.sgd(0.01)
      >>> method = fh.Magnitude(fh.NM(2, 4))
      >>> states = fh.solve(method, jax.random.key(0), params, uses)
      >>> start = fh.init_training(
      ...     method, params, uses, states, tx, key=jax.random.key(1))
      >>> step = fh.make_step(method, loss_fn, tx, uses)
      >>> run = Run(start, [Phase(step, 4)], lambda step: (x,), every=2)
      >>> [(row["step"], round(row["sparsity"], 2)) for row in run]
      [(2, 0.5), (4, 0.5)]
    """

    def __init__(
        self,
        start: Training | Callable[[], Training],
        phases: Sequence[Phase],
        batch_at: Callable[[int], tuple[Any, ...]],
        duration: Duration | None = None,
        *,
        before: Callable[[Training, At], Training] | None = None,
        judge: Judge | None = None,
        **options: Any,
    ):
        """Sets a run up; nothing is computed yet.

        Args:
          start: the training before its first step, or a function that makes it, which
            is not called by a run that continues from a checkpoint.
          phases: at least one.
          batch_at: the batch of a step, a tuple; the same for the same step, which is
            what makes a resumed run see the same data.
          duration: of the whole run; None for the steps of the phases.
          before: (training, moment) -> training before every step, for what follows the
            progress, such as a learning rate in the state of an optimiser.
          judge: keeps the best training on the way; None keeps none.
          **options: see `Options`.

        Raises:
          ValueError: no phase, an option out of range.
        """
        if not phases:
            raise ValueError("phases is empty: give at least one Phase(step, steps)")
        arguments.function(batch_at, "batch_at", "batch_at(step)")
        self._start: Any = start  # asked by `_lazy`
        self.phases, self._batch_at = tuple(phases), batch_at
        self.duration, self._before, self._judge = duration, before, judge
        self.options = Options(**options)
        self.training: Training | None = None
        self.phase = self.done = self.step = self.begun = 0
        self.spent, self.skipped, self._looked = 0.0, 0, 0.0
        self.rows: list[Row] = []
        self.best: Any = None
        self.lowest, self.last = math.inf, None
        self._losses: list[Any] = []  # of the steps since the last row
        self._finite: list[Any] = []  # of the steps since the last check

    def now(self) -> Training:
        """The training as it is.

        Raises:
          ValueError: the run has not begun.
        """
        if self.training is None:
            raise ValueError("the run has not begun: iterate over it first")
        return self.training

    def progress(self) -> float:
        """The spent fraction."""
        if self.duration is not None:
            return self.duration.progress(self.step, self.spent)
        return self.step / max(sum(phase.steps for phase in self.phases), 1)

    def __iter__(self) -> Iterator[Row]:
        """Runs, and yields the rows."""
        yield from self._begin()
        while True:
            phase = self.phases[self.phase]
            yield from self._steps(phase)
            if phase.end is not None:
                self.training, row = phase.end(self.now())
                self._save()
                yield self._told(self._kept({"kind": "stage"} | row))
            if self.phase + 1 == len(self.phases):
                return
            self.phase, self.done = self.phase + 1, 0
            if (begin := self.phases[self.phase].begin) is not None:
                self.training = begin(self.now())

    def _begin(self) -> Iterator[Row]:
        """Restores or starts; the start is looked at by the judge."""
        if self.training is not None:
            return
        saves = self.options.saves
        saved = None if saves is None else saves.load(self._like, self.options.config)
        if saved is not None:
            self._restore(*saved)
        else:
            self.training = self._start() if self._lazy() else self._start
            self._write([], append=False)
            if self._lazy():  # what it cost to begin is not lost
                self._save()
        self._began = self._clock() - self.spent
        self._since = time.perf_counter()
        if self._judge is not None and saved is None:
            value = self._look()
            if not np.isfinite(value):
                raise ValueError(
                    f"the start evaluates to {value}; look at the weights, the batches "
                    "and the loss before learning from them"
                )
            yield self._told(self._kept({"kind": "step", "value": value}))

    def _steps(self, phase: Phase) -> Iterator[Row]:
        while not self._over():
            at = At(self.step, self.progress(), self.phase, self._part(phase))
            batch = self._batch_at(self.step)
            arguments.batch(batch, f"batch_at({self.step})")
            training = self.now().at(at.part)
            if self._before is not None:
                training = self._before(training, at)
            self.training, metrics = phase.step(training, *batch)
            self._took(metrics)
            ends = self._over()
            final = ends and self.phase + 1 == len(self.phases)
            tells = final or (ends and phase.end is not None)
            tells = tells or self.step % self.options.every == 0
            looks = self._judge is not None and self._looks(tells, final)
            saves = self._due(ends and phase.end is None)
            if tells or looks or saves:
                self._check_finite()
            row = self._row(at, metrics) if tells or looks else None
            if row is not None and looks:
                row["value"] = self._look()
            row = None if row is None else self._kept(row)
            if saves:
                self._save()
            if row is not None:
                yield self._told(row)

    def _took(self, metrics: Mapping[str, Any]) -> None:
        """Goes on after a step."""
        self.step, self.done = self.step + 1, self.done + 1
        self._losses.append(metrics["loss"])
        self._finite.append(metrics["finite"])
        if self.duration is not None and self.duration.unit != "steps":
            jax.block_until_ready(metrics)
            self.spent = self._clock() - self._began

    def _over(self) -> bool:
        """Whether the phase is."""
        if self.duration is None:
            return self.done >= self.phases[self.phase].steps
        return self.progress() >= self._share(self.phase + 1)

    def _share(self, count: int) -> float:
        """Fraction of the run that the first `count` phases take."""
        if count == len(self.phases):
            return 1.0
        steps = [phase.steps for phase in self.phases]
        return sum(steps[:count]) / sum(steps)

    def _part(self, phase: Phase) -> float:
        if self.duration is None:
            if phase.progress is not None:
                return phase.progress(self.done)
            return self.done / max(phase.steps - 1, 1)
        first, last = self._share(self.phase), self._share(self.phase + 1)
        return min(max((self.progress() - first) / (last - first), 0.0), 1.0)

    def _looks(self, tells: bool, final: bool) -> bool:
        assert self._judge is not None
        if self._judge.looks is None:
            return tells
        return final or self.progress() - self._looked >= 1 / self._judge.looks

    def _look(self) -> float:
        assert self._judge is not None
        tree = self._judge.keep(self.now())
        value = self._judge.value(tree)
        if value < self.lowest:
            # copied, because a step gives the memory of its argument away
            self.lowest, self.best = value, owned(tree)
        self._looked = self.progress()
        if self.duration is not None:
            self.spent = self._clock() - self._began
        return value

    def _due(self, ends: bool) -> bool:
        saves = self.options.saves
        return saves is not None and (ends or saves.due(self.step))

    def _row(self, at: At, metrics: Mapping[str, Any]) -> Row:
        figures = {name: float(value) for name, value in metrics.items()}
        losses = np.asarray([np.float32(x) for x in self._losses])
        seconds = (time.perf_counter() - self._since) / len(losses)
        self._losses, self._since = [], time.perf_counter()
        figures |= {"loss": float(np.mean(losses)), "seconds": seconds}
        return {"kind": "step", "progress": at.progress, "part": at.part} | figures

    def _kept(self, row: Row) -> Row:
        """The row with its place, added to those of the run."""
        where = {"kind": row["kind"], "step": self.step, "stage": self.phase}
        self.rows.append(where | row)
        self._write(self.rows[-1:], append=True)
        return self.rows[-1]

    def _told(self, row: Row) -> Row:
        if self.options.tracker is not None:
            self.options.tracker(self.step, row)
        return row

    def _check_finite(self) -> None:
        """Raises when too many steps were skipped."""
        finite = [bool(x) for x in self._finite]
        self._finite = []
        self.skipped += finite.count(False)
        if self.skipped <= self.options.max_skipped or all(finite):
            return
        bad = self.step - len(finite) + 1 + finite.index(False)
        advice = "give checkpoints= a folder to be able to resume"
        if self.last is not None:
            advice = f"the last good checkpoint is {self.last}"
        raise NotFinite(
            f"step {bad}: loss or gradient is not finite; nothing was updated in "
            f"{self.skipped} steps. Lower the learning rate, clip gradients or look at "
            f"the batch; {advice}"
        )

    def _lazy(self) -> bool:
        """Whether the start is yet to be computed."""
        return not isinstance(self._start, Training)

    def _clock(self) -> float:
        return time.perf_counter() if self.duration is None else self.duration.clock()

    def _tree(self, training: Training, best: Any) -> dict[str, Any]:
        """Everything that matters, with shapes that do not depend on the step."""
        losses = np.full((self.options.every,), np.nan, np.float32)
        losses[: len(self._losses)] = [np.float32(x) for x in self._losses]
        counts = [self.phase, self.done, self.step, self.skipped, len(self._losses)]
        seconds = [self.spent, self._looked, self.lowest]
        return {
            "training": training if self._lazy() else training.without_frozen(),
            "best": best,
            "losses": losses,
            "counts": np.asarray(counts, np.int64),
            "figures": np.asarray(seconds, np.float64),
        }

    def _shape(self, saved: Collection[str]) -> Training:
        """The start without its values: shapes, and where its arrays live.

        Args:
          saved: names of the leaves of the checkpoint; its form may depend on values.
        """
        del saved
        return jax.eval_shape(self._start) if self._lazy() else self._start

    def _like(self, step: int) -> Any:
        saves = self.options.saves
        assert saves is not None
        training, judge = self._shape(saves.leaves(step)), self._judge
        if judge is None:
            return self._tree(training, None)
        lazy = self._lazy()
        best = jax.eval_shape(judge.keep, training) if lazy else judge.keep(training)
        return self._tree(training, best)

    def _restore(self, _: int, tree: Any) -> None:
        """Goes on where `_tree` was."""
        saves = self.options.saves
        assert saves is not None
        training = tree["training"]
        if not self._lazy():
            training = training.with_frozen(self._start)
        self.training, self.best = training, tree["best"]
        counts = [int(x) for x in tree["counts"]]
        self.phase, self.done, self.step, self.skipped, pending = counts
        self.spent, self._looked, self.lowest = (float(x) for x in tree["figures"])
        self.begun, self._losses = self.step, list(tree["losses"][:pending])
        self.last = saves.folder / f"step-{self.step:08d}"
        rows = records.read_lines(saves.folder / ROWS)
        self.rows = [row for row in rows if self._before_now(row)]
        self._write(self.rows, append=False)

    def _before_now(self, row: Row) -> bool:
        """Whether a row belongs to what a checkpoint holds; a phase ends again."""
        last = row["kind"] == "stage" and row["stage"] == self.phase
        return row["step"] <= self.step and not last

    def _write(self, rows: Sequence[Row], *, append: bool) -> None:
        saves = self.options.saves
        if saves is not None and jax.process_index() == 0:
            records.write_lines(saves.folder / ROWS, rows, append=append)

    def _save(self) -> None:
        options = self.options
        if options.saves is not None:
            tree = self._tree(self.now(), self.best)
            self.last = options.saves.save(self.step, tree, options.config)
