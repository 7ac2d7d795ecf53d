"""A client that answers without a stack, for tests of client commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from overfill.cli import up
from overfill.client import Answer, Delta, StackStatus, Timing, Usage
from overfill.errors import InvalidRequest, OverfillError
from overfill.stack.placed import PlacedStack, place

TIMING = Timing(
    ttft=0.100,
    router_queue=0.010,
    decode_reservation=0.001,
    prefill_queue=0.004,
    prefill_compute=0.080,
    return_path=0.003,
    handoff_exposed=0.005,
    decode=0.9,
    total=1.1,
)


def make_answer(text: str = "It scatters.", **changes: Any) -> Answer:
    values: dict[str, Any] = {
        "text": text,
        "token_ids": tuple(range(11)),
        "logprobs": None,
        "finish_reason": "stop",
        "usage": Usage(prompt_tokens=20, completion_tokens=11, cached_tokens=0),
        "timing": TIMING,
        "request_id": "r1",
        "model": "m",
        "seed": 7,
        "prefill_worker": "prefill-0",
        "decode_worker": "decode-0",
        "migrations": 0,
        "stop": None,
        "trace": None,
        "client_ttft": 0.11,
    }
    return Answer(**values | changes)


class FakeStream:
    def __init__(self, pieces: Sequence[str], error: BaseException | None, finish_reason: str) -> None:
        self._pieces = pieces
        self._error = error
        self._finish_reason = finish_reason

    @property
    def answer(self) -> Answer:
        return make_answer("".join(self._pieces), finish_reason=self._finish_reason)

    def __iter__(self) -> Iterator[Delta]:
        if isinstance(self._error, InvalidRequest):  # raised before any token
            raise self._error
        for index, piece in enumerate(self._pieces):
            yield Delta(index, (index,), piece, None)
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...


@dataclass
class FakeClient:
    """Answers every request with ``pieces`` and records (prompt, arguments) in ``requests``."""

    pieces: Sequence[str] = ("It ", "scatters.")
    finish_reason: str = "stop"
    stack: StackStatus | None = None
    errors: list[OverfillError] = field(default_factory=list)
    model_errors: list[OverfillError] = field(default_factory=list)
    requests: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def models(self) -> list[Any]:
        if self.model_errors:
            raise self.model_errors.pop(0)
        return []

    def stream(self, prompt: Any, **arguments: Any) -> FakeStream:
        self.requests.append((prompt, arguments))
        return FakeStream(self.pieces, self.errors.pop(0) if self.errors else None, self.finish_reason)

    def status(self, *, timeout: float | None = None) -> StackStatus:
        if self.errors:
            raise self.errors.pop(0)
        assert self.stack is not None
        return self.stack

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...


@pytest.fixture
def fake_client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """Replaces the client of every client command."""
    client = FakeClient()
    monkeypatch.setattr("overfill.cli.options.ClientConnection.client", lambda self: client)
    return client


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> list[PlacedStack]:
    """Collects the plans that ``up`` would run, without checking that their ports are free and their pairs exist."""
    plans: list[PlacedStack] = []
    monkeypatch.setattr(up, "run", lambda stack, stopping, adapters: plans.append(place(stack.spec)) or 0)
    monkeypatch.setattr(up, "check_ports", lambda spec: None)
    monkeypatch.setattr(up, "check_engines", lambda spec: None)
    monkeypatch.setattr(up, "resolve_pairs", lambda spec, report: spec)
    monkeypatch.setattr("overfill.cli.up.resolve_pair", lambda pair, report: Path(pair))
    return plans


@pytest.fixture
def answer() -> Callable[..., Answer]:
    """Returns a function that makes an answer of 11 tokens; arguments replace its fields."""
    return make_answer
