"""Tests the measured start-up time of a process, which excludes work that only the first start does."""

import pytest

from overfill.process import startup


def test_work_that_the_next_start_does_not_repeat_is_left_out(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(startup.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(startup, "_began", 100.0)
    clock[0] += 5
    with pytest.raises(OSError, match="no such pair"), startup.once():
        clock[0] += 240
        raise OSError("no such pair")
    clock[0] += 2
    assert startup.seconds() == 7
