"""Every ValueError about what kind of thing a caller handed over.

`checks` looks at shapes and values; here a string instead of a method, an integer
instead of a PRNG key, or plans instead of states is refused by name at the door, before
it fails deep inside as an AttributeError.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flexhinm_jax.types import PackedWeight, Uses

#: What a message tells a caller to give, in the words of Python. Another door to the
#: library, such as the command line, brings words of its own, under the same names.
WORDS = {
    "allocate": "allocate",
    "batch": "a smaller batch",
    "block": "block={!r}",
    "continue": "resume=True",
    "describe": "print(describe(uses))",
    "exceptions": "exceptions",
    "length": "a shorter length",
    "memory": "memory_limit={}",
    "no sparsity": "leave sparsity=None",
    "older": 'resume="older" continues from {}',
    "overwrite": "overwrite=True",
    "owl blocks": "name the blocks with OWL(block=...), or allocate by 'uniform'",
    "restart": 'resume=False, or "auto" to begin where there is none',
    "samples": "fewer samples",
    "share orders": "share_orders",
    "steps": "fewer steps",
    "skip": 'rules={{"<regex>": "skip"}}',
    "some sparsity": "sparsity=",
    "sparsity": "sparsity={}",
    "target": "target 'seq', or the dtype of the checkpoint",
    "temperature": "temperature={}",
    "top k": "top_k={}",
    "window": "window={!r}",
}

_spoken: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar(
    "words", default=WORDS
)


def say(name: str, *values: Any) -> str:
    """How the one who called writes an argument, for a message.

    Args:
      name: of `WORDS`.
      *values: for the places in it.

    Returns:
      The text, in the words of the door through which the caller came.

    Example:
      >>> say("sparsity", 0.5)
      'sparsity=0.5'
    """
    return _spoken.get()[name].format(*values)


@contextlib.contextmanager
def speaking(words: Mapping[str, str]) -> Iterator[None]:
    """Messages inside the block use these words; as many as `WORDS` has."""
    token = _spoken.set(words)
    try:
        yield
    finally:
        _spoken.reset(token)


@contextlib.contextmanager
def extra(name: str, need: str) -> Iterator[None]:
    """Says how to install a package whose import inside the block fails.

    Args:
      name: the extra of this library that brings the package.
      need: what needs which package.

    Raises:
      ImportError: the package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{need}: pip install "flexhinm_jax[{name}]"') from error


