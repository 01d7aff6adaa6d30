import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexhinm_jax.io import fingerprint


@dataclasses.dataclass(frozen=True)
class Method:
    damp: float = 0.01


def test_a_digest_sees_values_shapes_dtypes_structure_and_what_is_no_array():
    x = np.arange(6, dtype=np.float32)
    bumped = x.copy()
    bumped[5] = np.nextafter(bumped[5], 9)
    trees = [
        {"a": x},
        {"b": x},
        {"a": bumped},
        {"a": x.reshape(2, 3)},
        {"a": x.view(np.int32)},
        {"a": x, "b": None},
        {"a": x, "b": "text"},
        {"a": jnp.asarray(x, jnp.bfloat16)},
        {"a": jax.random.key(0)},
        {"a": jax.random.key(1)},
    ]
    digests = [fingerprint.digest(tree) for tree in trees]
    assert len(set(digests)) == len(trees)
    assert digests == [fingerprint.digest(tree) for tree in trees]
    assert fingerprint.digest({"a": jnp.asarray(x)}) == digests[0]
    turned = np.asfortranarray(x.reshape(2, 3))
    assert fingerprint.digest({"a": turned}) == digests[3]


def test_a_typed_and_a_raw_key_have_the_same_words():
    raw = jax.random.PRNGKey(7)
    assert fingerprint.key_words(jax.random.key(7)) == fingerprint.key_words(raw)
    assert fingerprint.key_words(raw) == [0, 7]


def test_records_differ_by_name():
    parts = {"method": Method(), "x": jnp.ones(3, jnp.float32), "target": "seq"}
    parts["key"] = jax.random.key(3)
    saved = fingerprint.record(**parts)
    assert saved["target"] == "seq" and saved["method"] == "Method(damp=0.01)"
    assert saved["key"] == "[0, 3]"
    fingerprint.check(saved, fingerprint.record(**parts), "folder")
    for name, value in (
        ("method", Method(0.1)),
        ("x", jnp.zeros(3, jnp.float32)),
        ("target", "asym"),
        ("key", jax.random.key(4)),
    ):
        now = fingerprint.record(**{**parts, name: value})
        with pytest.raises(ValueError, match=f"folder was begun with {name}="):
            fingerprint.check(saved, now, "folder")
    now = fingerprint.record(**{**parts, "target": "asym", "x": 1})
    with pytest.raises(fingerprint.Differs, match="target=seq.*x=.*remove") as error:
        fingerprint.check(saved, now, "folder")
    assert error.value.parts == {"target": ("seq", "asym"), "x": (saved["x"], "1")}


def test_a_record_of_another_version_is_refused_by_name():
    now = fingerprint.record(target="seq")
    for before, shown in (({"target": "seq"}, "1"), (now | {"fingerprint": "9"}, "9")):
        with pytest.raises(ValueError, match=f"fingerprints of version {shown}"):
            fingerprint.check(before, now, "folder")
