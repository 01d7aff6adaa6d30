"""The matrices behind the anchor numbers, made from seeds and checked by fingerprint.

All are float32 [outputs, inputs] from numpy's `default_rng` (PCG64, numpy 2); the order
of the draws is part of the recipe.
"""

import hashlib
from typing import Any

import jax.numpy as jnp
import numpy as np

import flexhinm_jax as fh
from flexhinm_jax.io import tensors
from flexhinm_jax.models.decoder_config import DecoderConfig
from train.lab import models

TILE = 32  # rows of a planted cluster

FINGERPRINTS = {
    "gauss256_s0": (52283.0408, "08f00e104d66fe76"),
    "heavy256_s0": (88243.2661, "72d5c266ba596b24"),
    "planted256_s0": (88856.8029, "2d09fb53b32110b0"),
    "gauss512_s0": (209451.1461, "872b3c501ffa4136"),
    "planted512_s1": (338502.3515, "9486a389b3d8ef8e"),
    "query": (10897.4545, "37cd347d0b4299ae"),
    "attention": (4966.8924, "2d82a69258c3226c"),
    "intermediate": (29375.9543, "ff5b9149318c98ca"),
}
"""name: (sum of |w| in float64, first 16 hex digits of the sha256 of the bytes)."""

MINILM = {
    "query": "encoder.layer.0.attention.self.query.weight",
    "attention": "encoder.layer.0.attention.output.dense.weight",
    "intermediate": "encoder.layer.0.intermediate.dense.weight",
}

LAYERS = {"synth512": (7.764288, -94.7641), "minilm": (-1197.985557, 3338.2365)}
"""name: sums of the weight and of the inputs of `layer`, in float64."""

TRACES = {0: 1587.4109, 1: 1732.1468, 2: 1630.3231}
"""seed: trace(X^T X) / 4096 of `held_out_layer`."""

SCORES = {("normal", 0): 0.7986, ("t3", 0): 1.1008}
"""(distribution, seed): mean of `scores`, four digits."""


def smollm2(blocks: int) -> DecoderConfig:
    """Sizes of SmolLM2-135M with fewer than its 30 blocks, its table in proportion."""
    return DecoderConfig(
        vocab_size=49152 * blocks // 30,
        hidden_size=576,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        tie_word_embeddings=True,
    )


def statistics(x: np.ndarray) -> fh.Stats:
    """Statistics of input rows [tokens, inputs], summed in float64."""
    wide = x.astype(np.float64)
    gram = wide.T @ wide
    return fh.Stats(
        sq_norm=jnp.asarray(np.diag(gram), jnp.float32),
        mean=jnp.asarray(wide.mean(0), jnp.float32),
        count=jnp.asarray(len(x), jnp.float32),
        gram=jnp.asarray(gram, jnp.float32),
    )


def relative_error(w: np.ndarray, other: Any, gram: np.ndarray) -> float:
    """|| X (W - W')^T ||^2 / || X W^T ||^2 in float64, from X^T X."""
    w = w.astype(np.float64)
    lost = np.asarray(other, np.float64) - w
    return float(np.sum(lost @ gram * lost) / np.sum(w @ gram * w))


