"""Prunes a whole function in one pass, every layer on what the pruned ones before give.

The program is cut where weights meet inputs (`straight`), and all calibration batches
walk from cut to cut (`segments`). At a cut the Gram matrix of the input is taken, the
matrices that read it are solved, and the walk goes on with the pruned weights. Only one
cut's Gram matrices exist at a time.

What a pruned matrix is fitted to is the `target`:

- "seq": the dense matrix on the inputs of the pruned model, W x (SparseGPT's pipeline).
- "asym": the output of the dense model, W x_dense: errors of earlier layers are
  repaired. The dense values run beside the pruned ones.
- "resid": as "asym"; and where the result is added to a stream that earlier pruning has
  changed, the target also contains what the stream lacks, x_dense - x_pruned.

The last two fit more and need more tokens: on a small sentence encoder they lose to
"seq" at 128 calibration sentences and win from 512 on.
"""

import dataclasses
import functools
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from flexhinm_jax import checks
from flexhinm_jax.methods import Method, Wrapper
from flexhinm_jax.methods.reconstruction import Reconstruction
from flexhinm_jax.transforms import segments, tree
from flexhinm_jax.transforms.calibrate import calibrate
from flexhinm_jax.transforms.discover import discover
from flexhinm_jax.transforms.finished import Finished, digest
from flexhinm_jax.transforms.paths import leaf_paths
from flexhinm_jax.transforms.programs import is_array, split, trace
from flexhinm_jax.transforms.straight import Cut, straighten
from flexhinm_jax.transforms.views import leaf as to_leaf
from flexhinm_jax.transforms.views import matrix
from flexhinm_jax.types import Plan, Stats, Uses

logger = logging.getLogger("flexhinm_jax")

Target = Literal["seq", "asym", "resid"]
TARGETS = ("seq", "asym", "resid")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One matrix is done.

    Attributes:
      path: the leaf.
      at: position per stack axis of the leaf; None where the whole axis was solved.
      error: || X (W' - W) ||^2 / || X W ||^2 on the inputs of the pruned model.
      seconds: wall time since the previous record.
      held: bytes of activations in memory.
      done: matrices done so far.
      total: matrices in all.
      note: why the leaf could not be cut, or "".
    """

    path: str
    at: tuple[int | None, ...]
    error: float
    seconds: float
    held: int
    done: int
    total: int
    note: str = ""


def prune_sequential(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    method: Method,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    key: Array,
    target: Target = "seq",
    center: bool = True,
    rules: Mapping[str, Any] | None = None,
    token_mask: Callable[..., Array] | None = None,
    progress: Callable[[Layer], None] | None = None,
    resume: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
) -> tree.Pruned:
    """Prunes the weights of any JAX function, in order of execution.

    A leaf that cannot be cut out (inside a `while`, a `cond` or a scan over time, or
    used on several inputs) is solved when it is first met, on statistics of a plain run
    of the model as pruned so far, with target "seq"; its record says why.

    Args:
      apply_fn: pure function of (params, *batch).
      params: its parameters, dense.
      batches: tuples of the remaining arguments; a batch that is no tuple is one
        argument. All are kept; few shapes and large batches are fast.
      method: what to prune with, such as `ALPS(NM(2, 4))`.
      sparsity: fraction of weights removed, one for all or one per path; None for a
        pattern that has only one.
      key: PRNG key, consumed; the same keys per leaf as in `prune`.
      target: what to fit to, see above.
      center: for methods that move weights: fits around the means, and refits the bias
        where the product has one of its own.
      rules: {regex: pattern or "skip"} on leaf paths; the first match wins.
      token_mask: called as token_mask(*batch), gives booleans whose shape is a prefix
        of the token axes; tokens with False are left out of the statistics.
      progress: called with a `Layer` for every matrix that is done.
      resume: folder in which finished matrices are kept; a run that finds some there
        goes on behind them, with the same result as an uninterrupted run.
      memory_limit: bytes of activations kept in memory, the rest goes to temporary
        files; None for any.

    Returns:
      Dense-with-zeros parameters, packed parameters, plans, uses and the report.

    Raises:
      ValueError: no batches, an unknown target, a method that needs gradients, a leaf
        that does not fit, statistics that are not finite, batches that use different
        weights, or a folder that belongs to another run.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flexhinm_jax as fh
      >>> apply_fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"a": jax.random.normal(keys[0], (8, 8)),
      ...           "b": jax.random.normal(keys[1], (8, 4))}
      >>> x = jax.random.normal(keys[2], (32, 8))
      >>> result = fh.prune_sequential(apply_fn, params, [x], fh.ALPS(fh.NM(2, 4)),
      ...                              key=jax.random.key(1), target="asym")
      >>> int((result.params["a"] == 0).sum())
      32
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: choose one of {', '.join(TARGETS)}")
    if method.needs == "gradients":
        raise ValueError(
            f"{type(method).__name__} needs gradients, which one pass forward does not "
            "give; use accumulate_gradients and solve"
        )
    given = [b if isinstance(b, tuple) else (b,) for b in batches]
    if not given:
        raise ValueError("batches is empty; calibration needs at least one batch")
    uses = discover(apply_fn, params, *given[0], rules=rules)  # type: ignore[arg-type]
    job = Job(apply_fn, params, given, uses, method, sparsity, key, center, token_mask)
    if resume is not None:
        job.finished = Finished(resume, fingerprint(job, target))
    walk = Walk(job, target, segments.Shelf(memory_limit))
    plans = walk.run(progress)
    return tree.applied(plans, params, uses)


