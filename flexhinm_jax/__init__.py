"""Sparsity for JAX: prune any function's weights to shapes that hardware exploits."""

from flexhinm_jax import kernels, methods, patterns
from flexhinm_jax.checks import verify
from flexhinm_jax.kernels import sparse_dot
from flexhinm_jax.methods import (
    ALPS,
    RIA,
    Fisher,
    Magnitude,
    Method,
    RefineMask,
    Refit,
    SparseGPT,
    Wanda,
    accumulate_gradients,
)
from flexhinm_jax.patterns import (
    NM,
    FlexHiNM,
    HiNM,
    Pattern,
    Transposable,
    Unstructured,
    Vector,
)
from flexhinm_jax.transforms.calibrate import calibrate, statistics_bytes
from flexhinm_jax.transforms.discover import describe, discover
from flexhinm_jax.transforms.report import Report, report
from flexhinm_jax.transforms.sparsify import sparsify
from flexhinm_jax.transforms.tree import (
    Pruned,
    decide,
    densify,
    keep_tree,
    pack,
    prune,
    solve,
)
from flexhinm_jax.types import PackedWeight, Plan, Regions, State, Stats, Support, Uses

__version__ = "0.1.0"

__all__ = [
    "ALPS",
    "NM",
    "RIA",
    "Fisher",
    "FlexHiNM",
    "HiNM",
    "Magnitude",
    "Method",
    "PackedWeight",
    "Pattern",
    "Plan",
    "Pruned",
    "RefineMask",
    "Refit",
    "Regions",
    "Report",
    "SparseGPT",
    "State",
    "Stats",
    "Support",
    "Transposable",
    "Unstructured",
    "Uses",
    "Vector",
    "Wanda",
    "accumulate_gradients",
    "calibrate",
    "decide",
    "densify",
    "describe",
    "discover",
    "keep_tree",
    "kernels",
    "methods",
    "pack",
    "patterns",
    "prune",
    "report",
    "solve",
    "sparse_dot",
    "sparsify",
    "statistics_bytes",
    "verify",
]
