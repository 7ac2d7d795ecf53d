"""Access control: a table with the rule of every RPC and route, and the policy that applies it. Opens no sockets.

The policy refuses every RPC and route that the table does not list, so a new one is closed until it gets a rule. A
caller sends one or more of these credentials:

* a certificate, if the listener requires one. Its subject alternative names carry the caller's roles:
  ``URI:overfill://role/worker``, or ``DNS:worker.role.overfill.internal`` for issuers that make DNS names only;
* an API key (``authorization: Bearer KEY``; over HTTP also ``x-api-key: KEY``), which has scopes;
* the stack's secret, in the same header. Processes of one stack use it where they have no certificates.

If none of the three is configured, everything in the table is open. Servers allow that on loopback only.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from overfill.errors import PermissionDenied, Unauthenticated

MIN_SECRET = 16
"""Minimum length of the stack's secret, in characters."""

NAME = "overfill"
"""Given as the name of a server's certificate, it stands for the DNS name of the role that the server should have."""

_URI = "overfill://role/"
_DNS = ".role.overfill.internal"


class Scope(StrEnum):
    """Permission of an API key."""

    INFER = "infer"  # answers, list of models, tokenizer
    STATUS = "status"  # workers and their load
    METRICS = "metrics"
    ADMIN = "admin"  # drains, adapters, rollouts, reflection


class Role(StrEnum):
    """Role of a certificate's owner."""

    ROUTER = "router"
    WORKER = "worker"
    CLIENT = "client"  # sends requests
    OPERATOR = "operator"  # reads status, drains, and sends requests
    SCRAPER = "scraper"  # reads metrics


class KeyHolder(Protocol):
    """Owner of an API key, with its scopes."""

    @property
    def name(self) -> str: ...

    @property
    def scopes(self) -> frozenset[Scope]: ...


FindKey = Callable[[str], KeyHolder | None]
"""Returns the owner of a key; None for an unknown key."""

caller: ContextVar[KeyHolder | None] = ContextVar("caller", default=None)
"""Owner of the API key that admitted the current RPC; None when the RPC needed no key."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Credentials that an RPC or route requires.

    Attributes:
        scope: scope that an API key needs; None means that no API key admits a caller.
        roles: roles of which a certificate needs at least one, if the listener requires certificates.
        open: admits every caller, without credentials.
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
    "/overfill.v1.Admin/LoadAdapter": _ADMIN,
    "/overfill.v1.Admin/UnloadAdapter": _ADMIN,
    "/overfill.v1.Admin/ChangeRollout": _ADMIN,
}
"""Rules of a router's RPCs."""

WORKER_RPCS: Mapping[str, Rule] = {
    **_HEALTH,
    _REFLECTION: _FROM_PEERS,
    "/overfill.v1.Prefill/Describe": _FROM_WORKERS,
    "/overfill.v1.Prefill/Prefill": _FROM_WORKERS,
    "/overfill.v1.Prefill/PrefillAtOnce": _FROM_WORKERS,
    "/overfill.v1.Prefill/PullKv": _FROM_WORKERS,
    "/overfill.v1.Prefill/Lend": _FROM_WORKERS,
    "/overfill.v1.Decode/Describe": _FROM_PEERS,
    "/overfill.v1.Decode/Serve": _FROM_ROUTERS,
    "/overfill.v1.Admin/Status": _FROM_ROUTERS,
    "/overfill.v1.Admin/Drain": _FROM_ROUTERS,
    "/overfill.v1.Admin/LoadAdapter": _FROM_ROUTERS,
    "/overfill.v1.Admin/UnloadAdapter": _FROM_ROUTERS,
    "/overfill.v1.Admin/ChangeRollout": _FROM_ROUTERS,  # a worker answers UNIMPLEMENTED
}
"""Rules of a worker's RPCs. Workers accept no API keys, because only processes of the stack call them."""

RPCS: Mapping[str, Rule] = {**WORKER_RPCS, **ROUTER_RPCS}

ROUTES: Mapping[str, Rule] = {
    "/v1/models": _INFER,
    "/v1/models/{model:path}": _INFER,
    "/v1/chat/completions": _INFER,
    "/v1/completions": _INFER,
    "/v1/responses": _INFER,
    "/v1/messages": _INFER,
    "/v1/messages/count_tokens": _INFER,
    "/v1/load_lora_adapter": _ADMIN,
    "/v1/unload_lora_adapter": _ADMIN,
    "/tokenize": _INFER,
    "/detokenize": _INFER,
    "/health": _OPEN,
    "/metrics": _METRICS,
    "/version": _STATUS,
    "/status": _STATUS,
    "/ui": _OPEN,  # a page without data: it asks for the key, and sends it to the other routes
    "/": _OPEN,  # redirects to /ui
    "/api/hello": _OPEN,  # says nothing: Claude Code asks for its head, to know whether there is a server
}
"""Rules of the HTTP endpoint's routes."""

