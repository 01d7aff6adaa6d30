"""The check that a kernel must pass on a GPU, with the CPU in the place of the GPU."""

import json
import signal
import sys
import types

import jax
import numpy as np
import pytest

from flexhinm_jax.gpu import registry, selfcheck
from flexhinm_jax.kernels import reference
from flexhinm_jax.kernels.packing import unpack


def checked(run) -> str:
    """What the check of a kernel says whose product is `run`."""
    kernel = registry.KERNELS["wgmma_sp"]
    any_cut = lambda x, packed, dtype, cut=None: run(x, packed, dtype)  # noqa: E731
    device = jax.devices("cpu")[0]
    cases = kernel.cases[:2]
    why = selfcheck.check(kernel.name, reference.prepare, any_cut, cases, device)
    return "right" if why is None else why


def off_by_one(x, packed, dtype):
    return reference.matmul(x, packed, dtype).at[-1, -1].add(1)


def broken(x, packed, dtype):
    raise NotImplementedError("no such instruction")


def test_a_kernel_that_is_right_passes():
    assert checked(reference.matmul) == "right"


def test_one_wrong_element_is_found_and_its_case_named():
    assert "wrong result" in checked(off_by_one) and "rows=72" in checked(off_by_one)


def test_a_kernel_that_does_not_compile_is_refused_with_its_error():
    assert "no such instruction" in checked(broken)


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Puts Python code in the place of the process that checks; counts its starts."""
    starts = tmp_path / "starts"
    monkeypatch.setattr(selfcheck, "first_gpu", lambda: jax.devices("cpu")[0])
    monkeypatch.setenv(selfcheck.FOLDER, str(tmp_path / "checks"))

    def set_code(code):
        count = f"open({str(starts)!r}, 'a').write('x')"
        command = [sys.executable, "-c", f"{count}\n{code}"]
        monkeypatch.setattr(selfcheck, "command", lambda _: command)

        def again():  # as another process would ask
            selfcheck.failure.cache_clear()
            return selfcheck.failure("some.kernel")

        return again, lambda: len(starts.read_text())

    yield set_code
    selfcheck.failure.cache_clear()


RIGHT = "print('hello'); print('{\"why\": null}')"
WRONG = 'print(\'{"why": "it gave a wrong result"}\')'


def test_a_verdict_is_kept_for_the_next_process(child):
    ask, starts = child(RIGHT)
    assert ask() is None and ask() is None and starts() == 1


def test_a_kept_refusal_says_where_it_is(child, tmp_path):
    ask, starts = child(WRONG)
    assert "it gave a wrong result; kept in" in str(ask())
    assert ask() == "it gave a wrong result" and starts() == 1
    [path] = (tmp_path / "checks").iterdir()
    path.unlink()
    ask()
    assert starts() == 2


def test_another_jax_driver_or_kernel_is_checked_again(child, monkeypatch):
    ask, starts = child(RIGHT)
    ask()
    monkeypatch.setattr(jax, "__version__", "99.0")
    ask()
    assert starts() == 2


def test_a_verdict_is_for_one_gpu_driver_jax_package_and_source(monkeypatch, tmp_path):
    def of(kind="H200", driver="570"):
        client = types.SimpleNamespace(platform_version=driver)
        device = types.SimpleNamespace(device_kind=kind, client=client)
        return selfcheck.fingerprint(device)

    monkeypatch.setattr(selfcheck, "DRIVER", tmp_path / "none")
    seen = [of(), of(kind="H100"), of(driver="580")]
    (tmp_path / "version").write_text("NVRM 580.65")
    monkeypatch.setattr(selfcheck, "DRIVER", tmp_path / "version")
    seen.append(of())
    monkeypatch.setattr(jax, "__version__", "99.0")
    seen.append(of())
    monkeypatch.setattr(selfcheck.metadata, "version", lambda name: "99.0")
    seen.append(of())
    monkeypatch.setattr(selfcheck, "__file__", str(tmp_path / "selfcheck.py"))
    seen.append(of())
    (tmp_path / "ptx.py").write_text("another kernel")
    seen.append(of())
    assert len(set(seen)) == len(seen) and of() == seen[-1]


def test_a_damaged_verdict_is_checked_again(child, tmp_path):
    ask, starts = child(RIGHT)
    ask()
    [path] = (tmp_path / "checks").iterdir()
    path.write_text("{")
    assert ask() is None and starts() == 2
    assert json.loads(path.read_text()) == {"why": None}


@pytest.mark.parametrize(
    "code, why",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "code -11"),
        ("raise SystemExit('no memory')", "no memory"),
        ("print('{}')", "it said nothing"),
    ],
)
def test_a_process_that_dies_refuses_the_kernel_and_is_tried_again(child, code, why):
    ask, starts = child(code)
    assert why in str(ask())
    ask()
    assert starts() == 2 and signal.SIGSEGV == 11


def test_a_process_that_hangs_is_ended_and_remembered(child, monkeypatch):
    ask, starts = child("import time; time.sleep(600)")
    run = selfcheck.run
    monkeypatch.setattr(selfcheck, "run", lambda command: run(command, seconds=1.5))
    assert "did not end within 1.5 s" in str(ask())
    ask()
    assert starts() == 1


def test_a_folder_that_cannot_be_written_costs_a_check_each_time(child, monkeypatch):
    ask, starts = child(RIGHT)
    monkeypatch.setenv(selfcheck.FOLDER, "/proc/none")
    assert ask() is None and ask() is None and starts() == 2


KERNEL = """
from flexhinm_jax.gpu.kernel import Kernel
from flexhinm_jax.gpu.selfcheck import Case
from flexhinm_jax.kernels import reference

def run(x, packed, dtype):
    return reference.matmul(x, packed, dtype).at[0, 0].add(ERROR)

KERNEL = Kernel("fake", reference.prepare, run, cases=(Case(1, 8, 0, 2, 3),))
"""


@pytest.mark.parametrize("error, why", [(0, "None"), (1, "wrong result")])
def test_the_process_checks_the_kernel_of_a_module(monkeypatch, tmp_path, error, why):
    (tmp_path / "some_kernel.py").write_text(KERNEL.replace("ERROR", str(error)))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert why in str(selfcheck.run(selfcheck.command("some_kernel")).why)


def test_without_a_gpu_nothing_is_checked(child, monkeypatch):
    ask, _ = child(WRONG)
    monkeypatch.setattr(selfcheck, "first_gpu", lambda: None)
    assert ask() is None


@pytest.mark.parametrize(
    "case", [case for k in registry.KERNELS.values() for case in k.cases], ids=str
)
def test_examples_are_what_they_claim(case):
    sizes = case.tiles, case.rows, case.dense, case.groups
    packed, w = selfcheck.example(
        np.random.default_rng(0), *sizes, case.dtype, case.plain
    )
    np.testing.assert_array_equal(np.asarray(unpack(packed), np.float32), w)
