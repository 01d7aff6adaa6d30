"""The rows of the comparison: one-shot masks, learned masks, and what they start from.

Text form: NAME, NAME@SPARSITY for tiles and `mlp_only`, and START>NAME[@SPARSITY] for a
learned method whose first masks are those of another row: "refine_mask>maskllm",
"maskllm>patch_tile@0.25". The time of a row includes that of its start.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

import flexhinm_jax as fh
from flexhinm_jax.training import few_steps
from flexhinm_jax.training.hyper import hyper_prune
from flexhinm_jax.types import Uses
from train.lab.masks.learner import Learner
from train.lab.masks.problems import Problem

NM = fh.NM(2, 4)

#: One-shot methods at 2:4; their supports, with the weights of the dense model.
ONE_SHOT: dict[str, fh.Method] = {
    "magnitude": fh.Magnitude(NM),
    "wanda": fh.Wanda(NM),
    "refine_mask": fh.RefineMask(fh.Wanda(NM), weights="dense"),
    "alps_mask": fh.ALPS(NM),
}

#: The weights with the largest Wanda scores of every matrix.
UNSTRUCTURED = fh.Wanda(fh.Unstructured())

#: One-shot in order of execution, with weights that move.
MOVED: dict[str, fh.Method] = {"alps": fh.ALPS(NM)}

#: One net for all masks of the model.
SHARED = ("hyperprune",)
HYPER = fh.HyperPrune(fh.Wanda(NM))

#: For a few hundred steps from good masks: the hard masks themselves are trained, with
#: the gradient of the softmax, because sampling noise costs more than it finds; and the
#: pace follows the gradient (`relative`), because Adam flips groups by noise.
MASKLLM = fh.MaskLLM(NM, **few_steps.DECIDED)
#: The tiles too, from logits that weights can be compared by; see `tiles`.
PATCH = fh.Patch(
    **few_steps.DECIDED,
    tile_prior="shares",
    tile_start=1.0,
    tile_scale=(2.5, 2.5),  # so few steps should not deal again
    tile_temperature=(1.0, 1.0),
    density_weight=0.0,
)
SLOWLY = {"rate": 2e-4, "optimizer": "relative", "b1": 0.95}
LEARNERS: dict[str, Learner] = {
    "maskllm": Learner(MASKLLM, **SLOWLY),
    "maskllm_scores": Learner(
        dataclasses.replace(MASKLLM, parameters="weights"), **SLOWLY
    ),
    "patch": Learner(PATCH, **SLOWLY),
    "patch_tile": Learner(dataclasses.replace(PATCH, mode="tile"), 2e-3),
    # ten times the published rate and four times the strength for a tenth of the steps
    "proxsparse": Learner(fh.ProxSparse(strength=0.02), 1e-3),
    "maskpro": Learner(fh.MaskPro(NM), 50.0, "sgd"),
}

#: Rows with tiles or rules: they need a sparsity.
NEED = ("patch", "patch_tile", "mlp_only_24", "unstructured")

DEFAULT = (
    "magnitude",
    "wanda",
    "refine_mask",
    "alps_mask",
    "alps",
    "hyperprune",
    "wanda>maskllm",
    "refine_mask>maskllm",
    "refine_mask>maskllm_scores",
    "proxsparse",
    "refine_mask>maskpro",
    *(
        f"{name}@{s}"
        for s in (0.25, 0.35, 0.45)
        for name in (
            "mlp_only_24",
            "refine_mask>mlp_only_24",
            "refine_mask>patch_tile",
            "refine_mask>patch",
            "unstructured",
        )
    ),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row, parsed.

    Attributes:
      text: as given.
      start: text of the row whose masks come first, or None.
      name: of the method.
      sparsity: fraction of weights removed, or None where the method has only one.
    """

    text: str
    start: str | None
    name: str
    sparsity: float | None


def known() -> tuple[str, ...]:
    """All names."""
    return (*ONE_SHOT, *MOVED, *SHARED, *LEARNERS, "mlp_only_24", "unstructured")


