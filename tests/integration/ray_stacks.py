"""``overfill up`` on Ray as a child process of a test: its output, its status, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import psutil

from overfill.client import Client
from overfill.stack.ports import free_ports


class Up:
    """A running ``overfill up``. ``lines`` is its output so far."""

    def __init__(self, *arguments, environment=None):
        (self.port,) = free_ports("127.0.0.1", 1)
        self.address = f"127.0.0.1:{self.port}"
        self.lines = []
        self._up = threading.Event()
        command = [sys.executable, "-m", "overfill.cli.main", "up", f"--grpc={self.port}", "--http=off", *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
            process_group=0,  # so that a test can signal the group, like ctrl-C in a terminal
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self):
        """Waits until the stack reports that it is up; raises AssertionError with its output if it ends instead."""
        self._up.wait(360)
        assert self.ready, "\n".join(self.lines)

    @property
    def ready(self):
        return any("OverFill is up" in line for line in self.lines)

    def interrupt(self):
        """Sends SIGINT to every process of the group, like ctrl-C in a terminal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self):
        """Waits for the end; returns the exit code."""
        code = self.process.wait(120)
        self._reader.join(10)
        self.process.stdout.close()
        return code

    def processes(self):
        """Returns every process of the tree, the root included."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def workers(self, stage, tier=None):
        """Returns ``id -> pid`` of the workers of a stage, or of a tier, that have joined the router and answer."""
        with Client(self.address) as client:
            found = [w for w in client.status().workers if w.process is not None and w.stage == stage]
        return {w.id: w.process.pid for w in found if tier in (None, w.tier)}

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "OverFill is up" in line:
                self._up.set()
        self._up.set()


@contextmanager
def up_on_ray(*arguments, **settings):
    """Yields a ready ``Up``; afterwards ends it like ctrl-C, if it still runs."""
    up = Up(*arguments, **settings)
    tree = []
    try:
        up.wait_ready()
        yield up
    except BaseException:
        print("\n".join(up.lines))
        raise
    finally:
        if up.process.poll() is None:
            tree = up.processes()
            up.interrupt()
            try:
                up.wait()
            finally:
                for process in tree:
                    if process.is_running():
                        process.kill()


def cli(*arguments):
    """Runs ``overfill``; returns the exit code and the output."""
    command = [sys.executable, "-m", "overfill.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def status_json(address):
    return json.loads(cli("status", "--json", "--address", address)[1])
