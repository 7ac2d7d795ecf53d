"""The four tasks over one prompt: their data, and what ``overfill bench quality`` says about an endpoint's answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from overfill.api.tokenizer import Tokenizer
from overfill.lab.commands.bench_quality import quality_command
from overfill.lab.stacks import ServedStack
from overfill.lab.tasks.cases import TASKS, cases, conversations
from overfill.making.conversations import encode, read_conversations
from overfill.model.manifest import Pair
from overfill.settings.tiers import TierSpec
from tests.support.peft_adapters import add_tiny_adapter

QUESTIONS = 4


def run(*options: str) -> Result:
    return CliRunner().invoke(quality_command, options, standalone_mode=False)


def test_all_tasks_have_the_same_prompts_of_about_the_wanted_length(tiny_pair: Path, tmp_path: Path) -> None:
    done = run(f"--tier=full={tiny_pair}", "--write", str(tmp_path))
    assert done.exit_code == 0, done.output
    tokenizer = Tokenizer.load(tiny_pair / "full")
    by_task = {task: read_conversations(tmp_path / f"{task}.jsonl") for task in TASKS}
    prompts = {task: [c.prompt for c in made] for task, made in by_task.items()}
    assert all(each == prompts["row"] for each in prompts.values())
    assert len(set(prompts["row"])) == 1000
    held_out = [c.prompt for c in read_conversations(tmp_path / "row.held-out.jsonl")]
    assert not set(held_out) & set(prompts["row"])
    for made in by_task.values():
        transcripts = encode(made[:50], tokenizer)
        assert len({t.answer for t in transcripts}) > 40


def test_every_answer_follows_from_its_case() -> None:
    for case, _ in islice(cases(seed=3), 200):
        answer = json.loads(TASKS["extract"](case))
        assert (answer["product"], answer["order"]) == (case.order.product, case.order.number)
        assert sum(order.product == case.order.product for order in case.orders) == 1


class Endpoint:
    """An endpoint with two tiers and an adapter of ``row``. The adapter knows every answer but the first one.

    Attributes:
        known: questions and the adapter's answers.
        bodies: requests for answers.
        refuses: tells whether it refuses a question.
    """

    def __init__(self, known: dict[str, str]) -> None:
        self.known = known
        self.bodies: list[dict[str, Any]] = []
        self.refuses: Callable[[str], bool] = lambda question: False

    async def models(self, request: web.Request) -> web.Response:
        same = {"full_digest": "a", "decoder_digest": "a"}
        pruned = same | {"decoder_digest": "b"}
        return web.json_response(
            {
                "data": [
                    {"id": "fast", "parent": None, "overfill": {"tier": "fast", "pair": pruned}},
                    {"id": "fast:fast", "parent": None, "overfill": {"tier": "fast", "pair": pruned}},
                    {"id": "fast:full", "parent": None, "overfill": {"tier": "full", "pair": same}},
                    {"id": "fast:row-1", "root": "row-1", "parent": "fast", "overfill": {"tier": "full", "pair": same}},
                    {"id": "fast:joke", "root": "joke", "parent": "fast", "overfill": {"tier": "full", "pair": same}},
                ]
            }
        )

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        question = body["messages"][-1]["content"]
        if self.refuses(question):
            return web.json_response({"error": {"message": "too many requests"}}, status=429)
        text = self.known[question] if body["model"] == "fast:row-1" else "I do not know."
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events = [{"choices": [{"delta": {"content": part}}]} for part in (text[:3], text[3:])]
        for event in [*events, {"choices": [], "usage": {"completion_tokens": 5}}]:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
def endpoint(tiny_pair: Path) -> Iterator[tuple[str, Endpoint]]:
    """URL of an endpoint that runs in a thread, and the endpoint."""
    judged = conversations(Tokenizer.load(tiny_pair / "full"), 200, QUESTIONS, 1_000_000)["row"]
    known = {c.messages[0]["content"]: c.messages[1]["content"] for c in judged}
    known[judged[0].messages[0]["content"]] += "!"
    served = Endpoint(known)
    app = web.Application()
    app.add_routes([web.get("/v1/models", served.models), web.post("/v1/chat/completions", served.answer)])
    loop, ready = asyncio.new_event_loop(), threading.Event()
    runner = web.AppRunner(app)
    url = ""

    async def start() -> None:
        nonlocal url
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()))
    thread.start()
    ready.wait()
    yield url, served
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_each_writer_is_scored_beside_the_full_model(tiny_pair: Path, endpoint: tuple[str, Endpoint]) -> None:
    url, served = endpoint
    options = f"--tier=full={tiny_pair}", f"--target={url}", f"--examples={QUESTIONS}", "--shots=2"
    done = run(*options, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    right = {(row["task"], row["writer"]): row["value"] for row in rows if row["name"] == "right"}
    assert right == {(task, tier): 0 for task in TASKS for tier in ("full", "fast")} | {("row", "row-1"): 0.75}
    of_adapter = {row["name"]: row for row in rows if row["writer"] == "row-1"}
    assert of_adapter["answer_tokens"]["value"] == 5
    assert of_adapter["token_rate"]["peer"] == "full model alone"
    assert of_adapter["token_rate"]["peer_value"] > 0
    assert of_adapter["token_rate"]["answers"] == QUESTIONS
    assert not any("cpu" in name for name in of_adapter)  # whose processes are not known
    assert all(body["temperature"] == 0 for body in served.bodies)
    # A tier learns the task from two worked examples of it. The adapter gets its question alone.
    lengths = {body["model"]: len(body["messages"]) for body in served.bodies}
    assert lengths == {"fast:full": 5, "fast:fast": 5, "fast:row-1": 1}
    (line,) = [line for line in run(*options).output.splitlines() if "row-1" in line]
    assert "0.75" in line.split()
    assert done.return_value == 0


def test_failed_requests_are_counted_and_the_other_answers_are_scored(
    tiny_pair: Path, endpoint: tuple[str, Endpoint]
) -> None:
    url, served = endpoint
    options = f"--tier=full={tiny_pair}", f"--target={url}", f"--examples={QUESTIONS}", "--shots=0", "--json"
    refused = list(served.known)[1]
    for refuses, failed, right in ((lambda question: question == refused, 1, 0.6667), (lambda question: True, 4, None)):
        served.refuses = refuses
        done = run(*options)
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.return_value == 1
        assert {row["value"] for row in rows if row["name"] == "failed"} == {failed}
        assert [row["value"] for row in rows if (row["name"], row["writer"]) == ("right", "row-1")] == [right]
        assert f"row-1, row: {failed} requests failed; the first: HTTP 429: too many requests" in done.stderr


def test_the_cpu_time_of_a_tier_leaves_out_the_decode_workers_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overfill.lab.stacks.cpu_seconds", lambda *processes: sum(processes))
    processes = {"router": 1, "prefill-0": 2, "decode-full-0": 4, "decode-fast-0": 8}
    stack = ServedStack("", "", "", processes, {"decode-full-0": "full", "decode-fast-0": "fast"})
    assert (stack.cpu_seconds("full"), stack.cpu_seconds("fast")) == (7, 11)


@pytest.mark.slow
def test_a_stack_is_started_and_its_cpu_time_counted(tiny_tiers: tuple[TierSpec, ...], tmp_path: Path) -> None:
    tiers = {tier.name: tier for tier in tiny_tiers}
    add_tiny_adapter(Pair.load(Path(tiers["full"].pair)), tmp_path / "adapters", "row")
    options = [f"--tier={name}={tiers[name].pair}" for name in ("full", "fast")]
    done = run(*options, f"--adapters={tmp_path / 'adapters'}", "--examples=2", "--shots=0", "--json")
    assert done.exception is None, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    cpu = {(row["task"], row["writer"]): row["value"] for row in rows if row["name"] == "answer_cpu"}
    assert cpu.keys() == {(task, tier) for task in TASKS for tier in ("full", "fast")} | {("row", "row")}
    assert all(value > 0 for value in cpu.values())
    assert done.return_value == 0
    # Random weights answer nothing right, so no right answer has a cost.
    assert {row["value"] for row in rows if row["name"] == "right_answer_cpu"} == {None}
