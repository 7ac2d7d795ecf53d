"""Stacks whose stages run in ranks: their answers, and what ends with a rank."""

import signal

import psutil
import pytest
from stacks import idle, running_stack, wait_until
from vllm_stacks import engines, prompts, wrong_answers

from overfill.client import Client, SamplingParams
from overfill.request.params import Grammar

RANK = "VLLM::Worker"


def ranks_of(worker):
    return [process for process in psutil.Process(worker.pid).children(recursive=True) if RANK in process.name()]


@pytest.mark.timeout(400)
def test_stages_in_ranks_answer_right_and_a_lost_rank_ends_its_worker(vllm_pair, reference):
    settings = engines("vllm", "vllm") | {"tensor_parallel_size": "2"}
    with running_stack(vllm_pair, **settings) as (stack, address), Client(address) as client:
        assert wrong_answers(client, reference, prompts(16)) == []
        word = SamplingParams(temperature=1, seed=3, max_tokens=20, logprobs=2, grammar=Grammar("regex", "[a-z]{5}"))
        answer = client.generate(prompts(1)[0], sampling=word)
        assert len(answer.text) == 5
        wait_until(lambda: idle(address), 5, "all blocks free")
        worker = stack.worker("decode-0")
        victim, other = ranks_of(worker)
        victim.send_signal(signal.SIGKILL)
        wait_until(lambda: worker.returncode is not None, 30, "the worker has ended")
        assert worker.returncode == 1
        assert not other.is_running()
        assert any(f"(process {victim.pid}) was ended by SIGKILL" in line for line in stack.lines)
