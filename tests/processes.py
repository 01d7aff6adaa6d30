"""Programs that tests run in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_checks(module: str) -> dict[str, str]:
    """Runs `module` on eight fake devices: name of a check -> what it printed."""
    flags = "--xla_force_host_platform_device_count=8"
    flags += " --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=900,
    )
    parts = ("\n" + done.stdout).split("\n@")
    found = {part.split()[1]: part for part in parts if len(part.split()) > 1}
    assert found, done.stderr
    return found


def run_pair(module: str) -> None:
    """Runs `module` twice, with a free port and the rank as arguments.

    Both must end well and print "@ok".
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    pair = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(port), str(rank)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=600)[0] for p in pair]
    finally:
        for p in pair:
            p.kill()
    for p, text in zip(pair, outputs, strict=True):
        assert p.returncode == 0 and "@ok" in text, text
