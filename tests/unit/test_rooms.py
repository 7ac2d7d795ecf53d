"""What a service imports, directly or not, and in functions too, is what serves."""

from __future__ import annotations

import functools
from pathlib import Path

import grimp
import pytest

SERVICES = sorted(file.parent.name for file in (Path(__file__).parents[2] / "services").glob("*/__init__.py"))
NOT_FOR_SERVICES = ("overfill.making", "overfill.client", "overfill.cli", "overfill.lab")


@functools.cache
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("overfill", "services")


def test_there_are_services() -> None:
    assert {"prefill", "decode", "router"} <= set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_what_serves(service: str) -> None:
    package = f"services.{service}"
    modules = {package, *imports().find_descendants(package)}
    needed = {needed for module in modules for needed in imports().find_upstream_modules(module)}
    assert "overfill.pair.store" in needed
    assert sorted(name for name in needed if name.startswith(NOT_FOR_SERVICES)) == []
