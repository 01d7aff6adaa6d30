"""Leaves of parameters: one name each, whichever library made the tree; stacks."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr

from flexhinm_jax.types import PackedWeight


def is_packed(x: Any) -> bool:
    """Whether a node of a tree of parameters is a packed weight."""
    return isinstance(x, PackedWeight)


def leaf_paths(params: Any) -> list[str]:
    """The normalised path of every leaf, in the order of `jax.tree.leaves`.

    Keys are joined by "/". The collection name "params" in front (Flax Linen) and the
    attribute "value" at the end (Flax NNX, partitioning boxes) are dropped, so that
    "encoder/0/kernel" names the same leaf everywhere. A dictionary key that happens to
    be "value" stays. A packed weight is one leaf.

    Args:
      params: any tree of parameters, dense, abstract or packed.

    Returns:
      One unique path per leaf.

    Raises:
      ValueError: two leaves get the same path.
    """
    return [path for path, _ in named_leaves(params)[0]]


def named_leaves(params: Any) -> tuple[list[tuple[str, Any]], Any]:
    """((path, leaf) pairs, structure) of a tree; see `leaf_paths`."""
    paths = []
    pairs, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)
    for keys, _ in pairs:
        if len(keys) > 1 and keystr(keys[:1], simple=True) == "params":
            keys = keys[1:]
        if len(keys) > 1 and keys[-1] == GetAttrKey("value"):
            keys = keys[:-1]
        paths.append(keystr(keys, simple=True, separator="/"))
    twice = [path for path, n in Counter(paths).items() if n > 1]
    if twice:
        raise ValueError(
            f"two leaves of params share the normalised path {twice[0]!r}; rename one: "
            "paths drop a leading 'params/' and a trailing attribute 'value'"
        )
    leaves = [leaf for _, leaf in pairs]
    return list(zip(paths, leaves, strict=True)), structure


def over_stack(f: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """`f`, written for one matrix, over the leading stack axes of all its arguments.

    Args:
      f: function of trees of arrays.
      axes: how many stack axes the leaf has.
    """
    for _ in range(axes):
        f = jax.vmap(f)
    return f
