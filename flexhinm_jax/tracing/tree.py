"""One tree of parameters: path <-> leaf <-> matrices.

Whatever a call does with a tree (solve, decide, densify, pack, report) it does leaf by
leaf, by path. `Leaves` is that view: built once per call and handed on.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from flexhinm_jax import arguments
from flexhinm_jax.kernels.quantised import DTYPES
from flexhinm_jax.paths import named_leaves
from flexhinm_jax.tracing import scales, views
from flexhinm_jax.types import PackedWeight, Use, Uses


@jax.tree_util.register_pytree_node_class
class Leaves(dict[str, Any]):
    """The leaves of a tree by normalised path, in the order of `jax.tree.leaves`.

    A dict path -> leaf, and a pytree of these leaves. A packed weight is one leaf.
    Functions that take parameters take their `Leaves` as well.

    Attributes:
      structure: of the tree, packed weights as leaves.
    """

    def __init__(self, leaves: Iterable[tuple[str, Any]], structure: Any):
        """Takes the parts of a tree; `of` takes a tree."""
        super().__init__(leaves)
        self.structure = structure

    @classmethod
    def of(cls, params: Any) -> "Leaves":
        """The leaves of a tree, dense, abstract or packed; `Leaves` stay as they are.

        Raises:
          ValueError: two leaves have the same normalised path.
        """
        if isinstance(params, Leaves):
            return params
        return cls(*named_leaves(params))

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple]:
        """(leaves, paths and structure)."""
        return tuple(self.values()), (tuple(self), self.structure)

    @classmethod
    def tree_unflatten(cls, static: tuple, leaves: Any) -> "Leaves":
        """The inverse of `tree_flatten`."""
        paths, structure = static
        return cls(zip(paths, leaves, strict=True), structure)

    @functools.cached_property
    def packed(self) -> Mapping[str, None]:
        """The paths of packed leaves, in order."""
        return dict.fromkeys(p for p, x in self.items() if isinstance(x, PackedWeight))

    @functools.cached_property
    def on_grid(self) -> Mapping[str, None]:
        """The paths of leaves of eight bits, in order, packed or not; see `scales`."""
        return dict.fromkeys(
            path
            for path, x in self.items()
            if getattr(getattr(x, "dtype", None), "name", None) in DTYPES
            and len(x.shape) > 1
        )

    def dense(self, uses: Uses) -> "Leaves":
        """These leaves, after checking that every prunable one is here and dense.

        Raises:
          ValueError: uses of another kind, a leaf that is missing, packed or of another
            shape; the message names it.
        """
        arguments.found(uses)
        for path in self.packed:
            raise ValueError(
                f"{path}: is packed; pass the dense parameters, such as result.params"
            )
        for path, use in uses.leaves.items():
            if path not in self:
                raise ValueError(
                    f"{path}: in uses but not in params; pass the uses that discover() "
                    "returned for these params"
                )
            shape = tuple(np.shape(self[path]))
            if shape != use.layout.shape:
                raise ValueError(
                    f"{path}: shape {shape}, but uses were discovered "
                    f"for {use.layout.shape}; run discover() again"
                )
        return self

    def matrix(self, use: Use) -> Any:
        """The leaf of a use as its matrices, [*stack, o, i]; of eight bits, scaled."""
        on_grid = use.path in self.on_grid
        leaf = scales.dequantised(self, use) if on_grid else self[use.path]
        return views.matrix(leaf, use.layout)

    def like(self, use: Use) -> jax.ShapeDtypeStruct:
        """Shape and dtype of `matrix`."""
        shape = *use.layout.stack_shape, *use.layout.matrix_shape
        leaf = self[use.path]
        dtype = np.float32 if use.path in self.on_grid else leaf.dtype
        return jax.ShapeDtypeStruct(shape, dtype)

    def stored(self, matrix: Any, use: Use) -> Any:
        """Matrices as the leaf of a use stores them, inverse of `matrix`.

        A leaf of eight bits gets the nearest steps of its scale.
        """
        leaf = views.leaf(matrix, use.layout)
        on_grid = use.path in self.on_grid
        return scales.quantised(leaf, self, use) if on_grid else leaf

    def replaced(self, changed: Mapping[str, Any]) -> "Leaves":
        """The leaves of the same tree, other ones at some paths."""
        return Leaves({**self, **changed}.items(), self.structure)

    def tree(self, changed: dict[str, Any] | None = None) -> Any:
        """The tree, with other leaves at some paths."""
        return self.structure.unflatten((self | (changed or {})).values())
