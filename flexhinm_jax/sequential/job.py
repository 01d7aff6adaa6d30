"""What `prune_sequential` has to do, checked before it begins, and the plans so far."""

import contextlib
import copy
import dataclasses
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from flexhinm_jax import atomic
from flexhinm_jax.io import fingerprint, programs
from flexhinm_jax.pruning.apply import dense_weight
from flexhinm_jax.pruning.solve import method_for, target_for
from flexhinm_jax.pruning.statistics import blank
from flexhinm_jax.sequential.finished import Finished
from flexhinm_jax.sequential.request import Request
from flexhinm_jax.tracing import meshes
from flexhinm_jax.tracing.discover import Traced
from flexhinm_jax.tracing.program import is_array
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.tracing.views import leaf as to_leaf
from flexhinm_jax.tracing.views import matrix
from flexhinm_jax.types import Plan, Uses


class Job:
    """What to prune with what, and the plans so far.

    Attributes:
      leaves: path -> array of the dense model; where no dense model runs beside, the
        pruned one takes the place of what is solved.
      current: path -> array now, pruned as far as the walk has come.
      plans: path -> {at: plan on the host}.
      supports: path -> where a leaf that came pruned may be other than zero.
      finished: plans on disk, or None.
    """

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        params: Any,
        batches: list[tuple],
        uses: Uses,
        request: Request,
        token_mask: Callable[..., Array] | None = None,
    ):
        """Checks every leaf before anything is computed.

        Args:
          apply_fn: as in `prune_sequential`.
          params: its parameters, dense; the leaves may be abstract.
          batches: tuples of the other arguments.
          uses: what to prune.
          request: what to prune with, and how; where a dense model runs beside the
            pruned one, dense weights are kept after they were solved.
          token_mask: as in `prune_sequential`.
        """
        self.apply_fn, self.batches = apply_fn, batches
        self.structure = jax.tree.structure(params)
        self.uses, self.request = uses, request
        self.key, self.token_mask = request.key, token_mask
        values = jax.tree.map(on_device, params)
        known = Leaves.of(values).dense(uses)
        self.paths, self.leaves, self.current = list(known), dict(known), dict(known)
        self.plans: dict[str, dict[tuple, Plan]] = defaultdict(dict)
        self.supports: dict[str, Array] = {}
        self.finished: Finished | None = None
        self.bias = {path: name for path, (name, _) in uses.biases.items()}
        self.methods, self.targets = {}, {}
        for path, use in uses.leaves.items():
            own = method_for(request.method, use)
            self.targets[path] = target = target_for(own, use, request.sparsity)
            if np.shape(target):
                raise ValueError(
                    f"{path}: sparsity of shape {np.shape(target)}; give one number, "
                    "or {leaf path: number}"
                )
            shape, dtype = use.layout.matrix_shape, self.leaves[path].dtype
            own.pattern.check(shape, target, path)
            own = own.centered(request.center, has_bias=path in self.bias)
            w: Any = jax.ShapeDtypeStruct(shape, dtype)
            own.check(w, blank(shape[1]), target, path)
            self.methods[path] = own

    def tree(self, leaves: Mapping[str, Any]) -> Any:
        """The tree of parameters with these leaves."""
        return jax.tree.unflatten(self.structure, [leaves[p] for p in self.paths])

    def arrays(self, leaves: Mapping[str, Any]) -> list[Any]:
        """The array leaves in order."""
        return [leaves[p] for p in self.paths if is_array(leaves[p])]

    def released(self) -> "Job":
        """The same job with weights under automatic axes, for solving."""
        free = copy.copy(self)
        free.leaves, free.key = meshes.released((self.leaves, self.key))
        return free

    def weight(self, path: str, at: tuple) -> Array:
        """The dense matrices of a leaf, [*rest of the stack, o, i]."""
        return matrix(self.leaves[path], self.uses.leaves[path].layout)[select(at)]

    def like(self, path: str, at: tuple) -> jax.ShapeDtypeStruct:
        """Shape and dtype of `weight`."""
        layout = self.uses.leaves[path].layout
        rest = [f.size for f, i in zip(layout.stack, at, strict=True) if i is None]
        shape = *rest, *layout.matrix_shape
        return jax.ShapeDtypeStruct(shape, self.leaves[path].dtype)

    def apply(self, path: str, at: tuple, plan: Plan) -> None:
        """Takes a plan over: the walk goes on with it."""
        layout = self.uses.leaves[path].layout
        self.plans[path][at] = plan
        old, new = self.current[path], dense_weight(plan)
        if all(i is None for i in at):
            leaf = to_leaf(new, layout)
        else:
            before = matrix(meshes.released(old), layout)
            leaf = to_leaf(before.at[select(at)].set(new), layout)
        self.current[path] = meshes.placed(leaf, old)
        if not self.request.beside:
            self.leaves[path] = self.current[path]
        if plan.bias is not None:
            name, factor = self.uses.biases[path]
            bias = self.current[name]
            old = meshes.released(bias)
            shape = (*layout.stack_shape, layout.matrix_shape[0])
            shift = (plan.bias / factor).astype(old.dtype)
            new = old.reshape(shape).at[select(at)].add(shift)
            self.current[name] = meshes.placed(new.reshape(old.shape), bias)

    def replace(self, path: str, leaf: Any) -> None:
        """Lets the walk go on with another leaf."""
        self.current[path] = meshes.placed(leaf, self.current[path])
        if not self.request.beside:
            self.leaves[path] = self.current[path]

    def retrained(self, path: str, at: tuple) -> None:
        """Takes the weights of the leaf as it is now into a plan."""
        plan = self.plans[path][at]
        now = matrix(self.current[path], self.uses.leaves[path].layout)[select(at)]
        self.plans[path][at] = dataclasses.replace(
            plan, weight=meshes.host(now), bias=None
        )

    def keep(self, path: str) -> Any:
        """Where a leaf may be other than zero; None for everywhere."""
        if path not in self.plans:
            return self.supports.get(path)
        layout = self.uses.leaves[path].layout
        keep = np.ones((*layout.stack_shape, *layout.matrix_shape), bool)
        for at, plan in self.plans[path].items():
            if plan.left is not None or plan.right is not None:
                raise ValueError(
                    f"{path}: its plan has block-diagonal factors, so only the core has"
                    " zeros to keep, not the matrix; reconstruct is for methods"
                    " without factors"
                )
            keep[select(at)] = plan.support.keep
        return to_leaf(jnp.asarray(keep), layout)

    def complete(self, path: str) -> bool:
        """Whether every matrix of a leaf has its plan."""
        stack = self.uses.leaves[path].layout.stack_shape
        pieces = [
            math.prod(n for n, i in zip(stack, at, strict=True) if i is None)
            for at in self.plans[path]
        ]
        return sum(pieces) == math.prod(stack)

    def assembled(self, path: str) -> Plan:
        """The plan of a leaf, its pieces put back into the stack."""
        pieces = self.plans[path]
        stack, keys = self.uses.leaves[path].layout.stack_shape, tuple(pieces)

        def join(*arrays: Any) -> Array:
            if len(keys) == 1 and all(i is None for i in keys[0]):
                return jnp.asarray(arrays[0])
            rest = sum(i is None for i in keys[0])
            whole = np.zeros((*stack, *arrays[0].shape[rest:]), arrays[0].dtype)
            for at, x in zip(keys, arrays, strict=True):
                whole[select(at)] = x
            return jnp.asarray(whole)

        return jax.tree.map(join, *pieces.values())


