"""Fixtures with small tokenizers of the two supported families."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_tokenizers import CHAT_TEMPLATE, byte_level, sentencepiece_like, write_checkpoint

from overfill.api.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte_level")
    return write_checkpoint(folder, byte_level(), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def byte_level_tokenizer(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_checkpoint(tmp_path_factory.mktemp("sentencepiece"), sentencepiece_like()))


@pytest.fixture(scope="session", params=["byte_level_tokenizer", "sentencepiece_tokenizer"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer
