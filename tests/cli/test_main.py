import errno
import io
import json
import logging
import math
import subprocess
import sys
import types

import jax
import pytest
import rich.console

import flexhinm_jax
from flexhinm_jax.cli import console, prune
from flexhinm_jax.cli.console import bytes_text
from flexhinm_jax.cli.main import keep_compiled, main, silence_log


@pytest.mark.parametrize("command", [[], ["inspect"], ["prune"]])
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out and "flexhinm " in out
    assert max(map(len, out.splitlines())) <= 88


def test_prune_help_names_every_method_and_pattern(capsys):
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    out = capsys.readouterr().out
    for name in flexhinm_jax.patterns.PATTERNS:
        assert f"\n  {name}" in out
    for name, method in flexhinm_jax.methods.METHODS.items():
        assert (f"\n  {name}\n" in out) == (method.needs != "gradients")


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"flexhinm {flexhinm_jax.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["sharpen"], ["inspect"], ["inspect", "a", "b"]])
def test_wrong_arguments_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("flexhinm: error: ") and err.count("\n") == 1
    assert "--help" in err


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["prune", "m", "--out", "o", "--sparsty", "0.5"], "--sparsity"),
        (["prune", "m", "--out", "o", "--patern=2:4"], "--pattern"),
        (["eval", "m", "--txt", "t", "--text", "t"], "--text"),
    ],
)
def test_a_mistyped_option_is_answered_with_the_nearest(argv, near, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    err = capsys.readouterr().err
    assert f"; did you mean '{near}'? (see flexhinm {argv[0]} --help)" in err


@pytest.mark.parametrize("seed", ["-1", "4294967296", "1" + "0" * 30, "x"])
def test_a_seed_that_a_key_cannot_hold_is_refused(seed, capsys):
    with pytest.raises(SystemExit):
        main(["prune", "m", "--out", "o", f"--seed={seed}"])
    assert f"argument --seed: {'invalid' if seed == 'x' else seed}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("written", [False, True])
def test_an_interrupted_run_says_what_is_there(
    model_dir, tmp_path, capsys, monkeypatch, written
):
    def stopped(args, console):
        if written:  # and compared with the dense model when it was stopped
            args.out.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "run", stopped)
    out = tmp_path / "out"
    assert main(["prune", str(model_dir), "--out", str(out)]) == 130
    told = "" if written else f"; {out} was not written"
    assert capsys.readouterr().err == f"flexhinm: interrupted{told}\n"


@pytest.mark.parametrize("place", [(), ("model/tokenizer.json",)])
def test_a_full_disk_is_told_by_the_output(
    model_dir, tmp_path, capsys, monkeypatch, place
):
    def full(args, console):
        raise OSError(errno.ENOSPC, "No space left on device", *place)

    monkeypatch.setattr(prune, "run", full)
    out = tmp_path / "out"
    assert main(["prune", str(model_dir), "--out", str(out)]) == 2
    told = f"{out} could not be written: No space left on device"
    assert capsys.readouterr().err == f"flexhinm: error: {told}\n"


def test_warnings_are_not_logged_as_well(caplog, monkeypatch):
    log = logging.getLogger("flexhinm_jax")
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])
    log.warning("once")
    silence_log()
    log.warning("twice")
    assert caplog.messages == ["once"]


def test_names_are_cut_in_the_middle_and_stay_on_their_line():
    names = [f"encoder.layer.*.attention.self.{x}.weight x6" for x in ("query", "key")]
    figures = ("50.00%", "0.0178", "3.4 MiB", "1.8 MiB", "86.64%")
    rows = [(name, "384x384", *figures, "") for name in names]
    heads = (
        "weight",
        "shape",
        ">zeros",
        ">error",
        ">dense",
        ">packed",
        ">retained",
        "",
    )
    shown = {}
    for width in (40, 80, 160):
        file = io.StringIO()
        made = console.table(heads, rows, ("all", *[""] * 7))
        rich.console.Console(file=file, width=width, highlight=False).print(made)
        shown[width] = file.getvalue().splitlines()
        assert len(shown[width]) == 4
    assert all(
        "…" in x and f".{y}.weight x6" in x
        for x, y in zip(shown[80][1:3], ("query", "key"), strict=True)
    )
    assert [line.split("  ")[0] for line in shown[160][1:3]] == names


def test_a_closed_pipe_is_no_error(model_dir):
    code = "import sys; from flexhinm_jax.cli.main import main; sys.exit(main())"
    run = subprocess.Popen(
        [sys.executable, "-c", code, "inspect", str(model_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdout and run.stderr
    run.stdout.close()
    err = run.stderr.read()
    run.stderr.close()
    assert run.wait() == 0
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (90868376, "86.7 MiB")],
)
def test_bytes_are_shown_in_the_units_that_memory_takes(count, text):
    assert bytes_text(count) == text


def test_a_long_step_writes_a_line_for_every_tenth_off_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(console, "SHORT_SECONDS", 0.0)
    shown = console.Console()
    with shown.step("solving", long=True) as tell:
        for done in range(1, 41):
            tell(done, 40)
    assert list(shown.track("abc", "reading", 3)) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0] == "solving"
    assert len(lines) == 1 + 10 + 3
    assert lines[1] == "solving: 4 of 40 (10 %), 0 s"
    assert lines[-1] == "reading: 3 of 3 (100 %), 0 s"
    quiet = console.Console(quiet=True)
    with quiet.step("solving", long=True) as tell:
        tell(1, 1)
    assert list(quiet.track("a", "reading", 1)) == ["a"]
    assert capsys.readouterr() == ("", "")


def test_a_document_is_json_for_any_reader(capsys):
    kept = {"inner": float("nan"), "all": [0.5, math.inf], "seed": 2**31}
    console.Console(json=True).result({"kept": kept})
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told == {"kept": {"inner": None, "all": [0.5, None], "seed": 2**31}}


def test_a_step_that_is_over_at_once_writes_nothing(capsys):
    with console.Console().step("packing") as tell:
        tell(1, 1)
    assert capsys.readouterr() == ("", "")


def test_the_command_keeps_compiled_programs_unless_told_where(monkeypatch, tmp_path):
    told = {}
    config = types.SimpleNamespace(update=told.__setitem__)
    monkeypatch.setattr(jax, "config", config)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config.jax_compilation_cache_dir = "elsewhere"
    keep_compiled()
    assert told == {}
    config.jax_compilation_cache_dir = None
    keep_compiled()
    assert told["jax_compilation_cache_dir"] == str(tmp_path / "flexhinm" / "xla")
