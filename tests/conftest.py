"""Settings shared by all tests: deterministic properties, no hidden devices."""

import hypothesis

hypothesis.settings.register_profile(
    "project",
    deadline=None,  # the first example pays for compilation
    derandomize=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("project")
