"""Where PATCH starts on a model: tiles by what the loss says, patterns around them.

Shares of layer errors say which tiles of a weight matter; they do not say which weights
matter to the model. So every tile is opened half way, between n:m and dense, and the
gradient of the loss by the gates, summed over a weight, is what the weight gains. A
choice per tile by this gradient is worse: tiles of one row share an error that they
cancel together, so what is best for one alone is not best for all.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import flexhinm_jax as fh
from flexhinm_jax.training import model_gates
from flexhinm_jax.types import State
from train.lab.masks.learner import started_at
from train.lab.masks.problems import Problem

#: Steps whose batches the gains are a mean of.
STEPS = 6


def dealt(
    method: fh.Patch,
    states: Mapping[str, State],
    keeps: Mapping[str, Any],
    problem: Problem,
    *,
    key: jax.Array,
    steps: int = STEPS,
) -> dict[str, State]:
    """States whose dense tiles are dealt by gains, and whose patterns fit to them.

    Args:
      method: with `tile_prior` "shares" and a global target.
      states: from `started_at`.
      keeps: path -> bool[*stack, o, i], the n:m masks that they started from.
      problem: the model; its statistics have Grams.
      key: consumed.
      steps: batches for the gains.

    Returns:
      Path -> state. The patterns outside the dense tiles are those of `RefineMask`,
      except in stacked leaves, which keep those of `keeps`.
    """
    half_key, refine_key = jax.random.split(key)
    found = gains(method, states, problem, key=half_key, steps=steps)
    unit, tiny = method.tile_start / method.tile_scale[0], jnp.float32(1e-12)
    logits = {}
    for path, state in states.items():
        share = jnp.exp(state.learned["tiles"] / unit)
        total = jnp.maximum(jnp.sum(share, axis=(-2, -1), keepdims=True), tiny)
        gain = jnp.log(jnp.maximum(found[path][..., None, None], tiny))
        logits[path] = unit * (jnp.log(jnp.maximum(share / total, tiny)) + gain)
    settled = method.settle(_with_tiles(states, logits))
    total = sum(int(jnp.sum(s.fixed["dense_tiles"])) for s in settled.values())
    ranked = jnp.sort(jnp.concatenate([x.reshape(-1) for x in logits.values()]))[::-1]
    edge = jnp.mean(ranked[max(total - 1, 0) : total + 1])
    logits = {path: x - edge for path, x in logits.items()}
    settled = _with_tiles(settled, logits)
    inner = _refined(method, settled, keeps, problem, refine_key)
    return started_at(method, settled, inner)


def gains(
    method: fh.Patch,
    states: Mapping[str, State],
    problem: Problem,
    *,
    key: jax.Array,
    steps: int = STEPS,
) -> dict[str, jax.Array]:
    """What the loss gains by making each weight denser, with every tile half open.

    Returns:
      Path -> f32[*stack], minus the derivative of the loss by one gate for the weight.
    """
    even = dataclasses.replace(
        method,
        mode="tile",
        relaxation="expected",
        density_weight=0.0,
        reward=0.0,
        tile_temperature=(1.0, 1.0),
        tile_scale=(4.0, 4.0),  # the slope of a gate at one half is 1
    )
    zeros = {path: jnp.zeros_like(s.learned["tiles"]) for path, s in states.items()}
    half = {path: State({"tiles": zeros[path]}, s.fixed) for path, s in states.items()}
    uses = problem.uses
    half = model_gates.anneal(even, half, uses, 0.0)

    @jax.jit
    def gradient(tiles: Any, states: Any, params: Any, batch: tuple) -> Any:
        def lost(tiles: Any) -> Any:
            now = _with_tiles(states, tiles)
            sparse, _ = model_gates.sample(even, now, params, uses, key)
            return problem.loss_fn(sparse, *batch)[0]

        grads = jax.grad(lost)(tiles)
        return {path: jnp.sum(g, axis=(-2, -1)) for path, g in grads.items()}

    batches = map(problem.batch_at, range(steps))
    grads = [gradient(zeros, half, problem.params, batch) for batch in batches]
    return jax.tree.map(lambda *x: -sum(x) / jnp.float32(steps), *grads)


def _refined(method, states, keeps, problem, key) -> dict[str, Any]:
    """The n:m masks after a descent in which the dense tiles take part."""
    refine = fh.RefineMask(method.scores.with_pattern(method.pattern), weights="dense")
    params, uses = problem.params, problem.uses
    most, targets = 1 - method.tiles.n / method.tiles.m, {}
    for path, use in uses.leaves.items():
        count, size = states[path].fixed["dense_tiles"], states[path].learned["tiles"]
        if not use.layout.stack and 0 < int(count) < size.size:
            targets[path] = most * (1 - int(count) / size.size)
    if not targets:
        return dict(keeps)
    some = tuple(use for use in uses.prunable if use.path in targets)
    part = dataclasses.replace(uses, prunable=some)
    solved = fh.solve(refine, key, params, part, problem.stats, targets)
    new = dict(keeps)
    for path, plan in fh.decide(refine, solved, params, part).items():
        dense = method.tiles.tiles(plan.support.keep).all(-1)
        dense = method.tiles.spread(dense)
        new[path] = jnp.where(dense, jnp.asarray(keeps[path]), plan.support.keep)
    return new


def _with_tiles(states: Mapping[str, State], tiles: Mapping[str, Any]) -> dict:
    return {
        path: dataclasses.replace(s, learned=s.learned | {"tiles": tiles[path]})
        for path, s in states.items()
    }
