"""GGUF files as Hugging Face model directories.

GGUF is the format of llama.cpp: one file with the weights, mostly quantised, the sizes
and the tokenizer. `convert` dequantises the weights, gives them Hugging Face's names
and layout, and writes `config.json`, `model.safetensors` and `tokenizer.json` next to
them, so that everything that reads such directories reads the model. The `gguf` package
reads the file; it is an optional extra.

What differs from the original checkpoint is undone: llama.cpp interleaves the rotary
channels of queries and keys of the Llama family (other families keep halves), and adds
1 to the norms of Gemma.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flexhinm_jax import arguments, atomic
from flexhinm_jax.io import gguf_tokenizer, huggingface, shards, tensors

__all__ = ["ARCHITECTURES", "Architecture", "convert"]

MAGIC = b"GGUF"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Progress = Callable[[int, int], None]

TABLES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Name of a part of a block in the file -> in Hugging Face's checkpoints."""

FREQUENCIES = "rope_freqs.weight"
"""Factors of the rotary wavelengths of Llama 3.1 and later; the config has its own."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What `general.architecture` of a file means.

    Attributes:
      model_type: of `config.json`.
      class_name: of `architectures` in `config.json`.
      interleaved: whether rotary channels of queries and keys are in pairs.
      norm_offset: what the file adds to the weights of norms.
      names: parts of a block that have other names than in `BLOCK`.
      more: further fields of `config.json`, from the metadata.
    """

    model_type: str
    class_name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    more: Callable[["Metadata"], dict[str, Any]] = lambda meta: {}


def _qwen2(meta: "Metadata") -> dict[str, Any]:
    return {"use_sliding_window": False}


def _gemma3(meta: "Metadata") -> dict[str, Any]:
    layers, head = meta.size("block_count"), meta.size("attention.key_length")
    local = ["sliding_attention"] * 5 + ["full_attention"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": head,
        "sliding_window": meta.size("attention.sliding_window"),
        "layer_types": [local[k % 6] for k in range(layers)],
        "rope_local_base_freq": 10_000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", more=_qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", more=_qwen2),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        norm_offset=1.0,
        names={
            "ffn_norm": "pre_feedforward_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        more=_gemma3,
    ),
}
"""Supported values of `general.architecture`."""


