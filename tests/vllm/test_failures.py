"""Workers on vLLM that hang, fail, get damaged KV, drain or cannot load: no request is lost, no answer is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from grammar_bombs import assert_only_their_requests_fail
from stacks import children, idle, running_stack, wait_until
from vllm_stacks import EAGER, GREEDY, engines, prompts, wrong_answers

from overfill.client import Client, SamplingParams
from overfill.errors import InvalidRequest


@pytest.mark.timeout(400)  # five workers load vLLM
def test_workers_that_hang_or_fail_end_and_their_requests_continue_elsewhere(vllm_pair, reference):
    """One worker of each stage is left at the end. The decode worker receives damaged KV, which it pulls again."""
    faults = {
        "prefill-0": "out-of-memory",
        "decode-0": "hang-step",
        "decode-1": "out-of-memory",
        "decode-2": "flip-kv-bit",
    }
    causes = {
        "prefill-0": "no room for this step",
        "decode-0": "a step has taken more than 5 s",
        "decode-1": "no room for this step",
    }
    settings = engines("vllm", "vllm") | {"step_timeout": "5", "max_attempts": "40"}
    with running_stack(vllm_pair, 2, 3, faults=faults, **settings) as (stack, address), Client(address) as client:
        broken = {name: stack.worker(name) for name in causes}
        while any(worker.returncode is None for worker in broken.values()):
            assert wrong_answers(client, reference, prompts(16)) == []
        assert wrong_answers(client, reference, prompts(16)) == []
        for name, worker in broken.items():
            assert worker.returncode == 1
            assert any(causes[name] in line for line in worker.last_lines()), worker.last_lines()
        assert any(line.startswith("decode-2") and "a data stream broke" in line for line in stack.lines)
        wait_until(lambda: idle(address), 5, "all blocks free")


@pytest.mark.timeout(400)
async def test_a_grammar_that_would_end_a_worker_fails_its_own_request(vllm_pair):
    with running_stack(vllm_pair, **engines("vllm", "vllm")) as (_, address):
        await assert_only_their_requests_fail(address)


@pytest.mark.timeout(400)  # four workers load vLLM
@pytest.mark.parametrize("stage", ["decode", "prefill"])
def test_a_request_that_fails_every_step_ends_two_workers_and_no_more(vllm_pair, reference, stage):
    counts = {"decode": 1, "prefill": 1} | {stage: 3}
    faults = {f"{stage}-{number}": "poison" for number in range(3)}
    settings = engines("vllm", "vllm") | {"max_attempts": "10"}
    with (
        running_stack(vllm_pair, counts["prefill"], counts["decode"], faults=faults, **settings) as (running, address),
        Client(address) as client,
    ):
        workers = {name: running.worker(name) for name in faults}
        with pytest.raises(
            InvalidRequest, match=rf"ended the workers {stage}-\d and {stage}-\d, .*poisoned"
        ) as refused:
            client.generate([3, 5, 6], sampling=SamplingParams(**GREEDY, max_tokens=20), timeout=120)
        named = set(re.findall(rf"{stage}-\d", str(refused.value)))
        assert len(named) == 2
        wait_until(lambda: all(workers[name].returncode == 1 for name in named), 60, "two workers have ended")
        assert wrong_answers(client, reference, prompts(8)) == []
        assert [name for name, worker in workers.items() if worker.returncode is None] == [*(workers.keys() - named)]
        wait_until(lambda: idle(address), 5, "all blocks free")


def test_sigterm_lets_running_answers_finish_and_exits_0(vllm_pair):
    slow = {"decode-0": "slow-steps"}  # the answer takes longer than a server without a grace period waits
    settings = engines("vllm", "vllm") | {"grace_period": "60"}
    with running_stack(vllm_pair, faults=slow, **settings) as (stack, address), Client(address) as client:
        processes = children(stack, "")
        with client.stream([5, 6, 7], sampling=SamplingParams(**GREEDY, max_tokens=20)) as stream:
            next(stream)
            for process in processes:
                os.kill(process.pid, signal.SIGTERM)
            rest = list(stream)
        assert stream.answer.usage.completion_tokens == 20
        assert rest
        wait_until(lambda: all(process.returncode is not None for process in processes), 60, "all processes have left")
        assert {process.name: process.returncode for process in processes} == dict.fromkeys(
            ("router-0", "prefill-0", "decode-0"), 0
        )


def narrow(folder, tiny_pair):
    """Heads for which vLLM has no kernel for CPUs. It says so in the first call, after it has loaded."""
    shutil.copytree(tiny_pair, folder)


def of_fp8(folder, vllm_pair):
    """A format that vLLM refuses on a CPU."""
    shutil.copytree(vllm_pair, folder)
    file = folder / "full" / "config.json"
    quantised = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantised))
    manifest = json.loads((folder / "pair.json").read_text())
    manifest["full"]["engines"] = ["vllm"]
    (folder / "pair.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("source", "spoil", "words"), [("tiny_pair", narrow, "head_dim=16"), ("vllm_pair", of_fp8, "fp8")]
)
def test_a_checkpoint_that_vllm_refuses_ends_the_worker_with_its_words_and_ours(
    request, tmp_path, source, spoil, words
):
    folder = tmp_path / "pair"
    spoil(folder, request.getfixturevalue(source))
    command = [sys.executable, "-m", "services.prefill.main", f"--pair={folder}", "--engine=vllm", "--port=0"]
    options = ["--routers=127.0.0.1:9", "--dtype=float32", "--kv-memory=16MiB", "--block-size=32"]
    run = subprocess.run(
        [*command, *options, f"--engine-args={EAGER}"], capture_output=True, text=True, timeout=150, check=False
    )
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"error: vLLM cannot load the full model in {folder / 'full'}: "), run.stderr
    assert words in last
    assert "Traceback" not in run.stderr
