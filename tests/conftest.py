"""Settings shared by all tests: deterministic properties, no hidden devices."""

import gc
import threading
import zlib
from pathlib import Path

import hypothesis
import jax
import pytest
from jax._src import compilation_cache
from jax._src.interpreters import mlir

hypothesis.settings.register_profile(
    "project",
    deadline=None,  # the first example pays for compilation
    derandomize=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("project")


@pytest.fixture
def owned(tmp_path):
    """A path whose lock another process holds, as far as a lock can tell."""
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".out.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write("process 123 on elsewhere\n")
        f.flush()
        yield tmp_path / "out"


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session):
    """Takes what was imported and collected out of the search for garbage.

    Lowering makes objects by the hundred thousand, few of them garbage in cycles.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


def share_contexts(make, uses: int):
    """Makes one MLIR context for so many programs of a thread.

    jax < 0.12 makes one, 5 ms, for each, and later ones for each ten. A context keeps
    the constants of its programs, so it is not kept for ever.
    """
    held = threading.local()

    def shared():
        calls = getattr(held, "calls", 0)
        if calls % uses == 0:
            held.context = make()
        held.calls = calls + 1
        return held.context

    return shared


if hasattr(mlir, "make_ir_context"):  # private
    mlir.make_ir_context = share_contexts(mlir.make_ir_context, 200)


def compressed(executable: bytes) -> bytes:
    """What is kept of a compiled program, read as jax's own zlib strings are."""
    return zlib.compress(executable, 1)


if getattr(compilation_cache, "zstd", 0) is getattr(compilation_cache, "zstandard", 1):
    # Private. Both are None: jax compresses with zlib, as hard as that can by default.
    compilation_cache.compress_executable = compressed


#: Every compiled CPU program takes some memory mappings; Linux allows a process 65530
#: and XLA dies of a segmentation fault beyond. A worker runs hundreds of tests.
MAPPINGS = 40_000


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Drops compiled programs between files when a worker has gathered too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()  # many are held by functions in cycles
