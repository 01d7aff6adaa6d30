"""A run that is killed at any moment ends, when resumed, in the same files."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.models.directories import QWEN3, make_decoder_directory

pytestmark = pytest.mark.slow


def command(model_dir, text_file, out, resume):
    options = "--method sparsegpt --pattern 2:4 --sequential --target resid -q".split()
    paths = {"--calibration": text_file, "--out": out, "--resume": resume}
    pairs = [str(x) for pair in paths.items() for x in pair]
    program = "from flexhinm_jax.cli.main import main; raise SystemExit(main())"
    return [sys.executable, "-c", program, "prune", str(model_dir), *options, *pairs]


def files(folder):
    return {
        p.name: hashlib.sha256(content(p)).hexdigest()
        for p in folder.iterdir()
        # The report and the card name the folder that they were written to.
        if p.is_file() and p.name not in ("report.json", "README.md")
    }


def content(path):
    """The bytes; safetensors orders metadata differently in every process."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end].rstrip()), sort_keys=True)
    return header.encode() + data[end:]


def test_a_process_killed_twice_ends_in_the_same_files(model_dir, text_file, tmp_path):
    """Killed with signal 9 at random moments after the first and a later matrix."""
    cache = tmp_path / "cache"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(name, resume):
        arguments = command(model_dir, text_file, tmp_path / name, tmp_path / resume)
        return subprocess.Popen(arguments, env=environment)

    began = time.monotonic()
    assert start("whole", "unused").wait() == 0
    whole = time.monotonic() - began
    moment = random.Random(5)
    folder = tmp_path / "half-way"
    for count in (1, 5):
        run = start("resumed", "half-way")
        while run.poll() is None and len(list(folder.glob("*.npz"))) < count:
            time.sleep(0.002)
        time.sleep(moment.uniform(0, whole / 50))
        assert run.poll() is None, "finished before it was killed"
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not (tmp_path / "resumed").exists()
        assert count <= len(list(folder.glob("*.npz"))) < 12
    assert start("resumed", "half-way").wait() == 0
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) >= 4


def test_a_decoder_killed_twice_goes_on_by_itself(tmp_path):
    """Killed with signal 9 inside the first block and inside a later one."""
    config = QWEN3 | {"num_hidden_layers": 3}
    make_decoder_directory(tmp_path / "model", config, 0, 2)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, a dog ran under a tree. " * 20)
    options = "--method sparsegpt --pattern 2:4 --sequential --target resid -q"
    options += " --length 32 --memory 4GiB --pack"
    program = "from flexhinm_jax.cli.main import main; raise SystemExit(main())"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(name):
        paths = ["--calibration", str(text), "--out", str(tmp_path / name)]
        arguments = ["prune", str(tmp_path / "model"), *options.split(), *paths]
        return subprocess.Popen(
            [sys.executable, "-c", program, *arguments], env=environment
        )

    assert start("whole").wait() == 0
    partial = tmp_path / "resumed.partial"
    blocks = lambda: len(list(partial.glob("block-*.json")))  # noqa: E731
    matrices = lambda: len(list(partial.rglob("*.npz")))  # noqa: E731
    moments = (
        lambda: matrices() >= 2,
        lambda: blocks() >= 1 and matrices() >= 1,
        lambda: blocks() >= 2,
    )
    for reached in moments:
        run = start("resumed")
        while run.poll() is None and not reached():
            time.sleep(0.001)
        assert run.poll() is None, "finished before it was killed"
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not (tmp_path / "resumed").exists()
        assert not list(partial.rglob("model*.safetensors"))
    assert start("resumed").wait() == 0
    assert not partial.exists()
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert files(resumed) == files(whole)
    assert files(resumed / "packed") == files(whole / "packed")
    assert len(files(resumed)) >= 7