def on_device(x: Any) -> Any:
    """An array on the device; anything else, abstract arrays too, as it is."""
    concrete = is_array(x) and not isinstance(x, jax.ShapeDtypeStruct)
    return jnp.asarray(x) if concrete else x


def select(at: tuple[int | None, ...]) -> tuple:
    """An index into the stack axes."""
    return tuple(slice(None) if i is None else i for i in at)


@contextlib.contextmanager
def keeping(
    job: Job, folder: str | os.PathLike[str] | None, **more: Any
) -> Iterator[None]:
    """Keeps what a job has finished in a folder, which is locked while the block runs.

    Args:
      job: what to do.
      folder: of this run or an equal one; None keeps nothing.
      **more: trees that decide about the result besides the job.

    Yields:
      Nothing.

    Raises:
      InUse: another process writes the folder.
      ValueError: the folder is of a run with another configuration.
    """
    if folder is None:
        yield
        return
    alone = jax.process_count() == 1
    with atomic.locked(folder) if alone else contextlib.nullcontext():
        others = {name: fingerprint.digest(tree) for name, tree in more.items()}
        job.finished = Finished(folder, record(job) | others)
        yield


def record(job: Job) -> dict[str, str]:
    """Everything that decides about the result, as text."""
    masks = None
    if job.token_mask is not None:
        masks = [np.asarray(job.token_mask(*batch)) for batch in job.batches]
    return fingerprint.record(
        method=job.request.method,
        sparsity=job.request.sparsity,
        target=job.request.target,
        center=job.request.center,
        statistics=job.request.statistics,
        block=job.request.block,
        reconstruct=repr(job.request.reconstruct),
        key=str(fingerprint.key_words(job.key)),
        params=job.tree(job.leaves),
        batches=job.batches,
        token_mask=masks,
        leaves=fingerprint.digest([repr(use) for use in job.uses]),
        program=" ".join(_programs(job)),
    )


def _programs(job: Job) -> list[str]:
    """What the function of a job computes, for every form of its batches."""
    traced = Traced.of(job.apply_fn)
    leaves = Leaves.of(job.tree(job.leaves)).dense(job.uses)
    found = {id(p): p for p in (traced.program(leaves, b) for b in job.batches)}
    return [programs.digest(program.jaxpr) for program in found.values()]
