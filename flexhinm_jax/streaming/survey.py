"""What budgets across blocks are decided by: one pass of the dense model.

Block by block, like the pruning itself and with the same programs, so it needs no more
memory: all batches run to the end of a block, the norms of the inputs of its weights
are taken on the way, and nothing is solved. The budgets are those that `budgets` gives
for the whole model.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from flexhinm_jax import arguments, checks
from flexhinm_jax.io import records
from flexhinm_jax.io.shelf import Shelf
from flexhinm_jax.pruning import allocate, gains
from flexhinm_jax.pruning.owl import OWL, outlier_shares
from flexhinm_jax.sequential.cuts import Walk
from flexhinm_jax.sequential.solver import Solved
from flexhinm_jax.streaming.states import States
from flexhinm_jax.streaming.work import Setting, Work
from flexhinm_jax.types import Stats


@dataclasses.dataclass(frozen=True)
class Surveyed:
    """One block of the dense model has been looked at.

    Attributes:
      layer: which, from 0.
      total: blocks in all.
      seconds: wall time.
    """

    layer: int
    total: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Allocated:
    """Every matrix has its sparsity.

    Attributes:
      sparsity: key -> fraction of weights to remove.
    """

    sparsity: dict[str, float]


def first_targets(setting: Setting) -> float | Mapping[str, float] | None:
    """Sparsities to check and plan with: right unless a survey decides them.

    Raises:
      ValueError: a target out of reach, or that cannot be allocated.
    """
    sparsity, method = setting.request.sparsity, setting.request.method
    if setting.spread.mode == "uniform" and not setting.spread.exceptions:
        return sparsity
    if sparsity is None or isinstance(sparsity, Mapping):
        raise ValueError(
            f"{arguments.say('allocate')} and {arguments.say('exceptions')} need one"
            " sparsity, the fraction of all pruned weights removed; got"
            f" {arguments.say('sparsity', sparsity)}"
        )
    layers = {
        path: layer
        for n in range(setting.blocks.count)
        for path, layer in gains.plain(method, setting.uses.of(n)).items()
    }
    if not layers:
        return sparsity  # refused with a better message later
    if setting.spread.mode != "uniform":
        allocate.check_free(method, layers)
    rules = setting.spread.exceptions
    return allocate.allocate("uniform", layers, sparsity, exceptions=rules)


def survey(
    setting: Setting,
    work: Work,
    shelf: int | None,
    tell: Callable[[Surveyed], None],
) -> dict[str, float]:
    """The sparsity of every matrix, from a pass of the dense model or from an earlier.

    Args:
      setting: what to do; its spread is not "uniform".
      work: where hidden states go that do not fit, and where the result is kept.
      shelf: bytes of hidden states in memory; None for all.
      tell: called after every block.
    """
    if setting.share.agreed(work.budgets.exists()):
        return records.read(work.budgets)
    mode, total = setting.spread.mode, setting.blocks.count
    method, sparsity = setting.request.method, setting.request.sparsity
    owl = OWL() if mode == "owl" else mode
    seq = dataclasses.replace(
        setting.request, target="seq", statistics="sequential", reconstruct=None
    )
    dense = dataclasses.replace(setting, request=seq)
    numbers = setting.share.numbers
    states = States(work.folder / "survey", shelf, numbers, durable=False)
    states.begin(setting.blocks.embedded(setting.own))
    layers: dict[str, gains.Increments] = {}
    shares: dict[str, float] = {}
    for layer in range(total):
        started = time.perf_counter()
        hidden, _ = states.take()
        job = dense.job(layer, setting.blocks.load(layer), hidden)
        walk = Look(
            job,
            Shelf(shelf, work.folder),
            programs=setting.programs,
            share=setting.share,
            to_end=True,
        )
        job.batches.clear()
        del hidden
        walk.run(None)
        states.next(layer + 1, walk.outputs(), False)
        states.forget(layer)
        if isinstance(owl, OWL):
            layers |= gains.plain(method, job.uses)
            shares |= outlier_shares(owl, job.leaves, job.uses, walk.norms)
        else:
            layers |= gains.offered(method, job.leaves, job.uses, walk.norms)
        tell(Surveyed(layer, total, time.perf_counter() - started))
    states.forget(total)
    assert isinstance(sparsity, float | int)
    budgets = allocate.allocate(
        mode,
        layers,
        sparsity,
        exceptions=setting.spread.exceptions,
        outliers=shares,
    )
    if setting.share.writes:
        records.write(work.budgets, budgets)
    return budgets


class Look(Walk):
    """A walk of the dense model that solves nothing.

    Attributes:
      norms: path -> statistics of the inputs, without Gram matrices.
    """

    def __init__(self, *args: Any, **options: Any):
        """See `Walk`."""
        super().__init__(*args, **options)
        self.norms: dict[str, Stats] = {}

    def members(self, k: int) -> dict[tuple, Solved]:
        """Takes the norms at cut `k`."""
        sums = self.sums(k)
        squares = jnp.diagonal(sums["gram"], axis1=-2, axis2=-1)
        checks.finite(squares, "norms of its inputs", self.cuts[k].members[0].path)
        norms = Stats(
            sq_norm=squares,
            mean=sums["total"] / jnp.maximum(sums["count"], 1.0)[..., None],
            count=jnp.broadcast_to(sums["count"], sums["total"].shape[:-1]),
        )
        del sums
        self.shelf.trim()
        self.norms |= {m.path: norms for m in self.cuts[k].members}
        return {}
