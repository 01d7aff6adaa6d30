"""Sparsity for JAX: prune any function's weights to shapes that hardware exploits."""

from flexhinm_jax import kernels, methods, models, patterns
from flexhinm_jax.checks import verify
from flexhinm_jax.kernels import sparse_dot
from flexhinm_jax.methods import (
    ALPS,
    ARMOR,
    RIA,
    Fisher,
    GumbelPatterns,
    HardConcrete,
    HyperPrune,
    Magnitude,
    MaskLLM,
    MaskPro,
    Method,
    NoWagP,
    Patch,
    PermLLM,
    ProxSparse,
    RefineMask,
    Refit,
    SparseGPT,
    SparseSwaps,
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
from flexhinm_jax.pruning.allocate import allocate, budgets
from flexhinm_jax.pruning.apply import decide, densify, keep_tree, pack
from flexhinm_jax.pruning.owl import OWL
from flexhinm_jax.pruning.prune import Pruned, prune
from flexhinm_jax.pruning.report import Report, report
from flexhinm_jax.pruning.share_orders import share_orders
from flexhinm_jax.pruning.solve import solve
from flexhinm_jax.pruning.statistics import calibrate, statistics_bytes
from flexhinm_jax.sequential.cuts import Layer
from flexhinm_jax.sequential.sequential import prune_sequential
from flexhinm_jax.sequential.trained import Trained
from flexhinm_jax.tracing.describe import describe
from flexhinm_jax.tracing.discover import discover
from flexhinm_jax.tracing.sparsify import sparsify
from flexhinm_jax.training import objectives, schedules
from flexhinm_jax.training.fit import fit, learn
from flexhinm_jax.training.gradual import gradual
from flexhinm_jax.training.hyper import hyper_prune
from flexhinm_jax.training.mask_optimizers import relative
from flexhinm_jax.training.optimizers import keep_from_zeros, keep_sparse
from flexhinm_jax.training.phases import Duration, Phase
from flexhinm_jax.training.pulling import prox_sparse, scale_by_adam_s
from flexhinm_jax.training.reconstruct import Reconstruct, reconstruct
from flexhinm_jax.training.run import Run
from flexhinm_jax.training.schedules import Stage, flexhinm_gp
from flexhinm_jax.training.sharding import check_sharding
from flexhinm_jax.training.state import Training, harden, init_training, next_stage
from flexhinm_jax.training.step import make_step
from flexhinm_jax.training.tune import Tuned, tune
from flexhinm_jax.training.warm_start import adopt
from flexhinm_jax.types import PackedWeight, Plan, Regions, State, Stats, Support, Uses

__version__ = "0.1.0"

__all__ = [
    "ALPS",
    "ARMOR",
    "NM",
    "OWL",
    "RIA",
    "ChannelSearch",
    "Duration",
    "Fisher",
    "FlexHiNM",
    "GumbelPatterns",
    "Gyro",
    "HardConcrete",
    "HiNM",
    "HyperPrune",
    "Layer",
    "Magnitude",
    "MaskLLM",
    "MaskPro",
    "Method",
    "NoWagP",
    "PackedWeight",
    "Patch",
    "Pattern",
    "PermLLM",
    "Phase",
    "Plan",
    "ProxSparse",
    "Pruned",
    "RandomRows",
    "Reconstruct",
    "RefineMask",
    "Refit",
    "Regions",
    "Report",
    "Run",
    "SparseGPT",
    "SparseSwaps",
    "Stage",
    "StagedALPS",
    "State",
    "Stats",
    "Support",
    "Trained",
    "Training",
    "Tiles",
    "Transposable",
    "Tuned",
    "Unstructured",
    "Uses",
    "Vector",
    "Wanda",
    "accumulate_gradients",
    "adopt",
    "allocate",
    "budgets",
    "calibrate",
    "check_sharding",
    "decide",
    "densify",
    "describe",
    "discover",
    "fit",
    "flexhinm_gp",
    "gradual",
    "harden",
    "hyper_prune",
    "init_training",
    "keep_from_zeros",
    "keep_sparse",
    "keep_tree",
    "kernels",
    "learn",
    "make_step",
    "methods",
    "models",
    "next_stage",
    "objectives",
    "pack",
    "patterns",
    "prox_sparse",
    "prune",
    "prune_sequential",
    "reconstruct",
    "relative",
    "scale_by_adam_s",
    "report",
    "schedules",
    "share_orders",
    "solve",
    "sparse_dot",
    "sparsify",
    "statistics_bytes",
    "tune",
    "verify",
]
