"""Data sets on the hub: the split that is read, and the error when none can be."""

import re
import sys
from types import SimpleNamespace

import pytest

from overfill.errors import InvalidRequest
from overfill.making.calibration import calibration_text
from overfill.making.distill.data import load_data
from overfill.making.distill.recipe import Data
from overfill.making.hub_data import hub_conversations, load_hub

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


class Rows(list):
    column_names = ("messages",)


@pytest.fixture
def asked(monkeypatch):
    """Replaces the hub and records what was loaded."""
    found = []

    def load_dataset(name, split):
        found.append((name, split))
        return Rows([{"messages": CHAT}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return found


def test_the_id_may_name_the_split(asked):
    load_hub("owner/name", "train", "messages")
    load_hub("owner/name:test", "train", "messages")
    assert len(hub_conversations("owner/name:part", 5)) == 1
    hub_conversations("owner/name", 5)
    assert asked == [("owner/name", "train"), ("owner/name", "test"), ("owner/name", "part"), ("owner/name", "train")]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("chats", "is neither"),
        ("a/b.jsonl", "is neither"),
        ("../chats/a.txt", "is neither"),
        ("/missing/text", "is neither"),
        ("owner/name/file", "is neither"),
        (".", "cannot be read"),  # a folder
    ],
)
def test_a_missing_file_is_not_asked_of_the_hub(source, says, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match=f"^calibration: {re.escape(source)} {says}"):
        calibration_text(source, tmp_path, 100)
    with pytest.raises(InvalidRequest, match=f"^data: {re.escape(source)} {says}"):
        load_data(Data(source=source), None)
    assert asked == []


def test_missing_columns_are_named(asked):
    with pytest.raises(InvalidRequest, match="owner/name has the columns messages, not text"):
        load_hub("owner/name:test", "train", "text")
