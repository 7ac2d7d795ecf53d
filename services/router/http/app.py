"""The HTTP endpoint: the routes of OpenAI's API and some of our own, with access control, errors and metrics."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from overfill.api.keys import ApiKey
from overfill.api.openai import schema, wire
from overfill.api.openai.answers import Envelope, Kind, encode
from overfill.api.openai.errors import ApiError, foreign, from_error, unknown_url, wrong_method
from overfill.api.openai.wire import ApiRequest
from overfill.client import StackStatus
from overfill.client.status_json import stack_json
from overfill.errors import Overloaded
from overfill.request.params import REQUEST_ID_CHARACTERS
from overfill.rpc.access import ROUTES, AccessPolicy, bearer, route_rule, unknown
from overfill.rpc.addresses import is_loopback
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.status import as_overfill_error
from overfill.telemetry import tracing
from overfill.telemetry.metrics import CONTENT_TYPE
from overfill.v1 import admin_pb2
from overfill.version import __version__
from services.router.http import page
from services.router.http.body import R, read
from services.router.http.connection import ClientGone, Connection
from services.router.http.generate import EventStream, RunningChoices
from services.router.request_handler import RequestHandler

_REQUEST_ID = re.compile(f"{REQUEST_ID_CHARACTERS}{{1,100}}")
_PORT = re.compile(r":\d+$")
_CLIENT_GONE = 499  # the client has disconnected; the status is only for the metrics


class HttpApi:
    """The ASGI application of the endpoint, in ``asgi``.

    Args:
        access: the router's access control.
        max_body: maximum size of a request's body in bytes.
        unready: returns why the router cannot answer requests now; empty if it can.
        status: returns the status of the router and its workers, as the router knows it.
        share_port: True if other router processes serve the same port.
        local: True if the endpoint listens on loopback only.
        allowed_origins: origins of other sites whose pages may send requests, in lower case; ``*`` allows all.
    """

    def __init__(
        self,
        handler: RequestHandler,
        access: AccessPolicy,
        max_body: int,
        unready: Callable[[], str],
        status: Callable[[], Awaitable[admin_pb2.StatusResponse]],
        *,
        share_port: bool,
        local: bool = True,
        allowed_origins: Sequence[str] = (),
    ) -> None:
        self._handler = handler
        self._max_body = max_body
        self._unready = unready
        self._status = status
        self._share_port = share_port
        self._started = int(time.time())
        generating = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]
        routes = [
            *generating,
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{model:path}", self._model, methods=["GET"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/version", self._version, methods=["GET"]),
            Route("/status", self._stack_status, methods=["GET"]),
            Route("/ui", page.show, methods=["GET"]),
            Route("/", page.redirect_to_page, methods=["GET"]),
        ]
        self.routes = tuple(route.path for route in routes)
        routed = GeneratingRoutes(generating, Router(routes, redirect_slashes=False))
        self.asgi: ASGIApp = AccessMiddleware(routed, access, handler, local, frozenset(allowed_origins))
        if allowed_origins:
            # CORS wraps access control, so that a page can read refusals and a preflight needs no key. Without
            # allow_credentials, browsers send client certificates and the like for our own page only.
            self.asgi = CORSMiddleware(
                self.asgi,
                allow_origins=allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                allow_private_network=True,
                expose_headers=["x-request-id", "x-trace-id", "retry-after"],
            )

    async def _models(self, request: Request) -> Response:
        caller = request.scope.get("api_key")
        names = self._handler.tiers.listed(caller)
        return _json({"object": "list", "data": [self._model_json(name, caller) for name in names]})

    async def _model(self, request: Request) -> Response:
        return _json(self._model_json(request.path_params["model"], request.scope.get("api_key")))

    async def _chat(self, request: Request) -> ASGIApp:
        body = await self._read_generation(request, schema.ChatRequest)
        received = asyncio.get_running_loop().time()  # the upload is not the router's time
        id = _request_id(request, body, "chatcmpl")
        return await self._generate(request, "chat", id, wire.chat(body, id), received)

    async def _completions(self, request: Request) -> ASGIApp:
        body = await self._read_generation(request, schema.CompletionRequest)
        received = asyncio.get_running_loop().time()
        id = _request_id(request, body, "cmpl")
        return await self._generate(request, "completion", id, wire.completion(body, id), received)

    async def _generate(self, request: Request, kind: Kind, id: str, asked: ApiRequest, received: float) -> ASGIApp:
        handler = self._handler

        def envelope(tier: str) -> Envelope:
            tiers = handler.tiers
            model = f"{tiers.model}:{tier}" if tiers.several else tiers.model
            return Envelope(kind, id, model, self._pair_json(tier), tiers.fingerprint(tier), handler.tokenizer)

        key: ApiKey | None = request.scope.get("api_key")
        span = tracing.serve("router.request", decoded(request.scope["headers"]), route=request.scope["path"])
        answers = RunningChoices(handler, asked, envelope, key, span)
        await answers.start(received)
        if asked.stream:
            return EventStream(answers, id)
        connection: Connection = request.scope["overfill.connection"]
        try:
            with connection:
                whole = await answers.whole()
        finally:
            answers.close()
        return _json(whole, headers={"x-request-id": id})

    async def _tokenize(self, request: Request) -> Response:
        body = await self._read(request, schema.TokenizeRequest)
        ids = await self._handler.tokenize(wire.tokenize(body), request.scope.get("api_key"))
        return _json({"tokens": ids, "count": len(ids), "max_model_len": self._handler.tiers.max_model_len()})

    async def _detokenize(self, request: Request) -> Response:
        body = await self._read(request, schema.DetokenizeRequest)
        text = await self._handler.detokenize(wire.detokenize(body), request.scope.get("api_key"))
        return _json({"prompt": text})

    async def _read(self, request: Request, kind: type[R]) -> R:
        return await read(request, kind, self._max_body, self._handler.executor)

    async def _read_generation(self, request: Request, kind: type[R]) -> R:
        """Reads a request for an answer, and counts it if it is refused because too many are read."""
        try:
            return await self._read(request, kind)
        except Overloaded as error:
            self._handler.metrics.refused(error)
            raise

    async def _health(self, request: Request) -> Response:
        if reason := self._unready():
            return _json({"status": "unavailable", "reason": reason}, status=503)
        return _json({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        if self._share_port:
            raise ApiError(
                404,
                "several router processes share this port, and each serves /metrics on a port of its own; "
                "`overfill status` lists them",
            )
        return Response(self._handler.metrics.render(), media_type=CONTENT_TYPE)

    async def _version(self, request: Request) -> Response:
        return _json({"version": __version__, "wire_version": WIRE_VERSION})

    async def _stack_status(self, request: Request) -> Response:
        status = StackStatus.from_proto(await self._status())
        return _json({"model": self._handler.tiers.model, **stack_json(status)}, headers={"cache-control": "no-store"})

    def _model_json(self, name: str, caller: ApiKey | None) -> dict[str, Any]:
        model = self._handler.tiers.describe(name, caller)
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "overfill",
            "max_model_len": model.max_model_len,
            "overfill": {"tier": model.tier, "pair": self._pair_json(model.tier), "dtype": model.dtype or None},
        }

    def _pair_json(self, tier: str) -> dict[str, Any]:
        pair = self._handler.tiers.pair(tier)
        return {"name": pair.name, "full_digest": pair.full_digest, "decoder_digest": pair.decoder_digest}


class GeneratingRoutes:
    """Calls the endpoints of ``routes`` directly; ``others`` serves all other requests.

    Starlette's search for a route and its layers of error handling cost as much as parsing and checking a request.
    """

    def __init__(self, routes: Sequence[Route], others: ASGIApp) -> None:
        self._routes = {(method, route.path): route for route in routes for method in route.methods or ()}
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope["method"], scope["path"]))
        if route is None:
            await self._others(scope, receive, send)
            return
        scope["route"] = route
        response = await route.endpoint(Request(scope, receive))
        await response(scope, receive, send)


class AccessMiddleware:
    """Checks the caller of every request before its route, answers errors, and counts the request.

    A browser sends any request that a page asks for. So the middleware refuses requests from pages of other sites,
    unless their origin is in ``origins``. On loopback without keys, it also refuses requests whose Host is not a
    loopback name: a page's own host name may have been pointed here (DNS rebinding).
    """

    def __init__(
        self, app: ASGIApp, access: AccessPolicy, handler: RequestHandler, local: bool, origins: frozenset[str]
    ) -> None:
        self._app = app
        self._access = access
        self._origins = origins
        self._local_names_only = local and access.keys is None
        self._metrics = handler.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status: int | None = None

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope["app"] = self  # makes Starlette's router raise HTTPException where it would answer in plain text
        try:
            self._admit(scope)
            await self._app(scope, receive, noting)
        except Exception as error:
            response = _refusal(error, scope)
            if status is None:
                await response(scope, receive, noting)
        finally:
            route = scope.get("route")
            self._metrics.http(route.path if isinstance(route, Route) else "unknown", status or _CLIENT_GONE)
            del scope["overfill.connection"]  # refers to the scope, which would wait for the garbage collector

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        origin = headers.get(b"origin", b"").decode("latin-1")
        if b"origin" in headers and not self._allows(origin.lower(), host):
            raise foreign("origin", origin, "pages of other sites may not send requests; allow with --allowed-origins")
        if self._local_names_only and host and not is_loopback(_PORT.sub("", host)):
            raise foreign("host", host, "use 127.0.0.1 or localhost; other names need a router with API keys")
        shown = bearer(headers.get(b"authorization", b"").decode("latin-1"))
        roles = scope.get("overfill.roles")
        rule = route_rule(ROUTES, scope["path"])
        if rule is None:
            unknown(self._access, shown, roles)
            raise unknown_url(scope["method"], scope["path"])
        scope["api_key"] = self._access.check(rule, shown, roles)

    def _allows(self, origin: str, host: str) -> bool:
        return origin.partition("://")[2] == host or origin in self._origins or "*" in self._origins


def decoded(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Yields ASGI headers with their names decoded."""
    return ((name.decode("latin-1"), value) for name, value in headers)


def _request_id(request: Request, body: schema.Sampling, prefix: str) -> str:
    """Returns the id from the header if it is valid, as vLLM does; else from the body; else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else body.request_id or f"{prefix}-{secrets.token_hex(16)}"


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(content), status, headers, media_type="application/json")


def _refusal(error: Exception, scope: Scope) -> Response:
    """Returns the response for an error of a request, and logs the error if it is unexpected."""
    match error:
        case ClientGone() | ClientDisconnect():
            return Response(status_code=_CLIENT_GONE)
        case ApiError():
            return _error(error)
        case HTTPException(status_code=405):
            return _error(wrong_method(scope["method"], scope["path"]))
        case HTTPException():
            return _error(unknown_url(scope["method"], scope["path"]))
        case _:
            return _error(from_error(as_overfill_error(error)))


def _error(error: ApiError) -> Response:
    headers = dict(error.headers)
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    if trace_id := tracing.current().trace_id:
        headers["x-trace-id"] = trace_id
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return _json(error.body, error.status, headers)
