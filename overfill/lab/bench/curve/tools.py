"""Runs the load generators against an OpenAI endpoint: guidellm and aiperf, unchanged, and our own. All on loopback.

Each sends a fixed number of streamed completions, greedy and of full length, and keeps a number of them running.
"""

from __future__ import annotations

import asyncio
import json
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overfill.lab.bench.curve import results
from overfill.lab.bench.curve.plan import AIPERF, GUIDELLM, OWN, WAVE, AnswerPace, Point, RequestShape
from overfill.lab.bench.curve.results import PointFigures
from overfill.lab.peers.process import PeerFailed, peer_processes
from overfill.lab.traffic.outcome import Outcome
from overfill.lab.traffic.play import run_load
from overfill.lab.traffic.targets import OpenAiTarget
from overfill.lab.traffic.traces import TraceRequest

_POLL_SECONDS = 0.1
_FULL_LENGTH = {"temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server under load.

    Attributes:
        url: its URL, including ``/v1``.
        model: name of its model.
        tokenizer: folder of the model's tokenizer.
        vocab_size: number of token ids for our own prompts.
    """

    url: str
    model: str
    tokenizer: Path
    vocab_size: int


def measure(
    point: Point, shape: RequestShape, at: Endpoint, requests: int, pythons: Mapping[str, Path], limit: float
) -> PointFigures:
    """Measures one point with its tool.

    Args:
        pythons: interpreter of each tool's environment.
        limit: seconds after which the tool is stopped.

    Raises:
        PeerFailed: the tool failed, reached its limit, or sent another number of requests. The notes have its last
            lines if it failed.
        OverfillError: its output lacks a file or a field, or no request was answered.
    """
    if point.tool == OWN:
        began = time.process_time()
        found = results.figures_of(asyncio.run(_play(shape, at, requests, point.concurrency, limit)))
        return replace(found, tool_cpu=time.process_time() - began)
    # The system does not matter here: all get the same prompts.
    seed = 1000 * point.round + 10 * point.concurrency + ord(shape.name)
    make_command, read = {
        GUIDELLM: (_guidellm, results.read_guidellm),
        AIPERF: (_aiperf, results.read_aiperf),
    }[point.tool]
    with tempfile.TemporaryDirectory(prefix="overfill-curve-") as folder:
        command = make_command(Path(folder), shape, at, requests, point.concurrency, seed)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _run(point.tool, [str(pythons[point.tool]), *command], limit)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = read(Path(folder))
    if (sent := found.requests + found.failed) != requests:
        raise PeerFailed(f"{point.tool} reports {sent} of {requests} requests")
    return replace(found, tool_cpu=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def warm_up(shape: RequestShape, at: Endpoint, limit: float) -> AnswerPace:
    """Sends requests until every code path has run, and returns how fast the system answers.

    Raises:
        PeerFailed: it answers no request.
    """

    def seconds(requests: int, first: int) -> float:
        outcomes = asyncio.run(_play(shape, at, requests, requests, limit, first))
        for outcome in outcomes:
            if not outcome.ok:
                raise PeerFailed(f"the system failed in its warm-up: {outcome.error}")
        return max(outcome.times[-1] for outcome in outcomes)

    # Other prompts each time: where prefixes are kept, a prompt that was sent before costs next to nothing.
    seconds(WAVE, 0)
    return AnswerPace(seconds(1, WAVE), seconds(WAVE, WAVE + 1))


async def _play(
    shape: RequestShape, at: Endpoint, requests: int, concurrency: int, limit: float, first: int = 0
) -> list[Outcome]:
    """Sends requests with our own generator. Where prompts share prefixes, another ``first`` gives other endings."""
    wanted = [
        TraceRequest(
            0.0,
            shape.prompt,
            shape.answer,
            blocks=(number % shape.groups, shape.groups + number),  # the second one is longer than the prompt's rest
            block_tokens=shape.prefix,
        )
        for number in range(first, first + requests)
    ]
    async with OpenAiTarget(at.url, at.model) as target:
        return await run_load(target, wanted, at.vocab_size, concurrency=concurrency, timeout=limit)


def _guidellm(folder: Path, shape: RequestShape, at: Endpoint, requests: int, concurrency: int, seed: int) -> list[str]:
    """Writes a scenario of guidellm, and returns what follows its interpreter."""
    data: dict[str, Any] = {
        "kind": "synthetic_text",
        "prompt_tokens": shape.prompt - shape.prefix,
        "output_tokens": shape.answer,
    }
    if shape.prefix:
        data["prefix_buckets"] = [{"prefix_count": shape.groups, "prefix_tokens": shape.prefix}]
    scenario = {
        "backend": {
            "kind": "openai_http",
            "target": at.url,
            "model": at.model,
            "request_format": "/v1/completions",
            "extras": {"body": _FULL_LENGTH},
        },
        "profile": {"kind": "concurrent", "streams": [concurrency]},
        "constraints": [{"kind": "max_requests", "count": requests}],
        "tokenizer": {"kind": "huggingface_auto", "model": str(at.tokenizer)},
        "data": [data],
        # Makes the prompts before the first request. By default a process makes 4,096 meanwhile, on the servers' cores.
        "data_loader": {"kind": "pytorch", "samples": requests},
        "seed": {"kind": "static", "value": seed},
        "outputs": [{"kind": "json", "path": str(folder / "report.json")}],
        "metrics": {"kind": "generative", "sample_size": 0},
    }
    (folder / "scenario.json").write_text(json.dumps({"spec": scenario}))
    return ["-m", "guidellm", "run", "--config", str(folder / "scenario.json"), "--disable-console-interactive"]


def _aiperf(folder: Path, shape: RequestShape, at: Endpoint, requests: int, concurrency: int, seed: int) -> list[str]:
    """Returns what follows aiperf's interpreter. It measures no shape with prefixes, and adds ``/v1`` itself."""
    options = (
        f"--url {at.url.removesuffix('/v1')} --endpoint-type completions --streaming --use-server-token-count "
        f"--isl {shape.prompt} --osl {shape.answer} --concurrency {concurrency} --request-count {requests} "
        f"--num-dataset-entries {requests} --random-seed {seed} --export-level records --ui none "
        "--no-gpu-telemetry --no-server-metrics "
        # Without a rate it asks without a pause whether another request may start, and so takes a whole core.
        "--request-rate 200 --arrival-pattern constant"
    )
    paths = ["--model", at.model, "--tokenizer", str(at.tokenizer), "--artifact-dir", str(folder)]
    return ["-m", "aiperf", "profile", *options.split(), *paths, "--extra-inputs", json.dumps(_FULL_LENGTH)]


def _run(tool: str, command: Sequence[str], limit: float) -> None:
    """Runs a tool to its end. Stops it and its processes at the limit, and when this process is interrupted."""
    deadline = time.monotonic() + limit
    # aiperf finds a tokenizer's folder only online, and then sends nothing; guidellm needs neither.
    with peer_processes({"HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}) as start:
        child = start(tool, command)
        while (code := child.returncode) is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    if code != 0:
        raise PeerFailed.of(child, f"took more than {limit:.0f} s" if code is None else child.describe_exit())
