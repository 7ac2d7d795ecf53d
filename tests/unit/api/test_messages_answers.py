"""Tests what the Messages API's writer makes of an answer: its events one by one, and that the whole is the same."""

import json
import math
from functools import reduce

import pytest

from overfill.api.messages.answers import MessageWriter
from overfill.api.messages.errors import THREAD_UNSUPPORTED, error_body
from overfill.api.opaque_reasoning import decode_reasoning, encode_reasoning
from overfill.api.openai.errors import ApiError
from overfill.api.translation import Served
from overfill.routing.answer import AnswerDelta, joined
from overfill.v1.common_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, FINISH_REASON_TOOL_CALLS, Usage
from overfill.v1.inference_pb2 import Accepted, Finished, ToolCallDelta

SERVED = Served("msg_1", "m", {"name": "p"})
ACCEPTED = Accepted(prompt_tokens=9, max_tokens=50, seed=7)


def part(text="", reasoning="", calls=()):
    return AnswerDelta(0, [1], text=text, reasoning=reasoning, tool_calls=calls)


def call(index, name="", arguments=""):
    return ToolCallDelta(index=index, id=f"call_{index}" if name else "", name=name, arguments=arguments)


def finished(reason=FINISH_REASON_STOP, stop="", **counts):
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "cached_tokens": 4,
        "peer_tokens": 2,
        "disk_tokens": 1,
    } | counts
    return Finished(reason=reason, stop=stop, usage=Usage(**usage))


def writer(stream, max_tokens=50, hide_thinking=False):
    return MessageWriter(SERVED, max_tokens=max_tokens, hide_thinking=hide_thinking, stream=stream)


def streamed(parts, end, **settings):
    """The data of the events; each event has the name of its type."""
    made = writer(True, **settings)
    data = made.begin(ACCEPTED, 4) + b"".join(made.delta(each) for each in parts) + made.end(end)
    events = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        name, _, line = event.partition("\n")
        events.append(json.loads(line.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def whole(parts, end, **settings):
    made = writer(False, **settings)
    assert made.begin(ACCEPTED, 4) + made.delta(joined(parts)) == b""
    return json.loads(made.whole(end))


def put_together(events):
    """The message that a client makes of the events, as Anthropic's SDK does."""
    message, arguments = events[0]["message"], {}
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            continue
        if event["type"] == "message_delta":
            message |= event["delta"] | {"overfill": event["overfill"]}
            message["usage"] |= event["usage"]
        if event["type"] != "content_block_delta":
            continue
        assert event["index"] == len(message["content"]) - 1
        block, delta = message["content"][-1], event["delta"]
        match delta["type"]:
            case "input_json_delta":
                arguments[event["index"]] = arguments.get(event["index"], "") + delta["partial_json"]
            case "signature_delta":
                block["signature"] = delta["signature"]
            case kind:
                block[kind.removesuffix("_delta")] += delta[kind.removesuffix("_delta")]
    for index, text in arguments.items():
        message["content"][index]["input"] = json.loads(text)
    return message


TEXT = [part("It "), part(), part('is "é"\n')]
THOUGHT = [part(reasoning="Hm"), part("It", "m."), part(" is")]
CALLS = [
    part("I read."),
    part(calls=[call(0, "read"), call(0, arguments='{"a')]),
    part(calls=[call(0, arguments='":1}'), call(1, "edit", "{}")]),
    part(calls=[call(2, "run")]),
]


@pytest.mark.parametrize("hide_thinking", [False, True])
@pytest.mark.parametrize(
    ("parts", "end"),
    [
        ([], finished()),
        (TEXT, finished()),
        (THOUGHT, finished(reasoning_tokens=3)),
        (THOUGHT + CALLS, finished(FINISH_REASON_TOOL_CALLS)),
        (CALLS, finished(FINISH_REASON_TOOL_CALLS)),
        ([part(reasoning="Hm")], finished(FINISH_REASON_LENGTH)),
    ],
)
def test_what_a_client_puts_together_of_a_stream_is_the_whole(parts, end, hide_thinking):
    events = streamed(parts, end, hide_thinking=hide_thinking)
    assert put_together(events) == whole(parts, end, hide_thinking=hide_thinking)
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")


def test_the_events_of_a_stream():
    assert [
        (e["type"], e.get("index"), e.get("delta")) for e in streamed(THOUGHT[:2] + CALLS[1:3], finished())[1:-1]
    ] == [
        ("content_block_start", 0, None),
        ("content_block_delta", 0, {"type": "thinking_delta", "thinking": "Hm"}),
        ("content_block_delta", 0, {"type": "thinking_delta", "thinking": "m."}),
        ("content_block_delta", 0, {"type": "signature_delta", "signature": encode_reasoning()}),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        ("content_block_delta", 1, {"type": "text_delta", "text": "It"}),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, None),
        ("content_block_delta", 2, {"type": "input_json_delta", "partial_json": '{"a'}),
        ("content_block_delta", 2, {"type": "input_json_delta", "partial_json": '":1}'}),
        ("content_block_stop", 2, None),
        ("content_block_start", 3, None),
        ("content_block_delta", 3, {"type": "input_json_delta", "partial_json": "{}"}),
        ("content_block_stop", 3, None),
        ("message_delta", None, {"stop_reason": "end_turn", "stop_sequence": None}),
    ]


def test_the_first_and_the_last_event():
    first, *_, last, _ = streamed(TEXT, finished(reasoning_tokens=2))
    counts = {"input_tokens": 5, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4}
    assert first["message"] == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": counts | {"output_tokens": 0, "output_tokens_details": {"thinking_tokens": 0}},
    }
    assert last["usage"] == counts | {"output_tokens": 5, "output_tokens_details": {"thinking_tokens": 2}}
    assert (last["overfill"]["pair"], last["overfill"]["seed"]) == ({"name": "p"}, 7)
    assert last["overfill"]["cached_tokens"] == {"memory": 1, "peer": 2, "disk": 1}


