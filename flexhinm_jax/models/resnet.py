"""ResNets as pure functions over a checkpoint's own keys.

He et al. 2015 (arXiv:1512.03385), with the stride of a bottleneck in its 3 x 3
convolution unless the configuration says otherwise. Batch norms take their running
statistics: these functions classify, calibrate and prune; they do not update them.
Parameters are the flat dict that `io.huggingface.read` returns, kernels
`[out, in, height, width]`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.models import fields, parameters, transformer
from flexhinm_jax.models.transformer import ACTIVATIONS

__all__ = ["FAMILIES", "ResNetConfig", "classify", "init", "rules", "shapes"]

FAMILIES = ("resnet",)
"""Supported values of `model_type`."""

STEM = "resnet.embedder.embedder"
HEAD = "classifier.1"
EPS = 1e-5  # of PyTorch's batch norms
REDUCTION = 4  # a bottleneck is narrower by this factor
LAYERS = ("bottleneck", "basic")
SIDE = 224  # of the images it was made for; it reads others


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Sizes of a ResNet, under the names of Hugging Face's `config.json`.

    Attributes:
      num_labels: classes.
      num_channels: channels of the images.
      embedding_size: channels behind the first convolution.
      hidden_sizes: channels of each stage.
      depths: layers of each stage.
      layer_type: "bottleneck" or "basic".
      hidden_act: activation, a key of `transformer.ACTIVATIONS`.
      downsample_in_first_stage: whether the first stage halves the image too.
      downsample_in_bottleneck: whether a bottleneck halves the image in its first
        convolution instead of its second.
    """

    num_labels: int
    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False

    def __post_init__(self):
        """Validates types, ranges and names."""
        fields.check(self)
        fields.chosen("hidden_act", self.hidden_act, ACTIVATIONS)
        fields.chosen("layer_type", self.layer_type, LAYERS)
        if len(self.hidden_sizes) != len(self.depths) or not self.depths:
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes}, depths={self.depths}: need one of"
                " either for each stage"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.num_channels, SIDE, SIDE

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ResNetConfig":
        """Reads the contents of a Hugging Face `config.json`; other fields are ignored.

        Raises:
          ValueError: a field is wrong or asks for something that `classify` does not
            do: another model type, layer type or activation, or no classifier.
        """
        fields.chosen("model_type", config.get("model_type"), FAMILIES)
        fields.architecture(config, ["ResNetForImageClassification"])
        known = {"num_labels": fields.label_count(config)}
        return cls(**fields.read(cls, config, known))


@dataclasses.dataclass(frozen=True)
class _Conv:
    """A convolution with its norm: place of its keys, sizes."""

    at: str
    out: int
    inputs: int
    side: int
    stride: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape."""
        norm = f"{self.at}.normalization"
        kernel = (self.out, self.inputs, self.side, self.side)
        statistics = (f"{norm}.running_mean", f"{norm}.running_var")
        return {
            f"{self.at}.convolution.weight": kernel,
            **transformer.norm_shapes(norm, self.out),
            **dict.fromkeys(statistics, (self.out,)),
        }


@dataclasses.dataclass(frozen=True)
class _Block:
    """A residual layer: convolutions one after another, and that of the shortcut."""

    convs: tuple[_Conv, ...]
    shortcut: _Conv | None


def _stem(config: ResNetConfig) -> _Conv:
    return _Conv(STEM, config.embedding_size, config.num_channels, 7, 2)


def _blocks(config: ResNetConfig) -> Iterator[_Block]:
    """The residual layers in order of execution."""
    inputs = config.embedding_size
    for stage, (out, depth) in enumerate(
        zip(config.hidden_sizes, config.depths, strict=True)
    ):
        for layer in range(depth):
            halves = layer == 0 and (stage > 0 or config.downsample_in_first_stage)
            stride = 2 if halves else 1
            at = f"resnet.encoder.stages.{stage}.layers.{layer}"
            shortcut = None
            if inputs != out or stride != 1:
                shortcut = _Conv(f"{at}.shortcut", out, inputs, 1, stride)
            if config.layer_type == "basic":
                sizes = [(out, inputs, 3, stride), (out, out, 3, 1)]
            else:
                inner = out // REDUCTION
                early = config.downsample_in_bottleneck
                sizes = [
                    (inner, inputs, 1, stride if early else 1),
                    (inner, inner, 3, 1 if early else stride),
                    (out, inner, 1, 1),
                ]
            convs = (_Conv(f"{at}.layer.{k}", *size) for k, size in enumerate(sizes))
            yield _Block(tuple(convs), shortcut)
            inputs = out


def shapes(config: ResNetConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every parameter that `classify` reads."""
    wanted = _stem(config).shapes
    for block in _blocks(config):
        for conv in (*block.convs, *([block.shortcut] if block.shortcut else ())):
            wanted |= conv.shapes
    width = config.hidden_sizes[-1]
    return wanted | transformer.dense_shapes(HEAD, config.num_labels, width)


