"""Tests the output, not the speed, of ``overfill bench decode`` and ``prefill`` on a tiny pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click import UsageError
from click.testing import CliRunner

from overfill.lab.bench.engine import machine, measure
from overfill.lab.bench.engine.overfill_engine import load_engines
from overfill.lab.commands.bench import bench_group


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(machine, "_CPU_BUFFER", 1 << 16)
    monkeypatch.setattr(machine, "_CPU_SHAPES", ((8, 8, 8),))


def run(*arguments):
    result = CliRunner().invoke(bench_group, [*arguments, "--threads=1", "--rounds=2"], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def rows_of(*arguments):
    return [json.loads(line) for line in run(*arguments, "--json").stdout.splitlines()]


@pytest.fixture
def vllm(monkeypatch):
    """A full model of ours in the place of vLLM, which is not installed here."""

    def start(python, settings, workload, dtype, log):
        peer, *_ = load_engines(
            settings.pair, dtype=dtype, device=torch.device("cpu"), quantize=None, workload=workload,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        )  # fmt: skip
        peer.name = "vllm"
        return peer

    monkeypatch.setattr(measure, "_start_vllm", start)
    monkeypatch.setattr(measure, "python_of", Path)


def test_decode_measures_both_halves_beside_vllm(tiny_pair, vllm):
    rows = rows_of("decode", f"--pair={tiny_pair}", "--batch=1,3", "--context=32", "--steps=2", "--vllm")
    assert [(row["name"], row["batch"], row["peer"]) for row in rows] == [
        (name, batch, peer)
        for batch in (1, 3)
        for name, peer in (("decode_full", "vllm"), ("decode_decoder", "vllm"), ("decode_gain", None))
    ]
    assert all(row["value"] > 0 and row["ratio"] > 0 and row["context"] == 32 for row in rows)
    assert all(row["peer_value"] > 0 for row in rows if row["peer"])


@pytest.mark.parametrize("identity", [False, True])
def test_decode_measures_adapters_beside_the_same_decoder_without(tiny_family, identity):
    pair = tiny_family["full" if identity else "fast"]
    rows = rows_of("decode", f"--pair={pair}", "--batch=3", "--context=32", "--steps=2", "--adapters=2")
    plain = ["decode_full"] if identity else ["decode_full", "decode_decoder", "decode_gain"]
    measured = {row["name"]: row["value"] for row in rows}
    assert sorted(measured) == sorted([*plain, "decode_adapters", "adapters_step"])
    assert measured["adapters_step"] == pytest.approx(
        measured["decode_full" if identity else "decode_decoder"] / measured["decode_adapters"], rel=0.01
    )


def test_prefill_reads_prompts_alone_and_together(tiny_pair):
    rows = rows_of("prefill", f"--pair={tiny_pair}", "--batch=1,2", "--context=16,40")
    assert [(row["batch"], row["context"], row["peer"]) for row in rows] == [
        (batch, length, None) for length in (16, 40) for batch in (1, 2)
    ]
    assert all(row["value"] > 0 for row in rows)


def test_vllm_that_is_not_installed_is_refused_with_what_to_do(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="--vllm: not installed; add --install-vllm to download it"):
        run("decode", f"--pair={tiny_pair}", "--vllm")
