"""Tests how answers become items and events of the Responses API, however their parts are divided."""

import json
import math
import random

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from overfill.api.opaque_reasoning import encode_reasoning
from overfill.api.openai.errors import ApiError
from overfill.api.openai.parse import parse
from overfill.api.responses.input_text import InputText
from overfill.api.responses.schema import ResponsesRequest
from overfill.api.responses.translate import responses
from overfill.api.translation import Served
from overfill.routing.answer import AnswerDelta
from overfill.v1 import common_pb2, inference_pb2

EVENT = TypeAdapter(ResponseStreamEvent)
ACCEPTED = inference_pb2.Accepted(seed=7, prompt_tokens=5)
USAGE = common_pb2.Usage(prompt_tokens=5, completion_tokens=9, cached_tokens=4, reasoning_tokens=3)
STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [
    {"type": "function", "name": "weather", "parameters": CITY},
    {"type": "custom", "name": "patch"},
    {"type": "namespace", "name": "mcp__fs", "description": "", "tools": [
        {"type": "function", "name": "read", "parameters": CITY}, {"type": "custom", "name": "patch"}]},
    {"type": "web_search"},
]  # fmt: skip


def writer(**fields):
    body = {"model": "m", "input": "Hi", "tools": TOOLS} | fields
    made = responses(parse(ResponsesRequest, json.dumps(body).encode()), "resp_1")
    return made.writer(Served("resp_1", "m", {"name": "tiny"}))


def delta(text="", reasoning="", calls=()):
    return AnswerDelta(0, [1], text=text, reasoning=reasoning, tool_calls=calls)


def part(index, arguments="", name="", id=""):
    return inference_pb2.ToolCallDelta(index=index, id=id, name=name, arguments=arguments)


def call(index, name, arguments):
    return delta(calls=[part(index, name=name, id=f"call_{index}"), part(index, arguments)])


def finished(reason=STOP):
    return inference_pb2.Finished(reason=reason, usage=USAGE)


def events(data):
    """Returns the events of a stream, checked by the SDK's types."""
    found = []
    for event in data.decode().split("\n\n")[:-1]:
        first, second = event.split("\n")
        message = json.loads(second.removeprefix("data: "))
        assert first == f"event: {message['type']}"
        if message.get("response", {}).get("error") is None:  # the SDK does not list all codes
            EVENT.validate_python(message, strict=True)
        found.append(message)
    return found


def stream(deltas, reason=STOP, **fields):
    made = writer(**fields)
    data = made.begin(ACCEPTED, 0) + b"".join(map(made.delta, deltas)) + made.end(finished(reason))
    return events(data)


def whole(deltas, reason=STOP, **fields):
    made = writer(**fields)
    made.begin(ACCEPTED, 0)
    for each in deltas:
        made.delta(each)
    response = json.loads(made.whole(finished(reason)))
    Response.model_validate(response, strict=True)
    return response


def item(kind, id, status="completed", **more):
    return {"id": f"{id}_resp_1_{more.pop('index', 0)}", "type": kind, "status": status, **more}


def text(text, index=0, status="completed"):
    content = [{"type": "output_text", "annotations": [], "logprobs": [], "text": text}]
    return item("message", "msg", status, index=index, role="assistant", content=content)


def reasoning(text, status="completed"):
    return item("reasoning", "rs", status, summary=[], content=[{"type": "reasoning_text", "text": text}])


def function(arguments, name="weather", index=0, number=0, status="completed", **more):
    fields = {"call_id": f"call_{number}", "name": name, "arguments": arguments, **more}
    return item("function_call", "fc", status, index=index, **fields)


def custom(text, index=0, number=0, status="completed", **more):
    fields = {"call_id": f"call_{number}", "name": "patch", "input": text, **more}
    return item("custom_tool_call", "ctc", status, index=index, **fields)


