"""``python -m overfill.testing.mock prefill|decode``: a mock worker as a process."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from overfill.config import LOG_FORMAT
from overfill.errors import OverfillError
from overfill.testing.mock.config import MockDecodeConfig, MockPrefillConfig
from overfill.testing.mock.running import mock_worker


def main(argv: list[str]) -> int:
    """Runs the worker that ``argv`` names until SIGTERM or SIGINT drains it."""
    kinds: dict[str, type[MockPrefillConfig] | type[MockDecodeConfig]] = {
        "prefill": MockPrefillConfig,
        "decode": MockDecodeConfig,
    }
    if not argv or argv[0] not in kinds:
        print("usage: python -m overfill.testing.mock prefill|decode [FLAGS]; --help shows them", file=sys.stderr)
        return 2
    config = kinds[argv[0]].parse(argv[1:])
    logging.basicConfig(level=config.log_level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    try:
        asyncio.run(_serve(config))
    except OverfillError as error:
        print(f"{config.program}: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(config: MockPrefillConfig | MockDecodeConfig) -> None:
    async with mock_worker(config) as worker:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.drain)
        logging.info("%s ready on %s", worker.hello.worker_id, worker.hello.address)
        try:
            async with asyncio.timeout(None) as limit:
                while not worker.draining:  # noqa: ASYNC110  # drained by a signal or a call
                    await asyncio.sleep(0.05)
                limit.reschedule(loop.time() + config.grace_period)
                await worker.drained.wait()
        except TimeoutError:
            logging.warning("leaving with requests unfinished")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
