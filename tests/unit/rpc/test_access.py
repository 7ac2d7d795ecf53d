"""Tests what a certificate may do at a router that has API keys."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from overfill.errors import PermissionDenied, Unauthenticated
from overfill.rpc.access import ROUTER_RPCS, ROUTES, AccessPolicy, Role, Rule, Scope

INFERENCE = {path: rule for path, rule in {**ROUTER_RPCS, **ROUTES}.items() if rule.scope is Scope.INFER}


@dataclass(frozen=True)
class Key:
    name: str = "team"
    scopes: frozenset[Scope] = frozenset({Scope.INFER})


KEY = Key()
WITH_KEYS = AccessPolicy(ROUTER_RPCS, {"secret": KEY}.get)


@pytest.mark.parametrize("roles", [{Role.CLIENT}, {Role.OPERATOR}, set(Role)], ids=["client", "operator", "all"])
@pytest.mark.parametrize("path", INFERENCE)
def test_no_certificate_replaces_the_key_of_a_request(path: str, roles: set[Role]) -> None:
    """Otherwise the request would have no quota, no priority and the cache namespace of no tenant."""
    rule = INFERENCE[path]
    for shown in (None, "wrong"):
        with pytest.raises(Unauthenticated):
            WITH_KEYS.check(rule, shown, frozenset(roles))
    assert WITH_KEYS.check(rule, "secret", frozenset(roles)) is KEY
    assert AccessPolicy(ROUTER_RPCS).check(rule, None, frozenset(roles)) is None, "a router without keys"


@pytest.mark.parametrize(
    ("rule", "role"),
    [
        (ROUTER_RPCS["/overfill.v1.Admin/Status"], Role.OPERATOR),
        (ROUTER_RPCS["/overfill.v1.Admin/Status"], Role.ROUTER),  # `overfill status` in a router's pod
        (ROUTER_RPCS["/overfill.v1.Admin/Drain"], Role.OPERATOR),
        (ROUTER_RPCS["/overfill.v1.Admin/Drain"], Role.ROUTER),
        (ROUTER_RPCS["/overfill.v1.Registry/Join"], Role.WORKER),
        (ROUTES["/metrics"], Role.SCRAPER),
    ],
)
def test_processes_and_operators_need_no_key(rule: Rule, role: Role) -> None:
    assert WITH_KEYS.check(rule, None, frozenset({role})) is None


def test_a_client_s_certificate_does_not_operate_the_stack() -> None:
    client = frozenset({Role.CLIENT})
    for method in ("/overfill.v1.Admin/Drain", "/overfill.v1.Admin/ChangeRollout", "/overfill.v1.Registry/Join"):
        with pytest.raises(PermissionDenied, match="the caller's certificate has client"):
            WITH_KEYS.check(ROUTER_RPCS[method], "secret", client)
    with pytest.raises(Unauthenticated, match="API key"):
        WITH_KEYS.check(ROUTER_RPCS["/overfill.v1.Admin/Status"], None, client)
