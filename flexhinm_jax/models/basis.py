"""Other bases for the channels of a decoder, in which it computes the same function.

A decoder of this library reads its residual stream through RMSNorm and products alone,
so an orthogonal change of the stream can be absorbed into the weights that read and
write it (SliceGPT, arXiv:2401.15024, section 3; QuaRot, arXiv:2404.00456): norms are
folded into their readers first. The values of a head can be turned together with the
inputs of the output projection that read them, and the channels inside the gated block
can be put into any order. What changes is how weights look to a pruner: an order puts
channels that compete for a place into different groups (channel permutation, Pool and
Yu, NeurIPS 2021), a rotation gathers importance in few weights (DenoiseRotator,
arXiv:2505.23049). Nothing is left to do at run time.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from flexhinm_jax.models.decoder_config import DecoderConfig
from flexhinm_jax.models.decoder_parameters import (
    HEAD,
    NORM,
    TABLE,
    block_params,
    block_prefix,
    shapes,
)
from flexhinm_jax.models.parameters import select

__all__ = ["Basis", "change"]


@dataclasses.dataclass(frozen=True)
class Basis:
    """New channels from the old ones: an order, or an orthogonal matrix.

    An order lists the old channel now at each position; a matrix R gives the row of new
    channels x R for a row x of old ones. None leaves the channels as they are.

    Attributes:
      stream: i32[hidden] or f32[hidden, hidden], of the residual stream.
      heads: i32[layers, kv, size] or f32[layers, kv, size, size], of the values of each
        head.
      inner: i32[layers, intermediate], an order inside the gated block; that of a layer
        with experts is not read.
    """

    stream: Array | None = None
    heads: Array | None = None
    inner: Array | None = None

    @property
    def turns_stream(self) -> bool:
        """Whether the residual stream is rotated, so that norms must be folded."""
        return self.stream is not None and self.stream.ndim == 2


def change(
    params: Mapping[str, Array], config: DecoderConfig, basis: Basis
) -> tuple[dict[str, Array], DecoderConfig]:
    """The parameters of the same function in another basis.

    Orders move weights and change no bit of the products' terms; rotations are computed
    in float32 at the highest precision and rounded to the dtype of the parameters.

    Args:
      params: flat dict with the keys of `shapes(config)`; others are dropped.
      config: sizes.
      basis: the new channels.

    Returns:
      The parameters and the configuration they belong to: embeddings that were tied are
      not after a rotation of the stream, which folds the last norm into the head.

    Raises:
      ValueError: shapes that disagree with the configuration, or a rotation of a stream
        with sandwiched norms, which scale what is written to it.

    Example:
      >>> import jax
      >>> from flexhinm_jax.models import decoder
      >>> config = DecoderConfig(hidden_size=8, num_hidden_layers=1,
      ...                        num_attention_heads=2, num_key_value_heads=1,
      ...                        intermediate_size=16)
      >>> params = decoder.init(jax.random.key(0), config)
      >>> basis = Basis(stream=jnp.arange(8, dtype=jnp.int32)[::-1])
      >>> turned, _ = change(params, config, basis)
      >>> bool((turned["model.embed_tokens.weight"][:, 0]
      ...       == params["model.embed_tokens.weight"][:, 7]).all())
      True
    """
    check(config, basis)
    params = turned_ends(select(params, shapes(config)), config, basis)
    for layer in range(config.num_hidden_layers):
        at, own = block_prefix(layer), block_params(params, layer)
        block = turned_block(own, config, layer, basis)
        params |= {at + name: leaf for name, leaf in block.items()}
    if basis.turns_stream:
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return params, config


def refuse_sandwiches(config: DecoderConfig) -> None:
    """Raises ValueError if norms are not read by products alone."""
    if config.sandwich_norms:
        raise ValueError(
            "the norms of this model scale what is written to the residual stream, so"
            " a rotation cannot be absorbed; give an order of the stream, or None"
        )


def folded_ends(params: Mapping[str, Array], config: DecoderConfig) -> dict[str, Array]:
    """The last norm folded into the head, a copy of the table if they are tied."""
    params = dict(params)
    if config.tie_word_embeddings:
        params[HEAD] = params[TABLE]
    return _folded(params, NORM, [HEAD], config)


def folded_block(
    own: Mapping[str, Array], config: DecoderConfig, layer: int
) -> dict[str, Array]:
    """The parameters of a block, short keys, with its norms in what reads them."""
    names = readers(config, layer)
    own = _folded(own, "input_layernorm.weight", names[:3], config)
    return _folded(own, "post_attention_layernorm.weight", names[3:], config)


def _folded(
    params: Mapping[str, Array], norm: str, names: list[str], config: DecoderConfig
) -> dict[str, Array]:
    params, one = dict(params), 0.0 if config.norm_offset else 1.0
    scale = params[norm].astype(jnp.float32) + (1.0 - one)
    for name in names:
        weight = params[name]
        params[name] = (weight.astype(jnp.float32) * scale).astype(weight.dtype)
    params[norm] = jnp.full_like(params[norm], one)
    return params


def readers(config: DecoderConfig, layer: int) -> list[str]:
    """Short keys of the weights of a block that multiply the residual stream."""
    names = [f"self_attn.{x}_proj.weight" for x in "qkv"]
    experts = config.experts
    if experts is None or not config.layer(layer).experts:
        return [*names, "mlp.gate_proj.weight", "mlp.up_proj.weight"]
    parts = [experts.key(k, x) for k in range(experts.count) for x in ("gate", "up")]
    return [*names, experts.router, *parts]


def writers(config: DecoderConfig, layer: int) -> list[str]:
    """Short keys of the weights and biases that give what is added to the stream."""
    names = [f"self_attn.o_proj.{part}" for part in ("weight", "bias")]
    experts = config.experts
    if experts is None or not config.layer(layer).experts:
        return [*names, "mlp.down_proj.weight", "mlp.down_proj.bias"]
    return [*names, *(experts.key(k, "down") for k in range(experts.count))]


def turned_ends(
    params: Mapping[str, Array], config: DecoderConfig, basis: Basis
) -> dict[str, Array]:
    """The table, the last norm and the head in a basis, the rest as it is."""
    params = dict(params)
    if basis.turns_stream:
        refuse_sandwiches(config)
        params = folded_ends(params, config)
    else:
        params[NORM] = turned(params[NORM], basis.stream, 0)
    for name in (TABLE, HEAD):
        if name in params:
            params[name] = turned(params[name], basis.stream, 1)
    return params


def turned_block(
    own: Mapping[str, Array], config: DecoderConfig, layer: int, basis: Basis
) -> dict[str, Array]:
    """The parameters of one block, under their short keys, in a basis."""
    own, stream = dict(own), basis.stream
    if basis.turns_stream:
        own = folded_block(own, config, layer)
    norms = [name for name in own if name.endswith("layernorm.weight")]
    for name in readers(config, layer):
        own[name] = turned(own[name], stream, 1)
    for name in writers(config, layer):
        if name in own:
            own[name] = turned(own[name], stream, 0)
    for name in () if basis.turns_stream else norms:
        own[name] = turned(own[name], stream, 0)
    inner = None if basis.inner is None else basis.inner[layer]
    heads = None if basis.heads is None else basis.heads[layer]
    if inner is not None and "mlp.down_proj.weight" in own:
        for name in ("gate_proj", "up_proj"):
            for part in ("weight", "bias"):
                key = f"mlp.{name}.{part}"
                if key in own:
                    own[key] = turned(own[key], inner, 0)
        own["mlp.down_proj.weight"] = turned(own["mlp.down_proj.weight"], inner, 1)
    if heads is not None:
        for part in ("weight", "bias"):
            key = f"self_attn.v_proj.{part}"
            if key in own:
                own[key] = of_heads(own[key], heads, 0)
        repeated = config.num_attention_heads // config.num_key_value_heads
        key = "self_attn.o_proj.weight"
        own[key] = of_heads(own[key], jnp.repeat(heads, repeated, axis=0), 1)
    return own


def of_heads(leaf: Array, heads: Array, axis: int) -> Array:
    """Turns an axis of heads x size channels, each head by its own."""
    count, size = heads.shape[:2]
    moved = jnp.moveaxis(leaf, axis, 0)
    split = moved.reshape(count, size, *moved.shape[1:])
    parts = [turned(split[k], heads[k], 0) for k in range(count)]
    return jnp.moveaxis(jnp.stack(parts).reshape(moved.shape), 0, axis)


def turned(leaf: Array, basis: Array | None, axis: int) -> Array:
    """An axis of old channels as one of new ones."""
    if basis is None:
        return leaf
    if basis.ndim == 1:
        return jnp.take(leaf, basis, axis=axis)
    product = lax.dot_general(
        leaf.astype(jnp.float32),
        basis.astype(jnp.float32),
        (((axis,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
    return jnp.moveaxis(product, -1, axis).astype(leaf.dtype)


def check(config: DecoderConfig, basis: Basis) -> None:
    """Raises ValueError where a basis does not have the sizes of a configuration."""
    layers, size = config.num_hidden_layers, config.head_size
    heads = (layers, config.num_key_value_heads, size)
    wanted: dict[str, tuple[tuple[int, ...], ...]] = {
        "stream": ((config.hidden_size,), (config.hidden_size, config.hidden_size)),
        "heads": (heads, (*heads, size)),
        "inner": ((layers, config.intermediate_size),),
    }
    for name, shapes_ in wanted.items():
        value: Any = getattr(basis, name)
        if value is not None and tuple(value.shape) not in shapes_:
            known = " or ".join(str(list(shape)) for shape in shapes_)
            raise ValueError(
                f"{name} has shape {list(value.shape)}; this model needs {known}"
            )
