"""Sizes and switches of a decoder, from Hugging Face's `config.json`.

One configuration covers Llama 2 and 3, Mistral, Mixtral, SmolLM3, Qwen2 and Qwen2.5,
Qwen3 dense and with experts, and the text models of Gemma 3. They differ in biases, in
norms, in rotary positions, in what a layer sees and in what a missing field means; what
differs between the layers of one model is a `Layer`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flexhinm_jax.models import fields, rope

__all__ = ["FAMILIES", "DecoderConfig", "Experts", "Family", "Layer"]

Given = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What differs between the layers of one decoder.

    Attributes:
      window: positions that a token attends to, itself included; None for all before.
      rotary: whether queries and keys turn with their position.
      theta: base of the rotary wavelengths here, never stretched; None for those of the
        configuration.
      experts: whether the feed-forward block is a mixture of experts.
    """

    window: int | None = None
    rotary: bool = True
    theta: float | None = None
    experts: bool = False

    def __post_init__(self):
        """Validates the types."""
        fields.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of one feed-forward block.

    Attributes:
      count: experts.
      chosen: experts of a token.
      intermediate_size: width inside an expert.
      normalised: whether the weights of the chosen experts sum to one.
      place: what the keys of the mixture begin with in a layer.
      gate: key of an expert's gate, then its `up` and `down`.
      up: see `gate`.
      down: see `gate`.
    """

    count: int
    chosen: int
    intermediate_size: int
    normalised: bool
    place: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def __post_init__(self):
        """Validates the sizes."""
        fields.check(self)
        if self.chosen > self.count:
            raise ValueError(
                f"num_experts_per_tok={self.chosen} is more than the {self.count}"
                " experts"
            )

    @property
    def router(self) -> str:
        """Key of the router in a layer."""
        return f"{self.place}.gate.weight"

    def key(self, expert: int, part: str) -> str:
        """Key of a part ("gate", "up" or "down") of an expert in a layer."""
        return f"{self.place}.experts.{expert}.{getattr(self, part)}.weight"


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` means.

    Attributes:
      defaults: fields of `config.json` that may be left out.
      biases: whether queries, keys and values have biases and the output has none;
        None where `attention_bias` of the file says so, for the output too.
      mlp_bias: whether the file may ask for biases in the feed-forward block.
      switches: fields of `DecoderConfig` that the whole family has.
      activation: field of the activation, and the values of it that are meant.
      slides: (fields, layer) -> whether the layer has a window, where `layer_types` is
        missing.
      rotates: (fields, layer) -> whether the layer turns queries and keys.
      experts: fields -> the mixture, and the layers that have it; None for a family
        without.
    """

    defaults: Mapping[str, Any]
    biases: bool | None = None
    mlp_bias: bool = False
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", ("silu", "swish"))
    slides: Callable[[Given, int], bool] = lambda given, layer: False
    rotates: Callable[[Given, int], bool] = lambda given, layer: True
    experts: Callable[[Given], tuple[Experts, set[int]]] | None = None


def _late(given: Given, layer: int) -> bool:
    """Qwen's windows: only on request, in the layers from `max_window_layers` on."""
    first = given.get("max_window_layers", 28)
    if not given.get("use_sliding_window"):
        return False
    return first == 0 or layer >= fields.checked("max_window_layers", first, int)


def _every_fourth(given: Given, layer: int) -> bool:
    """SmolLM3's `no_rope_layers`: 1 where a layer turns, by default all but fourths."""
    turning = given.get("no_rope_layers")
    if turning is None:
        every = given.get("no_rope_layer_interval", 4)
        every = fields.checked("no_rope_layer_interval", every, int)
        return bool((layer + 1) % every)
    turning = fields.integers("no_rope_layers", turning)
    if len(turning) <= layer:
        raise ValueError(
            f"no_rope_layers must have a number for each layer; got {len(turning)}"
        )
    return bool(turning[layer])


