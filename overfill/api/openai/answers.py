"""Turns our messages into responses of OpenAI's API, whole or in chunks. No sockets."""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple

from pydantic_core import to_json

from overfill.api.report import answer_report
from overfill.api.tokenizer import Tokenizer
from overfill.request.names import FINISH_REASONS
from overfill.routing.answer import AnswerDelta
from overfill.v1 import common_pb2, inference_pb2

MARK = "\0"
"""Stands for text or log-probabilities that are put into the JSON of a message later."""

_PLACE = b'logprobs":"\\u0000"'  # of ``logprobs`` and of ``prompt_logprobs``

_RULED_OUT = -9999.0
"""Log-probability that OpenAI reports for a probability of zero, because JSON has no infinity."""

_FIRST_STEP, _STEP = 16, 64
"""Number of tokens of which the first piece and later ones hold log-probabilities. A token takes some 25 µs."""

_WRITTEN = common_pb2.TokenLogprobs()

_UTF8 = codecs.getincrementaldecoder("utf-8")

_MAX_KNOWN = 1 << 15
"""Number of tokens whose texts are kept as JSON."""

Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class Envelope:
    """Fields that all messages of one response share.

    Attributes:
        id: Id of the response.
        model: Name of the model; with several tiers, also of the tier that begins the first choice.
        pair: Description of that tier's pair, for the ``overfill`` object.
        fingerprint: Fingerprint of the weights; different weights have a different one.
        tokens: The tokens of the model, as JSON.
        created: Unix time of the response, seconds.
    """

    kind: Kind
    id: str
    model: str
    pair: dict[str, Any]
    fingerprint: str
    tokens: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: list[dict[str, Any]], *, chunk: bool, **more: Any) -> dict[str, Any]:
        """A response, or a chunk of one, with ``choices`` and the fields in ``more``."""
        name = {"chat": "chat.completion", "completion": "text_completion"}[self.kind]
        if chunk and self.kind == "chat":
            name += ".chunk"
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }

    def extension(self, ended: Sequence[Choice]) -> dict[str, Any]:
        """The ``overfill`` object, which extends OpenAI's response, for choices that have ended."""
        return {"pair": self.pair, "choices": [choice.report() for choice in ended]}


