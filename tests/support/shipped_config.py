"""The shipped Serve config, as a user changes it for several machines: with the lines that its comments propose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

SHIPPED = Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml"


def for_several_machines() -> Any:
    """Returns the config with each block of settings below a comment "On more than one machine"."""
    lines = []
    proposed = False
    for line in SHIPPED.read_text(encoding="utf-8").splitlines():
        indent, mark, text = line.partition("# ")
        if text.startswith("On more than one machine"):
            proposed = True
        elif proposed := proposed and bool(mark) and not indent.strip():
            line = indent + text
        lines.append(line)
    return yaml.safe_load("\n".join(lines))
