"""Tests of a worker's links to its ranks, with plain sockets in the place of ranks.

That a socket of another user is refused cannot be tested as one user.
"""

import contextlib
import signal
import socket
import struct
import subprocess
import threading

import pytest
from rank_agents import NOBODY

from overfill.engine.vllm.ranks.link import RankLinks
from overfill.engine.vllm.ranks.messages import (
    MAX_MESSAGE,
    NO_COMMAND,
    Cancel,
    Done,
    Failed,
    MessageDecoder,
    Ping,
    RankHello,
    Stop,
    encode,
)
from overfill.errors import InvalidRequest, Unavailable, UnsupportedModel
from overfill.kv.ranks import Moved
from overfill.rpc.status import to_bytes


class Lost:
    """Collects what ``on_lost`` is called with."""

    def __init__(self):
        self.calls, self.happened, self.threads = [], threading.Event(), []

    def __call__(self, rank, reason):
        self.calls.append((rank, reason))
        self.threads.append(threading.current_thread().name)
        self.happened.set()


class Rank:
    """The rank's end as a plain socket."""

    def __init__(self, config, rank=0, **changed):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect("\0" + config["link"])
        self.token = bytes.fromhex(config["link_token"])
        self.decoder, self.messages = MessageDecoder(), []
        self.hello = RankHello(**{"rank": rank, "pid": NOBODY, "heads": (rank, rank + 1), "num_layers": 2,
                                  "block_size": 4, "dtype": "float32"} | changed)  # fmt: skip

    def introduced(self):
        self.sock.sendall(self.token + encode(NO_COMMAND, self.hello))
        return self

    def next(self, kind):
        """The next message of that kind; pings are answered."""
        while True:
            while self.messages:
                number, body = self.messages.pop(0)
                if isinstance(body, Ping):
                    self.answer(number, Done())
                if isinstance(body, kind):
                    return number, body
            self.messages += self.decoder.feed(self.sock.recv(1 << 16))

    def answer(self, number, body):
        self.sock.sendall(encode(number, body))


@pytest.fixture
def lost():
    return Lost()


@pytest.fixture
def links(lost):
    made = RankLinks(2, lost)
    yield made
    made.close()


@pytest.fixture
def rank(links):
    """Connects a rank, whose socket is closed in the end."""
    with contextlib.ExitStack() as stack:

        def connect(number, **changed):
            made = Rank(links.config, number, **changed)
            stack.enter_context(made.sock)
            return made

        yield connect


def test_commands_reports_and_errors_go_to_those_who_asked(links, lost, rank):
    # One rank sends its introduction byte by byte.
    first = rank(0)
    for byte in first.token + encode(NO_COMMAND, first.hello):
        first.sock.sendall(bytes([byte]))
    second = rank(1).introduced()
    assert links.wait(20) == [first.hello, second.hello]
    moved = []
    both = links.call([0, 1], Stop(), moved.append)
    numbers = [each.next(Stop)[0] for each in (first, second)]
    assert numbers == [both[0].number] * 2
    second.answer(numbers[1], Moved(kv_bytes=1))
    second.answer(numbers[1], Moved(kv_bytes=2))
    second.answer(numbers[1], Done(["value"]))
    assert both[1].future.result(20) == ["value"]
    assert [each.kv_bytes for each in moved] == [1, 2], "reports come before the answer"
    links.cancel(both[0])
    assert first.next(Cancel)[1] == Cancel(numbers[0])
    first.answer(numbers[0], Failed(to_bytes(InvalidRequest("sampling.grammar", "is wrong"))))
    with pytest.raises(InvalidRequest, match="is wrong") as raised:
        both[0].future.result(20)
    assert raised.value.field == "sampling.grammar"
    assert lost.calls == []


def test_commands_larger_than_the_socket_takes_arrive_in_order(links, rank):
    first, _ = rank(0).introduced(), rank(1).introduced()
    links.wait(20)
    sent = [links.call([0], Done(bytes([i]) * 3_000_000))[0] for i in range(4)]
    for i in range(4):
        number, body = first.next(Done)
        assert (number, body.value[:1], len(body.value)) == (sent[i].number, bytes([i]), 3_000_000)
        first.answer(number, Done(i))
    assert [one.future.result(20) for one in sent] == [0, 1, 2, 3]


