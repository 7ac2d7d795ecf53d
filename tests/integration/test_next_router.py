"""Tests client commands with several addresses, the first of which is dead or frozen."""

from __future__ import annotations

import socket

import pytest
from mocks import mock_stack

from overfill.cli.main import main

DEAD = "127.0.0.1:1"


@pytest.fixture
def alive(tiny_pair):
    with mock_stack(tiny_pair) as stack:
        yield stack.grpc


@pytest.fixture
def frozen():
    """Accepts connections but never answers, like a router stopped by SIGSTOP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


COMMANDS = {
    "status": (["status"], "prefill-0"),
    "top": (["top", "--once"], "prefill-0"),
    "generate": (["generate", "--max-tokens", "2", "Hi"], ""),
    "drain": (["drain", "--timeout", "0", "prefill-0"], "prefill-0 is draining"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_next_router_is_asked_when_the_first_is_dead(alive, command, capsys):
    arguments, says = COMMANDS[command]
    assert main([*arguments, "--address", f"{DEAD},{alive}"]) == 0
    assert says in capsys.readouterr().out


def test_a_frozen_router_leaves_time_for_the_next(alive, frozen, capsys):
    assert main(["status", "--address", f"{frozen},{alive}"]) == 0
    assert "prefill-0" in capsys.readouterr().out
    assert main(["health", "--address", f"{frozen},{alive}"]) == 0
    assert "SERVING" in capsys.readouterr().out
