"""No kernel is trusted before it was right on the GPU at hand.

The kernels rest on instructions that only a GPU can check. So before one is used there
it runs small integers, whose products and sums are exact, and every bit is compared
with the host. It runs in a process of its own: an illegal address ends every later
program of a process, and a barrier that never opens would stop the first product. The
verdict is kept on disk, for this GPU, driver, jax and version of the package.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexhinm_jax import atomic
from flexhinm_jax.gpu import support
from flexhinm_jax.types import PackedWeight

SECONDS = 300
"""Of a check; most of it goes into compiling its cases."""

DRIVER = Path("/proc/driver/nvidia/version")
"""Tells the version of the driver."""

FOLDER = "FLEXHINM_GPU_CHECKS"
"""Environment variable: where verdicts are kept."""


class Case(NamedTuple):
    """One product to check.

    Attributes:
      tiles: row tiles.
      rows: rows of a tile.
      dense: dense columns of a tile.
      groups: 2:4 groups of a tile; 32 of them are one step of the pipeline.
      tokens: rows of x.
      dtype: of values and activations.
      cut: how to cut it, an argument of the product; None lets the kernel choose.
      plain: columns are in their own order.
    """

    tiles: int
    rows: int
    dense: int
    groups: int
    tokens: int
    dtype: str = "bfloat16"
    cut: Any = None
    plain: bool = False


class Verdict(NamedTuple):
    """What a check said.

    Attributes:
      why: the kernel must not be used, or None if it was right.
      lasting: the check came to an end of its own: the same would happen again.
    """

    why: str | None
    lasting: bool = True


@functools.cache
def failure(module: str) -> str | None:
    """Why a kernel must not run on the GPU at hand, or None if it was right.

    Args:
      module: defines the kernel, as KERNEL.

    Returns:
      None also where there is no GPU: nothing is going to run then.
    """
    device = first_gpu()
    if device is None or support.interpreting():
        return None
    path = place(module, device)
    try:
        return json.loads(path.read_text())["why"]
    except (OSError, ValueError, KeyError):
        pass
    why, lasting = run(command(module))
    if not lasting or not keep(path, why):
        return why
    return why and f"{why}; kept in {path}, delete it to check again"


def first_gpu() -> Any:
    """The first CUDA device, or None."""
    try:
        return jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None


def place(module: str, device: Any) -> Path:
    """Where the verdict on a kernel is kept."""
    return folder() / f"{module.rpartition('.')[2]}-{fingerprint(device)}.json"


def folder() -> Path:
    """Where verdicts are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER) or Path(cache) / "flexhinm" / "gpu")


