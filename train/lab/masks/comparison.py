"""Rows of the comparison, computed once each, with their files."""

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from flexhinm_jax.io.checkpoints import Checkpoints
from flexhinm_jax.tracing.views import leaf as to_leaf
from flexhinm_jax.types import Uses
from train import log, mask_rows, mask_tiles
from train.mask_learner import Learner, learning, started_at, state_bytes
from train.mask_rows import Keeps, Row
from train.mask_tasks import Problem


class Comparison:
    """The rows of one problem, each computed once."""

    def __init__(
        self,
        problem: Problem,
        budget: fh.Duration,
        out: Path,
        *,
        seed: int = 0,
        most: int | None = None,
        learners: Mapping[str, Learner] = mask_rows.LEARNERS,
        resume: bool = False,
        every: float = 60.0,
    ):
        """Sets up a comparison.

        Args:
          problem: the model and its data.
          budget: of every learned method.
          out: folder of the results.
          seed: of everything drawn.
          most: steps at most of a learned method.
          learners: name -> how a method is trained.
          resume: takes finished rows from `out` and continues the one that stopped.
          every: seconds between checkpoints.
        """
        self.problem, self.budget, self.out = problem, budget, out
        self.seed, self.most, self.learners = seed, most, learners
        self.resume, self.every = resume, every
        self._dense: dict[str, float] | None = None
        self._known: dict[str, tuple[dict[str, Any], Keeps]] = {}

    def dense(self) -> dict[str, float]:
        """The figures of the dense model."""
        if self._dense is None:
            self._dense = self.problem.evaluate(self.problem.params)
        return self._dense

    def row(self, text: str) -> dict[str, Any]:
        """The figures of a row."""
        return self._row(mask_rows.parse(text))[0]

    def _row(self, row: Row) -> tuple[dict[str, Any], Keeps]:
        if row.text not in self._known:
            self._known[row.text] = self._read(row) or self._compute(row)
        return self._known[row.text]

    def _compute(self, row: Row) -> tuple[dict[str, Any], Keeps]:
        before, spent, start = time.process_time(), 0.0, None
        if row.start is not None:
            first, start = self._row(mask_rows.parse(row.start))
            spent = first["cpu_seconds"]
            before = time.process_time()
        more: dict[str, Any] = {}
        key = jax.random.key(self.seed)
        problem = self.problem
        if row.name in mask_rows.MOVED:
            params = problem.sequential(mask_rows.MOVED[row.name])
            keeps, more["note"] = {}, "weights moved"
        else:
            if row.name in mask_rows.ONE_SHOT:
                method = mask_rows.ONE_SHOT[row.name]
                keeps = mask_rows.one_shot(method, key, problem, problem.uses)
            elif row.name in mask_rows.SHARED:
                keeps = mask_rows.hyperprune(key, problem, self._steps())
            elif row.name == "unstructured":
                assert row.sparsity is not None
                keeps = mask_rows.unstructured(key, problem, row.sparsity)
                more["note"] = "not a pattern for kernels"
            elif row.name == "mlp_only_24":
                keeps = self._mlp_only(row, key, start)
            else:
                keeps, more = self._learn(row, key, start)
            params = masked(problem.params, problem.uses, keeps)
        jax.block_until_ready(params)
        spent += time.process_time() - before
        found = {
            "row": row.text,
            "sparsity": zeros(params, problem.uses),
            "weights": sum(params[path].size for path in problem.uses.leaves),
            "validation": problem.validate(params),
            **problem.evaluate(params),
            "cpu_seconds": spent,
            **more,
        }
        self._write(row, found, keeps)
        return found, keeps

    def _mlp_only(self, row: Row, key: jax.Array, start: Keeps | None) -> Keeps:
        assert row.sparsity is not None
        rules = mask_rows.mlp_only_24(self.problem.uses, row.sparsity)
        uses = self.problem.discover(rules)
        if start is not None:
            return {path: start[path] for path in uses.leaves}
        method = mask_rows.ONE_SHOT["wanda"]
        return mask_rows.one_shot(method, key, self.problem, uses)

    def _learn(
        self, row: Row, key: jax.Array, start: Keeps | None
    ) -> tuple[Keeps, dict[str, Any]]:
        problem = self.problem
        learner = mask_rows.learner(row, problem, self.learners)
        method: Any = learner.method
        params, uses = problem.params, problem.uses
        solve_key, run_key = jax.random.split(key)
        tile_key = jax.random.fold_in(solve_key, 1)
        began = self.budget.clock()
        states = fh.solve(method, solve_key, params, uses, problem.stats, row.sparsity)
        if start is not None:
            states = started_at(method, states, start)
            if getattr(method, "tile_prior", None) == "shares":
                states = mask_tiles.dealt(
                    method,
                    states,
                    start,
                    params,
                    uses,
                    problem.stats,
                    problem.loss_fn,
                    problem.batch_at,
                    key=tile_key,
                )
        duration = dataclasses.replace(self.budget, most=self.most)
        folder = self.out / "checkpoints" / _file(row.text)
        if not self.resume:
            shutil.rmtree(folder, ignore_errors=True)
        run = learning(
            *(learner, states, params, uses),
            (problem.loss_fn, problem.batch_at, problem.validate),
            duration,
            key=run_key,
            checkpoints=Checkpoints(folder, None, resume="older", seconds=self.every),
            config={"row": row.text, "weights": problem.name} | self._told(row),
        )
        run.spent = duration.clock() - began
        path = self.out / "metrics" / f"{_file(row.text)}.jsonl"

        def more(row: dict[str, Any]) -> dict[str, Any]:
            return {"spent": run.spent, "rate": learner.rate_at(row["progress"])}

        log.follow(run, path, row.text, self._steps() or 0, more)
        plans = fh.decide(method, run.states, params, uses)
        return {path: plan.support.keep for path, plan in plans.items()}, {
            "steps": run.step,
            "first": run.rows[0]["value"],
            "bytes": state_bytes(run.now()),
        }

    def _steps(self) -> int | None:
        """Steps at most, or None where time is the limit."""
        total = int(self.budget.amount) if self.budget.unit == "steps" else None
        return self.most or total

    def _read(self, row: Row) -> tuple[dict[str, Any], Keeps] | None:
        path = self.out / "rows" / f"{_file(row.text)}.json"
        if not self.resume or not path.exists():
            return None
        found = json.loads(path.read_text())
        if found.pop("told") != self._told(row):
            return None
        with np.load(path.with_suffix(".npz")) as packed:
            keeps = {p: self._unpacked(p, packed[p]) for p in packed.files}
        return found, keeps

    def _write(self, row: Row, found: dict[str, Any], keeps: Keeps) -> None:
        folder = self.out / "rows"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{_file(row.text)}.json"
        bits: dict[str, Any] = {p: np.packbits(np.asarray(k)) for p, k in keeps.items()}
        np.savez(path.with_suffix(".npz"), **bits)
        text = json.dumps(found | {"told": self._told(row)}, indent=1)
        path.write_text(text + "\n")

    def _unpacked(self, path: str, bits: np.ndarray) -> Any:
        layout = self.problem.uses.leaves[path].layout
        shape = (*layout.stack_shape, *layout.matrix_shape)
        flat = np.unpackbits(bits, count=int(np.prod(shape)))
        return jnp.asarray(flat.reshape(shape).astype(bool))

    def _told(self, row: Row) -> dict[str, Any]:
        """What a result depends on."""
        told = {"seed": self.seed, "facts": self.problem.facts}
        if row.name in self.learners:
            told |= {"budget": repr(self.budget), "most": self.most}
            told["learner"] = repr(self.learners[row.name])
        if row.name in mask_rows.SHARED:
            told |= {"method": repr(mask_rows.HYPER), "most": self._steps()}
        if row.start is not None:
            told["start"] = self._told(mask_rows.parse(row.start))
        return told


