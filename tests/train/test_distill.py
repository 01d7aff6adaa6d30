import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.io import checkpoints, huggingface, packed
from flexhinm_jax.training.run import NotFinite
from train import distill
from train.distill import Config
from train.lab import models, results
from train.lab.recovery import Gates
from train.lab.teacher import Recipe

pytestmark = pytest.mark.usefixtures("few_documents")

RECIPE = Recipe(learning_rate=1e-3, rows=2, length=16, precision="float32")
FLAGS = "--rows 2 --length 16 --calibration 8 --evaluation 8 --precision float32"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, sentences):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(sentences) + "\n")
    return path


@pytest.fixture(scope="module")
def case(few_documents, model_dir, text_file):
    """(encoder, start, token lists): pruned by magnitude, which compiles quickly."""
    made = models.load(model_dir, 8)
    lists = made.tokenize(text_file.read_text().splitlines())
    start = fh.prune(
        made.embed,
        made.params,
        [made.model.sample()],
        fh.Magnitude(fh.NM(2, 4)),
        key=jax.random.key(0),
    )
    return made, start, lists


def recover(case, out, recipe=RECIPE, steps=6, gates=None, **options):
    config = Config(
        budget=fh.Duration(steps, "steps"), recipe=recipe, evaluation=8, gates=gates
    )
    made, start, lists = case
    return distill.recover(made, start, lists, config, out, **options)


# Open for three of six steps: the third checkpoint is the last with open gates.
GATES = Gates(share=0.5, rate=0.3)


@pytest.mark.parametrize(
    ("gates", "damaged"),
    [
        (None, True),
        pytest.param(GATES, True, marks=pytest.mark.slow),
        pytest.param(GATES, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_died_goes_on_as_if_it_had_not(
    case, tmp_path, monkeypatch, gates, damaged
):
    whole, plans, expected = recover(case, None, gates=gates)
    assert expected["steps"] == 6
    for path, plan in plans.items():
        fh.verify(plan, path=path)

    write = results.write_lines

    def dying(path, records, append):
        if any(r["step"] == 4 for r in records):  # which is saved already
            raise MemoryError
        write(path, records, append=append)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(results, "write_lines", dying)
        recover(case, tmp_path, gates=gates, every=0.0)
    kept = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [path.name for path in kept] == ["step-00000003", "step-00000004"]
    if damaged:
        # The last checkpoint lost a file: the one before serves.
        (kept[1] / checkpoints.ARRAYS / "manifest.ocdbt").unlink()
    again, plans_again, figures = recover(case, tmp_path, gates=gates)
    assert figures["steps"] == 6 and figures["moved"] == expected["moved"]
    assert gates is None or figures["moved"] > 0
    for name in whole:
        np.testing.assert_array_equal(np.asarray(whole[name]), np.asarray(again[name]))
    for path, plan in plans.items():
        np.testing.assert_array_equal(
            plan.support.keep, plans_again[path].support.keep, err_msg=path
        )
    steps = [record["step"] for record in results.read(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]

    other = Recipe(learning_rate=2e-3, rows=2, length=16, precision="float32")
    with pytest.raises(
        ValueError, match="recipe.learning_rate: saved 0.001, now 0.002"
    ):
        recover(case, tmp_path, other, gates=gates)


def test_a_loss_that_is_no_number_stops_the_run(case):
    wild = Recipe(learning_rate=1e30, rows=2, length=16, precision="float32", warmup=0)
    with pytest.raises(NotFinite, match="step 2: loss or gradient is not finite"):
        recover(case, None, wild)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--pattern 2by4", "unknown pattern '2by4'"),
        ("--text missing.txt", "missing.txt is not a file"),
        ("--text binary.txt", "binary.txt is not UTF-8 text"),
        ("--text empty.txt", "empty.txt has no text"),
        ("--minutes 0", "a duration of 0.0 minutes is not positive"),
        ("--precision half", "precision='half'; known: float32, bfloat16"),
        ("--gates --gate-share 2", "share=2.0 must be in"),
        ("--gates --gate-start 1.5", "no gate has a gradient from 1.2 on"),
        ("--gates --gate-optimizer lion", "optimizer='lion'; known: adam, relative"),
        ("--sentences 0", "sentences=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(flags, text, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("\n\n")
    given = ["--model", str(model_dir), "--evaluation", "8", *flags.split()]
    with pytest.raises(SystemExit, match="distill: ") as error:
        distill.main(given)
    assert text in str(error.value)


def command(model_dir, text_file, out):
    flags = f"{FLAGS} --steps 60 --checkpoint-seconds 0 --pattern 2:4"
    paths = ["--model", model_dir, "--text", text_file, "--out", out]
    return [sys.executable, "-m", "train.distill", *flags.split(), *map(str, paths)]


@pytest.mark.slow
def test_the_program_survives_a_kill_and_writes_a_model_that_others_read(
    model_dir, text_file, tmp_path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(model_dir, text_file, whole), check=True, timeout=600)
    run = subprocess.Popen(command(model_dir, text_file, killed))
    ends = time.monotonic() + 600
    while not list((killed / "checkpoints").glob("step-*5")):
        assert run.poll() is None and time.monotonic() < ends
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (killed / "model").exists()
    subprocess.run(command(model_dir, text_file, killed), check=True, timeout=600)
    models = [huggingface.read(folder / "model").params for folder in (whole, killed)]
    for name, leaf in models[0].items():
        np.testing.assert_array_equal(leaf, models[1][name])
    twin = packed.read_packed(whole / "model" / "packed.safetensors")
    pruned = 0
    for path, leaf in twin.items():
        if isinstance(leaf, fh.PackedWeight):
            pruned += 1
            unpacked = np.asarray(fh.kernels.unpack(leaf))
            np.testing.assert_array_equal(unpacked, models[0][path])
            assert np.mean(unpacked == 0) >= 0.5
    assert pruned == 6
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["steps"] == 60 and summary["sentences"] == 40
    assert (whole / "curves.png").stat().st_size > 0
    assert not (whole / "checkpoints").exists()
