# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs in .venv and can be run again at any time; a finished step is not repeated.
#
#   make demo        install, and let the bundled model write some text
#   make demo-gpu    the same on a Hopper GPU: the kernel compiler, too
#   make test        the CPU tests                      make test-slow   the long ones
#   make test-kernels  compile every kernel without a GPU, read its PTX and SASS
#   make test-gpu    the tests that need a CUDA device, and megamoe verify all
#   make lint        formatting, lint, types            make format      apply formatting and simple fixes
#   make serve       serve the bundled model: chat page, OpenAI's API and metrics at http://127.0.0.1:8000
#   make load-test   64 clients for 60 s, every answer compared with its solo run
#   make test-api    requests generated from the API's description      make test-browser   the chat page in Chromium
#   make verify      component cosines of the bundled model
#   make oracle      differences to transformers        make perplexity  held-out perplexity of the bundled model
#   make clean       remove caches and build outputs    make distclean   and .venv
#
# SERVE   options of make serve      LOAD  options of make load-test      CHROMIUM  how to install Chromium
# PYTHON  interpreter to build .venv with (3.11 or newer)      JOBS  test processes
# pip reads its own configuration: mirrors and wheel directories are set there or in PIP_* variables.

PYTHON ?= python3
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 8 ? 8 : n)))

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --no-input -c constraints.txt
TOOLS := tools/tiny_model

SERVE :=
LOAD :=
CHROMIUM := apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver

PROMPT := def find
DEMO := $(VENV)/bin/megamoe generate --model tiny --prompt "$(PROMPT)" --max-tokens 96 --temperature 0.6 --seed 2

.DEFAULT_GOAL := help
.PHONY: help demo demo-gpu test test-slow test-kernels test-gpu lint format serve load-test test-api test-browser verify \
        oracle perplexity clean distclean

help:
	@sed -n 's/^#   //p' Makefile

# A virtual environment that already works is used as it is. Where Python comes without ensurepip (Debian without
# python3-venv), pip is installed by the interpreter's own pip.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is not Python 3.11 or newer; name one, as in: make PYTHON=python3.12" >&2; exit 1; }
	@if $(RUN) -m pip --version >/dev/null 2>&1; then echo "==> using the existing $(VENV)"; else \
	  echo "==> creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	    { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(RUN) install -q pip; }; fi
	@touch $@

# torch first: everything else then finds it installed, whichever build of it pip was configured to prefer.
$(VENV)/.stamp-runtime: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@echo "==> installing torch"
	@$(PIP) torch
	@echo "==> installing megamoe"
	@$(PIP) -e .
	@touch $@

$(VENV)/.stamp-server: $(VENV)/.stamp-runtime
	@echo "==> installing what the server needs"
	@$(PIP) -e '.[server]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-runtime
	@echo "==> installing what tests, lint and tools need"
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.stamp-kernels: $(VENV)/.stamp-dev
	@echo "==> installing the kernel compiler"
	@$(PIP) -e '.[dev,cuda,kernels-dev]'
	@touch $@

demo: $(VENV)/.stamp-runtime
	@echo '==> $(DEMO)'
	@$(DEMO)

# The first run compiles the kernels that the bundled model needs.
demo-gpu: $(VENV)/.stamp-kernels
	@echo '==> $(DEMO) --device cuda'
	@$(DEMO) --device cuda

test: $(VENV)/.stamp-dev
	@echo "==> pytest: CPU tests, $(JOBS) processes"
	@$(RUN) -m pytest -q -n $(JOBS) --dist worksteal

test-slow: $(VENV)/.stamp-dev
	@echo "==> pytest: slow CPU tests, $(JOBS) processes"
	@$(RUN) -m pytest -q -n $(JOBS) --dist worksteal -m 'slow and not gpu'

test-kernels: $(VENV)/.stamp-kernels
	@echo "==> pytest: kernels compile for sm_90a and sm_100a, and are what they should be"
	@$(RUN) -m pytest -q -m 'kernels and not gpu'

test-gpu: $(VENV)/.stamp-kernels
	@echo "==> pytest: GPU tests"
	@$(RUN) -m pytest -q -m gpu
	@echo "==> megamoe verify all"
	@$(VENV)/bin/megamoe verify all

lint: $(VENV)/.stamp-dev
	@echo "==> ruff format --check"
	@$(RUN) -m ruff format --check .
	@echo "==> ruff check"
	@$(RUN) -m ruff check .
	@echo "==> mypy --strict"
	@$(RUN) -m mypy

format: $(VENV)/.stamp-dev
	@echo "==> ruff check --fix, ruff format"
	@$(RUN) -m ruff check --fix --quiet . ; $(RUN) -m ruff format .

serve: $(VENV)/.stamp-server
	@echo "==> megamoe serve $(SERVE)"
	@$(VENV)/bin/megamoe serve $(SERVE)

load-test: $(VENV)/.stamp-server
	@echo "==> load test: 64 clients for 60 s on the loopback interface"
	@OMP_NUM_THREADS=1 $(RUN) tools/load_test.py $(LOAD)

test-api: $(VENV)/.stamp-dev
	@echo "==> schemathesis: requests generated from /openapi.json"
	@$(RUN) -m pytest -q tests/server/test_api_description.py -m 'slow or not slow'

# Chromium is the one thing here that pip cannot install.
test-browser: $(VENV)/.stamp-dev
	@command -v chromedriver >/dev/null || { echo "==> installing Chromium"; $(CHROMIUM); }
	@echo "==> pytest: the chat page in headless Chromium"
	@$(RUN) -m pytest -q tests/server/test_browser.py -m browser

verify: $(VENV)/.stamp-runtime
	@echo "==> megamoe verify --model tiny"
	@$(VENV)/bin/megamoe verify --model tiny

oracle: $(VENV)/.stamp-dev
	@echo "==> logits of recipe exact against transformers"
	@$(RUN) tests/models/deepseek_v4/oracle.py

perplexity: $(VENV)/.stamp-runtime
	@echo "==> held-out perplexity of the bundled model"
	@$(RUN) $(TOOLS)/perplexity.py

clean:
	@echo "==> removing caches and build outputs"
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -type d -prune -exec rm -rf {} +

distclean: clean
	@echo "==> removing $(VENV)"
	@rm -rf $(VENV)
