"""Tests ``locust -f loadtest/locustfile.py`` on mock workers: its users, and locust's own options, page and workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mocks import mock_stack

from overfill.stack.ports import free_ports

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
SHORT = ["--vocab-size=512", "--prompt-tokens=8", "--output-tokens=4"]


@pytest.fixture(scope="module")
def stack(tiny_pair):
    with mock_stack(tiny_pair, decode_settings={"step": 0.01}) as stack:
        yield stack


def test_locusts_page_and_its_workers_have_what_the_page_says(stack):
    """The page starts the test with the host of another protocol than the command line; a worker sends the requests."""
    page, bus = free_ports("127.0.0.1", 2)
    master = [f"--web-port={page}", "--web-host=127.0.0.1", "--master", f"--master-bind-port={bus}"]
    with started(*master, "--class-picker", "--host=grpc://127.0.0.1:9", *SHORT) as main:
        url = f"http://127.0.0.1:{page}"
        with started("--worker", "--master-host=127.0.0.1", f"--master-port={bus}"):
            until(lambda: asked(f"{url}/stats/requests")["workers"])
            form = {"host": f"{stack.url}/v1", "user_count": 3, "spawn_rate": 5, "run_time": "2s"}
            assert asked(f"{url}/swarm", form | {"user_classes": "OpenAiUser"})["success"]
            # The worker's last report may arrive after the test has stopped.
            until(lambda: (now := asked(f"{url}/stats/requests"))["state"] == "stopped" and now["stats"])
            until(lambda: (now := asked(f"{url}/stats/requests")["stats"])[-1]["num_requests"] and len(now) == 4)
            stats = asked(f"{url}/stats/requests")["stats"]
        main.send_signal(signal.SIGTERM)
        assert main.wait(30) == 0
    assert {entry["name"] for entry in stats} == {"TTFT", "ITL", "end to end", "Aggregated"}
    assert [entry["num_failures"] for entry in stats] == [0] * 4


@contextmanager
def started(*arguments):
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def asked(url, form=None):
    data = None if form is None else urllib.parse.urlencode(form).encode()
    with urllib.request.urlopen(url, data, timeout=30) as answer:
        return json.load(answer)


def until(holds):
    deadline = time.monotonic() + 60
    while True:
        with suppress(OSError):
            if holds():
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def statistics(file, *arguments):
    """Runs locust without its page. Returns its statistics by name, and what it printed on stderr."""
    command = [sys.executable, "-m", "locust", "-f", str(file), "--headless", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=ENVIRONMENT, check=False)
    return {entry["name"]: entry for entry in json.loads(done.stdout)}, done.stderr


# Locust's clock for --run-time begins before its imports, so a short one may end before the first request.
ENDS_AFTER_FIVE = """
from itertools import count

import gevent
from locust import events

ended = count(1)


@events.init.add_listener
def limit(environment, **_):
    def request(name, **_):
        if name == "end to end" and next(ended) == 5:
            gevent.spawn(environment.runner.quit)

    environment.events.request.add_listener(request)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Our locust file, and one that ends the test after five requests."""
    limit = tmp_path_factory.mktemp("locust") / "limit.py"
    limit.write_text(ENDS_AFTER_FIVE)
    return f"{LOCUSTFILE},{limit}"


@pytest.mark.parametrize("protocol", ["gRPC", "OpenAI"])
def test_the_scheme_of_the_host_decides_which_users_run(stack, files, protocol):
    host = f"grpc://{stack.grpc}" if protocol == "gRPC" else f"{stack.url}/v1"
    stats, _ = statistics(files, f"--host={host}", "--users=2", "--spawn-rate=2", *SHORT)
    assert {entry["method"] for entry in stats.values()} == {protocol}
    assert stats["end to end"]["num_failures"] == 0
    answers = stats["TTFT"]["num_requests"]
    assert answers == stats["end to end"]["num_requests"] > 0
    assert stats["ITL"]["num_requests"] == 3 * answers, "answers have the tokens that --output-tokens says"


def test_a_failed_request_is_counted(stack, files):
    stats, _ = statistics(files, f"--host={stack.url}/v1", "--tier=none", *SHORT)
    assert stats.keys() == {"end to end"}
    assert stats["end to end"]["num_failures"] == stats["end to end"]["num_requests"] > 0


OWN_TASKS = """
from locust import task

from overfill.client import SamplingParams
from overfill.lab.loadtest.users import ClientUser


class Asker(ClientUser):
    asked = 0

    @task
    def both(self):
        if self.asked == 3:
            self.environment.runner.quit()
        self.asked += 1
        answer = self.ask("short", [5, 6, 7], sampling=SamplingParams(max_tokens=3, ignore_eos=True))
        assert answer.usage.completion_tokens == 3
        self.ask("wrong", [])
        raise AssertionError("a failed request must end the task")
"""


def test_tasks_of_ones_own_are_in_the_statistics(stack, tmp_path):
    file = tmp_path / "locustfile.py"
    file.write_text(OWN_TASKS)
    stats, said = statistics(file, "--run-time=60s", f"--host=grpc://{stack.grpc}")
    assert "AssertionError" not in said
    counts = {name: (entry["num_requests"], entry["num_failures"]) for name, entry in stats.items()}
    assert counts == {
        "short TTFT": (3, 0),
        "short ITL": (6, 0),
        "short end to end": (3, 0),
        "wrong end to end": (3, 3),
    }
