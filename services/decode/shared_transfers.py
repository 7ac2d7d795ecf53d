"""One transfer for several sequences of one prompt: who receives it, and who waits for it.

A sequence whose ``answer_start`` leaves the first token to the decoder needs nothing of the full model but KV, which is
the same for each adapter. So sequences of one cache namespace whose shared prompts are equal, or have more than half of
their blocks in common, are members of a ``SharedTransfer`` from the time they ask for blocks until KV is in place:

- **asking**: no member receives the prompt. Each member waits for a prefill worker; the first one that gets one leads.
- **received**: the leader's handoff writes into the leader's blocks. The others follow: they hold blocks of their own,
  which stay unwritten, and need no prefill worker. An assignment that reaches one is not used.
- **in place**: the leader has told the engine, which gives each follower with blocks cached ones in place of its own. A
  follower whose blocks were on their way asks for that itself. The transfer has ended; a sequence that comes now finds
  the blocks in the prefix cache. A follower whose prompt goes on asks for a prefill worker for the rest.

What may happen meanwhile:

- The leader is cancelled, or its deadline passes. While there are followers, its session goes on until the transfer
  ends, and keeps its blocks. When the last follower has left, or if there was none, the transfer is cancelled.
- The leader is preempted. It gives its blocks back at once, because older sequences wait for them: the transfer fails.
- A follower is cancelled, preempted or ends otherwise. It leaves.
- The transfer fails. Every member asks for a prefill worker, and the first one that gets one leads.

The transfer has no deadline of a request. Its own limits bound it (``kv.stall``), and the wait of each member ends with
the member's deadline. This module knows neither engines nor wires; ``sequence_session`` acts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from overfill.errors import OverfillError
from overfill.kv.cut_blocks import SharedKey
from overfill.v1 import common_pb2


@dataclass(frozen=True, slots=True)
class TransferLost:
    """What a follower is told when the transfer that it awaits has failed.

    Attributes:
        worker_id: the prefill worker.
    """

    transfer: SharedTransfer
    worker_id: str
    error: OverfillError


@dataclass(frozen=True, slots=True)
class Deserted:
    """What a leader is told when its last follower has left."""


Notify = Callable[[TransferLost | Deserted], None]


@dataclass(slots=True)
class _Member:
    """A sequence that waits for its prompt.

    Attributes:
        holds: whether it has blocks.
    """

    key: SharedKey
    notify: Notify
    holds: bool = False


@dataclass(slots=True, eq=False)
class SharedTransfer:
    """The members that wait for one prompt.

    Attributes:
        key: the prompt of the member that leads or has led last, or of the first one.
        leader: id of the sequence into whose blocks the prompt is received; empty while none is.
        in_place: whether the KV is complete.
        worker_id: the prefill worker from which it has come.
        codec: codec in which it has come.
        known_ns: when the leader knew that the prompt was computed.
    """

    key: SharedKey
    registry: SharedTransfers
    members: dict[str, _Member] = field(default_factory=dict)
    leader: str = ""
    in_place: bool = False
    worker_id: str = ""
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_UNSPECIFIED
    known_ns: int = 0

    @property
    def runs(self) -> bool:
        """Whether members need no prefill worker."""
        return bool(self.leader) or self.in_place

    @property
    def followers(self) -> tuple[str, ...]:
        """Members besides the leader, in order of arrival."""
        return tuple(id for id in self.members if id != self.leader)

    def prompts(self) -> set[SharedKey]:
        """Returns the members' prompts."""
        return {member.key for member in self.members.values()}

    def lead(self, id: str) -> None:
        """Notes that the member ``id`` receives its prompt from now on."""
        self.leader, self.key = id, self.members[id].key

    def complete(self, worker_id: str, codec: common_pb2.KvCodec, known_ns: int) -> tuple[str, ...]:
        """Ends the transfer, whose KV is in place, and returns the followers that have blocks."""
        followers = tuple(id for id in self.followers if self.members[id].holds)
        self.in_place, self.worker_id, self.codec, self.known_ns = True, worker_id, codec, known_ns
        self.registry.transfers.pop(self, None)
        return followers

    def fail(self, worker_id: str, error: OverfillError) -> None:
        """Tells the followers that the transfer has failed; the leader stays a member."""
        followers, self.leader = self.followers, ""
        for id in followers:
            self.members[id].notify(TransferLost(self, worker_id, error))

    def leave(self, id: str) -> None:
        """Removes a member that does not lead."""
        self.members.pop(id, None)
        if not self.members:
            self.registry.transfers.pop(self, None)
        elif not self.followers and self.leader and not self.in_place:
            self.members[self.leader].notify(Deserted())


class SharedTransfers:
    """The transfers for which sequences of this worker wait."""

    def __init__(self) -> None:
        self.transfers: dict[SharedTransfer, None] = {}  # in order of their beginning

    def join(self, key: SharedKey, id: str, notify: Notify, held_blocks: int, *, holds: bool) -> SharedTransfer:
        """Makes the sequence ``id`` a member of the transfer that brings most of what it lacks.

        Args:
            held_blocks: leading blocks of the prompt that it has with their KV.
            holds: whether it has blocks.
        """
        found, most = None, (len(key.blocks) - held_blocks - 1) // 2  # at least half of what is missing
        for transfer in self.transfers:
            if transfer.key == key:
                found = transfer
                break
            if (gain := transfer.key.num_common(key) - held_blocks) > max(0, most):
                found, most = transfer, gain
        if found is None:
            found = SharedTransfer(key, self)
            self.transfers[found] = None
        found.members[id] = _Member(key, notify, holds)
        return found
