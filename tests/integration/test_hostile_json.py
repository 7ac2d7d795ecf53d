"""Tests JSON that clients put into text, over gRPC and HTTP: deep nesting, lone surrogates and numbers beyond JSON.

Each request is refused by the name of its field, or shows the JSON as text; none is an internal error.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from http_calls import call
from mocks import mock_stack

from overfill.request.json_text import MAX_JSON_DEPTH
from overfill.v1 import inference_pb2, inference_pb2_grpc

SHOWS_ALL = """{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function.arguments | tojson(indent=2) }}{% endfor %}
{% endfor %}{{ extra | default("") | tojson }}"""
"""A chat template that shows tools, arguments and a variable as JSON."""

USER = {"role": "user", "content": "Hi"}


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


ALLOWED = {
    "deepest": nested(MAX_JSON_DEPTH - 1),
    "pair of surrogates": '{"description": "\\ud83d\\ude00"}',
    "control": '{"description": "\\u0000"}',
}
WRONG = {
    "deep": nested(MAX_JSON_DEPTH + 1),
    "as deep as the interpreter": nested(960),
    "deeper than it": nested(50_000),
    "deep list": '{"a":' + "[" * 980 + "]" * 980 + "}",
    "high surrogate": '{"description": "\\ud800"}',
    "low surrogate": '{"properties": {"a": {"enum": ["x\\uDC00"]}}}',
    "surrogate in a key": '{"properties": {"\\ud83d": {"type": "string"}}}',
    "surrogate in a pattern": '{"properties": {"a": {"type": "string", "pattern": "\\ud800"}}}',
    "not a number": '{"default": NaN}',
    "infinite": '{"default": -Infinity}',
    "beyond a double": '{"default": 1e999}',
    "too many digits": '{"default": ' + "1" * 5000 + "}",
}


@dataclass(frozen=True)
class Place:
    """A field that holds JSON.

    Attributes:
        fields: Makes the fields of the gRPC request from the JSON.
        body: Makes the HTTP request from the JSON: path, and body as text.
        names: The field in the error over gRPC and over HTTP; None means that such JSON is shown as text.
    """

    fields: Callable[[str], dict[str, Any]]
    body: Callable[[str], tuple[str, str]]
    names: tuple[str, str] | None


def grpc_chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"chat": inference_pb2.Chat(messages=[USER, *messages], **fields)}


def http_chat(*messages: Any, **fields: str) -> tuple[str, str]:
    """A request for a chat; ``fields`` are JSON texts."""
    fields["messages"] = json.dumps([USER, *messages])
    return "/v1/chat/completions", "".join(f', "{name}": {text}' for name, text in fields.items())


def own_call(text: str) -> list[Any]:
    return [{"role": "assistant", "tool_calls": [{"id": "1", "name": "f", "arguments": text}]}]


def openai_call(text: str) -> list[Any]:
    function = {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
    return [{"role": "assistant", "tool_calls": [function]}]


def tool(text: str, strict: str) -> str:
    return f'[{{"type": "function", "function": {{"name": "f", "strict": {strict}, "parameters": {text}}}}}]'


def schema(text: str) -> dict[str, Any]:
    return {"sampling": {"grammar": {"json_schema": text}}}


PLACES = {
    "tools": Place(
        lambda text: grpc_chat(tools=[{"name": "f", "parameters": text}]),
        lambda text: http_chat(tools=tool(text, "false")),
        ("chat.tools[0].parameters", "tools"),
    ),
    "strict tools": Place(
        lambda text: grpc_chat(tools=[{"name": "f", "parameters": text, "strict": True}]),
        lambda text: http_chat(tools=tool(text, "true")),
        ("chat.tools[0].parameters", "tools"),
    ),
    "variables": Place(
        lambda text: grpc_chat(chat_template_kwargs=text),
        lambda text: http_chat(chat_template_kwargs=text),
        ("chat.chat_template_kwargs", "chat_template_kwargs"),
    ),
    "variable": Place(
        lambda text: grpc_chat(chat_template_kwargs=f'{{"extra": {text}}}'),
        lambda text: http_chat(chat_template_kwargs=f'{{"extra": {text}}}'),
        ("chat.chat_template_kwargs", "chat_template_kwargs"),
    ),
    "arguments": Place(
        lambda text: grpc_chat(*own_call(text)),
        lambda text: http_chat(*openai_call(text)),
        None,
    ),
    "schema": Place(
        lambda text: {"text": "Hi"} | schema(text),
        lambda text: ("/v1/completions", f', "prompt": "Hi", "guided_json": {json.dumps(text)}'),
        ("sampling.grammar.json_schema", "guided_json"),
    ),
    "schema beside tools": Place(
        lambda text: grpc_chat(tools=[{"name": "f"}]) | schema(text),
        lambda text: http_chat(tools=tool("{}", "false"), structured_outputs=f'{{"json": {json.dumps(text)}}}'),
        ("sampling.grammar.json_schema", "structured_outputs.json"),
    ),
}


@pytest.fixture(scope="module", params=["describes tools", "shows tools"])
def stack(request: pytest.FixtureRequest, tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stack whose chat template shows all JSON of a request, and one with the tiny pair's, which shows none."""
    pair = tiny_pair
    if request.param == "shows tools":
        pair = tmp_path_factory.mktemp("shows") / "pair"
        shutil.copytree(tiny_pair, pair)
        for file in pair.rglob("tokenizer_config.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": SHOWS_ALL}))
    with mock_stack(pair, served_model_name="tiny") as running:
        yield running


