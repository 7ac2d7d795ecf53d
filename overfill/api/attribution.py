"""Claude Code's attribution line: the first line of its system prompt, which says who pays.

It differs between sessions, and in some versions between requests, so that prompts with it share no beginning. The
model has no use for it.
"""

from __future__ import annotations

import re

from overfill.v1 import inference_pb2

_LINE = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")


def drop_attribution(chat: inference_pb2.Chat) -> None:
    """Removes the line from the beginning of ``chat``, if its system message begins with one."""
    if not chat.messages or chat.messages[0].role != "system":
        return
    system = chat.messages[0]
    if line := _LINE.match(system.content):
        system.content = system.content[line.end() :]
        if not system.content and len(chat.messages) > 1:
            del chat.messages[0]
