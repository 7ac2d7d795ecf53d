"""``overfill bench fan-out``: what tasks over one prompt gain from sharing it, beside vLLM with the same adapters."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from overfill.errors import InvalidRequest
from overfill.lab.bench.measurement import print_measurements
from overfill.lab.commands.bench_options import install_option, json_option, load_pair, log_line

if TYPE_CHECKING:
    from overfill.model.manifest import EngineName


@click.command("fan-out", short_help="Several tasks over one prompt, beside vLLM with the same adapters.")
@click.option("--pair", default="identity", show_default=True, help="An identity pair's name or folder.")
@click.option(
    "--adapters",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of adapters, as of `overfill pair adapter add`; each is a task.",
)
@click.option("--prompt-tokens", type=click.IntRange(2), default=1000, show_default=True, help="Length of a prompt.")
@click.option("--answer-tokens", type=click.IntRange(2), default=48, show_default=True, help="Length of an answer.")
@click.option("--fan-outs", type=click.IntRange(1), default=16, show_default=True, help="Prompts per measurement.")
@click.option("--concurrency", type=click.IntRange(1), default=2, show_default=True, help="Fan-outs at a time.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of each worker.")
@click.option(
    "--engine",
    type=click.Choice(["overfill", "vllm"]),
    default="overfill",
    show_default=True,
    help="Engine of our workers.",
)
@click.option("--vllm/--no-vllm", "with_vllm", default=True, show_default=True, help="Measure vLLM too.")
@install_option
@json_option
def fan_out_command(
    pair: str,
    adapters: Path,
    prompt_tokens: int,
    answer_tokens: int,
    fan_outs: int,
    concurrency: int,
    threads: int,
    engine: EngineName,
    with_vllm: bool,
    install_vllm: bool,
    as_json: bool,
) -> int:
    """Measure what tasks over one prompt gain from sharing it.

    Runs the same prompts on a stack with one worker per stage, on the same stack without prefix caches, so that nothing
    is shared, and on vLLM's server with the same adapters and its own prefix cache. Exits with 1 when an aim is missed.
    """
    from overfill.cli.progress import show_progress
    from overfill.lab.bench.engine.peers.environment import NOT_INSTALLED, install, python_of
    from overfill.lab.bench.engine.peers.vllm_server import vllm_server
    from overfill.lab.bench.fan_out import (
        FanOutFigures,
        FanOutLoad,
        adapter_stack,
        measurements_of,
        prompt_tokens_computed,
        run_fan_outs,
    )
    from overfill.pair.adapters import adapter_names

    found, tasks = load_pair(pair), adapter_names(adapters)
    if len(tasks) < 2:
        raise InvalidRequest("adapters", f"{adapters} has {len(tasks)} adapters; a fan-out needs at least 2")
    size = prompt_tokens, answer_tokens, fan_outs, concurrency
    load = FanOutLoad(tasks, *size, found.full_config.vocab_size)
    with show_progress() as report:
        if install_vllm:
            install("vllm", report)
        python = python_of("vllm") if with_vllm else None
        if with_vllm and python is None:
            raise InvalidRequest("vllm", f"vLLM is {NOT_INSTALLED}, or give --no-vllm")

        def stack(shares: bool, name: str) -> FanOutFigures:
            with adapter_stack(found.folder, adapters, load, threads, shares, engine, log_line) as (
                url,
                model,
                address,
            ):
                progress = partial(report, f"Fan-outs, {name}")
                figures = asyncio.run(run_fan_outs(url, f"{model}:", load, progress))
                prompts = 2 * (fan_outs + 1)
                figures.computed = prompt_tokens_computed(address) / (prompts * prompt_tokens)
            return figures

        ours, alone, peer = stack(True, "shared"), stack(False, "not shared"), None
        if python is not None:
            folders = {task: adapters / task for task in tasks}
            with vllm_server(python, found.full_path, prompt_tokens + answer_tokens, folders, prefix_cache=True) as url:
                progress = partial(report, "Fan-outs, vLLM")
                peer = asyncio.run(run_fan_outs(url, "", load, progress))
    return print_measurements(measurements_of(ours, alone, peer), as_json)
