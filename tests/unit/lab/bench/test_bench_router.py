"""Tests the parts of ``overfill bench router``: client processes, bare servers, CPU clock."""

import os
import threading
import time

import pytest

from overfill.lab.bench.cpu_clock import cpu_seconds
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
            load = Load(protocol, address, make_request(protocol, "m", 7), 7, streams=5)
            with clients.running(load) as counts:
                found = wait_for(counts, lambda found: found.ended >= 200)
        assert found.failed == 0
        assert found.events == found.tokens
        assert 7 * found.ended <= found.tokens <= 7 * (found.ended + 5)
        assert found.ended < found.begun + 1 <= found.ended + 6
        assert len(found.cpu) == 2

    def test_an_event_with_two_tokens_counts_as_one(self, clients, protocol):
        with bare_server(protocol, recording(protocol, 2), SendingPace(step=0.01)) as (address, _):
            load = Load(protocol, address, make_request(protocol, "m", 3), 6, streams=3)
            with clients.running(load) as counts:
                found = wait_for(counts, lambda found: found.ended >= 10)
        assert found.failed == 0
        assert found.tokens == 2 * found.events

    def test_an_answer_without_all_its_tokens_has_failed(self, clients, protocol):
        with bare_server(protocol, recording(protocol), SendingPace()) as (address, _):
            load = Load(protocol, address, make_request(protocol, "m", 3), 4, streams=2)
            with clients.running(load) as counts:
                assert wait_for(counts, lambda found: found.failed >= 10).ended == 0

    def test_requests_at_a_rate_do_not_wait_for_answers(self, clients, protocol):
        with bare_server(protocol, recording(protocol), SendingPace(step=3600)) as (address, _):
            load = Load(protocol, address, make_request(protocol, "m", 2), 2, rate=200)
            with clients.running(load) as counts:
                found = wait_for(counts, lambda found: found.begun >= 50)
        assert found.ended == 0

    def test_a_bare_server_sends_what_was_recorded(self, protocol):
        with bare_server(protocol, recording(protocol), SendingPace()) as (address, _):
            assert record(protocol, address, "m") == recording(protocol)


def test_events_of_one_chunk_are_recorded_one_by_one():
    """The router joins the events that are ready into one write."""
    parts = recording("http")
    joined = Recording((), parts.head[0] + parts.token + parts.tail[0], ())
    with bare_server("http", joined, SendingPace()) as (address, _):
        assert record("http", address, "m") == parts


def test_a_server_that_refuses_is_counted(clients):
    with bare_server("http", recording("http"), SendingPace()) as (address, _):
        load = Load("http", address, b"GET no HTTP\r\n\r\n", 1, streams=2)
        with clients.running(load) as counts:
            assert wait_for(counts, lambda found: found.failed >= 10).begun == 0


def test_the_cpu_clock_is_that_of_all_threads():
    def burn():
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass

    start = cpu_seconds(os.getpid())
    thread = threading.Thread(target=burn)
    thread.start()
    thread.join()
    before = time.process_time()
    ours = cpu_seconds(os.getpid())
    assert before <= ours <= time.process_time()
    assert ours - start >= 0.1
