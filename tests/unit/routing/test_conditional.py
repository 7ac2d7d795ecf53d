"""Conditional disaggregation: a prompt is computed beside its answer, or by a worker with prefill only."""

from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st
from jobs import make_job, worker_info

from overfill.kv.keys import PromptKeys
from overfill.routing.affinity import NUM_LEAST_LOADED
from overfill.routing.conditional import Conditional
from overfill.routing.policy import LeastLoad
from overfill.routing.pool import Roster
from overfill.routing.pool_invariant import check_pool
from overfill.routing.tier import DEFAULT_TIER
from overfill.routing.worker import DECODE, PREFILL
from overfill.v1 import decode_pb2, registry_pb2

BLOCK = 16


class Stack:
    """Workers with prefill only (``p``), with decode only (``d``) and with both stages (``c``)."""

    def __init__(self, *names, short=0):
        self.roster = Roster()
        self.roster.prefill.use(Conditional())
        self.roster.prefill.policy.set_short_prompts({DEFAULT_TIER: short})
        self.decode = {}
        for name in names:
            self.join(name)

    def join(self, name, incarnation=1):
        stages = {"p": [PREFILL], "d": [DECODE], "c": [PREFILL, DECODE]}[name[0]]
        infos = [worker_info(name, stage, incarnation, colocated=name[0] == "c") for stage in stages]
        for worker in self.roster.join_all(infos):
            if worker.info.stage == DECODE:
                self.decode[name] = worker
            else:
                self.report(name)

    def report(self, name, queued_tokens=0, keys=(), *, credits=4, running=0):
        load = decode_pb2.WorkerLoad(
            kv_blocks_total=1000, block_size=BLOCK, running=running, queued_tokens=queued_tokens
        )
        delta = registry_pb2.PrefixDelta(replaces=True, added=list(keys))
        report = registry_pb2.Report(load=load, credits=credits, ready=True, prefix=delta)
        self.roster.prefill.report(self.roster.prefill.get(name), report, 0.0)

    def job(self, prompt, decode=None, keys=None):
        job = make_job("a", prompt, 10, block_keys=keys)
        job.decode = self.decode.get(decode)
        return job

    def order(self, prompt, decode=None, keys=None):
        check_pool(self.roster.prefill, 0.0)
        return [worker.id for worker in self.roster.prefill.policy.best(self.job(prompt, decode, keys))]


def keys(*blocks):
    return PromptKeys(7, [token for block in blocks for token in [block] * BLOCK])


def test_a_short_prompt_is_computed_where_its_answer_is_written():
    stack = Stack("p0", "c0", "c1", short=100)
    assert stack.order(100, "c1") == ["c1", "p0", "c0"]
    assert stack.order(101, "c1") == ["p0", "c1", "c0"]
    stack.report("c1", 40, keys(1, 2)(BLOCK))
    assert stack.order(92, "c1", keys(1, 2, 3)) == ["c1", "p0", "c0"], "without what is cached there"
    assert stack.order(93, "c1", keys(1, 2, 3)) == ["p0", "c1", "c0"], "101 tokens with the queue"


def test_a_long_prompt_stays_with_its_answer_when_the_workers_with_prefill_only_are_busier():
    stack = Stack("p0", "p1", "c0", "c1")
    stack.report("p0", 900)
    stack.report("p1", 500)
    stack.report("c0", 499)
    assert stack.order(300, "c0") == ["c0", "p1", "p0", "c1"]
    stack.report("c0", 500)
    assert stack.order(300, "c0") == ["p1", "p0", "c0", "c1"]
    stack.report("p0", 900, keys(1, 2, 3, 4, 5, 6)(BLOCK))
    stack.report("c0", 850, keys(1, 2)(BLOCK))
    prompt = keys(*range(1, 40))
    assert stack.order(600, "c0", prompt)[0] == "p1"
    stack.report("p1", 2000)
    assert stack.order(600, "c0", prompt)[0] == "p0", "804 tokens ahead, and 818 where the answer is written"