class Job:
    """What to prune with what, and the plans so far.

    Attributes:
      leaves: path -> array of the dense model.
      current: path -> array now, pruned as far as the walk has come.
      plans: path -> {at: plan on the host}.
      finished: plans on disk, or None.
    """

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        params: Any,
        batches: list[tuple],
        uses: Uses,
        method: Method,
        sparsity: Any,
        key: Array,
        center: bool,
        token_mask: Callable[..., Array] | None,
    ):
        """Checks every leaf before anything is computed."""
        self.apply_fn, self.params, self.batches = apply_fn, params, batches
        self.uses, self.method, self.sparsity = uses, method, sparsity
        self.key, self.token_mask = key, token_mask
        values = jax.tree.map(lambda x: jnp.asarray(x) if is_array(x) else x, params)
        self.paths = leaf_paths(params)
        self.leaves = dict(zip(self.paths, jax.tree.leaves(values), strict=True))
        self.current = dict(self.leaves)
        self.plans: dict[str, dict[tuple, Plan]] = defaultdict(dict)
        self.finished: Finished | None = None
        self.bias = own_biases(uses)
        self.center = center
        self.methods, self.targets = {}, {}
        for path, use in uses.leaves.items():
            mine = tree.method_for(method, use)
            self.targets[path] = tree.target_for(mine, use, sparsity)
            shape, dtype = use.layout.matrix_shape, self.leaves[path].dtype
            mine.pattern.check(shape, self.targets[path], path)
            self.methods[path] = centred(mine, center, path in self.bias)
            w = jax.ShapeDtypeStruct(shape, dtype)
            self.methods[path].check(w, blank(shape[1]), self.targets[path], path)

    def tree(self, leaves: Mapping[str, Any]) -> Any:
        """The tree of parameters with these leaves."""
        structure = jax.tree.structure(self.params)
        return jax.tree.unflatten(structure, [leaves[p] for p in self.paths])

    def arrays(self, leaves: Mapping[str, Any]) -> list[Any]:
        """The array leaves in order."""
        return [leaves[p] for p in self.paths if is_array(leaves[p])]

    def weight(self, path: str, at: tuple) -> Array:
        """The dense matrices of a leaf, [*rest of the stack, o, i]."""
        return matrix(self.leaves[path], self.uses.leaves[path].layout)[select(at)]

    def apply(self, path: str, at: tuple, plan: Plan) -> None:
        """Takes a plan over: the walk goes on with it."""
        layout = self.uses.leaves[path].layout
        self.plans[path][at] = plan
        whole = matrix(self.current[path], layout)
        whole = whole.at[select(at)].set(tree.dense_weight(plan))
        self.current[path] = to_leaf(whole, layout)
        if plan.bias is not None:
            name = self.bias[path]
            old = self.current[name]
            shape = (*layout.stack_shape, layout.matrix_shape[0])
            shift = plan.bias.astype(old.dtype)
            new = old.reshape(shape).at[select(at)].add(shift)
            self.current[name] = new.reshape(old.shape)

    def assembled(self) -> dict[str, Plan]:
        """One plan per leaf, its pieces put back into the stack."""
        out = {}
        for path, use in self.uses.leaves.items():
            pieces = self.plans[path]
            stack = use.layout.stack_shape

            def join(*arrays: Any, keys=tuple(pieces), stack=stack) -> Array:  # noqa: B008
                rest = sum(i is None for i in keys[0])
                whole = np.zeros((*stack, *arrays[0].shape[rest:]), arrays[0].dtype)
                for at, x in zip(keys, arrays, strict=True):
                    whole[select(at)] = x
                return jnp.asarray(whole)

            out[path] = jax.tree.map(join, *pieces.values())
        return out


