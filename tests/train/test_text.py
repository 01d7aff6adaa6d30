import os
import re
import subprocess
import sys

import pytest

from train import corpus


def test_both_splits_are_large_enough():
    assert len(corpus.sentences("calibration")) >= 1000
    assert len(corpus.sentences("evaluation")) >= 500


def test_no_sentence_is_in_both_splits_or_twice_in_one():
    calibration = [s.lower() for s in corpus.sentences("calibration")]
    evaluation = [s.lower() for s in corpus.sentences("evaluation")]
    assert len(set(calibration)) == len(calibration)
    assert len(set(evaluation)) == len(evaluation)
    assert not set(calibration) & set(evaluation)


def test_a_document_goes_to_one_split_and_repeats_count_once(monkeypatch):
    texts = {f"d{k}": f"The sentence number {k} is in one file." for k in range(40)}
    shared = "This sentence is in every file of the library."
    monkeypatch.setattr(
        corpus, "documents", lambda: ((n, f"{t}  {shared}") for n, t in texts.items())
    )
    found = corpus._by_split.__wrapped__()
    for name, text in texts.items():
        assert [split for split in found if text in found[split]] == [
            corpus.split_of(name)
        ]
    assert sum(lines.count(shared) for lines in found.values()) == 1
    assert all(found.values())


def test_another_process_reads_the_same_sentences():
    code = "from train import corpus; print(corpus.digest())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.getcwd()},
    )
    assert other.stdout.strip() == corpus.digest()


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_sentences_are_plain_text_of_a_bounded_length(split):
    for sentence in corpus.sentences(split):
        assert re.match(r"[A-Z]", sentence) and sentence.endswith(".")
        assert corpus.MIN_WORDS <= len(sentence.split()) <= corpus.MAX_WORDS
        assert not re.search(r">>>|``|::|__|[\n<>={}\[\]|\\]", sentence), sentence


def test_a_limit_takes_sentences_from_the_whole_split():
    everything = corpus.sentences("evaluation")
    few = corpus.sentences("evaluation", limit=10)
    assert len(few) == 10
    positions = [everything.index(s) for s in few]
    assert positions == sorted(positions)
    assert positions[-1] > 0.8 * len(everything)
    assert corpus.sentences("evaluation", limit=10**9) == everything


def test_code_lists_tables_and_parameters_leave_no_sentence():
    text = """Return the first item of a list that is not empty.

>>> first([1, 2])  # This is the code of an example and not a sentence.
1

    This line is indented and so it may be the output of a program.

- This is an item of a list, and it is not running text.

name -- This is the meaning of a parameter that has a name.

:param x: This is the meaning of a parameter of the function.

The *second* paragraph has ``markup`` in it, and a `link <http://a.b>`_ as well.  It
goes on, e.g. Here, over two lines.
"""
    assert list(corpus.split_sentences(text)) == [
        "Return the first item of a list that is not empty.",
        "The second paragraph has markup in it, and a link as well.",
        "It goes on, e.g. Here, over two lines.",
    ]


def test_an_unknown_split_and_a_limit_of_zero_are_errors():
    with pytest.raises(ValueError, match="'calibration' or 'evaluation'"):
        corpus.sentences("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit=0"):
        corpus.sentences("calibration", limit=0)
