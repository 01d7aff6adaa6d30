"""How a pattern orders channels before it chooses what stays.

Orders never reach the user's network: supports are in original channel order, and the
packed form gathers inputs and scatters outputs. `PERMUTES` maps the command-line name
to the configuration.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.ops import channels, gyro, regions


@dataclasses.dataclass(frozen=True)
class ChannelSearch:
    """Searches the input order of every tile, or of the whole matrix for plain N:M.

    Attributes:
      sweeps: proposals per group of columns; quality grows with it, time is linear.
      block: groups that exchange columns in one proposal; bounds memory and time.
      solver: "swaps" (pairwise exchanges, fast) or "hungarian" (exact assignment).
    """

    sweeps: int = 64
    block: int = 64
    solver: Literal["swaps", "hungarian"] = "swaps"

    #: Whether `rows` may give another table.
    searches_rows: ClassVar[bool] = False

    #: Whether natural rows are kept when they retain more than the searched ones.
    never_worse: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration."""
        arguments.configuration(self)
        if self.sweeps < 0 or self.block < 2:
            raise ValueError(
                f"sweeps={self.sweeps}, block={self.block}: need sweeps >= 0 and a "
                "block of at least 2 groups"
            )
        if self.solver not in ("swaps", "hungarian"):
            raise ValueError(
                f"solver={self.solver!r}: choose 'swaps', or 'hungarian' (exact "
                "assignment, some thirty times slower per sweep)"
            )

    def rows(
        self, key: Array, scores: Array, table: Array, dense: Array, nm: Array, of: int
    ) -> Array:
        """Which rows share a tile; the given ones, unless a subclass searches.

        Args:
          key: consumed.
          scores: f32[o, i], non-negative.
          table: i32[t, v], the rows of every tile now.
          dense: i32[], dense columns per tile.
          nm: i32[], N:M columns per tile.
          of: calls that the whole effort is divided into.

        Returns:
          i32[t, v].
        """
        del key, scores, dense, nm, of
        return table

    def columns(
        self, key: Array, tiles: Array, columns: regions.Columns
    ) -> regions.Columns:
        """A better input order for every tile; see `ops.channels.search`.

        Args:
          key: consumed.
          tiles: scores [t, v, i] in original column order.
          columns: the start.

        Returns:
          As many dense, grouped and pruned columns.
        """
        if self.sweeps == 0 or columns.n == columns.m:
            return columns
        return channels.search(
            key,
            tiles,
            columns,
            sweeps=self.sweeps,
            block=self.block,
            solver=self.solver,
        )


@dataclasses.dataclass(frozen=True)
class Gyro(ChannelSearch):
    """Searches the output order, then the input order of every tile.

    Gyro-Permutation (arXiv:2407.20496) with a faster and stronger search; `ops.gyro`
    and `ops.channels` say how it departs. Both phases accept only improvements.

    Attributes:
      sweeps: see `ChannelSearch`.
      block: see `ChannelSearch`.
      solver: see `ChannelSearch`.
      rounds: times that random pairs of tiles are divided anew.
      exchanges: single exchanges between matched tiles after each division.
      schedule: rows per tile and sample of the published output phase, which runs
        first; () leaves it out, as it is slower and the rounds reach more without it.
      patience: samples without improvement after which a stage of the schedule ends.
    """

    rounds: int = 16
    exchanges: int = 16
    schedule: tuple[int, ...] = ()
    patience: int = 1

    searches_rows: ClassVar[bool] = True

    def __post_init__(self):
        """Validates the configuration."""
        super().__post_init__()
        if self.rounds < 0 or self.exchanges < 0 or self.patience < 1:
            raise ValueError(
                f"rounds={self.rounds}, exchanges={self.exchanges}, patience="
                f"{self.patience}: need rounds >= 0, exchanges >= 0, patience >= 1"
            )
        if not all(isinstance(size, int) and size >= 1 for size in self.schedule):
            raise ValueError(
                f"schedule={self.schedule}: need rows per tile, integers from 1"
            )

    @classmethod
    def thorough(cls) -> "Gyro":
        """About ten times the time of the default, for a final run."""
        return cls(sweeps=512, rounds=64, exchanges=32)

    @classmethod
    def paper(cls) -> "Gyro":
        """The published output schedule with exact assignment, for comparison."""
        return cls(
            rounds=0,
            schedule=(8, 1, 4, 1, 2, 1, 1),
            patience=3,
            sweeps=32,
            solver="hungarian",
        )

    def rows(
        self, key: Array, scores: Array, table: Array, dense: Array, nm: Array, of: int
    ) -> Array:
        """Searches which rows share a tile; see `ChannelSearch.rows`."""
        first, *keys = jax.random.split(key, len(self.schedule) + 1)
        for stage, size in zip(keys, self.schedule, strict=True):
            size = min(size, table.shape[1])
            table = gyro.sample(
                stage, scores, table, dense, nm, size=size, patience=self.patience
            )
        if self.rounds == 0:
            return table
        return gyro.arrange(
            first,
            scores,
            table,
            dense,
            nm,
            rounds=-(-self.rounds // of),
            exchanges=self.exchanges,
        )


@dataclasses.dataclass(frozen=True)
class RandomRows(ChannelSearch):
    """Random tiles with searched input orders: the control for the output phase.

    Attributes:
      sweeps: see `ChannelSearch`.
      block: see `ChannelSearch`.
      solver: see `ChannelSearch`.
    """

    searches_rows: ClassVar[bool] = True
    never_worse: ClassVar[bool] = False

    def rows(
        self, key: Array, scores: Array, table: Array, dense: Array, nm: Array, of: int
    ) -> Array:
        """A random order of all rows."""
        del scores, dense, nm, of
        order = jax.random.permutation(key, table.size).astype(jnp.int32)
        return order.reshape(table.shape)


PERMUTES: dict[str, ChannelSearch | None] = {
    "none": None,
    "channels": ChannelSearch(),
    "gyro": Gyro(),
    "thorough": Gyro.thorough(),
    "paper": Gyro.paper(),
    "random": RandomRows(),
}
