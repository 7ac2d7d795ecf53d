"""Tests that need vLLM. `make test-vllm` runs them in `.venv-vllm`; without vLLM, pytest collects nothing here."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["*"]
