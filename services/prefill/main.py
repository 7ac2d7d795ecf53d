"""``overfill-prefill``: a prefill worker process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from overfill.config import PrefillConfig
from overfill.engine.hosting import load_parts, new_hello, run_worker_process, worker_load
from overfill.engine.prefill import PrefillEngine
from overfill.engine.sequence import PrefillEvent
from overfill.engine.thread import EngineThread
from overfill.rpc.server import RpcServer
from overfill.rpc.worker import WorkerHandle, WorkerHost
from overfill.v1 import common_pb2, prefill_pb2_grpc
from services.prefill.servicer import PrefillServicer

SERVICE = "overfill.v1.Prefill"
_READERS = 2  # threads that copy KV out of the cache beside the engine


async def serve(config: PrefillConfig) -> int:
    """Loads the full model, serves until drained, and returns the exit code."""
    loop = asyncio.get_running_loop()
    parts = await load_parts(config, "full", config.token_budget)
    hello = new_hello(common_pb2.STAGE_PREFILL, config.worker_id, parts, "full")
    servicer = PrefillServicer(parts, hello, ThreadPoolExecutor(_READERS, "kv-out"), 2 * config.max_num_seqs)

    def emit(event: PrefillEvent) -> None:
        loop.call_soon_threadsafe(servicer.on_event, event)

    core = PrefillEngine(parts.runner, parts.pool, config.token_budget, config.max_num_seqs, emit)
    engine = EngineThread(
        core,
        "prefill-engine",
        config.threads,
        on_load_change=lambda: loop.call_soon_threadsafe(servicer.host.notify),
    )
    servicer.engine = engine
    server = RpcServer(config.server_tls())
    server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, servicer, SERVICE)
    worker = WorkerHandle(
        load=lambda: worker_load(engine.load, config.block_size),
        active=lambda: servicer.active,
        capacity=config.max_num_seqs,
        healthy=lambda: engine.alive,
    )
    host = WorkerHost(server, hello, worker, config.routers, config.client_tls(), config.grace_period, config.advertise)
    servicer.host = host
    engine.start()
    try:
        return await host.run(f"{config.host}:{config.port}")
    finally:
        engine.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Console entry point."""
    config = PrefillConfig.parse(argv)
    return run_worker_process(serve(config), config.threads, config.log_level)


if __name__ == "__main__":
    sys.exit(main())
