"""Tests in Triton's interpreter that the CUDA kernel draws what the reference draws. Triton comes with vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import plain_race
import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "interpreted_race.py"


@pytest.fixture(scope="module")
def drawn() -> dict[str, list]:
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_known_draws(drawn: dict[str, list]) -> None:
    assert drawn["known"] == plain_race.known_requests()[3]


def test_draws_are_those_of_the_reference(drawn: dict[str, list]) -> None:
    kernel, reference = drawn["random"]
    assert kernel == reference


def test_broken_rows_are_reported_and_the_others_drawn(drawn: dict[str, list]) -> None:
    assert drawn["broken"][0] >= 0
    assert drawn["broken"][1:] == [-1, -1, -1]
