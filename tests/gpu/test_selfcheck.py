"""The check that a kernel must pass on a GPU, with the CPU in the place of the GPU."""

from typing import Any

import jax
import numpy as np
import pytest

from flexhinm_jax.gpu import registry, selfcheck
from flexhinm_jax.kernels import reference
from flexhinm_jax.kernels.packing import unpack


def failure(run) -> Any:
    """What the check of a kernel says whose product is `run`."""
    kernel = registry.KERNELS["wgmma_sp"]
    any_cut = lambda x, packed, dtype, cut=None: run(x, packed, dtype)  # noqa: E731
    return selfcheck.failure(kernel.name, reference.prepare, any_cut, kernel.cases)


def off_by_one(x, packed, dtype):
    return reference.matmul(x, packed, dtype).at[-1, -1].add(1)


def broken(x, packed, dtype):
    raise NotImplementedError("no such instruction")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(selfcheck, "first_gpu", lambda: jax.devices("cpu")[0])


def test_a_kernel_that_is_right_passes(gpu):
    assert failure(reference.matmul) is None


def test_one_wrong_element_is_found(gpu):
    assert "wrong result" in failure(off_by_one)


def test_a_kernel_that_does_not_compile_is_refused_with_its_error(gpu):
    assert "no such instruction" in failure(broken)


def test_the_check_runs_while_a_product_is_traced(gpu):
    found = []

    @jax.jit
    def traced(x):
        found.append(failure(reference.matmul))
        found.append(failure(off_by_one))
        return x + 1

    traced(1.0)
    assert found[0] is None and "wrong result" in found[1]


def test_without_a_gpu_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(selfcheck, "first_gpu", lambda: None)
    assert failure(broken) is None


@pytest.mark.parametrize(
    "case", [case for k in registry.KERNELS.values() for case in k.cases], ids=str
)
def test_examples_are_what_they_claim(case):
    sizes = case.tiles, case.rows, case.dense, case.groups
    packed, w = selfcheck.example(np.random.default_rng(0), *sizes, case.dtype)
    np.testing.assert_array_equal(np.asarray(unpack(packed), np.float32), w)
