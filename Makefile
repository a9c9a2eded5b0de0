# Everything a contributor types. Each target sets up .venv by itself; a second run is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: help setup demo test test-all bench retention retention-quick lint docs clean lab lab-pair

help:
	@echo "make demo      carry a real adapter between two small bases, and show it on a page"
	@echo "make test      lint, types and tests (under 10 minutes)"
	@echo "make test-all  the same with the slow tests"
	@echo "make bench     speed and memory on an SDXL-shaped pair (needs 20 GB of disk)"
	@echo "make retention how much of an adapter survives every kind of upgrade (an hour or two)"
	@echo "make lab       retrain the lab's bases and adapters (a few hours; resumes)"
	@echo "make docs      regenerate the CLI reference and the tables of families and formats"
	@echo "make lab-pair  retrain the embedded pair (about an hour on two cores)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--group dev -e ".[measure,quantised]"
	rm -f $(VENV)/.ready-* && touch $@

demo: setup
	$(BIN)/regraft demo

# One process per core and one thread in each: threads inside small sums only wait for each other.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: setup lint
	$(TESTS) -m "not slow"

test-all: setup lint
	$(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.transfer_sdxl
	$(BIN)/python -m benchmarks.resize_sdxl

# both families side by side, one thread each
retention: setup
	$(BIN)/python -m benchmarks.retention

retention-quick: setup
	$(BIN)/python -m benchmarks.retention --quick --out benchmarks/.work/quick --docs benchmarks/.work/quick

docs: setup
	$(BIN)/cog -r docs/cli.md docs/families.md docs/formats.md docs/methods/families/README.md

lab: setup
	$(BIN)/python -m lab.build

lab-pair: setup
	$(BIN)/python -m lab.train_pair

clean:
	rm -rf $(VENV) benchmarks/.work lab/.work .pytest_cache .mypy_cache .ruff_cache
