"""Which program runs a product: the registry of backends and the choice among them.

A backend is a module with three functions.

    reason(x, packed, capability) -> str | None    why it cannot serve; None if it can
    matmul(x, packed, dtype) -> [N, o]             x [N, i] times the sparse core
    prepare(packed) -> pytree of arrays            layouts derived at pack time, once

The platform is chosen when a program is lowered, by `jax.lax.platform_dependent`. It
cannot see the compute capability of a chip, so that is read when the product is traced:
from `assume`, else from the abstract mesh, else from the first CUDA device.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from flexhinm_jax.types import PackedWeight

XLA = ("reference", "xla")
"""Backends that every platform has."""

Capability = tuple[int, int]

MISSING = "kernels.prepare"
"""What a reason contains when nothing but a prepared layout is missing."""

_assumed: contextvars.ContextVar[Capability | None] = contextvars.ContextVar(
    "flexhinm_jax_assumed_capability", default=None
)


@dataclasses.dataclass(frozen=True)
class Backend:
    """An entry of the registry; nothing is imported before `load`.

    Attributes:
      name: what `sparse_dot(backend=...)` calls it.
      module: dotted name of its module.
      majors: compute capability majors of the chips it serves.
      since: least version of jax.
    """

    name: str
    module: str
    majors: tuple[int, ...] = ()
    since: tuple[int, ...] = ()

    def load(self) -> Any:
        """The module with `reason`, `matmul` and `prepare`."""
        return importlib.import_module(self.module)


HERE = __name__.rpartition(".")[0]
PLAIN = {
    "reference": Backend("reference", f"{HERE}.reference"),
    "xla": Backend("xla", f"{HERE}.xla"),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The programs of one product; hashable, so part of the key of a trace.

    Attributes:
      default: backend of every platform but CUDA, and of CUDA if `cuda` is None.
      cuda: backend on CUDA devices, or None.
      forced: `default` or `cuda` runs whatever the platform is.
    """

    default: str
    cuda: str | None = None
    forced: bool = False


@contextlib.contextmanager
def assume(major: int, minor: int) -> Iterator[None]:
    """Traces products for a chip that need not be there.

    For compiling or exporting ahead of time on another machine. What is traced inside
    keeps the choice; JAX caches traces, so use it around functions not yet traced.

    Args:
      major: major number of the compute capability, 9 for Hopper.
      minor: minor number.
    """
    token = _assumed.set((major, minor))
    try:
        yield
    finally:
        _assumed.reset(token)


def capability() -> Capability | None:
    """Compute capability (major, minor) of the chip to trace for, or None."""
    if (given := _assumed.get()) is not None:
        return given
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    given = getattr(device, "compute_capability", None)
    return _numbers(given) if given else _first_device()


@functools.cache
def _first_device() -> Capability | None:
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return None
    return _numbers(device.compute_capability)


def _numbers(text: str) -> Capability:
    major, _, minor = str(text).partition(".")
    return int(major), int(minor or 0)


def registry() -> dict[str, Backend]:
    """All backends by name."""
    from flexhinm_jax.gpu import backends  # imports this module

    return PLAIN | backends.BACKENDS


def choose(
    name: str, x: jax.ShapeDtypeStruct, packed: PackedWeight, *, transposed: bool
) -> Choice:
    """Finds the programs of one product.

    Args:
      name: "auto", "gpu" or the name of a backend.
      x: the input as [N, i], in the dtype of the computation.
      packed: one packed matrix.
      transposed: multiply with W instead of W^T.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: a forced backend cannot serve; says why.
    """
    known = registry()
    if name not in known and name not in ("auto", "gpu"):
        raise ValueError(
            f"backend={name!r} is unknown; choose one of auto, gpu, {', '.join(known)}"
        )
    if name in XLA:
        return Choice(name, forced=True)
    chip = capability()
    if name == "auto" and (chip is None or transposed):
        return Choice("xla")
    if name in ("auto", "gpu"):
        from flexhinm_jax.gpu import backends

        names = backends.ranked(x, packed, chip) if chip else ()
    else:
        names = (name,)
    reasons = {}
    for candidate in names:
        why = refusal(known[candidate], x, packed, chip, transposed)
        if why is None:
            if name == "auto":
                return Choice("xla", candidate)
            return Choice(candidate, candidate, forced=True)
        reasons[candidate] = why
    if name != "auto" or chip is None:
        raise NotImplementedError(_why(name, reasons, chip))
    _warn_once(chip, reasons)
    return Choice("xla")


def served(x: jax.ShapeDtypeStruct, packed: PackedWeight) -> tuple[str, ...]:
    """GPU backends that can serve a product here once their layout is prepared."""
    from flexhinm_jax.gpu import backends

    chip = capability()
    if chip is None:
        return ()
    known = registry()

    def able(name: str) -> bool:
        why = refusal(known[name], x, packed, chip, False)
        return why is None or MISSING in why

    return tuple(filter(able, backends.ranked(x, packed, chip)))


def refusal(
    backend: Backend,
    x: jax.ShapeDtypeStruct,
    packed: PackedWeight,
    chip: Capability | None,
    transposed: bool,
) -> str | None:
    """Why a GPU backend cannot run a product, or None if it can."""
    if transposed:
        return "it computes x @ W^T only, not the transposed product"
    if chip is None:
        return (
            "no NVIDIA GPU is visible; to trace for one that is elsewhere, use "
            "kernels.backends.assume(major, minor)"
        )
    return _unavailable(backend, chip) or backend.load().reason(x, packed, chip)


def _unavailable(backend: Backend, chip: Capability) -> str | None:
    version = tuple(jax.__version_info__)
    if version < backend.since:
        needed = ".".join(map(str, backend.since))
        return f"it needs jax {needed} or newer, this is {jax.__version__}"
    if chip[0] not in backend.majors:
        served = ", ".join(f"{m}.x" for m in backend.majors)
        return f"it serves compute capability {served}, this chip has {_dotted(chip)}"
    return None


def _dotted(chip: Capability) -> str:
    return f"{chip[0]}.{chip[1]}"


def _why(name: str, reasons: dict[str, str], chip: Capability | None) -> str:
    if name != "gpu":
        return f"backend={name!r} cannot run this product: {reasons[name]}"
    if not reasons:
        reasons = {
            "gpu": "no NVIDIA GPU is visible"
            if chip is None
            else f"no kernel for compute capability {_dotted(chip)}"
        }
    listed = "; ".join(f"{k}: {why}" for k, why in reasons.items())
    return f"backend='gpu' cannot run this product: {listed}"


def _warn_once(chip: Capability, reasons: dict[str, str]) -> None:
    """One warning per cause that lies in the machine, not in the product."""
    known = registry()
    if not reasons:
        cause = f"no kernel serves compute capability {_dotted(chip)}"
    else:
        machine = {
            name: why for name in reasons if (why := _unavailable(known[name], chip))
        }
        layout = {n: why for n, why in reasons.items() if MISSING in why}
        if len(machine | layout) < len(reasons):
            return
        cause = "; ".join(f"{k}: {why}" for k, why in reasons.items())
    _warn(cause)


@functools.cache
def _warn(cause: str) -> None:
    warnings.warn(
        f"products with packed weights run in plain XLA on this GPU: {cause}",
        stacklevel=6,
    )
