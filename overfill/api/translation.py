"""What an API makes of a request for one answer: the router's request, and what writes the answer. No sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from overfill.api.openai.errors import ApiError
from overfill.errors import OverfillError
from overfill.routing.answer import AnswerDelta
from overfill.v1 import inference_pb2


class AnswerWriter(Protocol):
    """Writes one answer in the form of one API: as server-sent events, or whole.

    Callers call ``begin``, then ``delta`` for each part, then either ``end`` for the last events of a stream, or
    ``whole`` for the response that is not streamed. Reasoning, text and tool calls come in this order.
    """

    def begin(self, accepted: inference_pb2.Accepted, cached_tokens: int) -> bytes:
        """Returns the events before the first part. ``cached_tokens`` are 0 while they are unknown."""

    def delta(self, delta: AnswerDelta) -> bytes:
        """Adds a part. Returns its events; empty if the client would see nothing new."""

    def ping(self) -> bytes:
        """Returns an event that says nothing, for clients that give up after a silence."""

    def end(self, finished: inference_pb2.Finished) -> bytes:
        """Returns the last events. The last part has been added."""

    def fail(self, error: ApiError) -> bytes:
        """Returns the last events of an answer that failed after ``begin``."""

    def whole(self, finished: inference_pb2.Finished) -> bytes:
        """Returns the response as JSON. The last part has been added."""


@dataclass(frozen=True, slots=True)
class Served:
    """What answers one request, as its response names it.

    Attributes:
        id: id of the response.
        model: name of the model, with the tier if there are several.
        pair: description of the tier's pair, for the ``overfill`` object.
    """

    id: str
    model: str
    pair: dict[str, Any]


OwnField = Callable[[OverfillError], OverfillError]
"""Returns an error of the router with the name of the client's field; the same error if it names none."""


@contextmanager
def own_fields(own_field: OwnField) -> Iterator[None]:
    """Raises errors of the router again as ``own_field`` returns them."""
    try:
        yield
    except OverfillError as error:
        if (named := own_field(error)) is not error:
            raise named from error
        raise


@dataclass(frozen=True, slots=True)
class Translation:
    """A request for one answer.

    Attributes:
        generate: the router's request.
        stream: whether the response is streamed.
        writer: makes what writes the answer.
        own_field: names the client's fields in errors.
        left_out: tools and fields that were left out; a response header names them.
    """

    generate: inference_pb2.GenerateRequest
    stream: bool
    writer: Callable[[Served], AnswerWriter]
    own_field: OwnField
    left_out: Sequence[str] = ()
