import pytest

from tests.processes import run_checks, run_pair

NAMES = (
    "automatic_data_parallel",
    "automatic_tensor_parallel",
    "explicit_data_parallel",
    "explicit_tensor_parallel",
    "pmap",
    "shard_map_whether_it_checks_or_not",
    "gradual_resumes_on_its_mesh",
    "masks_live_with_their_weights",
    "shards_that_split_the_pattern",
    "devices_and_batches_that_do_not_fit",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes():
    """name -> what the check printed; one process for all of them."""
    return run_checks("tests.training.on_devices")


@pytest.mark.parametrize("name", NAMES)
def test_devices_change_nothing(outcomes, name):
    assert outcomes[name].split()[0] == "ok", outcomes[name]


def test_every_check_is_listed(outcomes):
    assert set(outcomes) == set(NAMES)


def test_two_processes_agree_with_one():
    run_pair("tests.training.two_processes")
