"""Tiny models as Hugging Face would save them: config, tokenizer, random weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers

from flexhinm_jax.models import decoder, encoder
from flexhinm_jax.models.decoder import DecoderConfig

BYTES = 256
VOCABULARY = BYTES + 2
"""All bytes, then "<s>" and "</s>"."""

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": BYTES,
    "eos_token_id": BYTES + 1,
    "attention_dropout": 0.0,
    "torch_dtype": "float32",
}

LLAMA2 = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
QWEN2 = COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 32,
    "max_window_layers": 28,
}
QWEN3 = COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 16,
    "rope_theta": 1_000_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


def random_params(
    config: DecoderConfig, seed: int = 0, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, np.ndarray]:
    """Random weights, the same everywhere; norms and biases are random too."""
    # The stream of RandomState is frozen, and two decimals are exact in a file.
    random = np.random.RandomState(seed)
    params = {}
    for name, shape in decoder.shapes(config).items():
        draw = random.normal(0, 0.3, shape)
        params[name] = draw + name.endswith("norm.weight")
    return {name: leaf.round(2).astype(dtype) for name, leaf in params.items()}


def make_decoder_directory(
    folder: Path,
    config: dict,
    seed: int = 0,
    shards: int = 1,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> dict[str, np.ndarray]:
    """Writes a model directory.

    Args:
      folder: created; must not exist.
      config: contents of config.json, with vocab_size >= `VOCABULARY`.
      seed: of the random weights.
      shards: files that the weights are spread over; 1 for model.safetensors.
      dtype: of the weights.

    Returns:
      The weights.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ids = {"bos_token_id": BYTES, "eos_token_id": BYTES + 1}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    write_tokenizer(folder)
    params = random_params(DecoderConfig.from_dict(config), seed, dtype)
    if shards == 1:
        write_weights(folder / "model.safetensors", params)
        return params
    names, total = list(params), sum(leaf.nbytes for leaf in params.values())
    files = {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        held = names[k * len(names) // shards : (k + 1) * len(names) // shards]
        write_weights(folder / file, {name: params[name] for name in held})
        files |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return params


def make_encoder_directory(
    folder: Path, config: dict, words: Sequence[str], **more: np.ndarray
) -> None:
    """Writes the directory of a BERT that knows words.

    Args:
      folder: created; must not exist.
      config: contents of config.json.
      words: the vocabulary; "[UNK]", "[CLS]" and "[SEP]" are words 1, 2 and 3.
      **more: arrays besides those that the encoder reads.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    known = {word: k for k, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = encoder.EncoderConfig.from_dict(config)
    params = encoder.init(jax.random.key(0), sizes) | more
    arrays = {name: np.asarray(leaf) for name, leaf in params.items()}
    write_weights(folder / "model.safetensors", arrays)


def write_weights(path: Path, params: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(params, path, {"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    """A token per byte; texts begin with "<s>"."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: k for k, letter in enumerate(alphabet)}
    vocabulary |= {"<s>": BYTES, "</s>": BYTES + 1}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.add_special_tokens(["<s>", "</s>"])
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", BYTES)]
    )
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
