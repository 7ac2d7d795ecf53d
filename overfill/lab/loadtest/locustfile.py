"""The file for ``locust -f``: adds our options, users and shape, and checks the objectives when the test ends.

Locust's own ``--host``, ``--users``, ``--spawn-rate`` and ``--run-time`` apply. Options of locust that cannot work here
are refused by name.

Exit code 0 when every objective is met, 1 when one is missed, 2 when nothing could be measured.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from dataclasses import fields
from typing import Any

import gevent
from locust import LoadTestShape, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import STATE_INIT, MasterRunner, WorkerRunner

from overfill.errors import InvalidRequest, OverfillError
from overfill.lab.loadtest.measure import measure
from overfill.lab.loadtest.plan import LOCUST_NAMES, LoadPlan, help_of, locust_flag, locust_type
from overfill.lab.loadtest.progress import Progress
from overfill.lab.loadtest.run import LoadTestRun
from overfill.lab.loadtest.shapes import users_at
from overfill.lab.loadtest.users import GrpcUser, OpenAiUser, attach, run_of, user_class
from overfill.lab.loadtest.verdict import LoadTestStatus, conclude
from overfill.lab.traffic.traces import TraceRequest

__all__ = ["GrpcUser", "OpenAiUser", "PlannedShape"]

_WARM_UP_TOKENS = (64, 4)  # prompt, answer
_SPAWN_RATE = 100.0  # users per second

_OWN_FLAGS = {"target": "--host", "users": "--users", "duration": "--run-time"}

_EXIT_CODES = {LoadTestStatus.MET: 0, LoadTestStatus.MISSED: 1, LoadTestStatus.NOT_MEASURED: 2}

_REFUSED = {
    "stop_timeout": ("--stop-timeout", "the test always waits for running requests; --timeout limits each of them"),
    "class_picker": ("--class-picker", "--host decides which users send requests: HOST:PORT or http(s)://…"),
    "tags": ("--tags", "the only task has no tags"),
    "exclude_tags": ("--exclude-tags", "the only task has no tags"),
    "config_users": ("--config-users", "the options under OverFill in --help configure the users"),
}
"""Options of locust that would have no effect here: name in the parsed options -> (flag, reason)."""


class PlannedShape(LoadTestShape):
    """Number of users over time, from the plan, until the test is over."""

    use_common_options = True

    def tick(self) -> Any:
        assert self.runner is not None
        environment = self.runner.environment
        run = run_of(environment)
        if self.runner.state == STATE_INIT:  # once per test: the options may have been edited on locust's page
            _adopt(environment)
        plan, elapsed = run.plan, time.perf_counter() - self.start_time
        if run.is_over(elapsed):
            return None
        users: int | None = _processes(environment)  # open loop: one user per process
        if not plan.open_loop:
            assert plan.seconds is not None
            users = users_at(plan.kind, elapsed, plan.seconds, plan.users)
        return None if users is None else (users, _options(environment).spawn_rate, [user_class(plan)])


def _add_options(parser: LocustArgumentParser, **_: Any) -> None:
    group = parser.add_argument_group("OverFill", "Requests, server, and objectives of the test.")
    for f in fields(LoadPlan):
        if f.name != "users":  # locust has this option itself
            own = _OWN_FLAGS.get(f.name)
            group.add_argument(
                locust_flag(f),
                type=locust_type(f),
                default=f.default if own is None else None,
                help=help_of(f) if own is None else f"Same as {own}; give only one of the two.",
            )


def _init(environment: Environment, **_: Any) -> None:
    options = _options(environment)
    try:
        plan = LoadPlan.from_locust(vars(options))
        _refuse(options, plan)
        run = LoadTestRun(plan)
    except InvalidRequest as error:
        message = error.reason
        print(f"loadtest: {_flag(error.field, options)}: {message}", file=sys.stderr)
        sys.exit(2)
    options.num_users = plan.users  # locust's default is 1
    options.spawn_rate = options.spawn_rate or _SPAWN_RATE
    _settle(environment, plan)
    attach(environment, run)
    # Wait for requests that run when the time is over: leaving them out would leave out the slow ones.
    environment.stop_timeout = run.plan.timeout
    if isinstance(environment.runner, WorkerRunner):
        environment.events.report_to_master.add_listener(lambda data, **_: run.report(data))
    elif isinstance(environment.runner, MasterRunner):
        environment.events.worker_report.add_listener(lambda data, **_: run.collect(data))
    if not isinstance(environment.runner, WorkerRunner):
        environment.events.quitting.add_listener(_judge)
        gevent.spawn(Progress(run, sys.stderr).run)


def _refuse(options: Namespace, plan: LoadPlan) -> None:
    """Raises InvalidRequest for an option of locust that would be ignored or conflicts with ours."""
    for name, (flag, why) in _REFUSED.items():
        if getattr(options, name, None):
            raise InvalidRequest(flag, f"cannot be used: {why}")
    if options.exit_code_on_error != 1:
        raise InvalidRequest(
            "--exit-code-on-error", "cannot be used: --objective errors=N says how many errors are allowed"
        )
    for name, own in LOCUST_NAMES.items():
        ours, theirs = getattr(options, name, None), getattr(options, own)
        if ours is not None and theirs is not None and ours != theirs:
            raise InvalidRequest(_OWN_FLAGS[name], f"is {theirs}, but --{name} is {ours}; give only one of the two")
    if plan.open_loop:
        for flag, value in (("--users", options.num_users), ("--spawn-rate", options.spawn_rate)):
            if value is not None:
                raise InvalidRequest(
                    flag, "cannot be used with shape arrivals, which sends each request at its own time"
                )
    for name in options.user_classes:
        if name != user_class(plan).__name__:
            raise InvalidRequest(
                name, f"cannot send requests to {plan.target}; leave it out: --host decides which users run"
            )


def _options(environment: Environment) -> Namespace:
    options: Namespace | None = environment.parsed_options
    assert options is not None
    return options


def _flag(field: str, options: Namespace) -> str:
    """Returns the flag that set ``field``, as the user gave it."""
    own = LOCUST_NAMES.get(field)
    if own is not None and getattr(options, own):
        return _OWN_FLAGS[field]
    flags = {f.name: locust_flag(f) for f in fields(LoadPlan)}
    return flags.get(field, field)


def _settle(environment: Environment, plan: LoadPlan) -> None:
    """Copies locust's own options into ours: a master sends only ours to its workers."""
    options = _options(environment)
    options.target, options.duration = plan.target, plan.duration
    options.host = options.run_time = None
    environment.host = plan.target  # locust's page shows it