def select(at: tuple[int | None, ...]) -> tuple:
    """An index into the stack axes."""
    return tuple(slice(None) if i is None else i for i in at)


def blank(size: int) -> Stats:
    """Shapes of the statistics that every product gets."""
    made: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return Stats(
        sq_norm=made((size,)),
        mean=made((size,)),
        count=made(()),
        gram=made((size, size)),
    )


def own_biases(uses: Uses) -> dict[str, str]:
    """Leaf -> its bias, where all uses have the same and no other leaf has it."""
    found: dict[str, set[str | None]] = defaultdict(set)
    owners: dict[str | None, set[str]] = defaultdict(set)
    for use in uses:
        found[use.path].add(use.bias)
        owners[use.bias].add(use.path)
    return {
        path: name
        for path, biases in found.items()
        for name in biases
        if name is not None and len(biases) == len(owners[name]) == 1
    }


def centred(method: Method, center: bool, has_bias: bool) -> Method:
    """The method with `center` switched on where a bias can take up the means."""
    if isinstance(method, Wrapper):
        inner = centred(method.inner, center, has_bias)
        method = dataclasses.replace(method, inner=inner)
    if not isinstance(method, Reconstruction):
        return method
    on = (center or method.center) and has_bias
    return dataclasses.replace(method, center=on)


def fingerprint(job: Job, target: str) -> dict[str, str]:
    """Everything that decides about the result, as text."""
    masks = None
    if job.token_mask is not None:
        masks = [np.asarray(job.token_mask(*batch)) for batch in job.batches]
    return {
        "method": repr(job.method),
        "sparsity": repr(job.sparsity),
        "target": target,
        "center": repr(job.center),
        "key": str(np.asarray(jax.random.key_data(job.key)).tolist()),
        "params": digest(job.params),
        "batches": digest(job.batches),
        "token_mask": digest(masks),
        "leaves": digest([repr(use) for use in job.uses]),
    }


