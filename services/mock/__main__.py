"""``python -m services.mock prefill|decode``: a mock worker as a process."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from overfill.errors import OverfillError
from overfill.settings.mock import MockDecodeConfig, MockPrefillConfig
from overfill.telemetry import logs
from services.mock.running import serve
from services.mock.worker import MockWorker


def main(argv: list[str]) -> int:
    """Runs the worker that ``argv`` names until SIGTERM or SIGINT drains it."""
    kinds: dict[str, type[MockPrefillConfig] | type[MockDecodeConfig]] = {
        "prefill": MockPrefillConfig,
        "decode": MockDecodeConfig,
    }
    if not argv or argv[0] not in kinds:
        print("usage: python -m services.mock prefill|decode [FLAGS]; --help shows them", file=sys.stderr)
        return 2
    config = kinds[argv[0]].parse(argv[1:])
    logs.configure(config.log_level, config.log_format, each_request=config.log_requests == "on")
    try:
        asyncio.run(serve(config, _drained_by_signals))
    except OverfillError as error:
        print(f"{config.program}: {error}", file=sys.stderr)
        return 1
    return 0


def _drained_by_signals(worker: MockWorker) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, worker.drain)
    logging.info("%s ready on %s", worker.hello.worker_id, worker.address)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
