"""The GPU benchmark without a GPU: its parts at tiny sizes, and what ends badly."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import gpu, gpu_cases, gpu_parts
from bench.study import Row
from flexhinm_jax.gpu import cost, selfcheck, support, wgmma_sp
from flexhinm_jax.gpu.tilings import Source, Tiling
from flexhinm_jax.kernels import dispatch

mosaic = pytest.mark.skipif(
    not gpu_parts.HAS_MOSAIC, reason=f"the GPU kernels need jax {support.SINCE}"
)


def child(code):
    return lambda name, shard, out: [sys.executable, "-c", code.format(out=out)]


def parts_row(out):
    [row] = [row for row in gpu.read(out) if row["table"] == gpu.PARTS]
    return row


@pytest.mark.parametrize(
    "code, end, failed",
    [
        ("pass", "code 0", 0),
        ("raise SystemExit(3)", "code 3", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "code -11", 1),
        ("import time; time.sleep(60)", "time limit", 1),
    ],
)
def test_every_end_of_a_part_is_a_row(tmp_path, code, end, failed):
    seconds = 1.5 if end == "time limit" else 60
    well = gpu.run_part("setup", gpu.Part(1), tmp_path, seconds, child(code))
    assert well == (not failed)
    row = parts_row(tmp_path)
    assert row["what"] == "setup" and row["more"]["failed"] == failed
    assert row["data"]["ended"] == [end] and row["value"] < 60


def script(tmp_path, text):
    """Starts a program whose first argument is the folder of the run."""
    path = tmp_path / "code.py"
    path.write_text(text)
    return lambda name, shard, out: [sys.executable, str(path), str(out)]


def test_rows_of_a_part_that_is_stopped_stay(tmp_path):
    line = json.dumps(Row(gpu.TIMES, "one", 1.0).document())
    start = script(
        tmp_path,
        f"import sys, time\nopen(sys.argv[1] + '/rows.jsonl', 'a').write({line!r} + "
        "'\\ncut off\\n')\ntime.sleep(60)\n",
    )
    assert not gpu.run_part("times", gpu.Part(1), tmp_path, 3, start)
    assert [row["what"] for row in gpu.read(tmp_path)] == ["one", "times"]


def test_what_a_part_started_ends_with_it(tmp_path):
    """As a self-check would, which else used the GPU while others are measured."""
    start = script(
        tmp_path,
        "import pathlib, subprocess, sys\n"
        "wait = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "child = subprocess.Popen(wait)\n"
        "pathlib.Path(sys.argv[1], 'pid').write_text(str(child.pid))\n",
    )
    assert gpu.run_part("times", gpu.Part(1), tmp_path, 60, start)
    stat, state = Path("/proc", (tmp_path / "pid").read_text(), "stat"), "S"
    with contextlib.suppress(FileNotFoundError):  # or nobody has asked for its code yet
        for _ in range(100):
            state = stat.read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                break
            time.sleep(0.05)
    assert state == "Z" or not stat.exists()


ENDINGS = """
import os, sys, time
from pathlib import Path
from bench import gpu, gpu_cases

def lose():
    raise RuntimeError("an illegal address")

