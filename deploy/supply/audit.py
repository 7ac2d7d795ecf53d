"""Writes the project's bill of materials, and looks for known vulnerabilities in its dependencies.

    python deploy/supply/audit.py [--sbom FILE] [--extra EXTRA] [--offline]

The bill of materials (CycloneDX 1.5) lists the project and all packages that an extra needs, in the installed versions.
pip-audit looks up the direct dependencies. The program exits 1 when a vulnerability is known. If the look-up fails, the
program says so and exits 0, because a build must not depend on a service.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PROJECT = "overfill"
PATIENCE = 90  # seconds that the look-up may take


@dataclass
class Part:
    """An installed distribution, and those of its extras that are required."""

    files: Distribution
    extras: set[str]

    @property
    def direct(self) -> list[Requirement]:
        """Requirements that apply on this platform."""
        needed = [Requirement(line) for line in self.files.requires or ()]
        return [one for one in needed if one.marker is None or any(map(one.marker.evaluate, self._environments()))]

    def _environments(self) -> list[dict[str, str]]:
        return [{"extra": extra} for extra in ("", *sorted(self.extras))]


def closure(name: str, extra: str) -> dict[str, Part]:
    """Return the distribution with ``extra`` and all its dependencies, by normalised name."""
    found: dict[str, Part] = {}
    waiting = [(name, {extra})]
    while waiting:
        name, extras = waiting.pop()
        name = _normal(name)
        if name in found and extras <= found[name].extras:
            continue
        try:
            found.setdefault(name, Part(distribution(name), set())).extras |= extras
        except PackageNotFoundError:
            continue  # for another platform
        waiting += [(needed.name, needed.extras) for needed in found[name].direct]
    return found


def bill(parts: dict[str, Part]) -> dict[str, Any]:
    """Return the bill of materials as a CycloneDX document."""
    components = [_component(name, part.files) for name, part in sorted(parts.items()) if name != PROJECT]
    dependencies = [
        {
            "ref": _purl(name, part.files),
            "dependsOn": sorted(
                {
                    _purl(needed, parts[needed].files)
                    for needed in (_normal(one.name) for one in part.direct)
                    if needed in parts and needed != name
                }
            ),
        }
        for name, part in sorted(parts.items())
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": _component(PROJECT, parts[PROJECT].files) | {"type": "application"},
        },
        "components": components,
        "dependencies": dependencies,
    }


def vulnerabilities(parts: dict[str, Part]) -> tuple[list[str], str]:
    """Return known vulnerabilities of direct dependencies, a line each, and why the look-up is incomplete (or \"\")."""
    own = sorted({_normal(needed.name) for needed in parts[PROJECT].direct} & parts.keys() - {PROJECT})
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        # The index does not know local version suffixes, as in 2.13.0+cpu.
        file.write("".join(f"{name}=={parts[name].files.version.partition('+')[0]}\n" for name in own))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--no-deps", "--disable-pip"]
        command += ["--format=json", "--progress-spinner=off", "--timeout=10"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
            answers = json.loads(done.stdout)["dependencies"]
        except subprocess.TimeoutExpired:
            return [], f"no answer within {PATIENCE} s"
        except (ValueError, KeyError):
            return [], (done.stderr.strip().splitlines() or ["no answer"])[-1]
    known = [
        f"{one['name']} {one['version']}: {issue['id']}, fixed in {', '.join(issue['fix_versions']) or 'none yet'}"
        for one in answers
        for issue in one.get("vulns", ())
    ]
    skipped = [one["name"] for one in answers if "skip_reason" in one]
    return known, f"the service does not know {len(skipped)} of {len(own)} packages" if skipped else ""


def _component(name: str, part: Distribution) -> dict[str, Any]:
    meta = part.metadata
    licence = meta.get("License-Expression") or meta.get("License") or ""
    made: dict[str, Any] = {
        "type": "library",
        "bom-ref": _purl(name, part),
        "name": name,
        "version": part.version,
        "purl": _purl(name, part),
    }
    if licence and len(licence) < 100 and "\n" not in licence:
        made["licenses"] = [{"license": {"name": licence}}]
    return made


def _purl(name: str, part: Distribution) -> str:
    return f"pkg:pypi/{name}@{part.version.replace('+', '%2B')}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    parser = argparse.ArgumentParser(description="Bill of materials and known vulnerabilities.")
    parser.add_argument("--sbom", type=Path, help="file to write the bill of materials to")
    parser.add_argument("--extra", default="server", help="extra whose packages are listed (default: server)")
    parser.add_argument("--offline", action="store_true", help="skip the look-up")
    arguments = parser.parse_args()
    parts = closure(PROJECT, arguments.extra)
    if arguments.sbom is not None:
        arguments.sbom.write_text(json.dumps(bill(parts), indent=1) + "\n", encoding="utf-8")
        print(f"{arguments.sbom}: {len(parts)} components")
    if arguments.offline:
        return 0
    known, gap = vulnerabilities(parts)
    for line in known:
        print(line, file=sys.stderr)
    if gap:
        print(f"audit incomplete: {gap}", file=sys.stderr)
    print(f"{len(known)} known vulnerabilities")
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main())
