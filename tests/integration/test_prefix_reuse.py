"""Tests multi-turn chats on real stacks: only KV that the full model computed is reused."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from listening_registry import ListeningRegistry
from stacks import ForkedChild, children, idle, loads, running_stack, wait_until

from overfill.api import keys
from overfill.cli.main import main
from overfill.client import Client, SamplingParams, Unauthenticated
from overfill.kv.cache import KvCache
from overfill.kv.peers import PrefillPeer
from overfill.kv.receiver import PromptPull
from overfill.kv.spec import KvSpec
from overfill.model.manifest import Pair
from overfill.pair.reference import TwoStageReference, judge, summarise
from overfill.stack.child import stop
from overfill.stack.process_runner import child_environment
from overfill.v1 import decode_pb2, prefill_pb2

BLOCK = 16
TURNS = 8
MAX_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)


def full_blocks(tokens):
    return tokens // BLOCK * BLOCK


def chat(client, seed):
    """Runs a chat of token ids, each prompt being the chat so far plus a turn; returns [(prompt, answer)]."""
    rng = random.Random(seed)
    prompt, turns = [], []
    for _ in range(TURNS):
        prompt = [*prompt, *(rng.randrange(20, 490) for _ in range(rng.randrange(5, 40)))]
        answer = client.generate(prompt, sampling=GREEDY, trace=True)
        turns.append((prompt, answer))
        prompt = [*prompt, *answer.token_ids]
    return turns


@pytest.fixture(scope="module")
def reference(tiny_pair):
    return TwoStageReference(tiny_pair)


def judged(reference, chats):
    return summarise(
        [
            judge(reference, prompt, answer.token_ids, answer.finish_reason, MAX_TOKENS)
            for turns in chats
            for prompt, answer in turns
        ]
    )


@pytest.fixture(scope="module")
def stack(tiny_pair):
    """Address and client of a stack with prefix caches. Each test uses prompts of its own."""
    with running_stack(tiny_pair) as (_, address), Client(address) as client:
        yield address, client


def test_chats_reuse_the_prompt_and_recompute_what_the_decoder_wrote(stack, reference):
    address, client = stack
    with ThreadPoolExecutor(3) as pool:
        chats = list(pool.map(lambda seed: chat(client, seed), range(3)))
        for turns in chats:
            assert turns[0][1].usage.cached_tokens == turns[0][1].trace.held_tokens == 0
            for (before, answer), (prompt, now) in itertools.pairwise(turns):
                # The full model has computed the whole earlier prompt, so both workers hold its blocks. It has not
                # computed the answer, and the decoder's own KV of the answer is never reused.
                assert now.usage.cached_tokens == now.trace.cached_tokens == full_blocks(len(before))
                assert now.trace.held_tokens == full_blocks(len(before))
                assert full_blocks(len(before) + len(answer.token_ids)) > full_blocks(len(before))
                assert len(prompt) > len(before) + len(answer.token_ids)
        wait_until(lambda: idle(address), 5, "all blocks free")
        load = loads(address)
        assert load["prefill-0"].kv_blocks_cached > 0
        assert load["decode-0"].kv_blocks_cached > 0
        assert load["prefill-0"].prefix_hit_rate > 0.5
    summary = judged(reference, chats)
    assert summary.passed, str(summary)


def test_an_answer_that_a_stop_string_ends_has_the_usage_and_timing_of_one_that_its_worker_ends(stack):
    _, client = stack
    prompt = [20 + 11 * i % 470 for i in range(70)]
    client.generate(prompt, sampling=GREEDY)
    whole = client.generate(prompt, sampling=GREEDY, trace=True)
    cut = client.generate(prompt, sampling=GREEDY, trace=True, stop=[whole.text[-8:-4]])
    assert cut.stop
    assert cut.usage.completion_tokens > 1
    assert cut.usage.cached_tokens == whole.usage.cached_tokens == 64
    assert cut.codec == whole.codec == "raw"
    assert (cut.prefill_worker, cut.trace.held_tokens) == (whole.prefill_worker, whole.trace.held_tokens)
    # The timing that the scaling signals read.
    for part in ("decode", "handoff_exposed", "prefill_compute"):
        assert getattr(cut.timing, part) > 0


def test_without_caches_the_answers_are_the_same(stack, tiny_pair, reference):
    chats = [chat(stack[1], 7)]
    with running_stack(tiny_pair, prefix_cache="off") as (_, address), Client(address) as client:
        chats.append(chat(client, 7))
        assert all(load.kv_blocks_cached == 0 for load in loads(address).values())
        assert loads(address)["prefill-0"].prefix_hit_rate == 0
    assert all(answer.usage.cached_tokens == 0 for _, answer in chats[1])
    assert [answer.token_ids for _, answer in chats[0]] == [answer.token_ids for _, answer in chats[1]]
    assert judged(reference, chats).passed


def test_a_small_cache_evicts_under_load_and_stays_right(tiny_pair, reference):
    # 64 blocks: three chats of up to 20 blocks each do not fit beside what is cached of the others.
    with running_stack(tiny_pair, kv_memory="1MiB") as (_, address), Client(address) as client:
        with ThreadPoolExecutor(3) as pool:
            chats = list(pool.map(lambda seed: chat(client, seed), range(20, 26)))
        wait_until(lambda: idle(address), 5, "all blocks free")
    summary = judged(reference, chats)
    assert summary.passed, str(summary)


def test_another_worker_serves_a_chat_whose_worker_was_killed(tiny_pair, reference):
    with running_stack(tiny_pair, prefill=2, decode=2) as (stack, address), Client(address) as client:
        turns = chat(client, 30)
        name = turns[-1][1].decode_worker
        os.kill(next(c for c in children(stack, "decode") if c.name == name).pid, signal.SIGKILL)
        turns += chat(client, 30)
    assert judged(reference, [turns]).passed


@pytest.fixture
async def worker(tiny_pair):
    registry = ListeningRegistry()
    router = await registry.start()
    arguments = [
        f"--pair={tiny_pair}",
        f"--routers={router}",
        "--dtype=float32",
        "--kv-memory=4MiB",
        "--grace-period=1",
    ]
    command = [sys.executable, "-m", "services.prefill.main", *arguments]
    child = ForkedChild("prefill", command, child_environment({}, 1), lambda name, line: None)
    hello = await registry.next_worker(60)
    target = decode_pb2.AssignPrefill(
        worker_id=hello.worker_id,
        incarnation=hello.incarnation,
        address=hello.address,
        data_addresses=hello.data_addresses,
    )
    peer = PrefillPeer(target, 2, None)
    spec = KvSpec.from_proto(hello.kv)
    layer_map = Pair.load(tiny_pair).layer_map
    with ThreadPoolExecutor(2) as executor:

        async def pull(prompt, namespace="", held=0):
            cache = KvCache(spec, 8, BLOCK, torch.device("cpu"))
            request = prefill_pb2.StartPrefill(
                request_id="r",
                prompt_token_ids=prompt,
                sampling=SamplingParams(temperature=0).to_proto(),
                sample_first_token=True,
                cache_namespace=namespace,
            )
            handoff = PromptPull(peer, request, spec, layer_map, cache, list(range(8)), executor, held)
            await handoff.run(20.0, lambda token: None)
            return cache, handoff.stats

        yield pull
    await peer.close()
    stop([child], 5)
    await registry.stop()


async def test_tenants_do_not_share_and_cached_kv_is_what_was_computed(worker):
    prompt = list(range(100, 170))
    cold, stats = await worker(prompt, namespace="one")
    assert stats.cached_tokens == 0
    warm, stats = await worker(prompt, namespace="one")
    assert stats.cached_tokens == 64
    assert torch.equal(cold.k[:, :4], warm.k[:, :4])  # the same elements
    assert torch.allclose(cold.k, warm.k, atol=1e-4)
    _, stats = await worker(prompt, namespace="two")
    assert stats.cached_tokens == 0


def test_every_chunk_of_a_stream_has_the_cached_tokens(tiny_pair):
    options = {"include_usage": True, "continuous_usage_stats": True}
    with running_stack(tiny_pair, http=0) as (stack, _):
        url = stack.spec.openai_urls(stack.placed.addresses)[0]
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            fields = {"model": client.models.list().data[0].id, "prompt": list(range(30, 90)), "max_tokens": 8}
            client.completions.create(**fields)
            chunks = list(client.completions.create(**fields, stream=True, stream_options=options))
    assert len(chunks) > 2
    assert {chunk.usage.prompt_tokens_details.cached_tokens for chunk in chunks} == {48}


def test_keys_share_no_cache_over_either_protocol(tiny_pair, tmp_path):
    """No stage shares KV between keys, over gRPC or HTTP. Requests of one key share it over both."""
    file = tmp_path / "keys.json"
    a, b = keys.create(file, "a"), keys.create(file, "b")
    prompt = list(range(10, 10 + 5 * BLOCK))
    with running_stack(tiny_pair, http=0, api_keys=file) as (stack, address):
        url = stack.spec.openai_urls(stack.placed.addresses)[0]

        def by_grpc(key):
            with Client(address, api_key=key) as client:
                return client.generate(prompt, sampling=GREEDY).usage.cached_tokens

        def by_http(key):
            with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
                model = client.models.list().data[0].id
                answer = client.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0)
                return answer.usage.prompt_tokens_details.cached_tokens

        assert by_grpc(a) == 0
        assert by_grpc(a) > 0
        assert by_http(a) > 0
        assert by_http(b) == 0
        assert by_http(b) > 0
        assert by_grpc(b) > 0
        keys.revoke(file, "b")
        c = keys.create(file, "c")
        wait_until(lambda: _accepted(address, c), 20, "the router reads its keys again")
        assert by_grpc(c) == 0


def _accepted(address, key):
    with Client(address, api_key=key) as client:
        try:
            return bool(client.models())
        except Unauthenticated:
            return False


async def test_kv_that_the_decode_worker_holds_is_not_sent(worker):
    prompt = list(range(100, 170))
    whole, everything = await worker(prompt)
    rest, stats = await worker(prompt, held=48)
    assert stats.kv_bytes == everything.kv_bytes * (70 - 48) // 70
    assert rest.k[:, :3].count_nonzero() == 0
    assert torch.allclose(rest.k[:, 3:], whole.k[:, 3:], atol=1e-4)


def test_status_shows_the_hit_rate(stack, capsys):
    address, client = stack

    def tokens():
        load = loads(address)["prefill-0"]
        return load.prefix_tokens_found, load.prefix_tokens_looked_up

    found, looked_up = tokens()
    for _ in range(2):
        client.generate(list(range(100, 170)), sampling=GREEDY)
    assert tokens() == (found + 64, looked_up + 140)
    assert main(["status", "--json", f"--address={address}"]) == 0
    workers = {worker["id"]: worker for worker in json.loads(capsys.readouterr().out)["workers"]}
    assert workers["prefill-0"]["prefix_hit_rate"] == pytest.approx((found + 64) / (looked_up + 140))
