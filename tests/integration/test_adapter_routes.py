"""Tests the interfaces to a stack's adapters: their models, the routes and the command that load and unload them."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request

import pytest
from mocks import mock_stack
from peft_adapters import add_tiny_adapter
from stacks import children, idle, running_stack, wait_until

from overfill.cli.main import main
from overfill.client import Client, Incompatible, ModelNotFound, SamplingParams, Unavailable
from overfill.model.manifest import Pair

SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tiny_pair, tmp_path_factory):
    """Adapters a and b, which the workers load when they start."""
    folder = tmp_path_factory.mktemp("adapters") / "tasks"
    for seed, name in enumerate("ab"):
        add_tiny_adapter(Pair.load(tiny_pair), folder, name, seed=seed, tail_tokens=0)
    return folder


@pytest.fixture(scope="module")
def stack(tiny_pair, folder):
    settings = {"adapters": folder, "max_adapters": 2}
    with mock_stack(tiny_pair, decode=2, decode_settings=settings) as stack:
        yield stack


@pytest.fixture
def client(stack):
    with Client(stack.grpc) as client:
        yield client


def post(stack, path, **body):
    """Status and JSON of the answer."""
    request = urllib.request.Request(stack.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def models(stack):
    with urllib.request.urlopen(f"{stack.url}/v1/models", timeout=30) as response:
        return {model["id"]: model for model in json.loads(response.read())["data"]}


def test_adapters_are_listed_as_vllm_does_and_without_a_path(stack, client, folder):
    listed = models(stack)
    name = next(iter(listed))
    assert list(listed) == [name, f"{name}:a", f"{name}:b"]
    adapter = listed[f"{name}:a"]
    assert (adapter["parent"], adapter["root"], listed[name]["parent"]) == (name, "a", None)
    assert str(folder) not in json.dumps(listed)
    digests = {worker.id: worker.adapters for worker in client.status().workers if worker.stage == "decode"}
    assert adapter["overfill"]["adapter_digest"] == digests["decode-0"]["a"] == digests["decode-1"]["a"]


def test_every_api_takes_an_adapter_as_its_model(stack, client):
    name = f"{next(iter(models(stack)))}:a"
    messages = [{"role": "user", "content": "Hi"}]
    for path, body in (
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 4}),
        ("/v1/completions", {"prompt": "Hi there", "max_tokens": 4}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 16}),
        ("/v1/messages", {"messages": messages, "max_tokens": 4}),
    ):
        status, answer = post(stack, path, model=name, **body)
        assert (status, answer["model"]) == (200, name), answer
        status, refused = post(stack, path, model=f"{name}x", **body)
        assert status == 404
        assert f"'{name}'" in refused["error"]["message"], "the message lists what is served"
    answer = client.generate("Hi there", tier="a", sampling=SHORT)
    assert (answer.tier, [part.tier for part in answer.parts]) == ("a", ["a"])
    assert answer.identity.adapter_digest == models(stack)[name]["overfill"]["adapter_digest"]


def test_tasks_of_one_prompt_meet_on_a_decode_worker(client):
    workers = []
    for prompt in ([5] * 100, [6] * 100, [7] * 100):
        streams = [client.stream(prompt, tier=name, sampling=SHORT) for name in "abab"]
        for stream in streams:
            for _ in stream:
                pass
        workers.append({stream.answer.decode_worker for stream in streams})
    assert [len(where) for where in workers] == [1, 1, 1]
    assert len(set.union(*workers)) == 2, "other prompts go where there is less to do"


def test_adapters_come_and_go_by_vllms_routes(stack, client, folder, tiny_pair):
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    add_tiny_adapter(Pair.load(tiny_pair), folder, "c", seed=2, tail_tokens=0)
    both = ["decode-0", "decode-1"]
    status, refused = post(stack, load, lora_name="c")
    assert status == 429, refused
    assert "decode-0 has adapters in all 2 slots: a, b" in refused["error"]["message"]
    assert post(stack, unload, lora_name="b", lora_int_id=1) == (
        200,
        {"adapter": "b", "loaded": False, "workers": both},
    )
    with pytest.raises(ModelNotFound, match="has 'default', 'a'"):
        client.generate("Hi there", tier="b", sampling=SHORT)
    assert post(stack, load, lora_name="c") == (200, {"adapter": "c", "loaded": True, "workers": both})
    assert client.generate("Hi there", tier="c", sampling=SHORT).tier == "c"
    assert post(stack, load, lora_name="c")[0] == 200, "it is loaded already"
    for path, body, status, says in (
        (load, {"lora_name": "nobody"}, 404, "no adapter 'nobody'"),
        (unload, {"lora_name": "nobody"}, 404, "has no adapter 'nobody' loaded; loaded: a, c"),
        (load, {"lora_name": "../c"}, 400, "'lora_name' is '../c'"),
        (load, {"lora_name": "c", "lora_path": "/tmp/c"}, 400, "lora_path"),
        (load, {"lora_name": "c", "load_inplace": True}, 400, "load_inplace"),
        (load, {}, 400, "lora_name"),
    ):
        answer = post(stack, path, **body)
        assert answer[0] == status, answer
        assert says in answer[1]["error"]["message"]
    assert post(stack, unload, lora_name="c")[0] == 200
    assert post(stack, load, lora_name="b")[0] == 200


def test_the_command_loads_unloads_and_lists(stack, capsys):
    address = f"--address={stack.grpc}"
    assert main(["adapter", "unload", "a", address]) == 0
    assert capsys.readouterr().out == "decode-0: unloaded a\ndecode-1: unloaded a\n"
    assert main(["adapter", "unload", "a", address]) == 1
    assert "has no adapter 'a' loaded; loaded: b" in capsys.readouterr().err
    assert main(["adapter", "load", "a", address]) == 0
    assert capsys.readouterr().out == "decode-0: loaded a\ndecode-1: loaded a\n"
    assert main(["adapter", "list", address]) == 0
    rows = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(name, tier, workers.strip()) for name, tier, _, workers in rows] == [
        ("a", "default", "decode-0, decode-1"),
        ("b", "default", "decode-0, decode-1"),
    ]
    assert main(["status", address]) == 0
    assert "a, b" in capsys.readouterr().out


def test_an_answer_is_resumed_at_another_router_only_by_its_adapter(stack, client, tiny_pair, folder, tmp_path):
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    first = client.generate("Hi there", tier="a", sampling=sampling)
    assert first.identity.answer_start == first.usage.prompt_tokens - 1
    begun = {"tier": "a", "sampling": sampling, "resume_token_ids": first.token_ids[:3]}
    begun |= {"resume_identity": first.identity, "request_id": first.request_id}
    add_tiny_adapter(Pair.load(tiny_pair), tmp_path / "tasks", "a", seed=9, tail_tokens=0)
    settings = {"adapters": folder, "max_adapters": 1}
    with mock_stack(tiny_pair, decode_settings=settings) as other, Client(other.grpc) as second:
        resumed = second.generate("Hi there", **begun)
        assert (resumed.token_ids, resumed.tier) == (first.token_ids[3:], "a")
        with pytest.raises(Incompatible, match=r"resume_identity\.adapter_digest"):
            second.generate("Hi there", **begun | {"tier": "default"})
    settings["adapters"] = tmp_path / "tasks"
    with mock_stack(tiny_pair, decode_settings=settings) as other, Client(other.grpc) as second:
        with pytest.raises(Incompatible, match=r"resume_identity\.adapter_digest"):
            second.generate("Hi there", **begun)
        assert second.unload_adapter("a")[0].error is None
        with pytest.raises(Unavailable, match="no decode worker has the adapter that began the answer"):
            second.generate("Hi there", timeout=2, **begun)


def test_a_stream_goes_on_at_another_router_which_learns_adapters_from_the_workers(tiny_pair, tmp_path):
    folder, long = tmp_path / "tasks", SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    add_tiny_adapter(Pair.load(tiny_pair), folder, "a", tail_tokens=3)
    with running_stack(tiny_pair, routers=2, adapters=folder, grace_period="0") as (stack, _):
        addresses = list(stack.placed.addresses)
        with Client(addresses[1]) as second, Client(",".join(addresses)) as client:
            assert second.unload_adapter("a")[0].error is None
            wait_until(lambda: not has_adapter(addresses[0]), 10, "the first router knows that it is gone")
            assert second.load_adapter("a")[0].error is None
            wait_until(lambda: has_adapter(addresses[0]), 10, "the first router knows that it is back")
            with client.stream("Hi there", tier="a", sampling=long) as stream:
                next(stream)
                os.kill(children(stack, "router-0")[0].pid, signal.SIGKILL)
                for _ in stream:
                    pass
            whole = second.generate("Hi there", tier="a", sampling=long)
            assert (stream.answer.routers, stream.answer.tier) == (2, "a")
            assert stream.answer.token_ids == whole.token_ids
            assert whole.token_ids != second.generate("Hi there", sampling=long).token_ids
            wait_until(lambda: idle(addresses[1]), 10, "all blocks free")


def has_adapter(address):
    with Client(address) as client:
        return any(worker.adapters for worker in client.status().workers)


def test_workers_without_slots_ignore_the_folder(tiny_pair, folder):
    with mock_stack(tiny_pair, decode_settings={"adapters": folder, "max_adapters": 0}) as stack:
        assert len(models(stack)) == 1
        with Client(stack.grpc) as client, pytest.raises(Incompatible, match="decode-0 takes no adapters: start the"):
            client.load_adapter("a")
