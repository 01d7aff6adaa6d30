"""Frequencies keep what a scaling promises."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.models import rope


def plain(theta=1e4, size=64):
    return rope.frequencies(theta, size, None, 1)[0]


def scaled(scaling, length=1, size=64):
    return rope.frequencies(1e4, size, scaling, length)[0] / plain(size=size)


def test_wavelengths_grow_geometrically_from_one_radian_per_position():
    found = plain()
    assert found[0] == 1 and found.dtype == np.float32
    np.testing.assert_allclose(found[1:] / found[:-1], 1e4 ** (-1 / 32), rtol=1e-6)


def test_linear_divides_every_frequency():
    np.testing.assert_allclose(scaled(rope.Linear(factor=4.0)), 0.25, rtol=1e-6)


def test_dynamic_changes_nothing_up_to_the_trained_length():
    dynamic = rope.Dynamic(factor=2.0, trained=100)
    np.testing.assert_array_equal(scaled(dynamic, 100), 1)
    longer = scaled(dynamic, 300)
    assert longer[0] == 1 and np.all(np.diff(longer) < 0)
    # The slowest pair is stretched by exactly factor * length / trained - factor + 1.
    np.testing.assert_allclose(longer[-1], 1 / 5, rtol=1e-5)


def test_llama3_keeps_short_waves_and_divides_long_ones():
    llama = rope.Llama3(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, trained=512
    )
    ratio, waves = scaled(llama), 2 * math.pi / plain()
    np.testing.assert_allclose(ratio[waves < 512 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[waves > 512], 1 / 8, rtol=1e-6)
    between = (waves > 512 / 4) & (waves < 512)
    assert between.any() and np.all((ratio[between] < 1) & (ratio[between] > 1 / 8))


def test_yarn_ramps_between_kept_and_stretched_pairs_and_sharpens():
    yarn = rope.Yarn(factor=4.0, trained=2048)
    ratio, turned = scaled(yarn), 2048 * plain() / (2 * math.pi)
    np.testing.assert_allclose(ratio[0], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turned < 0.5], 1 / 4, rtol=1e-6)
    assert np.all(np.diff(ratio) <= 1e-6) and np.any((ratio < 0.9) & (ratio > 0.3))
    sharpness = rope.frequencies(1e4, 64, yarn, 1)[1]
    assert sharpness == pytest.approx(0.1 * math.log(4) + 1)


def test_rotated_products_depend_on_distances_only():
    random = np.random.default_rng(0)
    x, y = random.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)
    products = []
    for shift in (0, 5, 40):
        at = [jnp.array([[shift + k]], jnp.int32) for k in (0, 3)]
        turned = [rope.turns(p, 100.0, 8, None, 64) for p in at]
        a, b = (
            rope.rotate(jnp.asarray(x), turned[0]),
            rope.rotate(jnp.asarray(y), turned[1]),
        )
        products.append(float(jnp.vdot(a, b)))
    np.testing.assert_allclose(products, products[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (rope.Linear, {"factor": math.inf}, "factor must be a number > 0, got inf"),
        (rope.Linear, {"factor": True}, "factor must be a number > 0, got True"),
        (rope.Dynamic, {"trained": 0}, "trained must be an integer > 0"),
        (rope.Yarn, {"trained": 8, "beta_fast": 0.5}, "beta_slow=1.0 must not"),
        (rope.Yarn, {"trained": 8, "truncate": 1}, "truncate must be true"),
        (
            rope.Llama3,
            {"trained": 8, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "low_freq_factor=4.0 must be below",
        ),
    ],
)
def test_impossible_scalings_are_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"factor": 2.0} | values)