def test_a_command_within_another_one_is_sent_behind_it(links, rank):
    """The garbage collector may drop a processor at any allocation, also while a command is being sent."""
    first, _ = rank(0).introduced(), rank(1).introduced()
    links.wait(20)
    [peer] = [peer for peer in links._peers if peer.hello.rank == 0]

    class Interrupted:
        """A socket that takes a half, and then another command is given."""

        def __init__(self, sock):
            self.sock = sock

        def send(self, data):
            peer.sock = self.sock
            taken = self.sock.send(data[: len(data) // 2])
            links.call([0], Done("inner"))
            return taken

    peer.sock = Interrupted(peer.sock)
    links.call([0], Done("outer"))
    assert [first.next(Done)[1].value for _ in range(2)] == ["outer", "inner"]


class CountingSocket:
    """A socket that takes a little at a time, and counts the messages of which it is offered anything."""

    def __init__(self, sock):
        self._sock, self.offered = sock, {}
        self.fileno, self.recv, self.close = sock.fileno, sock.recv, sock.close

    def send(self, data):
        whole = data.obj if isinstance(data, memoryview) else data
        self.offered[id(whole)] = whole  # keeps it, so that its id stays its own
        return self._sock.send(data[:1000])


def test_what_a_rank_has_not_read_is_not_copied_again_and_again(links, rank):
    first, _ = rank(0).introduced(), rank(1).introduced()
    links.wait(20)
    peer = links._ranks[0]
    peer.sock = counting = CountingSocket(peer.sock)
    sent = [links.call([0], Done(bytes([i]) * 500_000))[0] for i in range(4)]
    for one in sent:
        first.answer(first.next(Done)[0], Done())
        one.future.result(20)
    assert len([whole for whole in counting.offered.values() if len(whole) > 1000]) == 4


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (b"", "closed its link"),
        (struct.pack("<I", MAX_MESSAGE + 1), "claims to have"),
        (struct.pack("<I", 3) + b"abc", "cannot be read"),
        (encode(77, Done()), "command 77"),
        (encode(1, Ping()), "Ping answers command 1"),
    ],
    ids=["end", "too long", "no pickle", "no such command", "no answer"],
)
def test_a_rank_that_closes_or_talks_nonsense_is_lost_once(links, lost, what, reason, rank):
    ranks = [rank(number).introduced() for number in range(2)]
    links.wait(20)
    [sent] = links.call([1], Stop())
    ranks[1].next(Stop)
    if what:
        ranks[1].sock.sendall(what * 2)
    else:
        ranks[1].sock.close()
    with pytest.raises(Unavailable, match=rf"rank 1 \(process {NOBODY}\) is lost.*{reason}"):
        sent.future.result(20)
    assert lost.happened.wait(20)
    with pytest.raises(Unavailable, match="rank 1"):
        links.call([1], Stop())[0].future.result(20)
    [sent] = links.call([0], Stop())
    ranks[0].answer(ranks[0].next(Stop)[0], Done())
    sent.future.result(20)
    assert [number for number, _ in lost.calls] == [1]


@pytest.mark.parametrize("token", [b"", b"x" * 32, None], ids=["none", "wrong", "twice"])
def test_strangers_are_not_ranks(links, lost, token, caplog, rank):
    first = rank(0).introduced()
    stranger = rank(0)
    if token is None:  # it knows the token, and claims to be a rank that is there
        stranger.introduced()
    else:
        stranger.sock.sendall(token + encode(NO_COMMAND, stranger.hello) + bytes(40))
    assert stranger.sock.recv(1) == b""
    rank(1).introduced()
    assert links.wait(20)[0] == first.hello
    assert lost.calls == []
    assert "closed a connection to the ranks' link" in caplog.text


def test_nobody_can_connect_once_all_ranks_have(links, lost, rank):
    first, _ = rank(0).introduced(), rank(1).introduced()
    links.wait(20)
    [sent] = links.call([0], Stop())
    first.answer(first.next(Stop)[0], Done())
    sent.future.result(20)
    with socket.socket(socket.AF_UNIX) as stranger, pytest.raises(ConnectionRefusedError):
        stranger.connect("\0" + links.config["link"])
    assert lost.calls == []


def test_a_rank_that_cannot_be_used_or_does_not_come_fails_the_start(links, lost, rank):
    with pytest.raises(Unavailable, match=r"ranks \[0, 1\] have not connected within 0 s"):
        links.wait(0)
    rank(1, error=to_bytes(UnsupportedModel("the cache is upside down"))).introduced()
    with pytest.raises(UnsupportedModel, match="the cache is upside down"):
        links.wait(20)


def test_a_rank_that_ends_during_the_start_fails_it(links, lost, rank):
    rank(1).introduced().sock.close()
    with pytest.raises(Unavailable, match="rank 1"):
        links.wait(20)
    assert lost.happened.wait(20)


def test_a_silent_rank_is_lost_while_nobody_waits_for_it(lost):
    links = RankLinks(1, lost, silence=1.0)
    with (
        subprocess.Popen(["sleep", "1000"]) as process,
        contextlib.ExitStack() as exits,
        Rank(links.config, pid=process.pid).introduced().sock,
    ):
        exits.callback(process.kill)  # so that a failure does not wait for it
        assert lost.happened.wait(60)
        assert process.wait(60) == -signal.SIGKILL, "its process ends too"
        assert lost.threads == ["rank-links"]
        with pytest.raises(Unavailable, match=r"has not answered for 1 s"):
            links.call([0], Stop())[0].future.result(20)
    links.close()


def test_closing_loses_nobody_and_fails_what_is_open(links, lost, rank):
    for number in range(2):
        rank(number).introduced()
    links.wait(20)
    sent = links.call([0, 1], Stop())
    links.close()
    for one in sent:
        with pytest.raises(Unavailable, match="the worker has closed the link"):
            one.future.result(0)
    assert lost.calls == []
