"""Adapters that PEFT made, on decode workers with vLLM: answers equal those of transformers with PEFT."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from peft_adapters import add_tiny_adapter
from stacks import idle, loads, running_stack, wait_until
from vllm_stacks import GREEDY, engines, prompts

from overfill.client import Client, SamplingParams
from overfill.model.manifest import Pair
from overfill.pair.reference import TwoStageReference, judge_parts
from overfill.rpc.channel import open_sync_channel
from overfill.v1 import admin_pb2, admin_pb2_grpc

TAILS = {"extract": 0, "label": 3, "summary": 40}
WRITERS = ("", *TAILS)


@pytest.fixture(scope="module")
def adapters(vllm_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pairs") / "adapters"
    for seed, (name, tail_tokens) in enumerate(TAILS.items()):
        add_tiny_adapter(Pair.load(vllm_pair), directory, name, seed=seed, tail_tokens=tail_tokens)
    return directory


@pytest.fixture(scope="module")
def references(reference: TwoStageReference, adapters: Path) -> dict[str, TwoStageReference]:
    return {"": reference, **reference.with_adapters({name: adapters / name for name in TAILS})}


@pytest.fixture(scope="module")
def mixed(vllm_pair: Path, adapters: Path) -> Iterator[tuple[Any, str]]:
    settings = engines("overfill", "vllm") | {"adapters": adapters, "max_adapters": str(len(TAILS))}
    with running_stack(vllm_pair, decode=2, **settings) as (stack, address):
        yield stack, address


@pytest.fixture
def client(mixed: tuple[Any, str]) -> Iterator[Client]:
    with Client(mixed[1]) as client:
        yield client
        wait_until(lambda: idle(mixed[1]), 20, "all blocks free")


def sampling(max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(**GREEDY, max_tokens=max_tokens)


def knows(client, adapter):
    """Whether the router offers the adapter."""
    return any(model.name.endswith(f":{adapter}") for model in client.models())


def check(references, prompt, writer, answer, max_tokens=24):
    """Compares an answer with that of transformers and PEFT."""
    start = len(prompt) - min(TAILS[writer] or 1, len(prompt) - 1) if writer else None
    parts = [(writer, 0)]
    judged = judge_parts(
        references, parts, prompt, answer.token_ids, answer.finish_reason, max_tokens, answer_start=start
    )
    assert judged.correct, (writer, len(prompt), judged.problem, judged.first_error)


def test_tasks_of_one_prompt_answer_as_peft_s(mixed, client, references):
    asked = list(product(prompts(8)[1:], WRITERS))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: client.generate(one[0], sampling=sampling(), tier=one[1]), asked))
    for (prompt, writer), answer in zip(asked, answers, strict=True):
        check(references, prompt, writer, answer)


def test_adapters_come_and_go_under_load(mixed, client, references):
    workers = [worker.address for worker in client.status().workers if worker.stage == "decode"]
    asked, done, answers = prompts(6)[3:], threading.Event(), []

    def load(writer):
        while not done.is_set():
            answers.extend((p, writer, client.generate(p, sampling=sampling(), tier=writer)) for p in asked)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(load, writer) for writer in ("", "extract", "summary")]
        for method, known in (("Unload", False), ("Load", True)):
            for address in workers:
                with open_sync_channel(address) as channel:
                    request = getattr(admin_pb2, f"{method}AdapterRequest")(name="label")
                    call = getattr(admin_pb2_grpc.AdminStub(channel), f"{method}Adapter")
                    assert [each.error for each in call(request, timeout=60).workers] == [""]
            wait_until(lambda known=known: knows(client, "label") is known, 20, f"after {method}")
        answers += [(p, "label", client.generate(p, sampling=sampling(), tier="label")) for p in asked]
        done.set()
        for each in running:
            each.result()
    for prompt, writer, answer in answers:
        check(references, prompt, writer, answer)


def test_a_killed_worker_s_answers_keep_their_adapters(mixed, client, references):
    begun, prompt = threading.Barrier(len(WRITERS) + 1, timeout=60), prompts(9)[8]

    def ask(writer):
        with client.stream(prompt, sampling=sampling(290), tier=writer) as stream:
            next(iter(stream))
            begun.wait()
            for _ in stream:
                pass
            return stream.answer

    with ThreadPoolExecutor(len(WRITERS)) as pool:
        answers = {writer: pool.submit(ask, writer) for writer in WRITERS}
        begun.wait()
        busiest = max(loads(mixed[1]).items(), key=lambda one: (one[0].startswith("decode"), one[1].running))
        os.kill(mixed[0].worker(busiest[0]).pid, signal.SIGKILL)
        for writer, answer in answers.items():
            check(references, prompt, writer, answer.result(), 290)
    assert any(answer.result().migrations for answer in answers.values())
