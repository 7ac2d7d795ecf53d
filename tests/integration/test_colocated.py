"""Stacks with a worker of both stages: right tokens, clear errors, and growth to separate pools without a restart."""

from __future__ import annotations

import os
import signal
import urllib.request

import pytest
from stacks import Load, idle, loads, running_stack, wait_until
from vllm_stacks import GREEDY, prompts, wrong_answers

from overfill.client import Client, SamplingParams
from overfill.errors import PromptTooLong, Unavailable
from overfill.pair.llm import LLM
from overfill.pair.reference import TwoStageReference, judge
from overfill.stack.describe import describe
from overfill.stack.placed import PlacedWorker, place

SEEDED = SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True, logprobs=2)


def test_one_worker_answers_as_the_reference_and_frees_its_blocks(tiny_pair):
    with running_stack(tiny_pair, 0, 0, colocated=1) as (_, address), Client(address) as client:
        assert wrong_answers(client, TwoStageReference(tiny_pair), prompts(12)) == []
        answer = client.generate([5, 6, 7] * 9, sampling=SEEDED)
        alone = LLM(tiny_pair, dtype="float32", kv_memory=4 << 20, threads=1).generate([[5, 6, 7] * 9], SEEDED)[0]
        assert list(answer.token_ids) == alone.token_ids, "the same as without sockets, with the same seed"
        assert (answer.prefill_worker, answer.decode_worker) == ("colocated-0", "colocated-0")
        wait_until(lambda: idle(address), 5, "all blocks of both caches free")
        entries = [(w.id, w.stage) for w in client.status().workers]
        assert entries == [("colocated-0", "prefill"), ("colocated-0", "decode")]


def test_a_prompt_that_does_not_fit_and_the_loss_of_the_only_worker_are_said_clearly(tiny_pair):
    lines = []
    with (
        running_stack(tiny_pair, 0, 0, colocated=1, lines=lines, absent_after="1") as (stack, address),
        Client(address) as client,
    ):
        with pytest.raises(PromptTooLong, match=r"shorten the prompt|context"):
            client.generate([1] * 600, sampling=SamplingParams(**GREEDY, max_tokens=4))
        wait_until(lambda: idle(address), 5, "nothing is held for it")
        child = stack.worker("colocated-0")
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: child.returncode is not None, 10, "the worker is dead")
        with pytest.raises(Unavailable, match=r"no (prefill|decode) worker has reported for"):
            client.generate([1] * 8, sampling=SamplingParams(**GREEDY, max_tokens=4))
        stack.restart("colocated-0")
        wait_until(lambda: loads(address).keys() == {"colocated-0"}, 60, "the worker is back")
        assert len(client.generate([1] * 8, sampling=SamplingParams(**GREEDY, max_tokens=4)).token_ids) == 4


def test_a_small_cache_preempts_and_every_answer_is_still_right(tiny_pair):
    """More sequences than the decoder's cache holds: some lose their blocks and are prefilled again, here."""
    with (
        running_stack(tiny_pair, 0, 0, colocated=1, kv_memory="640KiB", max_model_len="380") as (_, address),
        Client(address) as client,
    ):
        assert wrong_answers(client, TwoStageReference(tiny_pair), prompts(8), max_tokens=100) == []
        wait_until(lambda: idle(address), 5, "all blocks free")
        (metrics,) = {worker.process.metrics_address for worker in client.status().workers}
        with urllib.request.urlopen(f"http://{metrics}/metrics") as page:
            samples = dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line[0] != "#")
        assert float(samples["overfill_decode_preemptions_total"]) > 0, "or the test proves nothing"
        assert float(samples["overfill_decode_local_prefills_total"]) > 8, "and again after each preemption"


PROMPTS = [[(seed * 31 + k) % 200 for k in range(48 + seed)] for seed in range(4)]


def test_a_stack_grows_to_separate_pools_without_a_restart(tiny_pair):
    with running_stack(tiny_pair, 0, 0, colocated=1) as (stack, address), Load(address, 4, 24, PROMPTS) as load:

        def workers(since, stage):
            """Returns the workers of a stage that took part in answers after the first ``since``."""
            return {getattr(answer, f"{stage}_worker") for answer in load.answers[since:]}

        load.wait_for_answers(8)
        later = place(describe(tiny_pair, decode=2, settings={"dtype": "float32", "kv_memory": "4MiB"}))
        for worker in later.workers:
            config = worker.config.model_copy(update={"routers": stack.placed.join_addresses, "max_model_len": 512})
            stack._workers.append(stack._spawn_worker(PlacedWorker(worker.pool, worker.kind, config)))
        wait_until(lambda: len(loads(address)) == 4, 60, "the new workers have joined")
        joined = len(load.answers)
        everywhere = {"decode-0", "decode-1", "colocated-0"}
        wait_until(
            lambda: everywhere <= workers(joined, "decode") and "prefill-0" in workers(joined, "prefill"),
            30,
            "requests spread over all workers",
        )
        with Client(address) as client:
            client.drain("colocated-0")
        child = stack.worker("colocated-0")
        wait_until(lambda: child.returncode is not None, 30, "the first worker has drained")
        assert child.returncode == 0
        drained = len(load.answers)
        load.wait_for_answers(2)
        assert workers(drained, "prefill") == {"prefill-0"}
    reference = TwoStageReference(tiny_pair)
    prompts = {len(prompt): prompt for prompt in PROMPTS}
    for ids, length, reason in {(a.token_ids, a.usage.prompt_tokens, a.finish_reason) for a in load.answers}:
        assert judge(reference, prompts[length], ids, reason, 24).correct
