import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import flexhinm_jax as fh
from flexhinm_jax import kernels
from flexhinm_jax.kernels import validation
from tests.kernels.test_packing import plan_of, ragged_plan


@pytest.fixture(scope="module")
def packed():
    return kernels.pack(plan_of(fh.FlexHiNM(8, permute=None), sparsity=0.6))


def change(packed, field, f):
    return dataclasses.replace(packed, **{field: f(getattr(packed, field))})


@pytest.mark.parametrize(
    ("field", "f", "message"),
    [
        ("nm_index", lambda a: a.at[0, 0].set(32), "index outside 0 .. 31"),
        ("nm_index", lambda a: a.at[0, 0].set(-1), "index outside 0 .. 31"),
        ("nm_positions", lambda a: a * 0, "do not increase inside a group"),
        ("nm_positions", lambda a: a.at[0, 0, 0].set(0b0001), "do not increase"),
        ("nm_positions", lambda a: a.astype(jnp.int32), "nm_positions is int32"),
        ("nm_values", lambda a: a[..., :-1], "nm_values is float32"),
        ("dense_values", lambda a: a.astype(jnp.bfloat16), "dense_values is bfloat16"),
        ("out_order", lambda a: a.at[0].set(1), "out_order is not a permutation"),
        ("out_order", lambda a: a[:-1], "out_order is int32.15."),
        ("nm_index", lambda a: a[:, :-1], "do not fit shape"),
        ("nm_index", lambda a: a[0], "expected 2 axes"),
    ],
)
def test_unpacking_names_the_broken_promise(packed, field, f, message):
    bad = change(packed, field, f)
    with pytest.raises(ValueError, match=message):
        kernels.unpack(bad)
    with pytest.raises(ValueError, match="^encoder/w: "):
        kernels.verify_packed(bad, "encoder/w")


def test_a_region_is_there_or_it_is_not(packed):
    groups = dict.fromkeys(validation.GROUPS)
    kernels.verify_packed(dataclasses.replace(packed, **groups))
    bad = change(packed, "nm_values", lambda _: None)
    with pytest.raises(ValueError, match="^w: nm_values is None; give all of nm_index"):
        kernels.verify_packed(bad, "w")
    bad = dataclasses.replace(packed, **groups, **dict.fromkeys(validation.DENSE))
    with pytest.raises(ValueError, match="neither dense nor N:M columns; keep one"):
        kernels.verify_packed(bad, "w")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dense_end", [9, 0], "0 <= dense_end <= nm_end <= 8"),
        ("nm_end", [8, 3], "4 must divide the N:M columns"),
        ("nm_end", [8, 12], "0 <= dense_end <= nm_end <= 8"),
        ("out_order", [0, 1, 2, 2], "out_order is not a permutation"),
        ("in_order", [[0, 1, 2, 3, 4, 5, 6, 6]] * 2, "in_order is not a permutation"),
        ("in_order", [list(range(8))] * 3, "in 3 tiles"),
        ("in_order", [list(range(4))] * 2, "orders of 4 rows and 4 columns"),
    ],
)
def test_packing_names_the_broken_promise(field, value, message):
    plan = ragged_plan()
    regions = change(plan.support.regions, field, lambda _: jnp.array(value, np.int32))
    support = dataclasses.replace(plan.support, regions=regions)
    with pytest.raises(ValueError, match=message):
        kernels.pack(dataclasses.replace(plan, support=support))


def test_positions_of_zero_groups_stay_legal():
    plan = plan_of(fh.NM(2, 4))
    zero = dataclasses.replace(plan, weight=jnp.zeros_like(plan.weight))
    kernels.verify_packed(kernels.pack(zero))
