"""Peers in environments of their own: vLLM's server, and what is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from overfill.lab.peers.process import PeerFailed
from overfill.lab.peers.vllm_server import vllm_server


def test_a_server_that_does_not_start_says_why():
    # An interpreter without vLLM.
    with (
        pytest.raises(PeerFailed, match="during start-up") as caught,
        vllm_server(Path(sys.executable), Path("model"), 64),
    ):
        pass
    assert any("vllm" in note for note in caught.value.__notes__)


def test_a_server_gets_a_place_for_each_adapter(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    python.chmod(0o700)
    adapters = {"a": Path("/tasks/a"), "b": Path("/tasks/b")}
    with (
        pytest.raises(PeerFailed) as caught,
        vllm_server(python, Path("model"), 64, adapters, prefix_cache=True, kv_memory=12345),
    ):
        pass
    asked = " ".join(caught.value.__notes__)
    assert "--enable-lora --max-loras 2 --lora-modules a=/tasks/a b=/tasks/b" in asked
    assert "--enable-prefix-caching" in asked
    assert "--kv-cache-memory-bytes 12345" in asked
