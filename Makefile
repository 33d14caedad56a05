# Every target sets up what it needs; `make help` lists them.
#   make test PYTHON=python3.13 VENV=/tmp/venv313     another Python, another environment
VENV ?= .venv
CHECKPOINT := examples/stdlib12/model.ckpt
TESTS ?= tests

# The first Python of 3.11 or newer: pyenv and the like leave names on the PATH that do not run.
NEW_ENOUGH := -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))'
CANDIDATES := python3 python3.13 python3.12 python3.11 python
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
# Two tests at a time: each takes a GB or two. Those that take longest are named: in all it should stay under 12 minutes.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal --durations=30 --durations-min=5
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test check format conformance bench sanitize clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/  make \1|\2/p' Makefile | column -t -s '|' -l 2 2>/dev/null \
	  || sed -n 's/^\([a-z]*\):.*##  *\(.*\)/  make \1: \2/p' Makefile

demo: $(VENV)/effc.stamp  ## quant4,calm,mor on the bundled checkpoint, healed for a few minutes; ends in the before/after table
	$(BIN)/effc optimize $(CHECKPOINT) --passes quant4,calm,mor --heal 3m --calib examples/stdlib12/calib.txt \
	  --eval examples/stdlib12/heldout.txt -o demo-out --force

test: $(VENV)/dev.stamp  ## run the tests (TESTS=tests/cli for some of them)
	$(PYTEST) $(TESTS)

check: $(VENV)/dev.stamp  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST) $(TESTS)

format: $(VENV)/dev.stamp  ## format the code, mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

conformance: $(VENV)/dev.stamp  ## the slow tests too: minutes; those against transformers where it is installed
	$(PYTEST) $(TESTS) -m "slow or not slow"

bench: $(VENV)/dev.stamp  ## speed against a hand-written JAX loop over the same weights
	$(BIN)/effc optimize $(CHECKPOINT) --no-speed --force -o bench-out
	$(BIN)/python tests/bench/handwritten_loop.py bench-out

# The sanitizers' own library comes first in a Python that was built without it.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1
sanitize: $(VENV)/dev.stamp  ## native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  EFFC_NATIVE_FLAGS="$(SANITIZE)" $(BIN)/python -m pytest tests/runtime/test_native_matmul.py \
	  $(addprefix tests/runtime/test_region_,kernel.py branches.py embed.py)

clean:  ## remove the environment and what the tools left
	rm -rf $(VENV) demo-out bench-out build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "effc needs Python 3.11 or newer with venv; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/effc.stamp: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/effc.stamp
