"""``overfill verify`` passes on a right stack and fails on one with any fault that no check can see."""

import json
import subprocess
import sys

import pytest
from stacks import running_stack

QUESTIONS = [f"Question {i}: what comes after {i * 7} blocks of sixteen tokens, and why is that so?" for i in range(12)]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))
    return path


def verify(address, pair, questions):
    return subprocess.run(
        [
            *(sys.executable, "-m", "overfill.cli.main", "verify", f"--questions={questions}", "--max-tokens=24"),
            *(f"--address={address}", f"--pair={pair}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_right_stack_passes(tiny_pair, questions):
    with running_stack(tiny_pair, decode=2) as (_, address):
        done = verify(address, tiny_pair, questions)
    assert done.stdout.splitlines()[-1] == "12/12 correct (12 identical, 0 ties)"
    assert done.returncode == 0


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
def test_a_fault_is_caught(tiny_pair, questions, faults):
    with running_stack(tiny_pair, faults=faults) as (_, address):
        done = verify(address, tiny_pair, questions)
    assert "/12 correct" in done.stdout.splitlines()[-1]
    assert done.returncode == 1


def test_a_stack_that_is_not_float32_cannot_be_verified(tiny_pair, questions):
    with running_stack(tiny_pair, dtype="bfloat16") as (_, address):
        done = verify(address, tiny_pair, questions)
    assert done.returncode == 2
    assert "float32" in done.stderr
