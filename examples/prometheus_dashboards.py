"""Run Prometheus beside a stack on one machine, and print what a Grafana dashboard would show.

Needs the program prometheus (Debian and Ubuntu: apt-get install prometheus). Start a stack with `overfill up`, then:

    $ python examples/prometheus_dashboards.py overview

The router lists itself and all workers at /targets, from which Prometheus learns what to scrape. The script takes the
configuration with recording and alert rules from deploy/prometheus/prometheus.yml. It sends requests, and runs the
queries of deploy/helm/overfill/files/dashboards: overview, latency, stages, handoff, capacity, router or tiers.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from overfill.client import Client, SamplingParams

ADDRESS = os.environ.get("OVERFILL_ADDRESS", "127.0.0.1:7600")
DEPLOY = Path(__file__).parents[1] / "deploy"
# Grafana's variables: rates need at least four scrapes, and everything is selected.
VARIABLES = {"$__rate_interval": "10s", "$worker": ".+", "$tier": ".+", "$namespace": ".*", "$release": ".*"}


@contextmanager
def prometheus(targets_url: str) -> Iterator[str]:
    """Runs Prometheus with data in a temporary folder; yields its URL."""
    shipped = DEPLOY / "prometheus" / "prometheus.yml"
    config = yaml.safe_load(shipped.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(shipped.parent / pattern) for pattern in config["rule_files"]]
    config["scrape_configs"][0]["http_sd_configs"] = [{"url": targets_url, "refresh_interval": "1s"}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "prometheus.yml").write_text(yaml.safe_dump(config))
        flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", "--log.level=error"]
        with subprocess.Popen(["prometheus", *flags, f"--web.listen-address={address}"]) as process:
            try:
                yield f"http://{address}"
            finally:
                process.terminate()


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield from panels(panel) if panel["type"] == "row" and panel.get("panels") else [panel]


def query(url: str, expression: str) -> list[dict[str, Any]]:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    with urllib.request.urlopen(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}") as response:
        result: list[dict[str, Any]] = json.load(response)["data"]["result"]
    return result


def shown(series: dict[str, Any], legend: str) -> str:
    """The value of a series after its legend, in which Grafana replaces {{label}} with the label's value."""
    for label, value in series["metric"].items():
        legend = legend.replace(f"{{{{{label}}}}}", value)
    legend = re.sub(r" *{{\w+}}", "", legend)  # labels that the series does not have
    return f"{legend} {float(series['value'][1]):.4g}".strip()


def main(name: str) -> None:
    dashboard = json.loads((DEPLOY / "helm" / "overfill" / "files" / "dashboards" / f"{name}.json").read_text())
    with Client(ADDRESS, api_key=os.environ.get("OVERFILL_API_KEY")) as client:
        metrics = client.status().process.metrics_address
        with prometheus(f"http://{metrics}/targets") as url:
            end = time.monotonic() + 10  # seconds of load, in which Prometheus starts and scrapes
            while time.monotonic() < end:
                client.samples("Once upon a time", 4, sampling=SamplingParams(max_tokens=32))
            print(dashboard["title"])
            for panel in panels(dashboard):
                for target in panel.get("targets", ()):
                    found = [shown(series, target.get("legendFormat", "")) for series in query(url, target["expr"])]
                    more = f", … {len(found)} series" if len(found) > 4 else ""
                    print(f"  {panel['title']:<28} {', '.join(found[:4]) or 'no data'}{more}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "overview")
