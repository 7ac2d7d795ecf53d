"""Runs a real Prometheus beside a stack, for tests. Needs the program ``prometheus``."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_START = 30.0  # seconds that Prometheus may take to start


@dataclass(frozen=True, slots=True)
class Series:
    """One series of a query's result.

    Attributes:
        labels: Label names and values.
        points: (seconds since the epoch, value) pairs in order of time.
    """

    labels: dict[str, str]
    points: list[tuple[float, float]]

    @property
    def last(self) -> float:
        return self.points[-1][1]

    @property
    def has_number(self) -> bool:
        """True if at least one value is finite."""
        return any(math.isfinite(value) for _, value in self.points)


class Prometheus:
    """Client of a running Prometheus. Methods raise RuntimeError with Prometheus' message when a query is wrong."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[Series]:
        """Evaluate ``expression`` now."""
        return [_series(item, [item["value"]]) for item in self._result("query", query=expression)]

    def firing(self) -> set[str]:
        """Return the names of the firing alerts."""
        alerts = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def up(self) -> set[str]:
        """Return the ids of workers and routers whose last scrape succeeded."""
        targets = self._get("targets")["activeTargets"]
        return {target["labels"]["worker"] for target in targets if target["health"] == "up"}

    def names(self) -> set[str]:
        """Return the metric names of all series."""
        return set(self._get("label/__name__/values"))

    def _result(self, what: str, **parameters: str) -> list[dict[str, Any]]:
        answer = self._get(what, **parameters)
        if answer["resultType"] == "scalar":
            return [{"metric": {}, "value": answer["result"]}]
        found: list[dict[str, Any]] = answer["result"]
        return found

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(f"{parameters.get('query', what)}: {error.read().decode()}") from error


@contextmanager
def running_prometheus(
    folder: Path, targets_url: str, rules: Sequence[Path] = (), interval: float = 1.0
) -> Iterator[Prometheus]:
    """Run Prometheus on loopback until the end of the block.

    Args:
        folder: Folder for its configuration and data; must exist.
        targets_url: URL of a router's ``/targets``.
        rules: Files with recording and alert rules.
        interval: Seconds between scrapes, and between evaluations of rules.

    Raises:
        FileNotFoundError: The program ``prometheus`` is not installed.
        RuntimeError: Prometheus did not start within 30 s.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise FileNotFoundError("the program prometheus is not installed")
    pause = f"{round(interval * 1000)}ms"
    config = {
        "global": {"scrape_interval": pause, "scrape_timeout": pause, "evaluation_interval": pause},
        "rule_files": [str(path.absolute()) for path in rules],
        "scrape_configs": [
            {
                "job_name": "overfill",
                "honor_labels": True,
                "http_sd_configs": [{"url": targets_url, "refresh_interval": "1s"}],
                "relabel_configs": [{"source_labels": ["worker"], "target_label": "instance"}],
            }
        ],
    }
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{_free_port()}"
    command = [
        program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}",
        "--log.level=warn",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            _wait(process, f"http://{address}/-/ready", folder / "prometheus.log")
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus did not start: {log.read_text()}") from None
            time.sleep(0.1)


def _series(item: dict[str, Any], points: list[tuple[float, str]]) -> Series:
    return Series(item["metric"], [(float(at), float(value)) for at, value in points])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
