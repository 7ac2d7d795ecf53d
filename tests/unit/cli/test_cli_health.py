"""Tests ``overfill health`` against a running server and against an address without one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc

from overfill.cli.main import main

NOBODY = "127.0.0.1:1"


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Refuses every call, like a server at its limit of concurrent RPCs."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def Check(self, request: Any, context: Any) -> Any:
        context.abort(self.code, "no more now")


@pytest.fixture
def full() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_a_process_at_its_limit_of_rpcs_is_alive_but_not_ready(full: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--live", "--address", full]) == 0
    assert main(["health", "--address", full]) == 1
    assert "no more now" in capsys.readouterr().err


def test_an_address_without_a_server_is_not_alive_and_the_next_step_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--live", "--address", NOBODY]) == 1
    assert "overfill up" in capsys.readouterr().err


def test_the_next_address_is_asked_when_one_is_dead(full: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--live", "--address", f"{NOBODY},{full}"]) == 0
    err = capsys.readouterr().err
    assert f"{NOBODY}: nothing listens there" in err
    assert "overfill up" not in err, "a stack runs at the second address"


def test_addresses_may_have_spaces_between_them_and_repeat(full: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--live", "--address", f"{NOBODY}, {full}"]) == 0
    capsys.readouterr()
    assert main(["health", "--live", "--address", f"{NOBODY},{NOBODY}"]) == 1
    assert capsys.readouterr().err.count("overfill up") == 1, "the hint comes once, after all addresses"


def test_the_address_may_come_from_the_environment(full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_ADDRESS", f"{full},{NOBODY}")
    assert main(["health", "--live"]) == 0
