"""What a `Run` is told: how long it takes, its phases, who judges, what it writes."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict, get_args

from flexhinm_jax import arguments
from flexhinm_jax.io.checkpoints import Checkpoints, Resume
from flexhinm_jax.training.state import Training
from flexhinm_jax.training.step import Step

Row = dict[str, Any]

Unit = Literal["steps", "minutes", "cpu-seconds"]


@dataclasses.dataclass(frozen=True)
class Duration:
    """How long a run takes.

    Attributes:
      amount: how much, above 0.
      unit: "steps", "minutes" of wall time, or "cpu-seconds" of this process.
      most: steps at most, whatever the amount is; None for any number.
    """

    amount: float
    unit: Unit = "steps"
    most: int | None = None

    def __post_init__(self):
        """Validates the fields."""
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit={self.unit!r}; known: {', '.join(get_args(Unit))}")
        if not 0 < self.amount < math.inf:
            raise ValueError(
                f"a duration of {self.amount} {self.unit} is not positive and finite"
            )

    def progress(self, step: int, spent: float) -> float:
        """The spent fraction after `step` steps and `spent` seconds of `clock`."""
        if self.unit == "steps":
            part = step / self.amount
        else:
            part = spent / (self.amount * (60 if self.unit == "minutes" else 1))
        return part if self.most is None else max(part, step / self.most)

    def clock(self) -> float:
        """Seconds since some moment, in the kind of time that is counted."""
        if self.unit == "cpu-seconds":
            return time.process_time()
        return time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run with one step function.

    Attributes:
      step: (training, *batch) -> (training, metrics), such as `make_step` returns.
      steps: how many. In a run that has a duration: its share, any positive number,
        beside those of the other phases.
      begin: Training -> Training where the phase begins, such as `next_stage`; not
        called for the first one, whose start the run is given.
      end: Training -> (Training, row) where it ends, such as `harden`; called again by
        a run that continues from there.
      progress: steps done in the phase -> fraction of its schedules, in [0, 1]; None
        for an even growth from 0 to 1.
    """

    step: Step
    steps: float
    begin: Callable[[Training], Training] | None = None
    end: Callable[[Training], tuple[Training, Row]] | None = None
    progress: Callable[[int], float] | None = None


class At(NamedTuple):
    """A moment of a run, before a step.

    Attributes:
      step: steps done.
      progress: spent fraction of the run, in [0, 1).
      phase: number of the phase.
      part: fraction of the phase's schedules, in [0, 1].
    """

    step: int
    progress: float
    phase: int
    part: float


@dataclasses.dataclass(frozen=True)
class Judge:
    """Says what of a training to keep, and how good that is.

    Attributes:
      keep: Training -> the tree that would be kept, such as hardened states.
      value: that tree -> a number, lower is better.
      looks: how often in the whole run, evenly; None with every row. The start and the
        end are looked at as well.
    """

    keep: Callable[[Training], Any]
    value: Callable[[Any], float]
    looks: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a run writes and when it gives up.

    Attributes:
      every: steps between two rows; the run, and a phase with an `end`, end with one.
      saves: where checkpoints go, see `io.checkpoints.Checkpoints`; None for nowhere.
      config: what must be equal to continue from a checkpoint, plain values.
      max_skipped: steps without a finite loss that are tolerated.
      tracker: called as tracker(step, row) with every row, after a checkpoint that is
        due.
    """

    every: int = 10
    saves: Checkpoints | None = None
    config: Any = None
    max_skipped: int = 0
    tracker: Callable[[int, Row], None] | None = None

    def __post_init__(self):
        """Validates the fields."""
        arguments.count(self.every, "every", 1)
        arguments.count(self.max_skipped, "max_skipped", 0)
        if self.tracker is not None:
            arguments.function(self.tracker, "tracker", "tracker(step, row)")


class Saves(TypedDict, total=False):
    """How a run is saved, as `fit` and `gradual` are told."""

    checkpoints: str | os.PathLike | Checkpoints | None
    save_every: int
    keep_last: int
    resume: Resume


def saves(name: str, told: Saves) -> Checkpoints | None:
    """The checkpoints of a run; removes what concerns them from the options.

    Raises:
      ValueError: a count out of range, or a resumed run without a folder.
    """
    folder = told.pop("checkpoints", None)
    every, last = told.pop("save_every", 100), told.pop("keep_last", 2)
    resume = told.pop("resume", False)
    arguments.count(every, f"{name}: save_every", 1)
    arguments.count(last, f"{name}: keep_last", 1)
    if isinstance(folder, Checkpoints):
        return folder
    if folder is None:
        Checkpoints("", every, last, resume)  # refuses unknown words
        if resume:
            raise ValueError(
                f"{name}: resume={resume!r} needs the folder: checkpoints="
            )
        return None
    return Checkpoints(folder, every, last, resume)
