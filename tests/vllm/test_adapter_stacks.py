"""Decode workers with adapters on vLLM answer as plain transformers with PEFT do, mixed with plain answers."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from peft_adapters import add_tiny_adapter
from stacks import idle, running_stack, wait_until
from vllm_stacks import engines

from overfill.client import Client, ModelNotFound, SamplingParams
from overfill.model.manifest import Pair
from overfill.pair.reference import TwoStageReference, judge_parts
from overfill.rpc.channel import open_sync_channel
from overfill.v1 import admin_pb2, admin_pb2_grpc

TAILS = {"": 0, "a": 1, "b": 40}
"""Tokens of the prompt that the decoder computes, by adapter."""


def test_a_vllm_worker_answers_with_its_adapters_and_lets_them_go(vllm_pair, tmp_path):
    pair, folder = Pair.load(vllm_pair), tmp_path / "tasks"
    for seed, (name, tail) in enumerate(list(TAILS.items())[1:]):
        add_tiny_adapter(pair, folder, name, seed=seed, tail_tokens=tail)
    plain = TwoStageReference(vllm_pair)
    references = plain.with_adapters({name: folder / name for name in ("a", "b")}) | {"": plain}
    draw, sampling = random.Random(1), SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    asked = [(draw.choice([*TAILS]), draw.choices(range(2, 500), k=length)) for length in (4, 32, 33, 96, 100, 250) * 2]
    settings = engines("overfill", "vllm") | {"adapters": folder, "max_adapters": "2", "max_adapter_rank": "8"}
    with running_stack(vllm_pair, **settings) as (_, address), Client(address) as client:
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(lambda one: client.generate(one[1], sampling=sampling, tier=one[0], timeout=120), asked)
            )
        for (name, prompt), answer in zip(asked, answers, strict=True):
            start = max(1, len(prompt) - TAILS[name]) if name else None
            judged = judge_parts(
                references, [(name, 0)], prompt, answer.token_ids, answer.finish_reason, 24, answer_start=start
            )
            assert judged.correct, (name, len(prompt), judged.problem or judged.first_error)
        (worker,) = [worker for worker in client.status().workers if worker.stage == "decode"]
        with open_sync_channel(worker.address) as channel:
            admin = admin_pb2_grpc.AdminStub(channel)
            admin.UnloadAdapter(admin_pb2.UnloadAdapterRequest(name="a"), timeout=60)
            wait_until(lambda: not any(model.name.endswith(":a") for model in client.models()), 20, "a is gone")
            with pytest.raises(ModelNotFound):
                client.generate(asked[0][1], sampling=sampling, tier="a")
            admin.LoadAdapter(admin_pb2.LoadAdapterRequest(name="a"), timeout=60)
            wait_until(lambda: any(model.name.endswith(":a") for model in client.models()), 20, "a is back")
        name, prompt = next(one for one in asked if one[0] == "a")
        again = client.generate(prompt, sampling=sampling, tier=name, timeout=120)
        assert again.token_ids == answers[asked.index((name, prompt))].token_ids
        wait_until(lambda: idle(address), 20, "all blocks free")
