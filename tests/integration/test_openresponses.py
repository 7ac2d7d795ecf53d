"""The seven published compliance cases of Open Responses, rewritten. The one with an image is refused by name."""

import json
import re

import jsonschema
import pytest
from http_calls import call
from mocks import mock_stack
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

NULL_OR_TEXT, NULL_OR_COUNT = ({"type": ["null", kind]} for kind in ("string", "integer"))
COUNT, NUMBER, FLAG, OBJECT = ({"type": kind} for kind in ("integer", "number", "boolean", "object"))
TOKENS = {"type": "integer", "minimum": 0}


def record(**fields):
    """A schema of an object that must have ``fields``."""
    return {"type": "object", "properties": fields, "required": list(fields)}


TEXT = record(type={"const": "output_text"}, text={"type": "string"}, annotations={"const": []}, logprobs={"const": []})
MESSAGE = record(
    type={"const": "message"},
    id={"type": "string"},
    status={"const": "completed"},
    role={"const": "assistant"},
    content={"type": "array", "items": TEXT, "minItems": 1},
)
FUNCTION_CALL = record(
    type={"const": "function_call"},
    id={"type": "string"},
    call_id={"type": "string"},
    name={"const": "forecast"},
    arguments={"const": '{"place": "Oslo"}'},
    status={"const": "completed"},
)
RESPONSE = record(
    id={"type": "string"},
    object={"const": "response"},
    created_at=COUNT,
    completed_at=COUNT,
    status={"const": "completed"},
    incomplete_details={"type": "null"},
    model={"const": "m"},
    previous_response_id={"type": "null"},
    instructions=NULL_OR_TEXT,
    output={"type": "array", "items": {"oneOf": [MESSAGE, FUNCTION_CALL]}, "minItems": 1},
    error={"type": "null"},
    tools={"type": "array"},
    tool_choice={"const": "auto"},
    truncation={"enum": ["auto", "disabled"]},
    parallel_tool_calls=FLAG,
    text=record(format=record(type={"const": "text"})),
    top_p=NUMBER,
    presence_penalty=NUMBER,
    frequency_penalty=NUMBER,
    top_logprobs=COUNT,
    temperature=NUMBER,
    reasoning={"type": ["object", "null"]},
    usage=record(
        input_tokens=TOKENS,
        input_tokens_details=record(cached_tokens=TOKENS),
        output_tokens=TOKENS,
        output_tokens_details=record(reasoning_tokens=TOKENS),
        total_tokens=TOKENS,
    ),
    max_output_tokens=NULL_OR_COUNT,
    max_tool_calls=NULL_OR_COUNT,
    store=FLAG,
    background=FLAG,
    service_tier={"type": "string"},
    metadata=OBJECT,
    safety_identifier=NULL_OR_TEXT,
    prompt_cache_key=NULL_OR_TEXT,
)
"""What Open Responses requires of a response. Fields that it has not are allowed."""

PARTS = {
    "message": ("response.output_text.delta", "response.output_text.done"),
    "function_call": ("response.function_call_arguments.delta", "response.function_call_arguments.done"),
}
"""Events of a part of an item's text, and of all of it."""
EVENT = TypeAdapter(ResponseStreamEvent)
FORECAST = {
    "type": "function",
    "name": "forecast",
    "description": "Tells the weather of tomorrow.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
SCRIPT = [
    {"text": "Two small words."},
    {"when": "Oslo", "tool_calls": [{"name": "forecast", "arguments": {"place": "Oslo"}}]},
]


def message(role, content):
    return {"type": "message", "role": role, "content": content}


CASES = {
    "basic response": (False, {"input": [message("user", "Greet me with two words.")]}, "message"),
    "streaming response": (True, {"input": [message("user", "List three colours.")]}, "message"),
    "system prompt": (
        False,
        {"input": [message("system", "Talk as a sailor does."), message("user", "Greet me.")]},
        "message",
    ),
    "tool calling": (
        False,
        {"input": [message("user", "Will it rain in Oslo?")], "tools": [FORECAST]},
        "function_call",
    ),
    "tool calling streaming": (
        True,
        {"input": [message("user", "Will it rain in Oslo?")], "tools": [FORECAST]},
        "function_call",
    ),
    "multi turn": (
        False,
        {
            "input": [
                message("user", "I am Bo."),
                message("assistant", "Hello Bo, what shall we do?"),
                message("user", "Who am I?"),
            ]
        },
        "message",
    ),
}


@pytest.fixture(scope="module")
def post(tiny_pair):
    with mock_stack(tiny_pair, served_model_name="m", workers={"script": SCRIPT}) as stack:
        yield lambda body: call(f"{stack.url}/v1/responses", {"model": "m"} | body)


@pytest.mark.parametrize("case", CASES)
def test_a_published_case_passes(post, case):
    stream, body, kind = CASES[case]
    answer = post(body | {"stream": stream})
    assert answer.status == 200, answer.body
    if stream:
        events = [json.loads(data) for data in re.findall(rb"^data: (.*)$", answer.body, re.MULTILINE)]
        for event in events:
            EVENT.validate_python(event, strict=True)
        response = events[-1]["response"]
        types = [event["type"] for event in events]
        delta, done = PARTS[kind]
        assert types[:2] == ["response.created", "response.in_progress"]
        assert types[-1] == "response.completed"
        assert types.index("response.output_item.added") < types.index(delta) < types.index(done)
        assert types.index(done) < types.index("response.output_item.done")
        items = [event["item"]["type"] for event in events if event["type"].startswith("response.output_item")]
        assert items == [kind, kind]
    else:
        response = json.loads(answer.body)
    jsonschema.validate(response, RESPONSE)
    assert [item["type"] for item in response["output"]] == [kind]


def test_the_published_case_with_an_image_is_refused_by_name(post):
    image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    answer = post({"input": [message("user", [{"type": "input_text", "text": "What is it?"}, image])]})
    assert answer.status == 400
    error = json.loads(answer.body)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "input[0].content[1].type")
    assert "input_image" in error["message"]