def over_grpc(stack: Any, fields: dict[str, Any]) -> tuple[str, str]:
    """Returns status and message of an answer and, for a chat, of the tokens of its prompt."""
    fields = fields | {"sampling": fields.get("sampling", {}) | {"max_tokens": 1}}
    with grpc.insecure_channel(stack.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        try:
            if "chat" in fields:
                stub.Tokenize(inference_pb2.TokenizeRequest(chat=fields["chat"]), timeout=30)
            list(stub.Generate(inference_pb2.GenerateRequest(**fields), timeout=30))
        except grpc.RpcError as error:
            return error.code().name, error.details()
    return "OK", ""


def over_http(stack: Any, path: str, fields: str) -> tuple[int, dict[str, Any]]:
    reply = call(stack.url + path, f'{{"model": "tiny", "max_tokens": 1{fields}}}'.encode())
    return reply.status, json.loads(reply.body).get("error", {})


@pytest.mark.parametrize("place", PLACES)
def test_wrong_json_is_refused_by_the_name_of_its_field(stack: Any, place: str) -> None:
    where = PLACES[place]
    for case, text in WRONG.items():
        code, message = over_grpc(stack, where.fields(text))
        status, error = over_http(stack, *where.body(text))
        if where.names is None:  # the text may be longer than the context
            assert code == "OK" or message.startswith("prompt: has "), (case, message)
            assert status == 200 or error["code"] == "context_length_exceeded", (case, error)
            continue
        assert code == "INVALID_ARGUMENT", (case, message)
        assert message.startswith(where.names[0]), (case, message)
        assert status == 400, (case, error)
        # A body that is no JSON has no fields.
        assert error["code"] == "invalid_json" or str(error["param"]).startswith(where.names[1]), (case, error)


@pytest.mark.parametrize("place", PLACES)
def test_unusual_json_is_not_refused_as_json(stack: Any, place: str) -> None:
    for case, text in ALLOWED.items():
        code, message = over_grpc(stack, PLACES[place].fields(text))
        assert code in ("OK", "INVALID_ARGUMENT"), (case, message)
        assert "JSON" not in message, case  # a grammar may be too complex, or a prompt too long
        status, error = over_http(stack, *PLACES[place].body(text))
        assert status in (200, 400), (case, error)
