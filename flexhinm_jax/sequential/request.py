"""What to prune with, and how: one value that a run is asked for."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.methods import Method
from flexhinm_jax.methods.base import check_method
from flexhinm_jax.pruning.owl import BLOCK
from flexhinm_jax.pruning.solve import OnMismatch
from flexhinm_jax.sequential.windows import PART, Trainer

Target = Literal["seq", "asym", "resid"]
TARGETS = ("seq", "asym", "resid")

WINDOWS = ("block", "part")
"""What a window may be besides a number of blocks and a regular expression."""

Statistics = Literal["sequential", "block", "dense"]
STATISTICS = ("sequential", "block", "dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a pass over a model is asked to do.

    Attributes:
      method: what to prune with, such as `SparseGPT(NM(2, 4))`.
      key: PRNG key, consumed; a leaf uses the same as in `prune`.
      sparsity: fraction of weights removed, one for all or one per path; None for a
        pattern that has only one.
      rules: {regex: pattern or "skip"} on leaf paths; the first match wins.
      target: what to fit to, see `sequential.sequential`.
      center: for methods that move weights: fits around the means, and refits the bias
        where the product has one of its own.
      statistics: whose inputs a weight is judged by, see `sequential.sequential`; None
        for what the method prefers. A request that is made always has one.
      block: for statistics of blocks: regular expression; leaves that follow each other
        and have the same match are one block. Without a match, the positions of a
        leaf in a scan over layers are blocks, and any other leaf is one of its own.
      reconstruct: how the weights that are left are trained, window by window, such as
        a `Reconstruct`; None for not at all.
      on_mismatch: what becomes of leaves whose sizes the pattern does not divide, see
        `prune`.
    """

    method: Method
    key: Array
    sparsity: float | Mapping[str, float] | None = None
    rules: Mapping[str, Any] | None = None
    target: Target = "seq"
    center: bool = True
    statistics: Statistics | None = None
    block: str = BLOCK
    reconstruct: Trainer | None = None
    on_mismatch: OnMismatch = "error"

    def __post_init__(self):
        """Takes the statistics that the method prefers where none are asked for.

        Raises:
          ValueError: no method.
        """
        check_method(self.method)
        judged_by = statistics_of(self.method, self.statistics, self.reconstruct)
        object.__setattr__(self, "statistics", judged_by)

    @property
    def beside(self) -> bool:
        """Whether a dense model runs beside the pruned one."""
        how = self.reconstruct
        trained = how is not None and (how.target != "seq" or self.judged_dense)
        return self.target != "seq" or trained

    @property
    def judged_dense(self) -> bool:
        """Whether weights are judged by the dense model."""
        return self.statistics == "dense"

    @property
    def dense_only(self) -> bool:
        """Whether nothing is run with pruned weights."""
        return self.judged_dense and self.reconstruct is None

    def check(self) -> None:
        """Refuses what no run can do.

        Raises:
          ValueError: a method that needs gradients, an unknown word, a block that is no
            regular expression, targets that are the weights' own outputs.
        """
        known = {"target": TARGETS, "statistics": STATISTICS}
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {', '.join(words)}"
                )
        if self.method.needs == "gradients":
            raise ValueError(
                f"{type(self.method).__name__} needs gradients, which one pass forward "
                "does not give; use accumulate_gradients and solve"
            )
        if self.statistics == "dense" and self.target != "seq":
            raise ValueError(
                f"target={self.target!r} repairs what earlier pruning did to the inputs"
                " of a weight, and with statistics='dense' these are as they were; give"
                " target='seq', or statistics='sequential' or 'block'"
            )
        if self.reconstruct is not None:
            self._check_windows(self.reconstruct.window)
        try:
            re.compile(self.block)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"block={self.block!r} is no regular expression: {error}"
            ) from error

    def _check_windows(self, window: int | str) -> None:
        if self.statistics == "block" and not _whole_blocks(window):
            raise ValueError(
                f"window={window!r}: with statistics='block' all weights of a block are"
                " pruned before one is trained; give window='block' or a number of"
                " blocks, or statistics='sequential'"
            )

    def check_names(self, paths: Collection[str]) -> None:
        """Refuses regular expressions of blocks and windows that match nothing.

        Args:
          paths: of all leaves of the model.

        Raises:
          ValueError: names the option, and the nearest paths.
        """
        window = None if self.reconstruct is None else self.reconstruct.window
        given = {"block": self.block, "window": window}
        for option, regex in given.items():
            if not isinstance(regex, str) or regex in (BLOCK, *WINDOWS):
                continue
            if not any(re.search(regex, path) for path in paths):
                words = f" (or choose {', '.join(WINDOWS)})" * (option == "window")
                raise ValueError(
                    f"{arguments.say(option, regex)} matches no leaf;"
                    f" {arguments.nearest(regex, paths)}{words}"
                )

    def window_of(self, path: str, at: tuple[int | None, ...] = ()) -> Any:
        """The name of what is reconstructed together with a matrix."""
        assert self.reconstruct is not None
        window = self.reconstruct.window
        if _whole_blocks(window):
            return self.block_of(path, at)
        return block_of(PART if window == "part" else str(window), path, at)

    def block_of(self, path: str, at: tuple[int | None, ...] = ()) -> Any:
        """The name of the block that a matrix is in."""
        return block_of(self.block, path, at)


def statistics_of(
    method: Method, asked: Statistics | None, reconstruct: Trainer | None
) -> Statistics:
    """Whose inputs a weight is judged by: as asked, or as the method prefers.

    Statistics of blocks, unless they are asked for, give way to windows that are
    trained before the rest of their block is pruned.
    """
    if asked is not None:
        return asked
    whole = reconstruct is None or _whole_blocks(reconstruct.window)
    return method.statistics if whole else "sequential"


def _whole_blocks(window: int | str) -> bool:
    """Whether a window is one block or more."""
    return window == "block" or isinstance(window, int)


def block_of(regex: str, path: str, at: tuple[int | None, ...] = ()) -> Any:
    """The name of the block that a matrix is in, under a rule for blocks.

    Example:
      >>> block_of(BLOCK, "layers.3.mlp.up"), block_of(BLOCK, "up", (3,))
      ('layers.3', (3,))
    """
    match = re.search(regex, path)
    steps = tuple(i for i in at if i is not None)
    return match[0] if match else steps or path
