"""Tests what becomes of a grammar that a router has let through: at its worker, and in errors of an answer."""

import os
import signal

import psutil
import pytest
from grammar_bombs import GOOD, PROMPT, assert_only_their_requests_fail
from http_calls import call
from mocks import mock_stack
from stacks import children, running_stack

from overfill.client import Client, SamplingParams
from overfill.request.grammar import GrammarFailed
from services.router.running_answer import RunningAnswer

SCHEMA = {"type": "object"}
HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
WITH_GRAMMAR = {
    "/v1/chat/completions": HI
    | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    "/v1/responses": {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}},
    "/v1/messages": HI | {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
}
FIELDS = {
    "/v1/chat/completions": "response_format",
    "/v1/responses": "text.format",
    "/v1/messages": "output_config.format",
}


@pytest.mark.parametrize("colocated", [False, True], ids=["stages", "colocated"])
async def test_a_bomb_at_a_worker_fails_its_own_request(tiny_pair, colocated):
    counts = {"prefill": 0, "decode": 0, "colocated": 1} if colocated else {}
    with running_stack(tiny_pair, **counts) as (stack, address):
        await assert_only_their_requests_fail(address)
        for child in stack._workers:
            (helper,) = psutil.Process(child.pid).children()
            assert not helper.net_connections("inet")


def test_helpers_end_with_their_processes(tiny_pair):
    """The router is killed, the workers are drained."""
    with running_stack(tiny_pair) as (stack, address):
        with Client(address) as client:
            client.generate(PROMPT, sampling=SamplingParams(max_tokens=8, grammar=GOOD))
        (router,) = children(stack, "router")
        pids = [router.pid, *(child.pid for child in stack._workers)]
        helpers = [helper for pid in pids for helper in psutil.Process(pid).children()]
        assert len(helpers) == 3
        of_router = psutil.Process(router.pid).children()
        os.kill(router.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(of_router, 30)
        assert not alive
    _, alive = psutil.wait_procs(helpers, 30)
    assert not alive


def test_a_grammar_that_fails_in_an_answer_has_the_client_s_name(monkeypatch):
    """Grammars may become too complex only as the answer grows, after the checks of the request."""
    whole_next = RunningAnswer.next

    async def failing_next(answer):
        delta = await whole_next(answer)
        if answer in begun:
            raise GrammarFailed("sampling.grammar", "is too complex")
        begun.append(answer)
        return delta

    monkeypatch.setattr(RunningAnswer, "next", failing_next)
    with mock_stack("mock") as running:
        for path, body in WITH_GRAMMAR.items():
            for stream in (False, True):
                begun = []
                reply = call(running.url + path, body | {"model": "mock", "stream": stream})
                assert reply.status == (200 if stream else 400)
                assert f"'{FIELDS[path]}' is too complex" in reply.body.decode(), (path, stream)
