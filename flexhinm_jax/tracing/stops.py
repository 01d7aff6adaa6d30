"""Why the dense value of a leaf is needed, and where in a program that happens."""

import enum
from typing import Any, NamedTuple

Where = tuple[Any, ...]


class Kind(enum.Enum):
    """What kind of use ends the tracking of a leaf."""

    PRIMITIVE = enum.auto()  # a primitive that has no rule
    LOOKUP = enum.auto()  # rows are read, as from an embedding
    PRODUCT = enum.auto()  # a contraction that is no product with a matrix
    AUXILIARY = enum.auto()  # a product with a vector of parameters
    CONTROL = enum.auto()  # a loop, a shard_map or a derivative rule in the way


class Stop(NamedTuple):
    """Why a leaf is needed dense.

    Attributes:
      text: the reason, for people.
      kind: the reason, for programs.
    """

    text: str
    kind: Kind = Kind.CONTROL


LOOKUP = Stop("read by gather (embedding)", Kind.LOOKUP)


class Body(NamedTuple):
    """The part of a position that enters a body which runs less or more than once.

    Attributes:
      name: of the body, such as "branch" or "step".
      number: of the branch.
    """

    name: str
    number: int = 0


class Part(NamedTuple):
    """The part of a position that tells the products of one equation apart.

    Attributes:
      number: of the leaf, among those that the program put side by side.
    """

    number: int


def equation(where: Where) -> Where:
    """The position of the equation of a product."""
    return where[:-1] if isinstance(where[-1], Part) else where


def context(where: Where) -> Where:
    """The innermost body at a position; two positions in one body run together."""
    bodies = [k for k, step in enumerate(where) if isinstance(step, Body)]
    return where[: bodies[-1] + 1] if bodies else ()