def parse(text: str) -> Row:
    """The row of a text.

    Raises:
      ValueError: an unknown name, a sparsity that is missing, useless or out of range,
        or a start that is not a mask with two of every four weights.

    Example:
      >>> parse("refine_mask>patch@0.25").sparsity
      0.25
    """
    start, _, rest = text.strip().rpartition(">")
    name, at, number = rest.partition("@")
    if name not in known():
        raise ValueError(f"--methods {text}: unknown {name!r}; {', '.join(known())}")
    if bool(at) != (name in NEED):
        told = "needs a sparsity" if name in NEED else "has only one sparsity"
        raise ValueError(f"--methods {text}: {name} {told}; as in patch@0.25")
    sparsity = None
    if at:
        try:
            sparsity = float(number)
        except ValueError:
            raise ValueError(f"--methods {text}: {number!r} is no number") from None
        high = 1.0 if name == "unstructured" else 0.5
        if not 0 <= sparsity <= high:
            raise ValueError(
                f"--methods {text}: sparsity {sparsity} is not between 0 and {high}"
            )
    if start:
        first = parse(start)
        if first.sparsity is not None or first.name in MOVED:
            raise ValueError(
                f"--methods {text}: {start} is not a 2:4 mask of the dense weights"
            )
        if name not in (*LEARNERS, "mlp_only_24") or name == "proxsparse":
            raise ValueError(f"--methods {text}: {name} does not start from masks")
    return Row(text.strip(), start or None, name, sparsity)


def mlp_only_24(uses: Uses, target: float) -> dict[str, Any]:
    """Rules that prune MLP matrices at 2:4 and skip the rest, at a global sparsity.

    The baseline that reviewers of PATCH asked for (arXiv:2509.23410). Whole matrices
    are taken until their number is as near to the target as it gets: those of the MLP
    from the middle of the model to its ends, because the first and last layers bear
    least; behind them, where the MLP is not enough, those of the attention likewise.

    Args:
      uses: from `discover`.
      target: fraction of the weights of all uses that is removed.

    Returns:
      Rules for `discover`.
    """
    sizes = {use.path: int(np.prod(use.layout.shape)) for use in uses.prunable}
    paths = list(sizes)
    middle = (len(paths) - 1) / 2
    order = sorted(
        range(len(paths)), key=lambda k: (is_attention(paths[k]), abs(k - middle))
    )
    wanted, taken, chosen = 2 * target * sum(sizes.values()), 0, set()
    for k in order:
        size = sizes[paths[k]]
        if abs(taken + size - wanted) <= abs(taken - wanted):
            chosen.add(paths[k])
            taken += size
    return {f"^{re.escape(path)}$": "skip" for path in paths if path not in chosen}


def is_attention(path: str) -> bool:
    """Whether a leaf belongs to attention rather than to an MLP."""
    return re.search(r"atten|attn", path) is not None


def learner(row: Row, problem: Problem, given: Mapping[str, Learner]) -> Learner:
    """The learner of a row, with the tiles of the problem.

    Args:
      row: of a learned method.
      problem: the model.
      given: name -> learner.
    """
    found = given[row.name]
    method = found.method
    if isinstance(method, fh.Patch):
        method = method.with_pattern(fh.Tiles(problem.tile))
    return dataclasses.replace(found, method=method)


Keeps = dict[str, Any]


def one_shot(
    method: fh.Method,
    key: Any,
    problem: Problem,
    uses: Uses,
    sparsity: float | None = None,
) -> Keeps:
    """The supports of a one-shot method, path -> bool[*stack, o, i]."""
    params = problem.params
    states = fh.solve(method, key, params, uses, problem.stats, sparsity)
    return supports(fh.decide(method, states, params, uses))


def supports(plans: Mapping[str, fh.Plan]) -> Keeps:
    """The supports of plans."""
    return {path: plan.support.keep for path, plan in plans.items()}


def hyperprune(key: Any, problem: Problem, steps: int | None) -> Keeps:
    """The supports of one net for the whole model.

    Args:
      key: consumed.
      problem: the model.
      steps: updates per matrix at most; None for those of `HYPER`.
    """
    method = HYPER
    if steps is not None:
        method = dataclasses.replace(HYPER, steps=min(steps, HYPER.steps))
    uses, params = problem.uses, problem.params
    found = hyper_prune(method, key, params, uses, problem.stats)
    return supports(fh.decide(method, found.states, params, uses))
