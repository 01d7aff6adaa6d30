"""Sizes and names of a text encoder, from Hugging Face's `config.json`.

One configuration covers BERT, RoBERTa, XLM-RoBERTa, MPNet and DistilBERT. They differ
in what their parameters are called, in where positions count from, in token types and
in a bias of the attention scores: one `Family` each.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flexhinm_jax.models import fields, transformer
from flexhinm_jax.models.transformer import LayerKeys

__all__ = ["FAMILIES", "EncoderConfig", "Family"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a `model_type` means.

    Attributes:
      prefix: what keys begin with where the encoder is part of a larger model.
      place: what the keys of layer N begin with, before N.
      keys: names of the parameters of a layer.
      names: field of `EncoderConfig` -> its name in the file, where that is another.
      defaults: fields of the file that it may leave out.
      switches: fields of `EncoderConfig` that the whole family has.
      pad: token id that gets no position, where the file does not say; the first token
        of a text has the position behind it. None where positions count from 0.
      supported: field of the file -> the only value that is supported.
    """

    prefix: str
    place: str = "encoder.layer"
    keys: LayerKeys = LayerKeys()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pad: int | None = None
    supported: Mapping[str, Any] = dataclasses.field(default_factory=dict)


ABSOLUTE = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}

FAMILIES: dict[str, Family] = {
    "bert": Family(prefix="bert.", supported=ABSOLUTE),
    "roberta": Family(prefix="roberta.", pad=1, supported=ABSOLUTE),
    "xlm-roberta": Family(prefix="roberta.", pad=1, supported=ABSOLUTE),
    "mpnet": Family(
        prefix="mpnet.",
        keys=LayerKeys(
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            out="attention.attn.o",
            attention_norm="attention.LayerNorm",
        ),
        switches={"type_vocab_size": None, "relative_attention_num_buckets": 32},
        pad=1,
        supported={"pad_token_id": 1, "relative_attention_num_buckets": 32},
    ),
    "distilbert": Family(
        prefix="distilbert.",
        place="transformer.layer",
        keys=LayerKeys(
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            out="attention.out_lin",
            attention_norm="sa_layer_norm",
            up="ffn.lin1",
            down="ffn.lin2",
            norm="output_layer_norm",
        ),
        names={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        },
        defaults={"max_position_embeddings": 512},
        switches={"type_vocab_size": None, "layer_norm_eps": 1e-12},
    ),
}
"""Supported values of `model_type`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of an encoder, under the names of BERT's `config.json`.

    Attributes:
      model_type: a key of `FAMILIES`.
      vocab_size: rows of the token table.
      hidden_size: width of the hidden states; a multiple of `num_attention_heads`.
      num_hidden_layers: layers.
      num_attention_heads: heads per layer.
      intermediate_size: width inside the feed-forward block.
      max_position_embeddings: rows of the position table.
      type_vocab_size: rows of the token-type table, of which row 0 is used; None for no
        such table.
      first_position: row of the first token in the position table, where the row before
        is for padding and the pad token has that number too; None where positions
        count from 0.
      relative_attention_num_buckets: distances between two tokens that have a bias of
        their own in the attention scores; None for no bias.
      layer_norm_eps: added to the variance in layer norms.
      hidden_act: activation, a key of `transformer.ACTIVATIONS`.
      initializer_range: standard deviation of random weights.
    """

    model_type: str = "bert"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int | None = 2
    first_position: int | None = None
    relative_attention_num_buckets: int | None = None
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    initializer_range: float = 0.02

    def __post_init__(self):
        """Validates types, ranges and the activation."""
        fields.check(self)
        transformer.check(self)
        if self.longest < 1:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} leaves no"
                f" position: the first is {self.first_position}"
            )

    @property
    def family(self) -> Family:
        """What its model type means."""
        return FAMILIES[self.model_type]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_position_embeddings - (self.first_position or 0)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "EncoderConfig":
        """Reads the contents of a Hugging Face `config.json`; other fields are ignored.

        Raises:
          ValueError: a field is missing or wrong, or asks for something that `encode`
            does not do: another model type or position embedding, or a decoder.
        """
        kind = fields.chosen("model_type", config.get("model_type"), FAMILIES)
        family = FAMILIES[kind]
        for name, value in family.supported.items():
            if config.get(name, value) != value:
                raise ValueError(
                    f"{name}={config[name]!r} is not supported; supported is {value!r}"
                )
        known = {"model_type": kind, "first_position": None, **family.switches}
        if family.pad is not None:
            pad = config.get("pad_token_id")
            pad = family.pad if pad is None else pad
            known["first_position"] = fields.integer("pad_token_id", pad) + 1
        given = {**family.defaults, **config}
        return cls(**fields.read(cls, given, known, family.names))
