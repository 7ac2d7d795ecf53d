"""The borrower's end of a loan: takes KV of a prompt's beginning from another worker's cache into blocks of this one.

It knows peers, blocks and token ids. Whether borrowing pays, and how long it may take, is ``kv.imports``'s.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress

from overfill.errors import OverfillError, TransferFailed
from overfill.kv.chunks import TRANSFER_ID_BYTES, TransferSpec
from overfill.kv.peers import PeerPool, PrefillPeer
from overfill.kv.ranks import Pull, Puller
from overfill.kv.spec import KvSpec
from overfill.rpc.calls import checked_response, checked_write, responses
from overfill.rpc.constants import MAX_IMPORT_TIME, MAX_LOAN_TIME
from overfill.v1 import decode_pb2, kv_pb2, prefill_pb2

_FAREWELL = 0.2
"""Seconds for the holder to end the loan after the borrower has everything. The prompt waits for them, and a round
trip takes less; the loan of a holder that freezes now ends when the call is cancelled."""


class Borrower:
    """Borrows KV from other workers.

    Args:
        peers: connections to holders.
        kv: geometry of the full model's KV, all of whose layers are stored here.
        block_size: tokens per block of this worker; a holder's may differ.
        new_puller: makes what moves KV from a peer into this worker's blocks.
    """

    def __init__(
        self, peers: PeerPool, kv: KvSpec, block_size: int, new_puller: Callable[[PrefillPeer], Puller]
    ) -> None:
        self._peers = peers
        self._kv = kv
        self._block_size = block_size
        self._new_puller = new_puller

    async def borrow(self, holder: kv_pb2.KvHolder, start: prefill_pb2.StartLend, blocks: Sequence[int]) -> int:
        """Pulls what ``holder`` has of a prompt, except for its last token, into ``blocks``.

        On return, also by an error or a cancellation, nothing writes to the blocks. It has no time limit of its own.

        Args:
            start: the request. ``borrow`` sets the fields that describe the loan.
            blocks: blocks of the whole prompt; the first ``start.already_held_tokens`` tokens are not written.

        Returns:
            Number of leading tokens whose KV is in ``blocks``, in whole blocks; ``start.already_held_tokens`` if the
            holder has no more.

        Raises:
            Incompatible: the holder has another model.
            TransferFailed: the holder claims what cannot be, or its KV is damaged.
            Unavailable, Overloaded, ...: the holder has gone, has restarted or refuses.
            RankLost: a rank of this worker has gone, and others may still write.
        """
        target = decode_pb2.AssignPrefill(
            worker_id=holder.worker_id,
            incarnation=holder.incarnation,
            address=holder.address,
            data_addresses=holder.data_addresses,
        )
        async with self._peers.use(target) as peer:
            return await self._borrow(peer, start, blocks)

    async def _borrow(self, peer: PrefillPeer, start: prefill_pb2.StartLend, blocks: Sequence[int]) -> int:
        name, held, length = f"holder {peer.target.worker_id}", start.already_held_tokens, len(start.prompt_token_ids)
        start.transfer_id = secrets.token_bytes(TRANSFER_ID_BYTES)
        start.expected_incarnation = peer.target.incarnation
        call = peer.control.Lend(timeout=MAX_LOAN_TIME)
        try:
            await checked_write(call.write(prefill_pb2.LendRequest(start=start)), name)
            answer: prefill_pb2.LendResponse | None = await anext(responses(call, name), None)
            if answer is None:
                raise TransferFailed(f"{name} ended a loan without an answer")
            if answer.tokens > length:
                raise TransferFailed(f"{name} lends {answer.tokens} tokens of a prompt of {length}")
            end = min(answer.tokens, length - 1) // self._block_size * self._block_size
            if end <= held:
                return held
            layers = tuple(range(self._kv.num_layers))
            spec = TransferSpec(start.transfer_id, 0, self._kv, layers, (held, end))
            pull = Pull(name, spec, layers, blocks, peer.sources, MAX_IMPORT_TIME)
            await self._new_puller(peer).pull(pull, lambda moved: None)
            with suppress(TimeoutError, OverfillError):
                async with asyncio.timeout(_FAREWELL):
                    await checked_write(call.write(prefill_pb2.LendRequest(end=prefill_pb2.EndLend())), name)
                    await checked_response(call.read(), name)
            return end
        finally:
            call.cancel()
