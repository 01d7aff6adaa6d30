"""Masks that are learned block by block."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("safetensors")
import flexhinm_jax as fh  # noqa: E402
from flexhinm_jax.io import huggingface, packed  # noqa: E402
from flexhinm_jax.kernels import unpack  # noqa: E402
from flexhinm_jax.models import decoder  # noqa: E402
from flexhinm_jax.streaming import learned, streaming  # noqa: E402
from flexhinm_jax.streaming.learned import Judged, Learning  # noqa: E402
from flexhinm_jax.training import few_steps  # noqa: E402
from flexhinm_jax.types import PackedWeight  # noqa: E402
from tests.models.directories import make_decoder_directory  # noqa: E402

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
TOKENS = np.random.default_rng(0).integers(0, 256, (6, 12))
RULES = {"self_attn": "skip"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "model"
    make_decoder_directory(folder, CONFIG, 0, 2)
    return folder


optimiser = functools.cache(few_steps.optimiser)


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Runs that do the same share programs: all blocks of this file are alike."""
    known: dict[Any, Any] = {}

    def programs_of(block, method, learning, new=learned._Programs):
        name = method, learning.tx, learning.weights_tx, learning.window
        if name not in known:
            known[name] = new(block, method, learning)
        return known[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned, "_Programs", programs_of)
        yield


@dataclasses.dataclass(frozen=True)
class Smallest(fh.Magnitude):
    """Masks that anything should be better than."""

    def score(self, w, stats):
        del stats
        return 1 / (1 + jnp.square(w.astype(jnp.float32)))


def learn(model, out, name="maskllm", pattern="2:4", steps=12, rate=None, **options):
    method = few_steps.method(name, fh.patterns.parse(pattern))
    rate = rate or few_steps.RATES[name]
    learning = Learning(
        tx=optimiser(name, rate, steps),
        steps=steps,
        start=options.pop("start", None),
        looks=3,
        config={"rate": rate},
        weights_tx=options.pop("weights_tx", None),
        window=options.pop("window", "block"),
    )
    outer = {
        k: options.pop(k) for k in ("limits", "output", "progress") if k in options
    }
    method = dataclasses.replace(method, **options.pop("fields", {}))
    options = {"rules": RULES, "key": jax.random.key(3)} | options
    return learned.learn_blocks(
        model,
        out,
        options.pop("tokens", TOKENS),
        streaming.Request(method=method, **options),
        learning,
        **{"limits": streaming.Limits(batch=2), **outer},
    )


WORST: dict[str, Any] = {"rate": 1e-2, "start": Smallest(fh.NM(2, 4))}


