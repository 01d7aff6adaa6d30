"""Vision transformers as pure functions over a checkpoint's own keys: ViT and DeiT.

Dosovitskiy et al. 2020 (arXiv:2010.11929); Touvron et al. 2021 (arXiv:2012.12877),
which reads classes off a second token too. Dropout is absent. Parameters are the flat
dict that `io.huggingface.read` returns, weights `[out, in]`, kernels
`[out, in, height, width]`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.models import fields, parameters, transformer
from flexhinm_jax.models.transformer import LayerKeys

__all__ = ["FAMILIES", "Family", "ViTConfig", "classify", "init", "rules", "shapes"]

KEYS = LayerKeys(
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    attention_norm="layernorm_before",
    norm="layernorm_after",
    pre_norm=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a `model_type` means.

    Attributes:
      prefix: what all keys but those of the heads begin with.
      tokens: tokens before the patches, by their keys.
      heads: architecture -> classifiers, the first on the first token and so on; the
        logits are their mean.
    """

    prefix: str
    tokens: tuple[str, ...]
    heads: Mapping[str, tuple[str, ...]]


FAMILIES: dict[str, Family] = {
    "vit": Family(
        prefix="vit",
        tokens=("cls_token",),
        heads={"ViTForImageClassification": ("classifier",)},
    ),
    "deit": Family(
        prefix="deit",
        tokens=("cls_token", "distillation_token"),
        heads={
            "DeiTForImageClassification": ("classifier",),
            "DeiTForImageClassificationWithTeacher": (
                "cls_classifier",
                "distillation_classifier",
            ),
        },
    ),
}
"""Supported values of `model_type`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of a vision transformer, under the names of Hugging Face's `config.json`.

    Attributes:
      model_type: a key of `FAMILIES`.
      architecture: a key of the family's `heads`.
      num_labels: classes.
      hidden_size: width of the hidden states; a multiple of `num_attention_heads`.
      num_hidden_layers: layers.
      num_attention_heads: heads per layer.
      intermediate_size: width inside the feed-forward block.
      image_size: side of the images; a multiple of `patch_size`.
      patch_size: side of a patch.
      num_channels: channels of the images.
      qkv_bias: whether queries, keys and values have biases.
      layer_norm_eps: added to the variance in layer norms.
      hidden_act: activation, a key of `transformer.ACTIVATIONS`.
      initializer_range: standard deviation of random weights.
    """

    model_type: str = "vit"
    architecture: str = "ViTForImageClassification"
    num_labels: int
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    initializer_range: float = 0.02

    def __post_init__(self):
        """Validates types, ranges, the activation and what must divide what."""
        fields.check(self)
        transformer.check(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of"
                f" patch_size={self.patch_size}"
            )

    @property
    def family(self) -> Family:
        """What its model type means."""
        return FAMILIES[self.model_type]

    @property
    def heads(self) -> tuple[str, ...]:
        """Keys of the classifiers."""
        return self.family.heads[self.architecture]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.num_channels, self.image_size, self.image_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ViTConfig":
        """Reads the contents of a Hugging Face `config.json`; other fields are ignored.

        Raises:
          ValueError: a field is wrong or asks for something that `classify` does not
            do: another model type, no classifier, images that are not square.
        """
        kind = fields.chosen("model_type", config.get("model_type"), FAMILIES)
        known = {
            "model_type": kind,
            "architecture": fields.architecture(config, FAMILIES[kind].heads),
            "num_labels": fields.label_count(config),
        }
        for name in ("image_size", "patch_size"):
            size = config.get(name)
            if isinstance(size, list):
                if not size or any(side != size[0] for side in size):
                    raise ValueError(f"{name}={size} is not supported; give a square")
                known[name] = size[0]
        return cls(**fields.read(cls, config, known))


def shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every parameter that `classify` reads."""
    at, width, family = config.family.prefix, config.hidden_size, config.family
    side, tokens = config.image_size // config.patch_size, len(family.tokens)
    patch = (config.num_channels, config.patch_size, config.patch_size)
    projection = f"{at}.embeddings.patch_embeddings.projection"
    wanted: dict[str, tuple[int, ...]] = {
        f"{projection}.weight": (width, *patch),
        f"{projection}.bias": (width,),
        f"{at}.embeddings.position_embeddings": (1, tokens + side * side, width),
    }
    for name in family.tokens:
        wanted[f"{at}.embeddings.{name}"] = (1, 1, width)
    for layer in range(config.num_hidden_layers):
        place = f"{at}.encoder.layer.{layer}"
        wanted |= transformer.layer_shapes(place, config, KEYS, config.qkv_bias)
    wanted |= transformer.norm_shapes(f"{at}.layernorm", width)
    for head in config.heads:
        wanted |= transformer.dense_shapes(head, config.num_labels, width)
    return wanted


def init(
    key: Array, config: ViTConfig, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, Array]:
    """Random parameters: normal weights, zero biases, unit norms.

    Args:
      key: PRNG key, consumed.
      config: sizes.
      dtype: dtype of all parameters.

    Returns:
      Flat dict with the keys and shapes of `shapes(config)`.
    """
    return parameters.init(key, shapes(config), config.initializer_range, dtype)


def rules(config: ViTConfig) -> dict[str, str]:
    """Rules for pruning: what reads the pixels and what gives the classes stays."""
    del config
    return {"patch_embeddings": "skip", "classifier": "skip"}


def classify(params: Mapping[str, Array], pixels: Array, config: ViTConfig) -> Array:
    """Logits of images.

    Args:
      params: flat dict of parameters; keys beyond those of `shapes(config)` are not
        read.
      pixels: [batch, channels, height, width], normalised as the model wants them.
      config: sizes.

    Returns:
      [batch, num_labels] in the dtype of the parameters.

    Raises:
      ValueError: a parameter is missing or has a shape that disagrees with `config`, or
        the images have another shape.
    """
    if pixels.shape[1:] != config.image_shape:
        raise ValueError(
            f"images of shape {pixels.shape[1:]}; this model reads {config.image_shape}"
            " (channels, height, width)"
        )
    params = parameters.select(params, shapes(config))
    at, family = f"{config.family.prefix}.embeddings", config.family
    kernel = params[f"{at}.patch_embeddings.projection.weight"]
    patches = lax.conv_general_dilated(
        pixels.astype(kernel.dtype),
        kernel,
        window_strides=(config.patch_size, config.patch_size),
        padding="VALID",
        dimension_numbers=("NCHW", "OIHW", "NHWC"),
    )
    patches = patches + params[f"{at}.patch_embeddings.projection.bias"]
    batch, _, _, width = patches.shape
    patches = patches.reshape(batch, -1, width)
    tokens = [
        jnp.broadcast_to(params[f"{at}.{name}"], (batch, 1, width))
        for name in family.tokens
    ]
    x = jnp.concatenate([*tokens, patches], axis=1)
    x = x + params[f"{at}.position_embeddings"]
    for layer in range(config.num_hidden_layers):
        place = f"{family.prefix}.encoder.layer.{layer}"
        x = transformer.layer(params, place, x, config, KEYS)
    norm = f"{family.prefix}.layernorm"
    x = transformer.layer_norm(params, norm, x, config.layer_norm_eps)
    logits = [
        transformer.dense(params, head, x[:, k]) for k, head in enumerate(config.heads)
    ]
    return sum(logits[1:], logits[0]) / len(logits)
