"""One door for model directories: encoders, decoders, dense and packed."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

pytest.importorskip("safetensors")
import flexhinm_jax as fh  # noqa: E402
from flexhinm_jax import models  # noqa: E402
from flexhinm_jax.io import packed, sources  # noqa: E402
from flexhinm_jax.models import decoder  # noqa: E402
from flexhinm_jax.models.load import token_ids  # noqa: E402
from flexhinm_jax.streaming.blocks import open_blocks  # noqa: E402
from tests.models import decoder_cases, directories  # noqa: E402

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


def test_a_decoder_is_a_function_its_parameters_and_its_tokenizer(tmp_path):
    params = directories.make_decoder_directory(tmp_path / "m", directories.QWEN3)
    model = models.load(tmp_path / "m")
    assert model.is_decoder and model.ends == (directories.BYTES + 1,)
    got = model.apply(model.params, TOKENS)
    params = {name: jnp.asarray(leaf) for name, leaf in params.items()}
    want = decoder.apply(params, TOKENS, model.config)
    np.testing.assert_array_equal(got, want)
    assert model.tokenizer.encode("ab").ids[0] == directories.BYTES
    assert "Model('m', DecoderConfig, dense" in repr(model)


def test_a_decoder_of_integers_is_refused_by_every_door(tmp_path):
    directories.make_decoder_directory(
        tmp_path / "m", directories.QWEN3, dtype=jnp.int8
    )
    wanted = (
        f"{tmp_path / 'm'}: model.embed_tokens.weight has dtype int8, supported are"
        " float32, bfloat16, float16; give the directory with float weights"
    )
    for read in (models.load, open_blocks):
        with pytest.raises(ValueError, match=re.escape(wanted)):
            read(tmp_path / "m")


def test_packed_weights_multiply_as_they_are(tmp_path):
    folder = tmp_path / "m"
    directories.make_decoder_directory(folder, directories.LLAMA2)
    model = models.load(folder)
    with pytest.raises(FileNotFoundError, match="holds no packed weights"):
        models.load(folder, packed=True)
    method = fh.Magnitude(fh.NM(2, 4))
    result = fh.prune(
        model.apply, model.params, [TOKENS], method, key=jax.random.key(0)
    )
    packed.write_packed(folder / "packed.safetensors", result.packed)
    other = models.load(folder, packed=True)
    assert "packed" in repr(other) and other.packed
    assert sum(isinstance(x, fh.PackedWeight) for x in other.params.values()) == 15
    got = other.apply(other.params, TOKENS)
    want = model.apply(result.params, TOKENS)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_routers_of_experts_are_left_alone(tmp_path):
    case = decoder_cases.QWEN3_MOE | {"vocab_size": directories.VOCABULARY}
    directories.make_decoder_directory(tmp_path / "m", case)
    model = models.load(tmp_path / "m", tokenizer=False)
    uses = fh.discover(model.apply, model.params, TOKENS, rules=model.rules)
    routers = [k for k in model.params if k.endswith("mlp.gate.weight")]
    assert len(routers) == 2 and all(k in uses.skipped for k in routers)
    experts = [k for k in model.params if ".experts." in k]
    assert len(experts) == 48 and all(k in uses.leaves for k in experts)


def test_experts_are_calibrated_on_their_own_tokens():
    config = decoder.DecoderConfig.from_dict(decoder_cases.MIXTRAL)
    params: Any = decoder.block_params(directories.random_params(config), 0)  # pyright: ignore
    h = np.random.default_rng(0).standard_normal((2, 7, 32)).astype(np.float32)
    apply = lambda p, h: decoder.block(p, h, config)  # noqa: E731
    uses = fh.discover(apply, params, h)
    stats = fh.calibrate(apply, params, uses, [h])
    # What the mixture reads is what its router reads: its Gram is that of all tokens.
    router = "block_sparse_moe.gate.weight"
    whole = np.asarray(stats[router].gram)
    name = "block_sparse_moe.experts.{}.w1.weight"
    grams = [np.asarray(stats[name.format(k)].gram) for k in range(4)]
    # Every token goes to two of four experts, so their Grams add up to twice that.
    np.testing.assert_allclose(sum(grams), 2 * whole, rtol=1e-3, atol=1e-3)
    assert all(np.trace(g) < np.trace(whole) for g in grams)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        models.load(tmp_path / "none")
    directories.make_decoder_directory(tmp_path / "m", directories.LLAMA2)
    (tmp_path / "m" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="model_type='t5' is not supported; supported"):
        models.load(tmp_path / "m")
    directories.make_decoder_directory(tmp_path / "n", directories.LLAMA2)
    (tmp_path / "n" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"):
        models.load(tmp_path / "n")
    assert models.load(tmp_path / "n", tokenizer=False).tokenizer is None


def trained(kind: str, text: str) -> tokenizers.Tokenizer:
    """A tokenizer of 300 words; "runs" are merged across spaces, as Llama 2 does."""
    if kind == "unigram":
        made = tokenizers.Tokenizer(tokenizers.models.Unigram())
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=300,
            show_progress=False,
            unk_token="<unk>",
            special_tokens=["<unk>"],
        )
    else:
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False)
    if kind != "runs":
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.train_from_iterator(text.splitlines(), trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "e $A t", special_tokens=[(one, made.token_to_id(one)) for one in "et"]
    )
    return made


@pytest.mark.parametrize("kind", ["words", "runs", "unigram"])
def test_the_first_tokens_of_a_text_need_only_its_beginning(kind):
    text = sources.read_text(sources.BUILTIN)[:20_000]
    tokenizer, read = trained(kind, text[:5_000]), []

    class Counting:
        def encode(self, text: str) -> tokenizers.Encoding:
            read.append(len(text))
            return tokenizer.encode(text)

    whole, places = token_ids(tokenizer, text, 300)
    for count in (1, 5, 100, 1_000, len(whole) - 1, len(whole), 10**6):
        read.clear()
        first, where = token_ids(Counting(), text, 300, count)
        np.testing.assert_array_equal(first, whole[:count])
        assert where == places[:count]
        assert max(read) <= max(16 * count, 2_000), read
