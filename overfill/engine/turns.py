"""Turns of the two stages of one worker: which steps next, and how many prompt tokens a step computes. No torch."""

from __future__ import annotations

import math

MIN_CHUNK = 16
"""Minimum number of prompt tokens in a step that is kept short for running answers."""

_FADING = 0.95
"""Weight of all earlier steps against the newest one, in measured durations."""

_MIN_VARIANCE = 0.01
"""Minimum variance of the steps' sizes, relative to their squared mean, that tells a step's cost from its tokens'."""


class _StepCost:
    """Seconds of a step as a linear function of its tokens: a least-squares fit in which earlier steps fade."""

    def __init__(self) -> None:
        self._steps = self._tokens = self._seconds = self._tokens_squared = self._products = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._steps = _FADING * self._steps + 1
        self._tokens = _FADING * self._tokens + tokens
        self._seconds = _FADING * self._seconds + seconds
        self._tokens_squared = _FADING * self._tokens_squared + tokens * tokens
        self._products = _FADING * self._products + tokens * seconds

    @property
    def known(self) -> bool:
        return self._steps > 0

    def fit(self) -> tuple[float, float]:
        """Seconds of each step, and seconds of each token. Both are 0 or more.

        Where steps of different sizes do not tell the two apart, a step costs nothing besides its tokens.
        """
        variance = self._steps * self._tokens_squared - self._tokens**2
        if variance > _MIN_VARIANCE * self._tokens**2:
            token = (self._steps * self._products - self._tokens * self._seconds) / variance
            step = (self._seconds - token * self._tokens) / self._steps
            if token > 0 and step > 0:
                return step, token
        return 0.0, self._seconds / self._tokens


class Turns:
    """Decides which stage steps next, and how many prompt tokens a prefill step computes.

    While both stages have work, their steps alternate. A prefill step then delays every running answer, so it computes
    only as many tokens as fit beside a decode step into the objective for the time between tokens. It computes as many
    tokens as it may in two cases:

    - The oldest prompt would miss its objective with short steps, and keeps it with long ones. A prompt that misses it
      in any case delays no answer.
    - Short steps cannot keep the objective, or would spend more than a third of their time on what each step costs
      besides its tokens. Then both objectives would be missed.

    Args:
        max_num_batched_tokens: maximum number of prompt tokens in one step.
        ttft_objective: seconds from a prompt's arrival in the engine to its first token. None means no objective.
        itl_objective: seconds between two tokens of an answer. None means no objective: steps simply alternate.

    Attributes:
        decode_first: True if the decode stage steps next, unless it has nothing to compute.
    """

    def __init__(
        self, max_num_batched_tokens: int, ttft_objective: float | None = None, itl_objective: float | None = None
    ) -> None:
        self._max_tokens = max_num_batched_tokens
        self._ttft_objective = ttft_objective
        self._itl_objective = itl_objective
        self._decode_steps = _StepCost()
        self._prefill_steps = _StepCost()
        self.decode_first = True

    @property
    def measures(self) -> bool:
        """Whether the durations of steps matter."""
        return self._itl_objective is not None

    def decoded(self, seconds: float | None) -> None:
        """Notes a decode step. None: it replayed known tokens, so its duration says nothing of other steps."""
        self.decode_first = False
        if seconds is not None:
            self._decode_steps.add(1, seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Notes a prefill step. One that failed, or whose duration is unknown, counts as a step of 0 tokens."""
        self.decode_first = True
        if tokens:
            self._prefill_steps.add(tokens, seconds)

    def chunk(self, decoding: bool, remaining: int, waited: float, *, alone: bool = True) -> int:
        """Maximum number of prompt tokens in the next prefill step.

        Args:
            decoding: whether answers wait for this step.
            remaining: tokens of the oldest prompt that are not computed.
            waited: seconds since that prompt arrived.
            alone: whether no other prompt waits. Otherwise the oldest prompt gets half of a chunk that it does not fit.
        """
        longest = self._max_tokens
        if not decoding or self._itl_objective is None or longest <= MIN_CHUNK:
            return longest
        if not (self._decode_steps.known and self._prefill_steps.known):
            return MIN_CHUNK
        (_, decode), (step, token) = self._decode_steps.fit(), self._prefill_steps.fit()
        tokens = min(longest, int((self._itl_objective - decode - step) / token))
        if tokens < max(MIN_CHUNK, 2 * step / token):
            return longest
        if self._ttft_objective is not None:

            def first_token(chunk: int) -> float:
                share = chunk if alone or remaining <= chunk else max(1, chunk // 2)
                steps = math.ceil(remaining / share)
                computed = remaining if share == chunk else steps * chunk
                return waited + computed * token + steps * (step + decode)

            if first_token(longest) <= self._ttft_objective < first_token(tokens):
                return longest
        return tokens
