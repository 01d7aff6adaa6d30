"""Which program runs a product: the choice among the kernels of a platform.

The platform is known when a program is lowered: GPUs without a kernel for a product
multiply with the matrix that the weight holds, else with one that they write out
(`dense`), everything else runs `xla`. Lowering cannot see the compute
capability of a chip, so that is read when the product is traced: from `assume`, else
from the abstract mesh, else from the first CUDA device.

"auto" takes a kernel that has never run on a GPU only where the environment asks for it
(`OPT_IN`), and only for as many tokens as it is predicted to be faster than the dense
product (`gpu.cost`), with the matrix that the weight holds or expanded for it.
"""

import contextlib
import contextvars
import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator

import jax

from flexhinm_jax.gpu import cost, registry
from flexhinm_jax.gpu.kernel import Capability, Cause, Kernel, Refusal
from flexhinm_jax.kernels import dense, reference, xla
from flexhinm_jax.types import PackedWeight

PLAIN: dict[str, Kernel] = {
    "reference": Kernel("reference", reference.prepare, reference.matmul),
    "xla": Kernel("xla", xla.prepare, xla.matmul),
    "dense": Kernel("dense", dense.prepare, dense.matmul),
}
"""What every platform runs."""

OPT_IN = "FLEXHINM_GPU_KERNELS"
"""Environment variable: "1" lets "auto" take GPU kernels."""

_assumed: contextvars.ContextVar[Capability | None] = contextvars.ContextVar(
    "flexhinm_jax_assumed_capability", default=None
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The programs of one product; hashable, so part of the key of a trace.

    Attributes:
      default: backend of every platform; "xla" expands the weight on GPUs.
      cuda: kernel that runs instead on CUDA devices, or None.
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

    Yields:
      None; the choice is made while the context is open.
    """
    token = _assumed.set((major, minor))
    try:
        yield
    finally:
        _assumed.reset(token)


def capability() -> Capability | None:
    """Compute capability (major, minor) of the chip to trace for, or None."""
    if (chip := _assumed.get()) is not None:
        return chip
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    chip = getattr(device, "compute_capability", None)
    return _numbers(chip) if chip else _first_device()


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


def known() -> dict[str, Kernel]:
    """All kernels by name."""
    return PLAIN | registry.KERNELS


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
    kernels = known()
    if name not in kernels and name not in ("auto", "gpu"):
        names = ", ".join(kernels)
        raise ValueError(
            f"backend={name!r} is unknown; choose one of auto, gpu, {names}"
        )
    if name in PLAIN:
        return Choice(name, forced=True)
    chip = capability()
    if name == "auto" and (chip is None or transposed or not opted_in()):
        return Choice("xla")
    every = tuple(registry.KERNELS.values())
    candidates = every if name in ("auto", "gpu") else (kernels[name],)
    refusals = {}
    for kernel in candidates:
        refusal = _refusal(kernel, x, packed, chip, transposed)
        if refusal is None:
            if name == "auto":
                faster = _faster(kernel, x.shape[0], packed)
                return Choice("xla", kernel.name if faster else None)
            return Choice(kernel.name, kernel.name, forced=True)
        refusals[kernel.name] = refusal
    why = "; ".join(f"{kernel}: {no.why}" for kernel, no in refusals.items())
    if name != "auto" or chip is None:
        raise NotImplementedError(f"backend={name!r} cannot run this product: {why}")
    if all(no.cause is not Cause.PRODUCT for no in refusals.values()):
        _warn(why)
    return Choice("xla")


def opted_in() -> bool:
    """Whether "auto" may take kernels that have not run on a GPU yet."""
    return os.environ.get(OPT_IN) == "1"


def _faster(kernel: Kernel, n: int, packed: PackedWeight) -> bool:
    """Whether a kernel is predicted to beat the dense product for n tokens."""
    if kernel.seconds is None:
        return True
    filled = packed.filled()
    dense_columns, groups = filled.dense_values.shape[-1], filled.nm_index.shape[-1]
    sizes = cost.Sizes(
        n,
        *packed.shape,
        tiles=packed.tiles,
        stored=dense_columns + filled.nm_values.shape[-1],
        kept=dense_columns + groups,
    )
    held = dense.NAME in packed.layouts
    other = cost.dense(n, *packed.shape) if held else cost.expanded(sizes)
    return kernel.seconds(n, packed) < other


def served(x: jax.ShapeDtypeStruct, packed: PackedWeight) -> tuple[str, ...]:
    """GPU kernels that can serve a product here once their layout is prepared."""
    chip = capability()
    if chip is None:
        return ()
    refusals = {
        name: _refusal(kernel, x, packed, chip, False)
        for name, kernel in registry.KERNELS.items()
    }
    return tuple(
        name
        for name, refusal in refusals.items()
        if refusal is None or refusal.cause is Cause.LAYOUT
    )


def _refusal(
    kernel: Kernel,
    x: jax.ShapeDtypeStruct,
    packed: PackedWeight,
    chip: Capability | None,
    transposed: bool,
) -> Refusal | None:
    """Why a GPU kernel cannot run a product, or None if it can."""
    if transposed:
        why = "it computes x @ W^T only, not the transposed product"
        return Refusal(Cause.PRODUCT, why)
    if chip is None:
        return Refusal(
            Cause.MACHINE,
            "no NVIDIA GPU is visible; to trace for one that is elsewhere, use "
            "kernels.assume(major, minor)",
        )
    return kernel.refuse(x, packed, chip)


@functools.cache
def _warn(cause: str) -> None:
    """One warning per cause that lies in the machine, not in the product."""
    warnings.warn(
        f"products with packed weights are expanded and run dense on this GPU: {cause}",
        stacklevel=6,
    )
