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


def test_what_was_measured_is_a_field_of_the_line_and_a_column_where_it_differs(capsys):
    ones = [Measurement("rate", 5.0, "tokens/s", of={"batch": n, "device": "cpu"}) for n in (8, 32)]
    print_measurements(ones, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["name"], line["batch"], line["device"]) for line in lines] == [
        ("rate", 8, "cpu"),
        ("rate", 32, "cpu"),
    ]
    print_measurements(ones, as_json=False)
    out = capsys.readouterr().out
    assert "batch" in out
    assert "bound" not in out, "no figure has one"
    assert " ".join(out.split()).count("device cpu") == 1


def test_a_run_without_figures_prints_none(capsys):
    assert print_measurements([], as_json=True) == print_measurements([], as_json=False) == 0
    assert capsys.readouterr().out.strip() == ""
