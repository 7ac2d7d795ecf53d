"""The placement policies, by their names in the settings."""

from __future__ import annotations

from typing import Final, Literal, get_args

from overfill.routing.affinity import PrefixAffinity
from overfill.routing.conditional import Conditional
from overfill.routing.policy import LeastLoad, MostFreeKv, Policy, PowerOfTwo, RoundRobin
from overfill.routing.sessions import SessionAffinity

DecodePolicyName = Literal["session-affinity", "least-load", "power-of-two", "most-free-kv", "round-robin"]
"""Few decode workers report the prefixes that they cache, so prefix affinity is for prefill only."""

PolicyName = Literal[
    "conditional", "prefix-affinity", "session-affinity", "least-load", "power-of-two", "most-free-kv", "round-robin"
]

PREFILL_DEFAULT: Final[PolicyName] = "conditional"
DECODE_DEFAULT: Final[DecodePolicyName] = "session-affinity"

DECODE_POLICIES: tuple[DecodePolicyName, ...] = get_args(DecodePolicyName)

POLICIES: dict[PolicyName, type[Policy]] = {
    "conditional": Conditional,
    "prefix-affinity": PrefixAffinity,
    "session-affinity": SessionAffinity,
    "least-load": LeastLoad,
    "power-of-two": PowerOfTwo,
    "most-free-kv": MostFreeKv,
    "round-robin": RoundRobin,
}
