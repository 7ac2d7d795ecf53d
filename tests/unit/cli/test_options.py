"""Tests the options that commands share: an invalid one is wrong usage, and the message names its flag."""

from __future__ import annotations

from pathlib import Path

import pytest

from overfill.cli.main import main


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["generate", "Hi", "--top-p", "2"], "--top-p: must be"),
        (["simulate", "--policy", "bogus"], "'--policy'"),
        (["simulate", "--objective", "bogus=1"], "--objective: 'bogus=1' is not a limit"),
        (["simulate", "--profile", "bogus"], "--profile: must be one of cpu"),
        (["simulate", "--trace", "bogus.csv"], "--trace: bogus.csv cannot be read"),
        (["simulate", "--colocated", "1", "--profile", "h100-l4"], "--profile: colocated_kv_tokens: the profile"),
        (["bench", "serve", "--target", "foo"], "--target: 'foo' is not a target"),
        (["bench", "serve", "--objective", "bogus=1"], "--objective: 'bogus=1' is not a limit"),
        (["loadtest", "--target", "foo"], "--target: 'foo' has no port"),
        (["keys", "create", "no name"], "NAME: is 'no name'"),
        (["certs", "certs", "--name", "é"], "--name: 'é' is neither"),
    ],
)
def test_a_wrong_option_is_wrong_usage_and_named(
    argv: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert says in capsys.readouterr().err
