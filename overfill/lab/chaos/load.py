"""Sends greedy and sampled requests while a stack breaks. On demand, a client reads slowly or disconnects."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import grpc.aio

from overfill.client import Answer, AnswerPart, AsyncClient, ClientTls, Options, SamplingParams, Timing, Usage
from overfill.errors import OverfillError, Overloaded, Unavailable
from overfill.pair.reference import GREEDY
from overfill.routing.tier import DEFAULT_TIER, NO_FALLBACK

Ending = Literal["answered", "refused", "given up", "failed", "vanished"]

NO_ANSWER = Answer("", (), None, "length", Usage(0, 0, 0), Timing(), "", "", 0, "", "", 0, None, None, None)

_TIMEOUT = 300.0  # seconds for one request; a timeout counts as failed
_SLOW = 0.15  # seconds that a slow client waits after each part
_ENDINGS: dict[type[OverfillError], Ending] = {Overloaded: "refused", Unavailable: "given up"}

SAMPLED = (
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.5, top_p=0.9),
    SamplingParams(temperature=0.7, top_k=20),
    SamplingParams(temperature=1.2, min_p=0.05),
    SamplingParams(temperature=2.0, top_k=100, top_p=0.95, min_p=0.01),
    SamplingParams(temperature=1.0, top_p=0.95, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=1.0),
    SamplingParams(temperature=1.0, top_k=50, frequency_penalty=0.5, logit_bias=dict.fromkeys(range(5, 15), 4.0)),
)
"""Parameters of sampled requests."""


@dataclass(slots=True)
class RequestResult:
    """A request and its result.

    Attributes:
        tier: Tier or adapter that was asked.
        fallback: Tier that may go on with the answer; "none" means no other.
        sampling: Parameters of the request. A sampled answer has the seed here that the router used.
        sample_index: Number of the answer, from which other tokens are drawn with the same seed.
        ending: "refused": the stack was overloaded. "given up": it lost too many workers and said that another try may
            succeed. "vanished": the client disconnected on purpose. "failed": any other error.
        answer: The whole answer; ``NO_ANSWER`` unless the ending is "answered".
        told_parts: Parts of the answer that began while it streamed, as the stream told them.
        longest_pause: Longest time without a new token, in seconds, including the wait for the first one.
        slow: True if the client read slowly.
        sent: When the request was sent, as of ``time.monotonic``.
    """

    request: str
    prompt: Sequence[int]
    tier: str = DEFAULT_TIER
    fallback: str = NO_FALLBACK
    sampling: SamplingParams = GREEDY
    sample_index: int = 0
    ending: Ending = "answered"
    error: str = ""
    answer: Answer = NO_ANSWER
    told_parts: tuple[AnswerPart, ...] = ()
    longest_pause: float = 0.0
    slow: bool = False
    sent: float = 0.0

    @property
    def changed_tier(self) -> bool:
        """True if another tier than the one that was asked wrote a token."""
        return any(part.tier != self.tier for part in self.answer.parts)

    @property
    def tier_problem(self) -> str | None:
        """What is wrong with the parts that the answer names; None if they can be right."""
        if others := {part.tier for part in self.answer.parts} - {self.tier, self.fallback}:
            return f"{self.request}: tier {self.tier} was asked, but {', '.join(sorted(others))} wrote a part"
        # The first message of the stream names the tier that begins, unless it changes before the first token.
        told, begun = ([one for one in parts if one.first_index] for parts in (self.told_parts, self.answer.parts))
        return None if told == begun else f"{self.request}: the stream told of {told}, and the end of {begun}"


@dataclass(frozen=True, slots=True)
class RequestMix:
    """What the requests of a trial ask.

    Attributes:
        prompts: Token ids of the prompts, used in turn.
        max_tokens: Maximum tokens of an answer.
        tiers: Tiers to ask, at random.
        adapters: Adapters to ask, each as often as a tier. None goes on with an answer of another.
        fallback_share: Share of the requests that allow the next tier in ``tiers`` to go on with the answer.
        sampled_share: Share of the requests that are sampled; the others are greedy.
        turns: Maximum turns of a chat. After an answer, another request goes on with its tokens and a further prompt.
        longest: Maximum tokens of a prompt with its answer.
    """

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    seed: int = 0
    tiers: Sequence[str] = (DEFAULT_TIER,)
    adapters: Sequence[str] = ()
    fallback_share: float = 0.0
    sampled_share: float = 0.0
    turns: int = 1
    longest: int = 512

    def request(self, number: int) -> RequestResult:
        """Returns a request that is not sent yet. It depends only on the seed and its number.

        The router draws the seed of half of the sampled requests.
        """
        rng = random.Random(f"{self.seed}/{number}")
        writers = [*self.tiers, *self.adapters]
        tier = rng.randrange(len(writers))
        falls_back = rng.random() < self.fallback_share and tier < len(self.tiers) > 1
        sampling, sample_index = GREEDY, 0
        if rng.random() < self.sampled_share:
            seed = rng.choice([None, rng.getrandbits(64)])
            sampling, sample_index = replace(rng.choice(SAMPLED), seed=seed), rng.randrange(3)
        return RequestResult(
            f"chaos-{number}",
            self.prompts[number % len(self.prompts)],
            writers[tier],
            self.tiers[(tier + 1) % len(self.tiers)] if falls_back else NO_FALLBACK,
            replace(sampling, max_tokens=self.max_tokens),
            sample_index,
        )


class RequestSender:
    """Sends the requests of ``mix`` to the routers and collects their results. Each client starts with another router.

    Args:
        addresses: Addresses of the routers.
        api_key: Key that is sent with every request; None means no key.
    """

    def __init__(
        self, mix: RequestMix, addresses: Sequence[str], tls: ClientTls | None = None, api_key: str | None = None
    ) -> None:
        self._mix = mix
        self._addresses = addresses
        self._tls, self._api_key = tls, api_key
        self._chats: deque[tuple[int, Sequence[int]]] = deque()  # number of turns, and their tokens
        self._numbers = itertools.count()
        self._idle: list[AsyncClient] = []
        self._running: dict[str, tuple[AsyncClient, RequestResult]] = {}
        self.results: list[RequestResult] = []

    async def send(self) -> RequestResult:
        """Sends one request and waits for its end."""
        number = next(self._numbers)
        first = number % len(self._addresses)
        addresses = ",".join([*self._addresses[first:], *self._addresses[:first]])
        client = self._idle.pop() if self._idle else AsyncClient(addresses, tls=self._tls, api_key=self._api_key)
        result = self._mix.request(number)
        turn = self._continue(result)
        self._running[result.request] = client, result
        try:
            await self._read(client, result)
        except OverfillError as error:
            result.error = f"{type(error).__name__}: {error}"
            if result.ending != "vanished":
                result.ending = next((end for kind, end in _ENDINGS.items() if isinstance(error, kind)), "failed")
        except (asyncio.CancelledError, grpc.aio.UsageError):
            if result.ending != "vanished":  # gRPC raises these for a channel that was closed
                raise
        finally:
            del self._running[result.request]
        if result.ending == "vanished":
            await client.close()
        else:
            self._idle.append(client)
        if result.ending == "answered" and turn < self._mix.turns:
            self._chats.append((turn, [*result.prompt, *result.answer.token_ids]))
        self.results.append(result)
        return result

    def runs(self, request: str) -> bool:
        """Returns False if the request has already ended."""
        return request in self._running

    async def disturb(self, request: str, *, vanish: bool) -> None:
        """Makes a running request's client close its connections, or else read slowly from now on."""
        client, result = self._running[request]
        if vanish:
            result.ending = "vanished"
            await client.close()
        else:
            result.slow = True

    async def close(self) -> None:
        for client in self._idle:
            await client.close()

    def _continue(self, result: RequestResult) -> int:
        """Makes the request the next turn of a chat that waits for one, if it fits. Returns the number of the turn."""
        if not self._chats:
            return 1
        turn, tokens = self._chats.popleft()
        if len(tokens) + len(result.prompt) + self._mix.max_tokens > self._mix.longest:
            return 1
        result.prompt = [*tokens, *result.prompt]
        return turn + 1

    async def _read(self, client: AsyncClient, result: RequestResult) -> None:
        last = result.sent = time.monotonic()
        options: Options = {"sampling": result.sampling, "request_id": result.request, "timeout": _TIMEOUT}
        options |= {"tier": result.tier, "fallback": result.fallback, "sample_index": result.sample_index}
        async with client.stream(result.prompt, **options) as stream:
            async for delta in stream:
                result.told_parts += delta.parts
                if delta.token_ids:
                    now = time.monotonic()
                    result.longest_pause = max(result.longest_pause, now - last)
                    last = now
                if result.slow:
                    await asyncio.sleep(_SLOW)
            result.answer = stream.answer
        if not result.sampling.greedy:
            result.sampling = replace(result.sampling, seed=result.answer.seed)
