"""Which cuts of a walk are solved on the same weights, and where windows begin.

Cuts that are solved on the same weights are a span: every cut is one of its own, or all
cuts of a block are, or of the model; where weights are trained after pruning, a span is
a window, from one border to the next.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from flexhinm_jax.sequential import windows
from flexhinm_jax.sequential.request import Request
from flexhinm_jax.sequential.straight import Cut, Line


def borders(
    request: Request, line: Line, outputs: list[Any], paths: list[str]
) -> list[str]:
    """Marks where windows begin in a line; the names of the windows.

    Args:
      request: what to do.
      line: the program; its cuts are changed.
      outputs: variables that are wanted at the end.
      paths: path per variable of `line.params`.
    """
    if request.reconstruct is None:
        return []
    window = request.reconstruct.window
    count = window if isinstance(window, int) else 1
    name = functools.partial(_named, request.window_of)
    return windows.divide(line, outputs, paths, name, count)


def spans(request: Request, cuts: Sequence[Cut]) -> list[range]:
    """The spans of a walk, in order.

    Args:
      request: what to do.
      cuts: all cuts, borders of windows among them.
    """
    if request.reconstruct is None:
        return groups(request, cuts, range(len(cuts)))
    places = [k for k, cut in enumerate(cuts) if windows.is_border(cut)]
    return [range(a, b) for a, b in itertools.pairwise(places)]


def groups(request: Request, cuts: Sequence[Cut], span: range) -> list[range]:
    """The parts of a span whose cuts are solved on the same weights, in order.

    Args:
      request: what to do.
      cuts: all cuts.
      span: some of them.
    """
    if request.statistics == "sequential":
        return [range(k, k + 1) for k in span]
    if request.judged_dense:
        return [span]
    name = functools.partial(_named, request.block_of)
    solved = [k for k in span if not windows.is_border(cuts[k])]
    if not solved:
        return [span] if span else []
    blocks = [
        list(same) for _, same in itertools.groupby(solved, lambda k: name(cuts[k]))
    ]
    starts = [span[0], *(same[0] for same in blocks[1:])]
    return [range(a, same[-1] + 1) for a, same in zip(starts, blocks, strict=True)]


def _named(name_of: Callable[..., Any], cut: Cut) -> Any:
    """What a cut is a part of."""
    members, plain = cut.names
    return name_of(*(members or [(path,) for path in plain])[0])
