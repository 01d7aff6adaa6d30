"""Sparsity for JAX: prune any function's weights to shapes that hardware exploits."""

from flexhinm_jax import kernels, methods, patterns
from flexhinm_jax.checks import verify
from flexhinm_jax.kernels import sparse_dot
from flexhinm_jax.methods import Magnitude, Wanda
from flexhinm_jax.patterns import NM, FlexHiNM, HiNM, Unstructured, Vector

__version__ = "0.1.0"
