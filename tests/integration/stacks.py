"""Stacks of real processes for tests: starts them, reads their state, adds faults, stops them."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from forked import Forked

from overfill.client import Client, OverfillError, SamplingParams
from overfill.stack.child import Child
from overfill.stack.describe import describe
from overfill.stack.placed import place
from overfill.stack.process_runner import ProcessRunner

SECRET = "the secret of a stack of tests"
"""With API keys, what its processes show each other."""

BASE = {
    "dtype": "float32",
    "kv_memory": "4MiB",
    "max_model_len": "512",
    "grace_period": "10",
}


class ForkedChild(Child):
    """A child that runs a module of this interpreter."""

    def _start(self, command, env, orphaned):
        assert command[:2] == [sys.executable, "-m"]
        return Forked(command[2], command[3:], env)


class FaultyStack(ProcessRunner):
    """A stack of forked processes. Workers named in ``faults`` have one fault each (tests.support.faulty_service)."""

    def __init__(self, spec, sink, faults):
        super().__init__(place(spec), sink)
        self._faults = faults

    def _program(self, name, module):
        fault = self._faults.get(name)
        return module.split() if fault is None else ["tests.support.faulty_service", fault, *module.split()]

    def _spawn(self, name, module, config, threads):
        command = [sys.executable, "-m", *self._program(name, module)]
        return ForkedChild(name, command, self._environment(name, config, threads), self._sink)


def mocked(**arguments):
    """Returns the settings of workers on the mock engine, whose answers end at max_tokens only."""
    return {"engine": "mock", "engine_args": json.dumps({"answer_tokens": 1 << 30} | arguments)}


@contextmanager
def running_stack(
    pair, prefill=1, decode=1, routers=1, faults=None, http="off", tls=None, lines=None, share_port=False,
    tiers=(), colocated=0, **settings,
):  # fmt: skip
    """Yields ``(stack, address)`` once every worker is ready; drains it at the end. ``lines`` receives its output."""
    if settings.get("api_keys") is not None and tls is None:
        settings["stack_secret"] = settings["api_keys"].with_name("stack-secret")
        settings["stack_secret"].write_text(SECRET)
    spec = describe(
        pair or "", prefill=prefill, decode=decode, colocated=colocated, tiers=tiers, routers=routers, http=http,
        share_port=share_port, threads=1, settings=BASE | settings, tls=tls,
    )  # fmt: skip
    with running_spec(spec, faults, lines) as running:
        yield running


@contextmanager
def running_spec(spec, faults=None, lines=None):
    """Yields ``(stack, address)`` of the stack that a document describes, as ``running_stack``."""
    lines = [] if lines is None else lines
    stack = FaultyStack(spec, lambda name, line: lines.append(f"{name} | {line}"), faults or {})
    try:
        stack.lines = lines
        stack.start()
        stack.wait_ready(threading.Event())
        yield stack, stack.addresses[0]
    except BaseException:
        print("\n".join(lines))
        raise
    finally:
        stack.stop()


class Load:
    """Streams that each ask one greedy prompt after the other until the end of the block.

    Attributes:
        answers: those so far, in the order in which they ended.
        errors: of requests that failed.
    """

    def __init__(self, address, streams, max_tokens, prompts=("Once upon a time",)):
        self.errors, self.answers, self._stop = [], [], threading.Event()
        self._address, self._sampling = address, SamplingParams(temperature=0, max_tokens=max_tokens)
        self._pool = ThreadPoolExecutor(streams)
        for stream in range(streams):
            self._pool.submit(self._ask, prompts[stream % len(prompts)])

    def _ask(self, prompt):
        with Client(self._address) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append(client.generate(prompt, sampling=self._sampling, timeout=120))
                except Exception as error:
                    self.errors.append(error)

    def wait_for_answers(self, count):
        """Waits for ``count`` more answers; ends early, with an AssertionError, when a request fails."""
        wanted = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= wanted or self.errors, 120, f"{count} more answers")
        assert self.errors == []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._pool.shutdown()


def children(stack, stage):
    """Returns the processes of one stage: "router", "prefill" or "decode"."""
    return [c for c in [*stack._routers, *stack._workers] if c.name.startswith(stage)]


def wait_until(condition, timeout, what, pause=0.02):
    """Polls ``condition`` every ``pause`` seconds until it is true, for up to ``timeout``; returns the seconds waited.

    Raises:
        AssertionError: ``condition`` was still false after ``timeout`` seconds.
    """
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(pause)
    return time.monotonic() - start


def loads(address, tls=None, api_key=None):
    """Returns the load of every worker that answers, by id; with both stages, the decode stage's."""
    with Client(address, tls=tls, api_key=api_key) as client:
        return {w.id: w.process.load for w in client.status().workers if w.process is not None}


def wait_accepted(address, key):
    """Waits until the router has read a new key."""

    def accepted():
        with Client(address, api_key=key) as client, suppress(OverfillError):
            return bool(client.models())

    wait_until(accepted, 20, "the router reads its keys again")


def idle(address, api_key=None):
    """True if no worker owns a block or runs a request."""
    with Client(address, api_key=api_key) as client:
        loads = [worker.process.load for worker in client.status().workers if worker.process is not None]
    return all(load.kv_blocks_used == load.running == load.waiting == 0 for load in loads)
