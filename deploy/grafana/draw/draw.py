"""Draws the dashboards as pictures, with Grafana's own components in headless Chromium.

    npm install --install-links --prefix DIR deploy/grafana/draw        # once
    python deploy/grafana/draw/draw.py --modules DIR/node_modules --out docs/images

Without ``--prometheus URL``, the program starts a stack, puts a calm load on it (``calm.py``) and draws that. It takes
about seven minutes and needs a machine that does nothing else. There is no Grafana server: the program queries
Prometheus as Grafana would, and ``page.tsx`` draws it. Needs prometheus, node, Chromium, chromedriver, selenium.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calm import calm_stack
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from overfill.lab.monitoring.expressions import filled, panels
from overfill.lab.monitoring.prometheus import Prometheus, Series

HERE = Path(__file__).parent
DASHBOARDS = HERE.parents[1] / "helm/overfill/files/dashboards"
WIDTH = 1500  # pixels
POINTS = 180  # of each line
PATIENCE = 120.0  # seconds that a page may take


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Draw the dashboards.")
    parser.add_argument("--prometheus", help="URL of a Prometheus to draw from [default: a calm stack's own]")
    parser.add_argument("--pair", default="default", help="model pair of the calm stack")
    parser.add_argument("--rate", type=float, default=0.3, help="requests per second of the calm load")
    parser.add_argument("--modules", type=Path, required=True, help="node_modules with the packages of package.json")
    parser.add_argument("--minutes", type=float, default=5.0, help="length of the time axis, up to now")
    parser.add_argument("--rate-interval", default="15s", help="value of Grafana's $__rate_interval")
    parser.add_argument("--boards", default=",".join(sorted(path.stem for path in DASHBOARDS.glob("*.json"))))
    parser.add_argument("--out", type=Path, required=True, help="folder for dashboard-NAME.png")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, source(options, Path(folder)) as prometheus:
        end = time.time()
        start = end - 60 * options.minutes
        names = options.boards.split(",")
        boards = {name: collect(prometheus, name, start, end, options.rate_interval) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        script = bundle(options.modules, Path(folder))
        for name, board in boards.items():
            path = options.out / f"dashboard-{name}.png"
            shoot(board, script, Path(folder), path)
            empty = [panel["title"] for panel in board["panels"] if panel["type"] != "row" and not panel["series"]]
            print(f"{path}: {path.stat().st_size >> 10} KiB; panels without data: {', '.join(empty) or 'none'}")
    return 0


@contextmanager
def source(options: argparse.Namespace, folder: Path) -> Iterator[Prometheus]:
    """Yield the Prometheus to draw from: the given one, or a calm stack's."""
    if options.prometheus:
        yield Prometheus(options.prometheus)
        return
    seconds = 60 * (options.minutes + 1)  # the first minute stays outside of the pictures
    with calm_stack(folder, options.pair, options.rate, seconds) as prometheus:
        alerts = prometheus.firing()
        if alerts:
            print(f"not calm: {', '.join(sorted(alerts))} fire; lower --rate, or stop other programs", file=sys.stderr)
        yield prometheus


def collect(prometheus: Prometheus, name: str, start: float, end: float, rate_interval: str) -> dict[str, Any]:
    """Return a dashboard with its panels' data from ``start`` to ``end`` (seconds since the epoch)."""
    dashboard = json.loads((DASHBOARDS / f"{name}.json").read_text())
    step = max(1.0, round((end - start) / POINTS))
    shown = [panel for panel in dashboard["panels"] if panel["type"] == "row"]
    for panel in panels(dashboard):
        cells = panel["type"] == "heatmap"
        width = step * 4 if cells else step
        interval = f"{width:.0f}s" if cells else rate_interval
        series = []
        for target in panel["targets"]:
            found = prometheus.query_range(filled(target["expr"], interval), start, end, width)
            series += [_shown(each, target.get("legendFormat", "")) for each in found if each.has_number]
        shown.append(panel | {"series": sorted(series, key=lambda each: str(each["name"]))})
    return {"title": dashboard["title"], "from": start * 1000, "to": end * 1000, "panels": shown}


def _shown(series: Series, legend: str) -> dict[str, Any]:
    name = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: series.labels.get(match[1], ""), legend)
    values = [value if math.isfinite(value) else None for _, value in series.points]
    return {"name": name or "value", "times": [at * 1000 for at, _ in series.points], "values": values}


def bundle(modules: Path, folder: Path) -> Path:
    """Bundle the page's script into ``folder`` and return its path. Raises CalledProcessError when esbuild fails."""
    (folder / "node_modules").symlink_to(modules.absolute())
    (folder / "page.tsx").write_text((HERE / "page.tsx").read_text())
    loaders = [f"--loader:.{kind}=dataurl" for kind in ("svg", "png", "ttf", "woff", "woff2")]
    command = [
        modules / ".bin" / "esbuild", "page.tsx", "--bundle", "--outfile=page.js", "--jsx=automatic", "--format=iife",
        '--define:process.env.NODE_ENV="production"', *loaders,
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "page.js"


def shoot(board: dict[str, Any], script: Path, folder: Path, path: Path) -> None:
    """Draw ``board`` to ``path``. Raises TimeoutException when the page does not load."""
    page = folder / "board.html"
    style = '<link rel="stylesheet" href="page.css">' if (folder / "page.css").exists() else ""
    data = json.dumps(board).replace("</", "<\\/")
    page.write_text(
        f'<!doctype html><meta charset="utf-8">{style}<div id="root"></div>'
        f'<script>window.BOARD = {data}</script><script src="{script.name}"></script>'
    )
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "hide-scrollbars",
                 "allow-file-access-from-files", f"window-size={WIDTH},1000"):  # fmt: skip
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(PATIENCE)
        driver.get(page.as_uri())
        WebDriverWait(driver, PATIENCE).until(lambda d: d.execute_script("return window.READY === true"))
        height = driver.execute_script("return document.getElementById('root').offsetHeight")
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        time.sleep(1.0)
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(io.BytesIO(driver.get_screenshot_as_png()))
        # Pillow's default, the median cut, drops the colours of thin lines and legends. K-means corrects large areas.
        quantized = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
        quantized.save(path, optimize=True)
    finally:
        driver.quit()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
