"""Workers join here, and report until they leave."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from overfill import __version__
from overfill.errors import Incompatible, InvalidRequest
from overfill.routing.gate import Gate
from overfill.routing.pool import DECODE, PREFILL, Roster, WorkerInfo
from overfill.routing.stream import GrpcConnector
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.interceptors import Context
from overfill.v1 import common_pb2, registry_pb2, registry_pb2_grpc

logger = logging.getLogger(__name__)


class Expected:
    """Whether every worker that a stack was started with has been ready at least once. Never unsays it."""

    def __init__(self, prefill: int, decode: int) -> None:
        self._counts = {PREFILL: prefill, DECODE: decode}
        self._seen: dict[common_pb2.Stage, set[str]] = {PREFILL: set(), DECODE: set()}
        self.complete = False
        self._update()

    def ready(self, info: WorkerInfo) -> None:
        if not self.complete:
            self._seen[info.stage].add(info.id)
            self._update()

    def _update(self) -> None:
        self.complete = all(len(self._seen[stage]) >= count for stage, count in self._counts.items())


class RegistryServicer(registry_pb2_grpc.RegistryServicer):
    """Keeps the roster. A single router has no use for RecallCredits, so none is sent."""

    def __init__(
        self, router_id: str, roster: Roster, gate: Gate, connector: GrpcConnector, expected: Expected
    ) -> None:
        self._router_id = router_id
        self._roster = roster
        self._gate = gate
        self._connector = connector
        self._expected = expected
        self._streams: dict[str, tuple[WorkerInfo, Context]] = {}

    async def Join(
        self, request_iterator: AsyncIterator[registry_pb2.JoinRequest], context: Context
    ) -> AsyncIterator[registry_pb2.JoinResponse]:
        first = await anext(request_iterator, None)
        if first is None or not first.HasField("hello"):
            raise InvalidRequest("hello", "must be the first message")
        check_wire_version(first.hello)
        info = WorkerInfo.from_hello(first.hello)
        previous, _ = self._streams.get(info.id, (None, None))
        if previous is not None and previous.stage != info.stage:
            raise Incompatible(
                f"{info.id!r} is the id of a worker of the other stage; give one of its own", ["worker_id"]
            )
        worker = self._roster.join(info)
        if previous is not None and previous.incarnation != info.incarnation:
            self._connector.forget(previous)
        self._connector.add(info)
        self._streams[info.id] = (info, context)
        logger.info("worker %s joined at %s", info.id, info.address)
        try:
            yield registry_pb2.JoinResponse(welcome=registry_pb2.Welcome(router_id=self._router_id))
            async for message in request_iterator:
                if not message.HasField("report"):
                    raise InvalidRequest("report", "must be all that follows the first message")
                if not self._current(info, context):
                    return  # it has joined again meanwhile
                self._gate.report(worker, message.report)
                if message.report.ready:
                    self._expected.ready(info)
        finally:
            # Of two streams of one worker, the older one may end later.
            if self._current(info, context):
                logger.info("worker %s left", info.id)
                del self._streams[info.id]
                self._connector.forget(info)
                self._roster.pool(info.stage).leave(worker)
                self._gate.poll()

    def _current(self, info: WorkerInfo, context: Context) -> bool:
        return self._streams.get(info.id, (None, None))[1] is context


def check_wire_version(hello: registry_pb2.Hello) -> None:
    """Raises Incompatible, naming both versions, when the worker speaks another version of the wire."""
    if hello.wire_version != WIRE_VERSION:
        raise Incompatible(
            f"worker {hello.worker_id} speaks wire version {hello.wire_version} (software "
            f"{hello.software_version or 'unknown'}); this router speaks {WIRE_VERSION} (software {__version__})",
            ["wire_version"],
        )
