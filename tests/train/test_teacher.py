import jax
import numpy as np
import pytest

from flexhinm_jax.models import encoder
from tests.train.small import CONFIG, LISTS, RECIPE
from train.lab import teacher
from train.lab.teacher import Recipe


@pytest.fixture(scope="module")
def dense():
    return encoder.init(jax.random.key(0), CONFIG)


def test_a_teacher_that_forgets_says_the_same_again(dense):
    sentences = teacher.Sentences(LISTS, RECIPE)
    rows = sentences.batch(0)
    remembering = teacher.Teacher(dense, CONFIG, Recipe(precision="float32"))
    forgetting = teacher.Teacher(dense, CONFIG, RECIPE)
    assert remembering(0, rows) is remembering(0, rows)
    assert forgetting(0, rows) is not forgetting(0, rows)
    for a, b in zip(
        jax.tree.leaves(remembering(0, rows)),
        jax.tree.leaves(forgetting(0, rows)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_the_loss_of_the_teacher_itself_is_nothing_and_of_noise_is_large(dense):
    sentences = teacher.Sentences(LISTS, RECIPE)
    rows = sentences.batch(0)
    targets = teacher.Teacher(dense, CONFIG, RECIPE)(0, rows)
    loss_of = jax.jit(teacher.loss_of, static_argnums=(3, 4))
    loss, parts = loss_of(dense, rows, targets, CONFIG, RECIPE)
    # The teacher's states are kept in bfloat16.
    assert float(loss) < 1e-4 and float(parts["cosine"]) == pytest.approx(1, abs=1e-5)
    other = encoder.init(jax.random.key(1), CONFIG)
    assert float(loss_of(other, rows, targets, CONFIG, RECIPE)[0]) > 1


def test_every_batch_comes_once_before_any_comes_again():
    sentences = teacher.Sentences(LISTS, RECIPE)
    assert sentences.used == 24 and sentences.count == 6
    epochs = [[sentences.number(e * 6 + k) for k in range(6)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6))
    assert epochs[0] != epochs[1]


def test_the_rate_rises_then_falls_to_nothing():
    recipe = Recipe(learning_rate=1.0, warmup=0.1)
    assert recipe.rate(0) == 0
    assert recipe.rate(0.05) == pytest.approx(0.5)
    assert recipe.rate(0.1) == pytest.approx(1)
    assert recipe.rate(0.55) == pytest.approx(0.5)
    assert recipe.rate(1) == recipe.rate(1.2) == pytest.approx(0)


def test_too_few_sentences_are_an_error():
    with pytest.raises(ValueError, match="2 of 3 sentences.*fill 1 rows.*takes 2"):
        teacher.Sentences([[1] * 8, [1] * 8, [1] * 17], RECIPE)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Recipe(precision="float8"), "known: float32, bfloat16"),  # pyright: ignore[reportArgumentType]
        (lambda: Recipe(rows=0), "rows=0 must be at least 1"),
        (lambda: Recipe(learning_rate=-1.0), "learning_rate=-1.0 must be positive"),
        (lambda: Recipe(warmup=1.0), r"warmup=1.0 must be in \[0, 1\)"),
    ],
)
def test_a_bad_value_is_an_error(make, text):
    with pytest.raises(ValueError, match=text):
        make()
