"""Tests the parts of ``overfill bench router``: client processes, bare servers, CPU clock."""

import time

import pytest

from overfill.lab.bench.router.bare_server import Recording, SendingPace, bare_server
from overfill.lab.bench.router.load import Load, LoadProcesses
from overfill.lab.bench.router.recording import make_request, record
from overfill.v1 import inference_pb2


def http_event(tokens):
    return b'data: {"delta":{"content":"%s"}}\n\n' % (b"~" * tokens)


def grpc_event(tokens):
    delta = inference_pb2.Delta(token_ids=[126] * tokens, text="~" * tokens)
    return inference_pb2.GenerateResponse(delta=delta).SerializeToString()


def recording(protocol, tokens=1):
    """An answer whose event of a token holds ``tokens`` tokens."""
    if protocol == "http":
        return Recording((b'data: {"delta":{"role":"assistant"}}\n\n',), http_event(tokens), (b"data: [DONE]\n\n",))
    accepted = inference_pb2.GenerateResponse(accepted=inference_pb2.Accepted(request_id="a"))
    finished = inference_pb2.GenerateResponse(finished=inference_pb2.Finished())
    return Recording((accepted.SerializeToString(),), grpc_event(tokens), (finished.SerializeToString(),))


def wait_for(counts, condition):
    deadline = time.monotonic() + 60
    while not condition(found := counts()):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def clients():
    with LoadProcesses(2) as clients:
        yield clients


@pytest.mark.parametrize("protocol", ["http", "grpc"])
class TestLoad:
    def test_every_token_of_every_answer_is_counted(self, clients, protocol):
        with bare_server(protocol, recording(protocol), SendingPace(step=0.001)) as (address, _):
            load = Load(protocol, address, (make_request(protocol, "m", 7),), 7, streams=5)
            with clients.running(load) as counts:
                found = wait_for(counts, lambda found: found.ended >= 200)
        assert found.failed == 0
        assert found.events == found.tokens
        assert 7 * found.ended <= found.tokens <= 7 * (found.ended + 5)
        assert found.ended < found.begun + 1 <= found.ended + 6
        assert len(found.cpu) == 2

    def test_an_answer_without_all_its_tokens_has_failed(self, clients, protocol):
        with bare_server(protocol, recording(protocol), SendingPace()) as (address, _):
            load = Load(protocol, address, (make_request(protocol, "m", 3),), 4, streams=2)
            with clients.running(load) as counts:
                assert wait_for(counts, lambda found: found.failed >= 10).ended == 0

    def test_a_bare_server_sends_what_was_recorded(self, protocol):
        with bare_server(protocol, recording(protocol), SendingPace()) as (address, _):
            assert record(protocol, address, "m") == recording(protocol)


@pytest.mark.parametrize(
    ("api", "event", "end"),
    [
        ("chat", '{"delta":{"content":"~"}}', '{"delta":{}}'),
        ("responses", '{"type":"output_text.delta","delta":"~"}', '{"type":"output_text.done","text":"~~~"}'),
        ("messages", '{"delta":{"type":"text_delta","text":"~"}}', '{"type":"message_stop"}'),
    ],
)  # fmt: skip
def test_the_tokens_of_each_api_are_counted_once(clients, api, event, end):
    token, tail = (f"data: {data}\n\n".encode() for data in (event, end))
    answer = Recording((b"event: first\ndata: {}\n\n",), token, (tail,))
    with bare_server("http", answer, SendingPace(step=0.001)) as (address, _):
        load = Load("http", address, (make_request("http", "m", 3),), 3, streams=2, api=api)
        with clients.running(load) as counts:
            found = wait_for(counts, lambda found: found.ended >= 20)
    assert found.failed == 0
    assert found.events == found.tokens
