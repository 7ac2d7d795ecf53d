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
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from overfill.client import Client, SamplingParams

ADDRESS = os.environ.get("OVERFILL_ADDRESS", "127.0.0.1:7600")
DEPLOY = Path(__file__).parents[1] / "deploy"
# Grafana's variables: rates need at least four scrapes, and every worker and tier is selected.
VARIABLES = {"$__rate_interval": "10s", "$worker": ".+", "$tier": ".+"}


def configuration(targets_url: str) -> str:
    path = DEPLOY / "prometheus" / "prometheus.yml"
    config = yaml.safe_load(path.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(path.parent / pattern) for pattern in config["rule_files"]]
    config["scrape_configs"][0]["http_sd_configs"] = [{"url": targets_url, "refresh_interval": "1s"}]
    return yaml.safe_dump(config)


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield from panels(panel) if panel["type"] == "row" and panel.get("panels") else [panel]


def query(url: str, expression: str) -> list[dict[str, Any]]:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    with urllib.request.urlopen(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}") as response:
        result: list[dict[str, Any]] = json.load(response)["data"]["result"]
    return result


def shown(target: dict[str, Any], series: list[dict[str, Any]]) -> str:
    """The first series of a query with their legends, in which Grafana replaces {{label}} with its value."""
    found = []
    for each in series[:4]:
        legend = re.sub(r"{{(\w+)}}", lambda label: each["metric"].get(label[1], ""), target.get("legendFormat", ""))  # noqa: B023
        found.append(f"{legend} {float(each['value'][1]):.4g}".strip())
    return ", ".join(found or ["no data"]) + (f", … {len(series)} series" if len(series) > 4 else "")


def wait_ready(url: str) -> None:
    for _ in range(100):
        try:
            urllib.request.urlopen(f"{url}/-/ready").close()
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    sys.exit("Prometheus did not become ready within 10 s")


def main(name: str) -> None:
    dashboard = json.loads((DEPLOY / "helm" / "overfill" / "files" / "dashboards" / f"{name}.json").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    with Client(ADDRESS, api_key=os.environ.get("OVERFILL_API_KEY")) as client, tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "prometheus.yml"
        config.write_text(configuration(f"http://{client.status().process.metrics_address}/targets"))
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
        with subprocess.Popen([*command, f"--web.listen-address={listen}", "--log.level=error"]) as prometheus:
            try:
                wait_ready(f"http://{listen}")
                end = time.monotonic() + 8  # seconds of load, in which Prometheus scrapes eight times
                while time.monotonic() < end:
                    client.samples("Once upon a time", 4, sampling=SamplingParams(max_tokens=32))
                print(dashboard["title"])
                for panel in panels(dashboard):
                    for target in panel.get("targets", ()):
                        print(f"  {panel['title']:<28} {shown(target, query(f'http://{listen}', target['expr']))}")
            finally:
                prometheus.terminate()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "overview")
