"""What must hold for every program of the grammar."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from flexhinm_jax.pruning import solve, statistics
from tests.fuzz.evaluate import evaluated
from tests.fuzz.grammar import Leaf, Program

METHOD = fh.Wanda(fh.NM(2, 4))


def check(program: Program, seed: int, compiled: bool = False) -> None:
    """Raises AssertionError, with the steps of the program, where a promise breaks.

    Args:
      program: from the grammar.
      seed: of its keys.
      compiled: compile what is traced with XLA; else it is run in NumPy.
    """
    text = f"seed {seed}: {program.text}" + (
        " masked" if program.mask is not None else ""
    )
    args = (program.x,) if program.mask is None else (program.x, program.mask)
    token_mask = None if program.mask is None else (lambda x, m: m)
    truth = program.truth()
    uses = fh.discover(program.apply, program.params, *args, rules=program.rules)
    for name, leaf in truth.leaves.items():
        pruned, reason = name in uses.leaves, uses.skipped.get(name)
        assert pruned != (reason is not None), f"{text}: {name} in both or in neither"
        assert pruned or (reason or "").strip(), (
            f"{text}: {name} is skipped without a reason"
        )
        right = leaf.expected == "either" or pruned == (leaf.expected == "pruned")
        assert right, f"{text}: {name} should be {leaf.expected}; {reason}"
    if not len(uses):
        return
    with batches_added(jax.jit if compiled else evaluated):
        stats = fh.calibrate(
            program.apply, program.params, uses, [args], token_mask=token_mask
        )
    for name in uses.leaves:
        compare_statistics(stats[name], truth.leaves[name], f"{text}: {name}")
    # A stack of its own for every leaf: programs share what is compiled for them.
    with mock.patch.object(solve, "MAX_STACK_WEIGHTS", 0 if not compiled else 1 << 24):
        states = fh.solve(METHOD, jax.random.key(seed), program.params, uses, stats)
        plans = fh.decide(METHOD, states, program.params, uses)
    dense = jax.tree.map(np.asarray, fh.densify(plans, program.params, uses))
    packed = fh.pack(plans, program.params, uses)
    for name in program.params:
        leaf, before = truth.leaves[name], program.params[name]
        if name in uses.leaves:
            compare_plan(dense[name], before, leaf, f"{text}: {name}")
        else:
            assert np.array_equal(dense[name], before), f"{text}: {name} changed"
    run = jax.jit if compiled else evaluated
    compare_products(program, dense, packed, args, text, run)


@contextmanager
def batches_added(run: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside, `calibrate` adds a batch to the sums with `run` in the place of a jit."""
    make_step = statistics.make_step

    def make(*args: Any) -> Callable:
        add = make_step(*args).__wrapped__
        return lambda sums, arrays, skeleton, found: run(
            lambda sums, arrays: add(sums, arrays, skeleton, found)
        )(sums, arrays)

    with mock.patch.object(statistics, "make_step", make):
        yield


def compare_statistics(stats: Any, leaf: Leaf, text: str) -> None:
    """The sums are those of the inputs that the weight really multiplied."""
    np.testing.assert_allclose(stats.count, leaf.count, err_msg=f"{text} count")
    scale = np.abs(leaf.gram).max() + 1e-6
    np.testing.assert_allclose(
        np.asarray(stats.gram) / scale,
        leaf.gram / scale,
        atol=3e-3,
        err_msg=f"{text} gram",
    )
    mean = leaf.total / np.maximum(leaf.count, 1)[..., None]
    np.testing.assert_allclose(stats.mean, mean, atol=5e-3, err_msg=f"{text} mean")


def compare_plan(after: Any, before: Any, leaf: Leaf, text: str) -> None:
    """Two of every four inputs stay: those that Wanda's formula names."""
    w, kept = leaf.matrix(before), leaf.matrix(after) != 0
    untouched = (np.asarray(after) != 0) | (np.asarray(before) == after)
    inside = leaf.matrix(np.ones(leaf.shape)).size
    assert kept.sum() * 2 == kept.size, f"{text}: kept {kept.sum()} of {kept.size}"
    assert (~untouched).sum() == inside // 2, f"{text}: zeros outside of the matrix"
    norms = np.sqrt(np.diagonal(leaf.gram, axis1=-2, axis2=-1))
    unseen = ~(norms.sum(-1) > 0)
    norms = np.where(unseen[..., None], 1.0, norms)
    scores = (np.abs(w) * norms[..., None, :]).reshape(*w.shape[:-1], -1, 4)
    ranks = np.sort(scores, -1)
    clear = ranks[..., 2] - ranks[..., 1] > 1e-2 * ranks[..., 3] + 1e-6
    best = scores >= ranks[..., 2:3]
    same = (best == kept.reshape(best.shape)).all(-1)
    assert (same | ~clear).all(), f"{text}: other weights kept than the scores name"


def compare_products(
    program: Program,
    dense: Any,
    packed: Any,
    args: tuple,
    text: str,
    run: Callable[[Callable], Callable],
) -> None:
    """Packed = densified, in value and in every gradient."""
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(program.x.shape).astype(np.float32)
    loose: Any = {"atol": 2e-2 if "cast" in text else 2e-4, "rtol": 1e-2}
    sparse = fh.sparsify(program.apply)
    if not program.reversible:
        got, want = run(sparse)(packed, *args), run(program.apply)(dense, *args)
        np.testing.assert_allclose(got, want, err_msg=f"{text}: values", **loose)
        return

    def gradients(apply: Callable, params: Any) -> Any:
        values, fill = floating(params)

        def loss(values: list, x: Any, *rest: Any) -> Any:
            y = apply(fill(values), x, *rest)
            return jnp.sum(y * direction), y

        both = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, y), (by_values, by_x) = run(both)(values, *args)
        return y, by_x, fill(by_values)

    want, to_x, by_dense = gradients(program.apply, dense)
    got, at_x, by_packed = gradients(sparse, packed)
    np.testing.assert_allclose(got, want, err_msg=f"{text}: values", **loose)
    np.testing.assert_allclose(at_x, to_x, err_msg=f"{text}: gradient of x", **loose)
    for name, leaf in packed.items():
        one, other = by_packed[name], by_dense[name]
        if isinstance(leaf, fh.PackedWeight):
            one = matrices(one)
            other = program.leaves[name].matrix(np.asarray(other))
            other = np.where(matrices(leaf) != 0, other, 0)
        np.testing.assert_allclose(
            one, other, err_msg=f"{text}: gradient of {name}", **loose
        )


def floating(tree: Any) -> tuple[list, Callable[[list], Any]]:
    """The floating arrays of a tree, and what puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    at = [k for k, x in enumerate(leaves) if np.issubdtype(x.dtype, np.floating)]

    def fill(values: list) -> Any:
        return structure.unflatten(
            (dict(enumerate(leaves)) | dict(zip(at, values, strict=True))).values()
        )

    return [leaves[k] for k in at], fill


def matrices(leaf: Any) -> np.ndarray:
    """[*stack, o, i] of a packed leaf."""
    run = fh.kernels.unpack
    for _ in range(leaf.out_order.ndim - 1):
        run = jax.vmap(run)
    return np.asarray(run(leaf))


def silent() -> None:
    """Keeps warnings about unseen weights out of the output."""
    logging.getLogger("flexhinm_jax").setLevel(logging.ERROR)
