import errno
import os

import pytest

from flexhinm_jax.io import atomic


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
    with pytest.raises(FileExistsError, match="--force"):
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
