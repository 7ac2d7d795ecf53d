"""Tests that Claude Code's attribution line, and nothing else, is left out of a prompt."""

import pytest

from overfill.api.attribution import drop_attribution
from overfill.v1 import inference_pb2

LINE = "x-anthropic-billing-header: cc_version=2.1.332.994; cc_entrypoint=sdk-cli; cch=a1b2c;"


@pytest.mark.parametrize(
    ("messages", "left"),
    [
        ([("system", f"{LINE}\nYou help."), ("user", "hi")], [("system", "You help."), ("user", "hi")]),
        ([("system", f"{LINE}\n\nYou help.\n{LINE}")], [("system", f"You help.\n{LINE}")]),
        ([("system", LINE), ("user", "hi")], [("user", "hi")]),
        ([("system", LINE)], [("system", "")]),
        ([("system", f" {LINE}")], None),
        ([("system", f"You help.\n{LINE}")], None),
        ([("user", f"{LINE}\nhi")], None),
        ([("user", "hi"), ("system", f"{LINE}\nhi")], None),
        ([], None),
    ],
)
def test_the_line_at_the_beginning_is_left_out(messages, left):
    chat = inference_pb2.Chat()
    for role, content in messages:
        chat.messages.add(role=role, content=content)
    drop_attribution(chat)
    assert [(message.role, message.content) for message in chat.messages] == (messages if left is None else left)
