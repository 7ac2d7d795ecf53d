"""Hooks of the documentation site: add the pages that are made from the code."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in {"project/changelog.md": "CHANGELOG.md", "project/contributing.md": "CONTRIBUTING.md"}.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](../")
        files.append(File.generated(config, page, content=text))
    return files
