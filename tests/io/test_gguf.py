"""GGUF files in: weights as the original has them, the same tokens, clear refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

from flexhinm_jax import atomic  # noqa: E402
from flexhinm_jax.cli.main import main  # noqa: E402
from flexhinm_jax.io import gguf as imported  # noqa: E402
from flexhinm_jax.io import gguf_tokenizer, huggingface  # noqa: E402
from flexhinm_jax.models.decoder_config import DecoderConfig  # noqa: E402

HEADS, KEYS, SIZE, WIDTH, INNER, VOCABULARY = 4, 2, 8, 32, 64, 300
TEXT = Path(__file__).parents[2] / "docs" / "architecture.md"


def weights(rng, norms=(), biases=False, tied=True):
    """Random weights under Hugging Face's names and under those of GGUF."""
    shapes = {
        "q_proj": ("attn_q", HEADS * SIZE, WIDTH),
        "k_proj": ("attn_k", KEYS * SIZE, WIDTH),
        "v_proj": ("attn_v", KEYS * SIZE, WIDTH),
        "o_proj": ("attn_output", WIDTH, HEADS * SIZE),
    }
    hf: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("token_embd.weight", (VOCABULARY, WIDTH))
    }
    hf["model.norm.weight"] = ("output_norm.weight", (WIDTH,))
    if not tied:
        hf["lm_head.weight"] = ("output.weight", (VOCABULARY, WIDTH))
    for k in range(2):
        at = f"model.layers.{k}."
        for name, (short, o, i) in shapes.items():
            hf[f"{at}self_attn.{name}.weight"] = (f"blk.{k}.{short}.weight", (o, i))
            if biases and name != "o_proj":
                hf[f"{at}self_attn.{name}.bias"] = (f"blk.{k}.{short}.bias", (o,))
        for name, o, i in (
            ("gate", INNER, WIDTH),
            ("up", INNER, WIDTH),
            ("down", WIDTH, INNER),
        ):
            hf[f"{at}mlp.{name}_proj.weight"] = (f"blk.{k}.ffn_{name}.weight", (o, i))
        for name, short in norms:
            size = SIZE if name.startswith("self_attn") else WIDTH
            hf[f"{at}{name}.weight"] = (f"blk.{k}.{short}.weight", (size,))
    arrays = {
        key: rng.standard_normal(shape).astype(np.float32)
        for key, (_, shape) in hf.items()
    }
    return arrays, {key: name for key, (name, _) in hf.items()}


