"""Tests several tasks over one prompt on a real stack: what each writes, what the prompt costs, and chats."""

from __future__ import annotations

import io
import json
import os
import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from http_calls import call
from peft_adapters import add_tiny_adapter
from prometheus_client.parser import text_string_to_metric_families
from stacks import idle, loads, running_stack, wait_until

from overfill.cli.main import main
from overfill.client import Client, Message, ModelNotFound, SamplingParams
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair
from overfill.pair.reference import TwoStageReference, judge_parts, summarise
from overfill.request.answer_start import answer_start

TASKS = {"planner": 0, "coder": 0, "judge": 7, "summary": 40}
"""Tokens at the prompt's end that each task computes; 0 means the generation prompt, or the last token."""

MAX_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "identity", identity=True)


@pytest.fixture(scope="module")
def tasks(identity, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "adapters"
    for seed, (name, tail) in enumerate(TASKS.items()):
        add_tiny_adapter(Pair.load(identity), folder, name, seed=seed, tail_tokens=tail)
    return folder


@pytest.fixture(scope="module")
def stack(identity, tasks):
    with running_stack(identity, decode=2, http=0, adapters=tasks) as running:
        yield running


@pytest.fixture
def client(stack):
    with Client(stack[1]) as client:
        yield client
        wait_until(lambda: idle(stack[1]), 20, "all blocks free")


def counters(client):
    """Sums of the workers' samples over all workers, by name without its beginning and by values of the labels."""
    total = Counter()
    for worker in client.status().workers:
        reply = call(f"http://{worker.process.metrics_address}/metrics")
        for family in text_string_to_metric_families(reply.body.decode()):
            for sample in family.samples:
                total[(sample.name.removeprefix("overfill_"), *sample.labels.values())] += sample.value
    return total


def test_every_task_writes_what_plain_peft_writes_although_a_worker_dies(stack, identity, tasks, tmp_path, capsys):
    questions = [f"Question {i}: what comes after {i * 7} blocks of sixteen tokens?" for i in range(32)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    arguments = [f"--questions={file}", f"--max-tokens={MAX_TOKENS}", f"--address={stack[1]}", f"--pair={identity}"]
    arguments += [f"--adapters={tasks}", *(f"--adapter={name}" for name in TASKS), "--concurrency=8", "--json"]
    victim = stack[0].worker("decode-0")
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(main, ["verify", *arguments])
        wait_until(lambda: loads(stack[1])["decode-0"].running >= 2, 60, "it writes several answers at once", 0.002)
        os.kill(victim.pid, signal.SIGKILL)
        code = verified.result()
    found = json.loads(capsys.readouterr().out)
    assert (code, found["failures"]) == (0, [])
    assert {one["tier"]: one["identical"] for one in found["tiers"]} == dict.fromkeys(["default", *TASKS], 32)
    stack[0].restart(victim.name)
    wait_until(lambda: "decode-0" in loads(stack[1]), 60, "the worker is back")


def test_four_tasks_at_once_cost_one_prompt(stack, client):
    same = ["planner", "coder", "planner", "coder"]
    prompt = random.Random(1).choices(range(20, 490), k=301)
    before = counters(client)
    answers = client.fan_out(prompt, same, sampling=GREEDY)
    wait_until(lambda: idle(stack[1]), 20, "all metrics are of ended requests")
    spent = counters(client)
    spent.subtract(before)
    assert answers[0].token_ids == answers[2].token_ids != answers[1].token_ids == answers[3].token_ids
    workers = {answer.decode_worker for answer in answers}
    assert spent["prefill_prefix_tokens_total", "miss"] <= 1.1 * len(prompt)
    assert spent["decode_handoff_seconds_count", "raw"] == len(workers)
    shared = spent["decode_shared_prompts_total", "transfer"] + spent["decode_shared_prompts_total", "cache"]
    assert shared == len(same) - len(workers)
    assert spent["decode_prompt_tokens_computed_total",] == 0


def test_the_prompts_of_a_chat_of_many_tasks_are_the_full_models_throughout(stack, client, identity, tasks):
    reference = TwoStageReference(identity)
    references = reference.with_adapters({name: tasks / name for name in TASKS}) | {"default": reference}
    before = counters(client)

    def chat(seed):
        rng, prompt, turns = random.Random(seed), [], []
        for turn in range(6):
            prompt = [*prompt, *rng.choices(range(20, 490), k=rng.randrange(5, 40))]
            writer = (*references,)[(seed + turn) % len(references)]
            answer = client.generate(prompt, tier=writer, sampling=GREEDY)
            turns.append((writer, prompt, answer))
            prompt = [*prompt, *answer.token_ids]
        return turns

    with ThreadPoolExecutor(3) as pool:
        turns = [turn for turns in pool.map(chat, range(3)) for turn in turns]
    judged = [
        judge_parts(
            references, [(writer, 0)], prompt, answer.token_ids, answer.finish_reason, MAX_TOKENS,
            answer_start=None if writer == "default" else answer_start(len(prompt), TASKS[writer], 0),
        )
        for writer, prompt, answer in turns
    ]  # fmt: skip
    summary = summarise(judged)
    assert (summary.identical, summary.answers) == (len(turns), len(turns)), str(summary)
    wait_until(lambda: idle(stack[1]), 20, "all metrics are of ended requests")
    spent = counters(client)
    spent.subtract(before)
    assert spent["decode_prefix_tokens_total", "hit"] > 0, "the turns reused the prompts before them"
    assert spent["decode_prompt_tokens_computed_total",] == 0


def test_clients_name_the_task_in_the_model(stack, client, capsys, monkeypatch):
    url = stack[0].spec.openai_urls(stack[0].placed.addresses)[0]
    models = [model["id"] for model in json.loads(call(f"{url}/models").body)["data"]]
    assert models == ["identity", *(f"identity:{task}" for task in sorted(TASKS))]
    question, greedy = "Name a colour.", SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    answers = client.fan_out([Message("user", question)], [*TASKS], sampling=greedy)
    assert len({answer.text for answer in answers}) == len(TASKS)
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": MAX_TOKENS, "temperature": 0}
    for task, answer in zip(TASKS, answers, strict=True):
        assert answer.tier == task
        reply = json.loads(call(f"{url}/chat/completions", {"model": f"identity:{task}", **body}).body)
        assert reply["choices"][0]["message"]["content"] == answer.text
        options = [f"--address={stack[1]}", f"--model=identity:{task}", "--greedy", f"--max-tokens={MAX_TOKENS}"]
        for command in (["generate", question], ["chat"]):
            monkeypatch.setattr("sys.stdin", io.StringIO(question))
            assert main([*command, *options]) == 0
            assert capsys.readouterr().out == f"{answer.text}\n"
    with pytest.raises(ModelNotFound, match="'nobody'"):
        client.generate(question, tier="nobody")
