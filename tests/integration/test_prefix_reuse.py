"""Tests multi-turn chats on real stacks: only KV that the full model computed is reused."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai
import pytest
import torch
from kv_pulls import opened, prefill_process, pull
from stacks import idle, loads, running_stack, wait_accepted, wait_until

from overfill.api import key_file as keys
from overfill.client import Client, SamplingParams
from overfill.kv.spec import KvSpec
from overfill.model.manifest import Pair
from overfill.pair.reference import TwoStageReference, judge, summarise

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
    """Address, OpenAI URL and client of a stack with prefix caches. Each test uses prompts of its own."""
    with running_stack(tiny_pair, http=0) as (stack, address), Client(address) as client:
        yield address, stack.spec.openai_urls(stack.placed.addresses)[0], client


def test_chats_reuse_the_prompt_and_recompute_what_the_decoder_wrote(stack, reference):
    address, _, client = stack
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
    *_, client = stack
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


def test_a_small_cache_evicts_under_load_and_stays_right(tiny_pair, reference):
    # 64 blocks: three chats of up to 20 blocks each do not fit beside what is cached of the others.
    with running_stack(tiny_pair, kv_memory="1MiB") as (_, address), Client(address) as client:
        with ThreadPoolExecutor(3) as pool:
            chats = list(pool.map(lambda seed: chat(client, seed), range(20, 26)))
        wait_until(lambda: idle(address), 5, "all blocks free")
    summary = judged(reference, chats)
    assert summary.passed, str(summary)


@pytest.fixture(scope="module")
def hello(tiny_pair):
    with prefill_process(f"--pair={tiny_pair}", "--kv-memory=4MiB") as hello:
        yield hello


@pytest.fixture
async def worker(tiny_pair, hello):
    """Returns a function that pulls a prompt's KV from a prefill worker."""
    peer, spec, layer_map = opened(hello), KvSpec.from_proto(hello.kv), Pair.load(tiny_pair).layer_map
    with ThreadPoolExecutor(2) as executor:
        yield partial(pull, peer, spec, layer_map, executor=executor)
    await peer.close()


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


def test_every_chunk_of_a_stream_has_the_cached_tokens(stack):
    options = {"include_usage": True, "continuous_usage_stats": True}
    with openai.OpenAI(base_url=stack[1], api_key="none", max_retries=0) as client:
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
        wait_accepted(address, c)
        assert by_grpc(c) == 0


async def test_kv_that_the_decode_worker_holds_is_not_sent(worker):
    prompt = list(range(100, 170))
    whole, everything = await worker(prompt)
    rest, stats = await worker(prompt, held_tokens=48)
    assert stats.kv_bytes == everything.kv_bytes * (70 - 48) // 70
    assert rest.k[:, :3].count_nonzero() == 0
    assert torch.allclose(rest.k[:, 3:], whole.k[:, 3:], atol=1e-4)
