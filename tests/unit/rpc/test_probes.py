"""Tests what probes are told of a process, without sockets: its state, the response to a request, who is dropped."""

from types import SimpleNamespace

import pytest

from overfill.rpc.probes import HANG_SECONDS, MAX_HEAD, ProcessState, dropped, respond

PROBES = ("livez", "startupz", "readyz")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def faults(state: ProcessState) -> list[str]:
    return [state.fault(probe) for probe in PROBES]


def test_a_process_is_alive_while_it_starts_then_started_and_ready_when_it_says_so() -> None:
    clock = Clock()
    state = ProcessState(clock)
    clock.now += 10 * HANG_SECONDS  # a model may load for longer, and its start has a limit of its own
    assert faults(state) == ["", "the process is starting", "the process is starting"]
    state.beat("no decode worker is ready")
    assert faults(state) == ["", "", "no decode worker is ready"]
    state.beat("")
    assert faults(state) == ["", "", ""]


def test_an_event_loop_that_does_not_run_makes_a_started_process_neither_alive_nor_ready() -> None:
    clock = Clock()
    state = ProcessState(clock)
    state.beat("")
    clock.now += HANG_SECONDS
    assert faults(state) == ["", "", ""]
    clock.now += 1
    alive, started, ready = faults(state)
    assert alive == ready == f"the event loop has not run for {HANG_SECONDS + 1:.0f} s"
    assert started == ""
    state.beat("")
    assert faults(state) == ["", "", ""]


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /livez HTTP/1.1", 200),
        ("GET /livez HTTP/1.0", 200),
        ("GET /livez?verbose HTTP/1.1", 200),
        ("GET /readyz HTTP/1.1", 503),
        ("GET /metrics HTTP/1.1", 404),
        ("GET /livez/ HTTP/1.1", 404),
        ("GET / HTTP/1.1", 404),
        ("POST /livez HTTP/1.1", 405),
        ("GET http://h/livez HTTP/1.1", 400),
        ("PRI * HTTP/2.0", 400),
        ("\x16\x03\x01", 400),
    ],
)
def test_only_the_probes_are_served(request_line: str, status: int) -> None:
    state = ProcessState()
    state.beat("no decode worker is ready")
    head, _, body = respond(f"{request_line}\r\nHost: h\r\n\r\n".encode(), state).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert f"Content-Length: {len(body)}".encode() in head
    if status == 503:
        assert body == b"no decode worker is ready\n"


def test_head_has_the_status_of_get_without_a_body() -> None:
    state = ProcessState()
    for path in ("livez", "readyz"):
        get, head = (respond(f"{way} /{path} HTTP/1.1\r\n\r\n".encode(), state) for way in ("GET", "HEAD"))
        assert get.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" == head


def test_a_long_head_is_refused() -> None:
    head = b"GET /livez HTTP/1.1\r\nX: " + b"a" * MAX_HEAD + b"\r\n\r\n"
    assert respond(head, ProcessState()).split()[1] == b"431"
    assert respond(b"GET /livez HTTP/1.1\r\nX: a\r\n\r\n", ProcessState()).split()[1] == b"200"


def test_a_neighbours_connections_are_dropped_before_the_kubelets() -> None:
    def client(host: str, heard: bool) -> SimpleNamespace:
        return SimpleNamespace(host=host, heard=heard)

    kubelet, flood = client("10.0.0.1", False), [client("10.0.0.9", True) for _ in range(5)]
    assert dropped([kubelet, *flood]) is flood[0]
    silent = client("10.0.0.9", False)
    assert dropped([kubelet, *flood, silent]) is silent, "it may be a probe that has sent its request"
    alone = [client(f"10.0.1.{i}", True) for i in range(3)]
    assert dropped(alone) is alone[0]
