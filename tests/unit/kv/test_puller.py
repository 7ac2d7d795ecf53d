"""Tests that connections to data addresses are shared by pulls, kept while in use, and closed when they are idle."""

import pytest

from overfill.kv import puller
from overfill.kv.puller import DataChannels


class Channel:
    def __init__(self, address):
        self.address = address
        self.closed = False

    async def close(self, grace):
        self.closed = True


@pytest.fixture
def opened(monkeypatch):
    opened = []

    def open_channel(address, tls, ping_timeout, role):
        opened.append(Channel(address))
        return opened[-1]

    monkeypatch.setattr(puller, "open_channel", open_channel)
    return opened


async def test_each_address_has_its_streams_and_pulls_share_them(opened):
    channels = DataChannels(3, None)
    async with channels.use(["a:1", "b:1", "a:1"]) as first, channels.use(["b:1"]) as second:
        assert {address: len(streams) for address, streams in first.items()} == {"a:1": 3, "b:1": 3}
        assert second["b:1"] == first["b:1"]
    assert len(opened) == 6
    assert not any(channel.closed for channel in opened)
    await channels.close()
    assert all(channel.closed for channel in opened)


async def test_idle_connections_are_closed_when_others_open_and_those_in_use_are_not(opened, monkeypatch):
    monkeypatch.setattr(puller, "MAX_IDLE_TIME", -1.0)
    channels = DataChannels(1, None)

    async def use(address):
        async with channels.use([address]):
            pass

    async with channels.use(["used:1"]):
        await use("idle:1")
        await use("used:1")
        assert not any(channel.closed for channel in opened), "nothing new was opened since"
        await use("new:1")
        assert [(channel.address, channel.closed) for channel in opened] == [
            ("used:1", False), ("idle:1", True), ("new:1", False),
        ]  # fmt: skip
    await use("idle:1")
    assert [channel.address for channel in opened if not channel.closed] == ["idle:1"]
