import pytest

from flexhinm_jax.io import records


def test_an_object_comes_back_and_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "new" / "a.json"
    for value in ({"a": [1, None, "ü"]}, {"b": {"c": 0.5}}):
        records.write(path, value)
        assert records.read(path) == value
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "a.json is not valid JSON"),
        (b'{"a": ', "a.json is not valid JSON"),
        (b"\xff\xfe\x00", "a.json is not valid JSON"),
        (b"[" * 100_000, "a.json is not valid JSON: nested too deeply"),
        (b'{"a":' * 100_000, "a.json is not valid JSON: nested too deeply"),
        (b"null", "a.json holds a NoneType, not a JSON object"),
        (b"[{}]", "a.json holds a list, not a JSON object"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        records.read(tmp_path / "a.json")
