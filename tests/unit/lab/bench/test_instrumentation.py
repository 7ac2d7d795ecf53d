"""`overfill bench instrumentation` on a tiny pair; the figures themselves mean nothing here."""

from __future__ import annotations

import json

from click.testing import CliRunner

from overfill.lab.bench import instrumentation
from overfill.lab.bench.instrumentation import interval
from overfill.lab.commands.bench import bench_group


def run(*arguments):
    return CliRunner().invoke(bench_group, ["instrumentation", *arguments], standalone_mode=False)


def test_figures_and_exit_code(tiny_pair, monkeypatch):
    arguments = (f"--pair={tiny_pair}", "--batch=3", "--context=8", "--rounds=4", "--steps=2", "--json")
    monkeypatch.setattr(instrumentation, "BOUND", 1.0)
    result = run(*arguments)
    figures = {figure["name"]: figure for figure in map(json.loads, result.stdout.splitlines())}
    assert figures.keys() == {"decode_counted", "decode_plain", "instrumentation_cpu_cost", "instrumentation_cost"}
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures.values())
    assert figures["decode_plain"]["value"] > 0
    assert figures["instrumentation_cost"]["bound"] == 1.0
    assert result.return_value == 0
    monkeypatch.setattr(instrumentation, "BOUND", -100.0)
    assert run(*arguments).return_value == 1


def test_what_is_counted_in_a_turn_with_metrics_and_not_without(tiny_pair, monkeypatch):
    steps = []
    monkeypatch.setattr(instrumentation.DecodeMetrics, "step", lambda self, *numbers: steps.append(numbers[1:]))
    run(f"--pair={tiny_pair}", "--batch=3", "--context=8", "--rounds=4", "--steps=2")
    assert steps == [(3, 3, 0)] * 8


def test_interval():
    assert interval([1.0] * 20) == (1.0, 1.0)
    low, high = interval([float(n) for n in range(101)])
    assert 30 < low < 50 < high < 70
