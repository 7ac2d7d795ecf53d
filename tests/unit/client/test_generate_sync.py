"""Tests that the blocking client is up to date with the asyncio client it is generated from."""

from __future__ import annotations

from pathlib import Path

import pytest

import overfill.client.aio
import overfill.client.sync
from overfill.client.generate_sync import blocking

ASYNCIO, SYNC = (Path(module.__file__ or "").read_text() for module in (overfill.client.aio, overfill.client.sync))


def test_the_blocking_client_is_what_the_asyncio_client_gives() -> None:
    assert blocking(ASYNCIO) == SYNC, "run `make sdk`"


def test_a_word_that_cannot_block_is_named() -> None:
    with pytest.raises(ValueError, match=r"asyncio\.sleep"):
        blocking(ASYNCIO + "\n\nasync def pause() -> None:\n    await asyncio.sleep(1)\n")


def test_a_phrase_to_replace_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="for one event loop"):
        blocking(ASYNCIO.replace("for one event loop", "for a loop"))
