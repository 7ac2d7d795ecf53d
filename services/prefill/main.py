"""``overfill-prefill``: a prefill worker process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NoReturn

from overfill.engine.device import device_executor
from overfill.engine.sequence import PrefillEvent
from overfill.kv.shm import ShmServer
from overfill.kv.stall import TransferLimits
from overfill.kv.wire import add_prefill_to_server
from overfill.settings.config import PrefillConfig
from overfill.telemetry.metrics import PrefillMetrics
from services.hosting import OnReady, load_half_of, new_hello, run_worker_process, serve_engine
from services.prefill.servicer import PrefillServicer

SERVICE = "overfill.v1.Prefill"
_READERS = 2  # threads that copy KV out of the cache


async def serve(config: PrefillConfig, on_ready: OnReady = lambda host: None) -> int:
    """Loads the full model, serves until drained, and returns the exit code. Calls ``on_ready`` once it serves."""
    loop = asyncio.get_running_loop()
    loaded = await load_half_of(config, "full")
    served = loaded.served
    hello = new_hello(config.worker_id, served)
    shm_server = ShmServer(config.shm == "on")
    metrics = PrefillMetrics()
    servicer = PrefillServicer(
        served,
        hello,
        device_executor(_READERS, "kv-out", served.device),
        2 * config.max_num_seqs,
        shm_server,
        metrics,
        TransferLimits(whole=config.max_transfer_time),
    )

    def emit(events: list[PrefillEvent]) -> None:
        loop.call_soon_threadsafe(servicer.on_events, events)

    core = loaded.new_core(emit, metrics)
    shm_server.start()
    try:
        return await serve_engine(
            config,
            hello,
            served,
            core,
            servicer,
            add_prefill_to_server,
            SERVICE,
            metrics,
            on_ready=on_ready,
        )
    finally:
        await shm_server.stop()


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the process from ``argv``, by default the command line."""
    config = PrefillConfig.parse(argv)
    run_worker_process(serve(config), config)


if __name__ == "__main__":
    main()
