import dataclasses
import errno
import os
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flexhinm_jax.io import checkpoints
from flexhinm_jax.types import BlockDiagonal, PackedWeight, Regions, State


@dataclasses.dataclass(frozen=True)
class Pattern:
    n: int = 2
    m: int = 4


@dataclasses.dataclass(frozen=True)
class Method:
    pattern: Pattern = Pattern()
    damp: float = 0.01
    rules: tuple = ("a", None)


class Pair(NamedTuple):
    left: object
    right: object


def regions(n=2, scale=1):
    return Regions(
        out_order=jnp.arange(4, dtype=jnp.int32) * scale,
        in_order=jnp.arange(8, dtype=jnp.int32)[None] * scale,
        dense_end=jnp.array([0], jnp.int32),
        nm_end=jnp.array([8], jnp.int32) * scale,
        n=n,
        m=4,
    )


def packed(scale=1, m=4):
    return PackedWeight(
        dense_index=jnp.zeros((1, 0), jnp.int32),
        dense_values=jnp.zeros((1, 4, 0), jnp.bfloat16),
        nm_index=jnp.arange(8, dtype=jnp.int32)[None] * scale,
        nm_values=jnp.ones((1, 4, 4), jnp.bfloat16) * scale,
        nm_positions=jnp.full((1, 4, 1), 0x44 * scale, jnp.uint32),
        out_order=jnp.arange(4, dtype=jnp.int32) * scale,
        left=BlockDiagonal(jnp.ones((2, 2, 2), jnp.float32) * scale),
        right=None,
        shape=(4, 8),
        n=2,
        m=m,
    )


def tree(scale=1):
    return {
        "params": {"w": packed(scale), "b": jnp.ones(3, jnp.bfloat16) * scale},
        "states": [
            State(learned=(), fixed=(regions(scale=scale), jnp.ones(2, bool))),
            None,
        ],
        "pair": Pair(jnp.float32(2.5) * scale, np.arange(3, dtype=np.int64) * scale),
        "key": jax.random.key(scale),
        "step": 7 * scale,
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert getattr(x, "dtype", type(x)) == getattr(y, "dtype", type(y))
        if getattr(x, "dtype", None) == jax.random.key(0).dtype:
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def saved(tmp_path):
    return checkpoints.save(tmp_path / "step_1", tree(), Method())


def test_a_tree_comes_back_bit_for_bit_with_its_static_fields(saved):
    back = checkpoints.restore(saved, tree(scale=0), Method())
    assert_same(back, tree())
    assert back["states"][0].fixed[0].n == 2
    assert back["params"]["w"].shape == (4, 8)


def test_an_abstract_tree_is_enough(tmp_path):
    arrays = {"w": packed(), "r": regions()}
    checkpoints.save(tmp_path / "a", arrays)
    back = checkpoints.restore(tmp_path / "a", jax.eval_shape(lambda: arrays))
    assert_same(back, arrays)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(back))


