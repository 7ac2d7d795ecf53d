"""``overfill-prefill``: a prefill worker process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from overfill.engine.device import device_executor
from overfill.engine.protocol import ServedHalf
from overfill.kv.shm import ShmServer
from overfill.kv.stall import TransferLimits
from overfill.kv.wire import add_prefill_to_server
from overfill.settings.config import ColocatedConfig, PrefillConfig
from overfill.telemetry.metrics import PrefillMetrics
from overfill.v1 import registry_pb2
from services.hosting import OnReady, StageService, on_loop, run_worker_process, serve_stages
from services.loading import load_half_of
from services.messages import new_hello
from services.prefill.servicer import PrefillServicer

SERVICE = "overfill.v1.Prefill"
_READERS = 2  # threads that copy KV out of the cache


async def serve(config: PrefillConfig, on_ready: OnReady = lambda host: None) -> int:
    """Loads the full model, serves until drained, and returns the exit code. Calls ``on_ready`` once it serves."""
    loaded = await load_half_of(config, "full")
    hello = new_hello(config.worker_id, [loaded.served])
    if (ranks := loaded.served.ranks) is not None:
        tls, access = config.server_tls(), config.access()
        hello.data_addresses.extend(await ranks.serve(config.host, config.data_port, tls, access, config.max_rpcs))
    metrics = PrefillMetrics()
    servicer, stage = prefill_stage(config, loaded.served, hello, metrics)
    core = loaded.new_core(on_loop(servicer.on_events), metrics)
    return await serve_stages(config, hello, core, [stage], on_ready=on_ready)


def prefill_stage(
    config: PrefillConfig | ColocatedConfig, served: ServedHalf, hello: registry_pb2.Hello, metrics: PrefillMetrics
) -> tuple[PrefillServicer, StageService]:
    """Returns the prefill service of a worker that runs the half ``served``. Shares memory from now on."""
    shm_server = ShmServer(config.shm and served.ranks is None)
    servicer = PrefillServicer(
        served,
        hello,
        device_executor(_READERS, "kv-out", served.device),
        2 * config.max_num_seqs,
        shm_server,
        metrics,
        TransferLimits(whole=config.max_transfer_time),
    )
    shm_server.start()
    return servicer, StageService(served, servicer, add_prefill_to_server, SERVICE, metrics, shm_server.stop)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the process from ``argv``, by default the command line."""
    config = PrefillConfig.parse(argv)
    run_worker_process(serve(config), config)


if __name__ == "__main__":
    main()
