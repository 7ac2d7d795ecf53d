"""Console scripts of the services. A script whose extra is not installed exits with a one-line message."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from overfill.process.extras import MissingExtra, needs


def router() -> NoReturn:
    """Runs ``overfill-router``."""
    _run("router", "router")


def prefill() -> NoReturn:
    """Runs ``overfill-prefill``."""
    _run("prefill", "worker")


def decode() -> NoReturn:
    """Runs ``overfill-decode``."""
    _run("decode", "worker")


def colocated() -> NoReturn:
    """Runs ``overfill-colocated``."""
    _run("colocated", "worker")


def _run(service: str, extra: str) -> NoReturn:
    try:
        with needs(extra, f"overfill-{service}"):
            main = importlib.import_module(f"services.{service}.main").main
    except MissingExtra as error:
        sys.exit(str(error))
    main()
    raise AssertionError("the process has ended")
