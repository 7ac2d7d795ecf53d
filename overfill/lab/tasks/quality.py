"""Scores what an endpoint answers on the tasks, beside the speed of its answers and their cost in CPU time.

An answer is right if its text is exactly the expected one. All requests are greedy.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from rich.table import Table

from overfill.errors import OverfillError
from overfill.lab.measurement import Measurement
from overfill.lab.traffic.openai import error_message
from overfill.lab.traffic.play import closed_loop
from overfill.making.conversations import Conversation, Message
from overfill.telemetry.progress import Report

MAX_ANSWER = 48
"""Maximum tokens of an answer."""

BASELINE = "full model alone"
"""Name of the peer: the first tier whose decoder is the full model."""

_TITLES = {
    "right": "right",
    "answer_tokens": "tokens",
    "answer_seconds": "s/answer",
    "token_rate": "tokens/s",
    "answer_cpu": "CPU s/answer",
    "right_answer_cpu": "CPU s/right answer",
}
_TIMEOUT = aiohttp.ClientTimeout(total=600)


class TargetFailed(OverfillError):
    """The endpoint did not answer a request, or its answer is not one of OpenAI's API."""


@dataclass(frozen=True, slots=True)
class Writer:
    """What writes answers: a tier without an adapter, or an adapter.

    Attributes:
        name: name of the tier or of the adapter. An adapter is named ``TASK`` or ``TASK-SUFFIX``.
        model: its name in requests.
        adapter: whether it is an adapter. It is trained for one task, and its prompts say nothing about the task.
        full: whether it is the full model without an adapter.
    """

    name: str
    model: str
    adapter: bool
    full: bool

    def does(self, task: str) -> bool:
        """Whether it is asked the questions of ``task``: a tier is asked those of all tasks."""
        return not self.adapter or self.name.split("-")[0] == task


@dataclass(frozen=True, slots=True)
class Exam:
    """Questions of one task, and worked examples that tiers get before each.

    Attributes:
        shots: questions and answers. Without them, nothing tells a tier what its task is.
    """

    questions: Sequence[Conversation]
    shots: Sequence[Message] = ()


@dataclass(slots=True)
class Score:
    """What a writer did with the questions of a task.

    Attributes:
        waited: sum of the seconds that each answer took.
        seconds: duration of the turn.
        cpu: CPU seconds of all processes that serve the endpoint; NaN means unknown.
    """

    right: int = 0
    tokens: int = 0
    waited: float = 0.0
    seconds: float = 0.0
    cpu: float = math.nan

    def figures(self, answers: int) -> dict[str, tuple[float, str]]:
        """Returns value and unit of each figure of ``answers`` answers; a cost per right answer is NaN without one."""
        found = {
            "right": (self.right / answers, "of answers"),
            "answer_tokens": (self.tokens / answers, "tokens"),
            "answer_seconds": (self.waited / answers, "s"),
            "token_rate": (self.tokens / self.seconds, "tokens/s"),
        }
        if not math.isnan(self.cpu):
            found["answer_cpu"] = self.cpu / answers, "CPU s"
            found["right_answer_cpu"] = self.cpu / self.right if self.right else math.nan, "CPU s"
        return found


async def find_writers(url: str) -> list[Writer]:
    """Returns the tiers and adapters that the endpoint at ``url`` lists; the full model is first, then other tiers.

    Raises:
        TargetFailed: it has no such list.
    """
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        listed = (await _call(session.get(f"{url}/models")))["data"]
    found: dict[str, Writer] = {}
    for model in listed:
        own = model.get("overfill") or {}
        adapter, pair = bool(model.get("parent")), own.get("pair") or {}
        # The default tier is listed twice: by its own name too.
        name = model["root"] if adapter else own.get("tier") or model["id"]
        full = not adapter and "decoder_digest" in pair and pair["decoder_digest"] == pair["full_digest"]
        found[name] = Writer(name, model["id"], adapter, full)
    return sorted(found.values(), key=lambda writer: (writer.adapter, not writer.full))


