"""Writes the dashboards, as Grafana reads them, into the Helm chart: ``deploy/helm/overfill/files/dashboards``.

    python deploy/grafana/generate.py [--check]

The chart is their only place, because Helm reads no file outside of it. With ``--check`` the program writes nothing; it
prints the names of files that differ and exits 1. Runs from any folder; needs grafana-foundation-sdk.
"""

from __future__ import annotations

import sys
from pathlib import Path

from boards import BOARDS
from grafana_foundation_sdk.cog.encoder import JSONEncoder

FOLDER = Path(__file__).parents[1] / "helm/overfill/files/dashboards"


def outputs() -> dict[Path, str]:
    """Path of each dashboard's file -> its contents."""
    encoder = JSONEncoder(sort_keys=True, indent=1)
    return {FOLDER / f"{name}.json": encoder.encode(make().build()) + "\n" for name, make in BOARDS.items()}


def main(argv: list[str]) -> int:
    files = outputs()
    stale = sorted(set(FOLDER.glob("*.json")) - files.keys())
    changed = sorted(path for path, text in files.items() if not path.exists() or path.read_text() != text)
    if argv == ["--check"]:
        for path in [*stale, *changed]:
            print(f"{path.name} is not up to date; run make dashboards")
        return 1 if stale or changed else 0
    for path in stale:
        path.unlink()
    FOLDER.mkdir(exist_ok=True)
    for path in changed:
        path.write_text(files[path])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
