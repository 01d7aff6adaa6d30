"""A tiny encoder directory and sentences in its words, for programs on encoders."""

import functools
import itertools

import numpy as np
import pytest

from tests.models.directories import make_encoder_directory
from train.lab import text

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
    folder = tmp_path_factory.mktemp("encoder") / "model"
    make_encoder_directory(folder, SIZES, WORDS)
    return folder


@pytest.fixture(scope="session")
def sentences():
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS[4:], 6)) for _ in range(40)]


@pytest.fixture(scope="module")
def few_documents():
    """The corpus is a few documents; the whole takes ten seconds to read."""
    whole = text.documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "documents", lambda: itertools.islice(whole(), 40))
        patch.setattr(text, "_by_split", functools.cache(text._by_split.__wrapped__))
        yield
