"""Stacks with vLLM workers answer as the reference does: both stages on vLLM, and each mixed with OverFill's engine."""

import itertools
import os
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest
from stacks import children, idle, loads, running_stack, wait_until
from two_stage_format import write_two_stage
from vllm_stacks import (
    CROSSING,
    GREEDY,
    PROMPT,
    ask_and_cancel,
    engines,
    prompts,
    wrong_answers,
    wrong_turns,
)

from overfill.api import key_file as keys
from overfill.cli.main import main
from overfill.client import Client, SamplingParams
from overfill.pair.reference import TwoStageReference, judge


@pytest.fixture(scope="module")
def both(vllm_pair):
    """A stack with both stages on vLLM and two decode workers."""
    with pytest.MonkeyPatch.context() as patch:
        # oneDNN keeps a kernel for each number of tokens in a step, 1,024 by default, which looks like a leak.
        patch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
        patch.setenv("LRU_CACHE_CAPACITY", "8")
        with running_stack(vllm_pair, decode=2, **engines("vllm", "vllm")) as (stack, address):
            yield stack, address


@pytest.fixture
def client(both):
    with Client(both[1]) as client:
        yield client


@pytest.fixture(scope="module", params=[("vllm", "overfill"), ("overfill", "vllm")], ids="-".join)
def mixed(request, vllm_pair, tmp_path_factory):
    """A stack with one stage on each engine and two tenants.

    KV travels over sockets. Prompts are computed in chunks.
    """
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    mine, theirs = keys.create(file, "mine"), keys.create(file, "theirs")
    settings = engines(*request.param) | {"shm": "off", "api_keys": file, "max_num_batched_tokens": "64"}
    with (
        running_stack(vllm_pair, **settings) as (stack, address),
        Client(address, api_key=mine) as client,
        Client(address, api_key=theirs) as other,
    ):
        yield SimpleNamespace(
            engines=request.param, address=address, client=client, other=other, secret=stack.placed.secret
        )


@pytest.fixture(scope="module")
def ours(vllm_pair):
    """A client of a stack with OverFill's engine in both stages."""
    with running_stack(vllm_pair, **engines("overfill", "overfill")) as (_, address), Client(address) as client:
        yield client


def test_mixed_engines_answer_as_the_reference(mixed, reference):
    assert wrong_answers(mixed.client, reference, prompts(24)) == []
    answer = mixed.client.generate([5, 6, 7], sampling=SamplingParams(**GREEDY, max_tokens=2))
    named = zip(mixed.engines, (answer.prefill_engine, answer.decode_engine), strict=True)
    assert all(engine in version for engine, version in named)
    wait_until(lambda: idle(mixed.address, api_key=mixed.secret), 2, "all blocks free")


def test_every_sampling_parameter_crosses_from_one_engine_to_the_other(mixed, ours):
    """The full model's engine samples the first token, the decoder's the others, both by the request's parameters."""
    for name, options in CROSSING.items():
        sampling = SamplingParams(**options)
        expected, found = (client.generate(PROMPT, sampling=sampling) for client in (ours, mixed.client))
        assert (name, found.token_ids, found.finish_reason) == (name, expected.token_ids, expected.finish_reason)
        if sampling.logprobs is not None:
            pairs = zip(found.logprobs, expected.logprobs, strict=True)
            assert all(abs(one.logprob - other.logprob) < 1e-3 for one, other in pairs)


def test_codecs_and_sockets(mixed):
    sampling, prompt = SamplingParams(**GREEDY, max_tokens=16), PROMPT[::-1]  # which no cache holds yet
    raw = mixed.client.generate(prompt, sampling=sampling, trace=True)
    assert raw.codec == "raw"
    coded = mixed.client.generate(prompt, sampling=sampling, trace=True, kv_codec="int8")
    assert coded.codec == "int8"
    assert coded.trace.kv_bytes * 2 < raw.trace.kv_bytes


