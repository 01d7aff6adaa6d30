"""The transforms give the same numbers on a mesh of eight devices as on one."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.processes import run_pair

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
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
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    command = [sys.executable, "-m", "tests.tracing.on_mesh"]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )
    parts = ("\n" + done.stdout).split("\n@")
    found = {part.split()[1]: part for part in parts if len(part.split()) > 1}
    assert found, done.stderr
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_changes_no_number(outcomes, name):
    assert outcomes[name].split()[0] == "ok", outcomes[name]


def test_every_check_is_listed(outcomes):
    assert set(outcomes) == set(NAMES)


def test_two_processes_choose_the_masks_of_one():
    run_pair("tests.tracing.two_processes")
