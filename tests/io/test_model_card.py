"""The model card: what the card before says, and what it was made from."""

import json

import pytest
import yaml

from flexhinm_jax.io import model_card, sources

CARD = "README.md"


def written(source, folder, **told):
    """The header and the body of the card of a model."""
    folder.mkdir()
    model_card.write(folder, model_card.texts(source, told))
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("models/tiny", None),
        ("hub/models--owner--tiny/snapshots/0123", "owner/tiny"),
    ],
)
def test_only_a_model_of_the_hub_is_linked(tmp_path, monkeypatch, place, name):
    (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    header, body = written(sources.find(f"{place}/"), tmp_path / "out")
    assert header.get("base_model") == name
    assert "# tiny, pruned" in body and f"| base model | {name or 'tiny'} |" in body


def test_figures_call_a_model_of_the_hub_by_its_name():
    row = {"zeros": 0.5, "perplexity": 2.0, "bits_per_byte": 1.0, "length": 8}
    row |= {"tokens": 9}
    models = [row | {"model": f"models--owner--tiny/snapshots/{'0' * 40}"}]
    figures = {"kind": "decoder", "text": "wiki.txt", "models": models}
    text = model_card.card({}, evaluation=figures)
    assert "| owner/tiny | 50.0% | 2.0000 | 1.0000 |" in text


def test_the_name_of_a_folder_does_not_depend_on_where_it_is_called_from(
    tmp_path, monkeypatch
):
    (tmp_path / "tiny" / "inner").mkdir(parents=True)
    for place, path in (("tiny", "."), ("tiny/inner", ".."), (".", "tiny/")):
        monkeypatch.chdir(tmp_path / place)
        assert sources.short(sources.find(path)) == "tiny"


@pytest.mark.parametrize(
    ("before", "header"),
    [
        (b"---\nlicense: mit\nlanguage: no\n---\nf\xfcr\n", ("mit", "no")),
        (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n", ("mit", None)),
        (b"---\nlicense: f\xfcr\nlanguage: [da, no]\n---\n", ("f?r", ["da", "no"])),
        (b"---\nlicense: null\nlanguage:\n---\n", (None, None)),
        (b"---\ndate: 2024-13-45\nlicense: mit\n---\n", ("mit", None)),
        (b'---\nlicense: "\\UFFFFFFFF"\n---\n', (None, None)),
        (b"---\nlicense: mit\n", (None, None)),
        (b"\xff\xfe\x00\x01", (None, None)),
    ],
)
def test_any_card_before_is_kept_and_its_licence_holds(tmp_path, before, header):
    source = tmp_path / "source"
    source.mkdir()
    (source / CARD).write_bytes(before)
    found, _ = written(source, tmp_path / "out")
    assert (found.get("license"), found.get("language")) == header
    assert (tmp_path / "out" / model_card.BASE_CARD).read_bytes() == before


def test_names_that_are_no_utf_8_are_written_as_they_are(tmp_path):
    (tmp_path / "source").mkdir()
    named = {"calibration": "caf\udce9.txt"}
    written(tmp_path / "source", tmp_path / "out", **named)
    assert b"| calibration | caf\xe9.txt |" in (tmp_path / "out" / CARD).read_bytes()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == named


def test_a_card_says_what_became_of_leaves_that_were_not_pruned():
    told = {"skipped": {"norm": "a vector", "table": "an embedding"}}
    for more, wanted in (
        ({}, "; 2 other leaves were not pruned ("),
        ({"moved": []}, "; 2 other leaves are as they were ("),
        ({"moved": ["norm"]}, "; 1 of 2 other leaves have new values, such as `norm`:"),
        ({"moved": [], "tuned": {"steps": 1}}, "but biases and norms among them were"),
    ):
        assert wanted in model_card.card(told | more)


def test_a_card_says_where_the_zeros_of_weights_with_factors_are():
    row = {"product_zeros": 0.0}
    told = {"total": {"zeros": 0.5, "dense_zeros": 0.0}, "weights": [row] * 3}
    card = model_card.card(told)
    assert "50.0% of the cores of 3 weight matrices are zero, in packed form" in card
    assert "multiplied out" in card and "there 0.0% is zero" in card


def test_a_card_gives_all_commands_in_their_order():
    card = model_card.card({"commands": ["flexhinm prune", "flexhinm tune"]})
    assert "```\nflexhinm prune\nflexhinm tune\n```" in card
