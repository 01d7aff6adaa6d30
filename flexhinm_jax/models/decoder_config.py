"""Sizes and switches of a decoder, from Hugging Face's `config.json`.

One configuration covers Llama 2 and 3, Mistral without a sliding window, Qwen2 and
Qwen2.5, and Qwen3: they differ in biases, in norms of queries and keys, in rotary
positions and in what a missing field means.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flexhinm_jax.models import fields, rope

__all__ = ["FAMILIES", "DecoderConfig"]


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` means.

    Attributes:
      defaults: fields of `config.json` that may be left out.
      biases: whether queries, keys and values have biases and the output has none;
        None where `attention_bias` of the file says so, for the output too.
      mlp_bias: whether the file may ask for biases in the feed-forward block.
      qk_norm: whether queries and keys are normalised.
    """

    defaults: Mapping[str, Any]
    biases: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(defaults={"max_position_embeddings": 2048}, mlp_bias=True),
    "mistral": Family(
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        biases=False,
    ),
    "qwen2": Family(
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 32},
        biases=True,
    ),
    "qwen3": Family(
        defaults={
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
        qk_norm=True,
    ),
}
"""Supported values of `model_type`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder, under the names of Hugging Face's `config.json`.

    Attributes:
      vocab_size: rows of the token table; 256 for bytes.
      hidden_size: width of the residual stream.
      num_hidden_layers: layers.
      num_attention_heads: query heads per layer.
      num_key_value_heads: key and value heads per layer; divides the query heads.
      intermediate_size: width inside the feed-forward block.
      head_dim: channels of a head, even; None for hidden_size / num_attention_heads.
      rms_norm_eps: added to the mean square in norms.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: how the wavelengths are stretched; None for not at all.
      max_position_embeddings: longest text the model was made for; None for no limit.
      tie_word_embeddings: whether the token table is also the output layer.
      attention_bias: whether queries, keys and values have biases.
      attention_output_bias: whether the output of attention has one.
      mlp_bias: whether the feed-forward block has biases.
      qk_norm: whether every head of queries and keys is normalised before it turns.
      initializer_range: standard deviation of random weights.
    """

    vocab_size: int = 256
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: rope.Scaling | None = None
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        """Validates types, ranges and what must divide what."""
        fields.check(self)
        if not isinstance(self.rope_scaling, rope.Scaling | None):
            raise ValueError(
                f"rope_scaling must be a scaling of models.rope or None, got"
                f" {self.rope_scaling!r}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of"
                f" num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of"
                f" num_attention_heads={self.num_attention_heads}; give head_dim"
            )
        if self.head_size < 1 or self.head_size % 2:
            raise ValueError(
                f"heads of {self.head_size} channels; rotary positions need an even"
                " number"
            )

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        if self.head_dim is not None:
            return self.head_dim
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any], /) -> "DecoderConfig":
        """Reads the contents of a Hugging Face `config.json`; other fields are ignored.

        A field that is missing or null means what it means to `transformers`; sizes
        must be there.

        Raises:
          ValueError: a field is missing or wrong, or asks for something that the
            decoder does not do: another architecture or activation, a sliding window
            in use, quantised weights, an unknown scaling of positions.

        Example:
          >>> config = DecoderConfig.from_dict({
          ...     "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896,
          ...     "num_hidden_layers": 24, "num_attention_heads": 14,
          ...     "num_key_value_heads": 2, "intermediate_size": 4864,
          ...     "rope_theta": 1e6, "tie_word_embeddings": True})
          >>> config.attention_bias, config.head_size, config.max_position_embeddings
          (True, 64, 32768)
        """
        kind = config_json.get("model_type")
        if kind not in list(FAMILIES):
            raise ValueError(
                f"model_type={kind!r} is not supported; supported are"
                f" {', '.join(FAMILIES)}"
            )
        family = FAMILIES[kind]
        given = {k: v for k, v in config_json.items() if v is not None}
        # A missing window has the default of its family, null means none.
        for name, value in family.defaults.items():
            if name not in config_json or name != "sliding_window":
                given.setdefault(name, value)
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
        _check_supported(kind, given)
        biased = given.get("attention_bias", False)
        values: dict[str, Any] = {
            "attention_bias": biased if family.biases is None else family.biases,
            "attention_output_bias": biased if family.biases is None else False,
            "mlp_bias": family.mlp_bias and given.get("mlp_bias", False),
            "qk_norm": family.qk_norm,
        }
        theta, scaling = rope.from_dict(given, given["max_position_embeddings"])
        values |= {"rope_theta": theta, "rope_scaling": scaling}
        for field in dataclasses.fields(cls):
            if field.name in values:
                continue
            if field.name in given:
                values[field.name] = given[field.name]
            elif field.name == "vocab_size" or field.default is dataclasses.MISSING:
                raise ValueError(f"{field.name} is missing from the configuration")
        return cls(**values)


def _check_supported(kind: str, given: Mapping[str, Any]) -> None:
    """Raises for what would change the numbers without the decoder knowing."""
    activation = given.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act={activation!r} is not supported; supported is 'silu'"
        )
    if given.get("quantization_config"):
        raise ValueError(
            "quantization_config: quantised weights are not supported; give the"
            " directory with float weights"
        )
    for name in ("num_experts", "num_local_experts"):
        if given.get(name):
            raise ValueError(
                f"{name}={given[name]!r}: mixtures of experts are not supported"
            )
    window = given.get("sliding_window")
    if kind in ("qwen2", "qwen3"):
        used = given.get("use_sliding_window", False)
        first = given.get("max_window_layers", 28)
        if not used or first >= given.get("num_hidden_layers", 0):
            window = None
    elif kind == "llama":
        window = None
    if window is not None and window < given["max_position_embeddings"]:
        raise ValueError(
            f"sliding_window={window!r} with max_position_embeddings="
            f"{given['max_position_embeddings']} is not supported; supported is full"
            " attention: set sliding_window to null if no text is longer than the"
            " window"
        )
    layers = given.get("layer_types") or []
    if not isinstance(layers, list):
        raise ValueError(f"layer_types must be a list of names, got {layers!r}")
    other = sorted({str(x) for x in layers} - {"full_attention"})
    if other:
        raise ValueError(
            f"layer_types has {', '.join(other)}; supported is full_attention"
        )