out = Path(sys.argv[1])
cases = {
    "before": lambda: {"value": 1.0},
    "hangs": lambda: time.sleep(60),
    "crashes": os.abort,
    "loses the GPU": lose,
    "after": lambda: {"value": 2.0},
}
cases = [gpu_cases.Case(gpu.TIMES, *case) for case in cases.items()]
gpu_cases.run(cases, 0, out, {}, lambda: False, "")
"""


def test_after_a_case_that_ends_its_process_the_others_run(tmp_path):
    gpu.write(tmp_path, Row(gpu.TIMES, "after", 3.0))  # of an earlier run
    start = script(tmp_path, ENDINGS)
    part = gpu.Part(1, patience=0.01)
    assert not gpu.run_part("times", part, tmp_path, 100, start)
    rows = {row["what"]: row for row in gpu.read(tmp_path)}
    values = {what: row["value"] for what, row in rows.items() if what != "times"}
    lost = dict.fromkeys(("hangs", "crashes", "loses the GPU"))
    assert values == {"before": 1.0, "after": 2.0} | lost
    for what in ("hangs", "crashes"):
        assert rows[what]["data"]["error"] == "its process ended before it did"
    assert "an illegal address" in rows["loses the GPU"]["data"]["error"]
    ends = f"code 1, code -6, code {gpu_cases.LOST}, code 0"
    assert rows["times"]["data"]["ended"] == [ends]
    assert "code.py" in (tmp_path / "times-0.log").read_text()  # where it hung


def test_cuda_is_found_without_a_variable(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CUDA", tmp_path)
    monkeypatch.delenv("CUDA_ROOT", raising=False)
    assert "CUDA_ROOT" not in gpu.environment(0, 1.0)
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "nvdisasm"
    tool.write_text("#!/bin/sh\necho release 13\n")
    tool.chmod(0o755)
    assert gpu.environment(0, 1.0)["CUDA_ROOT"] == str(tmp_path)
    monkeypatch.setenv("CUDA_ROOT", str(tmp_path))
    assert gpu_parts.tools()["tools"][str(tool)] == ["release 13"]


def test_a_part_gets_its_share_of_what_the_others_left(tmp_path, monkeypatch):
    limits = {}

    def quick(name, part, out, seconds):
        limits[name] = seconds
        return name != "numerics"

    monkeypatch.setattr(gpu, "run_part", quick)
    assert not gpu.run(tmp_path, 420.0, gpu.PARTS_OF_RUN)
    assert list(limits) == list(gpu.PARTS_OF_RUN)
    # Nobody used time, so the last part may have all of it.
    assert limits["setup"] == pytest.approx(21, abs=1)
    assert limits["solvers"] == pytest.approx(420, abs=1)
    assert sum(part.share for part in gpu.PARTS_OF_RUN.values()) == pytest.approx(1)


FORM = gpu_parts.Form(Source.PLAIN, Tiling(tokens=8), "bfloat16")


def test_a_wrong_case_leaves_what_is_needed_to_understand_it(tmp_path, monkeypatch):
    """Two columns exchanged: the identity probe shows which."""

    def swapped(x, packed, dtype, cut):
        for kind in ("ptx", "mlir-passes.log"):
            Path(os.environ["MOSAIC_GPU_DUMP_TO"], f"body.{kind}").write_text("")
        dense = jnp.asarray(np.load(tmp_path / "w.npy"))
        dense = dense.at[:, 4].set(dense[:, 9]).at[:, 9].set(dense[:, 4])
        return (x.astype(jnp.float32) @ dense.T).astype(dtype)

    example = gpu_parts.selfcheck.example

    def kept(*args, **kwargs):
        packed, w = example(*args, **kwargs)
        np.save(tmp_path / "w.npy", w)
        return packed, w

    monkeypatch.setattr(gpu_parts.selfcheck, "example", kept)
    monkeypatch.setattr(
        gpu_parts, "quietly", lambda: gpu_parts.contextlib.nullcontext()
    )
    fields = gpu_parts.one_form(FORM, tmp_path, swapped)
    assert fields["value"] and fields["anchor"] == 0
    assert fields["data"]["wrong with selector 0 alone"] == fields["value"]
    folder = tmp_path / "failed" / FORM.name
    arrays = np.load(folder / "arrays.npz")
    wrong = np.unpackbits(arrays["mismatch"], axis=1)[:, : arrays["w"].shape[1]]
    assert set(np.flatnonzero(wrong.any(0))) == {4, 9}
    assert (
        json.loads((folder / "case.json").read_text())["seed"] == fields["data"]["seed"]
    )
    assert {path.name for path in folder.iterdir()} == {
        "arrays.npz",
        "case.json",
        "body.ptx",
    }


def test_a_case_that_does_not_compile_leaves_its_folder(tmp_path, monkeypatch):
    def broken(x, packed, dtype, cut):
        raise NotImplementedError("no such instruction")

    monkeypatch.setattr(
        gpu_parts, "quietly", lambda: gpu_parts.contextlib.nullcontext()
    )
    with pytest.raises(NotImplementedError):
        gpu_parts.one_form(FORM, tmp_path, broken)
    assert (tmp_path / "failed" / FORM.name / "case.json").exists()


def test_the_block_asks_for_the_verdict_of_the_run_and_checks_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setenv(selfcheck.FOLDER, str(tmp_path))
    monkeypatch.setattr(selfcheck, "first_gpu", lambda: jax.devices("cpu")[0])
    monkeypatch.setattr(selfcheck, "run", lambda *_: pytest.fail("checked"))
    selfcheck.failure.cache_clear()
    assert "did not end in this run" in str(gpu_parts.checked())
    monkeypatch.setattr(selfcheck, "run", lambda *_: selfcheck.Verdict(None))
    next(tmp_path.iterdir()).unlink()
    selfcheck.failure.cache_clear()
    assert gpu_parts.self_check()["value"] == 0
    selfcheck.failure.cache_clear()
    monkeypatch.setattr(selfcheck, "run", lambda *_: pytest.fail("checked"))
    assert gpu_parts.checked() is None
    selfcheck.failure.cache_clear()


def test_every_form_of_the_kernel_is_checked(monkeypatch):
    monkeypatch.setattr(gpu_parts, "HAS_GPU", True)
    forms = gpu_parts.forms()
    assert forms == gpu_parts.every_form()
    assert len({form.name for form in forms}) == len(forms)

    def kind(source, cut):
        return source, cut.groups, cut.tokens, cut.sharing, cut.step

    kinds = {kind(form.source, form.cut) for form in forms}
    for tiles, blocks, plain in (
        (1, 2, 0),
        (1, 8, 1),
        (1, 4, 0),
        (1, 1, 1),
        (64, 1, 0),
        (64, 2, 0),
    ):
        shape = wgmma_sp.Shape(tiles, blocks, 64, 8192, bool(plain))
        for n in (1, 9, 20, 40, 64, 100, 256, 1000, 4096):
            cut = wgmma_sp.tiling(n, shape)
            assert kind(shape.source(n, cut), cut) in kinds
    for what in ("in_flight", "splits", "depth"):
        assert len({getattr(form.cut, what) for form in forms}) > 1
    tried = [(form.source, form.cut.tokens, form.cut.sharing) for form in forms]
    assert tried[::2] == tried[1::2], "each with nothing and with one in flight"
    for form in forms:
        cut, source = form.cut, form.source
        case = gpu_parts.case_of(form, *gpu_parts.ON_GPU)
        inputs = case.dense + 4 * case.groups + 4
        more = {
            Source.LISTED: 512 * 43,
            Source.HELD: 512 * cut.depth + 2 * case.tokens * inputs,
        }
        slots = cut.depth * cut.slot_bytes
        assert slots + more.get(source, 0) <= support.SHARED_BYTES - 2048
        assert source is not Source.HELD or case.tokens <= cut.tokens


@mosaic
def test_every_part_runs_at_tiny_sizes(tmp_path, monkeypatch):
    """A shard of each, the kernel interpreted; what a GPU is there for is the same."""
    monkeypatch.setenv(dispatch.OPT_IN, "1")
    for name in gpu.PARTS_OF_RUN:
        cases = gpu_parts.PARTS[name](0, 3, tmp_path)
        rows = list(gpu_cases.rows(cases, 0, {}))
        assert rows and not len(rows) % 2
        for begun, ended in zip(rows[::2], rows[1::2], strict=True):
            assert begun[:3] == (*ended[:2], None) and begun.data["error"]
            assert "error" not in ended.data, ended
            timed = ended.table in (gpu.TIMES, gpu.BLOCK) and ended.value
            assert not timed or {"predicted", "dense, predicted"} <= set(ended.more)
        exact = [row.value for row in rows[1::2] if row.table == gpu.NUMERICS]
        assert exact == [0] * len(exact)
    assert not list((tmp_path / "failed").iterdir())


@pytest.mark.slow
def test_the_whole_command_runs_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["gpu", "--out", str(tmp_path), "--seconds", "900"]
    )
    assert gpu.main() == 0
    rows = gpu.read(tmp_path)
    assert {row["table"] for row in rows} == set(gpu.STUDY.notes)
    assert not any("error" in row.get("data", {}) for row in rows)
    assert gpu.TIMES in capsys.readouterr().out


SIDE = 8192
SHAPE = wgmma_sp.Shape(1, 128, 64, SIDE, plain=True)


def test_the_limit_is_below_every_prediction_and_above_half_of_dense():
    for n in (1, 16, 64, 1024, 4096):
        sizes = gpu_parts.two_of_four(SIDE, SIDE).product(n)
        least = min(c[0] for c in wgmma_sp.cuts(n, SHAPE))
        assert cost.floor(sizes) < least
    # 2:4 with many tokens: 1.2 times is what tuned libraries reach.
    sizes = gpu_parts.two_of_four(SIDE, SIDE).product(4096)
    ratio = cost.dense(4096, SIDE, SIDE) / cost.floor(sizes)
    assert 1.2 < ratio < 1.4
    few = gpu_parts.two_of_four(SIDE, SIDE).product(1)
    assert cost.dense(1, SIDE, SIDE) / cost.floor(few) > 1.6
    quarter = gpu_parts.flexhinm(SIDE, SIDE, 128).product(4096)
    assert 2 < cost.dense(4096, SIDE, SIDE) / cost.floor(quarter) < 3.5
