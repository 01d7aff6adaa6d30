"""Records survive a stop, divergence is an error, tables and figures are written."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp

from train.lab import results

#: Of whatever has rows.
follow: Any = results.follow


class Rows:
    """What `follow` asks of a run: rows from the step that it begins with."""

    def __init__(self, *steps, begun=0, before=()):
        self.steps, self.begun = steps, begun
        self.rows = [self.step(step) for step in before]

    @staticmethod
    def step(step):
        return {"kind": "step", "step": step, "loss": 1 / step, "finite": 1.0}

    def __iter__(self):
        for step in self.steps:
            yield self.step(step)
        yield {"kind": "stage", "step": self.steps[-1], "sparsity": 0.5}


def test_every_record_is_on_disk_before_the_next_step(tmp_path):
    path = tmp_path / "a" / "metrics.jsonl"

    class Looking(Rows):
        def __iter__(self):
            for row in super().__iter__():
                seen.append(results.read(path))
                yield row

    seen, run = [], Looking(1, 2)
    records = follow(run, path, "run", more=lambda row: {"rate": 3})
    assert records == results.read(path) == seen[-1]
    assert records[0] == {"step": 1, "rate": 3, "loss": 1.0}
    assert [len(x) for x in seen] == [0, 1, 2]


def test_a_resumed_run_drops_what_lies_behind_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follow(Rows(2, 4, 6), path, "run")
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # the stop tore a line
    found = follow(Rows(6, begun=5, before=(2, 4, 5)), path, "run")
    assert [r["step"] for r in found] == [2, 4, 5, 6]  # 5 died before its record
    assert results.read(path) == found
    follow(Rows(1), path, "run")
    assert [r["step"] for r in results.read(path)] == [1]


def test_checkpoints_are_removed_unless_a_run_resumes(tmp_path):
    folder = tmp_path / "saved"
    for resume in (True, False):
        (folder / "step-00000001").mkdir(parents=True, exist_ok=True)
        results.saves(folder, resume, 10)
        assert folder.exists() == resume


def test_update_replaces_its_own_parts_only(tmp_path):
    path = tmp_path / "results.json"
    results.update(path, a=1, b=2)
    results.update(path, b=3)
    assert json.loads(path.read_text()) == {"a": 1, "b": 3}


def test_markdown_has_one_line_per_row():
    table = results.markdown(["a", "b"], [["1", "2"]])
    assert table == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_curves_are_drawn_for_the_metrics_that_exist(tmp_path):
    runs = {
        "dense": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}],
        "sparse": [{"step": 1, "loss": [1.0, 2.0], "sparsity": 0.5}],
    }
    results.curves(tmp_path / "curves.png", runs, ["loss", "sparsity", "temperature"])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_clock_counts_what_was_compiled_and_nothing_else():
    clock = results.Clock()
    run, x = jax.jit(lambda x: jnp.cos(x) * 3 + 1), jnp.ones(3)
    run(x).block_until_ready()
    compiled = clock.compiled
    assert compiled > 0
    run(x).block_until_ready()
    assert clock.compiled == compiled
    assert re.fullmatch(r"\d+ seconds, \d+ % of them compiling", str(clock))
