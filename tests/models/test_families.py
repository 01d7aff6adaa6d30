"""Encoders of text and images give what `transformers` gives: `parity_encoders`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")
from flexhinm_jax import models  # noqa: E402
from flexhinm_jax.models import encoder, pooling  # noqa: E402
from flexhinm_jax.models.encoder import EncoderConfig  # noqa: E402
from flexhinm_jax.models.load import Reads, kinds  # noqa: E402
from tests.models import encoder_cases  # noqa: E402

CASES = encoder_cases.CASES


@pytest.mark.parametrize("name", CASES)
def test_a_family_gives_what_transformers_gives(name, tmp_path):
    encoder_cases.write(tmp_path / "model", CASES[name])
    model = models.load(tmp_path / "model", tokenizer=False)
    inputs = encoder_cases.inputs(CASES[name])
    outputs = np.asarray(jax.jit(model.apply)(model.params, *inputs))
    want = json.loads(encoder_cases.GOLDEN.read_text())[name]
    got = encoder_cases.summary(CASES[name], outputs)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_every_family_has_a_case_and_is_an_entry_of_the_table():
    tested = {case["model_type"] for case in CASES.values()}
    others = {k for k, v in kinds().items() if v.reads is not Reads.TEXT}
    assert tested == others


@pytest.mark.parametrize("name", ["roberta", "mpnet", "distilbert"])
def test_keys_may_have_the_prefix_of_a_larger_model(name, tmp_path):
    case = CASES[name]
    params = encoder_cases.write(tmp_path / "model", case)
    config = EncoderConfig.from_dict(case)
    tokens, mask = encoder_cases.tokens(case)
    shapes = jax.eval_shape(lambda p: encoder.encode(p, tokens, mask, config), params)
    prefixed = {config.family.prefix + key: leaf for key, leaf in params.items()}
    again = jax.eval_shape(lambda p: encoder.encode(p, tokens, mask, config), prefixed)
    assert shapes == again and config.family.prefix == f"{name}."


REFUSED = [
    ("bert", {"position_embedding_type": "relative_key"}, "supported is 'absolute'"),
    ("roberta", {"is_decoder": True}, "is_decoder=True is not supported"),
    ("mpnet", {"relative_attention_num_buckets": 64}, "supported is 32"),
    ("mpnet", {"pad_token_id": 0}, "pad_token_id=0 is not supported"),
    ("distilbert", {"activation": "swish"}, "hidden_act='swish'.*gelu_new, relu"),
    ("distilbert", {"dim": None}, "dim is missing from the configuration"),
    ("roberta", {"max_position_embeddings": 2}, "leaves no position: the first is 2"),
    ("vit", {"architectures": ["ViTModel"]}, "'ViTModel'.*ViTForImageClassification"),
    ("vit", {"image_size": [8, 12]}, r"image_size=\[8, 12\].*give a square"),
    ("vit", {"patch_size": 3}, "image_size=8 is not a multiple of patch_size=3"),
    ("vit", {"num_attention_heads": 3}, "16 is not a multiple of"),
    ("resnet", {"layer_type": "plain"}, "layer_type='plain'.*bottleneck, basic"),
    ("resnet", {"depths": [1]}, "need one of either for each stage"),
    ("resnet", {"depths": [1, 0]}, r"depths must be an integer > 0, got \(1, 0\)"),
    ("resnet", {"hidden_act": "silu"}, "hidden_act='silu' is not supported"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_is_not_supported_is_named(name, change, message):
    case = CASES[name] | change
    with pytest.raises(ValueError, match=message):
        kinds()[case["model_type"]].config.from_dict(case)


def test_a_square_may_be_written_as_two_sides():
    config = kinds()["vit"].config.from_dict
    assert config(CASES["vit"] | {"image_size": [8, 8]}) == config(CASES["vit"])


def test_images_of_another_size_are_refused(tmp_path):
    for name, message in (("vit", r"reads \(3, 8, 8\)"), ("resnet", "3, height")):
        encoder_cases.write(tmp_path / name, CASES[name])
        model = models.load(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            model.apply(model.params, np.zeros((1, 1, 9, 9), np.float32))


def test_positions_pass_over_pad_tokens():
    table = np.arange(9.0)[:, None]
    config = EncoderConfig.from_dict(CASES["roberta"])
    tokens = np.array([[5, 6, 1, 7, 1]])  # 1 is the pad token
    rows = encoder._positions(jnp.asarray(table), tokens, config)
    np.testing.assert_array_equal(rows[0, :, 0], [2, 3, 1, 4, 1])


HIDDEN = np.random.RandomState(0).normal(size=(3, 4, 2)).astype(np.float32)
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("mode", pooling.MODES)
def test_pooling_is_that_of_the_real_tokens(mode, unit):
    by_hand = {
        "mean": lambda rows: rows.mean(0),
        "cls": lambda rows: rows[0],
        "max": lambda rows: rows.max(0),
    }[mode]
    want = np.zeros((3, 2))
    for k, count in enumerate((3, 1)):
        want[k] = by_hand(HIDDEN[k, :count])
        if unit:
            want[k] /= np.sqrt((want[k] ** 2).sum())
    got = encoder.pool(jnp.asarray(HIDDEN), MASK, pooling.Pooling(mode, unit))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def write_modules(folder, *kinds, **config):
    places = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {"path": places.get(k, k), "type": f"sentence_transformers.models.{k}"}
        for k in kinds
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def test_the_directory_says_how_to_pool(tmp_path):
    assert pooling.read(tmp_path) == pooling.Pooling("mean", True)
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    write_modules(tmp_path, "Transformer", "Pooling", "Normalize", **flags)
    assert pooling.read(tmp_path) == pooling.Pooling("cls", True)
    write_modules(tmp_path, "Transformer", "Pooling", pooling_mode="max")
    assert pooling.read(tmp_path) == pooling.Pooling("max", False)


def test_a_pooling_that_is_not_supported_is_named(tmp_path):
    write_modules(tmp_path, "Transformer", "Pooling", pooling_mode_lasttoken=True)
    with pytest.raises(ValueError, match="pooling lasttoken is not.*mean, cls, max"):
        pooling.read(tmp_path)
    write_modules(tmp_path, "Transformer", "Dense")
    with pytest.raises(ValueError, match="modules.json: a module 'Dense' is not"):
        pooling.read(tmp_path)
    (tmp_path / "modules.json").write_text("[1]")
    with pytest.raises(ValueError, match="modules.json is no list of modules"):
        pooling.read(tmp_path)
