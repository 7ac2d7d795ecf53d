"""A sandboxed home for the commands of the docs, and a summary of what ran and what did not."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from overfill.process.home import home as cache_folder

ROOT = Path(__file__).parents[2]
PORTS = (7600, 8000)


@dataclass
class Tally:
    """What the commands of the docs did, for the summary."""

    ran: Counter[str] = field(default_factory=Counter)
    not_run: list[tuple[str, int, str]] = field(default_factory=list)  # page, commands, reason


_TALLY = Tally()


@pytest.fixture(scope="session")
def tally() -> Tally:
    return _TALLY


@dataclass(frozen=True)
class Sandbox:
    """A home folder with a copy of the checkout, in which a reader would type."""

    home: Path
    checkout: Path
    environment: dict[str, str]


def _link_tree(source: Path, target: Path) -> None:
    """Copies a folder with hard links where the file system allows them: a cached pair costs no space."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["cp", "-al", source, target], capture_output=True).returncode != 0:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, symlinks=True)


@pytest.fixture(scope="session")
def sandbox_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose cache begins with what this machine has prepared, so that pairs are not built again."""
    home = tmp_path_factory.mktemp("home")
    cache = cache_folder()
    if cache.is_dir():
        _link_tree(cache, home / ".cache" / "overfill")
    return home


@pytest.fixture
def sandbox(sandbox_home: Path) -> Iterator[Sandbox]:
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.fail(f"port {port} is in use: the docs show it, so end the process that uses it")
    checkout = sandbox_home / "overfill"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in (Path(os.fsdecode(each)) for each in files if each):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout / name)
    (checkout / ".venv").symlink_to(Path(sys.prefix))
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "PYTHONPATH") if name in os.environ}
    environment = {
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **kept,
        "HOME": str(sandbox_home),
        "PATH": f"{checkout / '.venv' / 'bin'}:{os.environ['PATH']}",  # how-tos begin in the activated environment
    }
    yield Sandbox(sandbox_home, checkout, environment)
    shutil.rmtree(checkout)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _TALLY.ran and not _TALLY.not_run:
        return
    terminalreporter.section("commands of the docs")
    for page, count in sorted(_TALLY.ran.items()):
        terminalreporter.line(f"{count:4} run      {page}")
    reasons: Counter[str] = Counter()
    for _, count, reason in _TALLY.not_run:
        reasons[reason] += count
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:4} not run  {reason}")
    terminalreporter.line(f"{sum(_TALLY.ran.values())} commands run, {sum(reasons.values())} not run")
