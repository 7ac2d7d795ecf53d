"""The HTTP endpoint: routes of the three APIs and some of our own, with access control, errors and metrics."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from overfill.api.keys import ApiKey
from overfill.api.messages import translate as messages
from overfill.api.messages.errors import error_body, is_anthropic
from overfill.api.messages.schema import CountTokensRequest, MessagesRequest
from overfill.api.model_list import describe_model, list_models
from overfill.api.openai import schema, translate
from overfill.api.openai.answers import Envelope, Kind, TokenTexts, encode
from overfill.api.openai.errors import ApiError, adapter_error, foreign, from_error, unknown_url, wrong_method
from overfill.api.openai.translate import ApiRequest
from overfill.api.responses.schema import ResponsesRequest
from overfill.api.responses.translate import responses
from overfill.api.sessions import session_of
from overfill.api.translation import Served, Translation, own_fields
from overfill.errors import OverfillError
from overfill.request.params import REQUEST_ID_CHARACTERS
from overfill.routing.tier import TierChoice
from overfill.rpc.access import ROUTES, AccessPolicy, Rule, bearer, unknown
from overfill.rpc.addresses import is_loopback
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.stack_status import StackStatus
from overfill.rpc.stack_status_json import stack_json
from overfill.rpc.status import as_overfill_error
from overfill.telemetry import tracing
from overfill.telemetry.metric_set import CONTENT_TYPE
from overfill.telemetry.tracing import Span
from overfill.v1 import admin_pb2
from overfill.version import __version__
from services.router.adapter_changes import AdapterChanges
from services.router.bounded_executor import BoundedExecutor
from services.router.http import page
from services.router.http.body import read
from services.router.http.cors import Cors
from services.router.http.generate import RunningChoices
from services.router.http.one_answer import OneAnswer
from services.router.http.request import Headers, Request
from services.router.quota_hold import QuotaHold
from services.router.request_handler import RequestHandler
from services.router.revisions import Revisions
from services.router.served_tiers import ServedTiers

B = TypeVar("B", bound=schema.Strict)
S = TypeVar("S", bound=schema.Sampling)
T = TypeVar("T")

_REQUEST_ID = re.compile(f"{REQUEST_ID_CHARACTERS}{{1,100}}")
_PORT = re.compile(r":\d+$")
_CLIENT_GONE = 499  # the client has disconnected; the status is only for the metrics
_JSON = (b"content-type", b"application/json")
_MAX_MODEL_LISTS = 8  # that are kept encoded; 1,024 adapters make one of 0.9 MB
_APIS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
"""Values of the label ``api`` of metrics, by path."""


@dataclass(frozen=True, slots=True)
class Route:
    """A path, or a template that ends in a placeholder, with its method, the function that answers it, and its rule."""

    path: str
    method: str
    answer: Callable[[Request, ApiKey | None], Awaitable[None]]
    rule: Rule


class HttpApi:
    """The application of the endpoint: call it with a request.

    It checks the caller before the route, answers errors, and counts the request. A browser sends any request that a
    page asks for. So the endpoint refuses requests from pages of other sites, unless their origin is allowed. On
    loopback without keys, it also refuses requests whose Host is not a loopback name: a page's own host name may have
    been pointed here (DNS rebinding).

    Args:
        access: the router's access control.
        unready: returns why the router cannot answer requests now; empty if it can.
        status: returns the status of the router and its workers, as the router knows it.
        adapters: changes the decode workers' adapters.
        share_port: True if other router processes serve the same port.
        local: True if the endpoint listens on loopback only.
        allowed_origins: origins of other sites whose pages may send requests, in lower case; ``*`` allows all.
    """

    def __init__(
        self,
        revisions: Revisions,
        access: AccessPolicy,
        unready: Callable[[], str],
        status: Callable[[], Awaitable[admin_pb2.StatusResponse]],
        adapters: AdapterChanges,
        *,
        share_port: bool,
        local: bool = True,
        allowed_origins: Sequence[str] = (),
    ) -> None:
        self._revisions = revisions
        self._access = access
        self._local_names_only = local and access.keys is None
        self._metrics = revisions.main.statistics.metrics
        self._unready = unready
        self._status = status
        self._adapters = adapters
        self._share_port = share_port
        self._cors = Cors(allowed_origins)
        self._parser = BoundedExecutor(threads=1)
        self._tokens = {core.revision: TokenTexts(core.handler.tokenizer) for core in revisions.cores}
        self._encoding = asyncio.Lock()
        self._started = int(time.time())
        self._lists_of: tuple[RequestHandler, int] | None = None  # and the changes of its roster
        self._model_lists: dict[frozenset[str] | None, bytes] = {}  # encoded, by the tiers that an API key may use
        answers = (
            ("/v1/chat/completions", "POST", self._chat),
            ("/v1/completions", "POST", self._completions),
            ("/v1/responses", "POST", self._responses),
            ("/v1/messages", "POST", self._messages),
            ("/v1/messages/count_tokens", "POST", self._count_tokens),
            ("/v1/models", "GET", self._models),
            ("/v1/models/{model:path}", "GET", self._model),
            ("/v1/load_lora_adapter", "POST", self._load_adapter),
            ("/v1/unload_lora_adapter", "POST", self._unload_adapter),
            ("/tokenize", "POST", self._tokenize),
            ("/detokenize", "POST", self._detokenize),
            ("/health", "GET", self._health),
            ("/metrics", "GET", self._render_metrics),
            ("/version", "GET", self._version),
            ("/status", "GET", self._stack_status),
            ("/ui", "GET", self._page),
            ("/api/hello", "GET", self._hello),
            ("/", "GET", self._redirect),
        )
        # A path without a rule is closed, as if there were nothing.
        routes = [Route(*answer, ROUTES[answer[0]]) for answer in answers if answer[0] in ROUTES]
        self.routes = tuple(route.path for route in routes)
        self._by_path = {route.path: route for route in routes if "{" not in route.path}
        self._by_start = {route.path.partition("{")[0]: route for route in routes if "{" in route.path}

    async def __call__(self, request: Request) -> None:
        """Answers ``request``."""
        route: Route | None = None
        try:
            if self._cors.preflight(request):
                return
            route = self._route(request.path)
            caller = self._admit(request, route)
            if route is None:
                raise unknown_url(request.method, request.path)
            if request.method != route.method and (request.method, route.method) != ("HEAD", "GET"):
                raise wrong_method(request.method, request.path)
            await route.answer(request, caller)
        except Exception as error:
            self._refuse(request, error if isinstance(error, ApiError) else from_error(as_overfill_error(error)))
        finally:
            self._metrics.http("unknown" if route is None else route.path, request.status or _CLIENT_GONE)

    def _route(self, path: str) -> Route | None:
        if (route := self._by_path.get(path)) is not None:
            return route
        templates = self._by_start.items()
        return next((route for start, route in templates if path.startswith(start) and len(path) > len(start)), None)

    def _admit(self, request: Request, route: Route | None) -> ApiKey | None:
        host = request.header(b"host").lower()
        if b"origin" in request.headers:
            origin = request.header(b"origin")
            if origin.lower().partition("://")[2] != host and not self._cors.allows(origin):
                reason = "pages of other sites may not send requests; allow with --allowed-origins"
                raise foreign("origin", origin, reason)
        if self._local_names_only and host and not is_loopback(_PORT.sub("", host)):
            raise foreign("host", host, "use 127.0.0.1 or localhost; other names need a router with API keys")
        shown = bearer(request.header(b"authorization")) or request.header(b"x-api-key") or None
        if route is None:
            unknown(self._access, shown, request.roles)
            return None
        caller = cast("ApiKey | None", self._access.check(route.rule, shown, request.roles))  # it has no other keys
        if caller is not None:
            request.key = caller.id
        return caller

    def _refuse(self, request: Request, error: ApiError) -> None:
        if request.status is not None:
            return  # the response has begun; the connection ends it
        headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
        if trace_id := tracing.current().trace_id:
            headers.append((b"x-trace-id", trace_id.encode()))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        body = error.body
        if is_anthropic(request.path, request.headers):
            id = request.answer_id or _request_id(request, None, "req_")
            body = error_body(error, id)
            headers.append((b"request-id", id.encode()))
        self._json(request, body, headers, error.status)

    def _json(self, request: Request, content: dict[str, Any], headers: Headers = (), status: int = 200) -> None:
        request.respond(status, encode(content), [_JSON, *headers, *self._cors.headers(request)])

    async def _models(self, request: Request, caller: ApiKey | None) -> None:
        handler, lists, usable = self._revisions.main, self._model_lists, None if caller is None else caller.tiers
        tiers = handler.tiers
        if self._lists_of != (now := (handler, tiers.roster.changes)):
            self._lists_of = now
            lists.clear()
        if usable not in lists:
            if len(lists) >= _MAX_MODEL_LISTS:
                del lists[next(iter(lists))]
            lists[usable] = encode(
                list_models([self._model_json(tiers, name, caller) for name in tiers.listed(caller)])
            )
        request.respond(200, lists[usable], [_JSON, *self._cors.headers(request)])

    async def _model(self, request: Request, caller: ApiKey | None) -> None:
        name = request.path.removeprefix("/v1/models/")
        self._json(request, self._model_json(self._revisions.main.tiers, name, caller))

    async def _load_adapter(self, request: Request, caller: ApiKey | None) -> None:
        body = await read(request, schema.LoadAdapterRequest, lambda body: body, self._parser)
        await self._change_adapter(request, body.lora_name, load=True)

    async def _unload_adapter(self, request: Request, caller: ApiKey | None) -> None:
        body = await read(request, schema.UnloadAdapterRequest, lambda body: body, self._parser)
        await self._change_adapter(request, body.lora_name, load=False)

    async def _change_adapter(self, request: Request, name: str, *, load: bool) -> None:
        try:
            changes = await self._adapters.change(name, load=load)
        except OverfillError as error:
            raise adapter_error(error) from error
        done = [change.worker_id for change in changes if change.error is None]
        if failed := [change for change in changes if change.error is not None]:
            reasons = "; ".join(f"{change.worker_id}: {change.error}" for change in failed)
            raise adapter_error(
                cast("OverfillError", failed[0].error), f"done on {', '.join(done)}, and not on {reasons}"
            )
        self._json(request, {"adapter": name, "loaded": load, "workers": done})

    async def _chat(self, request: Request, caller: ApiKey | None) -> None:
        await self._generate(request, caller, "chat", schema.ChatRequest, translate.chat, "chatcmpl-")

    async def _completions(self, request: Request, caller: ApiKey | None) -> None:
        await self._generate(request, caller, "completion", schema.CompletionRequest, translate.completion, "cmpl-")

    async def _responses(self, request: Request, caller: ApiKey | None) -> None:
        await self._answer_once(request, caller, ResponsesRequest, responses, "resp_")

    async def _generate(
        self,
        request: Request,
        caller: ApiKey | None,
        kind: Kind,
        shape: type[S],
        convert: Callable[[S, str], ApiRequest],
        prefix: str,
    ) -> None:
        def convert_with_id(body: S) -> tuple[ApiRequest, str]:
            id = _request_id(request, body.request_id, prefix)
            asked, session = convert(body, id), session_of(request.header, body.named_session)
            for prompt in asked.prompts:
                prompt.session = session
            return asked, id

        handler = self._revisions.main
        with handler.requests.hold_quota(caller, _APIS[request.path]) as hold:
            # What is not valid, or has not arrived when the client disconnects, counts only as an HTTP request.
            with handler.statistics.refusing(hold, ApiError, asyncio.CancelledError):
                asked, id = await self._read(request, shape, convert_with_id, hold)
            received = asyncio.get_running_loop().time()  # the upload is not the router's time

            with handler.statistics.refusing(hold, ApiError), own_fields(asked.own_field):
                handler = self._revisions.choose(asked.prompts[0], caller)  # one revision for the whole response

                def envelope(choice: TierChoice) -> Envelope:
                    name, fingerprint = handler.tiers.model_name(choice), handler.tiers.fingerprint(choice)
                    tokens = self._tokens[handler.tiers.revision]
                    return Envelope(kind, id, name, _pair_json(handler.tiers, choice.tier), fingerprint, tokens)

                answers = RunningChoices(handler, asked, envelope, self._span(request), self._encoding)
                await answers.start(received, hold)
        headers = [(b"x-request-id", id.encode()), *self._cors.headers(request)]
        with own_fields(asked.own_field), answers:
            if asked.stream:
                await answers.stream(request, headers)
                return
            headers.append(_JSON)
            rest = await answers.whole(request, headers)
        if request.status is None:
            request.respond(200, rest, headers)
        else:
            request.write(rest, last=True)

    async def _messages(self, request: Request, caller: ApiKey | None) -> None:
        await self._answer_once(request, caller, MessagesRequest, messages.messages, "msg_")

    async def _count_tokens(self, request: Request, caller: ApiKey | None) -> None:
        handler = self._revisions.main
        with handler.requests.hold_quota(caller) as hold:
            asked, own_field = await self._read(request, CountTokensRequest, messages.count_tokens, hold)
            with own_fields(own_field):
                ids = await handler.tokenize(asked, hold)
        id = _request_id(request, None, "req_")
        self._json(request, {"input_tokens": len(ids)}, [(b"request-id", id.encode())])

    async def _answer_once(
        self,
        request: Request,
        caller: ApiKey | None,
        shape: type[B],
        convert: Callable[[B, str], Translation],
        prefix: str,
    ) -> None:
        """Answers a request of an API whose responses have one answer.

        Args:
            convert: translates the body; it gets the router's id of the request too.
        """
        handler, id = self._revisions.main, _request_id(request, None, prefix)
        request.answer_id = id

        def convert_with_session(body: B) -> Translation:
            asked = convert(body, id)
            asked.generate.session = session_of(request.header, body.named_session)
            return asked

        with handler.requests.hold_quota(caller, _APIS[request.path]) as hold:
            with handler.statistics.refusing(hold, ApiError, asyncio.CancelledError):
                asked = await self._read(request, shape, convert_with_session, hold)
            received = asyncio.get_running_loop().time()  # the upload is not the router's time
            span = self._span(request)
            try:
                with handler.statistics.refusing(hold, ApiError), own_fields(asked.own_field):
                    handler = self._revisions.choose(asked.generate, caller)
                    answer = handler.start(await handler.check(asked.generate, hold, received), hold)
            except BaseException as error:
                span.end(error)
                raise
        served = Served(id, handler.tiers.model_name(answer.choice), _pair_json(handler.tiers, answer.choice.tier))
        headers = [(b"x-request-id", id.encode()), *self._cors.headers(request)]
        if is_anthropic(request.path, request.headers):
            headers.append((b"request-id", id.encode()))
        if asked.left_out:
            headers.append((b"x-overfill-left-out", _listed(asked.left_out)))
        running = OneAnswer(answer, asked.writer(served), asked.own_field, request, headers, span)
        with own_fields(asked.own_field), answer, running:
            if asked.stream:
                await running.stream()
            else:
                request.respond(200, await running.whole(), [_JSON, *headers])

    def _span(self, request: Request) -> Span:
        parent = request.headers.get(tracing.TRACEPARENT.encode())
        trace = () if parent is None else ((tracing.TRACEPARENT, parent),)
        return tracing.serve("router.request", trace, route=request.path)

    async def _tokenize(self, request: Request, caller: ApiKey | None) -> None:
        handler = self._revisions.main
        with handler.requests.hold_quota(caller) as hold:
            asked = await self._read(request, schema.TokenizeRequest, translate.tokenize, hold)
            ids = await handler.tokenize(asked, hold)
        self._json(request, {"tokens": ids, "count": len(ids), "max_model_len": handler.tiers.max_model_len()})

    async def _detokenize(self, request: Request, caller: ApiKey | None) -> None:
        handler = self._revisions.main
        with handler.requests.hold_quota(caller) as hold:
            asked = await self._read(request, schema.DetokenizeRequest, translate.detokenize, hold)
            text = await handler.detokenize(asked, hold)
        self._json(request, {"prompt": text})

    async def _read(self, request: Request, shape: type[B], convert: Callable[[B], T], hold: QuotaHold) -> T:
        """Takes the quota, and then reads the body, which costs more than a refusal."""
        hold.take(asyncio.get_running_loop().time())
        return await read(request, shape, convert, self._parser)

    async def _health(self, request: Request, caller: ApiKey | None) -> None:
        if reason := self._unready():
            self._json(request, {"status": "unavailable", "reason": reason}, status=503)
        else:
            self._json(request, {"status": "ok"})

    async def _render_metrics(self, request: Request, caller: ApiKey | None) -> None:
        if self._share_port:
            raise ApiError(
                404,
                "several router processes share this port, and each serves /metrics on a port of its own; "
                "`overfill status` lists them",
            )
        request.respond(200, self._metrics.render(), [(b"content-type", CONTENT_TYPE.encode())])

    async def _version(self, request: Request, caller: ApiKey | None) -> None:
        self._json(request, {"version": __version__, "wire_version": WIRE_VERSION})

    async def _stack_status(self, request: Request, caller: ApiKey | None) -> None:
        status = StackStatus.from_proto(await self._status())
        content = {"model": self._revisions.main.tiers.model, **stack_json(status)}
        self._json(request, content, [(b"cache-control", b"no-store")])

    async def _page(self, request: Request, caller: ApiKey | None) -> None:
        html, headers = page.page()
        request.respond(200, html, headers)

    async def _hello(self, request: Request, caller: ApiKey | None) -> None:
        self._json(request, {"message": "hello"})

    async def _redirect(self, request: Request, caller: ApiKey | None) -> None:
        request.respond(307, b"", [(b"location", b"/ui")])

    def _model_json(self, tiers: ServedTiers, name: str, caller: ApiKey | None) -> dict[str, Any]:
        model = tiers.describe(name, caller)
        return describe_model(model, self._started, _pair_json(tiers, model.tier))


def _pair_json(tiers: ServedTiers, tier: str) -> dict[str, Any]:
    pair = tiers.pair(tier)
    described = {"name": pair.name, "full_digest": pair.full_digest, "decoder_digest": pair.decoder_digest}
    return described | {"revision": tiers.revision} if tiers.revision else described


def _listed(names: Sequence[str]) -> bytes:
    """Names as the value of a header: at most 1,000 printable characters."""
    return re.sub(rb"[^ -~]", b"?", ", ".join(names).encode())[:1000]


def _request_id(request: Request, of_body: str | None, prefix: str) -> str:
    """Returns the id from the header if it is valid, as vLLM does; else from the body; else a new one."""
    given = request.header(b"x-request-id")
    return given if _REQUEST_ID.fullmatch(given) else of_body or f"{prefix}{secrets.token_hex(16)}"
