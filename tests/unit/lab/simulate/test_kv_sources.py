"""KV from peers and from disk in the simulation: what it costs, whose blocks it takes, and what it saves."""

from dataclasses import replace

import pytest

from overfill.lab.simulate.blocks import CachedBlocks, KeptBlocks
from overfill.lab.simulate.clock import Clock
from overfill.lab.simulate.options import SimulationOptions
from overfill.lab.simulate.prefill import SimPrefill, Ticket
from overfill.lab.simulate.profiles import CPU, PrefillModel
from overfill.lab.simulate.stack import Simulation
from overfill.lab.traffic.traces import TraceRequest, sessions

GIB = 1 << 30
BLOCK = 10
PROFILE = replace(
    CPU, prefill=PrefillModel(0.01, kv_tokens=200, max_num_batched_tokens=1000), kv_token_bytes=1,
    link_bandwidth=500.0, disk_bandwidth=200.0,
)  # fmt: skip
"""A token takes 10 ms to compute, 5 ms from disk and 2 ms from a peer."""


def test_the_least_recently_used_blocks_leave_and_the_last_ones_of_a_prompt_first():
    room = 5
    kept = KeptBlocks(lambda: room)
    kept.keep([1, 2, 3])
    kept.keep([7, 8])
    kept.keep([1, 2, 3])
    assert kept.delta().added == [3, 2, 1, 8, 7]
    kept.keep([9])
    assert (kept.leading([7, 8], 0), kept.leading([1, 2, 3], 0)) == (1, 3)
    assert list(kept.delta().removed) == [8]
    room = 2
    assert kept.leading([1, 2, 3], 0) == 1, "of the prompt's blocks, the first stays longest"


