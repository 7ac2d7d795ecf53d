"""Stacks with vLLM workers answer as the reference does: both stages on vLLM, and each mixed with OverFill's engine."""

import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from stacks import children, idle, loads, running_stack, wait_until
from vllm_stacks import GREEDY, engines, prompts, wrong_answers

from overfill.cli.main import main
from overfill.client import Client, SamplingParams
from overfill.errors import RequestCancelled
from overfill.pair.reference import judge


@pytest.fixture(scope="module")
def both(vllm_pair):
    """A stack with both stages on vLLM and two decode workers."""
    with running_stack(vllm_pair, decode=2, **engines("vllm", "vllm")) as (stack, address):
        yield stack, address


@pytest.fixture
def client(both):
    with Client(both[1]) as client:
        yield client


@pytest.mark.parametrize(("prefill", "decode"), [("vllm", "overfill"), ("overfill", "vllm")])
def test_mixed_engines_answer_as_the_reference(vllm_pair, reference, prefill, decode):
    with running_stack(vllm_pair, **engines(prefill, decode)) as (_, address), Client(address) as client:
        assert wrong_answers(client, reference, prompts(24)) == []
        answer = client.generate([5, 6, 7], sampling=SamplingParams(**GREEDY, max_tokens=2))
        assert [prefill in answer.prefill_engine, decode in answer.decode_engine] == [True, True]
        wait_until(lambda: idle(address), 2, "all blocks free")


def test_both_stages_on_vllm_answer_as_the_reference(both, client, reference):
    assert wrong_answers(client, reference, prompts(24)) == []
    wait_until(lambda: idle(both[1]), 2, "all blocks free")


def test_verify_passes(both, vllm_pair, tmp_path, capsys):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"What comes after {i} blocks?"}) + "\n" for i in range(8)))
    arguments = [f"--questions={questions}", "--max-tokens=24", f"--address={both[1]}", f"--pair={vllm_pair}"]
    assert main(["verify", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "8/8 correct (8 identical, 0 ties)"


def wrong_turns(client, reference, turns=6):
    """Leads a chat, each of whose prompts has the earlier answers; returns the turns that are not the reference's."""
    draw, prompt, wrong = random.Random(3), [], []
    for turn in range(turns):
        prompt += [draw.randrange(2, 500) for _ in range(20)]
        answer = client.generate(prompt, sampling=SamplingParams(**GREEDY, max_tokens=40))
        if not judge(reference, prompt, answer.token_ids, answer.finish_reason, 40).correct:
            wrong.append(turn)
        prompt += answer.token_ids
    return wrong


def test_kv_is_the_full_model_s_in_every_turn_of_a_chat(client, reference):
    assert wrong_turns(client, reference) == []


def test_without_the_cure_a_later_turn_finds_kv_of_the_decoder(vllm_pair, reference):
    """Shows that the test above can fail: here blocks of answers are shared, as vLLM would by itself."""
    faults = {"decode-0": "share-answers"}
    with (
        running_stack(vllm_pair, faults=faults, **engines("overfill", "vllm")) as (_, address),
        Client(address) as client,
    ):
        assert wrong_turns(client, reference)


def test_the_same_seed_draws_the_same_answer_on_either_engine(vllm_pair, both, client):
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=30, ignore_eos=True, logprobs=2)
    asked = prompts(6, seed=1)
    on_vllm = [client.generate(prompt, sampling=sampling) for prompt in asked]
    with running_stack(vllm_pair, **engines("overfill", "overfill")) as (_, address), Client(address) as own:
        on_ours = [own.generate(prompt, sampling=sampling) for prompt in asked]
    assert [a.token_ids for a in on_vllm] == [a.token_ids for a in on_ours]


def test_cancelled_requests_leave_nothing_behind(both, client):
    """A tenth of the requests is cancelled at random, and no block is lost on either side."""
    draw = random.Random(5)
    sampling = SamplingParams(**GREEDY, max_tokens=24)
    cancelled = 0

    def ask(number):
        nonlocal cancelled
        stream = client.stream(prompts(12, seed=number)[number % 12], sampling=sampling)
        if number % 10 == 0:
            threading.Timer(draw.random() * 0.3, stream.cancel).start()
        try:
            for _ in stream:
                pass
        except RequestCancelled:
            cancelled += 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(200)))
    assert cancelled
    wait_until(lambda: idle(both[1]), 2, f"all blocks free: {loads(both[1])}")


def test_a_killed_decode_worker_s_answers_continue_on_another(both, client, reference):
    """The emitted tokens pass through the other worker's decoder and are not written again."""
    stack, _ = both
    prompt, sampling = prompts(9)[8], SamplingParams(**GREEDY, max_tokens=200)
    streams = [client.stream(prompt, sampling=sampling) for _ in range(4)]

    def read(stream):
        for _ in stream:
            time.sleep(0.002)
        return stream.answer

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(read, stream) for stream in streams]
        time.sleep(0.3)
        os.kill(children(stack, "decode")[0].pid, signal.SIGKILL)
        for answer in answers:
            done = answer.result(60)
            assert judge(reference, prompt, done.token_ids, done.finish_reason, 200).correct
