"""Draws the dashboards from a running Prometheus, with Grafana's own components in headless Chromium.

    npm install --prefix DIR deploy/grafana/draw        # once; DIR/node_modules is what --modules wants
    python deploy/grafana/draw/draw.py --prometheus http://127.0.0.1:9190 --modules DIR/node_modules --out docs/images

No Grafana server is needed: this asks for the data as Grafana would, and ``page.tsx`` shows it. Needs node, Chromium,
its driver and selenium.
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
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from overfill.lab.monitoring.expressions import filled, panels
from overfill.lab.monitoring.prometheus import Prometheus, Series

HERE = Path(__file__).parent
DASHBOARDS = HERE.parents[1] / "helm/overfill/files/dashboards"
WIDTH = 1500  # pixels
POINTS = 180  # per line
PATIENCE = 120.0  # seconds for a page


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Draw the dashboards.")
    parser.add_argument("--prometheus", required=True, help="its URL")
    parser.add_argument("--modules", type=Path, required=True, help="node_modules with what package.json names")
    parser.add_argument("--minutes", type=float, default=5.0, help="how far back")
    parser.add_argument("--rate-interval", default="15s", help="what $__rate_interval stands for")
    parser.add_argument("--boards", default=",".join(sorted(path.stem for path in DASHBOARDS.glob("*.json"))))
    parser.add_argument("--out", type=Path, required=True, help="folder for dashboard-NAME.png")
    options = parser.parse_args(argv)
    end = time.time()
    names = options.boards.split(",")
    prometheus = Prometheus(options.prometheus)
    boards = {name: collect(prometheus, name, end - 60 * options.minutes, end, options.rate_interval) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        script = bundle(options.modules, Path(folder))
        for name, board in boards.items():
            path = options.out / f"dashboard-{name}.png"
            shoot(board, script, Path(folder), path)
            empty = [panel["title"] for panel in board["panels"] if panel["type"] != "row" and not panel["series"]]
            print(f"{path}: {path.stat().st_size >> 10} KiB; panels without data: {', '.join(empty) or 'none'}")
    return 0


def collect(prometheus: Prometheus, name: str, start: float, end: float, rate_interval: str) -> dict[str, Any]:
    """A dashboard with the data of its panels from ``start`` to ``end`` (seconds since the epoch)."""
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
    """The page's program, in ``folder``. Raises CalledProcessError with what esbuild says."""
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
    """Draws ``board`` to ``path``. Raises TimeoutException when the page does not come up."""
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
        image.convert("RGB").quantize(128).save(path, optimize=True)
    finally:
        driver.quit()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
