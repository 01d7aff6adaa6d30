"""The transforms give the same numbers on a mesh of eight devices as on one."""

import pytest

from tests.processes import run_checks, run_pair

pytestmark = pytest.mark.slow

NAMES = (
    "pruning",
    "explicit_pruning",
    "steps_on_an_explicit_mesh",
    "explicit",
    "explicit_with_set_mesh",
    "explicit_with_sharded_weights",
    "masked_on_an_explicit_mesh",
    "explicit_convolution",
    "automatic",
    "shard_map",
    "shard_map_over_one_axis",
    "shard_map_with_branches",
    "shard_map_inside_scan",
    "shard_map_that_splits_weights",
    "shard_map_without_check_vma",
)


@pytest.fixture(scope="module")
def outcomes():
    """name -> what the check printed; one process for all of them."""
    return run_checks("tests.tracing.on_mesh")


@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_changes_no_number(outcomes, name):
    assert outcomes[name].split()[0] == "ok", outcomes[name]


def test_every_check_is_listed(outcomes):
    assert set(outcomes) == set(NAMES)


def test_two_processes_choose_the_masks_of_one():
    run_pair("tests.tracing.two_processes")
