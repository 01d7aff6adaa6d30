import contextlib
import errno
import os
import subprocess
import sys

import pytest

from flexhinm_jax import atomic

fcntl = pytest.importorskip("fcntl")


def disk_full():
    return OSError(errno.ENOSPC, "No space left on device")


def test_a_file_appears_only_when_its_writer_is_done(tmp_path):
    target = tmp_path / "out.txt"
    with atomic.file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert os.listdir(tmp_path) == ["out.txt"]


def test_a_failing_file_writer_leaves_nothing_behind(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        with atomic.file(tmp_path / "a" / "b" / "out.txt") as temporary:
            temporary.write_text("ha")
            raise disk_full()
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with atomic.directory(tmp_path / "out") as temporary:
            (temporary / "half").write_text("ha")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_an_existing_file_is_kept_unless_overwriting(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        with atomic.file(target):
            raise AssertionError("must not be reached")
    with pytest.raises(OSError, match="No space left"):
        with atomic.file(target, overwrite=True):
            raise disk_full()
    assert target.read_text() == "old"
    with atomic.file(target, overwrite=True) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.txt"]


def test_a_directory_does_not_replace_a_file_nor_a_file_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match="is a file"):
        with atomic.directory(tmp_path / "file", overwrite=True):
            pass
    with pytest.raises(FileExistsError, match="is a directory"):
        with atomic.file(tmp_path / "folder", overwrite=True):
            pass


def test_an_existing_directory_is_replaced_only_when_it_is_an_output(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        with atomic.directory(target):
            pass
    with pytest.raises(FileExistsError, match="not an earlier output"):
        with atomic.directory(target, overwrite=True):
            pass
    assert (target / "thesis.tex").exists()
    (target / "config.json").write_text("{}")
    with atomic.directory(target, overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_may_be_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic.directory(tmp_path / "out", overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert os.listdir(tmp_path / "out") == ["new"]


def test_the_old_directory_returns_when_the_last_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename = os.rename

    def failing(source, destination):
        if ".tmp-" in str(source):
            raise disk_full()
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        with atomic.directory(target, overwrite=True) as temporary:
            (temporary / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_process_is_told_who_writes(owned):
    with (
        pytest.raises(atomic.InUse, match="out is being written by process 123 on els"),
        atomic.locked(owned),
    ):
        raise AssertionError("both have the lock")
    with (
        pytest.raises(atomic.InUse, match="written by process 123"),
        atomic.directory(owned),
    ):
        raise AssertionError("both write")
    assert (owned.parent / ".out.lock").exists()  # it is not ours to remove
    assert not owned.exists()


def test_a_lock_names_its_process_and_goes_with_it(tmp_path):
    target = tmp_path / "new" / "out"
    with atomic.locked(target), atomic.locked(target):  # of one process: nested
        text = (tmp_path / "new" / ".out.lock").read_text()
        assert text.startswith(f"process {os.getpid()} on ")
        with pytest.raises(BlockingIOError), open(tmp_path / "new" / ".out.lock") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert list(tmp_path.iterdir()) == []
    with contextlib.suppress(ZeroDivisionError), atomic.locked(target):
        target.mkdir()
        raise ZeroDivisionError
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def test_a_file_that_is_no_lock_is_not_taken_for_one(tmp_path):
    (tmp_path / ".out.lock").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"\.out\.lock is no lock of this library"
    ):
        with atomic.locked(tmp_path / "out"):
            raise AssertionError("must not be reached")
    assert (tmp_path / ".out.lock").read_text() == "mine"


def test_what_a_process_that_was_killed_left_is_removed_by_the_next(tmp_path):
    stay = [
        "out2.tmp-0123abcd",
        ".out2.tmp-0123abcd",
        ".out.old-0123abcd",
        ".out.tmp-x",
    ]
    for name in (*stay, ".out.tmp-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("ha")
    with atomic.directory(tmp_path / "out") as temporary:
        (temporary / "config.json").write_text("whole")
    # What was put aside is an earlier output, the only one while there is no other.
    assert sorted(os.listdir(tmp_path)) == sorted(["out", *stay])
    with atomic.locked(tmp_path / "out"):
        stay.remove(".out.old-0123abcd")
        assert sorted(os.listdir(tmp_path)) == sorted(["out", ".out.lock", *stay])


def test_a_file_system_without_locks_is_not_swept(tmp_path, monkeypatch):
    def flock(handle, how):
        raise disk_full()

    (tmp_path / ".out.tmp-0123abcd").mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic.locked(tmp_path / "out"):
        assert (tmp_path / ".out.tmp-0123abcd").exists()


def test_a_lock_ends_with_a_process_that_was_killed(tmp_path):
    code = (
        "import sys; from flexhinm_jax import atomic\n"
        "with atomic.locked(sys.argv[1]): print(1, flush=True); sys.stdin.read()"
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    with (
        pytest.raises(atomic.InUse, match=f"written by process {process.pid} on"),
        atomic.locked(out),
    ):
        raise AssertionError("both have the lock")
    process.kill()
    process.communicate()
    assert (tmp_path / ".out.lock").exists()
    with atomic.locked(out):
        pass
    assert list(tmp_path.iterdir()) == []
