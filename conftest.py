"""Environment of all tests and notebooks: programs compile quickly, and once.

Tests compile much and compute little, so XLA compiles quickly instead of well. What was
compiled is kept in .cache/xla, for the other workers, for programs that tests start,
and for the next run; where CI is set, every run is of a new clone, so it is kept in
~/.cache/flexhinm_jax/xla instead. JAX_COMPILATION_CACHE_DIR names another place.
Programs are found by their HLO, flags and version, not by paths, so nothing stale is.
"""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
]
if version("jaxlib").startswith("0.10."):
    # Takes half of the time that compiling takes; newer versions have no choice.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def cache() -> Path:
    """Folder of the compiled programs of this kind of processor."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    kind = f"{platform.machine()} {features[:1]}"
    digest = hashlib.sha256(kind.encode()).hexdigest()[:12]
    root = Path(__file__).parent / ".cache"
    if os.environ.get("CI"):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(home) / "flexhinm_jax"
    return root / "xla" / digest


os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
