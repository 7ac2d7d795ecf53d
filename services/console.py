"""The console scripts of the services. A service whose extra is not installed is told in one line."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from overfill.process.extras import MissingExtra, needs


def router() -> NoReturn:
    """``overfill-router``."""
    _run("router", "router")


def prefill() -> NoReturn:
    """``overfill-prefill``."""
    _run("prefill", "server")


def decode() -> NoReturn:
    """``overfill-decode``."""
    _run("decode", "server")


def _run(service: str, extra: str) -> NoReturn:
    try:
        with needs(extra, f"overfill-{service}"):
            main = importlib.import_module(f"services.{service}.main").main
    except MissingExtra as error:
        sys.exit(str(error))
    main()
    raise AssertionError("the process has ended")
