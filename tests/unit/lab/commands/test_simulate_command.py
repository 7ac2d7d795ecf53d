"""Tests ``overfill simulate`` on the command line."""

import json

import pytest

from overfill.cli.main import main

SMALL = ("simulate", "--requests", "40", "--rate", "2", "--prompt-tokens", "300", "--output-tokens", "20")


def test_one_run_as_a_table_and_as_json(capsys):
    assert main([*SMALL, "--check"]) == 0
    text = capsys.readouterr().out
    assert "40 requests, 1 + 1 workers, profile cpu" in text
    assert "time to first token" in text
    assert "counters and waiting rule checked" in text
    assert main([*SMALL, "--json", "--objective", "ttft=1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["figures"]["requests"] == 40
    assert 0 < document["figures"]["attainment"] <= 1
    assert document["objective"] == "ttft <= 1 s"
    assert document["errors"] == {}


def test_traces_of_both_kinds_in_a_row(capsys, tmp_path):
    azure, mooncake = tmp_path / "a.csv", tmp_path / "m.jsonl"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1,374,4\n2023-11-16 18:15:47.1,3,4\n"
    )
    mooncake.write_text('{"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}\n')
    assert main(["simulate", "--trace", f"azure:{azure}", "--trace", f"mooncake:{mooncake}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["requests"] == 3
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1,0,4\n")
    assert main(["simulate", "--trace", str(azure)]) == 2
    assert "line 2: ContextTokens must be a whole number of at least 1" in capsys.readouterr().err


def test_sizes_policies_and_scaling(capsys, tmp_path):
    assert main([*SMALL, "--size", "--json", "--costs", "3,1"]) == 0
    sizes = json.loads(capsys.readouterr().out)
    assert sizes["cheapest"]["cost"] == 3 * sizes["cheapest"]["prefill"] + sizes["cheapest"]["decode"]
    assert main([*SMALL, "--compare-policies"]) == 0
    table = capsys.readouterr().out
    assert "least-load" in table
    assert "round-robin" in table
    plot = tmp_path / "timeline.png"
    assert main([*SMALL, "--autoscale", "--max-workers", "4", "--plot", str(plot)]) == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert "scaled pools of 4 workers" in capsys.readouterr().out


def test_chats_with_kv_from_peers_and_disk(capsys):
    chats = ("simulate", "--trace", "sessions:6:4:640", "--prompt-tokens", "320", "--prefill", "2", "--decode", "2")
    assert main([*chats, "--kv-disk-size", "1GiB"]) == 0
    text = capsys.readouterr().out
    assert "24 requests" in text
    assert "prompt tokens computed per new one" in text
    figures = {}
    for name, more in (("peers", ()), ("alone", ("--no-kv-peers",))):
        assert main([*chats, "--policy", "round-robin", "--json", *more]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["kv_peers"] is (name == "peers")
        figures[name] = document["figures"]
    assert figures["peers"]["cached_peer"] > 0 == figures["alone"]["cached_peer"]
    assert figures["peers"]["computed_per_new"] < figures["alone"]["computed_per_new"]


TIERS = ("--tier", "full=cpu:2,weights=6,share=2,itl-objective=0.05", "--tier", "fast=cpu")


def test_tiers_and_brownouts(capsys):
    assert main([*SMALL, *TIERS, "--brownout", "full > fast"]) == 0
    text = capsys.readouterr().out
    assert "1 + 2 full + 1 fast workers" in text
    assert "Tiers, brownout full > fast" in text
    assert main(["simulate", "--trace", "synthetic:5:20", "--trace", "synthetic:2:10", *TIERS, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["figures"]["requests"] == 30
    assert set(document["tiers"]) == {"full", "fast"}
    assert sum(tier["answer_share"] for tier in document["tiers"].values()) == pytest.approx(1)


def test_workers_with_both_stages_alone_and_beside_others(capsys):
    assert main([*SMALL, "--colocated", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["prefill"], document["decode"], document["colocated"]) == (0, 0, 2)
    assert document["figures"]["local"] == 1.0
    assert main([*SMALL, "--colocated", "1", "--prefill", "1"]) == 0
    assert "1 + 0 workers, 1 with both stages" in capsys.readouterr().out
    assert (
        main([*SMALL, "--prompt-tokens", "20", "--colocated", "2", "--prefill", "1", "--compare-policies", "--json"])
        == 0
    )
    local = {run["policy"]: run["figures"]["local"] for run in json.loads(capsys.readouterr().out)}
    assert local["conditional"] > local["prefix-affinity"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((*TIERS, "--brownout", "full > cheap"), 2, "there is no tier 'cheap'"),
        ((*TIERS, "--decode", "2"), 2, "leave out --decode"),
        ((*TIERS, "--size"), 2, "leave out --size"),
        (("--tier", "full=cpu,bytes=2"), 2, "bytes is unknown; allowed are share, weights"),
        (("--tier", "full=cpu,weights=-1"), 2, "weights must be a number above 0, got '-1'"),
        (("--tier", "full=cpu,share=0"), 2, "no request asks for any tier"),
        ((*TIERS, "--brownout-share", "2"), 2, "'--brownout-share'"),
        (("--brownout", "full > fast"), 2, "there is no tier 'full'"),
        (("--trace", "synthetic:fast"), 2, "expected synthetic:RATE or synthetic:RATE:REQUESTS"),
        (("--trace", "sessions:3:0:100"), 2, "expected sessions:CHATS:TURNS:TOKENS"),
        (("--kv-disk-size", "much"), 2, "must be a size such as 50GiB, got 'much'"),
        (("--colocated", "1", "--size"), 2, "leave out --size"),
        (("--decode", "0"), 2, "each stage needs a worker"),
        (("--size", "--autoscale"), 2, "exclude each other"),
        (("--max-workers", "4"), 2, "needs --autoscale"),
        (("--size", "--plot", "a.png"), 2, "one run"),
        (("--size", "--costs", "1"), 2, "two positive numbers"),
        (("--size", "--objective", "itl=1e-9"), 1, "is not met by 95% of the requests"),
    ],
)
def test_conflicting_options_are_refused(capsys, arguments, code, message):
    assert main([*SMALL, *arguments]) == code
    assert message in capsys.readouterr().err
