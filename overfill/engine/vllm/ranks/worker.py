"""What a worker's services do through its ranks: serve and pull KV, and keep processors. All of it over the links."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Any

from overfill.engine.vllm.ranks.link import RankLinks, Sent
from overfill.engine.vllm.ranks.messages import (
    CloseTransfer,
    Connect,
    Forget,
    OpenTransfer,
    Prepare,
    RankHello,
    Serve,
    Stop,
)
from overfill.errors import OverfillError, UnsupportedModel
from overfill.kv.chunks import TransferSpec
from overfill.kv.ranks import Moved, Pull, Puller, RankPullers
from overfill.kv.shielded import shielded
from overfill.kv.spec import KvSpec
from overfill.request.params import SamplingParams
from overfill.rpc.access import AccessPolicy
from overfill.rpc.tls import Credentials, ServerTls
from overfill.v1 import kv_pb2


class RankPuller:
    """Has one rank pull its share of the KV heads; a ``Puller``."""

    def __init__(self, links: RankLinks, rank: int) -> None:
        self._links = links
        self._rank = rank

    async def pull(self, pull: Pull, on_moved: Callable[[Moved], None]) -> None:
        """As ``Puller.pull``. A cancelled pull ends when the rank has joined it, or is lost."""
        loop = asyncio.get_running_loop()
        [sent] = self._links.call([self._rank], pull, lambda moved: _on(loop, on_moved, moved))
        answer = asyncio.wrap_future(sent.future)
        try:
            await asyncio.shield(answer)
        except asyncio.CancelledError:
            self._links.cancel(sent)
            with contextlib.suppress(OverfillError):
                await shielded(answer)
            raise


class WorkerRanks:
    """The ranks of a worker, as its services use them on one event loop. Implements ``Ranks``.

    Args:
        hellos: what the ranks say of themselves, by rank.
        spec: geometry of the KV of the model that the ranks run.

    Raises:
        UnsupportedModel: the ranks' caches do not fit together, or lack some of the heads; the message says which.
    """

    def __init__(self, links: RankLinks, hellos: Sequence[RankHello], spec: KvSpec) -> None:
        _check(hellos, spec)
        self._links = links
        self._all = range(len(hellos))
        # Of ranks that hold the same heads, the first one serves them.
        self._heads = {hello.heads: hello.rank for hello in reversed(hellos)}
        self._serving = sorted(self._heads.values())
        self.puller: Puller = RankPullers([(hello.heads, RankPuller(links, hello.rank)) for hello in hellos])

    async def serve(
        self, host: str, port: int, tls: ServerTls | None, access: AccessPolicy, max_rpcs: int | None
    ) -> list[kv_pb2.DataAddress]:
        """As ``Ranks.serve``."""
        sent: list[Sent] = []
        for rank in self._serving:
            command = Serve(f"{host}:{port + rank if port else 0}", tls, access, max_rpcs)
            sent += self._links.call([rank], command)
        addresses = dict(zip(self._serving, await _values(sent), strict=True))
        return [
            kv_pb2.DataAddress(address=addresses[rank], first_kv_head=first, num_kv_heads=end - first)
            for (first, end), rank in sorted(self._heads.items())
        ]

    async def connect(self, streams: int, credentials: Credentials | None) -> None:
        """As ``Ranks.connect``."""
        await self._call(self._all, Connect(streams, credentials))

    async def open(self, spec: TransferSpec, block_table: Sequence[int], cached_tokens: int) -> None:
        """As ``Ranks.open``."""
        await self._call(self._serving, OpenTransfer(spec, [*block_table], cached_tokens))

    async def close(self, transfer_id: bytes) -> tuple[int, int]:
        """As ``Ranks.close``."""
        times = await self._call(self._serving, CloseTransfer(transfer_id))
        return min((first for first, _ in times if first), default=0), max(last for _, last in times)

    def prepare(self, key: str, params: SamplingParams, prompt: Sequence[int], eos_ids: Sequence[int]) -> None:
        """Has every rank make the processor of an answer. Blocks until no rank makes it any more.

        The caller calls ``forget`` in the end, also after an error.

        Raises:
            InvalidRequest: the parameters ask for something that the model cannot have.
        """
        # Lists, because repeated fields of messages cannot be pickled.
        sent = self._links.call(self._all, Prepare(key, params, [*prompt], [*eos_ids]))
        wait([one.future for one in sent])
        for one in sent:
            one.future.result()

    def forget(self, key: str) -> None:
        """Has every rank drop a processor. Any thread may call it."""
        self._links.call(self._all, Forget(key))

    async def stop(self) -> None:
        """As ``Ranks.stop``. Afterwards a rank outlives the end of its link."""
        await self._call(self._all, Stop())

    async def _call(self, ranks: Sequence[int], command: object) -> list[Any]:
        return await _values(self._links.call(ranks, command))


async def _values(sent: Sequence[Sent]) -> list[Any]:
    """Waits for all ranks' answers, also if this task is cancelled, and raises the first error among them."""
    answers = [asyncio.wrap_future(one.future) for one in sent]
    values = await shielded(asyncio.gather(*answers, return_exceptions=True))
    if error := next((value for value in values if isinstance(value, BaseException)), None):
        raise error
    return values


def _on(loop: asyncio.AbstractEventLoop, on_moved: Callable[[Moved], None], moved: Moved) -> None:
    loop.call_soon_threadsafe(on_moved, moved)


def _check(hellos: Sequence[RankHello], spec: KvSpec) -> None:
    for name, expected in (
        ("num_layers", spec.num_layers),
        ("block_size", hellos[0].block_size),
        ("dtype", spec.dtype),
    ):
        found = {hello.rank: getattr(hello, name) for hello in hellos}
        if {*found.values()} != {expected}:
            raise UnsupportedModel(f"the ranks' KV caches have {name} {found}, by rank; all must have {expected}")
    shares = sorted({hello.heads for hello in hellos})
    bounds = [0, *(end for _, end in shares)]
    if [first for first, _ in shares] != bounds[:-1] or bounds[-1] != spec.num_kv_heads:
        raise UnsupportedModel(f"the ranks hold the KV heads {shares}; together they must hold 0:{spec.num_kv_heads}")
