"""Tests to which session a request belongs, by the headers and fields that agents send."""

import json

import pytest

from overfill.api.messages.schema import MessagesRequest
from overfill.api.openai.schema import ChatRequest, CompletionRequest
from overfill.api.sessions import MAX_SESSION_LENGTH, session_name, session_of, session_of_user

UUID = "01a2296f-5e5a-7eb3-8ecc-604502201fe8"
LONG = json.dumps({"session_id": UUID, "more": "x" * 4096})
OTHER = "f9cfb2f5-3bc9-4ea1-a8e9-bbcee5a551bb"


@pytest.mark.parametrize(
    ("headers", "named", "session"),
    [
        ({}, None, ""),
        ({}, "", ""),
        ({}, "chat-7", "chat-7"),
        ({"x-claude-code-session-id": UUID}, OTHER, UUID),
        ({"x-claude-code-session-id": UUID, "x-claude-code-agent-id": "agent-1"}, None, UUID),
        ({"session-id": UUID, "thread-id": OTHER, "x-codex-parent-thread-id": UUID}, OTHER, UUID),
        ({"session_id": UUID, "conversation_id": UUID}, None, UUID),
        ({"x-session-id": "ses_dd69", "x-session-affinity": "ses_dd69"}, None, "ses_dd69"),
        ({"x-session-id": "ses_child", "x-parent-session-id": "ses_parent"}, None, "ses_parent"),
        ({"x-session-id": ""}, "k", "k"),
    ],
)
def test_the_session_of_a_request(headers, named, session):
    assert session_of(lambda name: headers.get(name.decode(), ""), named) == session


@pytest.mark.parametrize(
    "odd", ["a b", "\u00fc", "x" * (MAX_SESSION_LENGTH + 1), "\ud800", "\n", "a\0b", "y" * 1_000_000]
)
def test_any_other_name_is_hashed(odd):
    name = session_name(odd)
    assert session_name(name) == name != odd
    assert len(name) <= MAX_SESSION_LENGTH
    assert name == session_name(odd) != session_name(odd + "x")


@pytest.mark.parametrize(
    ("user_id", "session"),
    [
        (json.dumps({"device_id": "60fc", "account_uuid": "", "session_id": UUID}), UUID),
        (f"user_60fcaf_account__session_{UUID}", UUID),
        ("user-17", "user-17"),
        ('{"session_id": 7}', '{"session_id": 7}'),
        ('{"session_id": ""}', '{"session_id": ""}'),
        ("{", "{"),
        (LONG, LONG),  # it takes time to read
        ('{"a":' * 100_000, '{"a":' * 100_000),
    ],
)
def test_the_session_in_the_user_id_of_the_messages_api(user_id, session):
    assert session_of_user(user_id) == session


def test_fields_that_name_a_session():
    chat = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    for fields, session in (
        ({}, None),
        ({"session_id": "s"}, "s"),
        ({"prompt_cache_key": "k", "session_id": "s"}, "k"),
    ):
        assert ChatRequest(**chat, **fields).named_session == session
    assert CompletionRequest(model="m", prompt="x", session_id="s").named_session == "s"
    for fields, session in (({}, None), ({"metadata": {}}, None), ({"metadata": {"user_id": "u"}}, "u")):
        assert MessagesRequest(**chat, max_tokens=1, **fields).named_session == session