class Walk:
    """The batches on their way from cut to cut."""

    def __init__(self, job: Job, target: str, shelf: segments.Shelf):
        """Traces the function once per shape of a batch."""
        self.job, self.target, self.shelf = job, target, shelf
        self.compiler = segments.Compiler()
        layouts = {path: use.layout for path, use in job.uses.leaves.items()}
        moved = {*layouts, *job.bias.values()}
        names = [p for p in job.paths if is_array(job.leaves[p])]
        lines: dict[Any, tuple] = {}
        self.runners: list[segments.Runner] = []
        self.masks: list[np.ndarray | None] = []
        params = job.tree(job.leaves)
        for batch in job.batches:
            arrays, skeleton = split(batch)
            shapes = tuple((x.shape, str(x.dtype)) for x in arrays)
            if (shapes, skeleton) not in lines:
                program = trace(job.apply_fn, params, batch, {})
                line = straighten(program, params, job.paths, layouts)
                pairs = zip(names, line.params, strict=True)
                sources = [v for name, v in pairs if name in moved]
                changing = segments.changing(line, sources)
                lines[shapes, skeleton] = line, segments.cut(line), changing
            line, parts, changing = lines[shapes, skeleton]
            self.runners.append(
                segments.Runner(
                    line,
                    parts,
                    arrays,
                    None if target == "seq" else changing,
                    shelf,
                    self.compiler,
                )
            )
            mask = None if job.token_mask is None else job.token_mask(*batch)
            self.masks.append(None if mask is None else np.asarray(mask) != 0)
        self.lines = [(line, parts) for line, parts, _ in lines.values()]
        self.cuts = self.lines[0][0].cuts
        self.check(layouts)

    def check(self, layouts: Mapping[str, Any]) -> None:
        """Raises ValueError where the shapes of batches disagree about the cuts."""
        names = [[cut.names for cut in line.cuts] for line, _ in self.lines]
        if any(other != names[0] for other in names):
            raise ValueError(
                "batches of different shapes use different weights, or in another "
                "order; give batches that take the same way through the function"
            )
        found = {m.path for cut in self.cuts for m in cut.members}
        found.update(path for cut in self.cuts for path in cut.plain)
        missing = [path for path in layouts if path not in found]
        if missing:
            raise ValueError(
                f"{missing[0]}: its products read it in different ways; exclude it "
                "with rules={...: 'skip'}"
            )

    def run(self, progress: Callable[[Layer], None] | None) -> dict[str, Plan]:
        """Solves everything: path -> plan."""
        job, first = self.job, self.cuts
        total = sum(len(cut.members) + len(cut.plain) for cut in first)
        done, started = 0, time.perf_counter()
        try:
            for k, cut in enumerate(first):
                now, before = job.arrays(job.current), job.arrays(job.leaves)
                fixed = {
                    id(line): [segments.fixed(line, parts[k], x) for x in (now, before)]
                    for line, parts in self.lines
                }
                for runner in self.runners:
                    runner.advance(k, *fixed[id(runner.line)])
                solved = self.members(k) if cut.members else self.plain(cut)
                notes = cut.plain
                for (path, at), (plan, error) in solved.items():
                    job.apply(path, at, plan)
                    done += 1
                    seconds, started = since(started)
                    held, note = self.shelf.held, notes.get(path, "")
                    layer = Layer(
                        path, at, float(error), seconds, held, done, total, note
                    )
                    logger.info("%s", layer)
                    if note:
                        logger.warning("%s is solved on a plain run: %s", path, note)
                    if progress is not None:
                        progress(layer)
        finally:
            for runner in self.runners:
                runner.release()
            self.shelf.close()
        return job.assembled()

    def members(self, k: int) -> dict[tuple, tuple[Plan, Array]]:
        """Solves the members of cut `k`."""
        names = list(self.cuts[k].names[0])
        known = restore(self.job, names)
        if known is not None:
            return known
        sums: Any = None
        for runner, mask in zip(self.runners, self.masks, strict=True):
            sums = self.add(k, sums, runner, mask)
        stats = finish(self.job, self.cuts[k], sums)
        if self.target != "seq":
            # Explicit targets everywhere: one program per shape instead of two.
            stats = {n: with_targets(self.job.weight(*n), s) for n, s in stats.items()}
        return solve(self.job, stats)

    def add(
        self, k: int, sums: Any, runner: segments.Runner, mask: np.ndarray | None
    ) -> Any:
        """Adds the tokens of one batch to the sums of cut `k`."""
        job, cut = self.job, runner.line.cuts[k]
        differs = cut.operand in runner.dense
        streams = {}
        for n, m in enumerate(cut.members):
            if self.target == "resid" and m.stream and m.stream.var in runner.dense:
                streams[n] = (
                    runner.dense_value(m.stream.var),
                    runner.value(m.stream.var),
                )
        o = sum(m.product.layout.matrix_shape[0] for m in cut.members)
        i = cut.members[0].product.layout.matrix_shape[1]
        direct = {n: job.weight(m.path, m.at) for n, m in enumerate(cut.members)}
        if not (differs and 2 * o < i):
            direct = {n: w for n, w in direct.items() if n in streams}
        inputs = {
            "x": runner.value(cut.operand),
            "dense": runner.dense_value(cut.operand) if differs else None,
            "streams": streams,
            "direct": direct,
            "rows": rows(mask, cut.members[0].product.free),
        }
        if sums is None:
            sums = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype),
                jax.eval_shape(functools.partial(tokens_of, cut), inputs),
            )
        leaves, structure = jax.tree.flatten((sums, inputs))
        memo = k, id(runner.line), structure, tuple(x.shape for x in leaves)

        def flat(*leaves: Any) -> list[Any]:
            sums, inputs = jax.tree.unflatten(structure, leaves)
            return jax.tree.leaves(jax.tree.map(jnp.add, sums, tokens_of(cut, inputs)))

        outs = self.compiler.memo(memo, flat, *leaves)
        return jax.tree.unflatten(jax.tree.structure(sums), outs)

    def plain(self, cut: Cut) -> dict[tuple, tuple[Plan, Array]]:
        """Solves leaves that cannot be cut, on a plain run of the model as it is."""
        job = self.job
        uses = Uses(tuple(use for use in job.uses if use.path in cut.plain), {})
        at = {p: (None,) * len(u.layout.stack) for p, u in uses.leaves.items()}
        known = restore(job, [(path, at[path]) for path in cut.plain])
        if known is not None:
            return known
        stats = calibrate(
            job.apply_fn,
            job.tree(job.current),
            uses,
            job.batches,
            token_mask=job.token_mask,
        )
        solved: dict[tuple, tuple[Plan, Array]] = {}
        for path in cut.plain:
            solved |= solve(job, {(path, at[path]): stats[path]})
        return solved


