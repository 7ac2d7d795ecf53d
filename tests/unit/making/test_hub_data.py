"""Data sets on the hub: the split that is read, and the error when none can be."""

import sys
from types import SimpleNamespace

import pytest

from overfill.errors import InvalidRequest
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


def test_missing_columns_are_named(asked):
    with pytest.raises(InvalidRequest, match="owner/name has the columns messages, not text"):
        load_hub("owner/name:test", "train", "text")
