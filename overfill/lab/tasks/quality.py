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

import click
from rich.table import Table

from overfill.lab.measurement import Measurement
from overfill.lab.traffic.outcome import RequestFailed
from overfill.lab.traffic.play import ReceivedAnswer, closed_loop
from overfill.lab.traffic.targets import OpenAiTarget
from overfill.making.conversations import Conversation, Message
from overfill.telemetry.progress import Report

MAX_ANSWER = 48
"""Maximum tokens of an answer."""

_TIMEOUT = 600.0
"""Maximum seconds of a request."""

BASELINE = "full model alone"
"""Name of the peer: the first tier whose decoder is the full model."""

Cpu = Callable[[str], float]
"""Returns the CPU seconds so far of the processes that serve a tier."""


@dataclass(frozen=True, slots=True)
class Examinee:
    """What writes answers: a tier without an adapter, or an adapter.

    Attributes:
        name: name of the tier or of the adapter. An adapter is named ``TASK`` or ``TASK-SUFFIX``.
        model: its name in requests.
        tier: tier whose workers write the answers; empty where the endpoint names none.
        adapter: whether it is an adapter. It is trained for one task, and its prompts say nothing about the task.
        full: whether it is the full model without an adapter.
    """

    name: str
    model: str
    tier: str
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


async def find_writers(url: str) -> list[Examinee]:
    """Returns the tiers and adapters that the endpoint at ``url`` lists; the full model is first, then other tiers.

    Raises:
        RequestFailed: it has no such list.
    """
    async with OpenAiTarget(url) as target:
        listed = await target.models()
    found: dict[str, Examinee] = {}
    for model in listed:
        own = model.get("overfill") or {}
        adapter, pair, tier = bool(model.get("parent")), own.get("pair") or {}, own.get("tier") or ""
        # The default tier is listed twice: by its own name too.
        name = model["root"] if adapter else tier or model["id"]
        full = not adapter and "decoder_digest" in pair and pair["decoder_digest"] == pair["full_digest"]
        found[name] = Examinee(name, model["id"], tier, adapter, full)
    return sorted(found.values(), key=lambda writer: (writer.adapter, not writer.full))


def measure_quality(
    url: str, exams: Mapping[str, Exam], of: Mapping[str, int], *, concurrency: int, cpu: Cpu | None, report: Report
) -> Iterator[Measurement]:
    """Has each writer of the endpoint at ``url`` answer the questions of its tasks. Yields the figures of each in turn.

    Figures leave out requests that fail. Their number is the figure ``failed``, and stderr has the first one's reason.

    Args:
        exams: by task.
        of: what all figures are about.
        concurrency: number of requests at a time.
        cpu: None means that the processes that serve the endpoint are not known.

    Raises:
        RequestFailed: the endpoint has no list of models.
    """
    writers = asyncio.run(find_writers(url))
    turns = [(task, writer) for task in exams for writer in writers if writer.does(task)]
    baseline: dict[tuple[str, str], float] = {}
    for done, (task, writer) in enumerate(turns):
        report("Asking", done, len(turns))
        found, failures = asyncio.run(_take(url, writer, exams[task], concurrency, cpu))
        about: dict[str, str | int] = {"task": task, "writer": writer.name, **of}
        for name, (value, unit) in found.items():
            beside = baseline.get((task, name))
            if writer.full:
                baseline.setdefault((task, name), value)
            peer = None if beside is None else BASELINE
            yield Measurement(name, value, unit, peer=peer, peer_value=beside, of=about)
        yield Measurement("failed", len(failures), "requests", bound=0, of=about)
        if failures:
            click.echo(f"{writer.name}, {task}: {len(failures)} requests failed; the first: {failures[0]}", err=True)
    report("Asking", len(turns), len(turns))


def quality_table(measurements: Sequence[Measurement]) -> Table:
    """A table with a line for each task and writer, and a column for each figure."""
    lines: dict[tuple[str, str], list[str]] = {}
    for one in measurements:
        line = lines.setdefault((str(one.of["task"]), str(one.of["writer"])), [])
        line.append("–" if math.isnan(one.value) else f"{one.value:.3g}")
    table = Table("task", "writer")
    for title in dict.fromkeys(f"{one.name.replace('_', ' ')}, {one.unit}" for one in measurements):
        table.add_column(title, justify="right")
    before = ""
    for (task, writer), cells in lines.items():
        if before not in ("", task):
            table.add_section()
        table.add_row("" if task == before else task, writer, *cells)
        before = task
    return table


async def _take(
    url: str, writer: Examinee, exam: Exam, concurrency: int, cpu: Cpu | None
) -> tuple[dict[str, tuple[float, str]], list[str]]:
    """Asks the exam's questions, after one that does not count: a worker's first requests are slower.

    Returns:
        Value and unit of each figure, by name, and why requests failed. A mean of no answers is NaN.
    """
    async with OpenAiTarget(url, writer.model, extensions=False) as target:
        shots = () if writer.adapter else exam.shots
        await _ask(target, shots, exam.questions[:1], concurrency)
        used, start = 0.0 if cpu is None else cpu(writer.tier), time.perf_counter()
        answers, failures = await _ask(target, shots, exam.questions, concurrency)
        seconds, used = time.perf_counter() - start, 0.0 if cpu is None else cpu(writer.tier) - used
    number = len(answers) or math.nan
    right, tokens, waited = (sum(answer[column] for answer in answers) for column in range(3))
    found = {
        "right": (right / number, "of answers"),
        "answer_tokens": (tokens / number, "tokens"),
        "answer_seconds": (waited / number, "s"),
        "token_rate": (tokens / seconds, "tokens/s"),
    }
    if cpu is not None:
        found["answer_cpu"] = used / number, "CPU s"
        found["right_answer_cpu"] = used / (right or math.nan), "CPU s"
    return found, failures


async def _ask(
    target: OpenAiTarget, shots: Sequence[Message], questions: Sequence[Conversation], concurrency: int
) -> tuple[list[tuple[bool, int, float]], list[str]]:
    """Returns of each answer whether it is right, its tokens and its seconds; and why the other requests failed."""
    answers, failures, waiting = list[tuple[bool, int, float]](), list[str](), deque(questions)

    async def send() -> None:
        *prompt, expected = waiting.popleft().messages
        sent, tokens, received = time.perf_counter(), 0, ReceivedAnswer()
        try:
            async with asyncio.timeout(_TIMEOUT):
                async for number in target.stream([*shots, *prompt], MAX_ANSWER, received):
                    tokens = number
        except TimeoutError:
            failures.append(f"not finished after {_TIMEOUT:g} s")
        except RequestFailed as failure:
            failures.append(str(failure))
        else:
            answers.append((received.text == expected["content"], tokens, time.perf_counter() - sent))

    await closed_loop(send, concurrency, lambda: not waiting)
    return answers, failures
