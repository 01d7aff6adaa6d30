import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.models import encoder
from train.recovery import Budget, Recovery
from train.teacher import Recipe

CONFIG = encoder.EncoderConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    initializer_range=0.2,
)
RECIPE = Recipe(
    learning_rate=2e-3, rows=2, length=16, precision="float32", cache_bytes=2000
)
LISTS = [
    [2, *row.tolist(), 3] for row in np.random.default_rng(0).integers(4, 30, (24, 6))
]


@pytest.fixture(scope="module")
def models():
    """(dense, pruned, keep): every second weight of every matrix is gone."""
    dense = encoder.init(jax.random.key(0), CONFIG)
    keep = {}
    for k, (name, leaf) in enumerate(dense.items()):
        prune = name.startswith("encoder") and leaf.ndim == 2
        draw = jax.random.uniform(jax.random.key(k), leaf.shape)
        keep[name] = draw < 0.5 if prune else None
    pruned = {
        name: leaf if keep[name] is None else jnp.where(keep[name], leaf, 0)
        for name, leaf in dense.items()
    }
    return dense, pruned, keep


def start(models, budget, recipe=RECIPE):
    dense, pruned, keep = models
    return Recovery(dense, pruned, keep, LISTS, CONFIG, recipe, budget)


def test_the_student_comes_closer_and_its_pruned_weights_stay_zero(models):
    dense, pruned, keep = models
    run = start(models, Budget(60, "steps"))
    cosines = [figures["cosine"] for figures in run.run()]
    assert len(cosines) == 60
    assert np.mean(cosines[-6:]) > np.mean(cosines[:6]) + 0.02
    after = run.params()
    for name, mask in keep.items():
        if mask is not None:
            assert not np.any(np.asarray(after[name])[~np.asarray(mask)])
            assert np.any(np.asarray(after[name] != pruned[name]))
    for name in dense:
        if name.startswith("embeddings"):
            assert np.all(np.asarray(after[name] == dense[name]))


def test_a_budget_counts_what_it_names():
    assert Budget(200, "steps").progress(50, 1e9) == 0.25
    assert Budget(8, "minutes").progress(50, 120) == 0.25
    assert Budget(100, "cpu-seconds").progress(50, 25) == 0.25


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (0, "minutes", "0 minutes is not positive"),
        (float("nan"), "steps", "nan steps is not positive"),
        (1, "hours", "known: minutes, cpu-seconds, steps"),
    ],
)
def test_a_bad_budget_is_an_error(amount, unit, text):
    with pytest.raises(ValueError, match=text):
        Budget(amount, unit)