@dataclass(slots=True)
class Choice:
    """One choice of a response, built while its answer arrives.

    Attributes:
        logprobs: Whether the request asked for log-probabilities.
        brownout_from: Requested tier, if it is overloaded and another writes the answer; otherwise empty.
        echo: Text that precedes the answer.
        prompt: Token ids of the prompt, if it is scored.
        prompt_logprobs: Whether the prompt's log-probabilities are apart from the answer's, as in vLLM's responses.
        without_answer: Whether the response leaves out the answer.
        include_reasoning: Whether the response shows what the model thinks before it answers.
        finished: Last message of the answer; None until it arrives.
        cached_tokens: Number of prompt tokens that were in a prefix cache, as far as it is known before ``finished``.
    """

    index: int
    envelope: Envelope
    seed: int
    prompt_tokens: int
    logprobs: bool
    brownout_from: str = ""
    echo: str = ""
    prompt: Sequence[int] = ()
    prompt_logprobs: bool = False
    without_answer: bool = False
    include_reasoning: bool = True
    finished: inference_pb2.Finished | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _ids: list[int] = field(default_factory=list)
    _entries: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    _scores_of_prompt: PromptScores | None = None
    _offset: int = 0  # number of characters in the tokens that ``_next_offset`` has seen
    _characters: codecs.IncrementalDecoder = field(default_factory=lambda: _UTF8(errors="replace"))
    _calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, delta: AnswerDelta) -> None:
        """Adds ``delta`` to the whole answer."""
        if delta.prompt_logprobs is not None:
            self._scores_of_prompt = PromptScores(self.prompt, delta.prompt_logprobs)
        if self.without_answer:
            return
        self.completion_tokens += len(delta.token_ids)
        self._text.append(delta.text)
        self._reasoning.append(self._shown_reasoning(delta))
        for part in delta.tool_calls:
            if part.name:
                self._calls.append(_call(part.id, part.name))
            self._calls[-1]["function"]["arguments"] += part.arguments
        self._ids += delta.token_ids[: len(delta.logprobs)]
        self._entries += delta.logprobs

    def whole(self) -> dict[str, Any]:
        """The choice for a response that is not streamed; ``whole_scores`` belongs to it."""
        text = "".join(self._text)
        scores = MARK if self.logprobs else None
        if self.envelope.kind == "completion":
            apart = {"prompt_logprobs": MARK} if self.prompt_logprobs else {}
            text = self.echo + text
            return {"index": self.index, "text": text, "logprobs": scores, "finish_reason": self.reason, **apart}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if reasoning := "".join(self._reasoning):
            message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = self._calls
            message["content"] = text or None
        return {"index": self.index, "message": message, "logprobs": scores, "finish_reason": self.reason}

    def whole_scores(self) -> Iterator[Iterator[bytes]]:
        """The JSON of each of the choice's log-probabilities, in pieces: of the whole answer, and of the prompt."""
        prompt = self._scores_of_prompt
        if self.logprobs:
            echoed = prompt if prompt is not None and not self.prompt_logprobs else None
            yield self._scores(self._ids, self._entries, echoed)
        if self.prompt_logprobs and prompt is not None:
            yield prompt.write(self.envelope.tokens)

    def first(self) -> dict[str, Any] | None:
        """The choice for a stream's first chunk, before any token; None if there is nothing to send."""
        if self.envelope.kind == "chat":
            return self._chunk({"role": "assistant", "content": "", "refusal": None}, None)
        return self._chunk(self.echo, None) if self.echo else None

    def only_text(self, delta: AnswerDelta) -> bool:
        """Counts the tokens of ``delta`` and returns True if its chunk is ``text(delta.text)``; else does nothing."""
        if self.logprobs or delta.tool_calls or delta.reasoning or not delta.text:
            return False
        self.completion_tokens += len(delta.token_ids)
        return True

    def text(self, text: str) -> dict[str, Any]:
        """The choice for a chunk with ``text`` and nothing else."""
        return self._chunk(text if self.envelope.kind == "completion" else {"content": text}, None)

    def chunk(self, delta: AnswerDelta) -> dict[str, Any] | None:
        """The choice for a chunk with ``delta``; None if it would be empty, as inside a character.

        With log-probabilities, ``scores`` belongs to it.
        """
        self.completion_tokens += len(delta.token_ids)
        scores = MARK if self.logprobs else None
        reasoning = self._shown_reasoning(delta)
        if not reasoning and not delta.text and not delta.tool_calls and not delta.logprobs:
            return None
        if self.envelope.kind == "completion":
            return self._chunk(delta.text, scores)
        content: dict[str, Any] = {"reasoning_content": reasoning} if reasoning else {}
        if delta.text or not (reasoning or delta.tool_calls):
            content["content"] = delta.text
        if delta.tool_calls:
            content["tool_calls"] = _call_deltas(delta.tool_calls)
        return self._chunk(content, scores)

    def scores(self, delta: AnswerDelta) -> Iterator[bytes]:
        """The JSON of the log-probabilities of ``delta``, in pieces."""
        return self._scores(delta.token_ids, delta.logprobs)

    def last(self) -> dict[str, Any]:
        """The choice for the last chunk, which holds the finish reason."""
        empty: Any = "" if self.envelope.kind == "completion" else {}
        return {**self._chunk(empty, None), "finish_reason": self.reason}

    def report(self) -> dict[str, Any]:
        """The choice in the ``overfill`` object, once its answer has ended: who wrote it, in which times."""
        assert self.finished is not None
        return {"index": self.index, **answer_report(self.finished, self.seed, self.brownout_from)}

    @property
    def reason(self) -> str:
        """Finish reason of the answer, once it has ended."""
        assert self.finished is not None
        return "length" if self.without_answer else FINISH_REASONS[self.finished.reason]

    def _shown_reasoning(self, delta: AnswerDelta) -> str:
        return delta.reasoning if self.include_reasoning else ""

    def _chunk(self, content: Any, scores: Any) -> dict[str, Any]:
        key = "text" if self.envelope.kind == "completion" else "delta"
        return {"index": self.index, key: content, "logprobs": scores, "finish_reason": None}

    def _scores(
        self, ids: Sequence[int], entries: list[common_pb2.TokenLogprobs], echoed: PromptScores | None = None
    ) -> Iterator[bytes]:
        """Writes ``entries``, and frees them on the way: to free all at once takes as long as some hundred pieces.

        Args:
            echoed: The prompt's, which precede them.
        """
        tokens = self.envelope.tokens

        def each(write: Callable[[int, Any], bytes], free: bool = False) -> Iterator[bytes]:
            if echoed is not None:
                yield from _joined(echoed.ids, echoed, write)
                if entries:
                    yield b","
            yield from _joined(ids, entries, write, free)

        if self.envelope.kind == "chat":
            yield b'{"content":['
            yield from _joined(ids, entries, tokens.score, free=True)
            yield b'],"refusal":null}'
            return
        yield b'{"tokens":['
        yield from each(lambda token, _: tokens[token].json)
        yield b'],"token_logprobs":['
        yield from each(lambda _, entry: b"null" if entry is None else _number(entry.logprob))
        yield b'],"top_logprobs":['
        yield from each(lambda token, entry: b"null" if entry is None else tokens.legacy_top(token, entry), free=True)
        yield b'],"text_offset":['
        yield from each(self._next_offset)
        yield b"]}"

    def _next_offset(self, token: int, entry: object) -> bytes:
        """The number of characters before ``token``. Like vLLM, counts a character at the token that completes it."""
        offset = self._offset
        self._offset += len(self._characters.decode(self.envelope.tokens[token].data))
        return b"%d" % offset


