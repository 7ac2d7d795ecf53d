"""Tests the trial of a request's tools and grammar: what comes back, and the field that an error names."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from overfill.api.families.hermes import Hermes
from overfill.api.request_grammar import tried_grammar
from overfill.api.tools_grammar import chat_grammar
from overfill.errors import InvalidRequest
from overfill.request.trials import Trials
from overfill.v1 import common_pb2
from overfill.v1.inference_pb2 import Chat, GenerateRequest, ToolChoice

HERMES = Hermes()
BOMB = {"type": "integer", "multipleOf": 4000037}
TEXT = {"type": "object", "properties": {"input": {"type": "string", "description": "Text."}}, "required": ["input"]}
NONE = ToolChoice(mode=ToolChoice.MODE_NONE)


@pytest.fixture
async def trials(tiny_pair: Path) -> AsyncIterator[Trials]:
    made = Trials(tiny_pair / "full" / "tokenizer.json", 512, [1])
    yield made
    made.close()


def tool(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"name": "f", "parameters": schema if isinstance(schema, str) else json.dumps(schema), **fields}


def taking(**text: Any) -> dict[str, Any]:
    """A tool that takes a text with a grammar."""
    return {"name": "text", "parameters": json.dumps(TEXT), "input": common_pb2.Grammar(**text)}


def request(schema: str = "", **chat: Any) -> GenerateRequest:
    made = GenerateRequest(chat=Chat(**chat))
    if schema:
        made.sampling.grammar.json_schema = schema
    return made


async def test_the_grammar_of_tools_is_that_of_the_chat(trials: Trials) -> None:
    asked = request(tools=[tool({"type": "object", "properties": {"a": {"type": "string"}}})])
    assert await tried_grammar(asked, trials, HERMES) == chat_grammar(asked.chat)
    both = request('{"type": "boolean"}', tools=[tool({})])
    assert "answer" in (await tried_grammar(both, trials, HERMES)).text  # type: ignore[union-attr]


async def test_a_grammar_without_tools_needs_no_other(trials: Trials) -> None:
    assert await tried_grammar(request('{"type": "boolean"}'), trials, HERMES) is None
    any_object = GenerateRequest(sampling={"grammar": common_pb2.Grammar(json_object=True)})
    assert await tried_grammar(any_object, trials, HERMES) is None


@pytest.mark.parametrize(
    ("field", "reason", "asked"),
    [
        ("sampling.grammar.json_schema", "is too complex", request(json.dumps(BOMB))),
        ("sampling.grammar.json_schema", "is nested too deeply", request("[" * 5000)),
        ("sampling.grammar.json_schema", "Unimplemented", request('{"not": {}}', tools=[tool({})])),
        ("sampling.grammar.json_schema", "Unimplemented", request('{"not": {}}', tools=[tool({})], tool_choice=NONE)),
        ("chat.tools", "is too complex", request(tools=[tool({"properties": {"a": BOMB}})])),
        (r"chat.tools\[0\].parameters", "is nested too deeply", request(tools=[tool('{"a":' * 5000)])),
        (r"chat.tools\[0\].input", 'unknown name: "a"', request(tools=[taking(lark="start: a")])),
        (r"chat.tools\[1\].input", r"itself \(a -> a\)", request(tools=[tool({}), taking(lark='start: a\na: "b" a?')])),
        (r"chat.tools\[0\].input", "give a regex or a Lark grammar", request(tools=[taking(json_object=True)])),
        (r"chat.tools\[0\].input", "is empty", request(tools=[taking()])),
        (r"chat.tools\[0\].parameters", "of a tool with an input", request(tools=[tool({}, input={"regex": "a"})])),
        (
            r"chat.tools\[0\].parameters",
            "of a tool with an input",
            request(tools=[tool({"properties": 5}, input={"regex": "a"})]),
        ),
        (r"chat.tools\[0\].parameters", "strict tool 'f'", request(tools=[tool({"not": {}}, strict=True)])),
    ],
)
async def test_errors_name_the_field(trials: Trials, field: str, reason: str, asked: GenerateRequest) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: .*{reason}"):
        await tried_grammar(asked, trials, HERMES)