def measure_quality(
    url: str,
    exams: Mapping[str, Exam],
    of: Mapping[str, int],
    *,
    concurrency: int,
    cpu: Callable[[], float] | None,
    report: Report,
) -> Iterator[Measurement]:
    """Has each writer of the endpoint at ``url`` answer the questions of its tasks. Yields the figures of each in turn.

    Args:
        exams: by task.
        of: what all figures are about.
        concurrency: number of requests at a time.
        cpu: returns the CPU time of the processes that serve the endpoint; None means that it is not known.

    Raises:
        TargetFailed: a request failed.
    """
    writers = asyncio.run(find_writers(url))
    turns = [(task, writer) for task in exams for writer in writers if writer.does(task)]
    baseline: dict[tuple[str, str], float] = {}
    for done, (task, writer) in enumerate(turns):
        report("Asking", done, len(turns))
        score = asyncio.run(_take(url, writer, exams[task], concurrency, cpu))
        for name, (value, unit) in score.figures(len(exams[task].questions)).items():
            beside = baseline.get((task, name))
            if writer.full:
                baseline.setdefault((task, name), value)
            peer = None if beside is None else BASELINE
            about: dict[str, str | int] = {"task": task, "writer": writer.name, **of}
            yield Measurement(name, value, unit, peer=peer, peer_value=beside, of=about)
    report("Asking", len(turns), len(turns))


def quality_table(measurements: Sequence[Measurement]) -> Table:
    """A table with a line for each task and writer, and a column for each figure."""
    table = Table()
    for column in ("task", "writer"):
        table.add_column(column, no_wrap=True)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for one in measurements:
        shown = "none right" if math.isnan(one.value) else f"{one.value:.3g}"
        if one.name == "right":
            shown = f"{100 * one.value:.1f} %"
        lines.setdefault((str(one.of["task"]), str(one.of["writer"])), {})[one.name] = shown
    titles = {one.name: _TITLES[one.name] for one in measurements}
    for title in titles.values():
        table.add_column(title, justify="right")
    before = ""
    for (task, writer), cells in lines.items():
        if before not in ("", task):
            table.add_section()
        table.add_row("" if task == before else task, writer, *(cells[name] for name in titles))
        before = task
    return table


async def _take(url: str, writer: Writer, exam: Exam, concurrency: int, cpu: Callable[[], float] | None) -> Score:
    """Asks the exam's questions, after one that does not count: a worker's first requests are slower."""
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        await _ask(session, url, writer, exam, exam.questions[:1], concurrency)
        used, start = 0.0 if cpu is None else cpu(), time.perf_counter()
        score = await _ask(session, url, writer, exam, exam.questions, concurrency)
        score.seconds = time.perf_counter() - start
        if cpu is not None:
            score.cpu = cpu() - used
    return score


async def _ask(
    session: aiohttp.ClientSession,
    url: str,
    writer: Writer,
    exam: Exam,
    questions: Sequence[Conversation],
    concurrency: int,
) -> Score:
    score, waiting = Score(), deque(questions)
    failed: list[TargetFailed] = []

    async def send() -> None:
        *prompt, expected = waiting.popleft().messages
        body = {
            "model": writer.model,
            "messages": [*(() if writer.adapter else exam.shots), *prompt],
            "max_tokens": MAX_ANSWER,
            "temperature": 0,
        }
        sent = time.perf_counter()
        try:
            answer = await _call(session.post(f"{url}/chat/completions", json=body))
        except TargetFailed as failure:
            failed.append(failure)
            waiting.clear()
        else:
            score.waited += time.perf_counter() - sent
            score.tokens += answer["usage"]["completion_tokens"]
            score.right += answer["choices"][0]["message"]["content"] == expected["content"]

    await closed_loop(send, concurrency, lambda: not waiting)
    if failed:
        raise failed[0]
    return score


async def _call(request: Any) -> Any:
    """Sends a request of aiohttp and returns the JSON of its answer."""
    try:
        async with request as response:
            if response.status != 200:
                why = error_message(await response.text())
                raise TargetFailed(f"{response.url} answers with HTTP {response.status}: {why}")
            return await response.json()
    except (aiohttp.ClientError, ValueError, TimeoutError) as error:
        raise TargetFailed(f"the endpoint does not answer as an OpenAI endpoint does: {error!r}") from error