def test_leaves_return_to_the_sharding_of_the_target(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    checkpoints.save(tmp_path / "a", {"w": jnp.arange(4.0)})
    like = {"w": jax.device_put(jnp.zeros(4), sharding)}
    assert checkpoints.restore(tmp_path / "a", like)["w"].sharding == sharding


def test_the_configuration_is_stored_by_name(saved):
    assert checkpoints.read_config(saved) == {
        "name": "Method",
        "pattern": {"name": "Pattern", "n": 2, "m": 4},
        "damp": 0.01,
        "rules": ["a", None],
    }


def test_another_configuration_is_refused_field_by_field(saved):
    other = Method(Pattern(n=1), damp=0.1)
    with pytest.raises(ValueError) as error:
        checkpoints.restore(saved, tree(), other)
    assert "pattern.n: saved 2, now 1" in str(error.value)
    assert "damp: saved 0.01, now 0.1" in str(error.value)
    assert "rules" not in str(error.value)


def test_a_missing_configuration_is_a_difference(saved):
    with pytest.raises(ValueError, match='saved {"name": "Method"'):
        checkpoints.restore(saved, tree())


def test_other_static_fields_are_refused(saved):
    like = tree()
    like["states"][0] = State((), (regions(n=3), jnp.ones(2, bool)))
    like["params"]["w"] = packed(m=8)
    with pytest.raises(ValueError) as error:
        checkpoints.restore(saved, like, Method())
    assert "states/0/fixed/0.n: saved 2, now 3" in str(error.value)
    assert "params/w.m: saved 4, now 8" in str(error.value)


def test_other_shapes_dtypes_and_leaves_are_named(saved):
    like = tree()
    like["params"]["b"] = jnp.ones(4, jnp.bfloat16)
    like["step"] = 7.0
    like["new"] = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError) as error:
        checkpoints.restore(saved, like, Method())
    text = str(error.value)
    assert 'params/b: saved "bfloat16[3]", now "bfloat16[4]"' in text
    assert 'step: saved "int", now "float"' in text
    assert 'new: not saved, now "int32[1]"' in text


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no checkpoint"):
        checkpoints.restore(tmp_path / "nowhere", tree(), Method())


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"config": 1}'])
def test_a_damaged_config_is_named(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        checkpoints.restore(saved, tree(), Method())


def test_damaged_arrays_are_named(tmp_path):
    like = {"w": jnp.arange(1000.0)}
    saved = checkpoints.save(tmp_path / "a", like)
    for path in (saved / "arrays").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="a: the arrays are damaged"):
        checkpoints.restore(saved, like)


def test_an_existing_checkpoint_is_kept_unless_overwriting(saved):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        checkpoints.save(saved, tree(2), Method())
    assert_same(checkpoints.restore(saved, tree(0), Method()), tree())
    checkpoints.save(saved, tree(2), Method(), overwrite=True)
    assert_same(checkpoints.restore(saved, tree(0), Method()), tree(2))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # What orbax raised on a full disk.
        ValueError(
            'RESOURCE_EXHAUSTED: Error writing "w/0" in OCDBT database: Failed to write'
            " 420964 bytes to file 14: No space left on device [os_error_code='28']"
        ),
    ],
)
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def failing(self, directory, args):
        directory.mkdir()
        (directory / "half").write_text("")
        raise error

    monkeypatch.setattr(ocp.Checkpointer, "save", failing)
    with pytest.raises(OSError, match="No space left") as raised:
        checkpoints.save(tmp_path / "a", tree())
    assert raised.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_configuration_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds a ArrayImpl"):
        checkpoints.save(tmp_path / "a", tree(), {"w": jnp.zeros(1)})
    assert os.listdir(tmp_path) == []


