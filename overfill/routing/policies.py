"""The policies by the names that settings give them."""

from __future__ import annotations

from typing import Literal, get_args

from overfill.routing.affinity import PrefixAffinity
from overfill.routing.policy import LeastLoad, MostFreeKv, Policy, PowerOfTwo, RoundRobin

PolicyName = Literal["prefix-affinity", "least-load", "power-of-two", "most-free-kv", "round-robin"]

PREFILL_DEFAULT: PolicyName = "prefix-affinity"
DECODE_DEFAULT: PolicyName = "least-load"

POLICIES: dict[PolicyName, type[Policy]] = dict(
    zip(get_args(PolicyName), (PrefixAffinity, LeastLoad, PowerOfTwo, MostFreeKv, RoundRobin), strict=True)
)