METRICS_ROUTES: Mapping[str, Rule] = {"/metrics": _METRICS, "/targets": _METRICS}
"""Rules of the metrics port, which every process has."""

_UNKNOWN = Rule(None, frozenset())
"""Rule for unlisted RPCs and routes; see ``unknown``."""


@dataclass(frozen=True, slots=True)
class AccessPolicy:
    """Checks callers against a table of rules. The default admits every caller to every listed RPC.

    Args:
        rpcs: full method name -> rule.
        keys: finds the owner of an API key; None means that API keys are not accepted.
        secret: the stack's secret; empty means that there is none.
    """

    rpcs: Mapping[str, Rule] = field(default_factory=lambda: RPCS)
    keys: FindKey | None = field(default=None, repr=False)
    secret: str = field(default="", repr=False)

    def rpc(self, method: str) -> Rule | None:
        """Returns the rule of ``/package.Service/Method``; None when no rule exists and the caller must be refused."""
        return self.rpcs.get(method)

    def check(self, rule: Rule, shown: str | None, roles: frozenset[Role] | None) -> KeyHolder | None:
        """Admits the caller and returns the owner of its API key; None when no key was needed.

        Where API keys are configured, a request for an answer needs one beside any certificate, because quota,
        priority, tier and cache namespace are the key's. The stack's secret replaces the key, because only processes of
        this machine have it.

        Args:
            shown: API key or secret that the caller sent.
            roles: roles in the caller's certificate; None if the listener does not require certificates.

        Raises:
            Unauthenticated: the caller sent no valid credential.
            PermissionDenied: the credential is valid, but lacks the required scope or role.
        """
        if rule.open or (self.keys is None and not self.secret and roles is None):
            return None
        if self.secret and shown is not None and hmac.compare_digest(shown.encode(), self.secret.encode()):
            return None
        if roles is not None:
            if not roles & rule.roles:
                has = ", ".join(sorted(roles)) or "no role (`overfill certs` makes certificates with roles)"
                needed = " or ".join(sorted(rule.roles))
                raise PermissionDenied(f"this call needs the role {needed}; the caller's certificate has {has}")
            if self.keys is None or (rule.scope is not Scope.INFER and roles & rule.roles - {Role.CLIENT}):
                return None
        if rule.scope is None or self.keys is None:
            raise Unauthenticated(
                "only processes of the stack may call this: send a certificate of the stack, or its secret"
            )
        if shown is None:
            raise Unauthenticated(
                "an API key is required: send 'authorization: Bearer KEY', or over HTTP 'x-api-key: KEY'"
            )
        key = self.keys(shown)
        if key is None:
            raise Unauthenticated("unknown API key: use one that `overfill keys create` has made")
        if rule.scope not in key.scopes:
            raise PermissionDenied(f"the key of {key.name} lacks the scope {rule.scope!s}: use a key that has it")
        return key


def unknown(access: AccessPolicy, shown: str | None, roles: frozenset[Role] | None) -> None:
    """Checks whether a caller may learn that an RPC or route does not exist.

    A valid API key, a certificate with a role, the stack's secret, or a policy without credentials admits the caller.
    The server then answers "not found".

    Raises:
        OverfillError: as ``AccessPolicy.check``, for all other callers.
    """
    if roles or (access.keys is not None and shown is not None and access.keys(shown) is not None):
        return
    access.check(_UNKNOWN, shown, None)


def bearer(header: str) -> str | None:
    """Returns the key or secret in an ``Authorization`` header; None when the header has neither.

    ``Basic`` does not count: a browser sends it automatically, even for requests started by another site (CSRF).
    """
    scheme, _, rest = header.partition(" ")
    return rest.strip() or None if scheme.lower() == "bearer" else None


def roles_of(names: Iterable[str]) -> frozenset[Role]:
    """Returns the roles in a certificate's subject alternative names; unknown roles are ignored."""
    words = [
        name.removeprefix(_URI) if name.startswith(_URI) else name.removesuffix(_DNS)
        for name in names
        if name.startswith(_URI) or name.endswith(_DNS)
    ]
    return frozenset(Role(word) for word in words if word in Role.__members__.values())


def role_uri(role: Role) -> str:
    """Returns the subject alternative name, a URI, that gives a certificate ``role``."""
    return f"{_URI}{role}"


def role_dns(role: Role | None) -> str:
    """Returns the DNS name that clients check for a server of ``role``; None means any process of a stack."""
    return f"{role or 'process'}{_DNS}"