class PromptScores(Sequence[common_pb2.TokenLogprobs | None]):
    """The log-probabilities of a prompt's tokens; None for tokens that have none. Entries are made as they are read.

    Attributes:
        ids: The prompt.
    """

    def __init__(self, ids: Sequence[int], scores: common_pb2.PromptLogprobs) -> None:
        self.ids = ids
        self._scores = scores
        self._first = len(ids) - len(scores.logprobs)
        self._count = len(scores.top_ids) // max(1, len(scores.logprobs))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index - self._first
        if place < 0:
            return None
        top, scores = slice(place * self._count, (place + 1) * self._count), self._scores
        return common_pb2.TokenLogprobs(
            logprob=scores.logprobs[place], top_ids=scores.top_ids[top], top_logprobs=scores.top_logprobs[top]
        )

    def write(self, tokens: TokenTexts) -> Iterator[bytes]:
        """The JSON of vLLM's ``prompt_logprobs``, in pieces."""

        def write(token: int, index: int) -> bytes:
            entry = self[index]
            if entry is None:
                return b"null"
            ranked = zip(entry.top_ids, entry.top_logprobs, range(1, 1 + self._count), strict=True)
            rows = {token: (entry.logprob, self._scores.ranks[index - self._first])}
            for id, logprob, rank in ranked:
                rows.setdefault(id, (logprob, rank))
            return b"{%b}" % b",".join(
                b'"%d":{"logprob":%b,"rank":%d,"decoded_token":%b}' % (id, _number(logprob), rank, tokens[id].json)
                for id, (logprob, rank) in rows.items()
            )

        yield b"["
        yield from _joined(self.ids, range(len(self.ids)), write)
        yield b"]"


class TokenText(NamedTuple):
    """A token's bytes, its text as JSON, and its bytes as a JSON list."""

    data: bytes
    json: bytes
    bytes: bytes


