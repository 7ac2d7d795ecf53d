"""Tests how a process of a stack prepares for many connections."""

import resource

import pytest

from overfill.process import open_files


@pytest.mark.parametrize(
    ("limits", "changes", "says"),
    [
        ((1024, 20_000), [(8_448, 20_000)], ""),
        ((1024, 4096), [(4096, 4096)], "may open 4096 files, but 8192 connections may need 8448"),
        ((10_000, 10_000), [], ""),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), [], ""),
        ((1024, resource.RLIM_INFINITY), [(8_448, resource.RLIM_INFINITY)], ""),
    ],
    ids=["raised", "too low", "larger", "without limit", "without hard limit"],
)
def test_the_limit_of_open_files_is_raised_for_the_connections(limits, changes, says, monkeypatch, caplog):
    found = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, values: found.append(values))
    open_files.allow_connections(8_192, ", or lower --max-connections")
    assert found == changes
    assert says in caplog.text
    assert caplog.text.endswith(", or lower --max-connections\n") == bool(says)
