"""Tests what the HTTP endpoint says about tiers, with a handler whose tiers the test scripts."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Self, cast

import pytest
from cores import one_revision
from jobs import worker_info

from overfill.api.keys import ApiKey
from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    Unavailable,
)
from overfill.routing.answer import AnswerDelta
from overfill.routing.job import Job
from overfill.routing.tier import TierChoice
from overfill.routing.worker import DECODE
from overfill.rpc.access import AccessPolicy, Scope
from overfill.telemetry.router_metrics import RouterMetrics
from overfill.v1 import common_pb2, decode_pb2, inference_pb2, registry_pb2
from services.router.adapter_changes import WorkerChange
from services.router.http.app import HttpApi
from services.router.revisions import Revisions
from services.router.served_tiers import ServedTiers
from services.router.shared import Shared
from services.router.statistics import Statistics


class FakeGeneration:
    """An answer of two tokens that ``tiers`` write: one part for each."""

    rest = None
    complete = False
    cached_tokens = 0

    def __init__(self, tiers: list[str], brownout_from: str) -> None:
        self.accepted = inference_pb2.Accepted(
            request_id="r", prompt_tokens=3, seed=7, model="tiny", tier=tiers[0], brownout_from=brownout_from
        )
        self.choice = TierChoice(tiers[0], brownout_from=brownout_from)
        self._deltas = [AnswerDelta(0, [1], text="a"), AnswerDelta(1, [2], text="b")]
        self.finished = inference_pb2.Finished(reason=common_pb2.FINISH_REASON_STOP)
        for index, tier in enumerate(tiers):
            self.finished.parts.add(tier=tier, first_index=index)

    async def next(self) -> AnswerDelta | None:
        return self._deltas.pop(0) if self._deltas else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


class FakeHandler:
    """Answers with the tiers ``written_by``, or raises ``error``. Records what it was asked for in ``asked``."""

    tokenizer = executor = None

    def __init__(self, tiers: ServedTiers) -> None:
        self.tiers = tiers
        self.statistics = Statistics(Shared(None, RouterMetrics()), None)  # type: ignore[arg-type]
        self.asked: list[inference_pb2.GenerateRequest] = []
        self.written_by = ["default"]
        self.brownout_from = ""
        self.error: Exception | None = None

    @property
    def requests(self) -> SimpleNamespace:
        hold = SimpleNamespace(take=lambda *_: None, tier="", revision=None, api="chat")
        return SimpleNamespace(hold_quota=lambda *_: nullcontext(hold))

    def shorten(self, request: inference_pb2.GenerateRequest) -> None:
        pass

    async def check(self, request: inference_pb2.GenerateRequest, *_: Any) -> Job:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        return Job(start=decode_pb2.StartDecode(), prompt_token_ids=[1, 2, 3])

    def start(self, *_: Any) -> FakeGeneration:
        return FakeGeneration(self.written_by, self.brownout_from)


class Http:
    """A client. Each method returns the status and the body."""

    def __init__(self, host: str, port: int) -> None:
        self.address = host, port
        self._url = f"http://{host}:{port}"

    async def get(self, path: str) -> tuple[int, Any]:
        status, text = await asyncio.to_thread(self._send, path, None)
        return status, json.loads(text)

    async def post(self, path: str, **body: Any) -> tuple[int, str]:
        return await asyncio.to_thread(self._send, path, json.dumps(body).encode())

    def _send(self, path: str, data: bytes | None) -> tuple[int, str]:
        request = urllib.request.Request(self._url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@pytest.fixture
def handler(serve_tiers: Callable[..., ServedTiers]) -> FakeHandler:
    return FakeHandler(serve_tiers("default", "full"))


@pytest.fixture
async def client(handler: Any, serve: Any) -> Http:
    api = HttpApi(one_revision(handler), AccessPolicy(), lambda: "", None, None, share_port=False)  # type: ignore[arg-type]
    _, address = await serve(api)
    return Http(*address)


async def ask(client: Http, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return json.loads((await client.post("/v1/chat/completions", **body))[1])


async def test_the_models_are_listed_with_their_tiers(client: Http) -> None:
    listed = (await client.get("/v1/models"))[1]["data"]
    assert [(model["id"], model["overfill"]["tier"]) for model in listed] == [
        ("tiny", "default"), ("tiny:default", "default"), ("tiny:full", "full"),
    ]  # fmt: skip
    assert [model["overfill"]["pair"]["decoder_digest"][0] for model in listed] == ["d", "d", "f"]
    _, one = await client.get("/v1/models/tiny:full")
    assert one["overfill"]["pair"] == {"name": "full-pair", "full_digest": "0" * 64, "decoder_digest": "f" * 64}


async def test_the_list_of_models_is_made_once_until_workers_or_adapters_change(
    client: Http, handler: FakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[str] = []
    describe = handler.tiers.describe

    def counted(name: str, caller: ApiKey | None) -> inference_pb2.Model:
        described.append(name)
        return describe(name, caller)

    async def listed() -> dict[str, int]:
        described.clear()
        return {model["id"]: model["max_model_len"] for model in (await client.get("/v1/models"))[1]["data"]}

    monkeypatch.setattr(handler.tiers, "describe", counted)
    roster = handler.tiers.roster
    assert await listed() == {"tiny": 64, "tiny:default": 64, "tiny:full": 64}
    judge = common_pb2.Adapter(name="judge", digest="a" * 64)
    worker = roster.join(worker_info("d0", DECODE, tier="full", adapters=(judge,)))
    assert "tiny:judge" in await listed()
    assert described
    assert "tiny:judge" in await listed()
    assert not described
    load = decode_pb2.WorkerLoad(kv_blocks_total=2, block_size=16)
    roster.pool_of(worker).report(worker, registry_pb2.Report(load=load, ready=True), 0.0)
    assert (await listed())["tiny:judge"] == 32
    roster.adapters.remove(worker, "judge")
    assert "tiny:judge" not in await listed()


async def test_the_lists_of_models_of_api_keys_are_their_own(handler: Any, serve: Any) -> None:
    tiers = {"all": None} | {f"k{number}": frozenset({"full", f"x{number}"}) for number in range(9)}
    keys = {shown: ApiKey(shown, "0" * 64, "2026-01-01", tiers=usable) for shown, usable in tiers.items()}
    access = AccessPolicy(keys=lambda shown: keys[shown])
    api = HttpApi(one_revision(handler), access, lambda: "", None, None, share_port=False)  # type: ignore[arg-type]
    _, (host, port) = await serve(api)

    async def listed(shown: str) -> list[str]:
        headers = {"authorization": f"Bearer {shown}"}
        request = urllib.request.Request(f"http://{host}:{port}/v1/models", None, headers)
        with await asyncio.to_thread(urllib.request.urlopen, request) as response:
            return [model["id"] for model in json.loads(response.read())["data"]]

    for _ in range(2):
        for shown in keys:
            names = ["tiny", "tiny:default", "tiny:full"] if shown == "all" else ["tiny:full"]
            assert await listed(shown) == names
    assert len(api._model_lists) == 8


async def test_the_fields_reach_the_handler_unchanged(client: Http, handler: FakeHandler) -> None:
    await ask(client, model="tiny:full", tier="full", fallback="default", allow_brownout=True)
    await client.post("/v1/completions", model="tiny", prompt=["a", "b"], tier="full")
    seen = [(r.model, r.tier, r.fallback, r.allow_brownout) for r in handler.asked]
    assert seen == [("tiny:full", "full", "default", True), *[("tiny", "full", "", False)] * 2]


async def test_an_answer_says_which_tier_wrote_which_tokens(client: Http, handler: FakeHandler) -> None:
    handler.written_by, handler.brownout_from = ["default", "full"], "full"
    whole = await ask(client)
    assert (whole["model"], whole["system_fingerprint"]) == ("tiny:default", "fp_dddddddddddd")
    assert whole["overfill"]["pair"]["name"] == "default-pair"
    (told,) = whole["overfill"]["choices"]
    assert (told["tier"], told["brownout_from"]) == ("full", "full")
    assert told["parts"] == [{"tier": "default", "first_index": 0}, {"tier": "full", "first_index": 1}]
    handler.written_by = ["full"]
    _, text = await client.post("/v1/completions", model="tiny", prompt="Hi", stream=True)
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    assert {(chunk["model"], chunk["system_fingerprint"]) for chunk in chunks} == {("tiny:full", "fp_ffffffffffff")}
    (told,) = chunks[-1]["overfill"]["choices"]
    assert told["parts"] == [{"tier": "full", "first_index": 0}]


async def test_with_one_tier_answers_have_the_plain_model_name(
    client: Http, handler: FakeHandler, serve_tiers: Callable[..., ServedTiers]
) -> None:
    handler.tiers = serve_tiers("default")
    answer = await ask(client)
    assert answer["model"] == "tiny"
    (told,) = answer["overfill"]["choices"]
    assert (told["tier"], told["brownout_from"]) == ("default", None)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PermissionDenied("key 'ci' may use default"), 403, "insufficient_scope"),
        (ModelNotFound("tiers are default, full"), 404, "model_not_found"),
    ],
)
async def test_a_tier_that_may_not_be_used_or_does_not_exist_has_its_status(
    client: Http, handler: FakeHandler, error: Exception, status: int, code: str
) -> None:
    handler.error = error
    refused = (await ask(client, tier="x"))["error"]
    assert (refused["code"], refused["message"]) == (code, str(error))
    assert (await client.post("/v1/completions", model="tiny:x", prompt="Hi"))[0] == status


async def test_an_upload_that_ends_early_counts_only_as_an_http_request(client: Http, handler: FakeHandler) -> None:
    _, writer = await asyncio.open_connection(*client.address)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n")
    writer.write(b"content-length: 9\r\n\r\n{")
    value = handler.statistics.metrics.registry.get_sample_value
    gone = {"route": "/v1/completions", "status": "499"}
    while not value("overfill_router_http_requests_total", gone):
        writer.close()  # the task that reads the body may begin later
        await asyncio.sleep(0)
    assert not value("overfill_router_requests_total", {"outcome": "cancelled", "tier": ""})


async def test_other_streams_get_a_turn_between_the_answers_to_one_prompt(
    client: Http, handler: FakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    def start(*_: Any) -> FakeGeneration:
        turns.append("start")
        asyncio.get_running_loop().call_soon(turns.append, "other")
        return FakeGeneration(["default"], "")

    monkeypatch.setattr(handler, "start", start)
    assert len((await ask(client, n=3))["choices"]) == 3
    assert turns == ["start", "other"] * 3


@pytest.mark.parametrize(
    ("errors", "status", "says"),
    [
        ((None, None), 200, None),
        ((None, Overloaded("all slots are taken")), 429, "done on d0, and not on d1: all slots are taken"),
        ((None, Incompatible("another digest", ["name"])), 409, "done on d0, and not on d1: another digest"),
        ((None, DeadlineExceeded("still loads")), 504, "done on d0, and not on d1: still loads"),
        (InvalidRequest("name", "is 'a/b'"), 400, "'lora_name' is 'a/b'"),
        (ModelNotFound("no such folder"), 404, "no such folder"),
        (Unavailable("no decode worker has joined"), 503, "no decode worker has joined"),
    ],
)
async def test_a_change_of_adapters_is_done_only_when_every_worker_has_done_it(
    handler: Any, serve: Any, errors: Any, status: int, says: str | None
) -> None:
    async def change(name: str, *, load: bool) -> list[WorkerChange]:
        assert (name, load) == ("judge", False)
        if isinstance(errors, Exception):
            raise errors
        return [WorkerChange(f"d{index}", common_pb2.Adapter(), error) for index, error in enumerate(errors)]

    adapters: Any = SimpleNamespace(change=change)
    api = HttpApi(one_revision(handler), AccessPolicy(), lambda: "", None, adapters, share_port=False)  # type: ignore[arg-type]
    _, address = await serve(api)
    answered, text = await Http(*address).post("/v1/unload_lora_adapter", lora_name="judge")
    assert answered == status
    body = json.loads(text)
    if says is None:
        assert body == {"adapter": "judge", "loaded": False, "workers": ["d0", "d1"]}
    else:
        assert body["error"]["message"] == says


@pytest.mark.parametrize(("scopes", "status"), [({Scope.INFER, Scope.STATUS}, 403), ({Scope.ADMIN}, 200)])
async def test_only_a_key_with_the_scope_admin_changes_adapters(
    handler: Any, serve: Any, scopes: set[Scope], status: int
) -> None:
    async def change(name: str, *, load: bool) -> list[WorkerChange]:
        return [WorkerChange("d0", common_pb2.Adapter())]

    key = ApiKey("ci", "0" * 64, "2026-01-01", scopes=frozenset(scopes))
    access, adapters = AccessPolicy(keys=lambda shown: key), cast("Any", SimpleNamespace(change=change))
    api = HttpApi(one_revision(handler), access, lambda: "", None, adapters, share_port=False)  # type: ignore[arg-type]
    _, (host, port) = await serve(api)
    headers = {"content-type": "application/json", "authorization": "Bearer k"}
    request = urllib.request.Request(f"http://{host}:{port}/v1/load_lora_adapter", b'{"lora_name": "judge"}', headers)
    try:
        with await asyncio.to_thread(urllib.request.urlopen, request) as response:
            answered = response.status
    except urllib.error.HTTPError as error:
        with error:
            answered = error.code
    assert answered == status


@pytest.mark.parametrize(("percent", "revision"), [(0.0, "r1"), (99.9, "r2")])
async def test_a_conversation_s_revision_answers_and_says_so(
    serve_tiers: Callable[..., ServedTiers], serve: Any, percent: float, revision: str
) -> None:
    handlers = {}
    for name in ("r1", "r2"):
        handlers[name] = FakeHandler(serve_tiers("default", "full"))
        handlers[name].tiers.revision = name
    cores: Any = [
        SimpleNamespace(revision=name, handler=handler, can_answer=lambda *_: True)
        for name, handler in handlers.items()
    ]
    api = HttpApi(Revisions(cores, percent), AccessPolicy(), lambda: "", None, None, share_port=False)  # type: ignore[arg-type]
    _, address = await serve(api)
    client = Http(*address)
    whole = await ask(client)
    assert (whole["system_fingerprint"], whole["overfill"]["pair"]["revision"]) == (
        f"fp_dddddddddddd-{revision}",
        revision,
    )
    status, _ = await client.post(
        "/v1/messages", model="tiny", max_tokens=1, messages=[{"role": "user", "content": "Hi"}]
    )
    assert status == 200
    assert {name: len(handler.asked) for name, handler in handlers.items()} == {"r1": 0, "r2": 0} | {revision: 2}
    listed = (await client.get("/v1/models"))[1]["data"]
    assert {model["overfill"]["pair"]["revision"] for model in listed} == {"r1"}, "the old one, below 100 percent"
