import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax.models import encoder
from train.gated import GatedRecovery, Gates
from train.recovery import Budget
from train.teacher import Recipe

CONFIG = encoder.EncoderConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    initializer_range=0.2,
)
RECIPE = Recipe(learning_rate=2e-3, rows=2, length=16, precision="float32")
PATTERN = fh.HiNM(8, permute=None)


@pytest.mark.slow
def test_gates_exchange_weights_and_the_result_obeys_the_pattern():
    lists = [
        [2, *row.tolist(), 3]
        for row in np.random.default_rng(0).integers(4, 30, (24, 6))
    ]
    dense = encoder.init(jax.random.key(0), CONFIG)
    tokens = np.array(lists[:4], np.int32)

    def embed(params, tokens):
        return encoder.embed(params, tokens, jnp.ones_like(tokens), CONFIG)

    start = fh.prune(
        embed,
        dense,
        [tokens],
        fh.Magnitude(PATTERN),
        sparsity=0.75,
        key=jax.random.key(1),
    )
    gates = Gates(share=0.5, rate=0.2)
    run = GatedRecovery(
        dense, start, PATTERN, lists, CONFIG, RECIPE, Budget(8, "steps"), gates
    )
    figures = list(run.run())
    assert "temperature" in figures[0] and "temperature" not in figures[-1]
    assert run.moved is not None and 0 < run.moved < 1
    after = run.params()
    for path, plan in run.plans().items():
        fh.verify(plan, path=path)
        before = start.plans[path].support
        weight, keep = np.asarray(after[path]), np.asarray(plan.support.keep)
        assert not weight[~keep].any()
        assert keep.sum() == np.asarray(before.keep).sum()
        # Gates choose inside the columns that the start chose.
        assert plan.support.regions is not None and before.regions is not None
        np.testing.assert_array_equal(
            np.asarray(plan.support.regions.nm_end), np.asarray(before.regions.nm_end)
        )


def test_a_share_outside_its_range_is_an_error():
    with pytest.raises(ValueError, match=r"share=0 must be in \(0, 1\]"):
        Gates(share=0)
