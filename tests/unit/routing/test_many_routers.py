"""Tests that no request waits for ever when several dispatchers share modelled workers, which divide their credits.

Each step draws an event: a request, an answer, a late report, a worker that fails or leaves. At the end failures stop;
then every request must be answered or refused, and every block and slot free.
"""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import make_job

from overfill.errors import Overloaded, PromptTooLong
from overfill.kv.handshake import KvIdentity
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.routing.dispatcher import Dispatcher, JobState, Placement
from overfill.routing.invariant import check
from overfill.routing.policies import POLICIES
from overfill.routing.pool import Roster
from overfill.routing.worker import DECODE, PREFILL, WorkerInfo
from overfill.rpc.credits import RouterDemand, divide
from overfill.v1 import decode_pb2, registry_pb2

BLOCK = 16
EVENTS = ["submit"] * 3 + ["advance"] * 4 + ["tell", "demand", "fail", "restart", "time"]
IDENTITY = KvIdentity(1, "a", "b", KvSpec(1, 1, 2, "float32", RopeSpec()))


class Model:
    """A modelled worker: its requests per router, and the demands that its routers have sent."""

    def __init__(self, name, stage, capacity, blocks, num_routers):
        self.name, self.stage, self.capacity, self.total = name, stage, capacity, blocks
        self.held = {}  # job -> blocks
        self.demands = [None] * num_routers
        self.incarnation = 0

    def accepts(self, job):
        blocks = -(-job.reserve_tokens // BLOCK)
        if len(self.held) >= self.capacity or sum(self.held.values()) + blocks > self.total:
            return False
        self.held[job] = blocks
        return True

    def report(self, router):
        load = decode_pb2.WorkerLoad(
            kv_blocks_total=self.total,
            kv_blocks_used=sum(self.held.values()),
            block_size=BLOCK,
            running=len(self.held),
        )
        credits = divide(self.capacity, self.demands)[router]
        return registry_pb2.Report(load=load, credits=credits, ready=True, routers=len(self.demands))


class World:
    def __init__(self, num_routers, shapes, policies):
        self.now, self.ids = 0.0, itertools.count()
        self.models = [
            Model(f"{'p' if stage == PREFILL else 'd'}{i}", stage, capacity, blocks, num_routers)
            for i, (stage, capacity, blocks) in enumerate(shapes)
        ]
        self.routers = []
        for index in range(num_routers):
            roster = Roster()
            decode, prefill = (POLICIES[name](index) for name in policies)
            roster.use(prefill, lambda decode=decode: decode)
            dispatcher = Dispatcher(roster, max_queue=5, claim_after=2.0)
            self.routers.append((roster, dispatcher))
            for model in self.models:
                self.join(index, model)
        self.jobs, self.ended = {}, 0

    def join(self, router, model):
        info = WorkerInfo(model.name, model.incarnation, model.stage, "h:1", (), IDENTITY, 0, 9)
        self.routers[router][0].join(info)
        self.tell(router, model)

    def tell(self, router, model):
        roster, dispatcher = self.routers[router]
        worker = roster.find(model.name)
        dispatcher.report(worker, model.report(router), self.now)

    def demand(self, router, model):
        roster, dispatcher = self.routers[router]
        worker = roster.find(model.name)
        model.demands[router] = RouterDemand(worker.in_flight, dispatcher.queued(roster.pool_of(worker)))

    def submit(self, router, prompt, answer):
        job = make_job(str(next(self.ids)), prompt, answer)
        try:
            self.routers[router][1].submit(job, self.now)
        except (Overloaded, PromptTooLong):
            self.ended += 1
        else:
            self.jobs[job] = router
        self.poll(router)

    def poll(self, router):
        dispatcher = self.routers[router][1]
        for outcome in dispatcher.poll(self.now):
            if not isinstance(outcome, Placement):
                self.drop(outcome.job)
        check(dispatcher, self.now)

    def model(self, worker):
        return next(m for m in self.models if worker is not None and m.name == worker.id)

    def drop(self, job):
        for model in self.models:
            model.held.pop(job, None)
        del self.jobs[job]
        self.ended += 1

    def advance(self, job):
        """Plays the next message of the job's decode worker."""
        router = self.jobs[job]
        dispatcher = self.routers[router][1]
        if job.state is JobState.PLACED:
            model = self.model(job.decode)
            if model.accepts(job):
                dispatcher.reserved(job)
            else:
                dispatcher.refused(job, model.report(router).load)
        elif job.state is JobState.RUNNING and job.prefill is not None:
            if len(self.model(job.prefill).held) >= self.model(job.prefill).capacity:
                dispatcher.need_prefill(job, job.prefill, failed=False, pause=True)
            else:
                dispatcher.prefill_done(job, self.now)
        elif job.state is JobState.RUNNING:
            dispatcher.finish(job)
            self.drop(job)
        self.poll(router)

    def fail(self, job, gone):
        router = self.jobs[job]
        if job.decode is not None:
            for model in self.models:
                model.held.pop(job, None)
            self.routers[router][1].lost(job, self.now, gone=gone)
            self.poll(router)

    def restart(self, model):
        model.incarnation += 1
        model.held.clear()
        for router in range(len(self.routers)):
            for job in [j for j, r in self.jobs.items() if r == router and j.decode and j.decode.id == model.name]:
                self.fail(job, True)
            self.join(router, model)
            self.poll(router)


@settings(max_examples=60, deadline=None)
@given(
    num_routers=st.integers(1, 3),
    shapes=st.lists(
        st.tuples(st.sampled_from([PREFILL, DECODE]), st.integers(1, 4), st.sampled_from([4, 20])), max_size=3
    ),
    policies=st.tuples(st.sampled_from(list(POLICIES)), st.sampled_from(list(POLICIES))),
    data=st.data(),
)
def test_every_request_is_answered_or_refused_whatever_routers_and_workers_do(num_routers, shapes, policies, data):
    world = World(num_routers, [(PREFILL, 2, 20), (DECODE, 2, 20), *shapes], policies)
    submitted = 0
    for _ in range(data.draw(st.integers(10, 60))):
        router = data.draw(st.integers(0, num_routers - 1))
        model = data.draw(st.sampled_from(world.models))
        job = data.draw(st.sampled_from(list(world.jobs))) if world.jobs else None
        match data.draw(st.sampled_from(EVENTS)):
            case "submit":
                world.submit(router, data.draw(st.integers(1, 300)), data.draw(st.integers(1, 100)))
                submitted += 1
            case "advance" if job is not None:
                world.advance(job)
            case "fail" if job is not None:
                world.fail(job, data.draw(st.booleans()))
            case "restart":
                world.restart(model)
            case "tell":
                world.tell(router, model)
                world.poll(router)
            case "demand":
                world.demand(router, model)
            case "time":
                world.now += 0.5
    for _ in range(400):
        if not world.jobs:
            break
        world.now += 0.1
        for router, model in itertools.product(range(num_routers), world.models):
            world.demand(router, model)
            world.tell(router, model)
        for router in range(num_routers):
            world.poll(router)
        for job in list(world.jobs):
            if job in world.jobs:
                world.advance(job)
    assert not world.jobs, [f"{job.id} is {job.state.value}" for job in world.jobs]
    assert world.ended == submitted
    assert not any(model.held for model in world.models)
    for roster, dispatcher in world.routers:
        assert dispatcher.num_jobs == dispatcher.num_waiting == 0
        assert all(worker.in_flight == 0 for worker in roster.workers())