def masked(params: Any, uses: Uses, keeps: Keeps) -> Any:
    """The parameters with zeros where masks say so.

    Args:
      params: flat dict of the dense parameters.
      uses: from `discover`.
      keeps: path -> bool[*stack, o, i]; other leaves stay.
    """
    new = dict(params)
    for path, keep in keeps.items():
        here = to_leaf(jnp.asarray(keep), uses.leaves[path].layout)
        new[path] = jnp.where(here, params[path], jnp.zeros((), params[path].dtype))
    return new


def zeros(params: Any, uses: Uses) -> float:
    """Fraction of the weights of all uses that are zero."""
    counts = [(np.sum(params[p] == 0), params[p].size) for p in uses.leaves]
    return float(sum(c for c, _ in counts) / sum(n for _, n in counts))


def _file(text: str) -> str:
    """A file name for a row."""
    return re.sub(r"[^\w.@-]+", "-", text)


def table(
    rows: Sequence[Mapping[str, Any]], score: str
) -> tuple[list[str], list[list]]:
    """Columns and cells of the rows."""
    names = [n for n in ("cosine", "quantile", "spearman") if n in rows[0]]
    names = names or [score]
    columns = ["row", "zeros", *names, "validation", "steps", "CPU s", "B / weight"]
    cells = []
    for r in rows:
        figures = [f"{r[n]:.4f}" for n in names]
        held = r.get("bytes")
        per = "" if held is None else f"{sum(held.values()) / r['weights']:.2f}"
        title = f"{r['row']} ({r['note']})" if "note" in r else r["row"]
        cells.append(
            [
                title,
                f"{r['sparsity']:.4f}",
                *figures,
                f"{r['validation']:.4f}",
                str(r.get("steps", "")),
                f"{r['cpu_seconds']:.0f}",
                per,
            ]
        )
    return columns, cells


def compare(
    comparison: Comparison, texts: Sequence[str], out: Path
) -> list[dict[str, Any]]:
    """All rows, written as they come."""
    problem, rows = comparison.problem, []
    for text in texts:
        rows.append(comparison.row(text))
        summary = {
            "model": problem.name,
            "facts": problem.facts,
            "dense": comparison.dense(),
            "rows": rows,
            "jax": jax.__version__,
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (out / "table.md").write_text(log.markdown(*table(rows, problem.score)))
    return rows