def shown(value: Any) -> str:
    """A value in a few words, for a message."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    if isinstance(value, list | tuple | dict) and not value:
        return repr(value)
    if isinstance(value, tuple) and len(value) < 5:
        return f"({', '.join(shown(x) for x in value)}{',' * (len(value) == 1)})"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def some(names: Sequence[str], limit: int = 5) -> str:
    """'none', or the first names and how many more there are."""
    few = ", ".join(names[:limit]) or "none"
    return few + (f" and {len(names) - limit} more" if len(names) > limit else "")


def key(value: Any, name: str = "key") -> None:
    """Raises ValueError unless the value is one PRNG key, typed or raw."""
    if isinstance(value, jax.Array | np.ndarray):
        typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        if value.shape == () if typed else value.dtype == np.uint32 and value.ndim == 1:
            return
        if typed:
            raise ValueError(
                f"{name} holds {value.size} keys: pass one of them, such as {name}[0]"
            )
    raise ValueError(
        f"{name}={shown(value)}: need a PRNG key, such as jax.random.key(0)"
    )


def function(value: Any, name: str, form: str) -> None:
    """Raises ValueError unless the value can be called.

    Args:
      value: what was given.
      name: of the argument.
      form: how it is called, such as "apply_fn(params, *batch)".
    """
    if not callable(value) or isinstance(value, type):
        raise ValueError(
            f"{name} is {shown(value)}: need a function, called as {form}; look at the "
            "order of the arguments"
        )


#: The home and name of a base class -> what to write in place of one of its instances.
MODULES = {
    (
        "flax.linen",
        "Module",
    ): "pass model.apply as apply_fn and variables = model.init(key, x) as params",
    (
        "flax.nnx",
        "Module",
    ): "write graph, params = nnx.split(model, nnx.Param) and give params and "
    "apply_fn = lambda params, x: nnx.merge(graph, params)(x)",
    ("equinox", "Module"): "write params, static = eqx.partition(model, eqx.is_array) "
    "and give params and apply_fn = lambda params, x: jax.vmap(eqx.combine(params, "
    "static))(x)",
    (
        "keras",
        "Layer",
    ): "give params = [v.value for v in model.trainable_variables] and "
    "apply_fn = lambda params, x: model.stateless_call(params, others, x)[0], others "
    "being the values of model.non_trainable_variables",
}


def _home(value: Any) -> tuple[str, str] | None:
    """The base of `MODULES` that the class of a value has; imports none of them."""
    for cls in type(value).__mro__:
        for home, name in MODULES:
            if cls.__name__ == name and f"{cls.__module__}.".startswith(f"{home}."):
                return home, name
    return None


def apply_function(value: Any) -> None:
    """Raises ValueError unless the value can be called as apply_fn(params, *batch).

    A module computes with the arrays that it holds, not with `params`: it is refused,
    with what to write in its place. A module that is a tree without an array, such as
    what `eqx.filter_jit` makes of a function, is a function like any other.
    """
    home = _home(value)
    inside = jax.tree.leaves(value)
    if home is not None and any(x is value or hasattr(x, "shape") for x in inside):
        raise ValueError(
            f"apply_fn is {shown(value)}, a module of {home[0]}, and no function of "
            f"params: {MODULES[home]}"
        )
    function(value, "apply_fn", "apply_fn(params, *batch)")


@contextlib.contextmanager
def calling(form: str, arguments: Any) -> Iterator[None]:
    """Adds a note about the arguments to an error of a function that the user wrote."""
    shapes = ", ".join(shown(x) for x in arguments) or "nothing"
    note = f"raised by {form} with batch: {shapes}"
    with noting(f"{note}\n(a batch is the tuple of the arguments after params)"):
        yield


@contextlib.contextmanager
def noting(note: str) -> Iterator[None]:
    """Adds a note, once, to an error of something that the user gave."""
    try:
        yield
    except Exception as error:
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def parameters(params: Any) -> None:
    """Raises ValueError for a tree that is empty, or that holds no array."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, PackedWeight))
    if not leaves:
        raise ValueError(
            f"params={shown(params)} has no leaves: pass the tree of the model's arrays"
        )
    if not any(hasattr(x, "shape") or isinstance(x, PackedWeight) for x in leaves):
        home = _home(leaves[0])
        if home is not None:
            raise ValueError(
                f"params is {shown(leaves[0])}, a module of {home[0]}, and no tree of "
                f"arrays: {MODULES[home]}"
            )
        raise ValueError(
            f"params holds {len(leaves)} leaves and no array; the first is "
            f"{shown(leaves[0])}: convert them with jnp.asarray"
        )


def concrete(params: Any, *, traceable: bool = False) -> None:
    """Raises ValueError for a tree with shapes, or traced values, in place of arrays.

    Args:
      params: the parameters.
      traceable: whether traced values will do.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
        raise ValueError(
            "params holds jax.ShapeDtypeStructs, which have no values; load the "
            "parameters first"
        )
    if not traceable:
        untraced(params, "params")


def untraced(tree: Any, name: str) -> None:
    """Raises ValueError for a tree that a transformation of JAX traces."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(tree)):
        raise ValueError(
            f"{name} holds traced arrays, and pruning reads values: call it outside of "
            "jax.jit, jax.vmap and jax.grad. Models that are stacked are pruned by one "
            "call with a vmapped function: apply_fn = jax.vmap(one, in_axes=(0, None))"
        )


def found(value: Any) -> None:
    """Raises ValueError unless the value is what `discover` returns."""
    if not isinstance(value, Uses):
        raise ValueError(
            f"uses is {shown(value)}: need what discover(apply_fn, params, *batch) "
            "returned; look at the order of the arguments"
        )


def by_path(
    values: Any,
    kind: type,
    name: str,
    source: str,
    leaves: Collection[str] | None = None,
) -> None:
    """Raises ValueError unless `values` maps leaf paths to values of one kind.

    Args:
      values: what was given.
      kind: `State`, `Plan` or `Stats`.
      name: of the argument.
      source: the call that returns such a mapping, such as "solve()".
      leaves: the prunable leaves, if others are an error.
    """
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{name} is {shown(values)}: need {{leaf path: {kind.__name__}}}, as "
            f"{source} returns it"
        )
    for path, value in values.items():
        if not isinstance(value, kind):
            raise ValueError(
                f"{name}[{path!r}] is {shown(value)}, not a {kind.__name__}; pass what "
                f"{source} returned"
            )
        if leaves is not None and path not in leaves:
            raise ValueError(
                f"{path}: in {name} but not in uses; {nearest(path, leaves)}"
            )


