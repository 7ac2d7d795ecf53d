"""Repairs a file with openai-agents, as its users do: ``python agents_sdk_task.py URL MODEL PROMPT``.

A test runs it with the library in ``.venv/agents``.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from agents import Agent, OpenAIProvider, RunConfig, Runner, function_tool


@function_tool
def read(path: str) -> str:
    """Returns the text of a file."""
    return Path(path).read_text()


@function_tool
def edit(path: str, old: str, new: str) -> str:
    """Replaces a text in a file."""
    Path(path).write_text(Path(path).read_text().replace(old, new))
    return "edited"


@function_tool
def run(command: str) -> str:
    """Runs a command of the shell; returns its output."""
    return subprocess.run(command, shell=True, capture_output=True, text=True).stdout


async def main(url: str, model: str, prompt: str) -> None:
    agent = Agent(name="Repairer", instructions="You repair files.", tools=[read, edit, run], model=model)
    provider = OpenAIProvider(base_url=url, api_key="none", use_responses=True)
    result = Runner.run_streamed(agent, prompt, run_config=RunConfig(model_provider=provider, tracing_disabled=True))
    async for _ in result.stream_events():
        pass
    print(result.final_output)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
