# One verb per target; `make help` lists them. Everything runs inside .venv, which `setup` makes.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(sort $(wildcard proto/overfill/v1/*.proto))
PROTOC := $(BIN)/python -m grpc_tools.protoc -Iproto
# One thread per process: thread pools that together exceed the cores slow each other many times over.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help setup demo audit check test test-all bench proto sdk dashboards chart

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed  ## Make .venv and install the project with its tools; does nothing when up to date

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is not: name one, as in  make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	@echo "Installing the project and its tools in .venv: some minutes and 2.5 GB, once"
	@# compat: a script beside a clone that is called overfill would else import the clone's folder.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat -e '.[dev]'
	@touch $@

demo: setup  ## Start a stack, ask one question, show where the time went
	$(BIN)/overfill demo

check: setup audit  ## Lint, format, types, import arrows, generated code, dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(PROTOC) --python_out="$$fresh" --grpc_python_out="$$fresh" --pyi_out="$$fresh" $(PROTOS); \
	diff --recursive --exclude=__init__.py --exclude=__pycache__ overfill/v1 "$$fresh/overfill/v1" || { \
	  echo "overfill/v1 is not what proto/ gives; run  make proto" >&2; exit 1; }

# Once a day, and when what the project needs has changed.
audit: setup
	@if [ -n "$$(find .venv/sbom.json -newer pyproject.toml -mmin -1440 2>/dev/null)" ]; then exit 0; fi; \
	$(BIN)/python deploy/supply/audit.py --sbom .venv/sbom.json || { rm -f .venv/sbom.json; exit 1; }

test: setup check  ## check, then the tests without the slow ones
	$(PYTEST) -m "not slow and not gpu" -n 2 --dist loadfile

test-all: setup check .venv/.browser .venv/.prometheus  ## check, then every test that this machine can run
	$(PYTEST)

# Chromium for the tests of /ui, where it can be installed; without it they are skipped and say so.
.venv/.browser: | .venv/.installed
	@{ command -v chromium && command -v chromedriver; } >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null; } 2>/dev/null || \
	  echo "no Chromium here, and it cannot be installed: the tests of /ui will be skipped" >&2
	@touch $@

# Prometheus and promtool for the telemetry check, in the same way.
.venv/.prometheus: | .venv/.installed
	@{ command -v prometheus && command -v promtool; } >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -qq -y --no-install-recommends prometheus >/dev/null; } 2>/dev/null || \
	  echo "no Prometheus here, and it cannot be installed: the telemetry check will be skipped" >&2
	@touch $@

bench: setup  ## Measure the hand-off and the engine on this machine, in short
	$(BIN)/overfill bench handoff --timeline
	$(BIN)/overfill bench decode --batch 1,8 --rounds 3 --steps 8
	$(BIN)/overfill bench prefill --context 512 --rounds 3

proto: setup  ## Regenerate overfill/v1 from proto/
	$(PROTOC) --python_out=. --grpc_python_out=. --pyi_out=. $(PROTOS)

sdk: setup  ## Regenerate the blocking client from the asyncio one
	$(BIN)/python overfill/client/generate_sync.py

dashboards: setup  ## Regenerate the Grafana dashboards in deploy/helm/overfill/files
	$(BIN)/python deploy/grafana/generate.py

chart: setup  ## Regenerate the Helm chart's README and values schema
	$(BIN)/python deploy/helm/generate.py
