"""The lower bound of a router: uvicorn with httptools, which sends the same event for every token and does no more.

Called with a port, and the seconds between two tokens of an answer. Like ``smg_worker.py`` it imports nothing of ours.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvicorn

_BACKLOG = 2048
_MODELS = json.dumps({"object": "list", "data": [{"id": "mock", "object": "model"}]}).encode()


def _event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
    """Returns an event as our router sends it."""
    event = {"id": "chatcmpl-" + 32 * "0", "object": "chat.completion.chunk", "created": 1700000000, "model": "mock"}
    event |= {"system_fingerprint": "fp_" + 12 * "0", "choices": choices, "usage": usage}
    return b"data: %b\n\n" % json.dumps(event, separators=(",", ":")).encode()


def _choice(finish: str | None = None, **delta: str) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


_HEAD, _TOKEN = _event([_choice(role="assistant", content="")]), _event([_choice(content="~")])
_END = _event([_choice("length")])


class _Bare:
    """The application. The running answers get their next token together."""

    def __init__(self, step: float) -> None:
        self._step = step
        self._next = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        request = json.loads(body or b"{}")
        streams = request.get("stream", False)
        kind = b"text/event-stream; charset=utf-8" if streams else b"application/json"
        headers = [(b"content-type", kind), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if not streams:  # a proxy asks for the models, or whether the server lives
            await send({"type": "http.response.body", "body": _MODELS})
            return
        gone = asyncio.ensure_future(receive())  # uvicorn drops what is sent to a client that has gone, without error
        tokens = request["max_tokens"]
        usage = _event([], {"prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": 100 + tokens})
        await send({"type": "http.response.body", "body": _HEAD, "more_body": True})
        for number in range(tokens):
            if number:  # the first token comes at once
                await self._end_of_step()
            if gone.done():
                return
            await send({"type": "http.response.body", "body": _TOKEN, "more_body": True})
        await send({"type": "http.response.body", "body": _END + usage + b"data: [DONE]\n\n"})

    async def _end_of_step(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._step, self._tell)
        await self._next.wait()

    def _tell(self) -> None:
        self._timer = None
        self._next.set()
        self._next.clear()


if __name__ == "__main__":
    uvicorn.run(
        _Bare(float(sys.argv[2])), host="127.0.0.1", port=int(sys.argv[1]), interface="asgi3", loop="asyncio",
        http="httptools", ws="none", lifespan="off", log_level="error", access_log=False, server_header=False,
        proxy_headers=False, backlog=_BACKLOG,
    )  # fmt: skip
