"""Tests that ``overfill verify`` passes on a correct stack and fails on one with a fault that no other check finds."""

import json

import pytest
from peft_adapters import add_tiny_adapter
from stacks import running_stack
from two_stage_format import write_two_stage

from overfill.cli.main import main
from overfill.model.manifest import Pair

QUESTIONS = [f"Question {i}: what comes after {i * 7} blocks of sixteen tokens, and why is that so?" for i in range(12)]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))
    return path


@pytest.fixture
def verify(tiny_pair, questions, capsys):
    """Run the command in this process, which has imported torch already; return exit code and last line."""

    def run(address, pair=tiny_pair):
        arguments = [f"--questions={questions}", "--max-tokens=24", f"--address={address}", f"--pair={pair}"]
        code = main(["verify", *arguments])
        return code, capsys.readouterr().out.splitlines()[-1]

    return run


def test_workers_with_both_stages_are_verified_beside_decode_workers(tiny_pair, verify):
    with running_stack(tiny_pair, prefill=0, decode=1, colocated=1) as (_, address):
        assert verify(address) == (0, "12/12 correct (12 identical, 0 ties)")


def test_every_tier_passes_and_two_find_the_prefill_of_the_first(tiny_tiers, questions, capsys):
    """One tier's worker has a fault: only the answers of this tier are wrong."""
    with running_stack(None, tiers=tiny_tiers, faults={"decode-fast-0": "shift-positions"}) as (_, address):
        arguments = [f"--questions={questions}", "--max-tokens=16", f"--address={address}", "--json"]
        assert main(["verify", *arguments, *(f"--tier={tier}" for tier in tiny_tiers)]) == 1
    full, default, fast = json.loads(capsys.readouterr().out)["tiers"]
    assert [full["identical"], default["identical"]] == [12, 12]
    assert fast["correct"] < 12
    assert full["cached_tokens"] < default["cached_tokens"] == fast["cached_tokens"]


def test_adapters_pass_in_batches_with_each_other_and_the_decoder_alone(tiny_pair, tmp_path, questions, capsys):
    pair, folder = Pair.load(tiny_pair), tmp_path / "adapters"
    tails = {"planner": 0, "coder": 0, "judge": 7}
    for seed, (name, tail) in enumerate(tails.items()):
        add_tiny_adapter(pair, folder, name, seed=seed, tail_tokens=tail)
    arguments = [f"--questions={questions}", "--max-tokens=16", f"--pair={tiny_pair}", "--concurrency=8", "--json"]
    arguments += [f"--adapters={folder}", *(f"--adapter={name}" for name in tails)]
    with running_stack(tiny_pair, decode=1, adapters=folder) as (_, address):
        code = main(["verify", f"--address={address}", *arguments])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["failures"]) == (0, [])
    assert {row["tier"]: row["identical"] for row in report["tiers"]} == dict.fromkeys(["default", *tails], 12)


def test_an_imported_pair_passes(tiny_pair, tmp_path, verify):
    """A decoder in the authors' format with three of four layers, which read KV out of order and of one layer twice."""
    decoder = write_two_stage(tiny_pair, tmp_path / "published", sharded=True, teacher=True, kept=[0, 1, 3])
    pair = tmp_path / "imported"
    arguments = ["--full", str(tiny_pair / "full"), "--decoder", str(decoder), "--layer-map", "0,3,0"]
    assert main(["pair", "import", *arguments, "--out", str(pair)]) == 0
    with running_stack(pair, decode=2) as (_, address):
        assert verify(address, pair) == (0, "12/12 correct (12 identical, 0 ties)")


@pytest.mark.parametrize(
    "faults",
    [
        {"prefill-0": "negate-weight-row"},
        {"decode-0": "negate-weight-row"},
        {"decode-0": "overwrite-kv-chunk"},
        {"decode-0": "shift-positions"},
    ],
    ids=lambda faults: "-".join(*faults.items()),
)
def test_a_fault_is_caught(tiny_pair, verify, faults):
    with running_stack(tiny_pair, faults=faults) as (_, address):
        code, line = verify(address)
    assert code == 1
    assert "/12 correct" in line
