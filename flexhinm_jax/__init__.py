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
    StagedALPS,
    Wanda,
    accumulate_gradients,
)
from flexhinm_jax.patterns import (
    NM,
    ChannelSearch,
    FlexHiNM,
    Gyro,
    HiNM,
    Pattern,
    RandomRows,
    Tiles,
    Transposable,
    Unstructured,
    Vector,
)
from flexhinm_jax.training.optimizer import keep_from_zeros, keep_sparse
from flexhinm_jax.transforms.allocate import allocate, budgets
from flexhinm_jax.transforms.calibrate import calibrate, statistics_bytes
from flexhinm_jax.transforms.discover import describe, discover
from flexhinm_jax.transforms.report import Report, report
from flexhinm_jax.transforms.sequential import Layer, prune_sequential
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
    "ChannelSearch",
    "Fisher",
    "FlexHiNM",
    "Gyro",
    "HiNM",
    "Layer",
    "Magnitude",
    "Method",
    "PackedWeight",
    "Pattern",
    "Plan",
    "Pruned",
    "RandomRows",
    "RefineMask",
    "Refit",
    "Regions",
    "Report",
    "SparseGPT",
    "StagedALPS",
    "State",
    "Stats",
    "Support",
    "Tiles",
    "Transposable",
    "Unstructured",
    "Uses",
    "Vector",
    "Wanda",
    "accumulate_gradients",
    "allocate",
    "budgets",
    "calibrate",
    "decide",
    "densify",
    "describe",
    "discover",
    "keep_from_zeros",
    "keep_sparse",
    "keep_tree",
    "kernels",
    "methods",
    "pack",
    "patterns",
    "prune",
    "prune_sequential",
    "report",
    "solve",
    "sparse_dot",
    "sparsify",
    "statistics_bytes",
    "verify",
]
