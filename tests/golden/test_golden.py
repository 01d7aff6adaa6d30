"""That nothing moved: every program against what it gave before.

A snapshot proves no more than that. Two ways to compare:

- While refactoring, on the machine and with the jax that made the file, bit for bit:

      JAX_PLATFORMS=cpu python -m tests.golden.make        # at the commit before
      FLEXHINM_GOLDEN=bits python -m pytest tests/golden   # after every change

- Otherwise floats to a tolerance, because another CPU and another jax add in another
  order. Supports, orders and boundaries must be the same even so.
"""

import functools
import os

import numpy as np
import pytest

from tests.golden import make, programs

#: Of the largest entry. Float32 sums in another order differ by 1e-7 to 1e-6 of their
#: size; a regression on few tokens and a difference of two losses make up to 3e-4 of it
#: (measured: compiled without AVX and FMA). A lost term shows in the second digit.
TOLERANCE = 1e-3

BITS = os.environ.get("FLEXHINM_GOLDEN") == "bits"
PROGRAMS = programs.programs()
golden = functools.cache(make.load)


def assert_same(got: np.ndarray, want: np.ndarray, name: str) -> None:
    """Bools, integers and text exactly, floats as the environment asks."""
    assert (got.dtype.str, got.shape) == (want.dtype.str, want.shape), name
    if not np.issubdtype(want.dtype, np.floating):
        np.testing.assert_array_equal(got, want, name)
    elif not BITS:
        scale = np.abs(want, where=np.isfinite(want), out=np.zeros_like(want))
        atol = TOLERANCE * scale.max(initial=0.0)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)
    elif got.tobytes() != want.tobytes():
        np.testing.assert_array_equal(got, want, name)
        raise AssertionError(f"{name}: other signs of zeros, or other NaN")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if slow else [])
        for name, (_, slow) in PROGRAMS.items()
    ],
)
def test_a_program_gives_what_it_gave(name):
    got, want = PROGRAMS[name][0](), golden()[name]
    assert got.keys() == want.keys()
    for key in want:
        assert_same(got[key], want[key], f"{name}: {key}")


def test_the_file_has_every_program_and_no_other():
    assert golden().keys() == PROGRAMS.keys()
