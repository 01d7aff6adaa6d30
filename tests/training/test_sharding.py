import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run_pair

ROOT = Path(__file__).parents[2]
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
NAMES = (
    "automatic_data_parallel",
    "automatic_tensor_parallel",
    "explicit_data_parallel",
    "explicit_tensor_parallel",
    "pmap",
    "gradual_resumes_on_its_mesh",
    "masks_live_with_their_weights",
    "shards_that_split_the_pattern",
    "devices_and_batches_that_do_not_fit",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes():
    """name -> what the check printed; one process for all of them."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    command = [sys.executable, "-m", "tests.training.on_devices"]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )
    parts = ("\n" + done.stdout).split("\n@")
    found = {part.split()[1]: part for part in parts if len(part.split()) > 1}
    assert found, done.stderr
    return found


@pytest.mark.parametrize("name", NAMES)
def test_devices_change_nothing(outcomes, name):
    assert outcomes[name].split()[0] == "ok", outcomes[name]


def test_every_check_is_listed(outcomes):
    assert set(outcomes) == set(NAMES)


def test_two_processes_agree_with_one():
    run_pair("tests.training.two_processes")
