"""One transfer for several sequences of one prompt: who receives it, and who waits for it.

A sequence whose ``answer_start`` leaves the first token to the decoder needs nothing of the full model but KV, which is
the same for each adapter. So sequences of one cache namespace with equal shared prompts are members of one
``SharedTransfer`` from the time they ask for blocks until KV is in place. A sequence also becomes a member if the
transfer brings at least half of the blocks that it lacks:

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
the member's deadline. A session acts on its sequence's transfer through ``PromptSharing``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from overfill.engine.sequence import DecodeSequence, Share
from overfill.errors import InvalidRequest, OverfillError, TransferFailed, Unavailable
from overfill.kv.cut_blocks import CutBlocks, SharedKey, shared_key
from overfill.kv.shielded import shielded
from overfill.telemetry.metrics import DecodeMetrics
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


@dataclass(slots=True, eq=False)
class SharedTransfer:
    """The members that wait for one prompt.

    Attributes:
        key: the prompt of the member that leads or has led last, or of the first one.
        members: the members with their prompts, in order of arrival; none once the KV is in place.
        leader: the member into whose blocks the prompt is received; None while it is not.
        in_place: whether the KV is complete.
        worker_id: the prefill worker from which it has come.
        codec: codec in which it has come.
        known_ns: when the leader knew that the prompt was computed.
    """

    key: SharedKey
    members: dict[PromptSharing, SharedKey] = field(default_factory=dict)
    leader: PromptSharing | None = None
    in_place: bool = False
    worker_id: str = ""
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_UNSPECIFIED
    known_ns: int = 0

    @property
    def runs(self) -> bool:
        """Whether members need no prefill worker."""
        return self.leader is not None or self.in_place

    @property
    def followers(self) -> list[PromptSharing]:
        """Members besides the leader."""
        return [member for member in self.members if member is not self.leader]


class SharingWorker(Protocol):
    """The decode worker, as its sequences share prompts.

    Attributes:
        metrics: counts what sequences do.
        transfers: those for which its sequences wait, in order of their beginning.
        cut_blocks: the KV of cut blocks; None if this process has no KV.
    """

    metrics: DecodeMetrics
    transfers: dict[SharedTransfer, None]
    cut_blocks: CutBlocks | None

    def send(self, message: object) -> None:
        """Sends a message to the engine."""
        ...


class PromptSharing:
    """One sequence as a member of one transfer at a time, until the prompt's KV is in place.

    A sequence that needs more of the full model than KV never becomes a member.

    Args:
        notify: takes what happens to the transfer.

    Attributes:
        received: the transfer that the sequence has left last, if another member has completed it; else None.
    """

    def __init__(
        self, sequence: DecodeSequence, worker: SharingWorker, notify: Callable[[TransferLost | Deserted], None]
    ) -> None:
        self.received: SharedTransfer | None = None
        self._sequence = sequence
        self._worker = worker
        self._notify = notify
        self._transfer: SharedTransfer | None = None
        self._has_blocks = False  # as the latest transfer knows it

    @property
    def is_member(self) -> bool:
        """Whether others may wait for the same transfer."""
        return self._transfer is not None

    @property
    def follows(self) -> bool:
        """Whether another sequence receives the prompt for this one too, or has received it."""
        return self._transfer is not None and self._transfer.runs

    @property
    def is_awaited(self) -> bool:
        """Whether others wait for the prompt that this sequence receives."""
        return self._transfer is not None and self._transfer.leader is self and bool(self._transfer.followers)

    def lacks(self, lost: SharedTransfer) -> bool:
        """Whether the sequence has blocks and needs a prefill worker, now that ``lost`` has failed."""
        return lost is self._transfer and not lost.runs and self._has_blocks

    def join(self, held_tokens: int | None = None) -> None:
        """Joins the transfer that brings most of what the sequence lacks, if that is half of it. Else begins one.

        Args:
            held_tokens: leading tokens whose KV is in the sequence's blocks; None if it has no blocks.
        """
        if (key := self._key()) is None:
            return
        held_blocks = len(key.blocks) * (held_tokens or 0) // key.num_in_blocks
        found, most = None, (len(key.blocks) - held_blocks - 1) // 2
        for transfer in self._worker.transfers:
            if transfer.key == key:
                found = transfer
                break
            if (gain := transfer.key.num_common(key) - held_blocks) > max(0, most):
                found, most = transfer, gain
        self._transfer = found or SharedTransfer(key)
        self._transfer.members[self] = key
        self._worker.transfers[self._transfer] = None
        self._has_blocks = held_tokens is not None

    def lead(self) -> None:
        """Notes that this sequence receives the prompt from now on."""
        if (transfer := self._transfer) is not None:
            transfer.leader, transfer.key = self, transfer.members[self]

    def fail(self, worker_id: str, error: OverfillError) -> None:
        """Tells the followers that the transfer, which this sequence leads, has failed."""
        if (transfer := self._transfer) is not None:
            if isinstance(error, InvalidRequest):  # of this sequence's request; the others may be valid
                error = TransferFailed(str(error))
            followers, transfer.leader = transfer.followers, None
            for follower in followers:
                follower._notify(TransferLost(transfer, worker_id, error))

    def leave(self) -> None:
        """Leaves the transfer, which fails if this sequence leads it."""
        self.received = None
        if (transfer := self._transfer) is None:
            return
        if transfer.leader is self:
            self.fail("", Unavailable("the sequence that received the prompt has lost its blocks"))
        self._transfer = None
        transfer.members.pop(self, None)
        if transfer.in_place:
            self.received = transfer
        elif not transfer.members:
            del self._worker.transfers[transfer]
        elif transfer.leader is not None and not transfer.followers:
            transfer.leader._notify(Deserted())

    async def take(self, blocks: Sequence[int], held_tokens: int) -> bool:
        """Takes KV that is here into new blocks. Returns True if all of the prompt's is in place.

        Otherwise the sequence waits for it together with others of the same prompt.

        Args:
            held_tokens: leading tokens whose KV is in ``blocks``.
        """
        if (key := self._key()) is None:
            return False
        received, cuts = self.received, self._worker.cut_blocks
        if held_tokens == key.num_in_blocks:
            if not key.rest or (cuts is not None and await cuts.restore(key, blocks)):
                self._worker.metrics.shared("cache" if received is None else "transfer", self._sequence.num_shared)
                return True
            if cuts is None:  # each receives the few tokens for itself
                return False
        elif received is not None and not self._has_blocks:
            # The engine had given the blocks before it published the prompt. It answers with new ones.
            self._transfer, self._has_blocks = received, True
            self._worker.send(Share("", (self._sequence.id,)))
            return False
        self.join(held_tokens)
        return False

    async def give(self, blocks: Sequence[int], worker_id: str, codec: common_pb2.KvCodec, known_ns: int) -> None:
        """Gives the prompt's KV, which is complete in ``blocks``, to the sequences that wait for it and to later ones.

        The other arguments are as in ``SharedTransfer``.
        """
        if (transfer := self._transfer) is None:
            return
        try:
            await shielded(self._keep_cut_blocks(transfer, blocks))
        finally:
            followers = tuple(member._sequence.id for member in transfer.followers if member._has_blocks)
            transfer.in_place, transfer.worker_id, transfer.codec, transfer.known_ns = True, worker_id, codec, known_ns
            transfer.leader = self._transfer = None
            transfer.members.clear()  # followers keep the transfer, which must not keep this sequence
            del self._worker.transfers[transfer]
            if followers:
                self._worker.send(Share(self._sequence.id, followers))

    def forget(self) -> None:
        """Drops the cut blocks that later sequences of the prompt would take: their KV may be why this one failed."""
        if (cuts := self._worker.cut_blocks) is not None and (key := self._key()) is not None:
            cuts.forget(key)

    async def _keep_cut_blocks(self, transfer: SharedTransfer, blocks: Sequence[int]) -> None:
        """Keeps the cut blocks of the members' prompts that are in ``blocks``."""
        if (cuts := self._worker.cut_blocks) is not None:
            shared = self._sequence.prompt[: self._sequence.num_shared]
            for key in set(transfer.members.values()):
                if key.is_of(shared, transfer.key.blocks):
                    await cuts.keep(key, blocks)

    def _key(self) -> SharedKey | None:
        """Returns what the prompt has in common with others; None if the sequence is to be no member."""
        sequence = self._sequence
        if not sequence.needs_only_kv or sequence.prompt_blocks is None:
            return None
        return shared_key(sequence.prompt_blocks, sequence.prompt, sequence.num_shared)