class TokenTexts(dict[int, TokenText]):
    """The texts of tokens by id, and JSON of log-probabilities. Most tokens repeat, so their JSON is kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> TokenText:
        if len(self) >= _MAX_KNOWN:
            self.clear()
        data = self._tokenizer.token_bytes(token)
        made = self[token] = TokenText(data, encode_text(data.decode(errors="replace")), to_json(list(data)))
        return made

    def score(self, token: int, entry: common_pb2.TokenLogprobs) -> bytes:
        """The log-probabilities at one token, as chats show them."""
        top = b"},".join([self._scored(*pair) for pair in zip(entry.top_ids, entry.top_logprobs, strict=False)])
        return b'%b,"top_logprobs":[%b]}' % (self._scored(token, entry.logprob), top and top + b"}")

    def legacy_top(self, token: int, entry: common_pb2.TokenLogprobs) -> bytes:
        """The likeliest tokens as ``/v1/completions`` shows them. If some have the same text, the likeliest remains."""
        top = list(zip(entry.top_ids, entry.top_logprobs, strict=False))
        values = {self[other].json: _number(value) for other, value in reversed(top)}
        return b"{%b}" % b",".join([b"%b:%b" % pair for pair in values.items()])

    def _scored(self, token: int, logprob: float) -> bytes:
        _, text, data = self[token]
        return b'{"token":%b,"logprob":%b,"bytes":%b' % (text, _number(logprob), data)


def _number(logprob: float) -> bytes:
    return repr(logprob if math.isfinite(logprob) else _RULED_OUT).encode()


def _joined(
    ids: Sequence[int],
    entries: Sequence[Any],
    write: Callable[[int, Any], bytes],
    free: bool = False,
) -> Iterator[bytes]:
    """The items of a JSON list, in pieces that take a millisecond or two.

    Args:
        free: Whether to replace the written entries; ``entries`` is a list then.
    """
    start, end = 0, _FIRST_STEP
    while start < len(entries):
        items = b",".join([write(*pair) for pair in zip(ids[start:end], entries[start:end], strict=False)])
        if free:
            assert isinstance(entries, list)
            entries[start:end] = [_WRITTEN] * len(entries[start:end])
        yield b"," + items if start else items
        start, end = end, end + _STEP


class EventFrame:
    """The constant bytes around the text in the events of one choice.

    Args:
        chunk: a chunk whose text is ``MARK``.
    """

    def __init__(self, chunk: dict[str, Any]) -> None:
        # After the text, a chunk has no strings, so the last one that equals the mark is the text.
        self._head, _, self._tail = event(chunk).rpartition(encode_text(MARK))

    def event(self, text: str) -> bytes:
        """Returns the bytes of the server-sent event for a chunk with ``text``."""
        return self._head + encode_text(text) + self._tail


def usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """Token counts of all choices together. A prompt with ``n`` choices counts once."""
    prompt = sum(choice.prompt_tokens for choice in choices[::n])
    completion = sum(choice.completion_tokens for choice in choices)
    cached = sum(
        choice.cached_tokens if choice.finished is None else choice.finished.usage.cached_tokens
        for choice in choices[::n]
    )
    reasoning = sum(choice.finished.usage.reasoning_tokens for choice in choices if choice.finished is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning, "audio_tokens": 0},
    }


def encode(message: dict[str, Any]) -> bytes:
    """``message`` as JSON without white space. Numbers that JSON does not have, which clients may send, are null."""
    return to_json(message, inf_nan_mode="null")


def pieces(message: dict[str, Any], scores: Sequence[Iterator[bytes]]) -> Iterator[bytes]:
    """``message`` as JSON, in pieces. ``scores`` are the log-probabilities of its choices that have ``MARK``."""
    # No text can look like the place: inside a JSON string, quotation marks are escaped.
    head, *tails = encode(message).split(_PLACE)
    yield head
    for score, tail in zip(scores, tails, strict=True):
        yield b'logprobs":'
        yield from score
        yield tail


def encode_text(text: str) -> bytes:
    """``text`` as a JSON string, as ``encode`` writes it."""
    return encode_basestring(text).encode()


def event(message: dict[str, Any]) -> bytes:
    """``message`` as one server-sent event."""
    return b"data: " + encode(message) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _call(id: str, name: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}


def _call_deltas(parts: Sequence[inference_pb2.ToolCallDelta]) -> list[dict[str, Any]]:
    """``parts`` with one entry per call, as at OpenAI: some clients read only the first entry of a chunk."""
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        if part.index not in calls:
            made = _call(part.id, part.name) if part.name else {"function": {"arguments": ""}}
            calls[part.index] = {"index": part.index, **made}
        calls[part.index]["function"]["arguments"] += part.arguments
    return list(calls.values())
