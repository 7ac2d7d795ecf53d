"""Tests on real stacks that tasks of one prompt make one transfer, and get the answers that they get alone."""

from __future__ import annotations

import random
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from peft_adapters import add_tiny_adapter
from stacks import idle, running_stack, wait_until

from overfill.client import TTFT_PARTS, Client, SamplingParams
from overfill.model.manifest import Pair

TASKS = ("a", "b", "c", "d")
KINDS = {
    "stages": {"prefill": 1, "decode": 1},
    "colocated": {"prefill": 0, "decode": 0, "colocated": 1},
    "no cache": {"prefill": 1, "decode": 1, "prefix_cache": False},
}


@pytest.fixture(scope="module")
def folder(tiny_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "tasks"
    for seed, name in enumerate(TASKS):
        add_tiny_adapter(Pair.load(tiny_pair), folder, name, seed=seed, tail_tokens=5)
    return folder


def samples(client):
    """The workers' metrics, by name and labels."""
    found = {}
    for address in {worker.process.metrics_address for worker in client.status().workers}:
        with urllib.request.urlopen(f"http://{address}/metrics") as page:
            lines = page.read().decode().splitlines()
        found |= dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_of_one_prompt_at_once_make_one_transfer(tiny_pair, folder, kind):
    rng = random.Random(7)
    prompts = [rng.choices(range(2, 500), k=length) for length in (218, 5 + 12 * 16)]  # one is cut, one is whole blocks
    with (
        running_stack(tiny_pair, adapters=folder, max_adapters="4", **KINDS[kind]) as (_, address),
        Client(address) as client,
    ):
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        begin = threading.Barrier(len(TASKS), timeout=60)

        def ask(name, prompt, at_once=True):
            if at_once:
                begin.wait()
            return client.generate(prompt, tier=name, sampling=sampling, timeout=120)

        for prompt in prompts:
            before = samples(client)
            with ThreadPoolExecutor(len(TASKS)) as pool:
                answers = list(pool.map(ask, TASKS, [prompt] * len(TASKS)))
            wait_until(lambda: idle(address), 20, "all blocks free")
            counted = {name: value - before.get(name, 0) for name, value in samples(client).items()}
            shared = sum(
                counted[f'overfill_decode_shared_prompts_total{{from="{by}"}}'] for by in ("cache", "transfer")
            )
            transfers = len(TASKS) if kind == "no cache" else 1
            assert counted['overfill_prefill_prompts_total{outcome="ok"}'] == transfers
            assert shared == len(TASKS) - transfers
            if kind != "no cache":
                computed = [answer.usage.prompt_tokens - answer.usage.cached_tokens for answer in answers]
                assert sorted(computed) == [5] * 3 + [len(prompt)], "the decoder computes 5 tokens of each"
            assert counted["overfill_decode_prompt_tokens_computed_total"] == 0
            for timing in (answer.timing for answer in answers):
                assert sum(getattr(timing, part) or 0 for part in TTFT_PARTS) <= timing.ttft
            alone = [ask(name, prompt, at_once=False).token_ids for name in TASKS]
            assert [answer.token_ids for answer in answers] == alone
            assert len({*map(tuple, alone)}) == len(TASKS)