def layer(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A weight and 4096 rows of its inputs: "synth512", "synth512t" or "minilm".

    The synthetic weights have normal or Student-t entries (5 degrees of freedom) and
    log-normal row scales; that of MiniLM is its first feed-forward matrix. The inputs
    are made of 32 directions and noise, with log-normal channel scales.

    Raises:
      ValueError: sums that do not match.
    """
    if name == "minilm":
        w, seed = _minilm(MINILM["intermediate"]), 2
    else:
        rng, seed = np.random.default_rng(0), 1
        shape = (512, 512)
        normal = {"synth512": True, "synth512t": False}[name]
        base = rng.standard_normal(shape) if normal else rng.standard_t(5, shape)
        rows = np.exp(0.3 * rng.standard_normal(512))
        w = (base * rows[:, None] / np.sqrt(512)).astype(np.float32)
    x = _correlated_rows(4096, w.shape[1], seed)
    if name in LAYERS:
        found = w.sum(dtype=np.float64), x.sum(dtype=np.float64)
        want = LAYERS[name]
        if abs(found[0] - want[0]) > 6e-7 or abs(found[1] - want[1]) > 6e-5:
            raise ValueError(f"{name}: sums {found}, expected {want}; got other bytes")
    return w, x


def _correlated_rows(count: int, size: int, seed: int, rank: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((size, rank))
    scale = np.exp(0.5 * rng.standard_normal(size))
    z = rng.standard_normal((count, rank))
    noise = rng.standard_normal((count, size))
    x = (z @ directions.T / np.sqrt(rank) + 0.5 * noise) * scale
    return x.astype(np.float32)


def matrix(name: str) -> np.ndarray:
    """The matrix of that name: "gauss512_s1", "colsig_1.5", or one of `MINILM`.

    Raises:
      ValueError: a fingerprint that does not match.
    """
    if name in MINILM:
        w = _minilm(MINILM[name])
    elif name.startswith("colsig_"):
        r = np.random.default_rng(3000)
        w = r.standard_normal((256, 256))
        sigma = float(name.removeprefix("colsig_"))
        w = (w * np.exp(sigma * r.standard_normal((1, 256)))).astype(np.float32)
    else:
        kind, size, seed = _parts(name)
        w = {"gauss": _gauss, "heavy": _heavy, "planted": _planted}[kind](seed, size)
    _check(name, w)
    return w


def labels(name: str) -> np.ndarray:
    """Hidden row cluster of every row of a planted matrix."""
    _, size, seed = _parts(name)
    r = np.random.default_rng(2000 + seed)
    r.standard_normal((size // TILE, size))
    return r.permutation(np.repeat(np.arange(size // TILE), TILE))


def _parts(name: str) -> tuple[str, int, int]:
    head, _, seed = name.partition("_s")
    kind = head.rstrip("0123456789")
    return kind, int(head[len(kind) :]), int(seed)


def _gauss(seed: int, size: int) -> np.ndarray:
    r = np.random.default_rng(seed)
    return r.standard_normal((size, size)).astype(np.float32)


def _heavy(seed: int, size: int) -> np.ndarray:
    """Student-t, 3 degrees of freedom, log-normal row and column scales."""
    r = np.random.default_rng(1000 + seed)
    t = r.standard_t(3, (size, size))
    a = np.exp(0.5 * r.standard_normal((size, 1)))
    b = np.exp(0.5 * r.standard_normal((1, size)))
    return (t * a * b).astype(np.float32)


def _planted(seed: int, size: int) -> np.ndarray:
    """Hidden clusters of 32 rows that share a column profile, shuffled."""
    r = np.random.default_rng(2000 + seed)
    profile = np.exp(r.standard_normal((size // TILE, size)))
    label = r.permutation(np.repeat(np.arange(size // TILE), TILE))
    return (profile[label] * r.standard_normal((size, size))).astype(np.float32)


def _minilm(key: str) -> np.ndarray:
    path = models.model_directory() / "model.safetensors"
    return tensors.read(path, [key])[key].astype(np.float32, copy=False)


def _check(name: str, w: np.ndarray) -> None:
    if name not in FINGERPRINTS:
        return
    total, digest = FINGERPRINTS[name]
    found = float(np.abs(w.astype(np.float64)).sum())
    found_digest = hashlib.sha256(np.ascontiguousarray(w).tobytes()).hexdigest()[:16]
    if abs(found - total) > 6e-5 or found_digest != digest:
        raise ValueError(f"{name}: sum {found}, sha256 {found_digest}; got other bytes")


def scores(seed: int, dist: str = "normal", size: int = 1024) -> np.ndarray:
    """|W| f32[size, size] with normal or Student-t (3 degrees) entries."""
    rng = np.random.default_rng(seed)
    shape = (size, size)
    w = rng.standard_normal(shape) if dist == "normal" else rng.standard_t(3, shape)
    a = np.abs(w.astype(np.float32))
    if size == 1024 and (dist, seed) in SCORES:
        _match(f"scores({dist}, {seed})", a.mean(dtype=np.float64), SCORES[dist, seed])
    return a


def tiles(a: np.ndarray, m: int) -> np.ndarray:
    """True m x m tiles in row-major order, [tiles, m, m]."""
    r, c = a.shape
    return a.reshape(r // m, m, c // m, m).swapaxes(1, 2).reshape(-1, m, m)


def held_out_layer(
    seed: int, size: int = 768
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight, calibration and hold-out inputs of a square layer, 4096 tokens or more.

    Inputs lie near a subspace of an eighth of the directions and their channels differ
    in scale.
    """
    tokens, rank = max(4096, 2 * size), size // 8
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((size, size)) / np.sqrt(size)
    z = rng.standard_normal((tokens, rank))
    b = rng.standard_normal((rank, size)) / np.sqrt(rank)
    e = rng.standard_normal((tokens, size))
    g = rng.standard_normal(size)
    other_z = rng.standard_normal((tokens, rank))
    other_e = rng.standard_normal((tokens, size))
    scale = np.exp(0.5 * g)
    x = ((z @ b + 0.5 * e) * scale).astype(np.float32)
    held_out = ((other_z @ b + 0.5 * other_e) * scale).astype(np.float32)
    trace = np.square(x, dtype=np.float64).sum() / tokens
    if size == 768:
        _match(f"held_out_layer({seed})", trace, TRACES[seed])
    return w.astype(np.float32), x, held_out


def _match(name: str, got: float, want: float) -> None:
    if abs(got - want) > 6e-5:
        raise ValueError(
            f"{name}: fingerprint {got:.4f}, expected {want:.4f}; numpy's random "
            "streams changed, the anchors do not apply"
        )
