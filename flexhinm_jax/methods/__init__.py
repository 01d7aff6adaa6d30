"""Methods: one paper, one file; `METHODS` has one line for each."""

from flexhinm_jax.methods.base import Method, ScoreMethod
from flexhinm_jax.methods.magnitude import Magnitude
from flexhinm_jax.methods.wanda import Wanda
from flexhinm_jax.patterns import Pattern

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
}

__all__ = ["METHODS", "Magnitude", "Method", "ScoreMethod", "Wanda", "parse"]


def parse(name: str, pattern: Pattern) -> Method:
    """The method of that command-line name with the given pattern.

    Raises:
      ValueError: an unknown name; the message lists the known ones.

    Example:
      >>> from flexhinm_jax.patterns import NM
      >>> parse("wanda", NM(2, 4))
      Wanda(pattern=NM(n=2, m=4))
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name](pattern)
