"""Turns of the two stages of one worker: which steps next, and how many prompt tokens a step computes. No torch."""

from __future__ import annotations

MIN_CHUNK = 64
"""Minimum number of prompt tokens in a step, whatever the objectives say. A smaller step costs nearly as much time."""

_FADING = 0.9
"""Weight of all earlier steps against the newest one, in measured rates."""


class _Rate:
    """A rate, measured over recent steps. Each step fades the earlier ones."""

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        self._amount = _FADING * self._amount + amount
        self._seconds = _FADING * self._seconds + seconds

    def seconds_for(self, amount: float) -> float | None:
        """Expected seconds for ``amount``. None before the first step."""
        return amount * self._seconds / self._amount if self._amount else None


class Turns:
    """Decides which stage steps next, and how many prompt tokens a prefill step computes.

    While both stages have work, their steps alternate. A prefill step then delays every running answer, so it computes
    only as many tokens as fit beside a decode step into the objective for the time between tokens. When the oldest
    prompt would miss its objective in this way, a prefill step computes as many tokens as it may.

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
        self._decode_steps = _Rate()
        self._prompt_tokens = _Rate()
        self.decode_first = True

    @property
    def measures(self) -> bool:
        """Whether the durations of steps matter."""
        return self._itl_objective is not None

    def decoded(self, seconds: float) -> None:
        """Notes a decode step."""
        self.decode_first = False
        self._decode_steps.add(1, seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Notes a prefill step; one that failed has computed 0 tokens."""
        self.decode_first = True
        if tokens:
            self._prompt_tokens.add(tokens, seconds)

    def chunk(self, decoding: bool, remaining: int, waited: float) -> int:
        """Maximum number of prompt tokens in the next prefill step.

        Args:
            decoding: whether answers wait for this step.
            remaining: tokens of the oldest prompt that are not computed.
            waited: seconds since that prompt arrived.
        """
        if not decoding or self._itl_objective is None:
            return self._max_tokens
        decode_step, token = self._decode_steps.seconds_for(1), self._prompt_tokens.seconds_for(1)
        if decode_step is None or token is None:
            return min(MIN_CHUNK, self._max_tokens)
        tokens = min(self._max_tokens, max(MIN_CHUNK, int((self._itl_objective - decode_step) / token)))
        if self._ttft_objective is not None:
            turns = -(-remaining // tokens)
            if waited + turns * decode_step + remaining * token > self._ttft_objective:
                return self._max_tokens
        return tokens
