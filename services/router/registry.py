"""The Registry service: workers join here and send reports until they leave."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet

from overfill.errors import Incompatible, InvalidRequest, Unavailable
from overfill.kv.journal import MAX_KEYS
from overfill.routing.stream import GrpcConnector
from overfill.routing.worker import PREFILL, STAGE_NAMES, Worker, WorkerInfo
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.interceptors import Context
from overfill.v1 import common_pb2, registry_pb2, registry_pb2_grpc
from overfill.version import __version__
from services.router.core import Core
from services.router.revisions import Revisions

logger = logging.getLogger(__name__)

DEMAND_GAP = 0.05
"""Minimum number of seconds between two Demand messages to a worker."""

LEARN_GAP = 0.2
"""Minimum seconds between two states of a rollout that a router takes from one worker. It tells all workers of each one
that it adopts. A worker repeats its state in each report, so that none is lost."""

MAX_COST_NS = 60 * 10**9
"""Longest time in nanoseconds that a worker may report for the KV of one token."""

MUST_UNDERSTAND = range(32, 64)
"""Numbers of the fields of Hello that a router must not ignore."""


class RegistryServicer(registry_pb2_grpc.RegistryServicer):
    """Keeps the roster of each revision.

    It sends its demand to workers that serve other routers as well, and the state of a rollout to all workers.

    Args:
        on_lost: called with each worker that leaves without having been drained.
    """

    def __init__(
        self,
        router_id: str,
        revisions: Revisions,
        connector: GrpcConnector,
        on_lost: Callable[[WorkerInfo], None] = lambda _: None,
    ) -> None:
        self._on_lost = on_lost
        self._router_id = router_id
        self._revisions = revisions
        self._connector = connector
        self._streams: dict[str, _Stream] = {}

    async def Join(self, request_iterator: AsyncIterator[registry_pb2.JoinRequest], context: Context) -> None:
        first = await anext(request_iterator, None)
        if first is None or not first.HasField("hello"):
            raise InvalidRequest("hello", "must be the first message")
        check_wire_version(first.hello)
        check_fields(first.hello)
        infos = WorkerInfo.from_hello(first.hello)
        core = self._core_of(infos[0])
        info, replaced = infos[0], self._streams.get(infos[0].id)
        if replaced is not None:
            _check_id(replaced, infos)
        stream = _Stream(core, core.roster.join_all(infos), context, first.hello.metrics_address)
        if replaced is not None:
            if replaced.core is not core:  # the worker has restarted with another revision
                replaced.remove()
            if replaced.info.incarnation != info.incarnation:
                self._connector.forget(replaced.info)
        self._streams[info.id] = stream
        tasks: dict[str, asyncio.Task[None]] = {}
        learned, now = -math.inf, asyncio.get_running_loop().time
        try:
            self._connector.add(info)
            logger.info("worker %s joined at %s", info.id, info.address)
            await context.write(registry_pb2.JoinResponse(welcome=registry_pb2.Welcome(router_id=self._router_id)))
            if self._revisions.several:
                tasks["rollout"] = asyncio.create_task(self._tell_rollout(stream))
            async for message in request_iterator:
                if not message.HasField("report"):
                    raise InvalidRequest("report", "is required in every message after the first")
                check_report(message.report)
                if self._streams.get(info.id) is not stream:
                    return  # the worker has joined again on another stream
                for worker in stream.workers:
                    core.async_dispatcher.report(worker, stage_report(message.report, worker.info))
                has_rollout = self._revisions.several and message.report.HasField("rollout")
                if has_rollout and now() - learned >= LEARN_GAP:
                    learned = now()
                    self._revisions.learn(message.report.rollout)
                if message.report.routers > 1 and "demand" not in tasks:
                    tasks["demand"] = asyncio.create_task(self._tell_demand(stream))
        finally:
            for task in tasks.values():
                task.cancel()
            # A worker's older stream may end after its newer one has begun: only the newer one removes the worker.
            if self._streams.get(info.id) is stream:
                logger.info("worker %s left", info.id)
                del self._streams[info.id]
                self._connector.forget(info)
                for worker in stream.workers:
                    if not worker.draining:
                        self._on_lost(worker.info)
                stream.remove()

    def _core_of(self, info: WorkerInfo) -> Core:
        """Returns the core of a worker's revision. Raises Unavailable if there is none."""
        revision = info.identity.revision
        core = self._revisions.get(revision)
        if core is None:
            # The worker tries again, because a router that serves the revision may be about to start.
            raise Unavailable(
                f"worker {info.id} has the revision {revision!r}; this router serves {self._revisions.names}"
            )
        return core

    async def _tell_rollout(self, stream: _Stream) -> None:
        """Sends the worker each state of the rollout that others may have to learn."""
        state = self._revisions.state
        while True:
            if state.generation:
                await stream.write(registry_pb2.JoinResponse(rollout=state.to_proto()))
            state = await self._revisions.changed_since(state)

    async def _tell_demand(self, stream: _Stream) -> None:
        """Sends this router's demand to the worker, which divides its credits among several routers."""
        roster, dispatcher = stream.core.roster, stream.core.async_dispatcher
        pools = [roster.pool_of(worker) for worker in stream.workers]
        sent: registry_pb2.Demand | None = None
        while True:
            version = dispatcher.version
            demand = registry_pb2.Demand(
                in_use=max(worker.in_flight for worker in stream.workers),
                queued=max(dispatcher.queued(pool) for pool in pools),
            )
            if demand != sent:
                sent = demand
                await stream.write(registry_pb2.JoinResponse(demand=demand))
            await asyncio.sleep(DEMAND_GAP)
            await dispatcher.changed_since(version)

    def targets(self) -> list[dict[str, Any]]:
        """Returns the workers' metrics addresses for Prometheus' ``http_sd_configs``. Callable from any thread."""
        return [
            {"targets": [stream.metrics_address], "labels": _labels(stream.workers)}
            for stream in list(self._streams.values())
            if stream.metrics_address
        ]


