"""A small ResNet on scikit-learn's digits: 77 thousand weights.

Result: negative log-likelihood .217 dense, accuracy .972; .250 and .963 with FlexHiNM +
  Gyro at 87.5 % (1 seed).
Time: 50 CPU seconds.
Command: python -m train.vision --config digits_resnet --method flexhinm_gyro
"""

from train.vision import Config

CONFIG = Config(
    name="digits_resnet",
    model="resnet",
    fields={"widths": (32, 64), "depth": 1},
    rules=(("head|stem", "skip"),),
    dense_steps=200,
    steps=200,
    batch_size=64,
    learning_rate=2e-3,
)