def since(started: float) -> tuple[float, float]:
    """(seconds since `started`, now)."""
    now = time.perf_counter()
    return now - started, now


def rows(mask: np.ndarray | None, free: tuple[int, ...]) -> Any:
    """Which tokens count: (positions or None, 1 or 0 per position); None for all.

    The number of positions is rounded up, so that few shapes are compiled.
    """
    if mask is None or mask.shape != free[: mask.ndim]:
        return None
    keep = np.broadcast_to(
        mask.reshape(mask.shape + (1,) * (len(free) - mask.ndim)), free
    ).reshape(-1)
    if keep.all():
        return None
    found = np.flatnonzero(keep).astype(np.int32)
    step = max(64, -(-keep.size // 8))
    size = max(1, -(-found.size // step)) * step
    if size >= keep.size:
        return None, keep.astype(np.float32)
    padded = np.zeros(size, np.int32)
    padded[: found.size] = found
    return padded, (np.arange(size) < found.size).astype(np.float32)


def tokens_of(cut: Cut, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What one batch adds to the sums of a cut.

    Args:
      cut: the cut.
      inputs: "x" and "dense", the operand of the pruned and of the dense model; per
        member "direct", the dense weight where targets are computed token by token, and
        "streams", the stream of both models; "rows", from `rows`.

    Returns:
      "upper": f32[*stack, i, i], X^T X, right only on and above the diagonal; "total"
      f32[*stack, i]; "count" f32[]; and where the target differs from W x: "mixed"
      X_dense^T X and "total_dense", or per direct member "cross" T^T X and "target".
    """
    product = cut.members[0].product

    def picked(x: Array) -> Array:
        x = x.astype(jnp.float32)
        if inputs["rows"] is None:
            return x
        positions, valid = inputs["rows"]
        if positions is not None:
            x = jnp.take(x, positions, axis=-2)
        return x * valid[:, None]

    x = picked(product.tokens(inputs["x"]))
    dense = x
    count = jnp.asarray(x.shape[-2], jnp.float32)
    if inputs["rows"] is not None:
        count = jnp.sum(inputs["rows"][1], dtype=jnp.float32)
    found = {"upper": upper(x), "total": x.sum(axis=-2), "count": count}
    if inputs["dense"] is not None:
        dense = picked(product.tokens(inputs["dense"]))
        if len(inputs["direct"]) < len(cut.members):
            found |= {"mixed": across(dense, x), "total_dense": dense.sum(axis=-2)}
    found |= {"cross": {}, "target": {}}
    for n, w in inputs["direct"].items():
        t = jnp.einsum("...ti,...oi->...to", dense, w.astype(jnp.float32), **HIGHEST)
        if n in inputs["streams"]:
            there, here = inputs["streams"][n]
            lacks = there.astype(jnp.float32) - here.astype(jnp.float32)
            t = t + picked(cut.members[n].stream.back(lacks))  # type: ignore[union-attr]
        found["cross"][n], found["target"][n] = across(t, x), t.sum(axis=-2)
    return found


HIGHEST: dict[str, Any] = {
    "precision": lax.Precision.HIGHEST,
    "preferred_element_type": jnp.float32,
}


def across(t: Array, x: Array) -> Array:
    """T^T X."""
    return jnp.einsum("...to,...ti->...oi", t, x, **HIGHEST)


def upper(x: Array) -> Array:
    """X^T X on and above the diagonal; wide ones in blocks, which saves a third."""
    size = x.shape[-1]
    if size < 768:
        return across(x, x)
    edges = np.linspace(0, size, 5).astype(int)
    bands = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = across(x[..., low:high], x[..., low:])
        bands.append(jnp.pad(band, [(0, 0)] * (band.ndim - 1) + [(int(low), 0)]))
    return jnp.concatenate(bands, axis=-2)


def finish(job: Job, cut: Cut, sums: dict[str, Any]) -> dict[tuple, Stats]:
    """(path, at) -> statistics of the members of a cut; shared arrays are the same."""
    finite = jax.device_get(jnp.isfinite(sums["upper"].sum()))
    if not finite:
        raise ValueError(
            f"the inputs of {cut.members[0].path!r} contain NaN or Inf, or overflow; "
            "check the calibration batches and the activations before this leaf"
        )
    half = sums["upper"]
    gram = jnp.triu(half) + jnp.swapaxes(jnp.triu(half, 1), -1, -2)
    count = jnp.maximum(sums["count"], 1.0)
    shared = Stats(
        sq_norm=jnp.diagonal(gram, axis1=-2, axis2=-1),
        mean=sums["total"] / count,
        count=jnp.broadcast_to(sums["count"], gram.shape[:-2]),
        gram=gram,
    )
    out = {}
    for n, m in enumerate(cut.members):
        stats = shared
        if n in sums["cross"]:
            stats = dataclasses.replace(
                shared,
                cross=sums["cross"][n],
                target_mean=sums["target"][n] / count,
            )
        elif "mixed" in sums:
            w = job.weight(m.path, m.at).astype(jnp.float32)
            stats = dataclasses.replace(
                shared,
                cross=jnp.einsum("...oi,...ij->...oj", w, sums["mixed"], **HIGHEST),
                target_mean=jnp.einsum(
                    "...oi,...i->...o", w, sums["total_dense"] / count, **HIGHEST
                ),
            )
        out[m.path, m.at] = stats
    return out


def with_targets(w: Array, stats: Stats) -> Stats:
    """The same statistics with the targets W x written out, if there are no others."""
    if stats.cross is not None:
        return stats
    w = w.astype(jnp.float32)
    return dataclasses.replace(
        stats,
        cross=jnp.einsum("...oi,...ij->...oj", w, stats.gram, **HIGHEST),
        target_mean=jnp.einsum("...oi,...i->...o", w, stats.mean, **HIGHEST),
    )


def restore(job: Job, names: Sequence[tuple]) -> dict[tuple, tuple[Plan, Array]] | None:
    """The plans of these matrices from disk; None unless all are there."""
    if job.finished is None:
        return None
    found = {}
    for path, at in names:
        use = job.uses.leaves[path]
        stack = tuple(
            f.size for f, i in zip(use.layout.stack, at, strict=True) if i is None
        )
        o, i = use.layout.matrix_shape
        made: Any = jax.ShapeDtypeStruct
        f32 = jnp.float32
        stats = Stats(
            sq_norm=made((*stack, i), f32),
            mean=made((*stack, i), f32),
            count=made(stack, f32),
            gram=made((*stack, i, i), f32),
        )
        w = made((*stack, o, i), job.leaves[path].dtype)
        like = jax.eval_shape(
            lambda w, stats, path=path, at=at: solve_equal(
                job, {(path, at): stats}, {(path, at): w}
            )[path, at],
            w,
            stats,
        )
        known = job.finished.load(f"{path} {at}", like)
        if known is None:
            return None
        found[path, at] = known
    return found


def solve(job: Job, stats: Mapping[tuple, Stats]) -> dict[tuple, tuple[Plan, Array]]:
    """Solves matrices whose statistics, but for the targets, are the same."""
    groups: dict[Any, list[tuple]] = defaultdict(list)
    weights = {name: job.weight(*name) for name in stats}
    for name, w in weights.items():
        like = w.shape, str(w.dtype), jax.tree.structure(stats[name])
        choice = job.methods[name[0]], job.targets[name[0]] is None
        groups[like, choice].append(name)
    out: dict[tuple, tuple[Plan, Array]] = {}
    for names in groups.values():
        for name in names:
            checks.finite(weights[name], "weight", name[0])
        given = {name: stats[name] for name in names}
        found = solve_equal(job, given, {name: weights[name] for name in names})
        for name, result in found.items():
            out[name] = jax.tree.map(np.asarray, result)
            if job.finished is not None:
                job.finished.save(f"{name[0]} {name[1]}", out[name])
    return {name: out[name] for name in stats}


def solve_equal(
    job: Job, stats: Mapping[tuple, Stats], weights: Mapping[tuple, Array]
) -> dict[tuple, tuple[Plan, Array]]:
    """`solve` for matrices of one shape and method."""
    names = list(weights)
    stack = weights[names[0]].shape[:-2]
    rest = len(stack)

    def flat(x: Array) -> Array:
        return x.reshape(-1, *x.shape[rest:])

    def stacked(values: Sequence[Any]) -> Any:
        return None if values[0] is None else jnp.stack([flat(v) for v in values])

    keys, targets = [], []
    for path, at in names:
        keys.append(tree.keys_for(job.key, job.uses.leaves[path])[select(at)])
        goal = job.targets[path]
        full = None if goal is None else jnp.full(stack, goal, jnp.float32)
        targets.append(full)
    first = stats[names[0]]
    shared = dataclasses.replace(first, cross=None, target_mean=None)
    plans, errors = solve_stack(
        job.methods[names[0][0]],
        stacked(keys),
        stacked([weights[name] for name in names]),
        jax.tree.map(flat, shared),
        stacked([stats[name].cross for name in names]),
        stacked([stats[name].target_mean for name in names]),
        stacked(targets),
    )
    out = {}
    for n, (path, at) in enumerate(names):
        plan = jax.tree.map(lambda x: x[n].reshape(*stack, *x.shape[2:]), plans)  # noqa: B023
        out[path, at] = plan, jnp.mean(errors[n])
    return out


@functools.partial(jax.jit, static_argnames="method")
def solve_stack(
    method: Method,
    keys: Array,
    w: Array,
    stats: Stats,
    cross: Array | None,
    target_mean: Array | None,
    sparsity: Array | None,
) -> tuple[Plan, Array]:
    """Plans and relative output errors of [members, stack] matrices.

    Args:
      method: static.
      keys: [members, stack].
      w: [members, stack, o, i].
      stats: [stack, ...], shared by the members.
      cross: f32[members, stack, o, i] or None.
      target_mean: f32[members, stack, o] or None.
      sparsity: f32[members, stack] or None.
    """

    def one(key, w, stats, cross, mean, sparsity):
        mine = dataclasses.replace(stats, cross=cross, target_mean=mean)
        state = method.solve(key, w, mine, sparsity=sparsity)
        plan = method.decide(state, w)
        before = w.astype(jnp.float32)
        lost = tree.dense_weight(plan).astype(jnp.float32) - before
        return plan, squared(lost, stats.gram) / jnp.maximum(
            squared(before, stats.gram), 1e-30
        )

    over = jax.vmap(one)
    return jax.vmap(over, in_axes=(0, 0, None, 0, 0, 0))(
        keys, w, stats, cross, target_mean, sparsity
    )


def squared(w: Array, gram: Array) -> Array:
    """|| X W^T ||^2 from the Gram matrix of X."""
    product = jnp.dot(w, gram, precision=lax.Precision.HIGHEST)
    return jnp.sum(product * w, dtype=jnp.float32)
