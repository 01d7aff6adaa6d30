"""Several processes prune together what one would, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from flexhinm_jax.cli.main import main
from tests.cli.test_killed import files
from tests.models.directories import QWEN3, make_decoder_directory

PROGRAM = "from flexhinm_jax.cli.main import main; raise SystemExit(main())"
CONFIG = QWEN3 | {"num_hidden_layers": 3, "num_key_value_heads": 4}
#: Three batches, so that one of two processes has one more.
OPTIONS = (
    "--method sparsegpt --pattern flexhinm:v=8 --sparsity 0.75 --allocate owl"
    " --target resid --length 16 --samples 6 --batch-size 2 --memory 4GiB"
)


class Runs:
    """Runs of the same command that write different folders."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        make_decoder_directory(folder / "model", CONFIG, 0, 2)
        text = "the cat sat on the mat, a dog ran under a tree. " * 6
        (folder / "text.txt").write_text(text)

    def start(self, out, processes=1):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        paths = ["--calibration", self.folder / "text.txt", "--out", self.folder / out]
        command = ["prune", self.folder / "model", *OPTIONS.split(), *paths]
        others = f"--coordinator 127.0.0.1:{port} --processes {processes} --process"
        return [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *map(str, command)]
                + (others.split() + [str(n)] if processes > 1 else []),
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for n in range(processes)
        ]


def ended(runs, timeout=600):
    """(status, stdout, stderr) of every process; none stays behind."""
    try:
        texts = [run.communicate(timeout=timeout) for run in runs]
    finally:
        for run in runs:
            run.kill()
    return [(run.returncode, *text) for run, text in zip(runs, texts, strict=True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("hosts"))
    [(status, _, errors)] = ended(made.start("one"))
    assert status == 0, errors
    return made


def assert_same(runs, out):
    """The files of one process: the report has sums over tokens in every digit."""
    one, two = runs.folder / "one", runs.folder / out
    assert files(two) == files(one)
    reports = [
        json.loads((folder / "report.json").read_text()) for folder in (one, two)
    ]
    for report in reports:
        del report["out"], report["commands"]
    assert reports[0] == reports[1] and len(reports[0]["errors"]) == 3 * 7
    assert not (runs.folder / f"{out}.partial").exists()


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(runs):
    (status, told, errors), (other, nothing, quiet) = ended(runs.start("two", 2))
    assert (status, other) == (0, 0), errors + quiet
    assert "block 3/3" in errors and "report.json" in told
    assert "block" not in quiet and not nothing
    assert_same(runs, "two")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_run_and_others_go_on_from_there(runs, killed):
    out, pair = f"killed-{killed}", runs.start(f"killed-{killed}", 2)
    partial = runs.folder / f"{out}.partial"
    while pair[0].poll() is None and not list(partial.glob("block-*.json")):
        time.sleep(0.002)
    pair[killed].send_signal(signal.SIGKILL)
    status, _, errors = ended(pair, timeout=120)[1 - killed]
    # Where process 0 is gone, JAX may be faster with its own words.
    assert status == 2 or killed == 0 and status != 0
    assert (
        "another process of this run ended" in errors or "another task died" in errors
    )
    assert not (runs.folder / out).exists()
    assert not list(partial.rglob("model*.safetensors"))
    again = ended(runs.start(out, 2 - killed))
    assert [status for status, _, _ in again] == [0] * (2 - killed), again
    assert "going on with" in again[0][2]
    assert_same(runs, out)


def test_options_that_do_not_fit_are_refused(tmp_path, capsys):
    make_decoder_directory(tmp_path / "model", QWEN3, 0, 1)
    given = ["prune", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    for more, match in (
        ("--processes 2", "need --coordinator"),
        ("--coordinator h:1 --process 0", "needs --processes N and --process I"),
        ("--coordinator h:1 --processes 2 --process 2", "they count from 0"),
    ):
        assert main([*given, *more.split()]) == 2
        assert match in capsys.readouterr().err


def test_encoders_have_one_process(model_dir, text_file, tmp_path, capsys):
    paths = ["--calibration", text_file, "--out", tmp_path / "out"]
    given = ["prune", model_dir, *paths, "--coordinator", "h:1"]
    assert main([str(x) for x in given]) == 2
    assert "--coordinator is for decoders" in capsys.readouterr().err
