"""Stacks with workers of two ranks answer as the reference does: on vLLM alone, and beside OverFill's engine."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest
from listening import listening
from rank_processes import names_of, still_named
from stacks import children, loads, running_stack, wait_until
from tiers import check_tiers
from two_stage_format import write_two_stage
from vllm_stacks import CROSSING, EAGER, GREEDY, PROMPT, ask_and_cancel, engines, prompts, wrong_answers, wrong_turns

from overfill.cli.main import main
from overfill.client import Client, SamplingParams
from overfill.lab.chaos.stack import ranks_of
from overfill.making.tiny import make_tiny_pair
from overfill.pair.reference import TwoStageReference, judge
from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.rpc.tls import ClientTls
from overfill.settings.tiers import TierSpec

pytestmark = pytest.mark.timeout(400)  # seven processes load vLLM

RANKS = {"engine": "vllm", "engine_args": EAGER, "tensor_parallel_size": "2"}


@pytest.fixture(scope="module")
def family(vllm_pair, tmp_path_factory):
    """Pairs of one full model: its own decoder, which runs in ranks, and another one, on OverFill's engine."""
    folder = tmp_path_factory.mktemp("pairs") / "full"
    return {"full": make_tiny_pair(folder, identity=True, head_dim=32), "fast": vllm_pair}


@pytest.fixture(scope="module")
def ranked(family):
    """A stack whose prefill worker and first tier have two ranks each. The second tier reads from these ranks too."""
    tiers = (
        TierSpec(name="full", pair=str(family["full"]), settings=RANKS),
        TierSpec(name="fast", pair=str(family["fast"]), settings={"engine": "overfill"}),
    )
    with pytest.MonkeyPatch.context() as patch:
        # oneDNN keeps a kernel for each number of tokens in a step, 1,024 by default, which looks like a leak.
        patch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
        patch.setenv("LRU_CACHE_CAPACITY", "8")
        settings = engines("vllm", "overfill") | {"prefill_tensor_parallel_size": "2", "max_num_batched_tokens": "64"}
        with running_stack(family["fast"], tiers=tiers, **settings) as (stack, address), Client(address) as client:
            yield SimpleNamespace(stack=stack, address=address, tiers=tiers, client=client)


def is_free(address, tls=None):
    return all(load.kv_blocks_used == load.running == load.waiting == 0 for load in loads(address, tls).values())


def test_answers_are_the_reference_s(ranked):
    check_tiers(ranked.address, ranked.tiers, prompts(20))


