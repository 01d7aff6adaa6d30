"""The programs from their flags to their files, and what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flexhinm_jax.training.sharding import split_batch
from train import finetune_pmap, language, vision
from train.lab import programs
from train.lab.trainer import Config

ROOT = Path(__file__).parents[2]
CONFIGS = [p.stem for p in programs.CONFIGS.glob("*.py") if p.stem != "__init__"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_tells_its_result_time_and_command(name):
    source = (programs.CONFIGS / f"{name}.py").read_text()
    for word in ("Result", "Time", "Command: "):
        assert word in source
    found = programs.config(name, Config)
    assert found.name == name


def test_unknown_configurations_methods_and_seeds_are_refused():
    with pytest.raises(ValueError, match="unknown config 'x'; known: bytes"):
        programs.config("x", Config)
    with pytest.raises(ValueError, match="config 'bytes' is for train.language"):
        programs.config("bytes", vision.Config)
    found = programs.config("bytes", language.Config, steps=7, dense_steps=None)
    assert found.steps == 7 and found.dense_steps > 7
    with pytest.raises(ValueError, match="--method magic: choose one of dense"):
        programs.recipe("magic", found)
    with pytest.raises(Exception, match="need different numbers"):
        programs.seeds("1,1")


def refused(monkeypatch, program, *flags):
    monkeypatch.setattr("sys.argv", ["program", *flags])
    with pytest.raises(SystemExit) as caught:
        program.main()
    return str(caught.value)


def test_bad_data_ends_a_program_with_one_line(monkeypatch, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    told = refused(monkeypatch, language, "--data", str(empty))
    assert told == f"error: {empty}: the file is empty; need text to train on"
    told = refused(monkeypatch, vision, "--data", str(tmp_path))
    assert told.startswith(f"error: {tmp_path}: no train-images-idx3-ubyte")
    told = refused(monkeypatch, vision, "--method", "hinm", "--sparsity", "0.2")
    assert "sparsity" in told and "0.5" in told


def test_batches_and_devices_that_do_not_fit_are_refused():
    batch = np.arange(24).reshape(2, 6, 2)
    parts = np.stack(np.split(batch, 3, 1))
    np.testing.assert_array_equal(split_batch(batch, 3, 1), parts)
    with pytest.raises(ValueError, match="6 rows do not divide over 4 devices"):
        split_batch(batch, 4, 1)
    with pytest.raises(ValueError, match="--devices 0: need at least one"):
        finetune_pmap.devices(0)
    assert jax.devices(), "from here on the number of devices is fixed"
    with pytest.raises(ValueError, match="--devices 4096: there are"):
        finetune_pmap.devices(4096)


def run(*args, **extra):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | extra
    command = [sys.executable, "-m", *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "metric"),
    [("train.vision", "nll"), ("train.language", "bits_per_byte")],
)
def test_a_program_writes_metrics_curves_and_a_summary(program, metric, tmp_path):
    short = ("--dense-steps", 4, "--steps", 4, "--method", "hinm", "--out", tmp_path)
    done = run(program, *short)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert abs(summary["sparsity"][0] - 0.875) < 0.01
    assert summary["pruned"][metric][0] > 0
    assert (tmp_path / "curves.png").exists() and (tmp_path / "metrics.jsonl").exists()
    assert metric.split("_")[0] in done.stdout


@pytest.mark.slow
def test_eight_devices_hold_equal_masks_and_reach_what_one_reaches(tmp_path):
    found = []
    for count in (1, 8):
        out = tmp_path / str(count)
        flags = ("--dense-steps", 40, "--steps", 20, "--method", "hinm", "--out", out)
        done = run("train.finetune_pmap", "--devices", count, *flags)
        assert done.returncode == 0, done.stderr
        assert f"equal bit by bit on {count} devices" in done.stdout
        lines = (out / "metrics.jsonl").read_text().splitlines()
        found.append(json.loads(lines[-1])["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
