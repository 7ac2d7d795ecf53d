"""The tokens of mock answers. They depend only on the request and on the position in the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from overfill.api.tokenizer import Tokenizer
from overfill.request.grammar import Grammars, Matcher
from overfill.request.params import MAX_LOGIT_BIAS, SamplingParams
from overfill.v1 import common_pb2


class Script:
    """The text of which answers consist, as tokens.

    Args:
        length: number of tokens after which an answer ends with the end token. None means it never does.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, length: int | None, grammars: Grammars) -> None:
        self.ids = tokenizer.encode_continuation(text)
        self.length = length
        self.grammars = grammars
        self.end = tokenizer.end_of_answer

    async def speaker(self, sampling: SamplingParams, sample_index: int, key: str) -> Speaker:
        """Creates the speaker of one answer for a client. Raises what ``Grammars.prepare`` does."""
        grammar = sampling.grammar
        if grammar is None:
            return Speaker(self, sampling, sample_index, None)
        matcher = await self.grammars.prepare(grammar, key, lambda: self.grammars.matcher(grammar))
        return Speaker(self, sampling, sample_index, matcher)


class Speaker:
    """Produces the tokens of one answer."""

    def __init__(self, script: Script, sampling: SamplingParams, sample_index: int, matcher: Matcher | None) -> None:
        self._script = script
        self._sampling = sampling
        self._sample_index = sample_index
        self._matcher = matcher
        self._seen = 0
        seed = 0 if sampling.greedy else sampling.seed or 0
        self._offset = random.Random(f"{seed}/{sample_index}").randrange(len(script.ids)) if seed else sample_index

    def next(self, emitted: Sequence[int]) -> int:
        """Returns the token after ``emitted``. Raises GrammarFailed."""
        if self._matcher is not None:
            return self._constrained(self._matcher, emitted)
        script, place = self._script, len(emitted)
        least = self._sampling.min_tokens
        if script.length is not None and place >= max(script.length, least) and script.end is not None:
            return script.end
        biases = self._sampling.logit_bias
        wanted = [token for token, bias in biases.items() if bias == MAX_LOGIT_BIAS]
        if wanted:
            return wanted[place % len(wanted)]
        ids = [token for token in script.ids if biases.get(token, 0) > -MAX_LOGIT_BIAS] or script.ids
        return ids[(self._offset + place) % len(ids)]

    def logprobs(self, token: int) -> common_pb2.TokenLogprobs | None:
        """Returns fake log-probabilities of ``token``, or None unless the request asks for them."""
        if self._sampling.logprobs is None:
            return None
        others = [token, *(other for other in self._script.ids if other != token)]
        top = list(dict.fromkeys(others))[: self._sampling.logprobs]
        return common_pb2.TokenLogprobs(
            logprob=-0.5, top_ids=top, top_logprobs=[-0.5 - rank for rank in range(len(top))]
        )

    def _constrained(self, matcher: Matcher, emitted: Sequence[int]) -> int:
        matcher.accept(emitted[self._seen :])
        self._seen = len(emitted)
        row = np.zeros(self._script.grammars.mask_words, np.int32)
        matcher.fill(row)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        if self._script.end in allowed:
            assert self._script.end is not None
            return self._script.end
        chooser = random.Random(f"{self._sampling.seed}/{self._sample_index}/{len(emitted)}")
        return int(allowed[chooser.randrange(len(allowed))])
