"""Loads and unloads adapters on all decode workers that a router knows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from overfill.errors import Incompatible, InvalidRequest, ModelNotFound, OverfillError, Unavailable
from overfill.request.names import ADAPTER_NAME, ADAPTER_NAME_RULE
from overfill.routing.adapters import Adapters
from overfill.routing.pool import Roster
from overfill.routing.stream import GrpcConnector
from overfill.routing.worker import Worker
from overfill.rpc.calls import checked_response
from overfill.v1 import admin_pb2, admin_pb2_grpc, common_pb2

CHANGE_TIMEOUT = 70.0
"""Seconds for a worker's answer. A worker itself answers after 60 s that it still loads."""

_OTHERS = frozenset({"decoder_digest", "adapters"})
"""Fields of the error of a worker with another decoder, or without a folder of adapters."""


@dataclass(frozen=True, slots=True)
class WorkerChange:
    """What one decode worker has done. ``error`` says why the adapter is not as it was asked for; None if it is."""

    worker_id: str
    adapter: common_pb2.Adapter
    error: OverfillError | None = None

    def to_proto(self) -> admin_pb2.AdapterChange:
        """Returns the change as the wire's message."""
        error = "" if self.error is None else str(self.error)
        return admin_pb2.AdapterChange(worker_id=self.worker_id, adapter=self.adapter, error=error)


class AdapterChanges:
    """Asks all decode workers for a change, and knows the result before they report it.

    Args:
        rosters: the workers of each revision.
    """

    def __init__(self, rosters: Sequence[Roster], connector: GrpcConnector) -> None:
        self._rosters = rosters
        self._connector = connector

    async def change(self, name: str, *, load: bool) -> list[WorkerChange]:
        """Loads the adapter ``name``, or unloads it, and returns what each decode worker that may have it has done.

        These are the workers of the tiers on whose decoder it works. One that had done so before counts as done.

        Raises:
            InvalidRequest: the name is no adapter's.
            Unavailable: no decode worker has joined.
            OverfillError: no worker has done it; the first one's reason.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise InvalidRequest("name", f"is {name[:80]!r}; a name has {ADAPTER_NAME_RULE}, and is no path")
        if any(name in roster.tiers for roster in self._rosters):
            raise InvalidRequest("name", f"is {name!r}, which is a tier's; give the adapter another name")
        # A worker that drains takes no new adapter, but requests would wait for it as long as it has this one.
        # All channels are looked up before the first await, because a worker may leave meanwhile.
        asked = [
            (worker, roster.adapters, admin_pb2_grpc.AdminStub(self._connector.channel(worker.info)))
            for roster in self._rosters
            for pool in roster.decode.values()
            for worker in pool
            if not (load and worker.draining)
        ]
        if not asked:
            raise Unavailable("no decode worker has joined")
        changes = await asyncio.gather(*[self._change(*one, name, load) for one in asked])
        decoders_of = [(worker.info.identity.revision, worker.info.tier) for worker, _, _ in asked]
        done_by = list(zip(decoders_of, changes, strict=True))
        decoders = {decoder for decoder, one in done_by if _concerns(one.error)}
        concerned = [one for decoder, one in done_by if decoder in decoders or not decoders]
        done = [one for one in concerned if one.error is None]
        if not done and (first := concerned[0].error) is not None:
            raise first
        # A worker that did not have it need not unload it.
        return [one for one in concerned if load or not isinstance(one.error, ModelNotFound)]

    async def _change(
        self, worker: Worker, adapters: Adapters, stub: admin_pb2_grpc.AdminStub, name: str, load: bool
    ) -> WorkerChange:
        if load:
            call = stub.LoadAdapter(admin_pb2.LoadAdapterRequest(name=name), timeout=CHANGE_TIMEOUT)
        else:
            call = stub.UnloadAdapter(admin_pb2.UnloadAdapterRequest(name=name), timeout=CHANGE_TIMEOUT)
        try:
            answer: admin_pb2.ChangeAdapterResponse = await checked_response(call, f"worker {worker.id}")
        except OverfillError as error:
            return WorkerChange(worker.id, common_pb2.Adapter(name=name), error)
        adapter = next((one.adapter for one in answer.workers), common_pb2.Adapter(name=name))
        if not load:
            adapters.remove(worker, name)
        elif (known := adapters.add(worker, adapter)) is not None:
            return WorkerChange(worker.id, adapter, Incompatible(f"worker {worker.id}: {known}", ["name"]))
        return WorkerChange(worker.id, adapter)


def _concerns(error: OverfillError | None) -> bool:
    """Returns whether a worker that answers with ``error`` is one on whose decoder the adapter works."""
    return not isinstance(error, Incompatible) or _OTHERS.isdisjoint(error.fields)