def test_hidden_thinking_comes_back_in_the_encode_reasoning():
    (block, *_) = whole(THOUGHT, finished(), hide_thinking=True)["content"]
    assert block["thinking"] == ""
    assert decode_reasoning(block["signature"]) == "Hmm."
    assert all("Hm" not in str(event) for event in streamed(THOUGHT, finished(), hide_thinking=True))
    for foreign in ("", "b3RoZXI=", "not base64", "é", encode_reasoning()[:-1], "b3ZlcmZpbGz/"):
        assert decode_reasoning(foreign) == ""


@pytest.mark.parametrize(
    ("max_tokens", "end", "reason"),
    [
        (50, finished(), ("end_turn", None)),
        (50, finished(stop="END"), ("stop_sequence", "END")),
        (50, finished(FINISH_REASON_LENGTH), ("max_tokens", None)),
        (51, finished(FINISH_REASON_LENGTH), ("model_context_window_exceeded", None)),
        (51, finished(), ("end_turn", None)),
        (50, finished(FINISH_REASON_TOOL_CALLS), ("tool_use", None)),
        (0, finished(), ("max_tokens", None)),
    ],
)
def test_the_reason_for_which_an_answer_stopped(max_tokens, end, reason):
    message = whole(TEXT, end, max_tokens=max_tokens)
    assert (message["stop_reason"], message["stop_sequence"]) == reason
    if not max_tokens:  # the prompt was read, and no answer is asked for
        assert (message["content"], message["usage"]["output_tokens"]) == ([], 0)
        assert put_together(streamed(TEXT, end, max_tokens=0)) == message


@pytest.mark.parametrize(
    ("arguments", "input"),
    [
        ('{"a":[1,{"b":"c"}]}', {"a": [1, {"b": "c"}]}),
        ('{"a":1,"b":"cut by max_tok', {"a": 1}),
        ("{", {}),
        ("", {}),
        ('{"a":"\\ud800x\\ud83d\\ude00\\\\ud83d"}', {"a": "?x😀\\ud83d"}),
        ('{"a":"\\ud800', {}),
        ('{"a":-1e999}', {"a": -math.inf}),  # JSON text that Python's encoder would change
        ('{"a":-1e999,"b":"cut', {"a": None}),
        ('{"a":' + 300 * "[" + 300 * "]" + "}", {"a": reduce(lambda inner, _: [inner], range(299), [])}),
        ('{"a":' + 9999 * "[" + 9999 * "]" + "}", {}),
    ],
)
def test_input_of_a_call_is_an_object_as_far_as_it_goes(arguments, input):
    (block,) = whole([part(calls=[call(0, "read", arguments)])], finished(FINISH_REASON_LENGTH))["content"]
    assert block == {"type": "tool_use", "id": "call_0", "name": "read", "input": input}


def test_a_long_number_in_an_input_stays_as_it_is():
    number = b"9" * 5000
    made = writer(False)
    made.delta(part(calls=[call(0, "read", f'{{"a":{number.decode()}}}')]))
    assert b'"input":{"a":%b}}' % number in made.whole(finished())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (408, "timeout_error"),
        (413, "request_too_large"),
        (415, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "api_error"),
        (504, "timeout_error"),
    ],
)
def test_errors_have_anthropic_s_form(status, kind):
    error = ApiError(status, "x" * 5000)
    assert error_body(error, "req_1") == {
        "type": "error",
        "error": {"type": kind, "message": f"{'x' * 2048}…"},
        "request_id": "req_1",
    }
    name, data = writer(True).fail(error).decode().removesuffix("\n\n").split("\n")
    assert (name, json.loads(data.removeprefix("data: "))) == ("event: error", error_body(error, "msg_1"))


def test_an_error_about_threads_has_the_code_that_clients_look_for():
    error = ApiError(400, "no threads", code=THREAD_UNSUPPORTED)
    assert error_body(error, "req_1")["error"]["details"] == {"error_code": THREAD_UNSUPPORTED, "unsupported": []}


def test_a_ping_is_an_event_of_its_own():
    assert writer(True).ping() == b'event: ping\ndata: {"type":"ping"}\n\n'
