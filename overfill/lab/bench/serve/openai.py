"""A streamed completion as OpenAI's API writes it: the request's body, and what its events say. No sockets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from overfill.client.answers import Timing
from overfill.lab.bench.serve.load import RequestFailed


def completion_body(model: str | None, prompt: Sequence[int], max_tokens: int, *, extensions: bool) -> dict[str, Any]:
    """For ``/completions``. ``extensions``: see ``OpenAiTarget``."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if extensions:
        body["ignore_eos"] = True
        body["stream_options"]["continuous_usage_stats"] = True
    return body


class CompletionEvents:
    """Takes the lines of one stream.

    Attributes:
        timing: where the time went, when the server says so, as ours does behind the last token.
    """

    def __init__(self) -> None:
        self.timing: Timing | None = None
        self._tokens = 0
        self._finished = False

    def push(self, line: bytes) -> int:
        """How many tokens have come with this line: as many as the server says, otherwise one for each text.

        Fewer than before where the server corrects what was counted so.

        Raises:
            RequestFailed: it is an error.
            ValueError, KeyError, TypeError: it is not of this API.
        """
        text = line.decode().strip()
        if not text.startswith("data:"):
            return self._tokens
        data = text.removeprefix("data:").strip()
        if data == "[DONE]":
            self._finished = True
            return self._tokens
        event = json.loads(data)
        if "error" in event:
            raise RequestFailed(error_message(data))
        if told := event.get("overfill"):
            self.timing = timing(told["choices"][0]["timing"])
        if usage := event.get("usage"):
            self._tokens = int(usage["completion_tokens"])
        elif any(choice.get("text") for choice in event.get("choices") or ()):  # others only say why it ended
            self._tokens += 1
        return self._tokens

    def end(self) -> None:
        """The stream has ended. Raises RequestFailed when the answer has not."""
        if not self._finished:
            raise RequestFailed("the stream broke off")


def timing(parts: dict[str, float | None]) -> Timing:
    """From the milliseconds of an ``overfill`` object."""
    known = {f.name: parts.get(f"{f.name}_ms") for f in fields(Timing)}
    return Timing(**{name: None if ms is None else ms / 1e3 for name, ms in known.items()})


def error_message(text: str) -> str:
    """What an OpenAI error says, or the start of whatever came."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text[:200]
