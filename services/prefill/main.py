"""``overfill-prefill``: a prefill worker process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from overfill.engine.device import device_executor
from overfill.engine.protocol import ServedHalf
from overfill.kv.borrowing import Borrower
from overfill.kv.imports import Importer
from overfill.kv.peers import PeerPool, PrefillPeer
from overfill.kv.puller import LocalPuller
from overfill.kv.ranks import Puller
from overfill.kv.shm import ShmServer
from overfill.kv.stall import TransferLimits
from overfill.kv.wire import add_prefill_to_server
from overfill.settings.config import ColocatedConfig, PrefillConfig
from overfill.telemetry.metrics import PrefillMetrics
from overfill.v1 import registry_pb2
from services.hosting import OnReady, StageService, on_loop, run_worker_process, serve_stages
from services.loading import load_half_of
from services.messages import new_hello
from services.prefill.kv_disk import open_disk
from services.prefill.servicer import PrefillServicer

SERVICE = "overfill.v1.Prefill"
_READERS = 2  # threads that copy KV out of the cache
_WRITERS = 2  # threads that check imported KV and write it to the cache
_LOAN_STREAMS = 2  # connections to each data address of a worker that lends KV, as decode workers have by default


async def serve(config: PrefillConfig, on_ready: OnReady = lambda host: None) -> int:
    """Loads the full model, serves until drained, and returns the exit code. Calls ``on_ready`` once it serves."""
    loaded = await load_half_of(config, "full")
    hello = new_hello(config.worker_id, [loaded.served])
    if (ranks := loaded.served.ranks) is not None:
        tls, access = config.server_tls(), config.access()
        hello.data_addresses.extend(await ranks.serve(config.host, config.data_port, tls, access, config.max_rpcs))
        await ranks.connect(_LOAN_STREAMS, config.credentials())
    metrics = PrefillMetrics()
    servicer, stage = prefill_stage(config, loaded.served, hello, metrics)
    core = loaded.new_core(on_loop(servicer.on_events), metrics)
    return await serve_stages(config, hello, core, [stage], on_ready=on_ready)


def prefill_stage(
    config: PrefillConfig | ColocatedConfig, served: ServedHalf, hello: registry_pb2.Hello, metrics: PrefillMetrics
) -> tuple[PrefillServicer, StageService]:
    """Returns the prefill service of a worker that runs the half ``served``. Shares memory from now on."""
    shm = config.shm and served.ranks is None  # a rank shares no memory with another worker
    shm_server = ShmServer(shm)
    servicer = PrefillServicer(
        served,
        hello,
        device_executor(_READERS, "kv-out", served.device),
        2 * config.max_num_seqs,
        shm_server,
        metrics,
        TransferLimits(whole=config.max_transfer_time),
        max_loans=config.max_num_seqs if config.kv_peers else 0,
    )
    hello.lends_kv = config.kv_peers and served.lends_kv
    disk = open_disk(config, served, servicer.loans.lend, metrics.disk)
    peers = PeerPool(served.kv_identity, _LOAN_STREAMS, config.credentials(), shm)
    borrower = Borrower(peers, served.kv, served.store.block_size, _new_puller(served))
    importer = servicer.importer = Importer(
        (hello.worker_id, hello.incarnation),
        served.store.block_size,
        lambda: servicer.engine.load.token_seconds,
        borrower.borrow if config.kv_peers else None,
        disk,
        metrics,
    )
    shm_server.start()

    async def close() -> None:
        await shm_server.stop()
        await peers.close()
        if disk is not None:
            await disk.close()

    def disk_bytes() -> int:
        return 0 if disk is None else disk.used_bytes

    if disk is not None:
        metrics.disk.watch(disk_bytes)
    return servicer, StageService(
        served,
        servicer,
        add_prefill_to_server,
        SERVICE,
        metrics,
        close,
        disk_keys=None if disk is None else disk.keys,
        costs=lambda: importer.costs,
        kv_disk_bytes=disk_bytes,
    )


def _new_puller(served: ServedHalf) -> Callable[[PrefillPeer], Puller]:
    """Returns what makes a puller of a peer's KV into the blocks of ``served``."""
    if (ranks := served.ranks) is not None:
        return lambda peer: ranks.puller
    writers = device_executor(_WRITERS, "kv-in", served.device)
    return lambda peer: LocalPuller(served.store, writers, peer.data, peer.link)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the process from ``argv``, by default the command line."""
    config = PrefillConfig.parse(argv)
    run_worker_process(serve, config)


if __name__ == "__main__":
    main()
