"""A tiny encoder and token lists, for what trains on packed sentences."""

import numpy as np

from flexhinm_jax.models import encoder
from train.lab.teacher import Recipe

CONFIG = encoder.EncoderConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    initializer_range=0.2,
)
RECIPE = Recipe(
    learning_rate=2e-3, rows=2, length=16, precision="float32", cache_bytes=2000
)
LISTS = [
    [2, *row.tolist(), 3] for row in np.random.default_rng(0).integers(4, 30, (24, 6))
]
