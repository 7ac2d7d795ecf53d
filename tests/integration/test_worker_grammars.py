"""Tests that workers try a grammar before their engines compile it, although a router has let it through."""

import os
import signal

import psutil
import pytest
from grammar_bombs import GOOD, PROMPT, assert_only_their_requests_fail
from stacks import children, running_stack

from overfill.client import Client, SamplingParams


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
