"""Tests adapters on real stacks: who writes, the parts of the first token, and changes under load."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from peft_adapters import add_tiny_adapter
from stacks import idle, running_stack, wait_until

from overfill.client import TTFT_PARTS, Client, ModelNotFound, SamplingParams
from overfill.model.manifest import Pair
from overfill.pair.reference import TwoStageReference, judge_parts
from overfill.rpc.channel import open_sync_channel
from overfill.v1 import admin_pb2, admin_pb2_grpc

TAILS = {"a": 1, "b": 3}
"""Tokens of the prompt that the decoder computes, by adapter."""

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tiny_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "tasks"
    for seed, (name, tail) in enumerate(TAILS.items()):
        add_tiny_adapter(Pair.load(tiny_pair), folder, name, seed=seed, tail_tokens=tail)
    return folder


@pytest.fixture(scope="module", params=["stages", "colocated"])
def stack(request, tiny_pair, folder):
    workers = {"prefill": 1, "decode": 2} if request.param == "stages" else {"prefill": 0, "decode": 0, "colocated": 2}
    with running_stack(tiny_pair, **workers, adapters=folder, max_adapters="3") as running:
        yield running


@pytest.fixture
def client(stack):
    with Client(stack[1]) as client:
        yield client
        wait_until(lambda: idle(stack[1]), 20, "all blocks free")


def prompt(seed, length=60):
    return random.Random(seed).choices(range(2, 500), k=length)


def ask(client, seed=0, tier="", tokens=24, **more):
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return client.generate(prompt(seed), tier=tier, sampling=sampling, timeout=120, **more)


def decoding(client):
    """Addresses of the workers that decode, by id."""
    return {worker.id: worker.address for worker in client.status().workers if worker.stage == "decode"}


def change(address, method, name):
    """Asks a worker itself to load or unload an adapter."""
    with open_sync_channel(address, None) as channel:
        request = getattr(admin_pb2, f"{method}AdapterRequest")(name=name)
        return getattr(admin_pb2_grpc.AdminStub(channel), f"{method}Adapter")(request, timeout=60).workers[0]


def knows(client, name):
    return any(model.name.endswith(f":{name}") for model in client.models())


def test_the_decoder_writes_the_first_token_and_its_parts_add_up(client, tiny_pair, folder):
    references = TwoStageReference(tiny_pair).with_adapters({name: folder / name for name in TAILS})
    plain = ask(client)
    for name, tail in TAILS.items():
        for _ in range(2):  # the second time, prompts are cached
            answer = ask(client, tier=name)
            ids, timing, start = answer.token_ids, answer.timing, len(prompt(0)) - tail
            assert answer.tier == name
            assert ids != plain.token_ids
            assert judge_parts(
                references, [(name, 0)], prompt(0), ids, answer.finish_reason, 24, answer_start=start
            ).correct
            assert ask(client, tier=name, tokens=1).token_ids == ids[:1]
            assert timing.handoff is not None
            assert timing.first_step > 0
            parts = [getattr(timing, part) for part in TTFT_PARTS]
            assert sum(part or 0 for part in parts) <= timing.ttft
    assert (plain.timing.handoff, plain.timing.first_step) == (None, None)


def test_answers_go_on_when_a_worker_dies(stack, client):
    expected = {name: client.generate(prompt(7), tier=name, sampling=LONG).token_ids for name in ("a", "b", "")}
    assert len({*map(tuple, expected.values())}) == 3
    begun, died = threading.Barrier(4, timeout=60), threading.Event()

    def run(name):
        with Client(stack[1]) as client, client.stream(prompt(7), tier=name, sampling=LONG) as stream:
            next(iter(stream))
            begun.wait()
            assert died.wait(60)
            for _ in stream:
                pass
            return stream.answer

    with ThreadPoolExecutor(3) as pool:
        answers = {name: pool.submit(run, name) for name in expected}
        begun.wait()
        victim = stack[0].worker(next(iter(decoding(client))))
        os.kill(victim.pid, signal.SIGKILL)
        died.set()
        assert {name: answer.result().token_ids for name, answer in answers.items()} == expected
    stack[0].restart(victim.name)
    wait_until(lambda: len(decoding(client)) == 2, 60, "the worker is back, with the folder's adapters")
    for _ in range(4):
        assert ask(client, 7, tier="a").token_ids == expected["a"][:24]


class AdapterLoad:
    """Streams that each ask one adapter, or the decoder alone, until the end of the block."""

    def __init__(self, address, names):
        self.errors, self.count, self._stop = [], 0, threading.Event()
        self._pool = ThreadPoolExecutor(len(names))
        self._runs = [self._pool.submit(self._run, address, name) for name in names]

    def _run(self, address, name):
        with Client(address) as client:
            expected = ask(client, 1, name).token_ids
            while not self._stop.is_set():
                assert ask(client, 1, name).token_ids == expected
                self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._stop.set()
        for run in self._runs:
            run.result()  # raises its error
        self._pool.shutdown()


def test_adapters_come_and_go_under_load(stack, client, folder, tiny_pair):
    workers = decoding(client)
    assert len(workers) == 2
    with AdapterLoad(stack[1], ["a", "b", "", "a"]) as load:
        add_tiny_adapter(Pair.load(tiny_pair), folder, "c", seed=3)
        for id, address in workers.items():
            loaded = change(address, "Load", "c")
            assert (loaded.worker_id, loaded.adapter.name, loaded.error) == (id, "c", "")
        wait_until(lambda: knows(client, "c"), 20, "the router knows the adapter")
        assert refusal(workers[id], "Load", "d") == (grpc.StatusCode.NOT_FOUND, "no adapter 'd'")
        expected = client.generate(prompt(2), tier="c", sampling=LONG).token_ids
        with client.stream(prompt(2), tier="c", sampling=LONG) as stream:
            next(iter(stream))
            for address in workers.values():
                change(address, "Unload", "c")
            for _ in stream:
                pass
        assert stream.answer.token_ids == expected, "what runs is finished"
        wait_until(lambda: not knows(client, "c"), 20, "the router knows that it is gone")
        with pytest.raises(ModelNotFound, match="'c'"):
            ask(client, 2, "c")
        assert refusal(workers[id], "Unload", "c")[0] is grpc.StatusCode.NOT_FOUND
        for address in workers.values():  # its slot is free again
            change(address, "Load", "c")
        wait_until(lambda: knows(client, "c"), 20, "the router knows the adapter")
        assert client.generate(prompt(2), tier="c", sampling=LONG).token_ids == expected
        shutil.rmtree(folder / "c")
        assert ask(client, 2, "c").token_ids == expected[:24], "a loaded adapter needs its folder no more"
        for address in workers.values():
            change(address, "Unload", "c")
        before = load.count
        wait_until(lambda: load.count > before + 4, 60, "the load goes on")


def refusal(address, method, name):
    """Status and beginning of the message with which a worker refuses."""
    with pytest.raises(grpc.RpcError) as caught:
        change(address, method, name)
    return caught.value.code(), caught.value.details().split(":")[0]
