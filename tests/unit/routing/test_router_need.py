"""Tests of how many routers a router's load needs."""

from __future__ import annotations

import pytest

from overfill.routing.router_need import FULL, WINDOW, RouterNeed


def test_a_load_spread_over_more_routers_needs_as_many_as_before():
    whole, parts = RouterNeed(), [RouterNeed() for _ in range(3)]
    for second in range(5):
        one = whole.update(second, 1.5 * FULL * second)
        each = [part.update(second, 0.5 * FULL * second) for part in parts]
    assert one == pytest.approx(1.5)
    assert sum(each) == pytest.approx(1.5)


def test_load_counts_for_a_window_and_no_longer():
    need = RouterNeed()
    assert need.update(0.0, 7.0) == 0, "the time before the first reading is no load"
    assert need.update(1.0, 7.0 + FULL) == pytest.approx(1)
    seconds = int(WINDOW)
    needs = [need.update(1.0 + second, 7.0 + FULL) for second in range(1, 2 * seconds)]
    assert needs[seconds - 2] == pytest.approx(1 / WINDOW), "a burst counts by its share of the window"
    assert needs[seconds] == 0
