from overfill.routing.policy import LeastLoad, RoundRobin
from overfill.routing.pool import DECODE, PREFILL, Roster


def test_least_load_prefers_the_shorter_prefill_queue(add_worker):
    roster = Roster()
    add_worker(roster, "p0", PREFILL, queued_tokens=5000)
    short = add_worker(roster, "p1", PREFILL, queued_tokens=100, running=9)
    assert LeastLoad().choose(list(roster.prefill), 10) is short


def test_least_load_counts_prompts_placed_since_the_report(add_worker):
    roster = Roster()
    add_worker(roster, "p0", PREFILL)
    add_worker(roster, "p1", PREFILL)
    chosen = []
    for tokens in (1000, 10, 10):
        worker = LeastLoad().choose(list(roster.prefill), tokens)
        roster.prefill.place(worker, tokens)
        chosen.append(worker.id)
    assert chosen == ["p0", "p1", "p1"]


def test_least_load_sees_the_requests_of_other_routers(add_worker):
    roster = Roster()
    add_worker(roster, "d0", DECODE, running=3)
    quiet = add_worker(roster, "d1", DECODE, running=1)
    assert LeastLoad().choose(list(roster.decode), 10) is quiet


def test_equal_workers_take_turns(add_worker):
    for policy in (LeastLoad(), RoundRobin()):
        roster = Roster()
        for name in ("d0", "d1", "d2"):
            add_worker(roster, name)
        chosen = []
        for _ in range(6):
            worker = policy.choose(list(roster.decode), 10)
            roster.decode.place(worker, 10)
            roster.decode.release(worker)
            worker.placed = 0  # as after a report
            chosen.append(worker.id)
        assert chosen == ["d0", "d1", "d2"] * 2