def convert(
    file: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes the model of a GGUF file as a Hugging Face directory.

    One tensor is in memory at a time. Quantised weights are dequantised: what is
    written is the model that llama.cpp runs, up to the rounding of `dtype`.

    Args:
      file: a GGUF file of an architecture in `ARCHITECTURES`, in one piece.
      directory: folder to create. It appears complete or not at all.
      dtype: of all weights written.
      overwrite: replaces an existing directory that holds a `config.json`.
      progress: called with (bytes written, bytes in all).

    Returns:
      Path of the directory.

    Raises:
      FileNotFoundError: there is no such file.
      FileExistsError: `directory` exists and may not be replaced.
      InUse: another process writes `directory`.
      ValueError: the file is damaged, split or of another architecture, or lacks
        something; a tensor or a tokenizer that is not known.
      ImportError: the `gguf` extra is not installed.
      OSError: no space; nothing is left behind.

    Example:
      >>> convert("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M")  # doctest: +SKIP
    """
    file = Path(file)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: need one of {', '.join(DTYPES)}")
    huggingface.check_place(directory, overwrite=overwrite)
    meta = Metadata(file, _reader(file))
    weights = {w.key: w for w in _weights(meta)}
    config = _config(meta, weights, dtype)
    tokenizer = gguf_tokenizer.tokenizer(meta)
    header = _header(weights, DTYPES[dtype])
    shards.check_space(Path(directory), header.size)
    with atomic.directory(directory, overwrite=overwrite) as folder:
        index = shards.Index(
            dict.fromkeys(weights, shards.SINGLE), {shards.SINGLE: header}, folder
        )
        writer, done = shards.Writer(folder, index), 0
        for key, weight in weights.items():
            writer.put(key, weight.read().astype(tensors.DTYPES[DTYPES[dtype]]))
            done += index.nbytes(key)
            if progress is not None:
                progress(done, header.size)
        writer.finish()
        _write_json(folder / "config.json", config)
        tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(
            folder / "tokenizer_config.json", gguf_tokenizer.configuration(meta)
        )
        _write_json(folder / "generation_config.json", gguf_tokenizer.generation(meta))
    return Path(directory)


class Metadata:
    """Names, sizes and tensors of a file; what is missing is an error that names it."""

    def __init__(self, path: Path, reader: Any):
        """Looks up the architecture.

        Raises:
          ValueError: an architecture that is not known, or a part of a split model.
        """
        self.path, self.reader = path, reader
        parts = self.get("split.count", 1)
        if parts > 1:
            raise ValueError(
                f"{path} is one of {parts} parts of a model; join them first with"
                " `llama-gguf-split --merge FIRST_PART OUT.gguf`"
            )
        self.name = self.need("general.architecture")
        if self.name not in ARCHITECTURES:
            raise ValueError(
                f"{path}: architecture {self.name!r} is not supported; supported are"
                f" {', '.join(ARCHITECTURES)}"
            )
        self.architecture = ARCHITECTURES[self.name]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the metadata."""
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        """The value of a key that must be there.

        Raises:
          ValueError: it is missing.
        """
        if key not in self.reader.fields:
            raise ValueError(
                f"{self.path} has no {key} in its metadata; it is incomplete, convert"
                " or download it again"
            )
        return self.get(key)

    def size(self, key: str) -> int:
        """A number below the name of the architecture that must be there."""
        return int(self.need(f"{self.name}.{key}"))

    def own(self, key: str, default: Any = None) -> Any:
        """A value below the name of the architecture."""
        return self.get(f"{self.name}.{key}", default)

    @functools.cached_property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key and value heads, channels of a head)."""
        queries = self.size("attention.head_count")
        keys = int(self.own("attention.head_count_kv", queries))
        width = self.own("attention.key_length") or self.own("rope.dimension_count")
        return queries, keys, int(width or self.size("embedding_length") // queries)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor of the file on its way out.

    Attributes:
      key: Hugging Face's name.
      shape: of the array.
      tensor: of the `gguf` package.
      heads: heads whose rotary channels are interleaved, or None.
      offset: what to take off.
    """

    key: str
    shape: tuple[int, ...]
    tensor: Any
    heads: int | None = None
    offset: float = 0.0

    def read(self) -> np.ndarray:
        """The array in float32, as the original checkpoint has it."""
        import gguf

        w = gguf.dequantize(self.tensor.data, self.tensor.tensor_type)
        w = np.asarray(w, np.float32).reshape(self.shape)
        if self.heads is not None:
            pairs = w.reshape(self.heads, -1, 2, *w.shape[1:])
            w = pairs.swapaxes(1, 2).reshape(w.shape)
        return w - np.float32(self.offset) if self.offset else w


def _weights(meta: Metadata) -> Iterator[Weight]:
    """All tensors of a file under Hugging Face's names.

    Raises:
      ValueError: a tensor that the architecture does not have.
    """
    queries, keys, _ = meta.heads
    kind = meta.architecture
    parts = {k: v for k, v in BLOCK.items() if k not in kind.names} | dict(kind.names)
    turned = {"attn_q": queries, "attn_k": keys} if kind.interleaved else {}
    unknown = []
    for tensor in meta.reader.tensors:
        name, shape = tensor.name, tuple(int(n) for n in reversed(tensor.shape))
        offset = kind.norm_offset if "norm" in name else 0.0
        pieces = name.split(".")
        if name in TABLES:
            yield Weight(TABLES[name], shape, tensor, offset=offset)
        elif pieces[0] == "blk" and len(pieces) == 4 and pieces[2] in parts:
            key = f"model.layers.{pieces[1]}.{parts[pieces[2]]}.{pieces[3]}"
            yield Weight(key, shape, tensor, turned.get(pieces[2]), offset)
        elif name != FREQUENCIES:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{meta.path}: tensors {arguments.some(unknown)} are not part of a"
            f" {meta.name} model as it is known here; this variant is not supported"
        )


