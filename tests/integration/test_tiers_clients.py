"""Tests what clients of both protocols see of a stack with two tiers: a real router with mock workers."""

import json

import pytest
from http_calls import bearer, call
from mocks import mock_stack

from overfill.api import key_file as keys
from overfill.cli.main import main
from overfill.client import (
    AnswerPart,
    Client,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    PoolStatus,
    SamplingParams,
)

FEW = SamplingParams(max_tokens=4, seed=1)


@pytest.fixture(scope="module")
def stack(tiny_pair):
    with mock_stack(tiny_pair, tiers={"fast": tiny_pair, "default": tiny_pair}, served_model_name="m,n:o") as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack):
    with Client(stack.grpc) as client:
        yield client


def http(url, body=None, key=None):
    """Returns the status and the JSON of an answer."""
    reply = call(url, body, bearer(key) if key else {})
    return reply.status, json.loads(reply.body)


def test_the_default_tier_and_every_tier_have_a_name(stack, client):
    names = ["m", "n:o", "m:default", "m:fast", "n:o:default", "n:o:fast"]
    assert [(model.name, model.tier) for model in client.models()] == [
        (name, "fast" if name.endswith("fast") else "default") for name in names
    ]
    listed = http(f"{stack.url}/v1/models")[1]["data"]
    assert [model["id"] for model in listed] == names


@pytest.mark.parametrize(
    ("options", "tier"),
    [
        ({}, "default"),
        ({"model": "m"}, "default"),
        ({"model": "m:fast"}, "fast"),
        ({"model": "n:o:fast"}, "fast"),
        ({"tier": "fast"}, "fast"),
        ({"model": "m:fast", "tier": "fast"}, "fast"),
    ],
)
def test_the_requested_tier_answers(stack, client, options, tier):
    answer = client.generate("Hi", sampling=FEW, **options)
    assert (answer.tier, answer.parts, answer.brownout_from) == (tier, (AnswerPart(tier, 0),), None)
    assert answer.decode_worker == f"decode-{tier}-0"
    body = {"model": "m", "prompt": "Hi", "max_tokens": 4, **options}
    status, told = http(f"{stack.url}/v1/completions", body)
    assert (status, told["model"]) == (200, f"m:{tier}")
    (choice,) = told["overfill"]["choices"]
    assert (choice["tier"], choice["parts"]) == (tier, [{"tier": tier, "first_index": 0}])
    assert choice["decode_worker"] == f"decode-{tier}-0"


@pytest.mark.parametrize(
    ("options", "error", "status", "param"),
    [
        ({"tier": "full"}, ModelNotFound, 404, "model"),
        ({"model": "m:full"}, ModelNotFound, 404, "model"),
        ({"model": "m:fast", "tier": "default"}, InvalidRequest, 400, "tier"),
        ({"fallback": "full"}, InvalidRequest, 400, "fallback"),
    ],
)
def test_a_tier_that_does_not_exist_is_refused_with_the_list(stack, client, options, error, status, param):
    with pytest.raises(error, match="fast") as caught:
        client.generate("Hi", **options)
    code, told = http(f"{stack.url}/v1/completions", {"model": "m", "prompt": "Hi", **options})
    assert (code, told["error"]["param"]) == (status, param)
    assert "fast" in told["error"]["message"]
    assert str(caught.value)


def test_status_shows_each_tier(stack, client, capsys):
    status = client.status()
    assert status.tiers == {"default": PoolStatus(1, 1, "default"), "fast": PoolStatus(1, 1, "fast")}
    assert (status.pools["decode"], status.complete) == (PoolStatus(2, 2), True)
    told = http(f"{stack.url}/status")[1]
    assert told["tiers"]["fast"] == {"ready": 1, "expected": 1, "brownout": False}
    assert {worker["tier"] for worker in told["workers"]} == {None, "default", "fast"}
    assert main(["status", "--address", stack.grpc]) == 0
    (address,) = {worker.address for worker in status.workers if worker.tier == "fast"}
    table = capsys.readouterr().out
    assert "tier" in table
    assert address not in table
    assert main(["status", "--wide", "--address", stack.grpc]) == 0
    assert address in capsys.readouterr().out
    assert main(["top", "--once", "--address", stack.grpc]) == 0
    assert "decode, tier fast: mock" in capsys.readouterr().out


def test_a_command_names_its_tier(stack, capsys):
    assert main(["generate", "Hi", "--address", stack.grpc, "--max-tokens=4", "--tier=fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == [{"tier": "fast", "first_index": 0}]


def test_a_key_may_use_its_tiers_only(tiny_pair, tmp_path):
    file = tmp_path / "keys.json"
    key = keys.create(file, "cheap", tiers=["fast"])
    with mock_stack(tiny_pair, tiers={"fast": tiny_pair, "default": tiny_pair}, api_keys=file) as stack:
        with Client(stack.grpc, api_key=key) as client:
            assert client.generate("Hi", sampling=FEW, tier="fast").tier == "fast"
            with pytest.raises(PermissionDenied, match="'fast'"):
                client.generate("Hi")
            with pytest.raises(PermissionDenied, match="named as fallback"):
                client.generate("Hi", sampling=FEW, tier="fast", fallback="default")
        (listed,) = [model["id"] for model in http(f"{stack.url}/v1/models", key=key)[1]["data"]]
        name, _, tier = listed.partition(":")
        assert tier == "fast", "names that the key may not use are not listed"
        assert http(f"{stack.url}/v1/models/{listed}", key=key)[0] == 200
        status, told = http(f"{stack.url}/v1/models/{name}:default", key=key)
        assert status == 404
        assert told["error"]["message"].endswith(f"this router serves {listed!r}"), "other tiers are not named"
        status, told = http(f"{stack.url}/tokenize", {"model": "other", "prompt": "Hi"}, key)
        assert (status, "default" in told["error"]["message"]) == (404, False)
        status, told = http(f"{stack.url}/v1/completions", {"model": name, "prompt": "Hi"}, key)
        assert status == 403
        assert "'fast'" in told["error"]["message"]
