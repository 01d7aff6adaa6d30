"""Settings shared by all tests: deterministic properties, no hidden devices."""

import os

import hypothesis

# Tests compile much and compute little: compile quickly instead of well.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

hypothesis.settings.register_profile(
    "project",
    deadline=None,  # the first example pays for compilation
    derandomize=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("project")
