"""Present a pair that a running stack serves as a model to the lm-evaluation-harness. Needs the extra ``pairs``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from overfill.client import Client
from overfill.errors import InternalError, InvalidRequest
from overfill.making.conversations import Transcript
from overfill.making.evaluate.lm_eval_adapter import PairLM
from overfill.model.manifest import Pair
from overfill.request.params import SamplingParams

_CONCURRENT = 16
"""Number of requests at once. The router's queue admits more."""

_SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)


class ServedLM(PairLM):
    """The pair, in the tier of a stack that has its decoder. The pair's folder needs no weights here.

    Args:
        client: Client of the stack; the caller closes it.

    Raises:
        InvalidRequest: no tier that the client may use has this full model and this decoder.
    """

    def __init__(self, pair: Pair, client: Client) -> None:
        models = client.models()
        wanted = (pair.full_digest, pair.decoder_digest)
        found = next((m for m in models if (m.full_digest, m.decoder_digest) == wanted), None)
        if found is None:
            served = ", ".join(f"{m.tier}: {m.decoder_digest[:12]}" for m in models)
            reason = f"has the decoder {pair.decoder_digest[:12]}, which no tier of the stack has ({served})"
            raise InvalidRequest("pair", reason)
        longest = min(found.max_model_len, pair.full_config.max_positions, pair.decoder_config.max_positions)
        super().__init__(pair, longest - 2)  # the stack reads a continuation's last token, and samples one
        self._client = client
        self._tier = found.tier

    def _scores(self, transcripts: Sequence[Transcript]) -> Sequence[tuple[float, bool]]:
        with ThreadPoolExecutor(_CONCURRENT) as threads:
            return list(threads.map(self._score, transcripts))

    def _score(self, transcript: Transcript) -> tuple[float, bool]:
        tokens, start = transcript.token_ids, transcript.answer_start
        answer = self._client.generate(tokens, sampling=_SCORED, answer_start=start, tier=self._tier)
        scores = [entry for entry in answer.prompt_logprobs or () if entry is not None]
        if len(scores) != len(transcript.answer):
            raise InternalError(f"{len(scores)} log-probabilities came for a continuation of {len(transcript.answer)}")
        return sum(score.logprob for score in scores), all(score.rank == 1 for score in scores)

    def _answers(self, prompts: Sequence[list[int]], choices: Sequence[SamplingParams]) -> Iterable[Sequence[int]]:
        def answer(prompt: list[int], sampling: SamplingParams) -> Sequence[int]:
            return self._client.generate(prompt, sampling=sampling, tier=self._tier).token_ids

        with ThreadPoolExecutor(_CONCURRENT) as threads:
            return list(threads.map(answer, prompts, choices))
