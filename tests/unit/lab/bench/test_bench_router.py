"""Tests the parts of ``overfill bench router``: its client, the bare server, and the rows of its report."""

import os
import socket
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest

from overfill.lab.bench.router.cost import RouterFigures, measure_router, rows
from overfill.lab.bench.router.load import HttpLoad, running
from overfill.lab.peers.process import PeerFailed
from overfill.lab.peers.routers import RunningRouter, bare, dynamo

HEAD = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TAIL = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1}}\n\ndata: [DONE]\n\n'


def event(text):
    return b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % text


def wait_for(counts, condition):
    deadline = time.monotonic() + 60
    while not condition(found := counts()):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


@pytest.fixture
def peer():
    """A server that answers each request with what it is given, in pieces. Yields a function that starts it."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections, threads = [], []

    def answer(connection, pieces):
        with suppress(OSError):  # the client has gone
            while b"\r\n\r\n" in connection.recv(1 << 16):
                for piece in pieces:
                    connection.sendall(piece)

    def accept(pieces):
        while True:
            try:
                connections.append(listener.accept()[0])
            except OSError:
                return
            threads.append(threading.Thread(target=answer, args=(connections[-1], pieces), daemon=True))
            threads[-1].start()

    def start(pieces, token=b"~"):
        threading.Thread(target=accept, args=(pieces,), daemon=True).start()
        return RunningRouter(f"127.0.0.1:{listener.getsockname()[1]}", "m", "a peer", (os.getpid(),), token=token)

    start.connections, start.threads = connections, threads
    yield start
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for connection in connections:
        connection.close()


def chunked(*parts):
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks


class TestClient:
    @pytest.mark.parametrize("quick_ack", [False, True])
    def test_every_token_of_every_answer_is_counted(self, quick_ack):
        with bare(0.001, 5) as server, running(HttpLoad(server, 7, streams=5, quick_ack=quick_ack)) as counts:
            found = wait_for(counts, lambda found: found.ended >= 200)
        assert found.failed == 0
        assert found.events == found.tokens
        assert 7 * found.ended <= found.tokens <= 7 * (found.ended + 5)
        assert found.ended <= len(found.ttft) <= found.ended + 5

    def test_requests_at_a_rate_are_sent_whether_or_not_others_have_ended(self):
        with bare(3600, 20) as server, running(HttpLoad(server, 2, rate=500)) as counts:
            found = wait_for(counts, lambda found: len(found.ttft) >= 20)
        assert found.ended == found.failed == 0

    def test_a_load_that_runs_once_sends_no_further_request(self):
        with bare(0.001, 3) as server:
            with running(HttpLoad(server, 1, streams=3, once=True)) as counts:
                wait_for(counts, lambda found: found.ended == 3)
            assert counts().ended == 3

    def test_events_and_chunks_may_be_cut_anywhere(self, peer):
        whole = chunked(HEAD + event(b"~"), event(b"~~")[:20], event(b"~~")[20:] + TAIL.replace(b":1}", b":3}"))
        server = peer([whole[at : at + 7] for at in range(0, len(whole), 7)])
        with running(HttpLoad(server, 3, streams=1)) as counts:
            found = wait_for(counts, lambda found: found.ended >= 3)
        assert found.failed == 0
        assert found.tokens in {3 * found.ended + begun for begun in range(4)}

    def test_an_event_with_other_text_is_a_token(self, peer):
        server = peer([chunked(event(b' a \\"word\\"'), event("ü".encode()), TAIL.replace(b":1}", b":2}"))], token=b"")
        with running(HttpLoad(server, 2, streams=1, once=True)) as counts:
            found = wait_for(counts, lambda found: found.ended)
        assert (found.events, found.tokens, found.failed) == (2, 2, 0)

    @pytest.mark.parametrize(
        "answer",
        [
            chunked(event(b"~"), TAIL),  # one token, where two were asked for
            b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
        ],
    )
    def test_an_answer_without_all_its_tokens_has_failed(self, peer, answer):
        with running(HttpLoad(peer([answer]), 2, streams=1)) as counts:
            assert wait_for(counts, lambda found: found.failed >= 3).ended == 0

    def test_a_connection_that_the_server_ends_between_two_requests_is_no_failure(self, peer):
        server = peer([chunked(event(b"~"), TAIL)])
        with running(HttpLoad(server, 1, streams=1, once=True)) as counts:
            wait_for(counts, lambda found: found.ended == 1)
            peer.connections[0].shutdown(socket.SHUT_WR)
            found = wait_for(counts, lambda _: not peer.threads[0].is_alive())  # the client has ended it too
        assert (found.ended, found.failed) == (1, 0)

    def test_a_server_that_is_not_there_is_named(self):
        load = HttpLoad(RunningRouter("127.0.0.1:1", "m", "a peer", ()), 1, streams=1)
        with pytest.raises(PeerFailed, match=r"a peer: .*refused"), running(load):
            pass


def test_a_router_is_measured():
    found = measure_router(bare, 0.1, (1, 4), 8)
    assert found.about.startswith("bare uvicorn")
    assert found.values["failed_requests"] == 0
    for name in ("ttft_p50", "ttft_p99", "ttft_64_at_once_max", "memory_at_rest"):
        assert found.values[name] > 0
    for name in ("request_cpu_1", "request_cpu_4", "token_cpu_4", "tokens_per_event_1"):
        assert name in found.values
    assert "workers_request_cpu_1" not in found.values  # the bare server has none


def test_rows_begin_where_we_lose_most_and_end_with_the_bare_server():
    ours = RouterFigures(
        "ours", {"failed_requests": 0, "client": 0.1, "request_cpu_32": 700, "ttft_p50": 1, "cpu_at_rest": 1}
    )
    one = RouterFigures("one", {"failed_requests": 2, "client": 0.2, "request_cpu_32": 350, "ttft_p50": 2})
    other = RouterFigures(
        "other", {"failed_requests": 0, "client": 0.3, "request_cpu_32": float("nan"), "ttft_p50": 0.1}
    )
    lowest = RouterFigures("bare", {"failed_requests": 0, "client": 0.1, "request_cpu_32": 50, "ttft_p50": 0.01})
    found = rows(ours, lowest, one, other)
    assert [(row.name, row.peer) for row in found[:6]] == [
        ("ttft_p50", "other"),
        ("request_cpu_32", "one"),
        ("ttft_p50", "one"),
        ("request_cpu_32", "other"),
        ("request_cpu_32", "bare"),
        ("ttft_p50", "bare"),
    ]
    assert {row.name for row in found if not row.reached} == {"request_cpu_32", "failed_requests of one"}
    assert {row.peer_value for row in found[6:] if row.name == "failed_requests"} == {0, 2}


def test_dynamo_is_refused_where_others_could_reach_it(monkeypatch):
    devices = {name: SimpleNamespace(isup=name != "tunl0") for name in ("lo", "eth0", "tunl0")}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: devices)
    with pytest.raises(PeerFailed, match="would listen on eth0 too"), dynamo(1, 1):
        pass
