"""``overfill-decode``: a decode worker process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

from overfill.engine.device import device_executor
from overfill.engine.protocol import ServedHalf
from overfill.kv.peers import PeerPool
from overfill.kv.shm import ShmServer
from overfill.kv.stall import TransferLimits
from overfill.kv.wire import add_lender_to_server
from overfill.request.names import CODECS
from overfill.settings.config import DecodeConfig
from overfill.telemetry.metrics import DecodeMetrics
from overfill.v1 import common_pb2, decode_pb2_grpc, registry_pb2
from services.decode.adapters import WorkerAdapters
from services.decode.servicer import DecodeServicer
from services.hosting import OnReady, StageService, on_loop, run_worker_process, serve_stages
from services.lending import Lender, LendingServicer
from services.loading import load_half_of
from services.messages import new_hello

SERVICE = "overfill.v1.Decode"
_WRITERS = 2  # threads that check received KV and write it to the cache
_READERS = 2  # threads that copy lent KV out of the cache


async def serve(config: DecodeConfig, on_ready: OnReady = lambda host: None) -> int:
    """Loads the decoder, serves until drained, and returns the exit code. Calls ``on_ready`` once it serves."""
    loaded = await load_half_of(config, "decoder")
    hello = new_hello(config.worker_id, [loaded.served], config.tier)
    if (ranks := loaded.served.ranks) is not None:
        await ranks.connect(config.data_streams, config.credentials())
    metrics = DecodeMetrics()
    servicer, stage = decode_stage(config, loaded.served, hello, metrics)
    core = loaded.new_core(on_loop(servicer.on_events), metrics)
    return await serve_stages(config, hello, core, [stage], CODECS[config.codec], on_ready)


def decode_stage(
    config: DecodeConfig, served: ServedHalf, hello: registry_pb2.Hello, metrics: DecodeMetrics
) -> tuple[DecodeServicer, StageService]:
    """Returns the decode service of a worker that runs the half ``served``.

    A decode worker that lends KV says so in its Hello, and serves loans too.
    """
    # A rank shares no memory with a prefill worker.
    peers = PeerPool(served.kv_identity, config.data_streams, config.credentials(), config.shm and served.ranks is None)
    limits = TransferLimits(whole=config.max_transfer_time)
    writers = device_executor(_WRITERS, "kv-in", served.device)
    servicer = DecodeServicer(served, hello, peers, writers, CODECS[config.codec], metrics, limits)
    if config.adapters is not None and config.max_adapters:
        servicer.adapters = WorkerAdapters(
            config.adapters, served, hello, servicer.send, lambda: servicer.host.notify()
        )
    add: Callable[[Any, Any], None] = decode_pb2_grpc.add_DecodeServicer_to_server
    close: Callable[[], Awaitable[None]] = peers.close
    if common_pb2.STAGE_PREFILL not in hello.stages:  # with both stages, the other one lends
        hello.lends_kv = config.kv_peers and served.lends_kv
        if hello.lends_kv:
            add, close = _lending(config, served, hello, servicer, peers)
    return servicer, StageService(served, servicer, add, SERVICE, metrics, close, servicer.on_drain, servicer.adapters)


def _lending(
    config: DecodeConfig, served: ServedHalf, hello: registry_pb2.Hello, servicer: DecodeServicer, peers: PeerPool
) -> tuple[Callable[[Any, Any], None], Callable[[], Awaitable[None]]]:
    """Returns ``StageService.add`` and ``close`` of a worker that also lends the KV of its prompts and answers."""
    shm_server = ShmServer(config.shm)
    readers = device_executor(_READERS, "kv-out", served.device)
    lender = Lender(served, hello, servicer.loans, readers, config.max_num_seqs, shm_server, servicer.metrics)
    shm_server.start()

    def add(servicer: Any, server: Any) -> None:
        decode_pb2_grpc.add_DecodeServicer_to_server(servicer, server)
        add_lender_to_server(LendingServicer(lender, served, hello, shm_server), server)

    async def close() -> None:
        await shm_server.stop()
        await peers.close()

    return add, close


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the process from ``argv``, by default the command line."""
    config = DecodeConfig.parse(argv)
    run_worker_process(serve, config)


if __name__ == "__main__":
    main()
