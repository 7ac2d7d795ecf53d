"""Tests that replicated heads are reported when all of their ranks have them, and that a rank's failure ends all."""

import asyncio

import pytest

from overfill.errors import TransferFailed
from overfill.kv.chunks import TransferSpec
from overfill.kv.ranges import Coverage, KvRange
from overfill.kv.ranks import Moved, Pull, RankPullers
from overfill.kv.spec import KvSpec, RopeSpec

SPEC = TransferSpec(b"t" * 16, 0, KvSpec(4, 4, 2, "float32", RopeSpec()), (0, 1, 3), (2, 10))


class Scripted:
    """A puller that reports what ``reports`` has, one by one, until it gets None or an error."""

    def __init__(self):
        self.reports = asyncio.Queue()
        self.ended = False

    async def pull(self, *arguments):
        *_, on_moved = arguments
        try:
            while (report := await self.reports.get()) is not None:
                if isinstance(report, Exception):
                    raise report
                on_moved(report)
        finally:
            self.ended = True


class Ranks:
    """A pull by two ranks that hold heads 0:2, and one that holds 2:4."""

    def __init__(self):
        self.pullers = [Scripted() for _ in range(3)]
        self.told = []
        pullers = RankPullers([*zip([(0, 2), (0, 2), (2, 4)], self.pullers, strict=True)])
        self.running = asyncio.ensure_future(pullers.pull(Pull("p", SPEC, [0, 1, 3], [0], [], None), self.told.append))

    async def say(self, rank, what):
        self.pullers[rank].reports.put_nowait(what)
        for _ in range(5):
            await asyncio.sleep(0)

    async def report(self, rank, *bounds):
        """Returns the ranges that are reported when a rank has one more in place."""
        self.told.clear()
        await self.say(rank, Moved([KvRange(*bounds)], kv_bytes=5, chunks=1))
        assert sum(moved.kv_bytes for moved in self.told) == 5, "every rank's bytes have moved"
        return [tuple(kv_range) for moved in self.told for kv_range in moved.ranges]


@pytest.fixture
async def ranks():
    ranks = Ranks()
    yield ranks
    ranks.running.cancel()
    await asyncio.wait([ranks.running])


async def test_a_range_is_reported_when_all_replicas_have_it_and_once(ranks):
    assert await ranks.report(0, 0, 2, 2, 6, 0, 2) == []
    assert await ranks.report(2, 0, 2, 2, 10, 2, 4) == [(0, 2, 2, 10, 2, 4)], "one rank holds these heads"
    assert await ranks.report(1, 0, 1, 2, 10, 0, 2) == [(0, 1, 2, 6, 0, 2)]
    assert await ranks.report(1, 1, 2, 4, 10, 1, 2) == [(1, 2, 4, 6, 1, 2)]
    assert await ranks.report(0, 0, 2, 6, 10, 0, 2) == [(0, 1, 6, 10, 0, 2), (1, 2, 6, 10, 1, 2)]
    assert await ranks.report(1, 1, 2, 2, 10, 0, 1) == [(1, 2, 2, 10, 0, 1)]
    assert await ranks.report(1, 1, 2, 2, 4, 1, 2) == [(1, 2, 2, 4, 1, 2)]
    assert await ranks.report(1, 3, 4, 2, 10, 0, 2) == []
    assert await ranks.report(0, 3, 4, 2, 10, 0, 1) == [(3, 4, 2, 10, 0, 1)]
    for rank in range(3):
        assert not ranks.running.done()
        await ranks.say(rank, None)
    await ranks.running


async def test_reports_of_any_order_and_size_cover_everything_once(ranks):
    coverage = Coverage(SPEC.layers, SPEC.tokens, (0, 4))
    for rank, layers, sizes, heads in (
        (0, (3, 0, 1), (3, 1, 4), [(0, 1), (1, 2)]),
        (1, (1, 3, 0), (2, 6), [(0, 2)]),
        (2, (0, 1, 3), (8,), [(2, 3), (3, 4)]),
    ):
        start = 2
        for size in sizes:
            for layer in layers:
                for head_range in heads:
                    for bounds in await ranks.report(rank, layer, layer + 1, start, start + size, *head_range):
                        coverage.add(KvRange(*bounds))
            start += size
        assert coverage.complete == (rank == 2)
    assert coverage.complete


async def test_the_first_rank_that_fails_ends_the_others(ranks):
    await ranks.say(1, TransferFailed("a chunk is wrong"))
    with pytest.raises(TransferFailed, match="a chunk is wrong"):
        await ranks.running
    assert all(puller.ended for puller in ranks.pullers)
