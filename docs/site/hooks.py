"""Hooks of the documentation site: add the pages that are made from the code."""

from __future__ import annotations

from generated_pages import PAGES
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files
