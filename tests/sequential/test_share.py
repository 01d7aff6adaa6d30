"""Sums over the batches of several processes are those of one, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from flexhinm_jax.sequential.share import Share

ROOT = Path(__file__).parents[2]


def test_every_batch_belongs_to_one_process():
    for batches in (3, 4, 7):
        shares = [Share(batches, n, 3) for n in range(3)]
        assert sorted(n for s in shares for n in s.numbers) == list(range(batches))
        assert max(len(s.numbers) for s in shares) == -(-batches // 3)
        assert [s.writes for s in shares] == [True, False, False]


def test_one_process_adds_its_batches_in_order():
    def add(sums, batch):
        return (sums or 0) * 10 + batch

    assert Share(3).sums(add, [1, 2, 3]) == 123
    assert Share(3).said(5) == [5] and Share(3).agreed(5) == 5


def test_pieces_are_added_in_the_order_of_the_batches():
    flags = "--xla_force_host_platform_device_count=3"
    done = subprocess.run(
        [sys.executable, "-m", "tests.sequential.on_devices"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and "@ok" in done.stdout, done.stderr


def test_more_processes_than_batches_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="4 processes for 3 batches"):
        Share.here(3)


def test_what_several_processes_cannot_share_is_refused():
    Share(3).alone("reconstruct")
    with pytest.raises(ValueError, match="^reconstruct goes through the batches"):
        Share(3, 0, 2).alone("reconstruct")
