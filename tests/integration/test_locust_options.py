"""Tests ``locust -f loadtest/locustfile.py`` on mock workers: its options work or are refused by name."""

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


# Runs in a process of its own, because importing the locustfile patches gRPC for gevent permanently.
ASK = """
import contextlib, io, json, sys
from locust.argument_parser import parse_options
from locust.env import Environment
from overfill.lab.loadtest import locustfile

for arguments in json.loads(sys.argv[2]):
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        try:
            options = parse_options(["-f", sys.argv[1], "--headless", *arguments])
            locustfile._init(Environment(parsed_options=options))
        except SystemExit as left:
            code = left.code
    print(json.dumps([code, said.getvalue()]))
"""


def locust(*arguments):
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, env=ENVIRONMENT, check=False)


def test_locusts_page_and_its_workers_have_what_the_page_says(stack, tmp_path):
    """The page starts the test with another host and run time than the command line; a worker sends the requests."""
    told = tmp_path / "told.jsonl"
    page, bus = free_ports("127.0.0.1", 2)
    master = [f"--web-port={page}", "--web-host=127.0.0.1", "--master", f"--master-bind-port={bus}"]
    with started(*master, "--host=grpc://127.0.0.1:9", f"--records={told}", *SHORT) as main:
        url = f"http://127.0.0.1:{page}"
        with started("--worker", "--master-host=127.0.0.1", f"--master-port={bus}"):
            until(lambda: asked(f"{url}/stats/requests")["workers"])
            form = {"host": f"{stack.url}/v1", "user_count": 3, "spawn_rate": 5, "run_time": "2s"}
            assert asked(f"{url}/swarm", form)["success"]
            # The worker's last report may arrive after the test has stopped.
            until(lambda: (now := asked(f"{url}/stats/requests"))["state"] == "stopped" and now["stats"])
            until(lambda: asked(f"{url}/stats/requests")["stats"][-1]["num_requests"])
        main.send_signal(signal.SIGTERM)
        assert main.wait(30) == 0
    found = records(told)
    assert found
    assert all(record["error"] is None for record in found)


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


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_host_users_spawn_rate_and_run_time_are_locusts(stack, tmp_path):
    told = tmp_path / "told.jsonl"
    done = locust(
        f"--host=grpc://{stack.grpc}", "--users=2", "--spawn-rate=1", "--run-time=3s", f"--records={told}", *SHORT
    )
    assert done.returncode == 0, done.stderr
    assert "Shape test updating to 2 users at 1.00 spawn rate" in done.stderr
    found = records(told)
    assert found
    assert all(record["error"] is None for record in found)
    # The default would be 60 s.
    assert found[-1]["due"] - found[0]["due"] < 30


REFUSED = [
    (["--host=grpc://127.0.0.1:1", "--target=grpc://127.0.0.1:2"], "--host"),
    (["--run-time=5s", "--duration=6"], "--run-time"),
    (["--stop-timeout=5s"], "--stop-timeout"),
    (["--exit-code-on-error=3"], "--exit-code-on-error"),
    (["--class-picker"], "--class-picker"),
    (["--tags", "a"], "--tags"),
    (["--exclude-tags", "a"], "--exclude-tags"),
    (["--config-users", '{"user_class_name": "GrpcUser", "weight": 2}'], "--config-users"),
    (["--rate=1", "--requests=1", "--spawn-rate=2"], "--spawn-rate"),
    (["--rate=1", "--requests=1", "--users=2"], "--users"),
    (["--host=127.0.0.1"], "--host"),
    (["OpenAiUser"], "OpenAiUser"),
]


def test_options_that_cannot_work_are_refused_by_name():
    wanted = json.dumps([arguments for arguments, _ in REFUSED])
    command = [sys.executable, "-c", ASK, str(LOCUSTFILE), wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=ENVIRONMENT, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for (arguments, flag), (code, said) in zip(REFUSED, answers, strict=True):
        assert code == 2, arguments
        assert f"loadtest: {flag}: " in said


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
    command = [sys.executable, "-m", "locust", "-f", str(file), "--headless", "--json", "--run-time=60s"]
    host = f"--host=grpc://{stack.grpc}"
    done = subprocess.run([*command, host], capture_output=True, text=True, timeout=150, env=ENVIRONMENT, check=False)
    stats = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert "AssertionError" not in done.stderr
    counts = {name: (entry["num_requests"], entry["num_failures"]) for name, entry in stats.items()}
    assert counts == {
        "short TTFT": (3, 0),
        "short ITL": (6, 0),
        "short end to end": (3, 0),
        "wrong end to end": (3, 3),
    }
