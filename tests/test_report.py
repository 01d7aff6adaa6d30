"""The page of measurements shows what the files hold, and nothing else."""

import json

import pytest

from bench import figures, report, run
from bench.tables import Row, Table, markdown

RESULTS = report.load()


def test_the_page_is_what_the_files_of_the_repository_give():
    want = report.render(RESULTS, figures.captions(report.RESULTS))
    assert want == report.PAGE.read_text(), "run: make bench-report"


@pytest.mark.parametrize("name", sorted(RESULTS.keys() & report.RENDERERS.keys()))
def test_every_known_file_has_the_form_that_its_renderer_expects(name):
    page = report.render({name: RESULTS[name]}, [])
    assert "another form than expected" not in page


def test_a_file_without_renderer_and_a_new_part_are_listed_by_name():
    page = report.render({"novel": {}, "armor": {"layers": [], "extra": 1}}, [])
    end = page.split("## Not shown")[1]
    assert "`novel.json`" in end and "`armor.json`: part `extra`" in end


def test_a_file_of_another_form_does_not_break_the_page():
    page = report.render({"minilm": {"rows": [{"name": "x"}]}}, [])
    assert "another form than expected" in page


def test_what_a_file_does_not_hold_was_not_measured():
    page = report.render({}, [])
    assert page.count("Not measured: no `") == len(report.RENDERERS)
    table = Table("t", "n", [Row("speed", None, 2.0, None, "make it")])
    assert "| speed | not measured | 2 |  | `make it` |" in markdown(table)


def test_times_of_a_gpu_are_shown_beside_the_roofline():
    times = [{"size": "2:4", "n": 1, "dense": 2e-6, "floor": 1e-6, "expand": 4e-6}]
    page = report.render({"gpu": {"times": times}}, [])
    assert "| 2:4, 1 tokens, expand | 4 | 2 | 2 | 0.5 | 0.25 |" in page


def test_all_benchmarks_are_found_and_those_without_a_device_skipped(monkeypatch):
    names = run.benchmarks()
    assert {"minilm", "gpu", "training"} <= set(names) and "report" not in names
    monkeypatch.setattr(run, "has_gpu", lambda: False)
    assert run.reason_to_skip("gpu", False) == "needs an NVIDIA GPU"
    assert run.reason_to_skip("minilm", False) is None
    assert run.reason_to_skip("minilm", True) == "has no short form"


def test_the_files_of_results_are_json():
    for path in report.RESULTS.glob("*.json"):
        json.loads(path.read_text())
