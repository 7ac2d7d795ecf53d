"""Tests a prefill worker whose KV heads are on two addresses: decode workers of this version refuse it by name."""

from dataclasses import replace

import pytest
from mocks import mock_stack

from overfill.client import Client, SamplingParams
from overfill.errors import Incompatible
from overfill.v1 import kv_pb2


def test_a_mock_decode_worker_refuses_to_pull_only_a_part_of_the_heads(tiny_pair):
    with mock_stack(tiny_pair) as stack, Client(stack.grpc) as client:
        worker = stack.router.roster.prefill.get("prefill-0")
        (whole,) = worker.info.data_addresses
        assert whole == kv_pb2.DataAddress(address=worker.info.address, num_kv_heads=2)
        halves = [kv_pb2.DataAddress(address=whole.address, first_kv_head=n, num_kv_heads=1) for n in range(2)]
        worker.info = replace(worker.info, data_addresses=tuple(halves))
        message = r"data_addresses: this version pulls from one address.*\[0, 1\), \[1, 2\)"
        with pytest.raises(Incompatible, match=message):
            client.generate([5, 6, 7], sampling=SamplingParams(max_tokens=4))
