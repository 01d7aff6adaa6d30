"""A residual MLP on scikit-learn's digits: 38 thousand weights in all.

Narrow on purpose: at 93.75 % every tile of 32 rows keeps the weights of 4 columns of
64, so what stays decides.

Result: negative log-likelihood on the test digits .042 dense; at 75, 87.5 and 93.75 %
  .129, .393 and .902 with HiNM + Gyro, .100, .347 and .876 with FlexHiNM-GP without
  noise, .081, .160 and .298 unstructured (3 seeds).
Time: 230 CPU seconds for the whole comparison of 9 recipes, 3 sparsities and 3 seeds.
Command: make train-digits
"""

from train.vision import Config

CONFIG = Config(
    name="digits_mlp",
    model="mlp",
    fields={"width": 64, "hidden": 128, "depth": 2},
    rules=(("head", "skip"),),
    dense_steps=600,
    steps=600,
    batch_size=128,
    learning_rate=2e-3,
    prune_rate=2e-3,
)
