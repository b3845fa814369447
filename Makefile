# Two commands do everything on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# On machines without a GPU: make TORCH_INDEX=https://download.pytorch.org/whl/cpu ...
TORCH_INDEX ?=
export MEDFL_DATA ?= $(abspath ../shared/data)
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types bench fuzz wheel wheelhouse offline-test chaos clean help

help:  ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

demo: $(VENV)/.installed  ## Install, then run a whole federation of four phantom hospitals
	$(BIN)/medfl-sim demo --output runs/demo

# Tests of real processes and clocks that fail are tried once more and named, no others: see tests/conftest.py.
test: $(VENV)/.installed-dev  ## Install with the development extras, then run the whole test suite
	$(BIN)/python -m pytest -n 2 --maxschedchunk 1

lint: $(VENV)/.installed-dev  ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## Types, strict
	$(BIN)/mypy -p medfl.shared -p medfl.strategies -p medfl.server -p medfl.client -p medfl.simulations

bench: $(VENV)/.installed-dev  ## Benchmarks, as ratios to the bare loop or to the peer in the same run
	@for bench in tests/benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench || exit 1; done

fuzz: $(VENV)/.installed-dev  ## 3,000 damaged DICOM files, some minutes: what becomes of them
	PYTHONPATH=tests/support $(BIN)/python tests/client/data/test_fuzz.py 2000 2

chaos: $(VENV)/.installed-dev  ## Real processes, 200 of them killed at random moments: what must hold then, counted
	$(BIN)/python tests/support/chaos.py --kills $(or $(KILLS),200) --seed $(or $(SEED),1)

wheel: $(VENV)/.installed-dev  ## Build the wheel through the source distribution
	rm -rf dist build
	$(BIN)/python -m build --outdir dist .

wheelhouse: wheel  ## Everything an installation without network needs, in one folder, with hashes
	rm -rf wheelhouse
	$(PIP) wheel --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --no-deps --wheel-dir wheelhouse $(shell grep '^torch==' constraints.txt)
	$(PIP) wheel --quiet -c constraints.txt --find-links wheelhouse --wheel-dir wheelhouse "$$(echo dist/medfl-*.whl)[gpu,pacs,report]"
	$(BIN)/python .ci/lock.py wheelhouse

offline-test:  ## Install the wheelhouse where there is no network, and start the commands
	bash .ci/offline wheelhouse

clean:  ## Remove what was built, keep the environment
	rm -rf build dist wheelhouse .mypy_cache .pytest_cache .ruff_cache runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(VENV)/bin/python constraints.txt
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(shell grep '^torch==' constraints.txt)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
