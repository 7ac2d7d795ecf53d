"""The routing policies that can be simulated, by name."""

from __future__ import annotations

from overfill.errors import InvalidRequest
from overfill.routing.dispatcher import Dispatcher, Job
from overfill.routing.policy import LeastLoad, Policy, RoundRobin
from overfill.routing.pool import Roster
from overfill.simulate.traces import TraceRequest

POLICIES: dict[str, type[Policy]] = {"least-load": LeastLoad, "round-robin": RoundRobin}

NAMES = tuple(POLICIES)


def make_dispatcher(roster: Roster, policy: str, max_queue: int, seed: int) -> Dispatcher:
    """Raises InvalidRequest when there is no such policy."""
    if policy not in POLICIES:
        raise InvalidRequest("policy", f"must be one of {', '.join(POLICIES)}, got {policy!r}")
    return Dispatcher(roster, POLICIES[policy](), max_queue=max_queue)


def make_job(name: str, trace: TraceRequest) -> Job:
    """As a router makes it of a request."""
    return Job(id=name, prompt_tokens=trace.prompt_tokens, max_tokens=trace.output_tokens)
