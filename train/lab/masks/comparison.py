"""Rows of the comparison, computed once each, with their files."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from flexhinm_jax.tracing import views
from flexhinm_jax.types import Uses
from train.lab import results
from train.lab.masks import rows as known
from train.lab.masks import tiles
from train.lab.masks.learner import Learner, learning, started_at, state_bytes
from train.lab.masks.problems import Problem
from train.lab.masks.rows import Keeps, Row


class Comparison:
    """The rows of one problem, each computed once."""

    def __init__(
        self,
        problem: Problem,
        budget: fh.Duration,
        out: Path,
        *,
        seed: int = 0,
        learners: Mapping[str, Learner] = known.LEARNERS,
        resume: bool = False,
        every: float = 60.0,
    ):
        """Sets up a comparison.

        Args:
          problem: the model and its data.
          budget: of every learned method.
          out: folder of the results.
          seed: of everything drawn.
          learners: name -> how a method is trained.
          resume: takes finished rows from `out` and continues the one that stopped.
          every: seconds between checkpoints.
        """
        self.problem, self.budget, self.out = problem, budget, out
        self.seed, self.learners = seed, learners
        self.resume, self.every = resume, every
        self._known: dict[str, tuple[dict[str, Any], Keeps]] = {}

    def row(self, text: str) -> dict[str, Any]:
        """The figures of a row."""
        return self._row(known.parse(text))[0]

    def rows(self, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The figures of rows; a summary and a table are written after each."""
        problem, done = self.problem, []
        dense = problem.evaluate(problem.params)
        for text in texts:
            done.append(self.row(text))
            results.update(
                self.out / "summary.json",
                model=problem.name,
                facts=problem.facts,
                dense=dense,
                rows=done,
                jax=jax.__version__,
            )
            page = results.markdown(*table(done, problem.score))
            (self.out / "table.md").write_text(page)
            yield done[-1]

    def _row(self, row: Row) -> tuple[dict[str, Any], Keeps]:
        if row.text not in self._known:
            self._known[row.text] = self._read(row) or self._compute(row)
        return self._known[row.text]

    def _compute(self, row: Row) -> tuple[dict[str, Any], Keeps]:
        spent, start = 0.0, None
        if row.start is not None:
            first, start = self._row(known.parse(row.start))
            spent = first["cpu_seconds"]
        before = time.process_time()
        keeps, more = self._keeps(row, jax.random.key(self.seed), start)
        problem = self.problem
        if row.name in known.MOVED:
            params = problem.sequential(known.MOVED[row.name])
        else:
            params = masked(problem.params, problem.uses, keeps)
        jax.block_until_ready(params)
        spent += time.process_time() - before
        figures = {
            "row": row.text,
            "sparsity": zeros(params, problem.uses),
            "weights": sum(params[path].size for path in problem.uses.leaves),
            "validation": problem.validate(params),
            **problem.evaluate(params),
            "cpu_seconds": spent,
            **more,
        }
        self._write(row, figures, keeps)
        return figures, keeps

    def _keeps(
        self, row: Row, key: jax.Array, start: Keeps | None
    ) -> tuple[Keeps, dict[str, Any]]:
        """The supports of a row, and what else there is to say about it."""
        problem = self.problem
        given = key, problem, problem.uses
        if row.name in known.MOVED:
            return {}, {"note": "weights moved"}
        if row.name in known.ONE_SHOT:
            return known.one_shot(known.ONE_SHOT[row.name], *given), {}
        if row.name in known.SHARED:
            return known.hyperprune(key, problem, self._steps()), {}
        if row.name == "unstructured":
            keeps = known.one_shot(known.UNSTRUCTURED, *given, row.sparsity)
            return keeps, {"note": "not a pattern for kernels"}
        if row.name == "mlp_only_24":
            assert row.sparsity is not None
            rules = known.mlp_only_24(problem.uses, row.sparsity)
            uses = problem.discover(rules)
            if start is not None:
                return {path: start[path] for path in uses.leaves}, {}
            return known.one_shot(known.ONE_SHOT["wanda"], key, problem, uses), {}
        return self._learn(row, key, start)

    def _learn(
        self, row: Row, key: jax.Array, start: Keeps | None
    ) -> tuple[Keeps, dict[str, Any]]:
        problem = self.problem
        learner = known.learner(row, problem, self.learners)
        method: Any = learner.method
        params, uses = problem.params, problem.uses
        solve_key, run_key = jax.random.split(key)
        began = self.budget.clock()
        states = fh.solve(method, solve_key, params, uses, problem.stats, row.sparsity)
        if start is not None:
            states = started_at(method, states, start)
            if getattr(method, "tile_prior", None) == "shares":
                tile_key = jax.random.fold_in(solve_key, 1)
                states = tiles.dealt(method, states, start, problem, key=tile_key)
        told = {"row": row.text, "weights": problem.name} | self._told(row)
        folder = self.out / "checkpoints" / _file(row.text)
        run = learning(
            *(learner, states, params, uses),
            (problem.loss_fn, problem.batch_at, problem.validate),
            self.budget,
            key=run_key,
            checkpoints=results.saves(folder, self.resume, seconds=self.every),
            config=told,
        )
        run.spent = self.budget.clock() - began
        path = self.out / "metrics" / f"{_file(row.text)}.jsonl"

        def more(row: dict[str, Any]) -> dict[str, Any]:
            return {"spent": run.spent, "rate": learner.rate_at(row["progress"])}

        results.follow(run, path, row.text, self._steps() or 0, more)
        keeps = known.supports(fh.decide(method, run.states, params, uses))
        return keeps, {
            "steps": run.step,
            "first": run.rows[0]["value"],
            "bytes": state_bytes(run.now()),
        }

    def _steps(self) -> int | None:
        """Steps at most, or None where time is the limit."""
        total = int(self.budget.amount) if self.budget.unit == "steps" else None
        return self.budget.most or total

    def _read(self, row: Row) -> tuple[dict[str, Any], Keeps] | None:
        path = self.out / "rows" / f"{_file(row.text)}.json"
        if not self.resume or not path.exists():
            return None
        figures = json.loads(path.read_text())
        if figures.pop("told") != self._told(row):
            return None
        with np.load(path.with_suffix(".npz")) as keeps:
            return figures, {name: jnp.asarray(keeps[name]) for name in keeps.files}

    def _write(self, row: Row, figures: dict[str, Any], keeps: Keeps) -> None:
        path = self.out / "rows" / f"{_file(row.text)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {name: np.asarray(k) for name, k in keeps.items()}
        np.savez_compressed(path.with_suffix(".npz"), **arrays)
        path.unlink(missing_ok=True)
        results.update(path, **figures, told=self._told(row))

    def _told(self, row: Row) -> dict[str, Any]:
        """What a result depends on."""
        told = {"seed": self.seed, "facts": self.problem.facts}
        if row.name in self.learners:
            told["budget"] = repr(self.budget)
            told["learner"] = repr(self.learners[row.name])
        if row.name in known.SHARED:
            told |= {"method": repr(known.HYPER), "most": self._steps()}
        if row.start is not None:
            told["start"] = self._told(known.parse(row.start))
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
        here = views.leaf(jnp.asarray(keep), uses.leaves[path].layout)
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
        held = r.get("bytes")
        figures = [f"{r[n]:.4f}" for n in ("sparsity", *names, "validation")]
        title = f"{r['row']} ({r['note']})" if "note" in r else r["row"]
        per = "" if held is None else f"{sum(held.values()) / r['weights']:.2f}"
        steps = str(r.get("steps", ""))
        cells.append([title, *figures, steps, f"{r['cpu_seconds']:.0f}", per])
    return columns, cells