@dataclass(frozen=True, eq=False, slots=True)
class _Stream:
    """The Join stream of a worker. ``workers`` has the worker in each of its pools, which are the core's."""

    core: Core
    workers: tuple[Worker, ...]
    context: Context
    metrics_address: str
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    @property
    def info(self) -> WorkerInfo:
        """What the worker says of its first stage."""
        return self.workers[0].info

    @property
    def stages(self) -> list[common_pb2.Stage]:
        return [worker.info.stage for worker in self.workers]

    async def write(self, response: registry_pb2.JoinResponse) -> None:
        """Sends a message. gRPC takes one at a time."""
        async with self._writing:
            await self.context.write(response)

    def remove(self) -> None:
        """Removes the worker from its pools."""
        for worker in self.workers:
            self.core.roster.pool_of(worker).remove(worker)
        self.core.async_dispatcher.poll()


class SharedPortRegistry(registry_pb2_grpc.RegistryServicer):
    """Refuses workers at an address that several router processes share, where they would join only one of them."""

    async def Join(self, request_iterator: AsyncIterator[registry_pb2.JoinRequest], context: Context) -> None:
        raise Incompatible(
            "several router processes share this address; give --routers the address of each of them, with its "
            "--join-port (`overfill status` lists them)",
            ["routers"],
        )


def stage_report(report: registry_pb2.Report, info: WorkerInfo) -> registry_pb2.Report:
    """Returns the part of a worker's report that is about the stage of ``info``."""
    if not info.colocated:
        return report
    part = registry_pb2.Report()
    part.CopyFrom(report)
    part.ClearField("prefill_load")
    if info.stage == PREFILL:
        part.load.CopyFrom(report.prefill_load)
    else:
        for name in ("prefix", "disk", "costs"):
            part.ClearField(name)
    return part


def check_report(report: registry_pb2.Report) -> None:
    """Raises InvalidRequest if a worker reports more keys at once than it may, or impossible costs."""
    for name in ("prefix", "disk"):
        delta = getattr(report, name)
        if (count := len(delta.added) + len(delta.removed)) > MAX_KEYS:
            raise InvalidRequest(f"report.{name}", f"must have at most {MAX_KEYS} keys; got {count}")
    for cost, value in report.costs.ListFields():
        if value > MAX_COST_NS:
            raise InvalidRequest(f"report.costs.{cost.name}", f"must be at most {MAX_COST_NS}; got {value}")


def _check_id(joined: _Stream, infos: Sequence[WorkerInfo]) -> None:
    """Raises Incompatible if the id of the worker that wants to join is another worker's.

    Two live workers with one id would replace each other again and again.
    """
    info, previous = infos[0], joined.info
    if joined.stages != [one.stage for one in infos]:
        raise Incompatible(
            f"a worker of another stage has the id {info.id!r}; give each worker its own id", ["worker_id"]
        )
    worker = joined.core.roster.find(info.id)
    if (
        worker is not None
        and previous.incarnation != info.incarnation
        and previous.address != info.address
        and worker.alive(asyncio.get_running_loop().time())
    ):
        logger.warning(
            "refused a second worker %s: the first is at %s, this one at %s", info.id, previous.address, info.address
        )
        raise Incompatible(
            f"a live worker at {previous.address} has the id {info.id!r}; give each worker its own id", ["worker_id"]
        )


def _labels(workers: Sequence[Worker]) -> dict[str, str]:
    last = workers[-1].info  # with both stages, the decode stage, which has a tier
    labels = {"stage": "+".join(STAGE_NAMES[worker.info.stage] for worker in workers), "worker": last.id}
    named = {"tier": last.tier, "revision": last.identity.revision}
    return labels | {label: name for label, name in named.items() if name}


def check_wire_version(hello: registry_pb2.Hello) -> None:
    """Raises Incompatible, which names both versions, if the worker uses another version of the wire."""
    if hello.wire_version != WIRE_VERSION:
        raise Incompatible(
            f"worker {hello.worker_id} speaks wire version {hello.wire_version} (software "
            f"{hello.software_version or 'unknown'}); this router speaks {WIRE_VERSION} (software {__version__})",
            ["wire_version"],
        )


def check_fields(hello: registry_pb2.Hello) -> None:
    """Raises Incompatible if the worker says something that this router does not know and must not ignore."""
    fields: Any = UnknownFieldSet(hello)
    unknown = sorted({f.field_number for f in fields if f.field_number in MUST_UNDERSTAND})
    if unknown:
        raise Incompatible(
            f"worker {hello.worker_id} (software {hello.software_version or 'unknown'}) uses fields {unknown} of "
            f"Hello, which this router (software {__version__}) does not know; upgrade the router first",
            ["hello"],
        )
