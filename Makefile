# The one list of commands. `make demo` and `make test` need nothing before them but Python, gcc and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := data parallel trainer launch benchmarks
LOGDIR ?= runs
KILLS ?= 100
FAULTS ?=
BENCH ?=
SWEEP ?= configs/sweeps/demo.yaml
TEST_ARGS ?=

# Ranks share few cores in tests: one thread per process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help setup demo sweep test test-runs test-parts test-slurm bench bench-data faults test-fast check format verify tensorboard clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install the project with its development tools

# Depends on pyproject.toml alone, so that a second call does nothing until a dependency changes.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "error: Python %d.%d is too old, at least 3.11 is needed: make PYTHON=/path/to/python3" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)

demo: setup  ## train teacher, SAE and two students from the standard library's text into runs/demo/
	$(BIN)/python -m launch.demo

sweep: setup  ## train objectives x seeds on the demo's data into runs/sweep/ (SWEEP=configs/sweeps/demo.yaml)
	$(BIN)/python -m launch.sweep $(SWEEP)

test: setup  ## run every test but those that start a SLURM cluster
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-runs test-parts

# The two halves of `make test`, side by side on two cores: whole runs of the trainer, and all else.
test-runs: setup
	$(PYTEST) -m "not slurm" tests/trainer $(TEST_ARGS)

test-parts: setup
	$(PYTEST) -m "not slurm" --ignore=tests/trainer tests $(TEST_ARGS)

test-slurm: setup  ## run jobs on a real SLURM on this machine (Debian: apt-get install slurm-wlm munge)
	$(PYTEST) -m slurm

faults: setup  ## break runs on purpose and count what is lost; KILLS=20 is quicker
	$(BIN)/python -m benchmarks.faults --kills $(KILLS) $(FAULTS)

bench: setup  ## measure every figure of speed beside its target, about 9 minutes; BENCH="--only extraction --record"
	$(BIN)/python -m benchmarks.bench $(BENCH)

bench-data: setup  ## measure data preparation and streaming; BENCH="--suites prepare --record"
	$(BIN)/python -m benchmarks.bench_data $(BENCH)

test-fast: setup  ## run the tests that neither start ranks nor take long
	$(PYTEST) -m "not slow and not dist and not slurm"

check: setup  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

format: setup  ## apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

verify: setup  ## recompute the golden numbers of the authors' implementation
	$(BIN)/python -m trainer.verify tests/golden

tensorboard: setup  ## watch the runs; LOGDIR=runs/demo for the demo
	$(BIN)/tensorboard --logdir $(LOGDIR)

clean:  ## remove caches and the virtual environment; runs and datasets stay
	rm -rf $(VENV) build cocomix.egg-info .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
