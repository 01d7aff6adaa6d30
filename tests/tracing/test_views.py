"""A view says where every element of a reshaped, sliced value comes from."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flexhinm_jax.tracing import views
from flexhinm_jax.types import AxisFactor, Layout

SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=1, max_size=4)


def factorisations(n: int) -> st.SearchStrategy[list[int]]:
    """Shapes with n elements."""

    def extend(shape: list[int]) -> st.SearchStrategy[list[int]]:
        rest = n // math.prod(shape)
        if rest == 1:
            return st.just(shape)
        divisors = [d for d in range(1, rest + 1) if rest % d == 0]
        return st.sampled_from(divisors).flatmap(lambda d: extend([*shape, d]))

    return st.integers(0, 1).flatmap(lambda k: extend([1] * k))


@st.composite
def moved(draw) -> tuple[tuple[int, ...], views.View, np.ndarray]:
    """(shape of a leaf, a view of it, the positions the view should show)."""
    shape = tuple(draw(SIZES))
    view, value = views.whole(shape), np.arange(math.prod(shape)).reshape(shape)
    for _ in range(draw(st.integers(0, 6))):
        name = draw(
            st.sampled_from(["transpose", "reshape", "slice", "broadcast", "rev"])
        )
        if name == "transpose":
            order = tuple(draw(st.permutations(range(value.ndim))))
            new, params = value.transpose(order), {"permutation": order}
        elif name == "reshape":
            target = tuple(draw(factorisations(value.size)))
            new, params = value.reshape(target), {"dimensions": None}
        elif name == "rev":
            axes = tuple(d for d in range(value.ndim) if draw(st.booleans()))
            new, params = np.flip(value, axes), {"dimensions": axes}
        elif name == "slice":
            low = [draw(st.integers(0, n - 1)) for n in value.shape]
            spans = zip(low, value.shape, strict=True)
            high = [draw(st.integers(a + 1, n)) for a, n in spans]
            cut = zip(low, high, strict=True)
            new = value[tuple(slice(a, b) for a, b in cut)]
            params = {"start_indices": low, "limit_indices": high, "strides": None}
        else:
            d = draw(st.integers(0, value.ndim))
            new = np.expand_dims(value, d)
            onto = [k for k in range(value.ndim + 1) if k != d]
            name, params = "broadcast_in_dim", {"broadcast_dimensions": onto}
        out = views.relayout(view, name, params, [new.shape])
        if out is not None:
            view, value = out[0], new
    return shape, view, value


def base(view: views.View, shape: tuple[int, ...]) -> int:
    """Flat position at which all indexed factors of a view are."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return sum(a.stride * strides[a.axis] * at for a, at in view.index)


@settings(max_examples=300, deadline=None)
@given(moved())
def test_a_view_gives_the_position_of_every_element(example):
    shape, view, value = example
    assert views.sizes(view.dims) == list(value.shape)
    got = views.positions(view, shape) + base(view, shape)
    np.testing.assert_array_equal(got, value)


@settings(max_examples=200, deadline=None)
@given(moved())
def test_every_position_of_the_leaf_belongs_to_one_atom_of_any_view(example):
    shape, view, _ = example
    atoms = views.flat(view.dims) + [atom for atom, _ in view.index]
    merged = views.factors(atoms)
    whole = tuple(AxisFactor(d, 1, n) for d, n in enumerate(shape) if n > 1)
    assert merged == whole


@st.composite
def layouts(draw) -> Layout:
    shape = tuple(draw(SIZES))
    parts: dict[str, list[AxisFactor]] = {"stack": [], "out": [], "inputs": []}
    for d, n in enumerate(shape):
        if n == 1:
            continue
        minor = draw(st.sampled_from([m for m in range(1, n) if n % m == 0]))
        pieces = [AxisFactor(d, minor, n // minor)]
        pieces += [AxisFactor(d, 1, minor)] * (minor > 1)
        for piece in pieces:
            parts[draw(st.sampled_from(sorted(parts)))].append(piece)
    groups = {k: tuple(sorted(v, key=views.leaf_order)) for k, v in parts.items()}
    return Layout(shape, **groups)


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_a_leaf_returns_exactly_from_its_matrix_form(layout):
    leaf = np.arange(math.prod(layout.shape)).reshape(layout.shape)
    matrix = views.matrix(leaf, layout)
    assert matrix.shape == (*layout.stack_shape, *layout.matrix_shape)
    np.testing.assert_array_equal(views.leaf(matrix, layout), leaf)


def test_a_border_through_an_atom_stops_the_view():
    view = views.whole((2, 3))
    assert views.regroup(view.dims, (3, 2)) is None
    assert views.regroup(view.dims, (6,)) is not None
    flat = view._replace(dims=views.regroup(view.dims, (6,)))
    assert views.window(flat, 0, 1, 2) is None
    assert views.window(flat, 0, 3, 3) is not None


def test_a_traced_position_needs_a_whole_factor():
    view, position = views.whole((4, 6)), object()
    taken = views.take(view, 0, position)
    assert taken.dims == ((), view.dims[1])
    assert taken.index == ((view.dims[0][0], position),)
    assert views.take(views.window(view, 0, 0, 2), 0, position) is None


def test_a_static_position_out_of_range_is_clamped_as_dynamic_slice_does():
    taken = views.take(views.whole((4, 6)), 0, 9)
    assert taken.index[0][1] == 3
