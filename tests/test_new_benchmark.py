"""A new benchmark is the one file that docs/benchmarks.md shows."""

import importlib
import json
import re
import sys
from pathlib import Path

import bench
from bench import report, run

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def test_the_file_of_the_page_is_found_run_and_shown(tmp_path, monkeypatch, capsys):
    title, code = re.search(
        r'^```python title="(.+?)"\n(.*?)^```', PAGE.read_text(), re.M | re.S
    ).groups()
    file = tmp_path / title
    file.parent.mkdir()
    file.write_text(code)
    monkeypatch.setattr(report, "BENCH", file.parent)
    assert run.benchmarks() == ["kept"] and run.reason_to_skip("kept", False) is None
    monkeypatch.setattr(bench, "__path__", [*bench.__path__, str(file.parent)])
    kept = importlib.import_module("bench.kept")
    monkeypatch.undo()
    out = tmp_path / "kept.json"
    monkeypatch.setattr(sys, "argv", ["kept", "--size", "8", "--out", str(out)])
    parser = kept.STUDY.parser(kept.__doc__)
    parser.add_argument("--size", type=int)
    kept.STUDY.main(parser)
    shown = report.render({"kept": json.loads(out.read_text())}, {})
    assert "## Patterns on noise" in shown and "make bench-kept ARGS=" in shown
    assert f"### {kept.TABLE}" in capsys.readouterr().out
