"""A tiny encoder as Hugging Face would save it, and text it can read."""

import shutil

import jax
import numpy as np
import pytest

from tests.models.directories import make_encoder_directory

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] the a cat dog sat ran on under mat tree fast slow".split()
)

CONFIG = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Directories by the width inside their feed-forward blocks."""
    more = {
        "pooler.dense.weight": jax.random.normal(jax.random.key(1), (32, 32)),
        "embeddings.position_ids": np.arange(16, dtype=np.int64)[None],
    }
    folder = tmp_path_factory.mktemp("encoders")
    for width in (32, 64):
        config = CONFIG | {"intermediate_size": width}
        make_encoder_directory(folder / str(width), config, WORDS, **more)
    return folder


@pytest.fixture
def width():
    """All weights of a layer are alike, so that one solver is compiled."""
    return 32


@pytest.fixture
def model_dir(made, width, tmp_path):
    return shutil.copytree(made / str(width), tmp_path / "model")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "the cat sat on the mat\n\na dog ran under a tree fast\nthe slow dog\n"
    )
    return path