def files(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An uninterrupted run, what it told and what it wrote."""
    out, told = tmp_path_factory.mktemp("whole") / "out", []
    result = learn(model, out, **WORST, progress=told.append)
    return result, told, out


def outputs(folder, layer, h):
    """What a block gives, by the function of the decoder."""
    params = {k: jnp.asarray(x) for k, x in huggingface.read(folder).params.items()}
    config = decoder.DecoderConfig.from_dict(CONFIG)
    return decoder.block(decoder.block_params(params, layer), h, config)


def test_masks_are_legal_and_better_than_the_first(model, whole):
    result, told, out = whole
    before, after = (huggingface.read(d).params for d in (model, out))
    pruned = {row.path for row in result.report.rows}
    assert len(pruned) == 2 * 3 and result.errors.keys() == pruned
    for key, x in after.items():
        if key in pruned:
            kept = x != 0
            # Some of the weights that stay are zero themselves.
            assert (kept.reshape(-1, 4).sum(1) <= 2).all() and kept.mean() > 0.45
            np.testing.assert_array_equal(x, np.where(kept, before[key], 0))
        else:
            np.testing.assert_array_equal(x, before[key])
    first, best = np.array(result.values).T
    assert (best < first).all()
    # A line per look, then one per block.
    kinds = [type(x).__name__ for x in told]
    assert kinds == ["Budget"] + 2 * (["Judged"] * 4 + ["Block"])
    looks = [x.step for x in told if isinstance(x, Judged) and x.layer == 0]
    assert looks == [0, 4, 8, 12]


def test_the_loss_is_the_error_of_the_block_on_what_pruned_ones_give(model, whole):
    _, told, out = whole
    params = {k: jnp.asarray(x) for k, x in huggingface.read(out).params.items()}
    config = decoder.DecoderConfig.from_dict(CONFIG)
    h = decoder.embed(params, jnp.asarray(TOKENS, jnp.int32), config)
    for layer, (_, best) in enumerate(whole[0].values):
        want, got = outputs(model, layer, h), outputs(out, layer, h)
        errors = [
            float(jnp.sum((a - b) ** 2) / jnp.sum(b**2))
            for a, b in zip(
                got.reshape(3, 2, 12, 16), want.reshape(3, 2, 12, 16), strict=True
            )
        ]
        # One of three batches judged the masks.
        assert min(abs(error - best) for error in errors) < 1e-4 * best
        h = got


def test_with_parts_the_attention_counts_as_well(model, tmp_path):
    def parts(folder, h):
        params = {k: jnp.asarray(x) for k, x in huggingface.read(folder).params.items()}
        down = "model.layers.0.mlp.down_proj.weight"
        without = params | {down: jnp.zeros_like(params[down])}
        both = decoder.block_params(without, 0), decoder.block_params(params, 0)
        return jnp.stack([decoder.block(one, h, config) for one in both], 1)

    out = tmp_path / "out"
    result = learn(
        model, out, steps=1, rules={"mlp|layers.1": "skip"}, window="part", **WORST
    )
    config = decoder.DecoderConfig.from_dict(CONFIG)
    table = {k: jnp.asarray(x) for k, x in huggingface.read(model).params.items()}
    h = decoder.embed(table, jnp.asarray(TOKENS, jnp.int32), config)
    want, got = (parts(folder, h).reshape(3, -1) for folder in (model, out))
    errors = np.asarray(jnp.sum((got - want) ** 2, 1) / jnp.sum(want**2, 1))
    # One of three batches judged the masks.
    assert np.isclose(errors, result.values[0][1], rtol=1e-4).any()
    with pytest.raises(ValueError, match="window='part': HyperPrune has a loop of its"):
        learn(model, tmp_path / "other", "hyperprune", window="part")


@pytest.mark.parametrize(
    ("moment", "after"),
    [
        pytest.param((0, 8), (0, 12), marks=pytest.mark.slow),
        ((1, 0), (1, 0)),
    ],
)
def test_a_killed_run_goes_on_to_the_same_files(
    model, whole, tmp_path, moment, after, monkeypatch
):
    class Killed(BaseException):
        pass

    monkeypatch.setattr(learned, "SAVE_SECONDS", 0.0)

    def kill(told):
        if isinstance(told, Judged) and (told.layer, told.step) == moment:
            raise Killed

    # A process that is killed leaves its folder as it is.
    monkeypatch.setattr(learned.Work, "leave", lambda self: None)
    other: dict[str, Any] = WORST | {"rate": 0.02}
    with pytest.raises(Killed):
        learn(model, tmp_path / "out", **WORST, progress=kill)
    with pytest.raises(ValueError, match=r"begun with config=\{'rate': 0.01\}"):
        learn(model, tmp_path / "out", **other)
    told = []
    result = learn(model, tmp_path / "out", **WORST, progress=told.append)
    assert files(tmp_path / "out") == files(whole[2])
    assert result.values == whole[0].values
    begun = next(x for x in told if isinstance(x, Judged))
    assert (begun.layer, begun.step) == after


METHODS = {
    "patch": ("tiles:tile=8", {"sparsity": 0.4}),
    "permllm": ("2:4", {"fields": {"block": 16}}),
    "proxsparse": ("2:4", {}),
    "maskpro": ("2:4", {}),
    "hard_concrete": ("2:4", {}),
    "hyperprune": ("2:4", {"fields": {"steps": 6, "hidden": 8}}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
)
def test_every_method_ends_no_worse_than_it_began(model, tmp_path, name):
    pattern, options = METHODS[name]
    output = streaming.Output(pack=True)
    result = learn(model, tmp_path / "out", name, pattern, output=output, **options)
    before, after = (huggingface.read(d).params for d in (model, tmp_path / "out"))
    for values in result.values:
        assert not values or values[1] <= values[0]
    assert any(result.values) == (name != "hyperprune")
    at = tmp_path / "out" / "packed" / "block-00000.safetensors"
    leaves = packed.read_packed(at)
    for row in result.report.rows:
        x = after[row.path]
        assert ((x == 0) | (x == before[row.path])).all() and 0.3 < np.mean(x == 0)
        if "layers.0" in row.path and isinstance(leaves[row.path], PackedWeight):
            np.testing.assert_array_equal(np.asarray(unpack(leaves[row.path])), x)


def test_weights_can_be_learned_with_their_masks(model, tmp_path):
    tx = optax.adam(1e-2)
    output = streaming.Output(pack=True)
    options: dict[str, Any] = {"start": Smallest(fh.NM(2, 4)), "output": output}
    result = learn(model, tmp_path / "out", "hard_concrete", weights_tx=tx, **options)
    only = learn(model, tmp_path / "only", "hard_concrete", **options)
    before, after = (huggingface.read(d).params for d in (model, tmp_path / "out"))
    assert all(best < first for first, best in result.values)
    (first, masks), (begun, both) = only.values[0], result.values[0]
    assert begun == first >= masks > both
    leaves = packed.read_packed(tmp_path / "out" / "packed" / "block-00000.safetensors")
    pruned = {row.path for row in result.report.rows}
    for path in pruned:
        x, kept = after[path], after[path] != 0
        assert (kept.reshape(-1, 4).sum(1) <= 2).all() and kept.mean() > 0.45
        assert (x[kept] != before[path][kept]).mean() > 0.9
        if "layers.0" in path:
            np.testing.assert_array_equal(np.asarray(unpack(leaves[path])), x)
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert (after[norm] != before[norm]).all()
    assert norm in result.report.moved and only.report.moved == ()
    table = "model.embed_tokens.weight"
    np.testing.assert_array_equal(after[table], before[table])


@pytest.mark.slow
def test_weights_that_are_learned_survive_a_kill(model, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(told):
        if isinstance(told, Judged) and (told.layer, told.step) == (0, 8):
            raise Killed

    monkeypatch.setattr(learned, "SAVE_SECONDS", 0.0)
    options: dict[str, Any] = {"start": Smallest(fh.NM(2, 4))}
    options |= {"weights_tx": optax.adam(1e-2)}
    want = learn(model, tmp_path / "want", "hard_concrete", **options)
    with pytest.raises(Killed):
        learn(model, tmp_path / "out", "hard_concrete", progress=kill, **options)
    result = learn(model, tmp_path / "out", "hard_concrete", **options)
    assert files(tmp_path / "out") == files(tmp_path / "want")
    assert result.values == want.values


@pytest.mark.parametrize("name", ["maskllm", "hyperprune"])
def test_weights_that_stay_are_not_trained(model, tmp_path, name):
    with pytest.raises(ValueError, match="keeps the weights as they are; leave their"):
        learn(model, tmp_path / "out", name, weights_tx=optax.sgd(0.1))
    assert not list(tmp_path.iterdir())


def test_weights_of_few_bits_are_trained_in_float32_alone(tmp_path):
    make_decoder_directory(tmp_path / "model", CONFIG, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 rounds small steps .* float32"):
        learn(
            tmp_path / "model",
            tmp_path / "out",
            "hard_concrete",
            weights_tx=optax.sgd(0.1),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_dense_model_can_be_the_target(model, tmp_path):
    result = learn(model, tmp_path / "out", steps=2, target="asym")
    dense = {k: jnp.asarray(x) for k, x in huggingface.read(model).params.items()}
    config = decoder.DecoderConfig.from_dict(CONFIG)
    h = decoder.embed(dense, jnp.asarray(TOKENS, jnp.int32), config)
    got, want = h, h
    for layer in (0, 1):
        got, want = outputs(tmp_path / "out", layer, got), outputs(model, layer, want)
    errors = [
        float(jnp.sum((a - b) ** 2) / jnp.sum(b**2))
        for a, b in zip(
            got.reshape(3, 2, 12, 16), want.reshape(3, 2, 12, 16), strict=True
        )
    ]
    best = result.values[1][1]
    assert min(abs(error - best) for error in errors) < 1e-4 * best


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "resid"}, "target='resid', .* 'asym'"),
        ({"pattern": "2:5"}, "multiple of m=5"),
        ({"rules": {".": "skip"}}, "no weight is left to prune"),
        ({"sparsity": 0.7}, "always removes 0.5"),
        ({"limits": streaming.Limits(memory=1 << 20)}, "the limit is 0.00 GiB"),
        ({"tokens": TOKENS + 9}, "vocab_size=260"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    model, tmp_path, options, match
):
    with pytest.raises(ValueError, match=match):
        learn(model, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="held=1: need a share"):
        Learning(tx=few_steps.optimiser("maskllm", 1.0, 1), steps=1, held=1)
    window: Any = "model"
    with pytest.raises(ValueError, match="window='model': choose 'block' or 'part'"):
        Learning(tx=few_steps.optimiser("maskllm", 1.0, 1), steps=1, window=window)


def test_a_loss_that_is_not_finite_names_the_block(model, tmp_path):
    with pytest.raises(ValueError, match="block 1 of 2: step .* not finite"):
        learn(model, tmp_path / "out", "proxsparse", rate=1e30)
