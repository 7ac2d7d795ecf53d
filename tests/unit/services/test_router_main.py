"""Tests how a router process prepares for many connections."""

import resource

import pytest

from services.router.main import _allow_open_files


@pytest.fixture
def limits(monkeypatch):
    """Returns a function that sets the limits of open files, and the list of changes."""
    found, changes = {}, []

    def begin(soft, hard):
        found["limits"] = (soft, hard)
        return changes

    monkeypatch.setattr(resource, "getrlimit", lambda which: found["limits"])
    monkeypatch.setattr(resource, "setrlimit", lambda which, values: changes.append(values))
    return begin


def test_the_limit_of_open_files_is_raised_for_the_connections(limits, caplog):
    changes = limits(1024, 20_000)
    _allow_open_files(8_448)
    assert changes == [(8_448, 20_000)]
    assert not caplog.records


def test_a_limit_that_cannot_be_raised_is_said(limits, caplog):
    changes = limits(1024, 4096)
    _allow_open_files(8_448)
    assert changes == [(4096, 4096)]
    assert "may open 4096 files, but --max-connections may need 8448" in caplog.text


@pytest.mark.parametrize("soft", [10_000, resource.RLIM_INFINITY])
def test_a_larger_limit_is_left_alone(limits, soft):
    changes = limits(soft, soft)
    _allow_open_files(8_448)
    assert changes == []
