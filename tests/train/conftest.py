"""A tiny encoder directory and sentences in its words, for programs on encoders."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from flexhinm_jax.models import encoder

WORDS = "[PAD] [UNK] [CLS] [SEP] the a of is and cat dog sat ran on under mat".split()
SIZES = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SIZES))
    known = {word: k for k, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    params = encoder.init(jax.random.key(0), encoder.EncoderConfig.from_dict(SIZES))
    arrays = {name: np.asarray(leaf) for name, leaf in params.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def sentences():
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS[4:], 6)) for _ in range(40)]
