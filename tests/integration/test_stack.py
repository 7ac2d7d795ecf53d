"""Tests a stack of real processes: correct answers, clear refusals, and no block or process left behind."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import forked
import pytest
from stacks import children, idle, loads, running_stack, wait_until

from overfill.client import (
    Client,
    DeadlineExceeded,
    InvalidRequest,
    Message,
    ModelNotFound,
    PromptTooLong,
    SamplingParams,
)
from overfill.pair.reference import TwoStageReference
from overfill.version import __version__

GREEDY = SamplingParams(temperature=0, max_tokens=24)


def prompt(seed, length=60):
    return [(seed * 31 + 7 * i * (seed + 3)) % 470 + 20 for i in range(length)]


@pytest.fixture(scope="module")
def stack(tiny_pair):
    with running_stack(tiny_pair, prefill=1, decode=2) as running:
        yield running


@pytest.fixture
def address(stack):
    yield stack[1]
    wait_until(lambda: idle(stack[1]), 5, "all blocks free after the test")


@pytest.fixture
def client(address):
    with Client(address) as client:
        yield client


@pytest.fixture(scope="module")
def reference(tiny_pair):
    return TwoStageReference(tiny_pair)


def test_answers_are_the_reference_s_whatever_runs_beside_them(client, reference):
    prompts = [prompt(seed, 5 + 17 * seed) for seed in range(20)]
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda p: client.generate(p, sampling=GREEDY), prompts))
    assert [list(a.token_ids) for a in answers] == [reference.generate(p, 24) for p in prompts]
    assert {a.decode_worker for a in answers} == {"decode-0", "decode-1"}
    assert {e for a in answers for e in (a.prefill_engine, a.decode_engine)} == {f"overfill {__version__}"}
    assert {w.process.engine for w in client.status().workers} == {f"overfill {__version__}"}


def test_streaming_gives_the_same_tokens_and_text(client):
    whole = client.generate(prompt(1), sampling=GREEDY)
    with client.stream(prompt(1), sampling=GREEDY) as stream:
        deltas = list(stream)
    assert [t for d in deltas for t in d.token_ids] == list(whole.token_ids)
    assert "".join(d.text for d in deltas) == whole.text == stream.answer.text
    assert len(deltas) > 1


def test_a_seed_repeats_a_sampled_answer_on_any_worker(client):
    sampling = SamplingParams(temperature=1.5, top_p=0.95, seed=11, max_tokens=24)
    answers = [client.generate(prompt(2), sampling=sampling) for _ in range(6)]
    assert len({a.token_ids for a in answers}) == 1
    other = client.generate(prompt(2), sampling=SamplingParams(temperature=1.5, top_p=0.95, seed=12, max_tokens=24))
    assert other.token_ids != answers[0].token_ids


def test_an_answer_can_be_resumed_with_its_tokens_and_seed(client):
    sampling = SamplingParams(temperature=1.5, seed=5, max_tokens=24, ignore_eos=True)
    whole = client.generate(prompt(3), sampling=sampling)
    rest = client.generate(
        prompt(3), sampling=sampling, resume_token_ids=whole.token_ids[:9], resume_identity=whole.identity
    )
    assert rest.token_ids[-15:] == whole.token_ids[9:]


def test_the_time_to_first_token_has_all_its_parts(client):
    timing = client.generate(prompt(7, 400), sampling=GREEDY).timing
    parts = [
        timing.router_queue,
        timing.decode_reservation,
        timing.prefill_queue,
        timing.prefill_compute,
        timing.return_path,
    ]
    assert all(part is not None and part >= 0 for part in parts)
    assert sum(parts) <= timing.ttft
    assert timing.unattributed == pytest.approx(timing.ttft - sum(parts))
    assert timing.handoff_exposed is not None
    assert timing.total >= timing.ttft


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"prompt": ""}, InvalidRequest, "prompt"),
        ({"prompt": []}, InvalidRequest, "empty"),
        ({"prompt": [5] * 600}, PromptTooLong, "600.*512"),
        ({"prompt": [5] * 500, "sampling": SamplingParams(max_tokens=100)}, PromptTooLong, "512"),
        ({"prompt": [5, 512]}, InvalidRequest, "512"),
        ({"prompt": "hi", "model": "unknown-model"}, ModelNotFound, "unknown-model"),
        ({"prompt": "hi \udcff"}, InvalidRequest, "text"),
        ({"prompt": "hi", "sampling": SamplingParams(stop_token_ids=(9999,))}, InvalidRequest, "stop_token_ids"),
        ({"prompt": [Message("robot", "hi")]}, InvalidRequest, "role"),
    ],
)
def test_bad_input_is_refused_with_the_field(client, arguments, error, text):
    with pytest.raises(error, match=text):
        client.generate(**arguments)


def test_a_deadline_ends_a_request_and_frees_its_blocks(client):
    with pytest.raises(DeadlineExceeded):
        client.generate(prompt(8), sampling=SamplingParams(max_tokens=450, ignore_eos=True), timeout=0.15)


def test_leaving_a_stream_frees_its_blocks(client):
    with client.stream(prompt(9), sampling=SamplingParams(max_tokens=450, ignore_eos=True)) as stream:
        next(stream)


CLIENT = """
import sys
from overfill.client import Client, SamplingParams
with Client(sys.argv[1]) as client:
    with client.stream([int(sys.argv[2])] * 60, sampling=SamplingParams(max_tokens=440, ignore_eos=True)) as stream:
        for delta in stream:
            print(delta.first_index, flush=True)
