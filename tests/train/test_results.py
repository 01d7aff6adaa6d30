"""Records survive a stop, divergence is an error, tables and figures are written."""

import json

import numpy as np
import pytest

from train import log


def test_records_are_on_disk_at_once_and_arrays_become_lists(tmp_path):
    path = tmp_path / "a" / "metrics.jsonl"
    with log.Log(path, 10, "run") as records:
        records.write(1, loss=np.float32(0.5), accuracy=np.array([0.25, 0.75]))
        line = json.loads(path.read_text())
    assert line == {"step": 1, "loss": 0.5, "accuracy": [0.25, 0.75]}


def test_a_resumed_log_drops_what_lies_behind_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with log.Log(path, 10, "run") as records:
        for step in (2, 4, 6):
            records.write(step, loss=1.0)
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # the stop tore a line
    with log.Log(path, 10, "run", start=4) as records:
        records.write(5, loss=0.5)
    assert [r["step"] for r in log.read(path)] == [2, 4, 5]
    with log.Log(path, 10, "run"):
        pass
    assert log.read(path) == []


def test_a_loss_that_is_not_finite_stops_the_run_after_it_was_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with log.Log(path, 10, "run") as records:
        records.write(1, loss=1.0)
        with pytest.raises(log.Diverged, match="task_loss is nan at step 2: the run"):
            records.write(2, task_loss=float("nan"))
        with pytest.raises(ValueError, match="at step 3"):
            records.write(3, loss=np.array([1.0, np.inf]))
    assert [r["step"] for r in log.read(path)] == [1, 2, 3]


def test_update_replaces_its_own_parts_only(tmp_path):
    path = tmp_path / "results.json"
    log.update(path, a=1, b=2)
    log.update(path, b=3)
    assert json.loads(path.read_text()) == {"a": 1, "b": 3}


def test_markdown_has_one_line_per_row():
    assert (
        log.markdown(["a", "b"], [["1", "2"]])
        == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    )


def test_curves_are_drawn_for_the_metrics_that_exist(tmp_path):
    runs = {
        "dense": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}],
        "sparse": [{"step": 1, "loss": [1.0, 2.0], "sparsity": 0.5}],
    }
    log.curves(tmp_path / "curves.png", runs, ["loss", "sparsity", "temperature"])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
