"""A Llama-style decoder of 1.2 million weights on the bytes of Python's library.

Result: 2.158 bits per byte of the validation text when it trains on dense; under fixed
  FlexHiNM + Gyro masks 2.164, 2.256, 2.494 and 2.845 at 50, 75, 87.5 and 93.75 %.
Time: 170 CPU seconds for the dense model, 50 for each pruned one, and about 50 more to
  compile the permutation search.
Command: python -m train.language --method flexhinm_gyro --sparsity 0.75
"""

from flexhinm_jax.models.decoder import DecoderConfig
from train.language import Config

CONFIG = Config(
    name="bytes",
    model=DecoderConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=352,
        initializer_range=0.05,
    ),
    rules=(("lm_head", "skip"),),
    batch_size=8,
    length=128,
    dense_steps=700,
    steps=200,
    learning_rate=4e-3,
    prune_rate=2e-3,
    weight_decay=0.05,
    every=25,
)
