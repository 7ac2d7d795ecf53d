"""Who may call what: a table of every RPC and route, and the gate that holds callers against it. No sockets.

What is not in the table is refused, so a new RPC or route that nobody thought about is closed and not open. A caller
shows one or more of

* a certificate, where the listener wants one; its subject alternative names say which roles its bearer has:
  ``URI:overfill://role/worker``, or ``DNS:worker.role.overfill.internal`` for issuers that make DNS names only;
* an API key (``authorization: Bearer KEY``), which has scopes;
* the stack's secret, in the same place: processes of one stack on one machine, where there are no certificates.

Where none of the three is configured everything in the table is open; that is so on loopback only.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from overfill.errors import PermissionDenied, Unauthenticated

MIN_SECRET = 16
"""Characters that the stack's secret has at least."""

_URI = "overfill://role/"
_DNS = ".role.overfill.internal"


class Scope(StrEnum):
    """What an API key is good for."""

    INFER = "infer"  # answers, models, tokens
    STATUS = "status"  # who is there and how busy
    METRICS = "metrics"
    ADMIN = "admin"  # drains, reflection


class Role(StrEnum):
    """What the bearer of a certificate is."""

    ROUTER = "router"
    WORKER = "worker"
    CLIENT = "client"  # sends requests
    OPERATOR = "operator"  # and drains
    SCRAPER = "scraper"  # reads metrics


class KeyHolder(Protocol):
    """Who holds an API key."""

    @property
    def name(self) -> str: ...

    @property
    def scopes(self) -> frozenset[Scope]: ...


FindKey = Callable[[str], KeyHolder | None]
"""Who holds a key; None when nobody does."""

caller: ContextVar[KeyHolder | None] = ContextVar("caller", default=None)
"""The API key that the RPC being served came with; None where none was needed."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a caller must show.

    Attributes:
        scope: that an API key must have; None: no key is good enough.
        roles: of certificates, one of which is wanted where certificates are.
        open: anybody may call.
    """

    scope: Scope | None = None
    roles: frozenset[Role] = frozenset()
    open: bool = False


_OPEN = Rule(open=True)
_INFER = Rule(Scope.INFER, frozenset({Role.CLIENT, Role.OPERATOR}))
_STATUS = Rule(Scope.STATUS, frozenset({Role.CLIENT, Role.OPERATOR, Role.ROUTER}))
_ADMIN = Rule(Scope.ADMIN, frozenset({Role.OPERATOR, Role.ROUTER}))
_METRICS = Rule(Scope.METRICS, frozenset({Role.SCRAPER, Role.OPERATOR, Role.ROUTER, Role.WORKER}))
_FROM_WORKERS = Rule(None, frozenset({Role.WORKER}))
_FROM_ROUTERS = Rule(None, frozenset({Role.ROUTER}))
_FROM_PEERS = Rule(None, frozenset({Role.ROUTER, Role.WORKER}))

_HEALTH: Mapping[str, Rule] = {
    "/grpc.health.v1.Health/Check": _OPEN,
    "/grpc.health.v1.Health/Watch": _OPEN,
}
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

ROUTER_RPCS: Mapping[str, Rule] = {
    **_HEALTH,
    _REFLECTION: _ADMIN,
    "/overfill.v1.Inference/Generate": _INFER,
    "/overfill.v1.Inference/ListModels": _INFER,
    "/overfill.v1.Inference/Tokenize": _INFER,
    "/overfill.v1.Inference/Detokenize": _INFER,
    "/overfill.v1.Registry/Join": _FROM_WORKERS,
    "/overfill.v1.Admin/Status": _STATUS,
    "/overfill.v1.Admin/Drain": _ADMIN,
}
"""Of a router."""

WORKER_RPCS: Mapping[str, Rule] = {
    **_HEALTH,
    _REFLECTION: _FROM_PEERS,
    "/overfill.v1.Prefill/Describe": _FROM_WORKERS,
    "/overfill.v1.Prefill/Prefill": _FROM_WORKERS,
    "/overfill.v1.Prefill/PullKv": _FROM_WORKERS,
    "/overfill.v1.Decode/Describe": _FROM_PEERS,
    "/overfill.v1.Decode/Generate": _FROM_ROUTERS,
    "/overfill.v1.Admin/Status": _FROM_ROUTERS,
    "/overfill.v1.Admin/Drain": _FROM_ROUTERS,
}
"""Of a worker, which takes no API keys: its callers are processes of its stack."""

RPCS: Mapping[str, Rule] = {**WORKER_RPCS, **ROUTER_RPCS}

