"""``overfill-router``: a router process."""

from __future__ import annotations

import asyncio
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from overfill.errors import OverfillError
from overfill.process import startup
from overfill.process.leaving import exit_now
from overfill.rpc.probes import ProbeServer
from overfill.rpc.tls import TlsError
from overfill.settings.config import RouterConfig
from overfill.telemetry import logs
from services.router.app import Router


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a router until SIGTERM or SIGINT. Exits with 0 after draining, with 1 if it could not start."""
    config = RouterConfig.parse(argv)
    logs.configure(config.log_level, config.log_format, each_request=config.log_requests)
    asyncio.run(_serve(config))
    raise AssertionError("the process has ended")


async def _serve(config: RouterConfig) -> NoReturn:
    try:
        await _run(config)
    except (OverfillError, TlsError) as error:
        print(f"{config.program}: {error}", file=sys.stderr)
        exit_now(1)
    except Exception:
        traceback.print_exc()
        exit_now(1)
    exit_now(0)


async def _run(config: RouterConfig) -> None:
    probes = None
    if config.probe_port != "off":
        probes = ProbeServer(config.probe_host, config.probe_port, config.server_tls())
    router = Router(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, router.drain)
    await router.start()
    startup.freeze()
    if probes is not None:
        probes.follow(router.unready)
    await router.run()


if __name__ == "__main__":
    main()
