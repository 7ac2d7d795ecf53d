"""Tests that a refused request leaves nothing in memory."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from overfill.api.chat import MAX_ITEMS
from overfill.api.openai.answers import encode
from overfill.api.openai.errors import ApiError
from overfill.api.openai.parse import check_items
from services.router.bounded_executor import BoundedExecutor


class Large:
    """Stands for what a function has made of a long request."""


async def test_a_failed_call_leaves_no_circle_of_references() -> None:
    made: list[weakref.ref[Large]] = []

    def fail() -> None:
        large = Large()
        made.append(weakref.ref(large))
        raise ValueError("the request is wrong")

    executor = BoundedExecutor(threads=1)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="wrong") as caught:
            await executor.run(1, fail)
        del caught
        await asyncio.sleep(0)  # the event loop forgets the call
        assert made[0]() is None
    finally:
        gc.enable()


def test_messages_parts_and_tool_calls_are_counted_together_before_they_are_parsed() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}] * 63}
    count = MAX_ITEMS // 64
    check_items(encode({"messages": [message] * count}), "messages")
    with pytest.raises(ApiError, match=f"has {64 * (count + 1)} items with their parts and tool calls"):
        check_items(encode({"messages": [message] * (count + 1)}), "messages")


@pytest.mark.parametrize("body", ["", "[", "[]", '{"messages": 1}', '{"messages": [1, {"content": 2}]}', "\xff"])
def test_what_is_no_list_of_messages_is_left_to_the_parser(body: str) -> None:
    check_items(body.encode("latin-1"), "messages")
