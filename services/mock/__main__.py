"""``python -m services.mock prefill|decode|colocated``: a mock worker as a process."""

from __future__ import annotations

import asyncio
import sys

from overfill.errors import OverfillError
from overfill.settings.mock import MockColocatedConfig, MockDecodeConfig, MockPrefillConfig
from overfill.telemetry import logs
from services.mock.running import MockConfig, serve


def main(argv: list[str]) -> int:
    """Runs the worker that ``argv`` names until SIGTERM or SIGINT drains it."""
    kinds: dict[str, type[MockConfig]] = {
        "prefill": MockPrefillConfig,
        "decode": MockDecodeConfig,
        "colocated": MockColocatedConfig,
    }
    if not argv or argv[0] not in kinds:
        print("usage: python -m services.mock prefill|decode|colocated [FLAGS]; --help shows them", file=sys.stderr)
        return 2
    config = kinds[argv[0]].parse(argv[1:])
    logs.configure(config.log_level, config.log_format, each_request=config.log_requests)
    try:
        return asyncio.run(serve(config, lambda host: None))
    except OverfillError as error:
        print(f"{config.program}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
