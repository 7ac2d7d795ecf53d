"""Tests workers on the mock engine in a stack, with one stage or both."""

from __future__ import annotations

import pytest
from mocks import mock_stack
from stacks import wait_until

from overfill.cli.main import main
from overfill.client import Client, SamplingParams
from overfill.rpc.channel import open_channel
from overfill.v1 import admin_pb2, admin_pb2_grpc

LONG = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)


def test_a_worker_with_both_stages_prefills_for_decode_workers_and_continues_their_answers(tiny_pair):
    with (
        mock_stack(tiny_pair, prefill=0, colocated=1, workers={"step": 0.005}) as stack,
        Client(stack.grpc) as client,
    ):
        expected = client.generate([5, 6, 7], sampling=LONG).token_ids
        streams = [client.stream([5, 6, 7], sampling=LONG).__enter__() for _ in range(4)]
        for stream in streams:
            next(stream)
        stack.call(stack.workers["decode-0"].stop())
        for stream in streams:
            for _ in stream:
                pass
        assert [stream.answer.token_ids for stream in streams] == [expected] * 4
        assert {stream.answer.decode_worker for stream in streams} == {"worker-0"}


def test_a_drain_names_its_worker(tiny_pair):
    with mock_stack(tiny_pair) as stack:
        address = next(worker.info.address for worker in stack.router.roster.workers() if worker.id == "decode-0")

        async def drain(worker_id):
            async with open_channel(address, None) as channel:
                return await admin_pb2_grpc.AdminStub(channel).Drain(admin_pb2.DrainRequest(worker_id=worker_id))

        with pytest.raises(Exception, match="this is decode-0, not prefill-0"):
            stack.call(drain("prefill-0"))
        stack.call(drain("decode-0"))
        wait_until(lambda: stack.router.roster.find("decode-0") is None, 10, "the drained worker has left")


def test_the_drain_of_the_last_worker_of_a_stage_says_what_happens_to_requests(tiny_pair, capsys):
    with mock_stack(tiny_pair, decode=2) as stack:
        arguments = ["--timeout=0", f"--address={stack.grpc}"]
        assert main(["drain", "decode-0", *arguments]) == 0
        assert capsys.readouterr().err == ""
        wait_until(lambda: stack.router.roster.find("decode-0") is None, 10, "the drained worker has left")
        assert main(["drain", "decode-1", *arguments]) == 0
        assert "decode-1 is the last decode worker: requests wait for another one to join" in capsys.readouterr().err