PARIS = '{"city":"Paris"}'
PATCH = json.dumps({"input": '*** "a"\n\t\\é 😀'})
ANSWERS = {
    "text": ([delta("Hi"), delta(" there")], STOP, [text("Hi there")]),
    "nothing": ([], STOP, [text("")]),
    "nothing, cut": ([], LENGTH, []),
    "text, cut": ([delta("Hi")], LENGTH, [text("Hi", status="incomplete")]),
    "reasoning and text": ([delta(reasoning="Hm"), delta(reasoning=" so"), delta("Hi")], STOP,
        [reasoning("Hm so"), text("Hi", 1)]),
    "reasoning and text at once": ([delta("Hi", "Hm")], STOP, [reasoning("Hm"), text("Hi", 1)]),
    "reasoning, cut": ([delta(reasoning="Hm")], LENGTH, [reasoning("Hm", "incomplete")]),
    "calls": ([delta("I look."), call(0, "weather", PARIS), call(1, "mcp__fs__read", PARIS)], STOP,
        [text("I look."), function(PARIS, index=1),
            function(PARIS, "read", index=2, number=1, namespace="mcp__fs")]),
    "a call, cut": ([call(0, "weather", '{"ci')], LENGTH, [function('{"ci', status="incomplete")]),
    "custom calls": ([call(0, "patch", PATCH), call(1, "mcp__fs__patch", '{"input": ""}')], STOP,
        [custom('*** "a"\n\t\\é 😀'), custom("", 1, 1, namespace="mcp__fs")]),
    "a custom call, cut inside an escape": ([call(0, "patch", '{"input":"a\\ud8')], LENGTH,
        [custom("a", status="incomplete")]),
    "text after a call": ([call(0, "weather", PARIS), delta("Well")], STOP, [function(PARIS), text("Well", 1)]),
    "a tool that was not offered": ([call(0, "other", "{}")], STOP, [function("{}", "other")]),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERS)
def test_items_of_an_answer_streamed_and_whole(case):
    deltas, reason, items = ANSWERS[case]
    made = stream(deltas, reason)
    status = "incomplete" if reason == LENGTH else "completed"
    assert [event["sequence_number"] for event in made] == list(range(len(made)))
    assert [made[0]["type"], made[1]["type"], made[-1]["type"]] == [
        "response.created",
        "response.in_progress",
        f"response.{status}",
    ]
    last = made[-1]["response"]
    assert last["output"] == items
    assert last["status"] == status
    assert last["incomplete_details"] == ({"reason": "max_output_tokens"} if reason == LENGTH else None)
    alone = whole(deltas, reason)
    for times in ("created_at", "completed_at"):
        assert (alone.pop(times) is None) == (last.pop(times) is None)
    assert alone == last
    assert made[0]["response"]["output"] == []
    assert made[0]["response"]["status"] == "in_progress"


@pytest.mark.parametrize("case", ANSWERS)
def test_the_events_of_an_item_add_up_to_it(case):
    deltas, reason, items = ANSWERS[case]
    texts = {"message": "text", "reasoning": "text", "function_call": "arguments", "custom_tool_call": "input"}
    made = stream(deltas, reason)
    for index, done in enumerate(items):
        own = [event for event in made if event.get("output_index") == index]
        kinds = [event["type"].removeprefix("response.") for event in own]
        inner = "content" in done
        begin = ["output_item.added", "content_part.added"][: 1 + inner]
        assert kinds[: 1 + inner] == begin
        assert kinds[-1] == "output_item.done"
        assert own[-1]["item"] == done
        field = texts[done["type"]]
        full = done["content"][0]["text"] if inner else done[field]
        assert own[0]["item"] == done | {"status": "in_progress"} | ({"content": []} if inner else {field: ""})
        assert "".join(event["delta"] for event in own if event["type"].endswith(".delta")) == full
        [last] = [event for event in own if event["type"].endswith((f"{field}.done", "arguments.done", "input.done"))]
        assert last[field] == full
        assert {event["item_id"] for event in own if "item_id" in event} == {done["id"]}
        assert {event["content_index"] for event in own if "content_index" in event} <= {0}


