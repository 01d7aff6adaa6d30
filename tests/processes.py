"""Programs that run in two processes of one machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
