"""Tests router processes that share one address: real processes with mock workers, on loopback."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
from contextlib import ExitStack, contextmanager

import pytest
from http_calls import call
from stacks import ForkedChild, children, idle, mocked, running_stack, wait_until

from overfill.api import key_file as keys
from overfill.cli.main import main
from overfill.client import Client, Overloaded, SamplingParams, Unavailable
from overfill.stack.process_runner import child_environment

TRIES = 60  # connections, of which half go to each of two processes: one gets none with probability 2^-59
SHORT = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)
LONG = SamplingParams(max_tokens=300, ignore_eos=True, temperature=0)  # 15 s with a step of 0.05 s


@contextmanager
def shared_stack(pair, folder, step=0.05, **settings):
    defaults = {"routers": 2, "http": 0} | mocked(step=step)
    with running_stack(pair, share_port=True, **defaults | settings) as (stack, address):
        yield stack, address


def routers(address, **client):
    """Returns the status of every router process, by process id; silent ones are missing."""
    with Client(address, **client) as asking:
        return {router.process.pid: router for router in asking.status().routers if router.process is not None}


def running(address, **client):
    """Returns the number of running requests of every router process, by process id."""
    return {pid: router.activity.running for pid, router in routers(address, **client).items()}


def answer_over_http(url):
    """Returns a connection, and a function that asks for an answer on it."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=30)
    body = json.dumps({"model": "x", "prompt": "Hi", "max_tokens": 3, "ignore_eos": True})

    def ask():
        connection.request("POST", f"/{path}/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        told = json.load(response)
        assert response.status == 200, told
        return told

    return connection, ask


def wait_until_dead(stack, pid):
    """Waits until the kernel has closed the process's listener; before, it may still give it new connections."""
    (child,) = [child for child in children(stack, "router") if child.pid == pid]
    wait_until(lambda: child.returncode is not None, 10, "the process is gone")


def clients_of_every_process(opened, address, **client):
    """Opens clients until each of two processes has one. Returns them by process id."""
    found = {}
    for _ in range(TRIES):
        asking = opened.enter_context(Client(address, **client))
        found.setdefault(asking.status().process.pid, asking)  # a client stays at its process
        if len(found) == 2:
            return found
    raise AssertionError(f"all connections went to the same process: {found.keys()}")


def streams_on_every_process(opened, address):
    """Opens a stream on each of two processes. Returns the streams by process id."""
    found = {}
    for pid, client in clients_of_every_process(opened, address).items():
        found[pid] = opened.enter_context(client.stream("Hi", sampling=LONG))
        next(found[pid])
    return found


def test_every_process_answers_at_the_one_address_and_status_adds_up(tiny_pair, tmp_path, capsys):
    with shared_stack(tiny_pair, tmp_path, step=0, served_model_name="x") as (stack, address):
        assert stack.addresses == (address,)
        (url,) = stack.spec.openai_urls(stack.addresses)
        pids = {child.pid for child in children(stack, "router")}

        def answers():
            return {pid: router.activity.answers for pid, router in routers(address).items()}

        sent = 0
        for ask in ("grpc", "http"):
            before = answers()
            assert before.keys() == pids
            for _ in range(TRIES):
                if ask == "grpc":
                    with Client(address) as client:
                        assert client.generate("Hi", sampling=SHORT).usage.completion_tokens == 3
                else:
                    connection, answer = answer_over_http(url)
                    assert answer()["usage"]["completion_tokens"] == 3
                    connection.close()
                sent += 1
                if all(count > before[pid] for pid, count in answers().items()):
                    break
            else:
                raise AssertionError(f"one process answered everything over {ask}: {answers()}")
        with Client(address) as client:
            status = client.status()
        assert status.activity.answers == sum(answers().values()) == sent
        of_each = [router.activity.timing["ttft"].p50 for router in status.routers]
        assert 0.99 * min(of_each) <= status.activity.timing["ttft"].p50 <= 1.01 * max(of_each)

        assert main(["status", "--json", "--address", address]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["grpc"] == address
        assert {router["pid"] for router in told["routers"]} == pids
        assert sum(router["answers_last_minute"] for router in told["routers"]) == sent
        assert main(["status", "--address", address]) == 0
        assert f"2 routers share {address}" in capsys.readouterr().out
        host = url.removeprefix("http://").removesuffix("/v1")
        for path, code, expected in (
            ("/status", 200, f'"answers_last_minute":{sent}'),
            ("/metrics", 404, "overfill status"),
        ):
            status, _, body = call(f"http://{host}{path}")
            assert (status, expected in body.decode()) == (code, True), body

        # Prometheus finds every process through any of them, and their counters add up to what was sent.
        total, targets = 0, []
        for router in told["routers"]:
            where = f"http://{router['metrics_address']}"
            targets.append(sorted(target["targets"][0] for target in json.loads(call(f"{where}/targets").body)))
            for line in call(f"{where}/metrics").body.decode().splitlines():
                if line.startswith("overfill_router_requests_total{") and 'outcome="ok"' in line:
                    total += float(line.split()[-1])
        assert targets[0] == targets[1]
        assert {router["metrics_address"] for router in told["routers"]} <= set(targets[0]), "beside the workers'"
        assert total == sent

        with ExitStack() as opened:
            (frozen, _), (_, client) = clients_of_every_process(opened, address).items()
            os.kill(frozen, signal.SIGSTOP)
            try:
                silent = [router for router in client.status().routers if router.state == "silent"]
                assert [(router.process, router.activity) for router in silent] == [(None, None)]
            finally:
                os.kill(frozen, signal.SIGCONT)

        command = [
            sys.executable,
            "-m",
            "services.decode.main",
            f"--pair={tiny_pair}",
            f"--routers={address}",
            "--engine=mock",
        ]
        lines = []
        lost = ForkedChild("lost", command, child_environment(os.environ, 1), lambda name, line: lines.append(line))
        wait_until(lambda: lost.returncode is not None, 60, "a worker at the shared address gives up")
        assert "several router processes share this address" in "\n".join(lines)


def test_a_process_that_is_killed_costs_only_its_own_requests(tiny_pair, tmp_path):
    with shared_stack(tiny_pair, tmp_path) as (stack, address), ExitStack() as opened:
        streams = streams_on_every_process(opened, address)
        # An address that is given twice is tried twice: the answer goes on at the process that is left.
        dead, other = streams
        client = clients_of_every_process(opened, f"{address},{address}")[dead]
        survivors = [opened.enter_context(client.stream("Hi", sampling=LONG)) for _ in range(2)]
        for stream in survivors:
            next(stream)
        os.kill(dead, signal.SIGKILL)
        with pytest.raises(Unavailable):
            for _ in streams[dead]:
                pass
        wait_until_dead(stack, dead)
        for stream in survivors:
            for _ in range(5):
                next(stream)
        for _ in range(5):
            next(streams[other])
        with Client(address) as client:
            assert client.generate("Hi", sampling=SHORT).usage.completion_tokens == 3
            assert list(running(address)) == [other]
        assert stack.reachable
        assert any("router" in line and "SIGKILL" in line for line in stack.news())
        opened.close()
        wait_until(lambda: idle(address), 20, "workers have freed everything")


def test_a_process_that_drains_ends_its_answers_and_refuses_nothing(tiny_pair, tmp_path):
    with (
        shared_stack(tiny_pair, tmp_path, served_model_name="x", grace_period="60") as (stack, address),
        ExitStack() as opened,
    ):
        streams = streams_on_every_process(opened, address)
        (url,) = stack.spec.openai_urls(stack.addresses)
        clients = [opened.enter_context(Client(address)) for _ in range(6)]
        connections = [answer_over_http(url) for _ in range(6)]
        for client in clients:
            client.generate("Hi", sampling=SHORT)
        for connection, answer in connections:
            opened.callback(connection.close)
            answer()
        leaving, other = streams
        (child,) = [child for child in children(stack, "router") if child.pid == leaving]
        os.kill(leaving, signal.SIGTERM)
        wait_until(lambda: any("drains" in line for line in stack.lines), 10, "the process drains")
        for _ in range(3):
            for client in clients:
                assert client.generate("Hi", sampling=SHORT).usage.completion_tokens == 3
        for connection, answer in connections:
            try:
                answer()
            except ConnectionError:  # it was idle, so the process has closed it
                connection.close()
                answer()
        assert running(address)[leaving] >= 1, "it serves its answers to their end"
        for _ in streams[leaving]:
            pass
        assert streams[leaving].answer.usage.completion_tokens == LONG.max_tokens
        wait_until(lambda: child.returncode is not None, 20, "the drained process ends")
        assert child.returncode == 0
        next(streams[other])
        assert list(running(address)) == [other]


def test_limits_of_a_key_hold_over_all_processes(tiny_pair, tmp_path):
    limit = 3
    file = tmp_path / "keys.json"
    free = keys.create(file, "free")
    held = keys.create(file, "held", concurrency=limit)
    slow = keys.create(file, "slow", rate=limit / 100)
    with shared_stack(tiny_pair, tmp_path, api_keys=file) as (stack, address), ExitStack() as opened:

        def attempt(key, **options):
            client = opened.enter_context(Client(address, api_key=key))
            stream = opened.enter_context(client.stream("Hi", **options))
            next(stream)
            return stream

        streams = [attempt(held, sampling=LONG) for _ in range(limit)]
        with Client(address, api_key=free) as client:
            assert client.status().activity.running == limit
        for _ in range(10):  # to one process or the other
            with pytest.raises(Overloaded, match=f"{limit} request.* running"):
                attempt(held, sampling=LONG)
        attempt(slow, sampling=SHORT)
        for _ in range(10):
            with pytest.raises(Overloaded, match="requests per second"):
                attempt(slow, sampling=SHORT)
        # What a killed process ran no longer counts.
        wait_until(lambda: sum(running(address, api_key=free).values()) == limit, 10, "the short answer has ended")
        counts = running(address, api_key=free)
        dead = max(counts, key=counts.get)
        os.kill(dead, signal.SIGKILL)
        wait_until_dead(stack, dead)
        for _ in range(counts[dead]):
            streams.append(attempt(held, sampling=LONG))
        with pytest.raises(Overloaded, match=f"{limit} request.* running"):
            attempt(held, sampling=LONG)
