"""``overfill-decode``: a decode worker process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NoReturn

from overfill.engine.device import device_executor
from overfill.engine.sequence import DecodeEvent
from overfill.kv.peers import PeerPool
from overfill.kv.stall import TransferLimits
from overfill.request.names import CODECS
from overfill.settings.config import DecodeConfig
from overfill.telemetry.metrics import DecodeMetrics
from overfill.v1 import decode_pb2_grpc
from services.decode.servicer import DecodeServicer
from services.hosting import OnReady, load_half_of, new_hello, run_worker_process, serve_engine

SERVICE = "overfill.v1.Decode"
_WRITERS = 2  # threads that check received KV and write it to the cache


async def serve(config: DecodeConfig, on_ready: OnReady = lambda host: None) -> int:
    """Loads the decoder, serves until drained, and returns the exit code. Calls ``on_ready`` once it serves."""
    loop = asyncio.get_running_loop()
    loaded = await load_half_of(config, "decoder")
    served = loaded.served
    hello = new_hello(config.worker_id, served, config.tier)
    codec = CODECS[config.codec]
    peers = PeerPool(served.kv_identity, config.data_streams, config.credentials(), config.shm == "on")
    metrics = DecodeMetrics()
    limits = TransferLimits(whole=config.max_transfer_time)
    writers = device_executor(_WRITERS, "kv-in", served.device)
    servicer = DecodeServicer(served, hello, peers, writers, codec, metrics, limits)

    def emit(events: list[DecodeEvent]) -> None:
        loop.call_soon_threadsafe(servicer.on_events, events)

    core = loaded.new_core(emit, metrics)
    try:
        return await serve_engine(
            config,
            hello,
            served,
            core,
            servicer,
            decode_pb2_grpc.add_DecodeServicer_to_server,
            SERVICE,
            metrics,
            codec=codec,
            on_ready=on_ready,
        )
    finally:
        await peers.close()


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the process from ``argv``, by default the command line."""
    config = DecodeConfig.parse(argv)
    run_worker_process(serve(config), config)


if __name__ == "__main__":
    main()
