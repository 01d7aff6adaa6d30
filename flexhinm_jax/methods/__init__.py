"""Methods: one paper, one file; `METHODS` has one line for each.

Wrappers take another method: `Refit(Wanda(NM(2, 4)))`, in text form "refit(wanda)".
"""

import ast
import dataclasses
import re
import typing
from typing import Any

from flexhinm_jax import arguments
from flexhinm_jax.methods.alps import ALPS
from flexhinm_jax.methods.armor import ARMOR
from flexhinm_jax.methods.base import Method, ScoreMethod
from flexhinm_jax.methods.fisher import Fisher, accumulate_gradients
from flexhinm_jax.methods.gumbel import GumbelPatterns
from flexhinm_jax.methods.hard_concrete import HardConcrete
from flexhinm_jax.methods.hyperprune import HyperPrune
from flexhinm_jax.methods.learned import LearnedMethod
from flexhinm_jax.methods.magnitude import Magnitude
from flexhinm_jax.methods.maskllm import MaskLLM
from flexhinm_jax.methods.maskpro import MaskPro
from flexhinm_jax.methods.nowag import NoWagP
from flexhinm_jax.methods.patch import Patch
from flexhinm_jax.methods.permllm import PermLLM
from flexhinm_jax.methods.proxsparse import ProxSparse
from flexhinm_jax.methods.refine_mask import RefineMask
from flexhinm_jax.methods.refit import Refit
from flexhinm_jax.methods.ria import RIA
from flexhinm_jax.methods.sparse_swaps import SparseSwaps
from flexhinm_jax.methods.sparsegpt import SparseGPT
from flexhinm_jax.methods.staged import StagedALPS
from flexhinm_jax.methods.wanda import Wanda
from flexhinm_jax.methods.wrapper import Nested, Wrapper
from flexhinm_jax.patterns import Pattern

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "fisher": Fisher,
    "sparsegpt": SparseGPT,
    "nowag": NoWagP,
    "alps": ALPS,
    "armor": ARMOR,
    "staged_alps": StagedALPS,
    "refit": Refit,
    "refine_mask": RefineMask,
    "sparse_swaps": SparseSwaps,
    "hyperprune": HyperPrune,
    "hard_concrete": HardConcrete,
    "gumbel": GumbelPatterns,
    "maskllm": MaskLLM,
    "maskpro": MaskPro,
    "patch": Patch,
    "proxsparse": ProxSparse,
    "permllm": PermLLM,
}

__all__ = [
    "ALPS",
    "ARMOR",
    "METHODS",
    "RIA",
    "Fisher",
    "GumbelPatterns",
    "HardConcrete",
    "HyperPrune",
    "LearnedMethod",
    "Magnitude",
    "MaskLLM",
    "MaskPro",
    "Method",
    "NoWagP",
    "Patch",
    "PermLLM",
    "ProxSparse",
    "RefineMask",
    "Refit",
    "ScoreMethod",
    "SparseGPT",
    "SparseSwaps",
    "StagedALPS",
    "Wanda",
    "Wrapper",
    "accumulate_gradients",
    "parse",
]


def parse(name: str, pattern: Pattern) -> Method:
    """The method of that command-line name with the given pattern.

    Args:
      name: a name of `METHODS`; a wrapper takes the method it wraps in parentheses, and
        Wanda when there are none: "alps", "refit(ria)", "refit(refine_mask(alps))".
        Options may follow, fields with their values: "alps:damp=0.02,iterations=500",
        "refit(ria:a=1):steps=20", "armor:weighting=gram,start=alps".
      pattern: the supports to choose from.

    Returns:
      The method; options that are not given have their defaults.

    Raises:
      ValueError: an unknown name, option or value; the message lists what is known.

    Example:
      >>> from flexhinm_jax.patterns import NM
      >>> parse("wanda", NM(2, 4))
      Wanda(pattern=NM(n=2, m=4, permute=None))
      >>> parse("refit(ria:a=1)", NM(2, 4)).inner
      RIA(pattern=NM(n=2, m=4, permute=None), a=1)
    """
    if not isinstance(name, str):
        raise ValueError(
            f"method {arguments.shown(name)}: parse reads text such as 'wanda'; a "
            "method can be used as it is"
        )
    form = re.fullmatch(r"(\w+)(?:\((.*)\))?(?::(.*))?", name.strip())
    if form is None or form[1] not in METHODS:
        wrappers = [k for k, v in METHODS.items() if issubclass(v, Nested)]
        raise ValueError(
            f"unknown method {name!r}; known: {', '.join(METHODS)}; "
            f"{', '.join(wrappers)} wrap another one, as in refit(wanda)"
            + arguments.similar(name, METHODS)
        )
    method, inner = METHODS[form[1]], form[2]
    if inner is not None and not issubclass(method, Nested):
        raise ValueError(
            f"method {name!r}: {form[1]} does not wrap another method; write "
            f"{form[1]} alone"
        )
    first: Any = pattern
    if issubclass(method, Nested):
        first = parse(inner or "wanda", pattern)
    told = _options(name, method, form[3] or "", pattern)
    try:
        return method(first, **told)
    except ValueError as error:
        if not told:
            raise
        raise ValueError(f"method {name!r}: {error}") from error


def options(method: type[Method]) -> list[str]:
    """The fields of a method that its text form can set."""
    fields = [field.name for field in dataclasses.fields(method) if field.init]
    return [name for name in fields if name not in ("pattern", "inner")]


def _options(
    name: str, method: type[Method], text: str, pattern: Pattern
) -> dict[str, Any]:
    """The values of "field=value,..."; a field that is a method takes its text form."""
    known, types = options(method), {f.name: f.type for f in dataclasses.fields(method)}
    told: dict[str, Any] = {}
    for option in filter(None, re.split(r",(?=\s*\w+=)(?![^(]*\))", text)):
        field, equals, value = (part.strip() for part in option.partition("="))
        if not equals or field not in known:
            names = ", ".join(f"{field}=" for field in known) or "no options"
            raise ValueError(
                f"method {name!r}: unknown option {option!r}; it takes {names}"
                + arguments.similar(field, known)
            )
        kinds = typing.get_args(types[field]) or (types[field],)
        try:
            told[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            nested = any(issubclass(k, Method) for k in kinds if isinstance(k, type))
            told[field] = parse(value, pattern) if nested else value
    return told
