"""Tests a measurement's JSON line, its row in the table, and the exit code of a command that prints it."""

import json
import math

import pytest

from overfill.lab.measurement import Measurement, print_measurements


def test_a_median_shows_the_range_of_its_rounds(capsys):
    one = Measurement.median("rate", [3.0, 1.0, 2.5], "GB/s", peer="raw", peer_value=4.0)
    assert (one.value, one.low, one.high) == (2.5, 1.0, 3.0)
    assert print_measurements([one], as_json=False) == 0
    out = capsys.readouterr().out
    assert "1 to 3" in out
    assert "raw: 4" in out


def test_json_is_one_line_for_each_measurement(capsys):
    assert (
        print_measurements([Measurement("a", 1.23456, "s", bound=2.0), Measurement("b", math.nan, "s")], as_json=True)
        == 0
    )
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["name"], first["value"], first["unit"], first["bound"]) == ("a", 1.235, "s", 2.0)
    assert second["value"] is None


@pytest.mark.parametrize(
    ("value", "bound", "at_least", "code"),
    [(0.5, 1.0, False, 0), (1.5, 1.0, False, 1), (1.5, 1.0, True, 0), (0.5, 1.0, True, 1), (math.nan, 1.0, False, 1)],
)
def test_a_missed_bound_is_printed_and_sets_the_exit_code(capsys, value, bound, at_least, code):
    one = Measurement("figure", value, "s", bound=bound, at_least=at_least)
    assert print_measurements([Measurement("other", 1.0, "s"), one], as_json=False) == code
    assert ("missed" in capsys.readouterr().out) == bool(code)
