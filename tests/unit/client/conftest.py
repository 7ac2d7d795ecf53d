"""A scripted router on loopback, which runs in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import router_events as say

from overfill.rpc.server import RpcServer
from overfill.v1 import admin_pb2, admin_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc


class FakeRouter(inference_pb2_grpc.InferenceServicer, admin_pb2_grpc.AdminServicer):
    """Plays ``script``: sends responses, raises exceptions, and at "hang" waits until the client disconnects.

    Calls ``on_request`` before the script starts. Never answers Tokenize, and calls ``on_tokenize`` when it arrives.
    """

    def __init__(self) -> None:
        self.script: list[say.Response | Exception | str] = list(say.GOOD)
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.rollouts: list[admin_pb2.ChangeRolloutRequest] = []
        self.time_remaining: list[float | None] = []
        self.abandoned = threading.Event()
        self.on_request: Callable[[], object] = lambda: None
        self.on_tokenize: Callable[[], object] = lambda: None
        self.address = ""

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[say.Response]:
        self.requests.append(request)
        self.on_request()
        self.time_remaining.append(context.time_remaining())
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, str):
                    await asyncio.Event().wait()
                else:
                    yield step
        except (asyncio.CancelledError, GeneratorExit):
            self.abandoned.set()
            raise

    async def Tokenize(self, request: Any, context: Any) -> Any:
        self.on_tokenize()
        await asyncio.Event().wait()

    async def ListModels(self, request: Any, context: Any) -> Any:
        model = inference_pb2.Model(name="tiny", max_model_len=64, full_digest="f", decoder_digest="d", dtype="float32")
        model.tier = "full"
        return inference_pb2.ListModelsResponse(models=[model])

    async def Status(self, request: Any, context: Any) -> Any:
        process = admin_pb2.ProcessStatus(id="d0", stage=common_pb2.STAGE_DECODE, pid=5, ready=True)
        process.load.kv_blocks_total = 8
        process.kv.dtype = common_pb2.DTYPE_BFLOAT16
        process.codec = common_pb2.KV_CODEC_RAW
        process.tier = "full"
        return admin_pb2.StatusResponse(
            process=admin_pb2.ProcessStatus(id="router", stage=common_pb2.STAGE_ROUTER, address="0.0.0.0:7600"),
            workers=[
                admin_pb2.WorkerStatus(
                    id="d0", stage=common_pb2.STAGE_DECODE, address="a", process=process, tier="full"
                ),
                admin_pb2.WorkerStatus(id="d1", stage=common_pb2.STAGE_DECODE, address="b"),
            ],
            pools=[
                admin_pb2.PoolStatus(stage=common_pb2.STAGE_PREFILL, expected=1),
                admin_pb2.PoolStatus(stage=common_pb2.STAGE_DECODE, ready=1, expected=1, tier="full", brownout=True),
                admin_pb2.PoolStatus(stage=common_pb2.STAGE_DECODE, ready=0, expected=2, tier="fast"),
            ],
        )

    async def ChangeRollout(self, request: Any, context: Any) -> Any:
        self.rollouts.append(request)
        pool = admin_pb2.PoolStatus(stage=common_pb2.STAGE_DECODE, ready=2, expected=3)
        new = admin_pb2.RevisionStatus(name="r2", percent=25, ready=True, pools=[pool], running=4)
        old = admin_pb2.RevisionStatus(name="r1", percent=75)
        return admin_pb2.RolloutStatus(revisions=[old, new], target_percent=50, remaining_seconds=9.5, paused=True)


@contextmanager
def serve(router: FakeRouter) -> Iterator[FakeRouter]:
    """Serves ``router`` within the block, and sets its ``address``."""
    started: Future[Callable[[], None]] = Future()

    async def main() -> None:
        server, stop, loop = RpcServer(), asyncio.Event(), asyncio.get_running_loop()
        server.add(inference_pb2_grpc.add_InferenceServicer_to_server, router, "overfill.v1.Inference")
        server.add(admin_pb2_grpc.add_AdminServicer_to_server, router, "overfill.v1.Admin")
        router.address = await server.start("127.0.0.1:0")
        started.set_result(lambda: loop.call_soon_threadsafe(stop.set))
        await stop.wait()
        await server.stop()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            started.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    stop = started.result()
    try:
        yield router
    finally:
        stop()
        thread.join()


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with serve(FakeRouter()) as router:
        yield router


@pytest.fixture
def another_router() -> Iterator[FakeRouter]:
    with serve(FakeRouter()) as router:
        yield router


@pytest.fixture
def closed_address() -> str:
    """An address at which a server has stopped listening."""
    with serve(FakeRouter()) as router:
        return router.address
