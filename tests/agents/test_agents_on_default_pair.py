"""Tests of agents on the pair ``default``, whose context of 8,192 tokens is too small for them, as they say."""

from __future__ import annotations

import json

import openai
import pytest
from real_agents import AGENTS, MODEL
from recording_proxy import RecordingProxy
from test_agents import start
from up_stack import stack_of

pytestmark = pytest.mark.model

SAID = {
    "codex": "ran out of room in the model's context window",
    "claude": "Prompt is too long",
    "opencode": "do not fit the context of 8192 tokens",
}
"""What each agent says of ``context_length_exceeded``. The prompt of the Agents SDK would fit."""
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"enum": [1, 7]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def stack():
    with stack_of("--served-model-name", MODEL) as stack:
        yield stack


@pytest.mark.parametrize("agent", [agent for agent in AGENTS if agent.name in SAID], ids=lambda agent: agent.name)
def test_an_agent_says_that_the_context_is_too_small(agent, stack, tmp_path):
    with RecordingProxy(stack.url) as proxy:
        done = start(agent, tmp_path, proxy.url)
    assert done.returncode != 0
    assert SAID[agent.name] in done.stdout + done.stderr
    assert {exchange.status for exchange in proxy.exchanges} == {400}


def test_a_forced_tool_is_called(stack):
    """The model of this pair is too small to choose a tool, so the grammar of the calls has to make it one."""
    tool = {"type": "function", "name": "forecast", "parameters": WEATHER}
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        response = client.responses.create(
            model=MODEL,
            input="Will it rain in Oslo?",
            tools=[tool],
            tool_choice={"type": "function", "name": "forecast"},
            max_output_tokens=100,
        )
    (call,) = response.output
    arguments = json.loads(call.arguments)
    assert (call.type, call.name, arguments.keys()) == ("function_call", "forecast", {"city", "days"})
