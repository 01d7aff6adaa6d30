"""The check that a kernel must pass on a GPU, with the CPU in the place of the GPU."""

import jax
import numpy as np
import pytest

from flexhinm_jax.gpu import selfcheck
from flexhinm_jax.kernels import reference
from flexhinm_jax.kernels.packing import unpack


class Backend:
    NAME = "wgmma_sp"
    prepare = staticmethod(reference.prepare)

    def __init__(self, matmul):
        self.matmul = matmul


def off_by_one(x, packed, dtype):
    return reference.matmul(x, packed, dtype).at[-1, -1].add(1)


def broken(x, packed, dtype):
    raise NotImplementedError("no such instruction")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(selfcheck, "first_gpu", lambda: jax.devices("cpu")[0])


def test_a_kernel_that_is_right_passes(gpu):
    assert selfcheck.failure(Backend(reference.matmul)) is None


def test_one_wrong_element_is_found(gpu):
    assert "wrong result" in selfcheck.failure(Backend(off_by_one))


def test_a_kernel_that_does_not_compile_is_refused_with_its_error(gpu):
    assert "no such instruction" in selfcheck.failure(Backend(broken))


def test_the_check_runs_while_a_product_is_traced(gpu):
    found = []

    @jax.jit
    def traced(x):
        found.append(selfcheck.failure(Backend(reference.matmul)))
        found.append(selfcheck.failure(Backend(off_by_one)))
        return x + 1

    traced(1.0)
    assert found[0] is None and "wrong result" in found[1]


def test_without_a_gpu_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(selfcheck, "first_gpu", lambda: None)
    assert selfcheck.failure(Backend(broken)) is None


@pytest.mark.parametrize("case", [case for c in selfcheck.CASES.values() for case in c])
def test_examples_are_what_they_claim(case):
    packed, w = selfcheck.example(np.random.default_rng(0), *case[:4])
    np.testing.assert_array_equal(np.asarray(unpack(packed), np.float32), w)
