"""Plays a load test on its target, and shows how it goes."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.traffic.figures import latencies
from overfill.lab.traffic.outcome import Outcome, RequestFailed
from overfill.lab.traffic.play import Target, run_load
from overfill.lab.traffic.targets import GrpcTarget, OpenAiTarget
from overfill.lab.traffic.traces import TraceRequest
from overfill.rpc.tls import ClientTls

_WARM_UP_TOKENS = (64, 4)  # prompt, answer
_WARM_UP_BLOCK = -1
"""Block of the warm-up's prompt, which no trace has. So no later prompt finds it in a prefix cache."""

_LINE_SECONDS = 10.0
_RECENT = 500
"""Number of the latest outcomes whose latencies the progress line shows."""


def run_test(
    plan: LoadPlan, requests: Iterable[TraceRequest], tls: ClientTls | None, api_key: str | None
) -> list[Outcome]:
    """Plays the ``requests`` of a plan, with progress on stderr. Returns the outcomes, sorted by due time.

    Ctrl-C ends the test. Requests that have not ended then have failed, and in an open loop those not sent too.

    Raises:
        RequestFailed: The target does not answer.
    """
    outcomes: list[Outcome] = []
    total = len(requests) if isinstance(requests, Sequence) else None

    async def play() -> None:
        async with _target(plan, tls, api_key) as target:
            await _warm_up(plan, target)
            progress = asyncio.create_task(_show_progress(outcomes, total))
            try:
                await run_load(
                    target,
                    requests,
                    plan.vocab_size,
                    concurrency=None if plan.open_loop else plan.users_at,
                    duration=math.inf if plan.open_loop else plan.seconds,
                    timeout=plan.timeout,
                    ended=outcomes.append,
                )
            finally:
                progress.cancel()

    with suppress(KeyboardInterrupt):
        asyncio.run(play())
    if plan.open_loop and outcomes:
        latest = max(outcome.due for outcome in outcomes)
        outcomes += [Outcome(latest, (), "never sent")] * ((total or 0) - len(outcomes))
    return sorted(outcomes, key=lambda outcome: outcome.due)


def _target(plan: LoadPlan, tls: ClientTls | None, api_key: str | None) -> OpenAiTarget | GrpcTarget:
    own = {name: value for name in ("fallback", "allow_brownout") if (value := getattr(plan, name))}
    if plan.http:
        return OpenAiTarget(plan.target, plan.model, api_key, tls=tls, **own)
    return GrpcTarget(plan.address, tls, api_key, **own)


async def _warm_up(plan: LoadPlan, target: Target) -> None:
    """Sends a short request to each tier, to open connections. Raises RequestFailed if one failed."""
    prompt, answer = _WARM_UP_TOKENS
    requests = [TraceRequest(0.0, prompt, answer, (_WARM_UP_BLOCK,), prompt, tier=tier) for tier in plan.tiers]
    for outcome in await run_load(target, requests, plan.vocab_size, concurrency=1, timeout=plan.timeout):
        if outcome.error is not None:
            raise RequestFailed(outcome.error)


async def _show_progress(outcomes: Sequence[Outcome], total: int | None) -> None:
    """Writes a line every 10 s."""
    began = time.monotonic()
    while True:
        await asyncio.sleep(_LINE_SECONDS)
        recent = latencies(outcomes[-_RECENT:], ("ttft", "itl"))
        parts = [
            f"{time.monotonic() - began:.0f} s",
            f"{len(outcomes)}{'' if total is None else f' of {total}'} answered",
            f"{sum(not outcome.ok for outcome in outcomes)} failed",
            *(f"{one.name}_p90 {1e3 * (one.p90 or 0):.0f} ms" for one in recent),
        ]
        print(", ".join(parts), file=sys.stderr, flush=True)
