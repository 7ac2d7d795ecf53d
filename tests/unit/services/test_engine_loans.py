"""Loans are asked for, answered, and given back once, however the borrower ends."""

from __future__ import annotations

import asyncio

import pytest

from overfill.engine.sequence import Lend, Lent, Release
from overfill.kv.keys import PromptBlocks, root_key
from services.engine_loans import EngineLoans

PROMPT = PromptBlocks(list(range(8)), 4, root_key("full", ""), "")


async def test_a_loan_is_given_back_after_the_context() -> None:
    sent: list[object] = []
    loans = EngineLoans(sent.append)

    async def borrow() -> Lent:
        async with loans.lend(PROMPT) as lent:
            assert len(sent) == 1
            return lent

    task = asyncio.create_task(borrow())
    await asyncio.sleep(0)
    (asked,) = sent
    assert isinstance(asked, Lend)
    assert asked.prompt is PROMPT
    answer = Lent(asked.id, [3, 1], 8, None)
    loans.on_event(answer)
    assert await task is answer
    assert sent[1:] == [Release(asked.id)]
    assert not loans._asked


async def test_a_borrower_that_is_cancelled_gives_back_what_the_engine_has_not_lent_yet() -> None:
    sent: list[object] = []
    loans = EngineLoans(sent.append)

    async def borrow() -> None:
        async with loans.lend(PROMPT):
            raise AssertionError("the engine has not answered")

    task = asyncio.create_task(borrow())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (asked, released) = sent
    assert isinstance(asked, Lend)
    assert released == Release(asked.id)
    loans.on_event(Lent(asked.id, [3, 1], 8, None))
    assert not loans._asked


async def test_each_loan_has_an_id_of_its_own() -> None:
    sent: list[object] = []
    loans = EngineLoans(sent.append)
    tasks = [asyncio.create_task(loans.lend(PROMPT).__aenter__()) for _ in range(2)]
    await asyncio.sleep(0)
    ids = [asked.id for asked in sent if isinstance(asked, Lend)]
    assert len(set(ids)) == 2
    for index, id in enumerate(reversed(ids)):
        loans.on_event(Lent(id, [index], 4, None))
    assert [(await task).blocks for task in tasks] == [[1], [0]]
