"""A tiny encoder as Hugging Face would save it, and text it can read."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from flexhinm_jax.models import encoder

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] the a cat dog sat ran on under mat tree fast slow".split()
)

CONFIG = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: k for k, w in enumerate(WORDS)}, "[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = encoder.EncoderConfig.from_dict(CONFIG)
    params = encoder.init(jax.random.key(0), config)
    params["pooler.dense.weight"] = jax.random.normal(jax.random.key(1), (32, 32))
    params["embeddings.position_ids"] = np.arange(16, dtype=np.int64)[None]
    safetensors.numpy.save_file(
        {name: np.asarray(leaf) for name, leaf in params.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "the cat sat on the mat\n\na dog ran under a tree fast\nthe slow dog\n"
    )
    return path
