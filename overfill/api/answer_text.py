"""Turns an answer's tokens into text as they arrive: separates reasoning and tool calls, cuts at stop strings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.families.reader import ToolCallReader
from overfill.api.families.tool_format import ToolFormat
from overfill.api.reasoning import ReasoningReader
from overfill.api.stop import StopStrings
from overfill.api.tools import ToolDefinition
from overfill.request.thinking import ThinkingTokens
from overfill.routing.answer import AnswerDelta
from overfill.v1 import inference_pb2


class AnswerText:
    """Adds the text to an answer's deltas. The whole text does not depend on how the tokens are divided.

    Args:
        replayed: tokens whose text the client already has.
        tools: format of calls, and the tools that the answer may call; None if it may not call any.
        tool_call_id_seed: id of the answer. The ids of tool calls derive from it, so that they stay the same if another
            router continues the answer.
        min_tokens: number of tokens before which no stop string ends the answer.
        thinking: how the answer thinks; None if all of its text is the answer. Stop strings do not count in thinking.

    Attributes:
        num_tokens: number of answer tokens, with the replayed ones and the last one of a stop string.
        stop: stop string that ended the answer, or None.
    """

    def __init__(
        self,
        detokenizer: StreamDetokenizer,
        stops: Sequence[str],
        replayed: Sequence[int] = (),
        tools: tuple[ToolFormat, Sequence[ToolDefinition]] | None = None,
        tool_call_id_seed: str = "",
        min_tokens: int = 0,
        thinking: ThinkingTokens | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._has_stops = bool(stops)
        self._tool_call_id_seed = tool_call_id_seed
        self._min_tokens = min_tokens
        self._reader = None if tools is None else ToolCallReader(self._stops, *tools)
        self._reasoning = None if thinking is None else ReasoningReader(thinking, detokenizer)
        self.num_tokens = 0
        self.stop: str | None = None
        self._take(list(replayed))

    @property
    def called_tools(self) -> bool:
        """True if the answer has a complete tool call."""
        return self._reader is not None and self._reader.calls > 0

    @property
    def reasoning_tokens(self) -> int:
        """Number of tokens with which the answer has thought; ``num_tokens`` include them."""
        return 0 if self._reasoning is None else self._reasoning.tokens

    def push(self, delta: AnswerDelta) -> AnswerDelta:
        """Adds its text to ``delta`` and returns it. If it sets ``stop``, it cuts the tokens after the stop string."""
        before = self.num_tokens
        delta.reasoning, delta.text, delta.tool_calls = self._take(delta.token_ids)
        if self.stop is not None:
            taken = self.num_tokens - before
            del delta.token_ids[taken:], delta.logprobs[taken:]
        return delta

    def finish(self) -> AnswerDelta | None:
        """Returns a delta with the text held back so far, or None. The text may still end at a stop string."""
        reasoning = "" if self._reasoning is None else self._reasoning.finish()
        text, calls = self._read(self._detokenizer.finish())
        if self.stop is None:
            if self._reader is None:
                text += self._stops.finish()
            else:
                text += self._reader.finish(may_end=self._may_end)
                self.stop = self._reader.stop
        if not reasoning and not text and not calls:
            return None
        return AnswerDelta(self.num_tokens, [], text=text, reasoning=reasoning, tool_calls=calls)

    @property
    def _may_end(self) -> bool:
        return self.num_tokens > self._min_tokens

    def _take(self, ids: Sequence[int]) -> tuple[str, str, Sequence[inference_pb2.ToolCallDelta]]:
        if self._reasoning is None or self._reasoning.over:
            return "", *self._take_answer(ids)
        reasoning, read = self._reasoning.push(ids)
        self.num_tokens += read
        if not self._reasoning.over:
            return reasoning, "", ()
        return reasoning, *self._take_answer(ids[read:])

    def _take_answer(self, ids: Sequence[int]) -> tuple[str, Sequence[inference_pb2.ToolCallDelta]]:
        if not self._has_stops:
            self.num_tokens += len(ids)
            return self._read(self._detokenizer.push(ids))
        texts: list[str] = []
        calls: list[inference_pb2.ToolCallDelta] = []
        taken = 0
        while taken < len(ids) and self.stop is None:
            # While a stop string may end the answer, go token by token to know which one does.
            end = taken + 1 if self._reader is None or not self._reader.has_call else len(ids)
            self.num_tokens += end - taken
            text, parts = self._read(self._detokenizer.push(ids[taken:end]))
            texts.append(text)
            calls += parts
            taken = end
        return "".join(texts), calls

    def _read(self, text: str) -> tuple[str, Sequence[inference_pb2.ToolCallDelta]]:
        if self._reasoning is not None:
            text = self._reasoning.answer(text)
        if self._reader is None:
            text, self.stop = self._stops.push(text, may_end=self._may_end)
            return text, ()
        text, parts = self._reader.push(text, may_end=self._may_end)
        self.stop = self._reader.stop
        for part in parts:
            if part.name:
                seed = f"{self._tool_call_id_seed}/{part.index}".encode()
                part.id = f"call_{hashlib.sha256(seed).hexdigest()[:24]}"
        return text, parts
