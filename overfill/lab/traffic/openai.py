"""Builds the body of a streamed OpenAI completion or chat, and parses its events. No sockets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from overfill.client.answers import Timing
from overfill.lab.traffic.outcome import RequestFailed

Message = Mapping[str, Any]
"""A message of a chat, with its role and content."""


def completion_body(
    model: str | None, prompt: Sequence[int] | Sequence[Message], max_tokens: int, *, extensions: bool, **own: Any
) -> dict[str, Any]:
    """Builds the body of a ``/completions`` request, or of ``/chat/completions`` if the prompt is messages.

    Args:
        extensions: whether to use ``ignore_eos`` and a token count in every message, which OpenAI's API does not have.
        own: fields that only our server knows, such as ``tier``; those that are empty are left out.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt" if isinstance(prompt[0], int) else "messages": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if extensions:
        body["ignore_eos"] = True
        body["stream_options"]["continuous_usage_stats"] = True
    return body | {name: value for name, value in own.items() if value}


class CompletionEvents:
    """Parses the lines of one streamed answer.

    Attributes:
        timing: The server's own timing. Our server sends it after the last token; others send none.
        tier: Tier that wrote the end of the answer; empty until our server says so.
        text: Text received so far.
    """

    def __init__(self) -> None:
        self.timing: Timing | None = None
        self.tier = self.text = ""
        self._tokens = 0
        self._finished = False

    def push(self, line: bytes) -> int:
        """Parses one line. Returns the number of tokens received so far.

        The server's own count is used where a line has one. Otherwise every choice with text counts as one token, so
        the number may fall when a count arrives. A choice without text only carries the finish reason.

        Raises:
            RequestFailed: The line is an error.
            ValueError, KeyError, TypeError: The line does not belong to this API.
        """
        field, _, data = line.decode().strip().partition(":")
        data = data.strip()
        if field != "data":
            return self._tokens
        if data == "[DONE]":
            self._finished = True
            return self._tokens
        event = json.loads(data)
        if "error" in event:
            raise RequestFailed(error_message(data))
        if ours := event.get("overfill"):
            choice = ours["choices"][0]
            known = {f.name: choice["timing"].get(f"{f.name}_ms") for f in fields(Timing)}
            self.timing = Timing(**{name: None if ms is None else ms / 1e3 for name, ms in known.items()})
            self.tier = choice.get("tier") or ""
        choices = event.get("choices") or ()
        text = "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in choices)
        self.text += text
        if usage := event.get("usage"):
            self._tokens = int(usage["completion_tokens"])
        elif text:
            self._tokens += 1
        return self._tokens

    def end(self) -> None:
        """Call it when the stream has ended. Raises RequestFailed if the answer was incomplete."""
        if not self._finished:
            raise RequestFailed("the stream broke off")


def error_message(text: str) -> str:
    """Message of an OpenAI error; the first 200 characters of a text that is not one."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text[:200]
