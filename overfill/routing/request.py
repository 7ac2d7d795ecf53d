"""One checked request: the only form of a request in the router, from its check to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from overfill.routing.job import Job
from overfill.routing.tier import TierChoice
from overfill.v1 import decode_pb2


@dataclass(eq=False, slots=True, kw_only=True)
class CheckedRequest(Job):
    """A request that the router can run. ``validate_generate`` makes it; ``RequestHandler`` adds what that cannot know.

    Attributes:
        start: The request as decode workers get it. It has a prompt of at least one token, the request's id or a
            random one, the model's end-of-sequence ids, and ``sampling`` with ``seed`` and ``max_tokens``. Prompt and
            ``max_tokens`` together fit the context. ``emitted_token_ids`` are the tokens of the answer that the client
            has, at most ``max_tokens``. If it has that many, the answer is complete and only its end message was lost.
            Each attempt sends a copy, in which it sets the fields of the attempt.
        prompt_token_ids: The prompt of ``start``, in a form that Python reads four times as fast.
        stop: Non-empty stop strings.
        continues_text: Whether the answer continues the prompt's text, so that its first word keeps its space.
        answer_digest: Digest of what determines the answer, if it may contain tool calls; else None. Two turns of a
            conversation may have one request id, but not one digest. A request that resumes has its first attempt's.
        stream_interval: Minimum number of tokens in a message to the client.
        received: Time when the router received the request, seconds on the event loop's clock.
        choice: The tier with which the request was accepted, and why. ``tier`` may have changed since.
    """

    start: decode_pb2.StartDecode
    id: str = field(init=False)
    prompt_tokens: int = field(init=False)
    max_tokens: int = field(init=False)
    prompt_token_ids: Sequence[int]
    stop: tuple[str, ...] = ()
    continues_text: bool = False
    answer_digest: str | None = None
    stream_interval: int = 1
    received: float = 0.0
    choice: TierChoice = field(default_factory=TierChoice)

    def __post_init__(self) -> None:
        start = self.start
        self.id = start.request_id
        self.prompt_tokens = len(self.prompt_token_ids)
        self.max_tokens = start.sampling.max_tokens
        self.emitted = len(start.emitted_token_ids)
        self.compiles = start.sampling.HasField("grammar")

    @property
    def client_resumed(self) -> bool:
        """True if the client brought the first tokens of the answer with its request."""
        return bool(self.start.emitted_token_ids)

    def sample(self, index: int) -> CheckedRequest:
        """Returns a copy, made before the start, for answer ``index`` among several to the prompt, with one seed."""
        start = decode_pb2.StartDecode()
        start.CopyFrom(self.start)
        if index:
            start.request_id, start.sample_index = f"{self.id}-{index}", index
        return replace(self, start=start)
