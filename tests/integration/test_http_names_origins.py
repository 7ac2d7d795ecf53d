"""Tests the names of a router's model, the web origins that may call it, and the redirect of ``/``."""

from __future__ import annotations

import json

import openai
import pytest
from http_calls import bearer, call
from mocks import mock_stack

from overfill.api import key_file as keys
from overfill.client import Client, ModelNotFound, SamplingParams
from overfill.settings.config import RouterConfig

PAGE = "https://chat.example.org"
ASKING = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}


@pytest.fixture(scope="module")
def named(tiny_pair):
    with mock_stack(tiny_pair, served_model_name="tiny-chat, gpt-4o-mini") as stack:
        yield stack


@pytest.fixture(scope="module")
def guarded(tiny_pair, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    key = keys.create(file, "page")
    with mock_stack(tiny_pair, allowed_origins=f"{PAGE},http://localhost:3000", api_keys=file) as stack:
        yield stack, key


def ask(stack, method, path, headers, body=None):
    return call(f"{stack.url}{path}", body, headers, method)


def test_every_served_name_may_be_asked_for_and_answers_bear_the_first(named):
    with openai.OpenAI(base_url=f"{named.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny-chat", "gpt-4o-mini"]
        for name in ("tiny-chat", "gpt-4o-mini"):
            assert client.models.retrieve(name).id == name
            assert client.completions.create(model=name, prompt="x", max_tokens=1).model == "tiny-chat"
        with pytest.raises(openai.NotFoundError, match="'tiny-chat', 'gpt-4o-mini'"):
            client.completions.create(model="tiny", prompt="x", max_tokens=1)
    with Client(named.grpc) as client:
        assert [model.name for model in client.models()] == ["tiny-chat", "gpt-4o-mini"]
        one = SamplingParams(max_tokens=1)
        assert client.generate("x", model="gpt-4o-mini", sampling=one).model == "tiny-chat"
        with pytest.raises(ModelNotFound):
            client.generate("x", model="tiny", sampling=one)


def test_the_root_leads_to_the_page_and_needs_no_key(named, guarded):
    for stack in (named, guarded[0]):
        status, headers, _ = ask(stack, "GET", "/", {})
        assert (status, headers["location"]) == (307, "/ui")


def test_a_page_that_is_allowed_asks_for_leave_without_a_key_and_then_with_one(guarded):
    stack, key = guarded
    status, headers, _ = ask(stack, "OPTIONS", "/v1/chat/completions", {"origin": PAGE} | ASKING)
    assert (status, headers["access-control-allow-origin"]) == (200, PAGE)
    assert "POST" in headers["access-control-allow-methods"]
    assert {"authorization", "x-stainless-os"} <= set(headers["access-control-allow-headers"].split(","))
    assert "access-control-allow-credentials" not in headers

    body = {"model": stack.router.cores[0].handler.tiers.model, "prompt": "x", "max_tokens": 1}
    shown = {"origin": PAGE}
    status, headers, _ = ask(stack, "POST", "/v1/completions", shown | bearer(key), body)
    assert (status, headers["access-control-allow-origin"]) == (200, PAGE)
    assert "origin" in headers["vary"].lower()
    assert "x-request-id" in headers["access-control-expose-headers"]
    status, headers, _ = ask(stack, "POST", "/v1/completions", shown, body)
    assert (status, headers["access-control-allow-origin"]) == (401, PAGE), "the page may read the reason"


def test_a_page_of_the_internet_may_ask_a_stack_in_a_private_network(guarded):
    stack, _ = guarded
    asking = ASKING | {"access-control-request-private-network": "true"}
    status, headers, _ = ask(stack, "OPTIONS", "/v1/chat/completions", {"origin": PAGE} | asking)
    assert (status, headers["access-control-allow-private-network"]) == (200, "true")
    assert ask(stack, "OPTIONS", "/v1/chat/completions", {"origin": "https://evil.example"} | asking)[0] == 400


def test_pages_of_other_origins_are_refused(guarded, named):
    stack, key = guarded
    other = {"origin": "https://evil.example"} | bearer(key)
    status, headers, _ = ask(stack, "OPTIONS", "/v1/models", other | ASKING)
    assert status == 400
    assert "access-control-allow-origin" not in headers
    status, headers, body = ask(stack, "GET", "/v1/models", other)
    assert (status, json.loads(body)["error"]["code"]) == (403, "foreign_origin")
    assert "access-control-allow-origin" not in headers
    for method in ("OPTIONS", "GET"):  # by default no origin is allowed
        status, headers, body = ask(named, method, "/v1/models", {"origin": PAGE} | ASKING)
        assert (status, b"--allowed-origins" in body) == (403, True)
        assert "access-control-allow-origin" not in headers


def test_a_star_allows_every_origin_but_no_credentials(tiny_pair):
    with mock_stack(tiny_pair, allowed_origins="*", prefill=0, decode=0) as stack:
        for origin in (PAGE, "null"):
            for method in ("OPTIONS", "GET"):
                status, headers, _ = ask(stack, method, "/v1/models", {"origin": origin} | ASKING)
                assert (status, headers["access-control-allow-origin"]) == (200, "*")
                assert "access-control-allow-credentials" not in headers
        # Other DNS names of this address are still refused.
        assert ask(stack, "GET", "/v1/models", {"origin": PAGE, "host": "evil.example"})[0] == 403


@pytest.mark.parametrize("origin", ["chat.example.org", "https://chat.example.org/", "https://a.org/chat", "null"])
def test_an_invalid_origin_is_refused_at_start(origin, capsys):
    with pytest.raises(SystemExit):
        RouterConfig.parse(["--pair=p", f"--allowed-origins={origin}"])
    assert "--allowed-origins" in capsys.readouterr().err


def test_origins_are_written_as_browsers_send_them():
    given = (
        "HTTPS://A.org, *, https://b.org:443, http://[::1]:80, http://c.org:443, https://d.org:80, http://e.org:8080"
    )
    assert RouterConfig.parse(["--pair=p", f"--allowed-origins={given}"]).allowed_origins == (
        "https://a.org",
        "*",
        "https://b.org",
        "http://[::1]",
        "http://c.org:443",
        "https://d.org:80",
        "http://e.org:8080",
    )
