"""``overfill-colocated``: a worker process with both stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from overfill.request.names import CODECS
from overfill.settings.config import ColocatedConfig
from overfill.telemetry.metrics import DecodeMetrics, PrefillMetrics
from services.colocated.local_prefill import LocalPrefills
from services.decode.main import decode_stage
from services.hosting import OnReady, on_loop, run_worker_process, serve_stages
from services.loading import load_both_halves_of
from services.messages import new_hello
from services.prefill.main import prefill_stage


async def serve(config: ColocatedConfig, on_ready: OnReady = lambda host: None) -> int:
    """Loads both models, serves until drained, and returns the exit code. Calls ``on_ready`` once it serves."""
    loaded = await load_both_halves_of(config)
    full, decoder = loaded.full.served, loaded.decoder.served
    hello = new_hello(config.worker_id, [full, decoder], config.tier)
    of_prefill = PrefillMetrics()
    of_decode = DecodeMetrics(beside=of_prefill)
    prefill, prefill_service = prefill_stage(config, full, hello, of_prefill)
    decode, decode_service = decode_stage(config, decoder, hello, of_decode)
    here = LocalPrefills(full, prefill, of_prefill)
    decode.own_prefills = here

    def on_decode_events(events: Sequence[Any]) -> None:  # of sequences, and of prompts that are prefilled here
        here.on_events(events)
        decode.on_events(events)

    core = loaded.new_core(
        on_loop(prefill.on_events),
        on_loop(on_decode_events),
        of_prefill,
        of_decode,
        config.ttft_objective,
        config.itl_objective,
    )
    return await serve_stages(config, hello, core, [prefill_service, decode_service], CODECS[config.codec], on_ready)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the process from ``argv``, by default the command line."""
    config = ColocatedConfig.parse(argv)
    run_worker_process(serve, config)


if __name__ == "__main__":
    main()
