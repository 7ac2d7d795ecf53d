"""Tests where the turns of agents' sessions go on a stack of mock workers, and what its status says of them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from http_calls import call
from mocks import mock_stack
from prometheus_client.parser import text_string_to_metric_families
from stacks import wait_until

from overfill.cli.main import main
from overfill.client import Client, Message, SamplingParams

AGENTS = {
    "claude": {"x-claude-code-session-id": "secret-claude"},
    "codex": {"session-id": "secret-codex"},
    "opencode": {"x-session-id": "secret-opencode"},
}


@pytest.fixture(scope="module")
def stack(tiny_pair):
    with mock_stack(tiny_pair, prefill=3, decode=3, http=0) as running:
        yield running


def wait_for_reports(stack):
    """Waits until the router knows of all answers that they have ended: until then they count as load."""
    workers = stack.router.roster.workers()
    wait_until(
        lambda: not any(worker.requests for worker in workers), 10, "all workers have reported that they are idle"
    )


def ask(stack, headers, turn, **fields):
    """Sends a turn of a conversation, whose beginning all agents share; returns the workers and the cached tokens."""
    messages = [{"role": "user", "content": "The instructions of an agent. " * 8 + " and then" * (20 * turn)}]
    body = {"model": stack.router.cores[0].handler.tiers.model, "messages": messages, "max_tokens": 2, **fields}
    wait_for_reports(stack)
    reply = call(f"{stack.url}/v1/chat/completions", body, headers=headers)
    assert reply.status == 200, reply.body
    answer = json.loads(reply.body)
    (told,) = answer["overfill"]["choices"]
    return (told["prefill_worker"], told["decode_worker"]), answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_turns_of_each_session_go_to_one_worker_of_each_stage(stack):
    where = {agent: set() for agent in AGENTS}
    for turn in range(4):
        for agent, headers in AGENTS.items():
            workers, cached = ask(stack, headers, turn)
            where[agent].add(workers)
            assert not turn or cached, agent
    assert [len(workers) for workers in where.values()] == [1] * len(AGENTS)
    assert len({decode for workers in where.values() for _, decode in workers}) == len(AGENTS), "they spread"
    for fields in ({"prompt_cache_key": "secret-codex"}, {"session_id": "secret-codex"}):
        assert {ask(stack, {}, 4, **fields)[0]} == where["codex"]
    decode = next(iter(where["codex"]))[1]
    wait_for_reports(stack)
    with Client(stack.grpc) as client:
        answer = client.chat([Message("user", "x")], sampling=SamplingParams(max_tokens=2), session="secret-codex")
    assert answer.decode_worker == decode
    asked = {"model": stack.router.cores[0].handler.tiers.model}
    messages = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for path, body in (
        ("/v1/responses", {"input": "x", "max_output_tokens": 2, "prompt_cache_key": "secret-codex"}),
        ("/v1/messages", {**messages, "metadata": {"user_id": '{"session_id": "secret-codex"}'}}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 2, "session_id": "secret-codex"}),
    ):
        wait_for_reports(stack)
        told = json.loads(call(f"{stack.url}{path}", {**asked, **body}).body)["overfill"]
        assert told.get("choices", [told])[0]["decode_worker"] == decode, path


def test_status_top_and_metrics_count_sessions_without_their_names(stack, capsys):
    for turn in range(6):
        ask(stack, AGENTS["codex"], turn)
    status = json.loads(call(f"{stack.url}/status").body)
    assert 1 <= status["sessions"] <= len(AGENTS)
    assert 0 < status["cached_share"] < 1
    busiest = status["busiest_sessions"][0]
    assert busiest["turns"] >= 6
    assert 0 < busiest["cached_share"] < 1
    for command in (["top", "--once"], ["status"]):
        assert main([*command, f"--address={stack.grpc}"]) == 0
        shown = capsys.readouterr().out
        assert f"{status['sessions']} session" in shown
        assert "secret" not in shown
        assert (busiest["id"] in shown) == (command[0] == "top")
    rendered = stack.router._metrics.render().decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(rendered)
        for sample in family.samples
    }
    assert samples["overfill_router_sessions",] == status["sessions"]
    assert samples["overfill_router_requests_total", "chat", "ok", "default"] >= 6
    for api in ("completions", "responses", "messages", "grpc"):
        assert samples["overfill_router_requests_total", api, "ok", "default"] == 1
    assert samples["overfill_router_prompt_tokens_total", "chat"] > 0
    assert samples["overfill_router_completion_tokens_total", "chat", "default"] >= 12
    assert "secret" not in json.dumps(status) + rendered


@pytest.mark.parametrize("drop", [True, False])
def test_prompts_with_other_attribution_lines_share_their_beginning(tiny_pair, drop):
    with mock_stack(tiny_pair, http=0, drop_attribution=drop) as stack:
        model = stack.router.cores[0].handler.tiers.model

        def send(path, body, **more):
            return json.loads(call(f"{stack.url}{path}", {"model": model, **body, **more}).body)

        def chat(line, rest):
            messages = [{"role": "system", "content": f"{line}\n{rest}"}, {"role": "user", "content": "go"}]
            usage = send("/v1/chat/completions", {"messages": messages}, max_tokens=1)["usage"]
            assert send("/tokenize", {"messages": messages})["count"] == usage["prompt_tokens"]
            return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]

        def message(line, rest):
            body = {
                "system": [{"type": "text", "text": text} for text in (line, rest)],
                "messages": [{"role": "user", "content": "go"}],
            }
            usage = send("/v1/messages", body, max_tokens=1)["usage"]
            counted = send("/v1/messages/count_tokens", body)["input_tokens"]
            assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
            return usage["cache_read_input_tokens"], counted

        for ask_once, rest in ((chat, "You are one agent. " * 12), (message, "You are another agent. " * 12)):
            lines = [f"x-anthropic-billing-header: cc_version=2.1.332.{number}; cch=a1b2c;" for number in range(2)]
            (first, _), (cached, prompt) = [ask_once(line, rest) for line in lines]
            assert first < 64
            assert (cached > 0.8 * prompt) is drop


def test_a_session_with_one_request_does_not_wait_for_all_of_another(tiny_pair):
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    with (
        mock_stack(tiny_pair, workers={"max_num_seqs": 1, "step": 0.03}) as stack,
        Client(stack.grpc) as client,
        ThreadPoolExecutor(21) as threads,
    ):
        ended = []

        def ask_in(session):
            client.generate([5, 6, 7], sampling=sampling, session=session)
            ended.append(session)

        busy = [threads.submit(ask_in, "busy") for _ in range(20)]
        dispatcher = stack.router.dispatcher
        wait_until(lambda: dispatcher.num_jobs + len(ended) == 20, 10, "all requests of the busy session have arrived")
        waiting = dispatcher.num_waiting
        threads.submit(ask_in, "other").result()
        behind = 20 - (len(ended) - 1)
        for future in busy:
            future.result()
    assert waiting > 6
    assert behind > waiting - 6, "it goes before most of those that waited when it came"
