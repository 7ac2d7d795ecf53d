"""Tests a rollout on real processes: two routers, and mock workers of two revisions with different weights."""

import os
import uuid
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
from forked import Forked
from listening import free_ports
from stacks import BASE, mocked, wait_until

from overfill.client import Client, Incompatible, SamplingParams
from overfill.making.tiny import make_tiny_pair

REQUESTS = 200
SAMPLING = SamplingParams(temperature=0, max_tokens=3)


class Process:
    """A service as a process."""

    def __init__(self, service, **settings):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        self._forked = Forked(f"services.{service}.main", flags, os.environ)

    def stop(self, signal=15):
        if self._forked.poll() is None:
            os.kill(self._forked.pid, signal)
        self._forked.stdout.close()
        self._forked.wait(30)


class Stack:
    """Two routers, and a worker per stage of each revision. The workers outlive the routers."""

    def __init__(self, pairs, processes):
        port = free_ports(2)
        self.addresses = [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
        self._pairs, self._processes = pairs, processes
        self.routers = [self.start_router(0), self.start_router(1)]
        for revision, pair in pairs.items():
            for stage in ("prefill", "decode"):
                self._start(
                    stage, pair=pair, revision=revision, port=0, routers=",".join(self.addresses),
                    worker_id=f"{stage}-{revision}", **mocked(), **BASE,
                )  # fmt: skip

    def start_router(self, index):
        return self._start(
            "router", pair=self._pairs["r1"], revision="r1", canary_revision="r2", canary_pair=self._pairs["r2"],
            canary_percent=0, port=self.addresses[index].rpartition(":")[2], served_model_name="tiny", grace_period=0,
        )  # fmt: skip

    def _start(self, service, **settings):
        process = Process(service, **settings)
        self._processes.callback(process.stop)
        return process


@contextmanager
def started(pairs):
    with ExitStack() as processes:
        stack = Stack(pairs, processes)
        clients = [processes.enter_context(Client(address)) for address in stack.addresses]
        for client in clients:
            wait_until(lambda c=client: shares(c) == {"r1": (100, True), "r2": (0, True)}, 120, "all workers are ready")
        yield stack, clients


def shares(client):
    """Returns the share of each revision and whether it is ready; empty while the router does not answer."""
    try:
        return {one.name: (one.percent, one.ready) for one in client.rollout().revisions}
    except Exception:
        return {}


def share(client):
    return shares(client).get("r2", (None,))[0]


def ask(client, session):
    return client.generate([5, 6, 7], sampling=SAMPLING, session=session, timeout=60)


def revisions(clients, sessions):
    """Asks once per session, of both routers in turn, and returns the revisions that answered."""
    digests = {}
    answers = [ask(clients[index % 2], session) for index, session in enumerate(sessions)]
    for answer in answers:
        revision = answer.identity.revision
        assert (answer.prefill_worker, answer.decode_worker) == (f"prefill-{revision}", f"decode-{revision}")
        digests.setdefault(revision, set()).add((answer.identity.full_digest, answer.identity.decoder_digest))
    assert all(len(one) == 1 for one in digests.values())
    assert len(set.union(*digests.values())) == len(digests), "each revision has its own weights"
    return [answer.identity.revision for answer in answers]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("revisions")
    return {name: make_tiny_pair(folder / name, seed=seed) for seed, name in enumerate(("r1", "r2"), start=1)}


def test_a_rollout_moves_conversations_by_percent_on_all_routers_and_can_be_undone(pairs):
    sessions = [uuid.uuid4().hex for _ in range(REQUESTS)]
    with started(pairs) as (stack, clients):
        assert set(revisions(clients, sessions[:20])) == {"r1"}

        clients[0].set_rollout("r2", 30)
        wait_until(lambda: share(clients[1]) == 30, 10, "the other router learns the share from the workers")
        first = revisions(clients, sessions)
        assert 30 <= first.count("r2") <= 92, "30 percent of 200, with five standard deviations"
        assert revisions(clients[::-1], sessions) == first, "the routers agree on each conversation"

        stack.routers[1].stop(9)
        stack.routers[1] = stack.start_router(1)
        wait_until(lambda: share(clients[1]) == 30, 60, "a router that restarts learns the share")

        clients[1].set_rollout("r1", 40)
        wait_until(lambda: share(clients[0]) == 60, 10, "a share of the old revision is one of the new one too")
        second = revisions(clients, sessions)
        assert all(after == "r2" for before, after in zip(first, second, strict=True) if before == "r2")
        assert second.count("r2") > first.count("r2")

        session = next(session for session, revision in zip(sessions, second, strict=True) if revision == "r2")
        begun = ask(clients[0], session)
        clients[0].undo_rollout()
        wait_until(lambda: share(clients[1]) == 0, 10, "the other router learns that it is undone")
        assert set(revisions(clients, sessions[:40])) == {"r1"}
        rest = resume(clients[1], begun, begun.identity)
        assert (rest.identity, rest.token_ids) == (begun.identity, begun.token_ids[1:])
        with pytest.raises(Incompatible, match=r"began with the revision 'r3'"):
            resume(clients[1], begun, replace(begun.identity, revision="r3"))


def resume(client, begun, identity):
    """Asks for the rest of an answer after its first token."""
    sampling = replace(SAMPLING, seed=begun.seed)
    ids = begun.token_ids[:1]
    return client.generate([5, 6, 7], sampling=sampling, resume_token_ids=ids, resume_identity=identity, timeout=60)
