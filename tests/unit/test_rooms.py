"""What a service imports, directly or not, and in functions too, is what serves."""

from __future__ import annotations

import functools

import grimp
import pytest

NOT_FOR_SERVICES = ("overfill.making", "overfill.client", "overfill.cli", "overfill.lab")


@functools.cache
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("overfill", "services")


@pytest.mark.parametrize("service", ["prefill", "decode", "worker", "router", "ray"])
def test_a_service_imports_what_serves(service: str) -> None:
    package = f"services.{service}"
    modules = {package, *imports().find_descendants(package)}
    needed = {needed for module in modules for needed in imports().find_upstream_modules(module)}
    assert f"{package}.main" in modules or service == "ray"
    assert "overfill.pair.store" in needed
    assert sorted(name for name in needed if name.startswith(NOT_FOR_SERVICES)) == []