def _adopt(environment: Environment) -> None:
    """Reads the options again for a test that is about to start."""
    run = run_of(environment)
    run.outcomes.clear()  # outcomes of an earlier test that was started from locust's page
    try:
        plan = LoadPlan.from_locust(vars(_options(environment)))
        run.set_plan(plan)
        run.failure = None
        _settle(environment, plan)
    except (OverfillError, ValueError) as error:
        run.failure = str(error)


def _begin(environment: Environment, **_: Any) -> None:
    runner = environment.runner
    run = run_of(environment)
    if isinstance(runner, MasterRunner):
        return
    if isinstance(runner, WorkerRunner):
        _adopt(environment)  # the master's options have arrived
    if run.failure is None:
        run.failure = _warm_up(run)
    if run.failure is None:
        index = runner.worker_index if isinstance(runner, WorkerRunner) else 0
        run.begin(index, _processes(environment))
    if environment.shape_class is not None:
        environment.shape_class.reset_time()  # the warm-up is not part of the test


def _judge(environment: Environment, **_: Any) -> None:
    status = conclude(run_of(environment), sys.stdout, sys.stderr)
    environment.process_exit_code = _EXIT_CODES[status]


def _warm_up(run: LoadTestRun) -> str | None:
    """Sends a short request to each tier, to open connections. Returns the reason if one failed, else None."""
    plan = run.plan
    prompt_tokens, output_tokens = _WARM_UP_TOKENS
    # Seed -1: tokens that no other request has, so that no later prompt finds them in a prefix cache.
    prompt = TraceRequest(0.0, prompt_tokens, output_tokens).prompt(plan.vocab_size, -1)
    try:
        transport = user_class(plan).transport(plan)
    except (OverfillError, ValueError, OSError) as error:
        return str(error)
    try:
        for tier in plan.tiers:
            outcome = measure(transport, prompt, output_tokens, plan.timeout, None, run.clock, tier)
            if outcome.error is not None:
                return outcome.error
        return None
    finally:
        transport.close()


def _processes(environment: Environment) -> int:
    """Returns the number of processes that send requests; in a distributed test, ``--expect-workers``."""
    if isinstance(environment.runner, MasterRunner | WorkerRunner):
        return int(getattr(_options(environment), "expect_workers", 1))
    return 1


events.init_command_line_parser.add_listener(_add_options)
events.init.add_listener(_init)
events.test_start.add_listener(_begin)
