# Everything runs in .venv, which the first target that needs it creates; a second call installs nothing.
# The first Python here that can make environments; dm_control comes with 3.11 and 3.12 only, so these go first.
FIND_PYTHON := for newest in 12 99; do for python in python3 python3.12 python3.11 python3.13 python3.14; do \
	$$python -c "import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $$newest))" \
	2>/dev/null && echo $$python && exit; done; done; echo python3
PYTHON ?= $(shell $(FIND_PYTHON))
VENV := .venv
BIN := $(VENV)/bin
# type checkers do not follow pip's editable installs; they follow links
TYPES := $(VENV)/types/offtrace
# two processes of one thread each: more do not help what starts actors and learners of its own
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: train test test-fast test-wheel check format bench build clean

train: $(VENV)/.installed
	$(BIN)/python recipes/impala_atari.py $(ARGS)

test: $(VENV)/.dev
	$(PYTEST) $(ARGS)

# a quick example of each part: without what starts processes, compiles or trains; the slowest are named
test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow" --durations=10 $(ARGS)

# the tests against what users would install: neither editable nor the checkout
test-wheel: build
	rm -rf $(VENV)/wheel && $(PYTHON) -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(ls -t dist/*.whl | head -1)[test]"
	OMP_NUM_THREADS=1 $(VENV)/wheel/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p $(TYPES) && ln -sfn $(CURDIR)/agents $(CURDIR)/modules $(CURDIR)/recipes $(TYPES)
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p offtrace.agents -p offtrace.modules -p offtrace.recipes

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# quick forms of all, some minutes; or one in full: make bench ARGS="sac_updates.py --compile"
bench: $(VENV)/.dev
ifdef ARGS
	$(BIN)/python benchmarks/$(ARGS)
else
	$(BIN)/python benchmarks/returns.py --quick --budget 0.3
	$(BIN)/python benchmarks/envs.py --rounds 60
	$(BIN)/python benchmarks/replay.py --rounds 50
	$(BIN)/python benchmarks/sac_updates.py --pairs 6
	$(BIN)/python benchmarks/mpo_updates.py --pairs 2
	$(BIN)/python benchmarks/impala_throughput.py --quick
	$(BIN)/python benchmarks/architectures.py --quick
endif

build: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "offtrace needs Python 3.11 or newer; '$(PYTHON)' is older: run make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV), which takes some minutes"
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV), which takes some minutes"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed
