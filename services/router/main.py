"""``overfill-router``: the process around a router."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence

from overfill import logs
from overfill.config import RouterConfig
from overfill.errors import OverfillError
from overfill.rpc.tls import TlsError
from services.router.app import Router


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a router until SIGTERM or SIGINT; returns the exit code: 0 drained, 1 could not start."""
    config = RouterConfig.parse(argv)
    logs.configure(config.log_level, config.log_format, each_request=config.log_requests == "on")
    try:
        asyncio.run(_serve(config))
    except (OverfillError, TlsError) as error:
        print(f"{config.program}: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(config: RouterConfig) -> None:
    router = Router(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, router.drain)
    await router.start()
    await router.run()


if __name__ == "__main__":
    sys.exit(main())
