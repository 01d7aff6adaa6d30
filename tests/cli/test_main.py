import subprocess
import sys

import pytest

import flexhinm_jax
from flexhinm_jax.cli.console import bytes_text
from flexhinm_jax.cli.main import main


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
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (90868376, "90.9 MB")],
)
def test_bytes_are_shown_in_decimal_units(count, text):
    assert bytes_text(count) == text