ROUTES: Mapping[str, Rule] = {
    "/v1/models": _INFER,
    "/v1/models/{model:path}": _INFER,
    "/v1/chat/completions": _INFER,
    "/v1/completions": _INFER,
    "/tokenize": _INFER,
    "/detokenize": _INFER,
    "/health": _OPEN,
    "/metrics": _METRICS,
    "/version": _STATUS,
    "/status": _STATUS,
    "/ui": _INFER,
    "/": _OPEN,  # leads to /ui
}
"""Of the OpenAI endpoint."""

METRICS_ROUTES: Mapping[str, Rule] = {"/metrics": _METRICS, "/targets": _METRICS}
"""Of the port of metrics, which every process has."""

_UNKNOWN = Rule(None, frozenset())
"""What is in no table: only who has the stack's secret, or comes where all is open, learns that it is not there."""


@dataclass(frozen=True, slots=True)
class AccessPolicy:
    """Holds callers against a table. The default lets everybody call what is in it: for loopback, and tests.

    Args:
        rpcs: full method name -> rule.
        keys: who holds an API key; None: no keys are taken.
        secret: of the stack; empty: there is none.
    """

    rpcs: Mapping[str, Rule] = field(default_factory=lambda: RPCS)
    keys: FindKey | None = field(default=None, repr=False)
    secret: str = field(default="", repr=False)

    def rpc(self, method: str) -> Rule | None:
        """The rule of ``/package.Service/Method``; None when it is in no table, and so refused."""
        return self.rpcs.get(method)

    def check(self, rule: Rule, shown: str | None, roles: frozenset[Role] | None) -> KeyHolder | None:
        """The holder of the key that let the caller in; None when something else did.

        Args:
            shown: key or secret.
            roles: of the caller's certificate; None where the listener asks for none.

        Raises:
            Unauthenticated: nothing that is known here was shown.
            PermissionDenied: what was shown is known, and not good for this.
        """
        if rule.open or (self.keys is None and not self.secret and roles is None):
            return None
        if self.secret and shown is not None and hmac.compare_digest(shown.encode(), self.secret.encode()):
            return None
        if roles is not None:
            if not roles & rule.roles:
                has = ", ".join(sorted(roles)) or "no role (`overfill certs` makes certificates that have one)"
                wanted = " or ".join(sorted(rule.roles)) or "nobody"
                raise PermissionDenied(f"this is for {wanted}; the certificate's bearer is {has}")
            if roles & rule.roles - {Role.CLIENT} or self.keys is None:
                return None
        if rule.scope is None or self.keys is None:
            raise Unauthenticated("only processes of the stack may call this: they show a certificate or its secret")
        if shown is None:
            raise Unauthenticated("an API key is wanted: 'authorization: Bearer KEY'")
        key = self.keys(shown)
        if key is None:
            raise Unauthenticated("nobody holds this API key")
        if rule.scope not in key.scopes:
            raise PermissionDenied(f"the key of {key.name} has no scope {rule.scope!s}; make one that has")
        return key


def route_rule(rules: Mapping[str, Rule], path: str) -> Rule | None:
    """The rule of a request's path, templates such as ``/v1/models/{model:path}`` included; None: there is none."""
    if path in rules:
        return None if "{" in path else rules[path]
    for template, rule in rules.items():
        start, placeholder, _ = template.partition("{")
        if placeholder and path.startswith(start) and len(path) > len(start):
            return rule
    return None


def unknown(access: AccessPolicy, shown: str | None, roles: frozenset[Role] | None) -> None:
    """Raises as ``AccessPolicy.check`` unless the caller may learn what is not here, with any key or certificate."""
    if roles or (access.keys is not None and shown is not None and access.keys(shown) is not None):
        return
    access.check(_UNKNOWN, shown, None)


def bearer(header: str, *, page: bool = False) -> str | None:
    """What an ``Authorization`` header shows; None when there is nothing.

    For a ``page`` the password of ``Basic`` is as good: browsers have no other way to show a key. Elsewhere it is not,
    since they show it by themselves, whoever had them ask.
    """
    scheme, _, rest = header.partition(" ")
    rest = rest.strip()
    if scheme.lower() == "bearer":
        return rest or None
    if page and scheme.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, ValueError):
            return None
    return None


def roles_of(names: Iterable[str]) -> frozenset[Role]:
    """The roles in a certificate's subject alternative names; names of unknown roles are ignored."""
    words = [
        name.removeprefix(_URI) if name.startswith(_URI) else name.removesuffix(_DNS)
        for name in names
        if name.startswith(_URI) or name.endswith(_DNS)
    ]
    return frozenset(Role(word) for word in words if word in Role.__members__.values())


def role_uri(role: Role) -> str:
    """The subject alternative name, a URI, that gives ``role``."""
    return f"{_URI}{role}"
