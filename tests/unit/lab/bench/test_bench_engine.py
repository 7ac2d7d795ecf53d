"""Tests the output, not the speed, of ``overfill bench decode`` and ``prefill`` on a tiny pair."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from overfill.lab.bench.engine import machine
from overfill.lab.commands.bench_engine import decode_command, prefill_command
from overfill.lab.simulate.profiles import load_profile

COMMANDS = {"decode": decode_command, "prefill": prefill_command}


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(machine, "_CPU_BUFFER", 1 << 16)
    monkeypatch.setattr(machine, "_CPU_SHAPES", ((8, 8, 8),))


def run(name, *options):
    result = CliRunner().invoke(COMMANDS[name], [*options, "--threads=1", "--rounds=2"], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def rows_of(*arguments):
    return [json.loads(line) for line in run(*arguments, "--json").stdout.splitlines()]


def test_decode_measures_both_halves_beside_the_machine(tiny_pair):
    rows = rows_of("decode", f"--pair={tiny_pair}", "--batch=1,3", "--context=32", "--steps=2")
    *figures, bandwidth, matrix_rate = rows
    assert [(row["name"], row["batch"], row["unit"]) for row in figures] == [
        (name, batch, unit)
        for batch in (1, 3)
        for name, unit in (("decode_full", "tokens/s"), ("decode_decoder", "tokens/s"), ("decode_gain", "x"))
    ]
    assert all(row["peer"] == "machine" and row["peer_ratio"] > 0 and row["context"] == 32 for row in figures)
    full = figures[0]
    assert full["low"] <= full["value"] <= full["high"]
    assert full["peer_ratio"] == pytest.approx(full["value"] / full["peer_value"], rel=0.01)
    assert full.keys() >= {"pair", "dtype", "weights", "kv_cache", "threads", "device"}
    assert (bandwidth["name"], matrix_rate["name"]) == ("bandwidth", "matrix_rate")
    assert bandwidth["value"] > 0 < matrix_rate["value"]


@pytest.mark.parametrize("identity", [False, True])
def test_decode_measures_adapters_beside_the_same_decoder_without(tiny_family, identity):
    pair = tiny_family["full" if identity else "fast"]
    rows = rows_of("decode", f"--pair={pair}", "--batch=3", "--context=32", "--steps=2", "--adapters=2")[:-2]
    plain = ["decode_full"] if identity else ["decode_full", "decode_decoder", "decode_gain"]
    measured = {row["name"]: row["value"] for row in rows}
    assert sorted(measured) == sorted([*plain, "decode_adapters", "adapters_step"])
    assert measured["adapters_step"] == pytest.approx(
        measured["decode_full" if identity else "decode_decoder"] / measured["decode_adapters"], rel=0.01
    )


def test_prefill_reads_prompts_alone_and_together(tiny_pair):
    rows = rows_of("prefill", f"--pair={tiny_pair}", "--batch=1,2", "--context=16,40")[:-2]
    assert [(row["name"], row["batch"], row["context"]) for row in rows] == [
        ("prefill", batch, length) for length in (16, 40) for batch in (1, 2)
    ]
    assert all(row["value"] > 0 for row in rows)


def test_the_simulator_reads_the_lines(tiny_pair, tmp_path):
    lines = run("prefill", f"--pair={tiny_pair}", "--batch=1", "--context=16,40", "--json").stdout
    lines += run("decode", f"--pair={tiny_pair}", "--batch=1,3", "--context=32", "--steps=2", "--json").stdout
    (tmp_path / "mine.jsonl").write_text(lines)
    profile = load_profile(str(tmp_path / "mine.jsonl"))
    assert profile.name == "mine"
    assert profile.decode.cost.seconds(1, 32) > 0


def test_the_table_says_once_what_all_figures_have_alike(tiny_pair):
    table = run("decode", f"--pair={tiny_pair}", "--batch=1,3", "--context=32", "--steps=2").stdout
    assert " ".join(table.split()).count("device cpu") == 1
    assert sum("decode_full" in line for line in table.splitlines()) == 2
