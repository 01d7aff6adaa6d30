"""A new decoder family is the one entry that docs/architecture.md shows."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")
import flexhinm_jax as fh  # noqa: E402
from flexhinm_jax.cli.main import main  # noqa: E402
from flexhinm_jax.io import huggingface  # noqa: E402
from flexhinm_jax.models import decoder_config  # noqa: E402
from tests.models.directories import VOCABULARY, make_decoder_directory  # noqa: E402
from tests.test_docs import BLOCK, DOCS  # noqa: E402

(ENTRY,) = (
    found["code"]
    for found in BLOCK.finditer((DOCS / "architecture.md").read_text())
    if (found["title"] or "").endswith("models/decoder_config.py")
)
CONFIG = {
    "model_type": "toymix",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "activation": "gelu_tanh",
    "experts": 3,
    "experts_per_token": 2,
    "expert_size": 8,
}
TOKENS = np.arange(12, dtype=np.int32)[None] * 5 % 31
TEXT = "the cat sat on the mat, a dog ran under a tree. "


@pytest.fixture(autouse=True)
def family(monkeypatch):
    """FAMILIES with the entry of the page."""
    added = eval("{" + ENTRY + "}", dict(vars(decoder_config)))
    assert not added.keys() & decoder_config.FAMILIES.keys()
    monkeypatch.setattr(decoder_config, "FAMILIES", decoder_config.FAMILIES | added)


@pytest.fixture
def folder(tmp_path):
    make_decoder_directory(tmp_path / "model", CONFIG)
    return tmp_path / "model"


def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rotated(x):
    """Channel c turns with channel c + 4."""
    angle = np.arange(12)[:, None] * 10_000.0 ** (-np.arange(4) / 4)  # [t, 4]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :4], x[..., 4:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def gated(x, gate, up, down):
    y = x @ gate.T
    y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return (y * (x @ up.T)) @ down.T


def by_hand(params: dict[str, Any]) -> np.ndarray:
    """Logits [t, vocabulary] of `TOKENS`, one text, in float64."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    h = p["model.embed_tokens.weight"][TOKENS[0]]
    ages = np.arange(12)[:, None] - np.arange(12)
    for layer in (0, 1):
        w = {
            name.removeprefix(f"model.layers.{layer}."): x
            for name, x in p.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        x = norm(h, w["input_layernorm.weight"])
        q, k, v = (
            (x @ w[f"self_attn.{name}_proj.weight"].T).reshape(12, 2, 8)
            for name in "qkv"
        )
        q = norm(q, w["self_attn.q_norm.weight"])
        k = norm(k, w["self_attn.k_norm.weight"])
        if layer == 0:
            q, k = rotated(q), rotated(k)
        seen = (ages >= 0) & ((ages < 8) if layer == 0 else True)
        scores = np.einsum("qhc,khc->hqk", q, k) / np.sqrt(8)
        mixed = np.einsum("hqk,khc->qhc", softmax(np.where(seen, scores, -1e30)), v)
        h = h + mixed.reshape(12, 16) @ w["self_attn.o_proj.weight"].T
        x = norm(h, w["post_attention_layernorm.weight"])
        if layer == 0:
            parts = (w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            h = h + gated(x, *parts)
            continue
        share = softmax(x @ w["moe.gate.weight"].T)  # [t, experts]
        share = np.where(share >= np.sort(share, -1)[:, 1:2], share, 0)
        share = share / share.sum(-1, keepdims=True)
        for k in range(3):
            at = f"moe.experts.{k}.fc_"
            parts = (w[f"{at}{name}.weight"] for name in ("gate", "up", "down"))
            h = h + share[:, k : k + 1] * gated(x, *parts)
    return norm(h, p["model.norm.weight"]) @ p["lm_head.weight"].T


def test_the_entry_says_what_the_model_computes(folder):
    model = fh.models.load(folder)
    got = model.apply(model.params, jnp.asarray(TOKENS))[0]
    np.testing.assert_allclose(got, by_hand(model.params), rtol=1e-3, atol=1e-3)


def run(*arguments: Any) -> None:
    assert main([str(x) for x in (*arguments, "-q")]) == 0


@pytest.mark.slow
def test_commands_prune_it_and_run_what_they_wrote(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 4)
    out = tmp_path / "out"
    options = ("--method", "magnitude", "--length", 8, "--samples", 4, "--pack")
    run("prune", folder, *options, "--calibration", tmp_path / "text.txt", "--out", out)
    params = huggingface.read(out).params
    report = json.loads((out / "report.json").read_text())
    pruned = {row["path"] for row in report["weights"]}
    at = "model.layers.1.moe."
    assert {f"{at}experts.{k}.fc_down.weight" for k in range(3)} <= pruned
    assert len(pruned) == 2 * 4 + 3 + 3 * 3 and f"{at}gate.weight" not in pruned
    for name in pruned:
        kept = (params[name].reshape(-1, 4) != 0).sum(1)
        assert (kept <= 2).all()
    packed = fh.models.load(out, packed=True)
    got = packed.apply(packed.params, jnp.asarray(TOKENS))[0]
    np.testing.assert_allclose(got, by_hand(params), rtol=1e-3, atol=1e-3)
    tokens = packed.tokenizer.encode("the").ids
    asked = ["--prompt", "the", "--tokens", "1", "--json"]
    assert main(["generate", str(out), *asked]) == 0
    new = json.loads(capsys.readouterr().out)["tokens"]
    logits = packed.apply(packed.params, jnp.asarray([tokens], jnp.int32))[0, -1]
    assert new == [int(jnp.argmax(logits))]


def test_a_wrong_mixture_names_the_families_that_have_one(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama", "num_experts": 3, "hidden_act": "silu"}
    Path(folder, "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="those of mixtral and qwen3_moe and toymix"):
        fh.models.load(folder)