def test_every_sampling_parameter_reaches_the_ranks(ranked, family):
    """Their answers are those of OverFill's engine, which has no ranks."""
    tiers = tuple(tier.model_copy(update={"settings": {}}) for tier in ranked.tiers)
    with (
        running_stack(family["fast"], tiers=tiers, **engines("overfill", "overfill")) as (_, address),
        Client(address) as ours,
    ):
        for tier in family:
            for name, options in CROSSING.items():
                sampling = SamplingParams(**options)
                expected, found = (c.generate(PROMPT, sampling=sampling, tier=tier) for c in (ours, ranked.client))
                answers = [(tier, name, a.token_ids, a.finish_reason) for a in (expected, found)]
                assert answers[0] == answers[1]
                for one, other in zip(found.logprobs or (), expected.logprobs or (), strict=True):
                    assert abs(one.logprob - other.logprob) < 1e-3
            whole = ours.generate(PROMPT, sampling=SamplingParams(**CROSSING["filters"]), tier=tier).text
            stop = whole[len(whole) // 2 :][:3]
            stopped = ranked.client.generate(
                PROMPT, sampling=SamplingParams(**CROSSING["filters"]), tier=tier, stop=[stop]
            )
            assert stopped.text == whole[: whole.index(stop)]


@pytest.mark.parametrize("tier", ["full", "fast"])
def test_kv_is_the_full_model_s_in_every_turn_of_a_chat(ranked, family, tier):
    """Later turns find the earlier ones in the prefix caches of all ranks."""
    assert wrong_turns(ranked.client, TwoStageReference(family[tier]), tier=tier) == []


def test_cancelled_requests_leave_nothing_behind(ranked):
    assert ask_and_cancel(ranked.client, 100, 24, [*("full", "fast")]) > 0
    wait_until(lambda: is_free(ranked.address), 2, f"all blocks free: {loads(ranked.address)}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_of_ranks_is_flat_over_a_thousand_requests_of_which_a_tenth_is_cancelled(ranked):
    workers = [*children(ranked.stack, "prefill"), *children(ranked.stack, "decode-full")]
    processes = {worker.name: psutil.Process(worker.pid) for worker in workers}
    processes |= {f"{w.name}, rank {number}": rank for w in workers for number, rank in enumerate(ranks_of(w.pid))}
    assert len(processes) == 6

    def sizes():
        return {name: process.memory_info().rss / 2**20 for name, process in processes.items()}

    ask_and_cancel(ranked.client, 400, 60, ["full"])  # until caches and thread pools have their sizes
    before = sizes()
    cancelled = ask_and_cancel(ranked.client, 1000, 60, ["full"])
    wait_until(lambda: is_free(ranked.address), 2, f"all blocks free: {loads(ranked.address)}")
    growth = {name: size - before[name] for name, size in sizes().items()}
    print(f"{cancelled} of 1,000 cancelled; MiB that each process grew: {growth}")
    assert cancelled > 30
    assert max(growth.values()) < 16


@pytest.fixture
def imported(vllm_pair, tmp_path):
    """A pair with three of four layers, which read KV out of order and of one layer twice."""
    decoder = write_two_stage(vllm_pair, tmp_path / "published", sharded=True, teacher=True, kept=[0, 1, 3])
    arguments = ["--full", str(vllm_pair / "full"), "--decoder", str(decoder), "--layer-map", "0,3,0"]
    assert main(["pair", "import", *arguments, "--out", str(tmp_path / "imported")]) == 0
    return tmp_path / "imported"


def test_a_lost_rank_ends_its_worker_and_its_answers_continue_elsewhere(imported, tmp_path):
    """Two decode workers of two ranks pull from OverFill's engine over mutual TLS. The first one loses a rank."""
    certs = tmp_path / "certs"
    certificates.make(certs)
    files = certificates.role_files(certs, Role.CLIENT)
    tls = ClientTls(files.ca, files.cert, files.key, "overfill")
    settings = engines("overfill", "vllm") | {"decode_tensor_parallel_size": "2"}
    reference, prompt = TwoStageReference(imported), prompts(9)[8]
    with (
        running_stack(imported, decode=2, tls=certs, **settings) as (stack, address),
        Client(address, tls=tls) as client,
    ):
        assert wrong_answers(client, reference, prompts(20)) == []
        found = listening([process.pid for process in psutil.Process().children(recursive=True)])
        assert {f"{table} {host}:{port}" for table, host, port in found if not host.is_loopback} == set()
        begun = [threading.Event() for _ in range(4)]

        def read(began):
            with client.stream(prompt, sampling=SamplingParams(**GREEDY, max_tokens=200)) as stream:
                for _ in stream:
                    began.set()
                    time.sleep(0.002)
                return stream.answer

        worker = children(stack, "decode")[0]
        ranks = ranks_of(worker.pid)
        assert len(ranks) == 2
        names = names_of([process.pid for process in (worker, *ranks)])
        assert len(names) > 5
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda began: pool.submit(read, began), begun))
            assert all(began.wait(60) for began in begun)
            ranks[1].kill()
            for answer in answers:
                done = answer.result(120)
                assert judge(reference, prompt, done.token_ids, done.finish_reason, 200).correct
        wait_until(lambda: worker.returncode is not None, 30, "the worker has ended")
        assert worker.returncode == 1
        assert any(f"rank 1 (process {ranks[1].pid}) " in line for line in worker.last_lines()), worker.last_lines()
        assert not any(rank.is_running() for rank in ranks)
        wait_until(lambda: is_free(address, tls), 5, "all blocks free")
    assert still_named(names) == set()
