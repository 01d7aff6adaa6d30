"""The pytrees show what they hold by dtype and shape, whatever their leaves are."""

import jax
import jax.numpy as jnp
import pytest

import flexhinm_jax as fh
from flexhinm_jax import types
from flexhinm_jax.training.objectives import Teacher

NORMS = fh.Stats(jnp.ones(8), jnp.ones(8), jnp.float32(3))
REGIONS = types.Regions(
    jnp.arange(4), jnp.arange(8)[None], jnp.array([0]), jnp.array([8]), n=2, m=4
)
PLAN = fh.Plan(
    jnp.ones((4, 8), jnp.bfloat16),
    types.Support(jnp.ones((4, 8), bool), REGIONS),
    jnp.float32(0.5),
)
PACKED = types.PackedWeight(
    None,
    None,
    nm_index=jnp.arange(8)[None],
    nm_values=jnp.ones((1, 4, 4)),
    nm_positions=jnp.ones((1, 4, 1), jnp.uint32),
    out_order=jnp.arange(4),
    left=None,
    right=None,
    shape=(4, 8),
    n=2,
    m=4,
    layout=types.Layout((4, 8), (), (), ()),
)
SHOWN = {
    "Stats": (NORMS, "Stats(sq_norm=float32[8], mean=float32[8], count=float32[])"),
    "Plan": (
        PLAN,
        "Plan(weight=bfloat16[4, 8], support=Support(keep=bool[4, 8], "
        "regions=Regions(out_order=int32[4], in_order=int32[1, 8], "
        "dense_end=int32[1], nm_end=int32[1], n=2, m=4)), retained=float32[])",
    ),
    "Teacher": (Teacher(jnp.ones((2, 3))), "Teacher(outputs=float32[2, 3])"),
    "PackedWeight": (
        PACKED,
        "PackedWeight(nm_index=int32[1, 8], nm_values=float32[1, 4, 4], "
        "nm_positions=uint32[1, 4, 1], out_order=int32[4], shape=(4, 8), n=2, m=4)",
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_an_array_is_shown_by_its_dtype_and_shape(name):
    value, text = SHOWN[name]
    assert repr(value) == text
    assert repr(jax.eval_shape(lambda x: x, value)) == text


@pytest.mark.parametrize("name", SHOWN)
def test_tracers_show_themselves(name):
    value, text = SHOWN[name]
    seen = []

    def note(x):
        seen.append(repr(x))
        return x

    jax.eval_shape(jax.jit(note), value)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), value)
    jax.eval_shape(jax.vmap(note), stacked)
    assert seen == [text, text]


@pytest.mark.parametrize("leaf", [None, "text", object(), (), jnp.ndarray, 1])
@pytest.mark.parametrize("name", SHOWN)
def test_a_tree_of_anything_shows_itself(name, leaf):
    value = jax.tree.map(lambda _: leaf, SHOWN[name][0])
    assert repr(value).startswith(f"{name}(")
    assert leaf is not None or "None" not in repr(value)


def test_what_a_method_keeps_is_shown_through_containers():
    state = types.State((), {"rows": [jnp.ones(2)], "factor": types.BlockDiagonal})
    assert repr(state).startswith("State(fixed={'factor': <class ")
    assert repr(state).endswith("'rows': [float32[2]]})")
    assert repr(types.TransposedWeight(PACKED)) == f"TransposedWeight(of={PACKED!r})"
