"""Tests that a prefill worker that starts finds on disk what an earlier one has computed, and nothing wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stacks import running_stack, wait_until

from overfill.client import Client, SamplingParams

BLOCK = 16
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[20 + (7 + 2 * start) * i % 470 for i in range(100)] for start in range(3)]
ON_DISK = 96 // BLOCK * BLOCK  # tokens of each prompt


@pytest.fixture(params=[{}, {"prefill": 0, "decode": 0, "colocated": 1}], ids=["two workers", "colocated"])
def ask(request: pytest.FixtureRequest, tiny_pair: Path, tmp_path: Path) -> Callable[[], list[Any]]:
    """Returns a function that asks the prompts on a new stack whose workers have the same folder."""

    def ask() -> list[Any]:
        settings = request.param | {"kv_disk": str(tmp_path / "kv"), "kv_disk_size": "64MiB"}
        with running_stack(tiny_pair, **settings) as (_, address), Client(address) as client:
            answers = [client.generate(prompt, sampling=GREEDY) for prompt in PROMPTS]
            wait_until(lambda: len(files(tmp_path)) == len(PROMPTS) * ON_DISK // BLOCK, 20, "all blocks on disk")
        return answers

    return ask


def files(folder: Path) -> list[Path]:
    return sorted((folder / "kv").glob("??/*"))


def test_a_stack_that_starts_reads_what_an_earlier_one_computed_and_recomputes_what_is_damaged(
    ask: Callable[[], list[Any]], tmp_path: Path
) -> None:
    before = ask()
    assert [answer.usage.disk_tokens for answer in before] == [0, 0, 0]
    after = ask()
    assert [answer.usage.disk_tokens for answer in after] == [ON_DISK] * 3
    assert [answer.token_ids for answer in after] == [answer.token_ids for answer in before]
    for path in files(tmp_path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    damaged = ask()
    assert [answer.usage.disk_tokens for answer in damaged] == [0, 0, 0]
    assert [answer.token_ids for answer in damaged] == [answer.token_ids for answer in before]
