"""What ``locust -f`` loads: options, users, the shape, and the verdict when the test ends.

Exit code 0 when every objective is met, 1 when one is not, 2 when nothing could be measured.
"""

from __future__ import annotations

import sys
import time
from dataclasses import fields
from typing import Any

import gevent
from locust import LoadTestShape, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from overfill.errors import OverfillError
from overfill.loadtest.measure import measure
from overfill.loadtest.plan import LoadPlan, locust_flag
from overfill.loadtest.progress import Progress
from overfill.loadtest.session import Session
from overfill.loadtest.shapes import users_at
from overfill.loadtest.users import GrpcUser, OpenAiUser, attach, session_of, user_class
from overfill.loadtest.verdict import Result, conclude
from overfill.traffic.traces import TraceRequest

__all__ = ["GrpcUser", "OpenAiUser", "PlannedShape"]

_WARM_UP_TOKENS = (64, 4)  # prompt, answer
_SPAWN_RATE = 100.0


class PlannedShape(LoadTestShape):
    """Users over time as the plan has it, until it is over."""

    use_common_options = True

    def tick(self) -> Any:
        assert self.runner is not None
        environment = self.runner.environment
        session = session_of(environment)
        plan, elapsed = session.plan, time.perf_counter() - self.start_time
        if session.over(elapsed):
            return None
        users: int | None = _processes(environment)  # in an open loop one for each process
        if not plan.open_loop:
            assert plan.seconds is not None
            users = users_at(plan.kind, elapsed, plan.seconds, plan.users)
        return None if users is None else (users, _SPAWN_RATE, [user_class(plan)])


def _add_options(parser: LocustArgumentParser, **_: Any) -> None:
    group = parser.add_argument_group("OverFill", "What is asked, how, and what has to come of it.")
    for f in fields(LoadPlan):
        if f.name != "users":  # locust has that one
            group.add_argument(
                locust_flag(f), type=_plain(f.metadata["kind"]), default=f.default, help=f.metadata["help"]
            )


def _init(environment: Environment, **_: Any) -> None:
    options = vars(environment.parsed_options)
    try:
        session = Session(LoadPlan.of_locust(options))
    except OverfillError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        sys.exit(2)
    attach(environment, session)
    # A request on its way when the time is over is waited for: those left out would be the slow ones.
    environment.stop_timeout = session.plan.timeout
    if isinstance(environment.runner, WorkerRunner):
        environment.events.report_to_master.add_listener(lambda data, **_: session.report(data))
    elif isinstance(environment.runner, MasterRunner):
        environment.events.worker_report.add_listener(lambda data, **_: session.collect(data))
    if not isinstance(environment.runner, WorkerRunner):
        environment.events.quitting.add_listener(_judge)
        gevent.spawn(Progress(session, sys.stderr).run)


def _begin(environment: Environment, **_: Any) -> None:
    runner = environment.runner
    session = session_of(environment)
    session.outcomes.clear()  # of an earlier test, started from locust's own page
    if isinstance(runner, MasterRunner):
        return
    try:
        session.adopt(LoadPlan.of_locust(vars(environment.parsed_options)))  # a worker has the master's options by now
        session.broken = _warm_up(session)
    except OverfillError as error:
        session.broken = str(error)
    if session.broken is None:
        index = runner.worker_index if isinstance(runner, WorkerRunner) else 0
        session.begin(index, _processes(environment))
    if environment.shape_class is not None:
        environment.shape_class.reset_time()  # what came before is not part of the test


def _judge(environment: Environment, **_: Any) -> None:
    result = conclude(session_of(environment), sys.stdout, sys.stderr)
    environment.process_exit_code = {Result.MET: 0, Result.MISSED: 1, Result.BROKEN: 2}[result]


def _warm_up(session: Session) -> str | None:
    """One short request, not measured: connections are open then. Why it failed, or None."""
    plan = session.plan
    prompt_tokens, output_tokens = _WARM_UP_TOKENS
    # Tokens that no other request has: their KV must not be in a prefix cache.
    prompt = TraceRequest(0.0, prompt_tokens, output_tokens).prompt(plan.vocab_size, -1)
    try:
        transport = user_class(plan).transport(plan)
    except (OverfillError, ValueError, OSError) as error:
        return str(error)
    try:
        return measure(transport, prompt, output_tokens, plan.timeout, None, session.clock).error
    finally:
        transport.close()


def _processes(environment: Environment) -> int:
    """How many send: of a distributed test as many as ``--expect-workers`` says."""
    if isinstance(environment.runner, MasterRunner | WorkerRunner):
        return int(getattr(environment.parsed_options, "expect_workers", 1))
    return 1


def _plain(kind: Any) -> Any:
    """Paths stay text: the master sends options to the workers."""
    return kind if kind in (int, float) else str


events.init_command_line_parser.add_listener(_add_options)
events.init.add_listener(_init)
events.test_start.add_listener(_begin)
