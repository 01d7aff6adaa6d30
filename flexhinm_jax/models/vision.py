"""Small image classifiers in Flax Linen: a residual MLP, a ViT and a ResNet.

They exist to show pruning on, so they have no dropout and no running statistics: every
one is a pure function of its parameters and a batch of images. Weights that a pattern
prunes are ordinary `Dense` and `Conv` kernels; widths are multiples of 32.

The ViT follows Dosovitskiy et al. 2020 (arXiv:2010.11929) with the mean of the patches
instead of a class token; the ResNet is pre-activation (He et al. 2016,
arXiv:1603.05027) with group norm (arXiv:1803.08494) in place of batch norm.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from flexhinm_jax.models.attention import attend

__all__ = ["MODELS", "ResNet", "ResidualMLP", "ViT", "create"]


class ResidualMLP(nn.Module):
    """Pre-norm residual blocks of two layers on the flattened image.

    Attributes:
      classes: outputs.
      width: width of the residual stream.
      hidden: width inside a block.
      depth: blocks.
    """

    classes: int
    width: int = 64
    hidden: int = 128
    depth: int = 2

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        x = nn.Dense(self.width, name="stem")(images.reshape(images.shape[0], -1))
        for block in range(self.depth):
            y = nn.LayerNorm(name=f"norm_{block}")(x)
            x = x + _feed_forward(y, self.hidden, self.width, f"block_{block}")
        return nn.Dense(self.classes, name="head")(nn.LayerNorm(name="norm")(x))


class ViT(nn.Module):
    """A vision transformer over square patches.

    Attributes:
      classes: outputs.
      patch: side of a patch; divides height and width of the images.
      width: width of the residual stream; a multiple of `heads`.
      hidden: width inside a feed-forward block.
      depth: blocks.
      heads: attention heads.
    """

    classes: int
    patch: int = 2
    width: int = 64
    hidden: int = 128
    depth: int = 2
    heads: int = 2

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        height, width = images.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"images of {height} x {width} are not a multiple of patch="
                f"{self.patch}; choose a patch that divides both sides"
            )
        step = (self.patch, self.patch)
        x = nn.Conv(self.width, step, step, name="stem")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        places = nn.initializers.normal(0.02)
        x = x + self.param("positions", places, (1, *x.shape[1:]), jnp.float32)
        for block in range(self.depth):
            y = nn.LayerNorm(name=f"attention_norm_{block}")(x)
            x = x + self._attention(y, f"attention_{block}")
            y = nn.LayerNorm(name=f"norm_{block}")(x)
            x = x + _feed_forward(y, self.hidden, self.width, f"block_{block}")
        pooled = jnp.mean(nn.LayerNorm(name="norm")(x), axis=1)
        return nn.Dense(self.classes, name="head")(pooled)

    def _attention(self, x: Array, name: str) -> Array:
        def heads(part: str) -> Array:
            y = nn.Dense(self.width, name=f"{name}_{part}")(x)
            return y.reshape(*y.shape[:2], self.heads, -1)

        mixed = attend(heads("query"), heads("key"), heads("value"))
        return nn.Dense(self.width, name=f"{name}_out")(mixed.reshape(x.shape))


class ResNet(nn.Module):
    """Pre-activation residual blocks of two 3 x 3 convolutions.

    Attributes:
      classes: outputs.
      widths: channels of each stage; every stage after the first halves the image.
      depth: blocks per stage.
    """

    classes: int
    widths: tuple[int, ...] = (32, 64)
    depth: int = 1

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Logits [batch, classes] of images [batch, height, width, channels]."""
        x = nn.Conv(self.widths[0], (3, 3), name="stem")(images)
        for stage, width in enumerate(self.widths):
            for block in range(self.depth):
                stride = 2 if stage > 0 and block == 0 else 1
                x = self._block(x, width, stride, f"stage_{stage}_{block}")
        pooled = jnp.mean(_normalised(x, "norm"), axis=(1, 2))
        return nn.Dense(self.classes, name="head")(pooled)

    def _block(self, x: Array, width: int, stride: int, name: str) -> Array:
        y = _normalised(x, f"{name}_norm_0")
        steps = (stride, stride)
        if x.shape[-1] != width or stride != 1:
            x = nn.Conv(width, (1, 1), steps, name=f"{name}_skip")(y)
        y = nn.Conv(width, (3, 3), steps, name=f"{name}_conv_0")(y)
        y = _normalised(y, f"{name}_norm_1")
        return x + nn.Conv(width, (3, 3), name=f"{name}_conv_1")(y)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": ResidualMLP,
    "vit": ViT,
    "resnet": ResNet,
}
"""Name -> a function of the number of classes and of the fields of the module."""


def create(name: str, classes: int, **fields: int | tuple[int, ...]) -> nn.Module:
    """The model of that name.

    Args:
      name: a key of `MODELS`.
      classes: outputs, at least 2.
      **fields: fields of the module other than its defaults.

    Returns:
      A Flax module; its parameters come from `init`.

    Raises:
      ValueError: an unknown name, or too few classes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = create("mlp", 10, width=32)
      >>> images = jnp.zeros((3, 8, 8, 1))
      >>> model.apply(model.init(jax.random.key(0), images), images).shape
      (3, 10)
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    if classes < 2:
        raise ValueError(f"classes={classes}: a classifier needs at least 2")
    return MODELS[name](classes, **fields)


def _feed_forward(x: Array, hidden: int, width: int, name: str) -> Array:
    x = nn.gelu(nn.Dense(hidden, name=f"{name}_up")(x))
    return nn.Dense(width, name=f"{name}_down")(x)


def _normalised(x: Array, name: str) -> Array:
    groups = max(1, x.shape[-1] // 16)
    return nn.relu(nn.GroupNorm(num_groups=groups, name=name)(x))
