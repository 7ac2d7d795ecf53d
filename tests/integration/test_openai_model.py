"""Tests that answers of the default pair over the OpenAI endpoint always fit their schemas and tools."""

from __future__ import annotations

import concurrent.futures
import itertools
import json

import jsonschema
import openai
import pytest
from stacks import running_stack

from overfill.pair.store import resolve_pair

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(1800)]

WORD = {"type": "string", "minLength": 1, "maxLength": 24}
LINE = {"type": "string", "maxLength": 60}


def record(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def many(items, most):
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}


SCHEMAS = {
    "person": record(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 130}, hobbies=many(WORD, 3)),
    "book": record(title=LINE, year={"type": "integer", "minimum": 1400, "maximum": 2030}, tags=many(WORD, 4)),
    "recipe": record(dish=WORD, steps=many(LINE, 3), vegetarian={"type": "boolean"}),
    "review": record(stars={"enum": [1, 2, 3, 4, 5]}, summary=LINE, mood={"enum": ["good", "bad", "mixed"]}),
    "place": record(
        city=WORD, at=record(lat={"type": "number", "minimum": -90, "maximum": 90, "multipleOf": 0.5}), note=LINE
    ),
    "event": record(what=WORD, when={"type": "string", "format": "date"}, guests=many(record(name=WORD), 2)),
    "colour": record(name=WORD, code={"type": "string", "pattern": "^#[0-9a-f]{6}$"}),
    "answer": record(reasoning=LINE, answer={"anyOf": [{"type": "boolean"}, WORD, {"type": "null"}]}),
    "list": many(record(word=WORD, length={"type": "integer", "minimum": 1, "maximum": 40}), 3),
    "tree": {"$ref": "#/$defs/node", "$defs": {"node": record(label=WORD, children=many(record(label=WORD), 2))}},
}
TOPICS = [
    "a fisherman from Iceland",
    "the history of tea",
    "a rainy Sunday",
    "Grüße aus Köln",
    "ein Roboter, der träumt",
    "东京的春天",
    'a "quoted" back\\slash',
    "the number 42",
    "an empty box",
    "whales",
]
TOOLS = [
    ("get_weather", "Tells the weather in a city.", record(city=WORD, unit={"enum": ["celsius", "fahrenheit"]})),
    ("search", "Searches the web.", record(query=LINE, results={"type": "integer", "minimum": 1, "maximum": 9})),
    ("send_mail", "Sends a mail.", record(to=many(WORD, 2), subject=LINE, urgent={"type": "boolean"})),
    ("now", "Tells the time.", {"type": "object", "properties": {}, "additionalProperties": False}),
]
CHOICES = ["required", "auto", {"type": "function", "function": {"name": "search"}}, "required", "required"]


@pytest.fixture(scope="module")
def client():
    settings = {"dtype": None, "kv_memory": "256MiB", "max_model_len": "2048", "http": 0}
    with running_stack(resolve_pair("default"), **settings) as (stack, _):
        client = openai.OpenAI(
            base_url=stack.spec.openai_urls(stack.placed.addresses)[0], api_key="none", max_retries=0, timeout=600
        )
        with client:
            yield client


def ask_all(ask, questions):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda question: ask(*question), questions))


def test_100_of_100_answers_fit_their_schema(client):
    model = client.models.list().data[0].id

    def ask(number, name, topic):
        schema = SCHEMAS[name]
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Write JSON about {topic}, as a {name}."}],
            response_format={"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}},
            temperature=[0, 0.7, 1.0, 1.5][number % 4],
            seed=number,
            max_tokens=500,
        )
        jsonschema.validate(json.loads(answer.choices[0].message.content), schema)
        return answer.choices[0].finish_reason

    pairs = itertools.product(SCHEMAS, TOPICS)
    reasons = ask_all(ask, [(number, name, topic) for number, (name, topic) in enumerate(pairs)])
    print(f"{reasons.count('stop')} of {len(reasons)} answers fit their schema")
    assert reasons == ["stop"] * 100


def test_100_of_100_tool_calls_parse(client):
    model = client.models.list().data[0].id
    tools = [
        {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}
        for name, about, schema in TOOLS
    ]
    schemas = {name: schema for name, _, schema in TOOLS}

    def ask(number, topic, stream):
        fields = {
            "model": model,
            "messages": [{"role": "user", "content": f"Use a function to find out about {topic}."}],
            "tools": tools,
            "tool_choice": CHOICES[number % len(CHOICES)],
            "temperature": [0, 0.8, 1.2][number % 3],
            "seed": number,
            "max_tokens": 300,
            "parallel_tool_calls": False,
        }
        if stream:
            calls, reason = streamed(client, fields)
        else:
            choice = client.chat.completions.create(**fields).choices[0]
            calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
            reason = choice.finish_reason
        if reason == "length":  # text that reached max_tokens
            assert fields["tool_choice"] == "auto"
            return 0
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])
        assert calls or fields["tool_choice"] == "auto", "a call was required"
        assert (reason == "tool_calls") == bool(calls)
        return len(calls)

    calls = 0
    for number in itertools.count(step=8):
        questions = [(n, TOPICS[n % len(TOPICS)], n % 2) for n in range(number, number + 8)]
        calls += sum(ask_all(ask, questions))
        if calls >= 100:
            break
    print(f"{calls} of {calls} tool calls parse ({number + 8} answers)")


def streamed(client, fields):
    calls, reason = [], None
    with client.chat.completions.create(**fields, stream=True) as stream:
        for chunk in stream:
            choice = chunk.choices[0]
            for part in choice.delta.tool_calls or ():
                if part.function.name:
                    assert part.id
                    calls.append((part.function.name, ""))
                calls[-1] = (calls[-1][0], calls[-1][1] + (part.function.arguments or ""))
            reason = choice.finish_reason or reason
    return calls, reason