def test_each_tier_has_its_own_short_prompts():
    stack = Stack("p0", "c0", "c1")
    for name in ("c0", "c1"):
        stack.decode[name].info = replace(stack.decode[name].info, tier={"c0": "full", "c1": "fast"}[name])
    stack.roster.prefill.policy.set_short_prompts({"fast": 100})
    assert stack.order(100, "c0")[0] == "p0"
    assert stack.order(100, "c1")[0] == "c1"


def test_a_worker_that_comes_back_is_another_one():
    stack = Stack("p0", "c0", short=100)
    gone = stack.decode["c0"]
    stack.join("c0", incarnation=2)
    assert stack.order(50, "c0")[0] == "c0"
    stack.decode["c0"] = gone
    assert stack.order(50, "c0")[0] == "p0", "the answer is on the worker that is gone"


# Against a plain implementation -----------------------------------------------------------------------------------


def plain_order(stack, job, short):
    """The order by its definition: sorts all workers anew."""

    def cached(worker):
        found = 0
        for key in job.block_keys(BLOCK):
            if key not in worker.prefix_keys:
                break
            found += BLOCK
        return found

    def ahead(worker):
        return worker.queued_tokens + max(1, job.prompt_tokens - cached(worker))

    workers = [worker for worker in stack.roster.prefill if worker.admissible(0.0)]
    workers.sort(key=lambda worker: (ahead(worker), LeastLoad.rank(worker), worker.id))
    prefill_only = [worker for worker in workers if not worker.info.colocated]
    colocated = [worker for worker in workers if worker.info.colocated]
    if not colocated:
        return prefill_only
    local = next(
        (worker for worker in colocated if job.decode is not None and worker.process == job.decode.process), None
    )
    short = 0 if job.decode is None else short
    if prefill_only:
        candidate = local or colocated[0]
        goes_first = ahead(candidate) < ahead(prefill_only[0]) or (candidate is local and ahead(local) <= short)
    else:
        stays = local is not None and ahead(local) - ahead(colocated[0]) <= short
        candidate, goes_first = local if stays else colocated[0], True
    others = [worker for worker in colocated if worker is not candidate]
    return [candidate, *prefill_only, *others] if goes_first else [*prefill_only, candidate, *others]


NAMES = [f"{kind}{index}" for kind in "pcd" for index in range(NUM_LEAST_LOADED)]


@example({"p0", "p3"}, [("p0", 32, 3, 4), ("p3", 31, 4, 4)], [("p3", 16)], 64, None, 0)  # one token is always computed
@settings(max_examples=300, deadline=None)
@given(
    names=st.sets(st.sampled_from(NAMES), min_size=1),
    reports=st.lists(
        st.tuples(
            st.sampled_from(NAMES), st.sampled_from([0, 16, 31, 32, 100]), st.integers(0, 5), st.sampled_from([0, 4, 4])
        ),
        max_size=16,
    ),
    placements=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 90)), max_size=8),
    prompt=st.integers(1, 90),
    decode=st.sampled_from([None, *NAMES]),
    short=st.sampled_from([0, 10, 40]),
)
def test_the_order_is_that_of_its_definition(names, reports, placements, prompt, decode, short):
    stack = Stack(*sorted(names), short=short)
    prompt_keys = keys(*range(prompt // BLOCK))
    pool = stack.roster.prefill
    for name, queued, blocks, credits in reports:
        if pool.get(name) is not None:
            stack.report(name, queued, keys(*range(blocks))(BLOCK), credits=credits)
    for name, tokens in placements:
        if (worker := pool.get(name)) is not None and worker.admissible(0.0):
            pool.place(worker, tokens)
    check_pool(pool, 0.0)
    job = stack.job(prompt, decode, prompt_keys)
    assert list(pool.policy.best(job)) == plain_order(stack, job, short)