def test_the_response_repeats_the_request_and_tells_what_was_used():
    fields = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "max_output_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "name": "weather"},
    }
    made = whole([delta("Hi")], text={"verbosity": "low"}, reasoning={"effort": "high", "summary": "auto"}, **fields)
    assert {name: made[name] for name in fields} == fields
    assert made["tools"] == TOOLS[:3], "tools that were left out are not there"
    assert made["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert made["reasoning"] == {"effort": "high", "summary": None}
    assert made["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 14,
    }
    assert (made["id"], made["model"], made["store"], made["truncation"]) == ("resp_1", "m", False, "disabled")
    assert (made["overfill"]["pair"], made["overfill"]["seed"]) == ({"name": "tiny"}, 7)


def test_a_schema_is_repeated_under_its_name():
    form = {"type": "json_schema", "name": "n", "schema": CITY, "strict": True}
    assert whole([], text={"format": form})["text"]["format"] == form


def test_reasoning_has_what_codex_sends_back_only_if_the_client_asks():
    [made, _] = whole([delta("Hi", "Hm é")], include=["reasoning.encrypted_content"])["output"]
    assert made["encrypted_content"] == encode_reasoning("Hm é")
    *_, last = stream([delta("Hi", "Hm")], include=["reasoning.encrypted_content"])
    assert last["response"]["output"][0]["encrypted_content"] == encode_reasoning("Hm")


FAILURES = [
    (ApiError(429, "no room", code="rate_limit_exceeded", retry_after=3), "rate_limit_exceeded", "try again in 3 s."),
    (ApiError(400, "too long", code="context_length_exceeded"), "context_length_exceeded", "too long"),
    (ApiError(503, "gone", code="service_unavailable", retry_after=1), "server_error", "gone"),
]


@pytest.mark.parametrize(("error", "code", "words"), FAILURES)
def test_a_failure_keeps_what_was_written(error, code, words):
    made = writer()
    made.begin(ACCEPTED, 0)
    made.delta(delta("Hi"))
    *_, done, failed = events(made.fail(error))
    assert done["item"] == text("Hi", status="incomplete")
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["output"] == [done["item"]]
    assert failed["response"]["error"]["code"] == code
    assert words in failed["response"]["error"]["message"]


def test_a_ping_is_an_event_that_every_client_knows():
    made = writer()
    made.begin(ACCEPTED, 0)
    made.delta(delta("Hi"))
    [ping] = events(made.ping())
    assert (ping["type"], ping["sequence_number"]) == ("response.in_progress", 5)
    assert ping["response"]["output"] == []


TEXTS = [
    "",
    "plain",
    "\\ud83d",
    'q " \\ / \n\t\b\f\r',
    "é\u2028\u0000",
    "😀😀",
    "a\ud83d",
    "\ude00b",
    "\ud83dx\ud83d\ude00",
]


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("value", TEXTS)
def test_the_text_of_a_custom_tool_does_not_depend_on_the_pieces(value, ascii):
    arguments = ' { "input" : ' + json.dumps(value, ensure_ascii=ascii) + " }"
    if not ascii:
        arguments = arguments.encode("utf-8", "replace").decode()
    expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in json.loads(arguments)["input"])
    rng = random.Random(1)
    for pieces in (len(arguments), *([3] * 30)):
        reader, made, rest = InputText(), "", arguments
        while rest:
            size = 1 if pieces == len(arguments) else rng.randint(1, 5)
            made += reader.push(rest[:size])
            rest = rest[size:]
        assert made == expected
        assert reader.push("more") == ""


def test_numbers_that_json_does_not_have_are_null_where_the_response_repeats_them():
    made = writer(tools=[{"type": "function", "name": "f", "x": math.nan, "y": math.inf}])  # as Python writes them
    assert b'"x":null,"y":null}' in made.whole(finished())


@pytest.mark.parametrize("arguments", ["", "{}", '{"input": 5}', '{"x": "y"}', "[1]", '{"input": "a\\x"}'])
def test_arguments_of_another_form_are_no_error(arguments):
    reader = InputText()
    assert reader.push(arguments) + reader.push("z" * 100) in ("", "a")
    assert reader.push('{"input": "b"}') == "", "it does not read the rest again and again"


def test_a_delta_of_many_calls_does_not_copy_its_events_again_and_again():
    """With time in the square of the calls, this test runs into its time limit."""
    made = writer()
    made.begin(ACCEPTED, 0)
    many = [part(index, PARIS, "weather", f"call_{index}") for index in range(30_000)]
    data = made.delta(delta(calls=many))
    assert data.count(b"event: response.output_item.added") == 30_000
