import itertools
import os
import re
import subprocess
import sys

import pytest

from train.lab import text


def test_both_splits_are_large_enough():
    assert len(text.sentences("calibration")) >= 1000
    assert len(text.sentences("evaluation")) >= 500


def test_no_sentence_is_in_both_splits_or_twice_in_one():
    calibration = [s.lower() for s in text.sentences("calibration")]
    evaluation = [s.lower() for s in text.sentences("evaluation")]
    assert len(set(calibration)) == len(calibration)
    assert len(set(evaluation)) == len(evaluation)
    assert not set(calibration) & set(evaluation)


def test_a_document_goes_to_one_split_and_repeats_count_once(monkeypatch):
    pages = {f"d{k}": f"The sentence number {k} is in one file." for k in range(40)}
    shared = "This sentence is in every file of the library."
    monkeypatch.setattr(
        text, "documents", lambda: ((n, f"{t}  {shared}") for n, t in pages.items())
    )
    found: dict = text._by_split.__wrapped__()
    for name, page in pages.items():
        assert [split for split in found if page in found[split]] == [
            text.split_of(name)
        ]
    assert sum(lines.count(shared) for lines in found.values()) == 1
    assert all(found.values())


SOME = """
from itertools import islice
from train.lab import text
whole = text.documents
text.documents = lambda: islice(whole(), {count})
print(text.digest())
"""


@pytest.mark.parametrize("count", [20, pytest.param(None, marks=pytest.mark.slow)])
def test_another_process_reads_the_same_sentences(monkeypatch, count):
    whole = text.documents
    monkeypatch.setattr(text, "documents", lambda: itertools.islice(whole(), count))
    monkeypatch.setattr(text, "_by_split", text._by_split.__wrapped__)
    code = SOME.format(count=count)
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.getcwd()},
    )
    assert other.stdout.strip() == text.digest()


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_sentences_are_plain_text_of_a_bounded_length(split):
    for sentence in text.sentences(split):
        assert re.match(r"[A-Z]", sentence) and sentence.endswith(".")
        assert text.MIN_WORDS <= len(sentence.split()) <= text.MAX_WORDS
        assert not re.search(r">>>|``|::|__|[\n<>={}\[\]|\\]", sentence), sentence


def test_a_limit_takes_sentences_from_the_whole_split():
    everything = text.sentences("evaluation")
    few = text.sentences("evaluation", limit=10)
    assert len(few) == 10
    positions = [everything.index(s) for s in few]
    assert positions == sorted(positions)
    assert positions[-1] > 0.8 * len(everything)
    assert text.sentences("evaluation", limit=10**9) == everything


def test_code_lists_tables_and_parameters_leave_no_sentence():
    page = """Return the first item of a list that is not empty.

>>> first([1, 2])  # This is the code of an example and not a sentence.
1

    This line is indented and so it may be the output of a program.

- This is an item of a list, and it is not running text.

name -- This is the meaning of a parameter that has a name.

:param x: This is the meaning of a parameter of the function.

The *second* paragraph has ``markup`` in it, and a `link <http://a.b>`_ as well.  It
goes on, e.g. Here, over two lines.
"""
    assert list(text.split_sentences(page)) == [
        "Return the first item of a list that is not empty.",
        "The second paragraph has markup in it, and a link as well.",
        "It goes on, e.g. Here, over two lines.",
    ]


def test_an_unknown_split_and_a_limit_of_zero_are_errors():
    with pytest.raises(ValueError, match="'calibration' or 'evaluation'"):
        text.sentences("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit=0"):
        text.sentences("calibration", limit=0)


def test_training_text_shares_nothing_with_the_evaluation(tmp_path, monkeypatch):
    held_out = {s.lower() for s in text.sentences("evaluation")}
    known = text.sentences("calibration")
    root = tmp_path / "site"
    (root / "package").mkdir(parents=True)
    leak = text.sentences("evaluation")[0]
    fresh = "The quick fox is on the roof of the house."
    (root / "package" / "leaky.py").write_text(f'"""{leak}\n\n{fresh}"""\n')
    clean = "The slow fox is under the roof of the barn."
    (root / "package" / "clean.py").write_text(f'"""{clean}"""\n')
    monkeypatch.setattr(text.sysconfig, "get_path", lambda _: str(root))
    found = text.training()
    assert found == [*known, clean]
    assert held_out.isdisjoint(s.lower() for s in found)
    assert text.training(10) == known[:10]
    path = tmp_path / "text.txt"
    path.write_text(f"{fresh}\n{leak.upper()}\n{fresh}\n")
    assert text.from_files([path]) == [fresh]
