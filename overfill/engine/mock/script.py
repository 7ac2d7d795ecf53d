"""The tokens of mock answers. They depend only on the request and on the position in the answer, as a model's do."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import numpy as np

from overfill.api.tokenizer import Tokenizer
from overfill.engine.mock.options import MockOptions, ScriptedAnswer
from overfill.errors import InvalidRequest
from overfill.model.steps import SampledToken
from overfill.request.grammar import Grammars, Matcher
from overfill.request.params import MAX_LOGIT_BIAS, SamplingParams


class Script:
    """The answers that an engine plays, as tokens.

    Raises:
        InvalidRequest: a scripted token is not in the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, options: MockOptions) -> None:
        self._tokenizer = tokenizer
        self.end = tokenizer.end_of_answer
        self._repeated = tokenizer.encode_continuation(options.answer)
        self._length = options.answer_tokens
        self._answers = [(answer.when, self._tokens(answer)) for answer in options.script]
        self._selects = any(answer.when for answer in options.script)

    def player(
        self, params: SamplingParams, prompt: Sequence[int], grammars: Grammars, eos_ids: Sequence[int]
    ) -> Player:
        """Makes the player of one answer. Raises InvalidRequest if its grammar is not supported."""
        matcher = None if params.grammar is None else grammars.matcher(params.grammar)
        text = self._tokenizer.decode(prompt) if self._selects else ""
        scripted = next((tokens for when, tokens in reversed(self._answers) if when in text), None)
        if scripted is not None:
            return Player(params, prompt, scripted, len(scripted), 0, self.end, matcher, grammars.mask_words)
        ids, length, begin = self._repeated, self._length, 0
        if length is None:
            length = len(ids)
        elif not params.greedy:
            begin = params.seed or 0
        return Player(params, prompt, ids, length, begin, self.end, matcher, grammars.mask_words)

    def _tokens(self, answer: ScriptedAnswer) -> list[int]:
        if answer.tokens:
            for token in answer.tokens:
                if not 0 <= token < self._tokenizer.vocab_size:
                    raise InvalidRequest(
                        "engine_args", f"script: token {token} is not below {self._tokenizer.vocab_size}"
                    )
            return list(answer.tokens)
        calls = [(call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in answer.tool_calls]
        written = self._tokenizer.tool_format.write(calls) if calls else ""
        return self._tokenizer.encode_continuation(answer.text + written)


class Player:
    """Plays the tokens of one answer.

    Args:
        ids: the tokens, which repeat up to ``length``; after that comes ``end``.
        begin: index of the token with which the answer begins; answer number n of a request begins n tokens later.
        end: the token that ends an answer; None if the model has none.
        matcher: state of the request's grammar at the start of the answer.

    Attributes:
        prompt: the request's prompt, to which the KV of the sequence must belong.
        mark: tokens with which the answer begins, before its script: those of the adapter that writes it.
    """

    __slots__ = (
        "_begin", "_end", "_ids", "_length", "_mask_words", "_matcher", "_params", "_plain", "_seen", "_strayed",
        "mark", "prompt",
    )  # fmt: skip

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        ids: Sequence[int],
        length: int,
        begin: int,
        end: int | None,
        matcher: Matcher | None,
        mask_words: int,
    ) -> None:
        self.prompt = prompt
        self.mark: Sequence[int] = ()
        self._params = params
        self._matcher = matcher
        self._mask_words = mask_words
        self._begin = begin
        self._end = None if params.ignore_eos else end
        self._seen = 0
        self._strayed = False  # True once the grammar has ruled out the script's token
        bias = params.logit_bias
        wanted = [token for token, value in bias.items() if value == MAX_LOGIT_BIAS]
        self._ids = wanted or [token for token in ids if bias.get(token, 0) > -MAX_LOGIT_BIAS] or list(ids)
        self._length = max(length, params.min_tokens)
        self._plain = matcher is None and params.logprobs is None

    def next(self, emitted: Sequence[int], sample_index: int) -> SampledToken:
        """Returns the token after ``emitted``. Raises GrammarFailed."""
        token = self._scripted(len(emitted), sample_index)
        if self._plain:
            return SampledToken(token)
        if self._matcher is not None:
            token = self._allowed(self._matcher, emitted, token, sample_index)
        if self._params.logprobs is None:
            return SampledToken(token)
        top = list(dict.fromkeys([token, *self._ids]))[: self._params.logprobs]
        return SampledToken(token, -0.5, [(other, -0.5 - rank) for rank, other in enumerate(top)])

    def _scripted(self, place: int, sample_index: int) -> int:
        if place < len(self.mark):
            return self.mark[place]
        place -= len(self.mark)
        if place >= self._length and self._end is not None:
            return self._end
        return self._ids[(self._begin + sample_index + place) % len(self._ids)]

    def _allowed(self, matcher: Matcher, emitted: Sequence[int], token: int, sample_index: int) -> int:
        """Returns ``token`` if the grammar allows it and all before it; otherwise the end, or any allowed token."""
        matcher.accept(emitted[self._seen :])
        for place in range(self._seen, len(emitted)):
            self._strayed = self._strayed or emitted[place] != self._scripted(place, sample_index)
        self._seen = len(emitted)
        row = np.zeros(self._mask_words, np.int32)
        matcher.fill(row)
        allowed = np.unpackbits(row.view(np.uint8), bitorder="little")
        if not self._strayed and allowed[token]:
            return token
        if self._end is not None and allowed[self._end]:
            return self._end
        choices = np.flatnonzero(allowed)
        chooser = random.Random(f"{self._params.seed}/{sample_index}/{len(emitted)}")
        return int(choices[chooser.randrange(len(choices))])