class Worker(SimPrefill):
    """A prefill worker on a clock of its own, whose messages it records."""

    def __init__(self, clock=None, disk=None, profile=PROFILE, lenders=None):
        self.clock = clock or Clock()
        self.done = {}
        self.lenders = lenders or {}
        super().__init__(profile, CachedBlocks(profile.prefill.kv_tokens, BLOCK), self, disk)

    def ask(self, name, blocks, holder=""):
        """Submits a prompt of these blocks and half a block more."""
        ticket = Ticket(name, len(blocks) * BLOCK + BLOCK // 2, blocks, None, holder=holder)
        self.submit(ticket)
        return ticket

    def play(self):
        while self.clock.step():
            self.check()

    def prompt_computed(self, ticket):
        self.done[ticket.id] = self.clock.now

    def kv_sent(self, ticket):
        pass

    def lender(self, name):
        return self.lenders.get(name)


@pytest.fixture
def disk():
    return KeptBlocks(lambda: 100)


def test_a_prompt_that_memory_has_lost_comes_from_disk(disk):
    worker = Worker(disk=disk)
    worker.ask("first", range(10))
    worker.play()
    worker.ask("other", range(100, 119))  # takes all but one of the 20 blocks
    worker.play()
    began, held = worker.clock.now, worker.blocks.leading(disk_keys := worker.ask("again", range(10)).keys, 0)
    assert held < 10
    assert worker.blocks.cache.num_used == 11, "the import has its blocks from the start"
    worker.play()
    lacking = (10 - held) * BLOCK
    assert worker.done["again"] - began == pytest.approx(lacking * 0.005 + 5 * 0.01)
    assert worker.computed == 105 + 195 + 5
    assert worker.blocks.leading(disk_keys, 0) == 10
    assert worker.blocks.cache.num_used == 0


def test_other_prompts_are_computed_while_one_is_imported(disk):
    worker = Worker(disk=disk)
    disk.keep(worker.blocks.cache.blocks_of(range(10)).keys)
    imported, computed = worker.ask("imported", range(10)), worker.ask("computed", [50])
    found = []
    worker.clock.at(0.51, lambda: found.append(worker.blocks.leading(imported.keys, 0)))
    worker.play()
    assert found == [10], "found as soon as they are imported, before the rest is computed"
    assert worker.done["computed"] == pytest.approx(15 * 0.01)
    assert worker.done["imported"] == pytest.approx(100 * 0.005 + 5 * 0.01)
    assert (imported.imported, computed.imported) == ({"disk": 100}, {})


def test_a_cancelled_import_gives_its_blocks_back(disk):
    worker = Worker(disk=disk)
    disk.keep(worker.blocks.cache.blocks_of(range(10)).keys)
    worker.cancel(worker.ask("gone", range(10)))
    assert (worker.blocks.cache.num_used, worker.queued_tokens, worker.tickets) == (0, 0, [])
    worker.play()
    assert worker.done == {}


def test_what_is_computed_sooner_is_not_imported(disk):
    worker = Worker(disk=disk, profile=replace(PROFILE, disk_bandwidth=50.0))
    disk.keep(worker.blocks.cache.blocks_of(range(10)).keys)
    worker.ask("prompt", range(10))
    worker.play()
    assert worker.done["prompt"] == pytest.approx(105 * 0.01)


def test_a_peer_s_link_carries_one_loan_after_the_other_and_the_disk_has_the_rest(disk):
    clock = Clock()
    holder = Worker(clock)
    holder.ask("first", range(8))
    holder.play()
    disk.keep(holder.blocks.cache.blocks_of(range(10)).keys)
    began = max(clock.now, holder.blocks.free_at)
    lenders = {"holder": holder.blocks}
    borrowers = [Worker(clock, disk, lenders=lenders), Worker(clock, lenders=lenders)]
    tickets = [worker.ask("again", range(10), "holder") for worker in borrowers]
    gone = borrowers[1].ask("gone", [200], "a worker that has left")
    holder.play()
    assert [ticket.imported for ticket in (*tickets, gone)] == [{"peer": 80, "disk": 20}, {"peer": 80}, {}]
    first, second = (worker.done["again"] - began for worker in borrowers)
    assert first == pytest.approx(80 * 0.002 + 20 * 0.005 + 5 * 0.01)
    # Its import waits for the first one's, and a prompt of 15 tokens is computed meanwhile.
    assert second == pytest.approx(2 * 80 * 0.002 + 25 * 0.01)


CHATS = sessions(24, 6, 1500, 0.6, 500, 100, 0)
SMALL = replace(CPU, prefill=replace(CPU.prefill, kv_tokens=14_000))
"""The chats have three times as many tokens as fit into the memory of two workers."""


def play(trace=CHATS, profile=SMALL, **options):
    result = Simulation(trace, profile, SimulationOptions(prefill=2, decode=2, **options)).run()
    assert all(request.ok for request in result.requests)
    return result.figures


def test_each_distance_saves_computation_of_chats_that_memory_cannot_hold():
    alone, peers, disk = play(kv_peers=False), play(), play(kv_peers=False, kv_disk_size=GIB)
    both = play(kv_disk_size=GIB)
    assert alone["cached_memory"] == alone["cached"]
    assert peers["cached_peer"] > 0 == peers["cached_disk"]
    assert disk["cached_disk"] > 0 == disk["cached_peer"]
    assert min(both["cached_peer"], both["cached_disk"]) > 0
    assert both["computed_per_new"] < 1.1 < disk["computed_per_new"] < 1.2 < 1.5 < alone["computed_per_new"]
    assert both["ttft_p95"] < 0.5 * alone["ttft_p95"]


def test_prompts_that_share_nothing_are_neither_cached_nor_imported():
    figures = play([replace(request, blocks=(), answer_blocks=()) for request in CHATS[:30]], kv_disk_size=GIB)
    assert figures["cached"] == 0


def test_answers_of_the_full_model_are_lent_and_those_of_a_pruned_decoder_are_not():
    [chat] = [sessions(1, 8, 160, 0.01, 64, 320, 0)]
    whole = sum(request.prompt_tokens for request in chat)
    returned, pruned = (play(chat, replace(CPU, returns_kv=lends)) for lends in (True, False))
    new = 160 + 8 * 64
    assert returned["cached_peer"] > 0 == pruned["cached_peer"]
    assert (1 - returned["cached"]) * whole < 1.2 * new
    assert (1 - pruned["cached"]) * whole > new + 7 * 320 - 8 * 16


def test_workers_say_what_they_lend():
    def lenders(profile=CPU, **options):
        simulation = Simulation(CHATS[:2], profile, SimulationOptions(colocated=1, **options))
        simulation.run()
        return [info.lends_kv for worker in simulation.workers.values() for info in worker.infos]

    prefill, decode, both = [True], [False], [True, False]
    assert lenders() == [*prefill, *decode, *both]
    assert lenders(replace(CPU, returns_kv=True)) == [*prefill, True, *both]
    assert not any(lenders(replace(CPU, returns_kv=True), kv_peers=False))


def test_a_disk_outlives_its_worker():
    """Workers die every minute or so, and with them what they have in memory."""
    kept, lost = (play(mtbf=60.0, kv_peers=False, kv_disk_size=size) for size in (GIB, 0))
    assert kept["failures"] > 5
    assert kept["computed_per_new"] < 0.7 * lost["computed_per_new"]


def test_keys_of_small_blocks_stand_for_the_trace_s():
    """Decode workers have blocks of 16 tokens; the router still knows how much of a prompt each lends."""
    blocks, answer = tuple(range(4)), tuple(range(4, 8))
    chat = [TraceRequest(0.0, 2048, 2048, blocks, 512, answer), TraceRequest(100.0, 4200, 10, (*blocks, *answer), 512)]
    figures = play(chat, replace(CPU, returns_kv=True))
    assert figures["cached_peer"] + figures["cached_memory"] == pytest.approx(4096 / (2048 + 4200))
    assert figures["cached_peer"] >= 2048 / (2048 + 4200)