def fingerprint(device: Any) -> str:
    """Of what a verdict depends on: GPU, driver, versions, sources of the kernels."""
    try:
        driver = DRIVER.read_text()
    except OSError:
        driver = str(getattr(device.client, "platform_version", ""))
    parts = [device.device_kind, driver, jax.__version__, _version()]
    sources = sorted(Path(__file__).parent.glob("*.py"))
    parts += [source.read_text() for source in sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _version() -> str:
    """Of this package, if it is installed."""
    try:
        return metadata.version("flexhinm-jax")
    except metadata.PackageNotFoundError:
        return ""


def command(module: str) -> list[str]:
    """Checks the kernel of a module and prints the verdict as the last line."""
    return [sys.executable, "-m", "flexhinm_jax.gpu.selfcheck", module]


def run(command: list[str], seconds: float = SECONDS) -> Verdict:
    """The verdict of a process, or what became of it.

    Args:
      command: prints {"why": ...} as its last line.
      seconds: after which it is ended.
    """
    # The parent may hold most of the memory of the GPU.
    settings = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            env=settings,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Verdict(f"its check on this GPU did not end within {seconds:g} s")
    except OSError as error:
        return Verdict(f"its check did not start: {error}", lasting=False)
    try:
        return Verdict(json.loads(done.stdout.splitlines()[-1])["why"])
    except (IndexError, ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
        why = f"its check on this GPU ended with code {done.returncode}: {last}"
        return Verdict(why, lasting=False)


def keep(path: Path, why: str | None) -> bool:
    """Writes a verdict whole; False where that is not possible."""
    try:
        with atomic.file(path, overwrite=True) as file:
            file.write_text(json.dumps({"why": why}))
    except OSError:
        return False
    return True


def check(
    name: str, prepare: Callable, run: Callable, cases: tuple[Case, ...], device: Any
) -> str | None:
    """Why a kernel is wrong on a device, in this process, or None.

    Args:
      name: of its layout.
      prepare: makes its layout from known values.
      run: its product.
      cases: products to check.
      device: to run them on.
    """
    rng = np.random.default_rng(0)
    try:
        with jax.default_device(device):
            wrong = next(
                (c for c in cases if not right(name, prepare, run, rng, c)), None
            )
    except Exception as error:  # whatever it is, the kernel cannot be used
        text = str(error).partition("\n")[0][:200]
        return f"its check on this GPU failed: {type(error).__name__}: {text}"
    return wrong and f"it gave a wrong result in its check on this GPU: {wrong}"


def right(name: str, prepare: Callable, run: Callable, rng: Any, case: Case) -> bool:
    """Whether one product of random integers is exact."""
    packed, w = example(rng, *case[:4], dtype=case.dtype, plain=case.plain)
    x = rng.integers(-2, 3, (case.tokens, w.shape[1])).astype(np.float32)
    packed = dataclasses.replace(packed, layouts={name: prepare(packed)})
    forced = {} if case.cut is None else {"cut": case.cut}
    product = jax.jit(
        lambda x, packed: run(x, packed, jnp.dtype(jnp.float32), **forced)
    )
    y = product(jnp.asarray(x, case.dtype), packed)
    return np.array_equal(np.asarray(y), x @ w.T)


def example(
    rng: np.random.Generator,
    t: int,
    v: int,
    dense: int,
    groups: int,
    dtype: str = "bfloat16",
    plain: bool = False,
) -> tuple[PackedWeight, np.ndarray]:
    """A packed weight of small integers, and the same matrix dense.

    Args:
      rng: host generator.
      t: tiles.
      v: rows of a tile.
      dense: dense columns of a tile.
      groups: 2:4 groups of a tile.
      dtype: of the values.
      plain: all columns in their own order; else in any order, and four are not read.
    """
    spare = 0 if plain else 4
    inputs = dense + 4 * groups + spare
    first = rng.integers(0, 3, (t, v, groups))
    second = first + 1 + rng.integers(0, 3 - first)
    nibbles = np.zeros((t, v, -(-groups // 8) * 8), np.uint32)
    nibbles[..., :groups] = first | second << 2
    shift = 4 * np.arange(8, dtype=np.uint32)
    words = (nibbles.reshape(t, v, -1, 8) << shift).sum(-1, dtype=np.uint32)
    order = np.arange if plain else rng.permutation
    columns = np.stack([order(inputs)[: inputs - spare] for _ in range(t)])
    order = rng.permutation(t * v)
    values = rng.integers(-2, 3, (t, v, dense + 2 * groups)).astype(np.float32)
    w = np.zeros((t * v, inputs), np.float32)
    kept = np.stack([first, second], -1) + 4 * np.arange(groups)[:, None]
    for tile in range(t):
        rows = order[tile * v : tile * v + v][:, None]
        w[rows, columns[tile, :dense]] = values[tile, :, :dense]
        four = columns[tile, dense:][kept[tile].reshape(v, -1)]
        w[rows, four] = values[tile, :, dense:]
    i32 = lambda a: jnp.asarray(a, jnp.int32)  # noqa: E731
    packed = PackedWeight(
        dense_index=i32(columns[:, :dense]),
        dense_values=jnp.asarray(values[..., :dense], dtype),
        nm_index=i32(columns[:, dense:]),
        nm_values=jnp.asarray(values[..., dense:], dtype),
        nm_positions=jnp.asarray(words),
        out_order=i32(order),
        left=None,
        right=None,
        shape=(t * v, inputs),
        n=2,
        m=4,
    )
    return packed, w


def main() -> None:
    """Checks the kernel of the module that is named, prints the verdict."""
    kernel = importlib.import_module(sys.argv[1]).KERNEL
    device = first_gpu() or jax.devices()[0]
    why = check(kernel.name, kernel.layout, kernel.run, kernel.cases, device)
    sys.stdout.write(json.dumps({"why": why}) + "\n")


if __name__ == "__main__":
    main()
