"""Tests that the server accepts what popular client libraries send, and its own answers in the turn after.

``client_requests.json`` holds one request per line. Those of openai 3.57 and pydantic-ai 2.68 were recorded; the others
have the fields that their libraries document. Fields that a test sets are left out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import openai
import pytest
from mocks import mock_stack

RECORDED = json.loads(Path(__file__).with_name("client_requests.json").read_text(encoding="utf-8"))
CUTS = (1, 8, 40, 70)
"""Values of ``max_tokens`` that cut an answer before its text, in a call's name and in its arguments."""


LIBRARIES = Path(sys.prefix) / "clients"
"""Folder where ``make test-all`` installs instructor and LangChain."""
SEEDS = 8


@pytest.fixture(scope="module")
def url(tiny_pair):
    with mock_stack(tiny_pair, served_model_name="tiny") as stack:
        yield f"{stack.url}/v1"


@pytest.fixture(scope="module")
def ask(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:

        def ask(**body):
            return client.post("/chat/completions", body={"model": "tiny"} | body, cast_to=object)["choices"][0]

        yield ask


@pytest.mark.skipif(not LIBRARIES.exists(), reason="needs instructor and LangChain: make test-all installs them")
@pytest.mark.parametrize("library", ["instructor", "langchain"])
def test_client_libraries_read_objects_from_tool_calls(url, library):
    program = Path(__file__).with_name("client_libraries.py")
    run = subprocess.run(
        [sys.executable, program, library, url, "tiny", str(SEEDS)],
        env=os.environ | {"PYTHONPATH": str(LIBRARIES)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == SEEDS


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["client"])
def test_requests_of_client_libraries_are_answered_in_their_form(ask, recorded):
    body = recorded["body"]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in body.get("tools", ())}
    wanted = body.get("response_format")
    called = False
    for seed in range(6):
        choice = ask(**body, seed=seed, max_tokens=1000)
        calls = choice["message"].get("tool_calls", ())
        called |= bool(calls)
        if choice["finish_reason"] == "length":
            continue
        for call in calls:
            jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])
        if wanted and not calls:
            schema = wanted.get("json_schema", {}).get("schema", {"type": "object"})
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    assert called or not schemas, "some answers call tools"


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["client"])
@pytest.mark.parametrize("tokens", CUTS)
def test_every_answer_is_accepted_in_the_next_turn(ask, recorded, tokens):
    body = recorded["body"]
    for seed in range(3):
        message = ask(**body, seed=seed, max_tokens=tokens)["message"]
        calls = message.get("tool_calls", ())
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "Try again."} for call in calls]
        assert ask(**body | {"messages": [*body["messages"], message, *results]}, max_tokens=1)
