"""Tests the program itself: which modules it imports, and how it prints errors and exits."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest

from overfill import errors
from overfill.cli import main as cli_main
from overfill.cli.main import COMMANDS, cli, main


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda self, ctx, name: failing)


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["chat", "--help"], ["status", "--help"]])
def test_client_commands_load_no_torch(argv: list[str]) -> None:
    code = (
        "import sys; from overfill.cli.main import main\n"
        f"code = main({argv!r})\n"
        "heavy = {'torch', 'transformers', 'ray', 'grpc'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: overfill" in done.stdout


def test_help_groups_the_commands_under_headings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [
        line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith((" ", "Options"))
    ]
    assert headings == ["Run a stack", "Ask", "Operate", "Make pairs", "Measure and break"]
    names = [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in COMMANDS]
    assert names[:2] == ["demo", "up"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_of_a_command_is_that_of_its_own_help(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.get_short_help_str(limit=200) == COMMANDS[name][1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("overfill, version ")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errors.InvalidRequest("sampling.top_p", "must be\nin (0, 1]"), "sampling.top_p: must be in (0, 1]"),
        (errors.Unreachable("127.0.0.1:7600: nothing listens there"), "overfill up"),
        (errors.Unavailable("no prefill worker has been here for 12 s"), "overfill status"),
        (errors.Overloaded("the queue is full", retry_after=3.0), "try again in 3 s"),
        (errors.InvalidPair("pair.json: no such file"), "pair.json"),
    ],
)
def test_an_error_is_one_line_and_exit_1(
    error: errors.OverfillError, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, error)
    assert main(["anything"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_notes_follow_on_their_own_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.OverfillError("decode-0 died")
    error.add_note("  decode-0 | out of memory")
    fail_with(monkeypatch, error)
    assert main(["anything"]) == 1
    assert capsys.readouterr().err == "overfill: decode-0 died\n  decode-0 | out of memory\n"


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["anything"]) == 130


def test_bad_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-command"]) == 2
    assert main(["generate"]) == 2
    assert "PROMPT" in capsys.readouterr().err


def test_a_mistyped_name_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, says in (
        (["helth"], "did you mean health?"),
        (["nothing-like-it"], "`overfill --help` lists all commands"),
        (["pair", "shwo"], "Did you mean 'show'?"),
        (["status", "--adress=x"], "Did you mean '--address'?"),
        (["pair", "show", "defualt"], "did you mean default?"),
    ):
        assert main(argv) in (1, 2)
        assert says in capsys.readouterr().err


def test_a_commands_exit_code_is_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cli_main.LazyGroup, "get_command", lambda self, ctx, name: click.Command("x", callback=lambda: 1)
    )
    assert main(["x"]) == 1


def test_a_closed_pipe_gives_no_traceback() -> None:
    code = (
        "import sys, click; from overfill.cli import main as m\n"
        "many = click.Command('x', callback=lambda: [print('line') for _ in range(100000)] and None)\n"
        "m.LazyGroup.get_command = lambda *a: many\n"
        "sys.exit(m.main(['x']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
@pytest.mark.parametrize("argv", [["--help"], ["config", "show"]])
def test_a_full_stdout_is_one_line_and_exit_1(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "overfill.cli.main", *argv],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "overfill: cannot write: No space left on device\n")


def test_a_closed_stdout_is_no_error() -> None:
    command = f"'{sys.executable}' -m overfill.cli.main config show >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_command_is_not_imported() -> None:
    assert cli.get_command(click.Context(cli), "../main") is None
