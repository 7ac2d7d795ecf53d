"""The Admin service of the router: status of the whole stack, collected from its processes, and draining."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from overfill.errors import InvalidRequest, OverfillError, RequestCancelled, Unavailable
from overfill.routing import rolling_stats
from overfill.routing.stream import GrpcConnector
from overfill.routing.worker import PREFILL, STALE_AFTER, Worker
from overfill.rpc.access import Role
from overfill.rpc.calls import checked_response
from overfill.rpc.channel import open_channel
from overfill.rpc.interceptors import Context
from overfill.rpc.tls import Credentials
from overfill.v1 import admin_pb2, admin_pb2_grpc, common_pb2
from services.router.adapter_changes import AdapterChanges, WorkerChange
from services.router.port_group import Member
from services.router.revisions import Revisions

STATUS_TIMEOUT = 1.0
"""Seconds after which a worker or another router counts as silent."""

DRAIN_TIMEOUT = 5.0
"""Seconds for a worker or another router to answer Drain."""

_LEAVING = 2.0


class RouterProcess(Protocol):
    """What the service asks of its router."""

    @property
    def http_address(self) -> str:
        """Address of the HTTP endpoint; empty without one."""

    def status(self) -> admin_pb2.ProcessStatus:
        """Returns the router's own status."""

    def activity(self, histograms: bool) -> admin_pb2.Activity:
        """Returns the router's rolling statistics; with True, their histograms too."""

    def member(self) -> Member:
        """Returns the router's own addresses."""

    def drain(self) -> None:
        """Drains the router."""


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Serves Admin on the router.

    Args:
        others: returns the other router processes for which this service answers too.
        credentials: credentials for calling them.
        adapters: changes the decode workers' adapters.
    """

    def __init__(
        self,
        router: RouterProcess,
        revisions: Revisions,
        connector: GrpcConnector,
        others: Callable[[], Sequence[Member]],
        credentials: Credentials | None,
        adapters: AdapterChanges,
    ) -> None:
        self._router = router
        self._revisions = revisions
        self._connector = connector
        self._others = others
        self._credentials = credentials
        self._adapters = adapters

    async def Status(self, request: admin_pb2.StatusRequest, context: Context) -> admin_pb2.StatusResponse:
        if request.alone:
            return admin_pb2.StatusResponse(process=self._router.status(), activity=self._router.activity(True))
        # Look up all channels before the first await: a worker may leave while others are being queried.
        known = self._workers()
        stubs = {w.id: self._stub(w) for w in known}  # a worker with both stages is asked once
        answers = dict(
            zip(stubs, await asyncio.gather(*[self._ask(stub, id) for id, stub in stubs.items()]), strict=True)
        )
        return await self._response([_with_process(_listed(w), answers[w.id]) for w in known])

    async def known(self) -> admin_pb2.StatusResponse:
        """Returns the status from the workers' reports, without asking them. A silent worker has no ``process``."""
        now = asyncio.get_running_loop().time()
        return await self._response([_reported(worker, now) for worker in self._workers()])

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        if not request.worker_id:
            await asyncio.gather(*[self._drain_router(other) for other in self._others()])
            self._router.drain()
            return admin_pb2.DrainResponse()
        worker = self._find(request.worker_id)
        if worker is None:
            # A worker with both stages is listed once for each.
            known = ", ".join(dict.fromkeys(w.id for w in self._workers())) or "none"
            raise InvalidRequest("worker_id", f"no worker {request.worker_id!r} has joined; joined: {known}")
        drained = self._stub(worker).Drain(admin_pb2.DrainRequest(), timeout=DRAIN_TIMEOUT)
        try:
            await checked_response(drained, f"worker {worker.id}")
        except (RequestCancelled, Unavailable):
            # A worker without requests may leave before its answer is written.
            if not await self._leaves(worker):
                raise
        return admin_pb2.DrainResponse()

    async def LoadAdapter(
        self, request: admin_pb2.LoadAdapterRequest, context: Context
    ) -> admin_pb2.ChangeAdapterResponse:
        return _response_of(await self._adapters.change(request.name, load=True))

    async def UnloadAdapter(
        self, request: admin_pb2.UnloadAdapterRequest, context: Context
    ) -> admin_pb2.ChangeAdapterResponse:
        return _response_of(await self._adapters.change(request.name, load=False))

    async def ChangeRollout(self, request: admin_pb2.ChangeRolloutRequest, context: Context) -> admin_pb2.RolloutStatus:
        self._revisions.change(request)
        return self._revisions.status()

    def _workers(self) -> list[Worker]:
        return [worker for core in self._revisions.cores for worker in core.roster.workers()]

    def _find(self, worker_id: str) -> Worker | None:
        found = (core.roster.find(worker_id) for core in self._revisions.cores)
        return next((worker for worker in found if worker is not None), None)

    async def _leaves(self, worker: Worker) -> bool:
        """Returns True once the worker has left or drains; False if it does neither within ``_LEAVING``.

        The end of its Join stream may arrive after the end of its Drain, because they use two connections.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVING):
                while self._find(worker.id) is worker and not worker.draining:  # noqa: ASYNC110  # it has no event
                    await asyncio.sleep(0.05)
                return True
        return False

    async def _response(self, workers: Sequence[admin_pb2.WorkerStatus]) -> admin_pb2.StatusResponse:
        ready = Counter((w.revision, w.stage, w.tier) for w in workers if w.process.ready and not w.process.draining)
        now = asyncio.get_running_loop().time()
        pools = [pool for core in self._revisions.cores for pool in core.pools(now)]
        for pool in pools:
            pool.ready = ready[pool.revision, pool.stage, pool.tier]
        process, member = self._router.status(), self._router.member()
        others = await asyncio.gather(*[self._ask_router(other) for other in self._others()])
        activity = self._router.activity(bool(others))
        own = admin_pb2.RouterStatus(id=member.id, address=member.address, process=process, activity=activity)
        routers = [own, *others]
        if others:
            activity = rolling_stats.add_up(router.activity for router in routers)
            for router in routers:
                if router.HasField("activity"):
                    router.activity.ClearField("histograms")
        return admin_pb2.StatusResponse(
            process=process,
            workers=workers,
            complete=all(pool.ready >= pool.expected for pool in pools),
            http_address=self._router.http_address,
            activity=activity,
            pools=pools,
            routers=routers,
        )

    async def _ask_router(self, other: Member) -> admin_pb2.RouterStatus:
        status = admin_pb2.RouterStatus(id=other.id, address=other.address)
        try:
            answer = await self._call_router(other, "Status", admin_pb2.StatusRequest(alone=True), STATUS_TIMEOUT)
        except OverfillError:
            return status
        status.process.CopyFrom(answer.process)
        status.activity.CopyFrom(answer.activity)
        return status

    async def _drain_router(self, other: Member) -> None:
        with suppress(Unavailable, RequestCancelled):  # a router that dies has nothing to drain
            await self._call_router(other, "Drain", admin_pb2.DrainRequest(), DRAIN_TIMEOUT)

    async def _call_router(self, other: Member, method: str, request: Any, timeout: float) -> Any:
        channel = open_channel(other.address, self._credentials, role=Role.ROUTER)
        try:
            call = getattr(admin_pb2_grpc.AdminStub(channel), method)(request, timeout=timeout)
            return await checked_response(call, f"router {other.id}")
        finally:
            await channel.close(None)

    def _stub(self, worker: Worker) -> admin_pb2_grpc.AdminStub:
        return admin_pb2_grpc.AdminStub(self._connector.channel(worker.info))

    async def _ask(self, stub: admin_pb2_grpc.AdminStub, worker_id: str) -> admin_pb2.ProcessStatus | None:
        """Returns what a worker says of itself; None if it does not answer in time."""
        call = stub.Status(admin_pb2.StatusRequest(), timeout=STATUS_TIMEOUT)
        try:
            answer: admin_pb2.StatusResponse = await checked_response(call, f"worker {worker_id}")
        except OverfillError:
            return None
        return answer.process


def _response_of(changes: Sequence[WorkerChange]) -> admin_pb2.ChangeAdapterResponse:
    return admin_pb2.ChangeAdapterResponse(workers=[change.to_proto() for change in changes])


def _listed(worker: Worker) -> admin_pb2.WorkerStatus:
    info = worker.info
    adapters = sorted(worker.adapters.items())
    return admin_pb2.WorkerStatus(
        id=worker.id,
        stage=info.stage,
        address=info.address,
        tier=info.tier,
        colocated=info.colocated,
        revision=info.identity.revision,
        adapters=[
            common_pb2.Adapter(name=name, digest=one.digest, tail_tokens=one.tail_tokens) for name, one in adapters
        ],
    )


def _with_process(status: admin_pb2.WorkerStatus, process: admin_pb2.ProcessStatus | None) -> admin_pb2.WorkerStatus:
    """Returns ``status`` with what the worker says of itself, as far as it is about the entry's stage."""
    if process is not None:
        status.process.CopyFrom(process)
        if status.colocated and status.stage == PREFILL:
            status.process.stage, status.process.tier = PREFILL, ""
            status.process.load.CopyFrom(process.prefill_load)
        status.process.ClearField("prefill_load")
    return status


def _reported(worker: Worker, now: float) -> admin_pb2.WorkerStatus:
    info, report = worker.info, worker.report
    status = _listed(worker)
    if report is not None and now - worker.reported_at > STALE_AFTER:
        return status
    process = status.process
    process.id, process.stage, process.address = info.id, info.stage, info.address
    process.incarnation, process.engine, process.tier = info.incarnation, info.engine, info.tier
    if report is not None:
        process.ready, process.draining = report.ready, report.draining
        process.load.CopyFrom(report.load)
    return status