def init(
    key: Array, config: ResNetConfig, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, Array]:
    """Random parameters: normal weights, zero biases and means, unit norms.

    Args:
      key: PRNG key, consumed.
      config: sizes.
      dtype: dtype of all parameters.

    Returns:
      Flat dict with the keys and shapes of `shapes(config)`.
    """
    return parameters.init(key, shapes(config), None, dtype)


def rules(config: ResNetConfig) -> dict[str, str]:
    """Rules for pruning: what reads the pixels and what gives the classes stays."""
    del config
    return {rf"^{STEM}\.": "skip", rf"^{HEAD}\.": "skip"}


def classify(params: Mapping[str, Array], pixels: Array, config: ResNetConfig) -> Array:
    """Logits of images.

    Args:
      params: flat dict of parameters; keys beyond those of `shapes(config)` (counts of
        batches) are not read.
      pixels: [batch, channels, height, width], normalised as the model wants them.
      config: sizes.

    Returns:
      [batch, num_labels] in the dtype of the parameters.

    Raises:
      ValueError: a parameter is missing or has a shape that disagrees with `config`, or
        the images have another number of channels.
    """
    if pixels.ndim != 4 or pixels.shape[1] != config.num_channels:
        raise ValueError(
            f"images of shape {pixels.shape}; this model reads"
            f" (images, {config.num_channels}, height, width)"
        )
    params = parameters.select(params, shapes(config))
    act = ACTIVATIONS[config.hidden_act]
    x = act(_normed(params, _stem(config), pixels))
    sides = ((0, 0), (0, 0), (1, 1), (1, 1))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), sides)
    for block in _blocks(config):
        y = x
        for k, conv in enumerate(block.convs):
            y = _normed(params, conv, y if k == 0 else act(y))
        if block.shortcut is not None:
            x = _normed(params, block.shortcut, x)
        x = act(x + y)
    pooled = jnp.mean(x.astype(jnp.float32), axis=(2, 3)).astype(x.dtype)
    return transformer.dense(params, HEAD, pooled)


def _normed(params: Mapping[str, Array], conv: _Conv, x: Array) -> Array:
    """A convolution and its batch norm, [batch, out, height, width]."""
    kernel = params[f"{conv.at}.convolution.weight"]
    x = lax.conv_general_dilated(
        x.astype(kernel.dtype),
        kernel,
        window_strides=(conv.stride, conv.stride),
        padding=[(conv.side // 2, conv.side // 2)] * 2,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )

    def statistic(name: str) -> Array:
        values = params[f"{conv.at}.normalization.{name}"]
        return values.astype(jnp.float32)[:, None, None]

    scale = statistic("weight") * lax.rsqrt(statistic("running_var") + jnp.float32(EPS))
    shift = statistic("bias") - statistic("running_mean") * scale
    return (x.astype(jnp.float32) * scale + shift).astype(x.dtype)
