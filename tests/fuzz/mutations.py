"""Old faults, put back one at a time: python -m tests.fuzz.mutations.

A fuzzer that finds nothing has found nothing only if it would have. Every entry of
`MUTATIONS` undoes one repair of the package; `first_caught` says which program notices.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np

from flexhinm_jax.pruning import solve, statistics
from flexhinm_jax.tracing import (
    contractions,
    convolutions,
    experts,
    joined,
    masks,
    views,
)
from flexhinm_jax.tracing.discover import Finder
from tests.fuzz import check, grammar


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
      steps: words of which a program must have one; others cannot notice.
      patches: what puts the fault into the package.
    """

    steps: tuple[str, ...]
    patches: Callable[[], list[Any]]


def without_branches(where: tuple) -> tuple:
    """The context of a position, all branches of a condition alike."""
    bodies = [step for step in CONTEXT(where) if isinstance(step, contractions.Body)]
    return tuple(body.name for body in bodies)


CONTEXT, CHANGE = contractions.context, views.change


def unscaled(*args: Any) -> Any:
    """A change of a weight that its packed form does not see."""
    step = CHANGE(*args)
    return step and step._replace(apply=lambda x: x)


def every_use(uses: Any) -> dict[str, list]:
    """All uses of a leaf, those of one input too."""
    first, out = uses.leaves, {}
    for use in uses:
        if use.layout == first[use.path].layout:
            out.setdefault(use.path, []).append(use)
    return out


def without(rules: dict, *names: str) -> Any:
    """The rules without some."""
    return patch.dict(rules, {k: v for k, v in rules.items() if k not in names}, True)


MUTATIONS: dict[str, Mutation] = {
    "routed tokens share the statistics of the layer beside them": Mutation(
        ("chosen", "routed"),
        lambda: [patch.object(contractions, "context", lambda _: ())],
    ),
    "experts of a switch share statistics": Mutation(
        ("chosen", "routed"),
        lambda: [patch.object(contractions, "context", without_branches)],
    ),
    "a token mask is lost at reshapes": Mutation(
        ("masked",), lambda: [without(masks.RULES, "reshape", "squeeze")]
    ),
    "a token mask is lost at transposes": Mutation(
        ("masked",), lambda: [without(masks.RULES, "transpose")]
    ),
    "a token mask is lost at sorts and gathers": Mutation(
        ("masked",), lambda: [without(masks.RULES, "sort", "gather")]
    ),
    "stop_gradient and reduce_precision are layout": Mutation(
        ("frozen",),
        lambda: [
            patch.object(
                views,
                "IDENTITY",
                views.IDENTITY | {"reduce_precision", "stop_gradient"},
            )
        ],
    ),
    "inputs of a convolution in the order of the leaf": Mutation(
        ("conv",),
        lambda: [
            patch.object(
                contractions.Product,
                "ordered_inputs",
                property(lambda p: views.ordered(p.of_inputs)),
            )
        ],
    ),
    "a depthwise kernel with a multiplier is a stack of matrices": Mutation(
        ("conv",),
        lambda: [patch.object(convolutions, "is_depthwise", lambda *_: False)],
    ),
    "concatenated weights are not found": Mutation(
        ("joined", "stacked"), lambda: [patch.object(joined, "join", lambda *_: None)]
    ),
    "a window is taken for its leaf": Mutation(
        ("window",), lambda: [patch.object(Finder, "hindrance", lambda *_: None)]
    ),
    "an auxiliary product decides the axis": Mutation(
        ("normed",),
        lambda: [
            patch.object(
                Finder,
                "of",
                lambda self, path: [
                    c for c in self.contractions.values() if c.path == path
                ],
            )
        ],
    ),
    "a weight that saw nothing is refused or wiped": Mutation(
        ("chosen", "routed", "experts"),
        lambda: [
            patch.object(solve, "informed", lambda stats, *_: stats),
            patch.object(solve, "by_magnitude", lambda *_: {}),
        ],
    ),
    "windows of one input are counted once each": Mutation(
        ("fused",), lambda: [patch.object(statistics, "counted", every_use)]
    ),
    "a tied table is pruned unasked": Mutation(
        ("tied",), lambda: [patch.object(Finder, "looked_up", lambda *_: False)]
    ),
    "all tokens meet the expert of the first": Mutation(
        ("experts",),
        lambda: [
            patch.object(
                experts,
                "places",
                lambda parts, free: np.zeros(int(np.prod(free)), np.int64),
            )
        ],
    ),
    "values scaled on their way to the product are packed as they are": Mutation(
        ("scaled", "normed", "float16", "cast"),
        lambda: [patch.object(views, "change", unscaled)],
    ),
    "what an input is does not matter, only which value": Mutation(
        ("joined", "heads", "also", "experts"),
        lambda: [patch.object(contractions.Product, "columns", property(lambda _: ()))],
    ),
}


def first_caught(mutation: Mutation, seeds: Iterable[int]) -> int | None:
    """The first of the programs that breaks a promise under a mutation."""
    with ExitStack() as stack:
        for one in mutation.patches():
            stack.enter_context(one)
        for seed in seeds:
            program = grammar.program(seed)
            text = program.text + " masked" * (program.mask is not None)
            if not any(step in text for step in mutation.steps):
                continue
            try:
                check.check(program, seed)
            except Exception:  # an error of any kind is noticed
                return seed
    return None


def main() -> None:
    """Prints for every mutation the first program that notices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="number of programs")
    parser.add_argument("--only", default="", help="part of the name of a mutation")
    asked = parser.parse_args()
    check.silent()
    for name, mutation in MUTATIONS.items():
        if asked.only in name:
            seed = first_caught(mutation, range(asked.count))
            told = "NOT CAUGHT" if seed is None else f"caught by program {seed}"
            print(f"{name}: {told}", flush=True)


if __name__ == "__main__":
    main()