TWO_PROCESSES = """
    import sys
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    from flexhinm_jax.io import checkpoints
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "d"), PartitionSpec("d"))
    local = np.arange(2, dtype=np.float32) + 2 * rank
    w = jax.make_array_from_process_local_data(sharding, local)
    checkpoints.save(folder + "/a", {"w": w}, {"lr": 1.0})
    try:
        checkpoints.save(folder + "/a", {"w": w}, {"lr": 1.0})
    except OSError:
        refused = True
    back = checkpoints.restore(folder + "/a", {"w": w * 0}, {"lr": 1.0})["w"]
    assert refused and back.sharding == sharding
    shards = np.concatenate([s.data for s in back.addressable_shards])
    np.testing.assert_array_equal(shards, local)
    jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    script = textwrap.dedent(TWO_PROCESSES)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), port, str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    assert os.listdir(tmp_path) == ["a"]


def numbers(step):
    return {"w": jnp.full((3,), step, jnp.float32), "done": step}


def abstract(step):
    return numbers(0) | {"done": 0}


CONFIG = {"rate": 0.1, "method": Method()}


@pytest.fixture
def run(tmp_path):
    """The folder of a run with checkpoints at steps 2, 4 and 10."""
    saves = checkpoints.Checkpoints(tmp_path / "run", every=2, keep=3)
    assert saves.paths() == [] and saves.load(abstract, CONFIG) is None
    for step in (2, 4, 10):
        assert saves.due(step) and not saves.due(step + 1)
        saves.save(step, numbers(step), CONFIG)
    return tmp_path / "run"


def test_the_newest_checkpoints_stay_and_the_last_one_comes_back(run):
    saves = checkpoints.Checkpoints(run, keep=2, resume=True)
    step, tree = saves.load(abstract, CONFIG)
    assert step == 10
    assert_same(tree, numbers(10))
    saves.save(12, numbers(12), CONFIG)
    assert [p.name for p in saves.paths()] == ["step-00000010", "step-00000012"]
    saves.save(12, numbers(13), CONFIG)
    assert saves.load(abstract, CONFIG)[1]["done"] == 13


def test_the_tree_to_restore_into_is_asked_for_by_step(run):
    asked = []

    def like(step):
        asked.append(step)
        return abstract(step)

    checkpoints.Checkpoints(run, resume="auto").load(like, CONFIG)
    assert asked == [10]


def test_a_run_says_whether_it_begins_or_goes_on(run, tmp_path):
    with pytest.raises(FileExistsError, match="holds 3 checkpoints, the newest step-0"):
        checkpoints.Checkpoints(run).load(abstract, CONFIG)
    nowhere = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        checkpoints.Checkpoints(nowhere, resume=True).load(abstract, CONFIG)
    for resume in ("auto", "older"):
        saves = checkpoints.Checkpoints(nowhere, resume=resume)
        assert saves.load(abstract, CONFIG) is None
    with pytest.raises(ValueError, match="resume='yes': choose False, True, 'auto'"):
        checkpoints.Checkpoints(run, resume="yes")
    with pytest.raises(ValueError, match="checkpoints: keep"):
        checkpoints.Checkpoints(run, keep=0)
    with pytest.raises(ValueError, match="checkpoints: every"):
        checkpoints.Checkpoints(run, every=0)


def test_a_folder_that_only_has_the_name_of_a_checkpoint_stays(run):
    (run / "step-1").mkdir()
    (run / "step-1" / "notes.txt").write_text("mine")
    saves = checkpoints.Checkpoints(run, keep=1, resume="auto")
    saves.save(12, {"w": jnp.zeros(1, jnp.float32)}, CONFIG)
    assert [p.name for p in saves.paths()] == ["step-1", "step-00000012"]


@pytest.mark.parametrize("lost", ["arrays", "config", "text"])
def test_a_damaged_checkpoint_is_named_and_an_older_one_serves(run, lost):
    newest = run / "step-00000010"
    if lost == "arrays":
        (newest / checkpoints.ARRAYS / "manifest.ocdbt").unlink()
    elif lost == "config":
        (newest / checkpoints.CONFIG).unlink()
    else:
        (newest / checkpoints.CONFIG).write_text("{")
    with pytest.raises(checkpoints.Damaged, match=r"(?s)step-00000010.*step-00000004"):
        checkpoints.Checkpoints(run, resume=True).load(abstract, CONFIG)
    older = checkpoints.Checkpoints(run, resume="older")
    assert older.load(abstract, CONFIG)[0] == 4
    for path in older.paths():
        (path / checkpoints.CONFIG).unlink(missing_ok=True)
    with pytest.raises(checkpoints.Damaged, match="all 3 checkpoints are damaged"):
        older.load(abstract, CONFIG)


def test_another_run_and_another_version_are_refused_by_name(run):
    older = checkpoints.Checkpoints(run, resume="older")
    with pytest.raises(ValueError, match=r"method.damp: saved 0.01, now 0.5"):
        older.load(abstract, CONFIG | {"method": Method(damp=0.5)})
    checkpoints.save(run / "step-00000011", numbers(11), CONFIG)
    with pytest.raises(ValueError, match="step-00000011 was begun by another version"):
        older.load(abstract, CONFIG)


def test_checkpoints_are_due_by_the_clock_too(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    saves = checkpoints.Checkpoints(tmp_path, every=None, seconds=60.0)
    assert not saves.due(1)
    now = 161.0
    assert saves.due(2)
    saves.save(2, numbers(2), None)
    assert not saves.due(3)