def _interval(given: Given) -> int:
    """Gemma's layers from one that sees everything to the next."""
    every = given.get("sliding_window_pattern", 6)
    return fields.checked("sliding_window_pattern", every, int)


def _count(given: Given) -> int:
    return fields.checked("num_hidden_layers", given.get("num_hidden_layers"), int)


def _qwen_experts(given: Given) -> tuple[Experts, set[int]]:
    step, dense = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers", ())
    fields.checked("decoder_sparse_step", step, int)
    dense = fields.integers("mlp_only_layers", dense)
    layers = set(range(step - 1, _count(given), step)) - set(dense)
    return Experts(
        count=given.get("num_local_experts", given["num_experts"]),
        chosen=given["num_experts_per_tok"],
        intermediate_size=given["moe_intermediate_size"],
        normalised=bool(given.get("norm_topk_prob", False)),
        place="mlp",
    ), layers


def _mixtral_experts(given: Given) -> tuple[Experts, set[int]]:
    return Experts(
        count=given["num_local_experts"],
        chosen=given["num_experts_per_tok"],
        intermediate_size=fields.checked(
            "intermediate_size", given.get("intermediate_size"), int
        ),
        normalised=True,
        place="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
    ), set(range(_count(given)))


FAMILIES: dict[str, Family] = {
    "llama": Family(defaults={"max_position_embeddings": 2048}, mlp_bias=True),
    "mistral": Family(
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        biases=False,
        slides=lambda given, layer: True,
    ),
    "mixtral": Family(
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1_000_000.0,
        },
        biases=False,
        slides=lambda given, layer: True,
        experts=_mixtral_experts,
    ),
    "smollm3": Family(
        defaults={
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
        },
        mlp_bias=True,
        slides=lambda given, layer: (
            bool(given.get("use_sliding_window")) and not _every_fourth(given, layer)
        ),
        rotates=_every_fourth,
    ),
    "qwen2": Family(
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 32},
        biases=True,
        slides=_late,
    ),
    "qwen3": Family(
        defaults={
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
        switches={"qk_norm": True},
        slides=_late,
    ),
    "qwen3_moe": Family(
        defaults={
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        switches={"qk_norm": True},
        slides=lambda given, layer: bool(given.get("use_sliding_window")),
        experts=_qwen_experts,
    ),
    "gemma3_text": Family(
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "tie_word_embeddings": True,
        },
        switches={
            "qk_norm": True,
            "norm_offset": True,
            "sandwich_norms": True,
            "embed_scaled": True,
            "gelu": True,
        },
        activation=("hidden_activation", ("gelu_pytorch_tanh",)),
        slides=lambda given, layer: bool((layer + 1) % _interval(given)),
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
      norm_offset: whether norms scale by 1 + weight instead of the weight.
      sandwich_norms: whether attention and the feed-forward block are normalised on
        their way out too.
      embed_scaled: whether rows of the token table are scaled by the root of the width.
      gelu: whether the feed-forward block gates by gelu (tanh form) instead of silu.
      query_pre_attn_scalar: attention scores are divided by its root; None for the
        channels of a head.
      experts: the mixture of experts, for layers that have it.
      layers: what differs between the layers; empty for nothing.
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
    norm_offset: bool = False
    sandwich_norms: bool = False
    embed_scaled: bool = False
    gelu: bool = False
    query_pre_attn_scalar: float | None = None
    experts: Experts | None = None
    layers: tuple[Layer, ...] = ()
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

    def layer(self, k: int) -> Layer:
        """What is particular about layer `k`."""
        return self.layers[k] if self.layers else Layer()

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        if self.head_dim is not None:
            return self.head_dim
        return self.hidden_size // self.num_attention_heads

    @property
    def attention_scale(self) -> float | None:
        """What attention scores are multiplied with; None for 1 / sqrt(head_size)."""
        scalar = self.query_pre_attn_scalar
        return None if scalar is None else scalar**-0.5

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
        kind = fields.chosen("model_type", config_json.get("model_type"), FAMILIES)
        family = FAMILIES[kind]
        given = {k: v for k, v in config_json.items() if v is not None}
        # A missing window has the default of its family, null means none.
        for name, value in family.defaults.items():
            if name not in config_json or name != "sliding_window":
                given.setdefault(name, value)
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
        _check_supported(kind, given)
        biased = given.get("attention_bias", False)
        experts = None
        if family.experts is not None:
            experts = family.experts(given)
        values: dict[str, Any] = {
            "attention_bias": biased if family.biases is None else family.biases,
            "attention_output_bias": biased if family.biases is None else False,
            "mlp_bias": family.mlp_bias and given.get("mlp_bias", False),
            "experts": experts and experts[0],
            **dict.fromkeys(SWITCHES, False),
            **family.switches,
        }
        longest = given["max_position_embeddings"]
        fields.checked("max_position_embeddings", longest, int)
        theta, scaling, local = rope.from_dict(given, longest)
        values |= {"rope_theta": theta, "rope_scaling": scaling}
        values["layers"] = _layers(family, given, local, experts and experts[1])
        if "vocab_size" not in given:
            raise ValueError("vocab_size is missing from the configuration")
        return cls(**fields.read(cls, given, values))


SWITCHES = ("qk_norm", "norm_offset", "sandwich_norms", "embed_scaled", "gelu")
"""Fields that a family has or has not, whatever the file says."""


def _layers(
    family: Family, given: Given, local: float | None, experts: set[int] | None
) -> tuple[Layer, ...]:
    """What differs between the layers; empty where nothing does.

    Args:
      family: of the model.
      given: fields of the file.
      local: base of the rotary wavelengths of layers with a window, if it is another.
      experts: layers that have a mixture of experts.

    Raises:
      ValueError: `layer_types` of a length or with a name that is not known.
    """
    count = given.get("num_hidden_layers", 0)
    if type(count) is not int or count < 1:
        return ()  # said by the check of the fields
    kinds = given.get("layer_types")
    known = ("full_attention", "sliding_attention")
    listed = isinstance(kinds, list | tuple) and len(kinds) == count
    if kinds is not None and not (listed and all(kind in known for kind in kinds)):
        raise ValueError(
            f"layer_types must be a list of names, {' or '.join(known)}, one for each"
            f" of the {count} layers; got {kinds!r}"
        )
    every = range(count)
    if kinds is None:
        slides = [family.slides(given, k) for k in every]
    else:
        slides = [kind == "sliding_attention" for kind in kinds]
    window = given.get("sliding_window") if any(slides) else None
    if window is not None:
        fields.checked("sliding_window", window, int)
        if window >= given["max_position_embeddings"] and local is None:
            window = None
    layers = []
    for k in every:
        narrow = slides[k] and window is not None
        layers.append(
            Layer(
                window=window if narrow else None,
                rotary=family.rotates(given, k),
                theta=local if narrow else None,
                experts=experts is not None and k in experts,
            )
        )
    return tuple(layers) if set(layers) != {Layer()} else ()


def _check_supported(kind: str, given: Given) -> None:
    """Raises for what would change the numbers without the decoder knowing."""
    field, meant = FAMILIES[kind].activation
    activation = given.get(field, meant[0])
    if activation not in meant:
        raise ValueError(
            f"{field}={activation!r} is not supported; supported is {meant[0]!r}"
        )
    if given.get("quantization_config"):
        raise ValueError(
            "quantization_config: quantised weights are not supported; give the"
            " directory with float weights"
        )
    mixed = [name for name, family in FAMILIES.items() if family.experts is not None]
    for name in ("num_experts", "num_local_experts"):
        if given.get(name) and kind not in mixed:
            raise ValueError(
                f"{name}={given[name]!r}: {kind} has no mixture of experts here;"
                f" supported are those of {' and '.join(mixed)}"
            )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if given.get(name):
            raise ValueError(
                f"{name}={given[name]!r} is not supported; supported is null"
            )
    if given.get("use_bidirectional_attention"):
        raise ValueError(
            "use_bidirectional_attention is not supported; supported is causal"
        )