def nearest(path: Any, leaves: Iterable[str]) -> str:
    """Which leaves a mistaken path may mean."""
    near = difflib.get_close_matches(str(path), list(leaves), n=3, cutoff=0.0)
    if not near:
        return "no leaf is prunable"
    return f"the nearest prunable leaves are {', '.join(near)}"


def similar(name: str, known: Iterable[str]) -> str:
    """The known name that a mistaken one is like, for the end of a message.

    Example:
      >>> similar("sparse-gpt", ["wanda", "sparsegpt"])
      "; did you mean 'sparsegpt'?"
      >>> similar("oracle", ["wanda", "sparsegpt"])
      ''
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def batches(value: Any) -> None:
    """Raises ValueError for one batch in place of an iterable of batches."""
    one = hasattr(value, "shape") or isinstance(value, Mapping | str | bytes)
    if one or not isinstance(value, Iterable):
        raise ValueError(
            f"batches is {shown(value)}: need an iterable of batches, each a tuple of "
            "the arguments after params, such as [(x,)]"
        )


def listed(value: Any) -> list[tuple[Any, ...]]:
    """All batches as tuples; one that is no tuple is a single argument.

    Raises:
      ValueError: one batch in place of an iterable of batches, or none at all.
    """
    batches(value)
    every = [one if isinstance(one, tuple) else (one,) for one in value]
    if not every:
        raise ValueError("batches is empty: give at least one batch to run")
    return every


def batch(value: Any, name: str) -> None:
    """Raises ValueError unless a batch is a tuple (or list) of arguments."""
    if not isinstance(value, tuple | list):
        raise ValueError(
            f"{name} is {shown(value)}: need a tuple of the arguments after params, "
            "such as (x,)"
        )


def optimiser(value: Any, name: str) -> None:
    """Raises ValueError unless the value is an optax optimiser."""
    if not callable(getattr(value, "init", None)):
        raise ValueError(
            f"{name}={shown(value)}: need an optax optimiser, such as optax.adam(1e-3)"
        )


def count(value: Any, name: str, least: int) -> None:
    """Raises ValueError unless the value is an integer of at least `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < least:
        raise ValueError(f"{name}={value!r}: need an integer of at least {least}")


def positive(value: Any, name: str) -> None:
    """Raises ValueError unless the value is a number above 0, and finite."""
    if not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}={value!r}: need a positive number")


def same_tree(params: Any, dense: Any) -> None:
    """Raises ValueError unless both are trees of one structure."""
    if jax.tree.structure(params) != jax.tree.structure(dense):
        raise ValueError(
            "params and dense are trees of different structure; give the parameters"
            " after and before pruning"
        )


def options(value: Mapping[str, Any], known: Collection[str], caller: str) -> None:
    """Raises TypeError for a keyword that a function does not have."""
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
            raise TypeError(
                f"{caller}() has no option {name!r}; did you mean {near[0]!r}?"
            )


def keywords(*functions: Callable[..., Any]) -> list[str]:
    """The names of the keyword-only parameters of functions, for `options`."""
    parameters = [
        p for f in functions for p in inspect.signature(f).parameters.values()
    ]
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def configuration(config: Any) -> None:
    """Raises ValueError when a field of a configuration is not of its declared type.

    Looks at booleans, integers, floats and tuples, and at unions with None; a method or
    a pattern checks the other fields itself.

    Args:
      config: a frozen dataclass.
    """
    for name, hint in _hints(type(config)).items():
        if not hasattr(config, name):
            continue
        value = getattr(config, name)
        if not any(_is(value, one) for one in hint):
            wanted = " or ".join(dict.fromkeys(_NAMES[one] for one in hint))
            raise ValueError(
                f"{type(config).__name__}: {name}={value!r}: need {wanted}"
            )


_NAMES = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    tuple: "a tuple",
    type(None): "None",
}


def _is(value: Any, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if isinstance(value, bool | np.bool_):
        return False
    if kind is int:
        return isinstance(value, numbers.Integral)
    if kind is float:
        return isinstance(value, numbers.Real) and not np.isnan(float(value))
    return isinstance(value, kind)


@functools.cache
def _hints(cls: type) -> dict[str, tuple[type, ...]]:
    """Field -> the types it may have, of the fields that `configuration` looks at."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # names that only a type checker knows
        return {}
    known = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        parts = typing.get_args(hint) if union else (hint,)
        kinds = tuple(typing.get_origin(part) or part for part in parts)
        if all(kind in _NAMES for kind in kinds):
            known[field.name] = kinds
    return known
