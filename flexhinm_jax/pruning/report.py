"""What pruning did to every weight: four different facts, each on its own.

Zeros, pattern-legal groups, packed bytes and retained saliency are not the same thing,
and none of them is speed. The report never implies one from another.
"""

import dataclasses
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexhinm_jax import arguments, promotion
from flexhinm_jax.io import records
from flexhinm_jax.kernels import unpack
from flexhinm_jax.methods import Method
from flexhinm_jax.pruning.apply import dense_weight
from flexhinm_jax.pruning.solve import method_for
from flexhinm_jax.tracing.describe import aligned, coverage_lines, html_table
from flexhinm_jax.tracing.program import is_array
from flexhinm_jax.tracing.tree import Leaves
from flexhinm_jax.types import PackedWeight, Plan, Regions, State, Uses


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight, its stack counted together.

    Attributes:
      path: leaf path.
      shape: [*stack, o, i] of the matrix form.
      zeros: fraction of the weights that are exactly zero.
      groups: N:M groups over all rows; 0 for a pattern without groups.
      legal_groups: of those, how many have at most n non-zero weights.
      natural_24: fraction of groups of 4 consecutive inputs, in original order, with at
        most 2 non-zero weights: what a plain 2:4 consumer of the dense file would see.
      dense_columns: dense columns per tile, mean over tiles.
      nm_columns: N:M columns per tile, mean over tiles.
      pruned_columns: pruned columns per tile, mean over tiles.
      retained: share of the total saliency that is kept.
      overhead: weights of the block-diagonal factors per weight of the matrix, which is
        also their share of its multiplications; 0 without factors.
      dense_bytes: bytes of the dense leaf.
      packed_bytes: bytes of the packed leaf; equal to dense_bytes when it stays dense.
      note: why the leaf is not packed, or "".
      unseen: matrices that no calibration input reached, pruned by their weights alone.
      rounding: || packed - pruned || / || pruned || where the packed values are rounded
        to eight bits, else 0.
      product_zeros: fraction of zeros of a weight with factors where these are
        multiplied out, as in a dense file; `zeros` are those of the core, which the
        packed form has. None without factors.
    """

    path: str
    shape: tuple[int, ...]
    zeros: float
    groups: int
    legal_groups: int
    natural_24: float
    dense_columns: float
    nm_columns: float
    pruned_columns: float
    retained: float
    overhead: float
    dense_bytes: int
    packed_bytes: int
    note: str
    unseen: int = 0
    rounding: float = 0.0
    product_zeros: float | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))

    @property
    def dense_zeros(self) -> float:
        """Fraction of the weights that are zero in the dense form."""
        return self.zeros if self.product_zeros is None else self.product_zeros


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows, totals and skipped leaves of a pruned tree.

    Attributes:
      rows: one per pruned leaf, in order of execution.
      skipped: leaf path -> reason.
      tree_dense_bytes: bytes of all leaves when dense, pruned or not.
      tree_packed_bytes: bytes of all leaves of the packed tree.
      dense: path -> weights of the skipped leaves that are floating and have two or
        more axes.
      moved: skipped leaves that have new values all the same: biases that were
        refitted, and what was trained along. None where nobody has compared them, see
        the function `moved`.
    """

    rows: tuple[Row, ...]
    skipped: dict[str, str]
    tree_dense_bytes: int
    tree_packed_bytes: int
    dense: dict[str, int] = dataclasses.field(default_factory=dict)
    moved: tuple[str, ...] | None = None

    @property
    def coverage(self) -> float:
        """Share of the floating weights in leaves with two or more axes, pruned."""
        pruned = sum(r.weights for r in self.rows)
        return pruned / max(pruned + sum(self.dense.values()), 1)

    @property
    def coverage_lines(self) -> list[str]:
        """The coverage, the largest skipped leaves, and what else has to be said."""
        pruned = sum(r.weights for r in self.rows)
        lines = coverage_lines(pruned, self.dense, self.skipped)
        return [*lines, *_factor_lines(self.rows), *_larger_lines(self.rows)]

    @property
    def total(self) -> dict[str, float]:
        """Sums and weighted means over the rows."""
        weights = sum(r.weights for r in self.rows)
        mean = lambda name: (  # noqa: E731
            sum(getattr(r, name) * r.weights for r in self.rows) / max(weights, 1)
        )
        dense = sum(r.dense_bytes for r in self.rows)
        packed = sum(r.packed_bytes for r in self.rows)
        return {
            "weights": weights,
            "coverage": self.coverage,
            "zeros": mean("zeros"),
            "dense_zeros": mean("dense_zeros"),
            "groups": sum(r.groups for r in self.rows),
            "legal_groups": sum(r.legal_groups for r in self.rows),
            "natural_24": mean("natural_24"),
            "retained": mean("retained"),
            "overhead": mean("overhead"),
            "rounding": mean("rounding"),
            "unseen": sum(r.unseen for r in self.rows),
            "dense_bytes": dense,
            "packed_bytes": packed,
            "packed_ratio": packed / max(dense, 1),
            "tree_dense_bytes": self.tree_dense_bytes,
            "tree_packed_bytes": self.tree_packed_bytes,
            "tree_packed_ratio": self.tree_packed_bytes / max(self.tree_dense_bytes, 1),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "weights": [dataclasses.asdict(r) for r in self.rows],
            "total": self.total,
            "skipped": self.skipped,
            "dense": self.dense,
            "moved": None if self.moved is None else list(self.moved),
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return records.text(self.to_dict())

    def __repr__(self) -> str:
        """The totals in one line; `print` shows the table."""
        t = self.total
        return (
            f"Report(leaves={len(self.rows)}, zeros={t['zeros']:.2%}, "
            f"coverage={self.coverage:.2%}, "
            f"bytes={self.tree_dense_bytes:,} -> {self.tree_packed_bytes:,})"
        )

    def __str__(self) -> str:
        """An aligned table: one line per weight, the total, then the coverage."""
        return "\n".join([aligned(*self._table()), *self.coverage_lines])

    def _repr_html_(self) -> str:
        """The same table where a notebook shows the report."""
        lines = "<br>\n".join(map(html.escape, self.coverage_lines))
        return f"{html_table(*self._table())}\n<p>{lines}</p>"

    def _table(self) -> tuple[list[str], list[list[Any]]]:
        """(column titles, cells): one row per weight, then the total."""
        header = [
            "weight",
            "shape",
            "zeros",
            "legal groups",
            "dense/N:M/pruned",
            "retained",
            "dense B",
            "packed B",
            "ratio",
        ]
        body = [
            [
                r.path,
                "x".join(map(str, r.shape)),
                r.zeros,
                f"{r.legal_groups}/{r.groups}",
                f"{r.dense_columns:g}/{r.nm_columns:g}/{r.pruned_columns:g}",
                r.retained,
                r.dense_bytes,
                r.packed_bytes,
                r.note or f"{r.packed_bytes / max(r.dense_bytes, 1):.4f}",
            ]
            for r in self.rows
        ]
        t = self.total
        body.append(
            [
                "total",
                f"{t['weights']}",
                t["zeros"],
                f"{t['legal_groups']}/{t['groups']}",
                "",
                t["retained"],
                t["dense_bytes"],
                t["packed_bytes"],
                f"{t['packed_ratio']:.4f}",
            ]
        )
        more = ("unseen", "unseen"), ("factors", "overhead"), ("rounding", "rounding")
        for title, name in more:
            if t[name] > 0:
                header.insert(6, title)
                for r, line in zip(self.rows, body, strict=False):
                    line.insert(6, getattr(r, name))
                body[-1].insert(6, t[name])
        return header, body

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Draws the regions of every weight as stacked bars.

        Args:
          path: image file; its suffix chooses the format.

        Raises:
          ImportError: matplotlib is missing; says how to install it.
        """
        with arguments.extra("plot", "figures need matplotlib"):
            from matplotlib.figure import Figure
        height = max(2.5, 0.24 * len(self.rows) + 1.2)
        figure = Figure(figsize=(11, height), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        names = [r.path for r in self.rows]
        columns = np.array(
            [[r.dense_columns, r.nm_columns, r.pruned_columns] for r in self.rows]
        ).reshape(-1, 3)
        share = columns / np.maximum(columns.sum(1, keepdims=True), 1)
        start = np.zeros(len(names))
        colours = ("#1f4e79", "#5aa0d8", "#e3e3e3")
        for j, label in enumerate(("dense", "N:M", "pruned")):
            left.barh(names, share[:, j], left=start, color=colours[j], label=label)
            start = start + share[:, j]
        left.invert_yaxis()
        left.margins(y=0.01)
        left.set_xlim(0, 1)
        left.set_xlabel("share of the columns of a tile")
        left.tick_params(axis="y", labelsize=7)
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        right.barh(names, [r.retained for r in self.rows], color="#7f7f7f")
        right.set_xlim(0, 1)
        right.set_xlabel("share of the saliency that is kept")
        figure.savefig(Path(path), dpi=150)


@promotion.usual()
def report(
    plans: Mapping[str, Plan],
    packed: Any,
    uses: Uses | None = None,
    unseen: Mapping[str, int] | None = None,
) -> Report:
    """Measures what a set of plans did.

    Args:
      plans: concrete plans from `decide`.
      packed: the tree from `pack`.
      uses: from `discover`; adds the skipped leaves with their reasons.
      unseen: path -> matrices that no calibration input reached.

    Returns:
      The report; print it, or use `to_json` and `figure`.

    Raises:
      ValueError: a plan whose leaf is not in the packed tree, or no plans.
    """
    arguments.by_path(plans, Plan, "plans", "decide()")
    leaves = Leaves.of(packed)
    for path in plans:
        if path not in leaves:
            near = arguments.nearest(path, leaves)
            raise ValueError(f"{path}: in plans but not in the packed tree; {near}")
    unseen = unseen or {}
    rows = tuple(
        dataclasses.replace(
            _row(path, plan, leaves[path]), unseen=int(unseen.get(path, 0))
        )
        for path, plan in plans.items()
    )
    measured = {row.path: row.packed_bytes for row in rows}
    rest = [x for path, x in leaves.items() if path not in measured]
    tree = sum(measured.values()) + sum(map(_nbytes, rest))
    saved = sum(r.dense_bytes - r.packed_bytes for r in rows)
    skipped, dense = ({}, {}) if uses is None else (uses.skipped, uses.dense)
    return Report(rows, dict(skipped), tree + saved, tree, dict(dense))


def moved(
    paths: Iterable[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[str, ...]:
    """The leaves that are not the same to the bit.

    Args:
      paths: which leaves to compare, such as the skipped ones of a report.
      before: path -> array.
      after: path -> array of the same shape and dtype.
    """

    def raw(x: Any) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)

    def same(x: Any, y: Any) -> bool:
        return x is y or np.array_equal(raw(x), raw(y))

    return tuple(path for path in paths if not same(before[path], after[path]))


def _nbytes(leaf: Any) -> int:
    if isinstance(leaf, PackedWeight):
        return leaf.nbytes
    return int(leaf.size) * leaf.dtype.itemsize if is_array(leaf) else 0


def _row(path: str, plan: Plan, leaf: Any) -> Row:
    weight, packed = np.asarray(plan.weight, np.float32), isinstance(leaf, PackedWeight)
    nonzero = weight != 0
    regions = plan.support.regions
    groups, legal = (0, 0) if regions is None else _legal_groups(nonzero, regions)
    columns = (0.0, 0.0, 0.0) if regions is None else _columns(regions)
    natural = nonzero[..., : weight.shape[-1] // 4 * 4]
    natural = natural.reshape(*natural.shape[:-1], -1, 4).sum(-1) <= 2
    return Row(
        path=path,
        shape=tuple(weight.shape),
        zeros=float(1 - nonzero.mean()),
        groups=groups,
        legal_groups=legal,
        natural_24=float(natural.mean()) if natural.size else 0.0,
        dense_columns=columns[0],
        nm_columns=columns[1],
        pruned_columns=columns[2],
        retained=float(np.mean(np.asarray(plan.retained))),
        overhead=_factors(plan) / weight.size,
        dense_bytes=weight.size * leaf.dtype.itemsize,
        packed_bytes=_nbytes(leaf),
        note="" if packed else "stays dense: no regions to pack",
        rounding=_rounding(plan, leaf),
        product_zeros=_product_zeros(plan),
    )


def _product_zeros(plan: Plan) -> float | None:
    """See `Row`."""
    if plan.left is None and plan.right is None:
        return None
    return float(1 - (np.asarray(dense_weight(plan), np.float32) != 0).mean())


def _factor_lines(rows: Sequence[Row]) -> list[str]:
    """Where the zeros of weights with factors are."""
    some = [r for r in rows if r.product_zeros is not None]
    if not some:
        return []
    total = sum(r.weights for r in some)
    zeros = sum(r.dense_zeros * r.weights for r in some) / total
    return [
        f"the zeros of {len(some)} of {len(rows)} weights, such as {some[0].path}, are"
        " in their packed cores: in dense form the block-diagonal factors around these"
        f" are multiplied out, and {zeros:.1%} is zero"
    ]


def _larger_lines(rows: Sequence[Row]) -> list[str]:
    """Which weights packing makes larger, and why."""
    larger = [r for r in rows if r.packed_bytes > r.dense_bytes]
    reasons = {
        True: "factors take {:.2f} weights for each of the matrix; smaller blocks of"
        " the method (block=) pack smaller",
        False: "every tile of rows takes the space of the one with most dense columns;"
        " patterns whose tiles have equal regions, such as FlexHiNM, pack smaller",
    }
    lines = []
    for factored, reason in reasons.items():
        own = [r for r in larger if (r.product_zeros is not None) == factored]
        if not own:
            continue
        times = sum(r.packed_bytes for r in own) / sum(r.dense_bytes for r in own)
        overhead = sum(r.overhead * r.weights for r in own) / sum(
            r.weights for r in own
        )
        lines.append(
            f"packing makes {len(own)} of {len(rows)} weights {times:.2f} times as"
            f" large, such as {own[0].path}: {reason.format(overhead)}"
        )
    return lines


def _rounding(plan: Plan, leaf: Any) -> float:
    """How far packed values are from those of the plan; 0 where they are the same."""
    if not isinstance(leaf, PackedWeight) or leaf.scale is None:
        return 0.0
    pruned = np.asarray(dense_weight(plan), np.float32)
    lost = np.asarray(unpack(leaf), np.float32) - pruned
    return float(np.linalg.norm(lost) / max(np.linalg.norm(pruned), 1e-30))


def _factors(plan: Plan) -> int:
    """Weights of the block-diagonal factors of a plan."""
    return sum(f.blocks.size for f in (plan.left, plan.right) if f is not None)


def _legal_groups(nonzero: np.ndarray, regions: Regions) -> tuple[int, int]:
    """(groups, groups with at most n non-zero), over stack, tiles and rows."""
    o, i = nonzero.shape[-2:]
    stack = nonzero.reshape(-1, o, i)
    out_order = np.asarray(regions.out_order).reshape(len(stack), -1)
    in_order = np.asarray(regions.in_order)
    in_order = in_order.reshape(len(stack), -1, i)
    dense = np.asarray(regions.dense_end).reshape(len(stack), -1)
    nm = np.asarray(regions.nm_end).reshape(len(stack), -1)
    total = legal = 0
    for w, rows, columns, first, last in zip(
        stack, out_order, in_order, dense, nm, strict=True
    ):
        tiles = w[rows].reshape(len(columns), -1, i)
        for tile, order, a, b in zip(tiles, columns, first, last, strict=True):
            kept = tile[:, order[a:b]].reshape(len(tile), -1, regions.m).sum(-1)
            total += kept.size
            legal += int((kept <= regions.n).sum())
    return total, legal


def _columns(regions: Regions) -> tuple[float, float, float]:
    """Mean dense, N:M and pruned columns per tile."""
    dense = float(np.mean(np.asarray(regions.dense_end)))
    nm = float(np.mean(np.asarray(regions.nm_end)))
    return dense, nm - dense, regions.in_order.shape[-1] - nm


def worst(diagnostics: Mapping[str, Any]) -> dict[str, float | bool]:
    """One number per name for a whole stack: the largest, or whether all are true."""
    arrays = {name: np.asarray(x) for name, x in diagnostics.items()}
    return {
        name: bool(x.all()) if x.dtype == bool else x.max().item()
        for name, x in arrays.items()
    }


def notes(method: Method, states: Mapping[str, State], uses: Uses) -> dict[str, str]:
    """Path -> what a person should know, for the leaves that need a word.

    Args:
      method: the method that solved.
      states: concrete states from `solve`.
      uses: from `discover`.
    """
    texts = {}
    for path, state in states.items():
        own = method_for(method, uses.leaves[path])
        texts[path] = own.note(worst(own.diagnostics(state)))
    return {path: text for path, text in texts.items() if text}