"""


def spawn_clients(address, count):
    clients = [
        subprocess.Popen([sys.executable, "-c", CLIENT, address, str(20 + i)], stdout=subprocess.PIPE)
        for i in range(count)
    ]
    return clients


def test_clients_killed_with_kill_9_leave_no_blocks(address):
    clients = spawn_clients(address, 6)
    for client in clients:
        assert client.stdout.readline(), "the answer is still streaming"
    assert sum(load.running for load in loads(address).values()) > 0
    for client in clients:
        client.kill()
        client.wait()
        client.stdout.close()


def test_a_frozen_client_delays_no_other(address):
    (frozen,) = spawn_clients(address, 1)
    try:
        frozen.stdout.readline()
        frozen.send_signal(signal.SIGSTOP)
        with Client(address) as client:
            for seed in range(8):
                answer = client.generate(prompt(seed), sampling=GREEDY, timeout=20)
                assert len(answer.token_ids) > 0
    finally:
        frozen.kill()
        frozen.wait()
        frozen.stdout.close()


def test_streams_go_on_at_another_router_when_theirs_is_lost(tiny_pair):
    greedy = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    sampled = SamplingParams(temperature=1, seed=5, max_tokens=300, ignore_eos=True)
    with running_stack(tiny_pair, routers=3, grace_period="0") as (stack, _):
        addresses = list(stack.placed.addresses)
        for lost, number in enumerate((signal.SIGTERM, signal.SIGKILL)):
            with Client(",".join(addresses[lost:])) as client:
                new = [prompt(2 * lost), prompt(2 * lost + 1)]
                with (
                    client.stream(new[0], sampling=greedy) as one,
                    client.stream(new[1], sampling=sampled) as other,
                ):
                    for stream in (one, other):
                        next(stream)
                    os.kill(children(stack, f"router-{lost}")[0].pid, number)
                    for stream, tokens, sampling in zip((one, other), new, (greedy, sampled), strict=True):
                        for _ in stream:
                            pass
                        assert stream.answer.routers == 2
                        whole = client.generate(tokens, sampling=sampling)
                        assert whole.usage.cached_tokens > 0
                        assert stream.answer.token_ids == whole.token_ids
                        assert stream.answer.text == whole.text
                        assert stream.answer.usage == dataclasses.replace(whole.usage, cached_tokens=0)
            wait_until(lambda: idle(addresses[-1]), 5, "all blocks free")


def test_sigterm_lets_running_answers_finish_and_exits_0(tiny_pair):
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    slow = {"decode-0": "slow-steps"}  # the answer takes longer than a server without a grace period waits
    with running_stack(tiny_pair, faults=slow, grace_period="60") as (stack, address), Client(address) as client:
        processes = children(stack, "")
        with client.stream(prompt(1), sampling=sampling) as stream:
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


def with_faults(fault):
    """A stack that has, in each stage, one worker with the fault and one without."""
    return {"prefill": 2, "decode": 2, "faults": {"prefill-0": fault, "decode-0": fault}}


def test_a_worker_stuck_in_a_step_exits_and_its_requests_continue_elsewhere(tiny_pair):
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with running_stack(tiny_pair, **with_faults("hang-step"), step_timeout="1") as (stack, address):
        stuck = [stack.worker(name) for name in ("prefill-0", "decode-0")]
        with Client(address) as client:
            expected = client.generate(prompt(1), sampling=sampling).token_ids
            while any(worker.returncode is None for worker in stuck):
                assert client.generate(prompt(1), sampling=sampling, timeout=30).token_ids == expected
        for worker in stuck:
            assert worker.returncode == 1
            shape = r"a step has taken more than 1 s: step \d+, of 1 sequences with [1-9]\d* tokens"
            assert any(re.search(shape, line) for line in worker.last_lines())
        wait_until(lambda: idle(address), 5, "all blocks free")


def test_steps_that_find_no_memory_cost_no_answer_and_no_worker(tiny_pair):
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with running_stack(tiny_pair, **with_faults("out-of-memory"), max_attempts="40") as (stack, address):
        with Client(address) as client:
            answers = [client.generate(prompt(1), sampling=sampling) for _ in range(30)]
        assert len({answer.token_ids for answer in answers}) == 1
        assert sum(answer.migrations for answer in answers) > 0
        assert all(child.returncode is None for child in children(stack, ""))
        wait_until(lambda: idle(address), 5, "all blocks free")
    for name in ("prefill-0", "decode-0"):
        assert any("no room for this step" in line for line in stack.worker(name).last_lines())


def test_a_worker_that_loses_a_block_notices_when_idle_and_exits(tiny_pair):
    sampling = SamplingParams(temperature=0, max_tokens=12)
    with running_stack(tiny_pair, **with_faults("lose-block")) as (stack, address), Client(address) as client:
        leaking = [stack.worker(name) for name in ("prefill-0", "decode-0")]
        answers = [client.generate(prompt(1), sampling=sampling).token_ids for _ in range(4)]  # of all workers
        wait_until(lambda: all(worker.returncode is not None for worker in leaking), 30, "the workers have left")
        answers.append(client.generate(prompt(1), sampling=sampling).token_ids)
        assert len(set(answers)) == 1
        for worker in leaking:
            assert worker.returncode == 1
            lines = worker.last_lines()
            assert any("blocks are owned in the pool, but owners and cache hold" in line for line in lines)


def test_drain_takes_a_worker_out_and_loses_nothing(tiny_pair):
    # The answer takes longer than a server needs to stop.
    sampling = SamplingParams(temperature=0, max_tokens=450, ignore_eos=True)
    with running_stack(tiny_pair, decode=2, grace_period="0") as (stack, address), Client(address) as client:
        with client.stream(prompt(1), sampling=sampling) as stream:
            next(stream)
            busy = next(id for id, load in loads(address).items() if id.startswith("decode") and load.kv_blocks_used)
            client.drain(busy)
            rest = list(stream)
        assert rest
        assert stream.answer.migrations == 1
        assert stream.answer.usage.cached_tokens == 0, "the first attempt's, which found nothing"
        (process,) = [c for c in children(stack, "decode") if c.name == busy]
        wait_until(lambda: process.returncode is not None, 10, "the process has left")
        assert process.returncode == 0
        assert client.generate(prompt(1), sampling=sampling).token_ids == stream.answer.token_ids
        with pytest.raises(InvalidRequest, match="worker_id"):
            client.drain("")
        unknown = overfill("drain", "nobody", "--address", address)
        assert unknown.returncode == 1
        assert "no worker 'nobody' has joined; joined: " in unknown.stderr
        other = next(c.name for c in children(stack, "decode") if c.returncode is None)
        drained = overfill("drain", other, "--address", address)
        assert (drained.returncode, drained.stdout) == (0, f"{other} has left\n")


def overfill(*arguments):
    command = [sys.executable, "-m", "overfill.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_prefill_worker_of_another_full_model_is_refused(address, tmp_path):
    from overfill.making.tiny import make_tiny_pair

    other = make_tiny_pair(tmp_path / "other", seed=1)
    settings = ("--dtype=float32", "--kv-memory=4MiB", "--max-model-len=512")
    status, output = forked.run("services.prefill.main", f"--pair={other}", f"--routers={address}", *settings)
    assert status == 1
    assert "full_digest" in output
