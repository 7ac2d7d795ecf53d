"""Adapters that PEFT made, on decode workers with vLLM: answers equal those of transformers with PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from peft_adapters import add_tiny_adapter
from stacks import running_stack
from vllm_stacks import GREEDY, engines, prompts

from overfill.client import Client, SamplingParams
from overfill.model.manifest import Pair
from overfill.pair.reference import TwoStageReference, judge_parts

TAILS = {"extract": 0, "label": 3, "summary": 40}
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def adapters(vllm_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pairs") / "adapters"
    for seed, (name, tail_tokens) in enumerate(TAILS.items()):
        add_tiny_adapter(Pair.load(vllm_pair), directory, name, seed=seed, tail_tokens=tail_tokens)
    return directory


@pytest.fixture(scope="module")
def references(reference: TwoStageReference, adapters: Path) -> dict[str, TwoStageReference]:
    return {"": reference, **reference.with_adapters({name: adapters / name for name in TAILS})}


@pytest.fixture(scope="module")
def mixed(vllm_pair: Path, adapters: Path) -> Iterator[tuple[object, str]]:
    settings = engines("overfill", "vllm") | {"adapters": adapters, "max_adapters": len(TAILS)}
    with running_stack(vllm_pair, **settings) as (stack, address):
        yield stack, address


def test_tasks_of_one_prompt_answer_as_peft_s(mixed, references):
    _, address = mixed
    sampling = SamplingParams(**GREEDY, max_tokens=MAX_TOKENS)
    asked = [(prompt, writer) for prompt in prompts(8)[1:] for writer in references]
    with Client(address) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: client.generate(one[0], sampling=sampling, tier=one[1]), asked))
    for (prompt, writer), answer in zip(asked, answers, strict=True):
        start = len(prompt) - min(TAILS[writer] or 1, len(prompt) - 1) if writer else None
        judged = judge_parts(
            references, [(writer, 0)], prompt, answer.token_ids, answer.finish_reason, MAX_TOKENS, answer_start=start
        )
        assert judged.correct, (writer, len(prompt), judged.problem, judged.first_error)