def _config(
    meta: Metadata, weights: Mapping[str, Weight], dtype: str
) -> dict[str, Any]:
    """The contents of `config.json`.

    Raises:
      ValueError: metadata or a block that is missing, or rotary positions that
        `config.json` has no words for.
    """
    queries, keys, width = meta.heads
    layers = meta.size("block_count")
    table = TABLES["token_embd.weight"]
    last = f"model.layers.{layers - 1}.self_attn.q_proj.weight"
    for key in (table, last, TABLES["output_norm.weight"]):
        if key not in weights:
            raise ValueError(
                f"{meta.path} has no tensor for {key}; it is incomplete, convert or"
                " download it again"
            )
    config = {
        "architectures": [meta.architecture.class_name],
        "model_type": meta.architecture.model_type,
        "vocab_size": weights[table].shape[0],
        "hidden_size": meta.size("embedding_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "head_dim": width,
        "intermediate_size": meta.size("feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": _short(
            meta.need(f"{meta.name}.attention.layer_norm_rms_epsilon")
        ),
        "rope_theta": _short(meta.own("rope.freq_base", 10_000.0)),
        "max_position_embeddings": meta.size("context_length"),
        "tie_word_embeddings": TABLES["output.weight"] not in weights,
        "attention_bias": last.removesuffix("weight") + "bias" in weights,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "dtype": dtype,
        "use_cache": True,
    }
    scaling = _scaling(meta)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config | meta.architecture.more(meta)


def _scaling(meta: Metadata) -> dict[str, Any] | None:
    """`rope_scaling` of the config.

    The factors of Llama 3.1 are stored as a tensor; they are recognised by computing
    them again (`transformers`: `rope_type` "llama3").
    """
    kind = meta.own("rope.scaling.type", "none")
    factor = meta.own("rope.scaling.factor")
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": _short(factor)}
    if kind == "yarn" and factor:
        original = meta.own("rope.scaling.original_context_length")
        scaling = {"rope_type": "yarn", "factor": _short(factor)}
        if original:
            scaling["original_max_position_embeddings"] = int(original)
        return scaling
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{meta.path}: rope.scaling.type {kind!r} is not supported; supported are"
            " none, linear, yarn and the factors of Llama 3.1"
        )
    stored = [t for t in meta.reader.tensors if t.name == FREQUENCIES]
    if not stored:
        return None
    factors = np.asarray(stored[0].data, np.float32).reshape(-1)
    llama3 = {
        "rope_type": "llama3",
        "factor": _short(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    width = meta.heads[2]
    theta = float(meta.own("rope.freq_base", 10_000.0))
    waves = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    smooth = (8192 / waves - 1) / 3
    between = 1 / ((1 - smooth) / llama3["factor"] + smooth)
    wanted = np.where(
        waves < 2048, 1.0, np.where(waves > 8192, llama3["factor"], between)
    )
    if factors.shape != wanted.shape or not np.allclose(factors, wanted, rtol=1e-3):
        raise ValueError(
            f"{meta.path}: the factors of {FREQUENCIES} are not those of Llama 3.1;"
            " rotary positions of this model are not supported"
        )
    return llama3


def _short(value: Any) -> float:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _header(weights: Mapping[str, Weight], dtype: str) -> tensors.Header:
    """The header of the file to write."""
    item, at = tensors.DTYPES[dtype].itemsize, 0
    places = {}
    for key, weight in weights.items():
        size = item * int(np.prod(weight.shape))
        places[key] = (at, at + size)
        at += size
    shapes = {key: weight.shape for key, weight in weights.items()}
    return tensors.Header(shapes, dict.fromkeys(weights, dtype), {}, places)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _reader(file: Path) -> Any:
    """The file opened by the `gguf` package, every tensor inside the file."""
    with arguments.extra("gguf", "reading GGUF needs the gguf package"):
        import gguf
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a directory; give the GGUF file itself")
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; check the name")
    with open(file, "rb") as f:
        start = f.read(len(MAGIC))
    if start != MAGIC:
        raise ValueError(
            f"{file} is not a GGUF file: it begins with {start!r}, not with {MAGIC!r}"
        )
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # the package fails in many ways on damaged files
        raise ValueError(
            f"{file} is truncated or damaged ({type(error).__name__}: {error});"
            " download it again"
        ) from error
    size = file.stat().st_size
    for tensor in reader.tensors:
        if tensor.data_offset + tensor.n_bytes > size:
            raise ValueError(
                f"{file} is truncated: {tensor.name} ends after byte"
                f" {tensor.data_offset + tensor.n_bytes}, the file has {size};"
                " download it again"
            )
    return reader
