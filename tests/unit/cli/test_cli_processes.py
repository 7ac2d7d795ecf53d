"""Tests that no child of ``overfill up`` outlives it, however it ends."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from overfill.stack.child import Child, stop

POLITE = "import signal; print('up', flush=True); signal.pause()"
STUBBORN = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()"
)


class Sink:
    """Collects lines; a test can wait for a given one."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self._read, self._write = os.pipe()

    def __call__(self, name: str, line: str) -> None:
        self.lines.append((name, line))
        os.write(self._write, b".")

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert os.read(self._read, 1) == b"."


@pytest.fixture
def sink() -> Sink:
    return Sink()


def start(code: str, sink: Sink, name: str = "child") -> Child:
    return Child(name, [sys.executable, "-c", code], dict(os.environ), sink)


def test_lines_of_both_streams_carry_the_name(sink: Sink) -> None:
    child = start("import sys; print('out', flush=True); print('err', file=sys.stderr)", sink, "prefill-0")
    sink.wait_for(2)
    assert sink.lines == [("prefill-0", "out"), ("prefill-0", "err")]
    assert child.last_lines() == ["out", "err"]
    assert stop([child], grace=60) == []


def test_only_the_last_lines_are_kept(sink: Sink) -> None:
    child = start("print('\\n'.join(map(str, range(1000)))); raise SystemExit(3)", sink)
    sink.wait_for(1000)
    assert child.last_lines() == [str(n) for n in range(980, 1000)]
    assert child.describe_exit() == "exited with status 3"
    assert child.returncode == 3


def test_stop_sends_sigterm_first(sink: Sink) -> None:
    child = start(POLITE, sink)
    sink.wait_for(1)
    assert stop([child], grace=60) == []
    assert child.returncode == -signal.SIGTERM
    assert "SIGTERM" in child.describe_exit()


def test_stop_kills_a_child_that_ignores_sigterm_and_says_so(sink: Sink) -> None:
    polite, stubborn = start(POLITE, sink), start(STUBBORN, sink)
    sink.wait_for(2)
    assert stop([stubborn, polite], grace=0.5) == [stubborn]
    assert stubborn.returncode == -signal.SIGKILL
    assert polite.returncode == -signal.SIGTERM


def test_a_child_is_its_own_group_so_ctrl_c_does_not_reach_it(sink: Sink) -> None:
    child = start(POLITE, sink)
    assert os.getpgid(child.pid) == child.pid
    stop([child], grace=60)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.parametrize(("child_code", "orphaned"), [(STUBBORN, "SIGKILL"), (POLITE, "SIGTERM")])
def test_no_child_outlives_a_parent_that_is_killed(child_code: str, orphaned: str) -> None:
    code = textwrap.dedent(f"""
        import os, signal, sys
        from overfill.stack.child import Child
        sink = lambda name, line: print(child.pid, flush=True)
        command = [sys.executable, "-c", {child_code!r}]
        child = Child("c", command, dict(os.environ), sink, orphaned=signal.{orphaned})
        signal.pause()
    """)
    check_child_ends(code)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_killed_command_leaves_nothing_behind_that_prepares_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path))
    code = textwrap.dedent("""
        import psutil
        from overfill.pair.store import resolve_pair
        resolve_pair("default", lambda *step: print(psutil.Process().children()[0].pid, flush=True))
    """)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the child waits, and reports that
        check_child_ends(code)


def check_child_ends(code: str) -> None:
    """Runs a parent that prints its child's pid, kills it, and waits until the child has ended."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        watch = os.pidfd_open(child.pid)
        parent.kill()
    try:
        assert select.select([watch], [], [], 30)[0], "the child lives on"
    finally:
        os.close(watch)
        if child.is_running():
            child.kill()
