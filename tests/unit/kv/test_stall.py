"""Tests that a transfer ends if it stalls or takes too long, but not because its link is shared. Time is virtual."""

import random
from dataclasses import dataclass, field

import pytest

from overfill.kv.sender import MessageGrowth
from overfill.kv.stall import StallDetector, TransferLimits
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD, STALL_TIMEOUT

MIB = 2**20
GIGABIT = 1e9 / 8  # bytes per second
LOOK = 0.5  # seconds between checks of a transfer
LIMITS = TransferLimits()


@dataclass
class Stream:
    """One data stream, with messages of whole chunks sized by the sender's rule. One message is read ahead."""

    left: int
    share: float
    sent: float = 0.0  # bytes of the message in transit
    seconds: float = 0.0  # duration of that message so far

    def __post_init__(self):
        self.growth = MessageGrowth()
        self.chunks, self.ahead = self.growth.max_chunks, self.growth.max_chunks

    def advance(self, amount: float, seconds: float) -> int:
        """Moves ``amount`` bytes; returns the bytes of the messages that this completes."""
        self.sent += amount
        self.seconds += seconds
        done = 0
        while self.left and self.sent >= (size := min(self.chunks * MAX_CHUNK_PAYLOAD, self.left)):
            self.sent -= size
            self.left -= size
            done += size
            self.growth.sent(self.seconds)
            self.chunks, self.ahead, self.seconds = self.ahead, self.growth.max_chunks, 0.0
        return done


@dataclass
class Transfer:
    """A transfer of ``total`` bytes, all ready at the start, with the stall detectors of both ends."""

    total: int
    streams: list[Stream]
    received: int = 0
    acknowledged: int = 0
    receiver: StallDetector = field(init=False)
    sender: StallDetector = field(init=False)

    def __post_init__(self):
        self.receiver, self.sender = (StallDetector(0.0, self.total, LIMITS) for _ in range(2))

    def fault(self, now):
        return self.receiver.fault(now, self.total, self.received) or self.sender.fault(
            now, self.total, self.acknowledged
        )


def share_link(transfers, rate):
    """Lets streams share ``rate`` bytes per second by their weights; returns the time at the end, and all faults."""
    now, faults = 0.0, []
    running = list(transfers)
    while running:
        now += LOOK
        weights = sum(s.share for t in running for s in t.streams if s.left)
        for transfer in running:
            transfer.acknowledged = transfer.received  # acknowledgements arrive one check later
            for stream in transfer.streams:
                if stream.left:
                    transfer.received += stream.advance(rate * LOOK * stream.share / weights, LOOK)
        faults += [fault for t in running if (fault := t.fault(now)) is not None]
        running = [t for t in running if t.acknowledged < t.total]
        if faults:
            break
    return now, faults


def prompts(count, size, streams, unfair=1.0):
    draw = random.Random(1)
    return [
        Transfer(size, [Stream(size // streams, draw.uniform(1.0, unfair)) for _ in range(streams)])
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "size", "streams", "unfair", "rate"),
    [
        *((128, 512, streams, 1.0, GIGABIT) for streams in (1, 2, 4, 16)),
        (128, 512, 4, 3.0, GIGABIT),
        (128, 32, 2, 1.0, GIGABIT / 10),
        (1, 64, 2, 1.0, 2e6 / 8),
    ],
)
def test_many_transfers_on_one_link_all_finish(count, size, streams, unfair, rate):
    ended, faults = share_link(prompts(count, size * MIB, streams, unfair), rate)
    assert not faults
    assert ended == pytest.approx(count * size * MIB / rate, rel=0.02)


def test_a_trickle_ends_after_the_longest_time():
    detector, total = StallDetector(0.0, 512 * MIB, LIMITS), 512 * MIB
    times = [LOOK * i for i in range(1, 10_000)]
    ended = next(t for t in times if detector.fault(t, total, int(t)) is not None)  # a byte per second
    assert LIMITS.whole <= ended <= LIMITS.whole + LOOK


def test_the_longest_time_begins_when_all_is_ready():
    total = 100 * MIB
    detector, computed = StallDetector(0.0, total, LIMITS), 2 * LIMITS.whole
    for i in range(1, int(computed / LOOK)):  # always one chunk behind the computed KV
        ready = int(total * i * LOOK / computed)
        assert detector.fault(i * LOOK, ready, max(0, ready - MIB)) is None
    assert detector.fault(computed, total, total - MIB) is None
    for i in range(int(LIMITS.whole / LOOK)):
        assert detector.fault(computed + i * LOOK, total, total - MIB + i) is None
    assert "--max-transfer-time" in (detector.fault(computed + LIMITS.whole, total, total - 2) or "")


def test_a_peer_that_takes_no_part_is_given_up_after_the_stall_timeout():
    detector = StallDetector(0.0, 10 * MIB, LIMITS)
    assert detector.fault(1.0, 10 * MIB, 5 * MIB) is None
    ended = next(t for t in (1.0 + LOOK * i for i in range(1000)) if detector.fault(t, 10 * MIB, 5 * MIB))
    assert ended == 1.0 + STALL_TIMEOUT


def test_a_transfer_that_owes_nothing_is_never_given_up():
    detector = StallDetector(0.0, 10 * MIB, LIMITS)
    assert not any(detector.fault(t, 0, 0) for t in range(10_000))
    assert not any(detector.fault(t, 5 * MIB, 5 * MIB) for t in range(10_000, 20_000))
    assert not any(detector.fault(t, 10 * MIB, 10 * MIB) for t in range(20_000, 30_000))


def test_kv_that_becomes_ready_late_has_the_whole_stall_timeout():
    detector = StallDetector(0.0, 1000, LIMITS)
    assert detector.fault(1000.0, 0, 0) is None
    assert detector.fault(1000.5, 500, 0) is None
    assert detector.fault(1000.0 + STALL_TIMEOUT - LOOK, 500, 0) is None
    assert detector.fault(1000.0 + STALL_TIMEOUT, 500, 0) is not None
