"""Learns orders or masks of frozen weights with a loss of the whole model.

`fit` runs `make_step` for a method with `frozen_weights` and keeps the states whose
hard plans evaluate best, the first ones among them: learning never ends worse than it
began. PermLLM (arXiv:2510.10136) and the cost predictor (arXiv:2601.22980) train so.
`learn` is the same row by row.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np
import optax
from jax import Array

from flexhinm_jax import arguments, promotion
from flexhinm_jax.io import fingerprint, programs
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.pruning import apply
from flexhinm_jax.training import model_gates, sharding
from flexhinm_jax.training.mask_optimizers import check_ties, tied
from flexhinm_jax.training.phases import (
    At,
    Duration,
    Judge,
    Phase,
    Row,
    Saves,
    saves,
)
from flexhinm_jax.training.run import NotFinite, Run
from flexhinm_jax.training.state import Training, init_training
from flexhinm_jax.training.step import LOSS, loss_of, make_step
from flexhinm_jax.types import State, Uses

History = list[dict[str, float]]

Batches = Sequence[tuple[Any, ...]] | Callable[[int], tuple[Any, ...]]


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


class Told(Saves, total=False):
    """The further options of `fit` and `learn`."""

    every: int
    looks: int | None
    ties: Mapping[str, str] | None
    progress: Callable[[dict[str, float]], None] | None
    before: Callable[[Training, At], Training] | None
    tracker: Callable[[int, Row], None] | None
    config: Any


@promotion.usual()
def fit(
    method: LearnedMethod,
    states: Mapping[str, State],
    loss_fn: Callable[..., Any],
    params: Any,
    uses: Uses,
    batches: Batches,
    *,
    key: Array,
    tx: optax.GradientTransformation,
    steps: int | Duration,
    evaluate: Callable[[Any], Any] | None = None,
    **options: Unpack[Told],
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
      batches: tuples of the other arguments, taken in turn, or a function from the
        step to one. Batches of equal shapes share one compiled step.
      key: PRNG key, consumed.
      tx: optax optimiser of what is learned.
      steps: updates, or a `Duration`.
      evaluate: called with parameters under hard plans, returns a number, lower is
        better; None for the mean of `loss_fn` over all batches.
      **options: further ones.
        every (10): updates between two evaluations; start and end are evaluated too.
        looks (None): evaluations in the whole run in place of that, evenly; entries of
        the history between them have no "value".
        ties (None): path -> path of the leaf whose updates it shares, see `tied`.
        progress (None): called with every entry of the history but the first, after a
        checkpoint that is due.
        tracker (None): called as tracker(step, row) with every row, see `learn`.
        before (None): (training, moment) -> training before every update, see `Run`.
        checkpoints (None): folder for checkpoints, or an `io.checkpoints.Checkpoints`,
        which has the next three itself. They hold what is learned, the optimiser, the
        best states, keys and history, not the frozen weights.
        save_every (100): updates between two of them; the end is saved as well.
        keep_last (2): how many to keep.
        resume (False): True continues the newest checkpoint, "auto" begins where there
        is none, "older" passes over damaged ones.
        config (None): plain values that explain the run, such as the rate of `tx`; a
        resumed run must give the same, and the same weights, states, loss and key.

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
    parts = (method, states, loss_fn, params, uses, batches)
    run = learn(*parts, key=key, tx=tx, steps=steps, evaluate=evaluate, **options)
    progress = options.get("progress")
    try:
        for row in run:
            if progress is not None and row["step"]:
                progress(run.entry(row))
    except NotFinite as error:
        best = min(run.history, key=lambda entry: entry.get("value", np.inf))
        raise Stopped(
            f"fit: {error}. The error holds the best states so far, of step "
            f"{best['step']}",
            run.states,
            run.history,
        ) from None
    return run.states, run.history


def learn(
    method: LearnedMethod,
    states: Mapping[str, State],
    loss_fn: Callable[..., Any],
    params: Any,
    uses: Uses,
    batches: Batches,
    *,
    key: Array,
    tx: optax.GradientTransformation,
    steps: int | Duration,
    evaluate: Callable[[Any], Any] | None = None,
    **options: Unpack[Told],
) -> "Learn":
    """`fit` row by row: iterate over what it returns.

    Args:
      method: learned, with weights that stay.
      states: from `solve`.
      loss_fn: called as loss_fn(params, *batch), lower is better.
      params: the dense parameters.
      uses: from `discover`.
      batches: tuples in turn, or a function from the step to one.
      key: PRNG key, consumed.
      tx: optax optimiser of what is learned.
      steps: updates, or a `Duration`.
      evaluate: parameters under hard plans -> number, lower is better.
      **options: those of `fit`; `progress` is not called.

    Returns:
      A `Run` whose rows have "value" where the hard masks were evaluated. Its `states`
      are the best so far, `history` what `fit` returns.

    Raises:
      ValueError: see `fit`.
      NotFinite: while iterating.
    """
    arguments.options(options, Told.__annotations__ | Saves.__annotations__, "fit")
    _check(method, states, loss_fn, uses, tx, evaluate)
    arguments.key(key)
    duration = steps if isinstance(steps, Duration) else None
    if duration is None:
        arguments.count(steps, "fit: steps", 0)
    ties = _ties(options.pop("ties", None), states)
    tx = tied(tx, ties) if ties else tx
    batch_at, count = _batch_at(batches)
    if evaluate is None and count is None:
        raise ValueError(
            "fit: batches is a function, so there is no set of them to evaluate on: "
            "give evaluate="
        )
    every = options.pop("every", 10)
    arguments.count(every, "fit: every", 1)
    places = saves("fit", options)
    config = {
        "steps": steps,
        "every": every,
        "batches": count if places is None else _identity(batches, count),
        "loss": None if places is None else _program(loss_fn, params, batches, count),
        "ties": ties,
        "start": None if places is None else fingerprint.digest((params, states)),
        "method": method,
        "key": fingerprint.key_words(key),
        "run": options.pop("config", None),
    }
    sharding.check_sharding(params, uses, method)
    start = init_training(method, params, uses, states, None, key=key, mask_tx=tx)
    where = sharding.places(start)
    step = make_step(method, loss_fn, None, uses, mask_tx=tx, shardings=where)
    task = _Task(method, uses, sharding.gather(params), start.states)
    value, looks = task.value(loss_fn, evaluate, batches), options.pop("looks", None)
    options.pop("progress", None)
    return Learn(
        task,
        start,
        [Phase(step, 1 if duration else steps)],  # type: ignore[arg-type]
        batch_at,
        duration,
        judge=Judge(task.hard, value, looks),
        saves=places,
        config=config,
        every=every,
        **options,  # pyright: ignore[reportCallIssue]
    )


def _check(
    method: Any, states: Any, loss_fn: Any, uses: Any, tx: Any, evaluate: Any
) -> None:
    """Raises ValueError for arguments of another kind."""
    check_method(method)
    if not isinstance(method, LearnedMethod) or not method.frozen_weights:
        raise ValueError(
            f"fit: {type(method).__name__} does not learn with frozen weights; train "
            "it with gradual or make_step, or apply its plans"
        )
    arguments.optimiser(tx, "tx")
    arguments.function(loss_fn, "loss_fn", LOSS)
    if evaluate is not None:
        arguments.function(evaluate, "evaluate", "evaluate(params)")
    arguments.found(uses)
    arguments.by_path(states, State, "states", "solve()", uses.leaves)
    if not states:
        raise ValueError("fit: states is empty; solve at least one leaf")


def _ties(ties: Any, states: Mapping[str, State]) -> dict[str, str]:
    """Path -> path of the leader, checked.

    Raises:
      ValueError: no mapping, or one of unknown or different leaves.
    """
    if ties is not None and not isinstance(ties, Mapping):
        raise ValueError(
            f"fit: ties is {arguments.shown(ties)}: need {{path: path of its leader}}"
        )
    if ties:
        check_ties(states, ties)
    return dict(ties or {})


class Learn(Run):
    """A run of `learn`, with its results."""

    def __init__(self, task: "_Task", *run: Any, **options: Any):
        """Keeps what the results need."""
        super().__init__(*run, **options)
        self._names = task.names

    @property
    def states(self) -> dict[str, State]:
        """The hardened states with the best evaluation so far."""
        self.now()
        assert self.best is not None  # a run of `learn` has a judge
        return self.best

    @property
    def history(self) -> History:
        """The entries so far."""
        return [self.entry(row) for row in self.rows]

    def entry(self, row: Row) -> dict[str, float]:
        """A row as an entry of the history."""
        figures = {"step": row["step"], "loss": row.get("loss", float("nan"))}
        if "value" in row:
            figures["value"] = row["value"]
        return figures | {name: row.get(name, float("nan")) for name in self._names}


@dataclasses.dataclass
class _Task:
    """What is learned.

    Attributes:
      method: the method.
      uses: what it prunes.
      params: the frozen parameters, whole on every device.
      states: those of the start.
    """

    method: LearnedMethod
    uses: Uses
    params: Any
    states: Mapping[str, State]

    def __post_init__(self):
        """Names the figures of the method."""
        with apply.states_of(self.method):
            figures = jax.eval_shape(
                lambda states: model_gates.metrics(self.method, states, self.uses),
                self.states,
            )
        self.names = sorted(figures)

    def hard(self, training: Training) -> dict[str, State]:
        """The states with every choice made."""
        states = sharding.gather(training.states)
        with apply.states_of(self.method):
            return model_gates.harden(self.method, states, self.params, self.uses)

    def value(
        self,
        loss_fn: Callable[..., Any],
        evaluate: Callable[[Any], Any] | None,
        batches: Any,
    ) -> Callable[[dict[str, State]], float]:
        """Hardened states -> number, lower is better."""

        @jax.jit
        def densified(states, params):
            plans = apply.decide(self.method, states, params, self.uses)
            return apply.densify(plans, params, self.uses)

        @jax.jit
        def value_of(params, *batch):
            return loss_of(loss_fn, params, batch)[0]

        def value(states: dict[str, State]) -> float:
            sparse = densified(states, self.params)
            if evaluate is None:
                return float(np.mean([value_of(sparse, *batch) for batch in batches]))
            figure = evaluate(sparse)
            if np.shape(figure) != () or figure is None:
                raise ValueError(
                    f"fit: evaluate returned {arguments.shown(figure)}: need one number"
                )
            return float(figure)

        return value


def _identity(batches: Any, count: int | None) -> Any:
    """What tells batches from others; of a sequence that loads them the first."""
    if count is None:
        return None
    held = isinstance(batches, list | tuple)
    return count, fingerprint.digest(batches if held else batches[0])


@promotion.usual()
def _program(
    loss_fn: Callable[..., Any], params: Any, batches: Any, count: int | None
) -> str | None:
    """What tells a loss from others, on the first batch where they are no function."""
    if count is None:
        return None

    def traced(params: Any, *batch: Any) -> Any:
        return loss_of(loss_fn, params, batch)

    return programs.digest_of(traced, params, *batches[0])


def _batch_at(batches: Any) -> tuple[Callable[[int], Any], int | None]:
    """The batch of a step, and how many there are.

    Raises:
      ValueError: neither a function nor a list whose first batch is a tuple. The others
        are looked at when it is their turn: a sequence may load them.
    """
    if callable(batches):
        return batches, None
    listed = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
    if not listed or hasattr(batches, "shape") or isinstance(batches, Mapping | str):
        raise ValueError(
            f"fit: batches is {arguments.shown(batches)}: need a list of tuples, the "
            "arguments after params, such as [(x,)]; it is gone through several times"
        )
    if not len(batches):
        raise ValueError("fit: batches is empty; give at least one")
    arguments.batch(batches[0], "fit: batches[0]")
    return lambda step: batches[step % len(batches)], len(batches)
