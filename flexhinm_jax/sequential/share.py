"""The batches of one process among several, and sums over those of all of them.

Of P processes, process p has the batches p, p + P, p + 2 P, ... In turn t each makes
the sums of one batch, t P + p; all are cut into P pieces, process q gets piece q of
each, and adds them in the order of the batches. At the end the pieces are put together.
These are the additions of one process that has every batch, in the same order: so the
sums are the same to the bit, whatever the number of processes. A process receives about
as much as it makes, (turns + 1) times the bytes of the sums.

Everything is a collective of `jax.distributed`; with one process nothing is sent.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")

AXIS = "process"

COPIES = 3
"""Of the sums of a batch while they are exchanged: cut, received and put together."""


class Lost(OSError):
    """Another process of the run ended, or cannot be reached."""


@dataclasses.dataclass(frozen=True)
class Share:
    """Which batches this process has.

    Attributes:
      batches: of all processes together.
      process: number of this one, from 0.
      processes: in all.
    """

    batches: int
    process: int = 0
    processes: int = 1

    @classmethod
    def here(cls, batches: int) -> "Share":
        """The share of this process of those that `jax.distributed` knows.

        All must come here within seconds: so long they wait to connect.

        Raises:
          ValueError: a process would have nothing.
          Lost: another process is not there.
        """
        processes = jax.process_count()
        if processes > batches:
            raise ValueError(
                f"{processes} processes for {batches} batches: every process needs one;"
                " give more samples, smaller batches or fewer processes"
            )
        share = cls(batches, jax.process_index(), processes)
        share.agreed(0)
        return share

    @property
    def writes(self) -> bool:
        """Whether this process writes what all have made."""
        return self.process == 0

    @property
    def numbers(self) -> range:
        """The numbers of its batches."""
        return range(self.process, self.batches, self.processes)

    def alone(self, what: str) -> None:
        """Raises ValueError where there are several processes.

        Args:
          what: cannot be divided; begins the message.
        """
        if self.processes > 1:
            raise ValueError(
                f"{what} goes through the batches one after the other, which"
                f" {self.processes} processes cannot share; start one process, or leave"
                " it out"
            )

    def sums(self, add: Callable[[Any, T], Any], own: Sequence[T]) -> Any:
        """What adding the batches of all processes gives, in their order.

        Args:
          add: (sums so far or None, batch) -> sums, a tree of arrays.
          own: the batches of this process, `numbers`.
        """
        if self.processes == 1:
            return functools.reduce(add, own, None)
        mesh, pieces, sums = mesh_of(self.processes), None, None
        for turn in range(-(-self.batches // self.processes)):
            # One that has no batch in the last turn sends what is not looked at.
            sums = add(None, own[turn]) if turn < len(own) else sums
            present = min(self.processes, self.batches - turn * self.processes)
            with together():
                cut = jax.tree.map(functools.partial(divided, mesh), sums)
                if pieces is None:
                    pieces = jax.tree.map(functools.partial(zeros, mesh), cut)
                pieces = exchanged(pieces, cut, mesh=mesh, present=present)
                jax.block_until_ready(pieces)
        with together():
            return jax.tree.map(
                lambda x, like: whole(mesh, x)[: like.size].reshape(like.shape),
                pieces,
                sums,
            )

    def said(self, value: int) -> list[int]:
        """A number of every process; waits for all of them."""
        if self.processes == 1:
            return [value]
        mesh = mesh_of(self.processes)
        with together():
            own = jnp.full((1,), value, jnp.int32)
            return np.asarray(whole(mesh, global_array(mesh, own))).tolist()

    def agreed(self, value: int) -> int:
        """What the process that writes says; waits for all of them."""
        return self.said(value)[0]


def mesh_of(processes: int) -> Mesh:
    """The device of every process that it computes on."""
    first: dict[int, Any] = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    return Mesh([first[n] for n in range(processes)], (AXIS,))


def global_array(mesh: Mesh, own: Array) -> Array:
    """The arrays of all processes one after the other, along the first axis."""
    shape = mesh.size * own.shape[0], *own.shape[1:]
    over = NamedSharding(mesh, P(AXIS))
    return jax.make_array_from_single_device_arrays(shape, over, [own])


def divided(mesh: Mesh, x: Array) -> Array:
    """An array cut into a piece for every process, [processes, processes, piece]."""
    flat = jnp.pad(x.reshape(-1), (0, -x.size % mesh.size))
    return global_array(mesh, flat.reshape(1, mesh.size, -1))


def zeros(mesh: Mesh, cut: Array) -> Array:
    """Empty sums of one piece per process, [processes * piece]."""
    return global_array(mesh, jnp.zeros(cut.shape[2:], cut.dtype))


@functools.partial(
    jax.jit, static_argnames=("mesh", "present"), donate_argnames="pieces"
)
def exchanged(pieces: Any, cut: Any, *, mesh: Mesh, present: int) -> Any:
    """The sums of the pieces, with what some processes have made added in order.

    Args:
      pieces: [processes * piece], each process has the sums of its own.
      cut: from `divided`, each process has what it made.
      mesh: of the processes.
      present: so many processes, the first, have made something.
    """

    def add(sums: Array, made: Array) -> Array:
        received = lax.all_to_all(made[0], AXIS, 0, 0)
        for n in range(present):
            sums = sums + received[n]
        return sums

    over = P(AXIS)
    run = functools.partial(jax.tree.map, add)
    return jax.shard_map(run, mesh=mesh, in_specs=(over, over), out_specs=over)(
        pieces, cut
    )


@functools.partial(jax.jit, static_argnames="mesh")
def gathered(x: Array, *, mesh: Mesh) -> Array:
    """An array on every process."""
    return lax.with_sharding_constraint(x, NamedSharding(mesh, P()))


def whole(mesh: Mesh, x: Array) -> Array:
    """An array that is spread over the processes, on the device of this one."""
    return gathered(x, mesh=mesh).addressable_data(0)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Says what it means when a collective fails."""
    try:
        yield
    except (ValueError, RuntimeError) as error:  # both are of XLA
        raise Lost(
            "another process of this run ended or cannot be reached; its own message"
            " says why. Start all of them again with the same command, and they go on"
            f" from there ({str(error).splitlines()[0]})"
        ) from error
