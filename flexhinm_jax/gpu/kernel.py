"""What a kernel is: its name, what it serves, its layout, its product, its check."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.typing import DTypeLike

from flexhinm_jax.gpu import layouts, selfcheck, support
from flexhinm_jax.paths import over_stack
from flexhinm_jax.types import PackedWeight

Capability = tuple[int, int]


class Cause(enum.Enum):
    """Why a kernel does not run a product."""

    MACHINE = "the chip or the installation, whatever the product"
    PRODUCT = "the pattern, the dtype or the sizes"
    LAYOUT = "a layout that `kernels.prepare` has not made yet"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A kernel cannot serve a product.

    Attributes:
      cause: where the reason lies.
      why: the reason, to be read after the name of the kernel.
    """

    cause: Cause
    why: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A program for products with packed weights.

    Attributes:
      name: what `sparse_dot(backend=...)` calls it, and its layout in a packed weight.
      prepare: packed matrix -> pytree of arrays, its layout, made once.
      run: (x [N, i], prepared matrix, dtype) -> [N, o], x times the sparse core.
      majors: compute capability majors of the chips it serves; () for any platform.
      since: least version of jax.
      cases: products that must be right on a GPU before it is used there.
      module: defines this kernel as KERNEL, so that a process of its own can check it;
        "" needs no check.
      seconds: (tokens, prepared weight) -> predicted seconds; None is always fast.
      settle: (layout, packed matrix) -> the layout without what its values, known by
        now, make needless; both may have the leading axes of a stack.
    """

    name: str
    prepare: Callable[[PackedWeight], Any]
    run: Callable[[Array, PackedWeight, DTypeLike], Array]
    majors: tuple[int, ...] = ()
    since: tuple[int, ...] = support.SINCE
    cases: tuple[selfcheck.Case, ...] = ()
    module: str = ""
    seconds: Callable[[int, PackedWeight], float] | None = None
    settle: Callable[[Any, PackedWeight], Any] = lambda layout, packed: layout

    def layout(self, packed: PackedWeight) -> Any:
        """The layout of one matrix or of a stack, whose values are known."""
        derive = over_stack(self.prepare, packed.out_order.ndim - 1)
        return self.settle(jax.jit(derive)(packed), packed)

    def refuse(
        self, x: jax.ShapeDtypeStruct, packed: PackedWeight, chip: Capability
    ) -> Refusal | None:
        """Why it cannot serve a product, or None if it can.

        Args:
          x: the input [N, i], in the dtype of the computation.
          packed: one packed matrix, of arrays or tracers.
          chip: compute capability of the chip.
        """
        if not self.majors:
            return None
        if why := self._machine(chip):
            return Refusal(Cause.MACHINE, why)
        why = (
            _unknown_rows(x)
            or layouts.two_of_four(packed)
            or support.not_half(x.dtype)
            or support.not_half(packed.dtype)
        )
        if why:
            return Refusal(Cause.PRODUCT, why)
        if self.name not in packed.layouts:
            call = f"kernels.prepare(packed, {self.name!r})"
            return Refusal(Cause.LAYOUT, f"its layout is missing: call {call}")
        why = selfcheck.failure(self.module) if self.module else None
        return Refusal(Cause.MACHINE, why) if why else None

    def _machine(self, chip: Capability) -> str | None:
        if tuple(jax.__version_info__) < self.since:
            needed = ".".join(map(str, self.since))
            return f"it needs jax {needed} or newer, this is {jax.__version__}"
        if chip[0] not in self.majors:
            served = ", ".join(f"{m}.x" for m in self.majors)
            here = f"{chip[0]}.{chip[1]}"
            return f"it serves compute capability {served}, this chip has {here}"
        return None


def _unknown_rows(x: jax.ShapeDtypeStruct) -> str | None:
    known = isinstance(x.shape[0], int)
    return None if known else "it must know the number of rows when a program is traced"