LLAMA = (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"))
QWEN3 = (
    *LLAMA,
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
)
GEMMA = (
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
)


def interleaved(w, heads):
    """Rotary halves as the pairs of llama.cpp: channel c beside c + size / 2."""
    size = len(w) // heads
    order = [h * size + c + half for h in range(heads) for c in range(size // 2)
             for half in (0, size // 2)]  # fmt: skip
    return w[order]


def byte_level(vocabulary=VOCABULARY):
    """A tokenizer of the SmolLM kind trained on a page of the documentation."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT.read_text()], trainer)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def original():
    return byte_level()


def file(path, name, arrays, names, original, edit=lambda writer: None, **sizes):
    """Writes a GGUF file, as llama.cpp's converter would."""
    writer = gguf.GGUFWriter(path, name)
    model = json.loads(original.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(sizes.pop("pre", "smollm"))
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if t.startswith("<|") else 1 for t in vocabulary])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    values = {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEYS,
        "attention.key_length": SIZE,
    }
    for key, value in (values | sizes).items():
        if value is not None:
            writer.add_uint32(f"{name}.{key}", value)
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{name}.rope.freq_base", 1e5)
    edit(writer)
    for key, w in arrays.items():
        kind = gguf.GGMLQuantizationType.F32
        if isinstance(w, tuple):
            w, kind = gguf.quantize(*w), w[1]
        writer.add_tensor(names[key], w, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(path, original, rng=None, arrays=None, edit=lambda w: None, **sizes):
    """A small file of the Llama family and the weights that it stands for."""
    rng = np.random.default_rng(0) if rng is None else rng
    wanted, names = weights(rng, LLAMA)
    stored = dict(wanted)
    for k in range(2):
        for part, heads in (("q", HEADS), ("k", KEYS)):
            key = f"model.layers.{k}.self_attn.{part}_proj.weight"
            stored[key] = interleaved(wanted[key], heads)
    return file(path, "llama", stored, names, original, edit, **sizes), wanted


def test_a_llama_comes_back_as_it_was(tmp_path, original):
    path, wanted = llama(tmp_path / "m.gguf", original)
    seen = []
    imported.convert(path, tmp_path / "out", progress=lambda *x: seen.append(x))
    model = huggingface.read(tmp_path / "out")
    assert model.params.keys() == wanted.keys()
    for key, w in wanted.items():
        np.testing.assert_array_equal(model.params[key], w, err_msg=key)
    config = DecoderConfig.from_dict(model.config)
    assert (config.head_size, config.num_key_value_heads) == (SIZE, KEYS)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 1e5)
    assert config.tie_word_embeddings and config.vocab_size == VOCABULARY
    assert seen[-1][0] == seen[-1][1] == sum(w.nbytes for w in wanted.values())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantised_weights_are_those_of_the_package(tmp_path, original, name):
    kind = gguf.GGMLQuantizationType[name]
    rng = np.random.default_rng(1)
    wanted, names = weights(rng, LLAMA)
    stored = {k: (w, kind) if w.ndim == 2 else w for k, w in wanted.items()}
    path = file(tmp_path / "m.gguf", "qwen2", stored, names, original)
    imported.convert(path, tmp_path / "out", dtype="bfloat16")
    params = huggingface.read(tmp_path / "out").params
    for key, w in wanted.items():
        if w.ndim == 2:
            w = gguf.dequantize(gguf.quantize(w, kind), kind).reshape(w.shape)
        np.testing.assert_array_equal(params[key], w.astype(params[key].dtype))
    assert params["model.norm.weight"].dtype.name == "bfloat16"


def test_families_keep_what_is_their_own(tmp_path, original):
    rng = np.random.default_rng(2)
    for name, norms, biases in (("qwen2", LLAMA, True), ("qwen3", QWEN3, False)):
        wanted, names = weights(rng, norms, biases, tied=False)
        path = file(tmp_path / f"{name}.gguf", name, wanted, names, original)
        imported.convert(path, tmp_path / name)
        model = huggingface.read(tmp_path / name)
        for key, w in wanted.items():
            np.testing.assert_array_equal(model.params[key], w, err_msg=key)
        config = DecoderConfig.from_dict(model.config)
        assert config.attention_bias == biases and not config.tie_word_embeddings
        assert config.qk_norm == (name == "qwen3")
    wanted, names = weights(rng, GEMMA)
    stored = {k: w + 1 if w.ndim == 1 else w for k, w in wanted.items()}
    window = {"attention.sliding_window": 16}
    path = file(tmp_path / "g.gguf", "gemma3", stored, names, original, **window)
    imported.convert(path, tmp_path / "gemma3")
    model = huggingface.read(tmp_path / "gemma3")
    for key, w in wanted.items():
        np.testing.assert_allclose(model.params[key], w, atol=1e-6, err_msg=key)
    assert model.config["model_type"] == "gemma3_text"
    assert model.config["layer_types"] == ["sliding_attention"] * 2


STRINGS = [
    *(" ".join(str(k * j) for j in range(1, 9)) + "." for k in range(70)),
    *(f"def f{k}(x):\n\treturn x ** {k}  # comment\r\n" for k in range(30)),
    *(f"<|im_start|>user {k}<|endoftext|> ok" for k in range(30)),
    *(
        chr(0x3B1 + k) + "γεια \u0301e\u200d🙂 日本語 Straße " + "é" * k
        for k in range(24)
    ),
    *("  " * k + "I've don't  WE'LL\n\n \t x" for k in range(26)),
    *re.split(r"(?<=[.\n]) ", TEXT.read_text())[:50],
]


def test_the_tokenizer_gives_the_ids_of_the_original(tmp_path, original):
    path, _ = llama(tmp_path / "m.gguf", original)
    imported.convert(path, tmp_path / "out")
    mine = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert len(STRINGS) >= 200
    for text in STRINGS:
        ids = original.encode(text).ids
        assert mine.encode(text).ids == ids, text
        assert mine.decode(ids, skip_special_tokens=False) == original.decode(
            ids, skip_special_tokens=False
        )
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}"
    assert (config["eos_token"], config["bos_token"]) == (
        "<|endoftext|>",
        "<|im_start|>",
    )


class Meta:
    """What the tokenizer asks of a file."""

    path, name = "m.gguf", "llama"

    def __init__(self, **values):
        self.values = {f"tokenizer.ggml.{k}": v for k, v in values.items()}

    def get(self, key, default=None):
        return self.values.get(key, default)

    need = get


def test_words_are_cut_as_in_the_original_patterns():
    byte = {"model": "gpt2", "tokens": ["a"], "merges": [], "token_type": [1]}
    text = "I've 12345 cats\n\n  and"
    want = {
        "smollm": ["I", "'ve", "Ġ", "1", "2", "3", "4", "5", "Ġcats", "ĊĊĠ", "Ġand"],
        "qwen2": ["I", "'ve", "Ġ", "1", "2", "3", "4", "5", "Ġcats", "ĊĊ", "Ġ", "Ġand"],
        "llama-bpe": ["I", "'ve", "Ġ", "123", "45", "Ġcats", "ĊĊ", "Ġ", "Ġand"],
        "gpt-2": ["I", "'ve", "Ġ12345", "Ġcats", "ĊĊĠ", "Ġand"],
    }
    for name, pieces in want.items():
        built = gguf_tokenizer.tokenizer(Meta(**byte, pre=name))
        cut = built.pre_tokenizer.pre_tokenize_str(text)
        assert [piece for piece, _ in cut] == pieces, name


def by_score(text, tokens, scores):
    """SentencePiece's own way: merge the neighbours whose piece scores best."""
    at = {t: k for k, t in enumerate(tokens)}
    pieces = list(text.replace(" ", "▁"))
    while True:
        best = max(
            (
                (scores[at[a + b]], -k)
                for k, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
                if a + b in at
            ),
            default=None,
        )
        if best is None:
            break
        k = -best[1]
        pieces[k : k + 2] = [pieces[k] + pieces[k + 1]]
    ids = []
    for piece in pieces:
        known = [at[piece]] if piece in at else None
        ids += known or [at[f"<0x{b:02X}>"] for b in piece.encode()]
    return ids


def test_sentencepiece_merges_follow_the_scores():
    rng = np.random.default_rng(3)
    words = "the cat sat on the mat and then the hat ran to that man".split()
    grown = dict.fromkeys("▁abcdehmnorst")
    for word in words:
        for k in range(2, len(word) + 2):
            grown |= dict.fromkeys(("▁" + word)[:k]) | {("▁" + word)[:k]: None}
            grown |= {word[:k]: None}
    pieces = [p for p in grown if p]
    singles = [p for p in pieces if len(p) == 1]
    longer = sorted((p for p in pieces if len(p) > 1), key=lambda p: (len(p), p))
    ranks = rng.permutation(len(longer))
    longer = [longer[k] for k in ranks]
    bytes_ = [f"<0x{k:02X}>" for k in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *longer, *singles]
    scores = [0.0] * 259 + [-float(k) for k in range(len(longer))]
    scores += [-1000.0] * len(singles)
    types = [2, 3, 3] + [6] * 256 + [1] * (len(longer) + len(singles))
    built = gguf_tokenizer.tokenizer(
        Meta(
            model="llama",
            tokens=tokens,
            scores=scores,
            token_type=types,
            unknown_token_id=0,
            bos_token_id=1,
            add_space_prefix=False,
        )
    )
    for k in range(60):
        text = " ".join(rng.choice(words, 1 + k % 7)) + ("é 9" if k % 5 == 0 else "")
        assert built.encode(text).ids == [1, *by_score(text, tokens, scores)], text
        assert built.decode(built.encode(text).ids) == text


def factors(scale, width=SIZE, theta=1e5):
    """The wavelength factors of Llama 3.1, as its formula gives them."""
    out = []
    for c in range(0, width, 2):
        wave = 2 * np.pi * theta ** (c / width)
        if wave < 8192 / 4:
            out.append(1.0)
        elif wave > 8192:
            out.append(scale)
        else:
            smooth = (8192 / wave - 1) / 3
            out.append(1 / ((1 - smooth) / scale + smooth))
    return np.array(out, np.float32)


def test_positions_of_llama_3_are_recognised(tmp_path, original):
    stored = factors(32.0)
    edit = lambda w: w.add_tensor("rope_freqs.weight", stored)  # noqa: E731
    path, _ = llama(tmp_path / "m.gguf", original, edit=edit)
    imported.convert(path, tmp_path / "out")
    scaling = huggingface.read_config(tmp_path / "out")["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == 32.0
    odd = lambda w: w.add_tensor("rope_freqs.weight", stored[::-1].copy())  # noqa: E731
    path, _ = llama(tmp_path / "odd.gguf", original, edit=odd)
    with pytest.raises(
        ValueError, match="rope_freqs.weight are not those of Llama 3.1"
    ):
        imported.convert(path, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_read_is_refused_by_name(tmp_path, original):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        imported.convert(tmp_path / "none.gguf", out)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="is not a GGUF file"):
        imported.convert(other, out)
    path, _ = llama(tmp_path / "m.gguf", original)
    whole = path.read_bytes()
    for length in (10, 300, len(whole) // 2, len(whole) - 40):
        other.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            imported.convert(other, out)
    for text, edit in (
        ("one of 3 parts", lambda w: w.add_uint16("split.count", 3)),
        (
            "tensors blk.0.ssm_a.weight are not part of a llama",
            lambda w: w.add_tensor("blk.0.ssm_a.weight", np.ones((2, 2), np.float32)),
        ),
        (
            "rope.scaling.type 'su' is not supported",
            lambda w: w.add_string("llama.rope.scaling.type", "su"),
        ),
    ):
        path, _ = llama(tmp_path / "edit.gguf", original, edit=edit)
        with pytest.raises(ValueError, match=re.escape(text)):
            imported.convert(path, out)
    path, _ = llama(tmp_path / "edit.gguf", original, block_count=None)
    with pytest.raises(ValueError, match="has no llama.block_count in its metadata"):
        imported.convert(path, out)
    path, _ = llama(tmp_path / "edit.gguf", original, block_count=3)
    with pytest.raises(ValueError, match="has no tensor for model.layers.2"):
        imported.convert(path, out)
    path, _ = llama(tmp_path / "edit.gguf", original, pre="gpt-9")
    with pytest.raises(ValueError, match="tokenizer.ggml.pre 'gpt-9' is not supported"):
        imported.convert(path, out)
    arrays, names = weights(np.random.default_rng(0), LLAMA)
    path = file(tmp_path / "edit.gguf", "mamba", arrays, names, original)
    with pytest.raises(ValueError, match="architecture 'mamba' is not supported"):
        imported.convert(path, out)
    path, _ = llama(tmp_path / "m.gguf", original)
    with pytest.raises(ValueError, match="dtype='int8'"):
        imported.convert(path, out, dtype="int8")  # type: ignore[arg-type]
    assert not out.exists()
    imported.convert(path, out)
    with pytest.raises(FileExistsError):
        imported.convert(path, out)
    imported.convert(path, out, overwrite=True)


def test_a_directory_that_another_run_writes_is_refused(owned, original):
    path, _ = llama(owned.with_name("m.gguf"), original)
    with pytest.raises(atomic.InUse, match="out is being written by process 123"):
        imported.convert(path, owned)
    assert not owned.exists()


def test_the_command_writes_a_directory_that_generates(tmp_path, original, capsys):
    path, _ = llama(tmp_path / "m.gguf", original)
    out = str(tmp_path / "out")
    assert main(["import", str(path), "--out", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == sum(w.nbytes for w in huggingface.read(out).params.values())
    assert main(["generate", out, "--prompt", "the mask", "--tokens", "3"]) == 0
    assert main(["import", str(path), "--out", out]) == 2
    assert "exists; pass --force to replace it" in capsys.readouterr().err
    assert main(["import", str(path), "--out", out, "--force", "-q"]) == 0