def test_a_tenant_finds_its_own_prompts_only(mixed):
    sampling = SamplingParams(**GREEDY, max_tokens=2)
    prompt = [token + 1 for token in PROMPT]  # which no cache holds yet
    cached = [
        client.generate(prompt, sampling=sampling).usage.cached_tokens
        for client in (mixed.client, mixed.other, mixed.client)
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


def test_an_imported_pair_with_dropped_layers(vllm_pair, tmp_path):
    """Three of four layers, which read KV out of order and of one layer twice."""
    decoder = write_two_stage(vllm_pair, tmp_path / "published", sharded=True, teacher=True, kept=[0, 1, 3])
    pair = tmp_path / "imported"
    arguments = ["--full", str(vllm_pair / "full"), "--decoder", str(decoder), "--layer-map", "0,3,0"]
    assert main(["pair", "import", *arguments, "--out", str(pair)]) == 0
    with running_stack(pair, **engines("overfill", "vllm")) as (_, address), Client(address) as client:
        assert wrong_answers(client, TwoStageReference(pair), prompts(12)) == []


def test_both_stages_on_vllm_answer_as_the_reference(both, client, reference):
    assert wrong_answers(client, reference, prompts(24)) == []
    wait_until(lambda: idle(both[1]), 2, "all blocks free")


def test_kv_is_the_full_model_s_in_every_turn_of_a_chat(client, reference):
    assert wrong_turns(client, reference) == []


def test_kv_is_the_full_model_s_in_every_turn_of_a_chat_with_mixed_engines(mixed, reference):
    assert wrong_turns(mixed.client, reference) == []


def test_without_the_cure_a_later_turn_finds_kv_of_the_decoder(vllm_pair, reference):
    """Shows that the test above can fail: here blocks of answers are shared, as vLLM would by itself."""
    faults = {"decode-0": "share-answers"}
    with (
        running_stack(vllm_pair, faults=faults, **engines("overfill", "vllm")) as (_, address),
        Client(address) as client,
    ):
        assert wrong_turns(client, reference)


def test_cancelled_requests_leave_nothing_behind(both, client):
    """No block is lost on either side."""
    assert ask_and_cancel(client, 200, 24) > 0
    wait_until(lambda: idle(both[1]), 2, f"all blocks free: {loads(both[1])}")


def test_cancelled_requests_leave_nothing_behind_with_mixed_engines(mixed):
    assert ask_and_cancel(mixed.client, 100, 24) > 0
    wait_until(lambda: idle(mixed.address, api_key=mixed.secret), 2, "all blocks free")


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_requests_of_which_a_tenth_is_cancelled(both, client):
    workers = {c.name: psutil.Process(c.pid) for c in [*children(both[0], "prefill"), *children(both[0], "decode")]}

    def sizes():
        return {name: worker.memory_info().rss / 2**20 for name, worker in workers.items()}

    ask_and_cancel(client, 400, 60)  # until caches and thread pools have their sizes
    before = sizes()
    cancelled = ask_and_cancel(client, 1000, 60)
    wait_until(lambda: idle(both[1]), 2, f"all blocks free: {loads(both[1])}")
    growth = {name: size - before[name] for name, size in sizes().items()}
    print(f"{cancelled} of 1,000 cancelled; MiB that each worker grew: {growth}")
    assert cancelled > 30
    assert max(growth.values()) < 16


def test_a_killed_decode_worker_s_answers_continue_on_another(both, client, reference):
    """The emitted tokens pass through the other worker's decoder and are not written again."""
    stack, _ = both
    prompt, sampling = prompts(9)[8], SamplingParams(**GREEDY, max_tokens=200)
    streams = [client.stream(prompt, sampling=sampling) for _ in range(4)]

    begun = [threading.Event() for _ in streams]

    def read(stream, began):
        for _ in stream:
            began.set()
            time.sleep(0.002)
        return stream.answer

    with ThreadPoolExecutor(4) as pool:
        answers = list(map(pool.submit, itertools.repeat(read), streams, begun))
        assert all(began.wait(60) for began in begun)
        os.kill(children(stack, "decode")[0].pid, signal.SIGKILL)
        for answer in answers:
            done = answer.result(60)
            assert judge(reference, prompt, done.token_ids, done.finish_reason, 200).correct


def test_sequences_that_vllm_preempts_get_their_kv_again_and_go_on(vllm_pair, reference):
    """Together the answers need 64 blocks; the pool has 15."""
    settings = engines("overfill", "vllm") | {"kv_memory": "1MiB", "max_model_len": "256", "max_request_time": "60"}
    with running_stack(vllm_pair, **settings) as (_, address), Client(address) as client:
        asked = [[5 + number] * 40 for number in range(8)]
        assert wrong_answers(client, reference, asked, max_tokens=200) == []
        wait_until(lambda: idle(address), 2, "all blocks free")
        (metrics,) = {worker.process.metrics_address for worker in client.status().workers if worker.stage == "decode"}
        with urllib.request.urlopen(f"http://{metrics}/metrics") as page:
            samples = dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line[0] != "#")
        assert float(samples["overfill_decode_preemptions_total"]) > 0, "or the test proves nothing"
