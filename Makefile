# make setup | locks | reproduce | test | test-quick | faults | ranges | coverage | lint | docs | bench | endurance | figures | pictures |
#      measure-gpu | lab | clean. Every target sets up what it needs. On two cores:
#
#   lint        20 s   ruff, mypy, and the import contracts of pyproject.toml; nothing is run
#   test-quick   2 min lint, and the tests without the marker `slow`: request validation, byte-exact profiling, records,
#                      figures, a generation and forecasts of the tiny model. For every change, before a commit
#   test        12 min lint, and every test: all notebooks, JupyterLab and the site in Chromium, parity with upstream
#   faults      35 min the faults of tests/faults at the size of a night: 1,000 faults and 10,000 damaged inputs
#   coverage     9 min every test again, and which lines of src/i2v_lab they ran, child processes included
#   ranges       7 min the quick tests at both ends of the version ranges, and conformance with upstream at the lowest
#   bench        3 min wall-clock times, which no test asserts: what profilers cost, how quickly commands and views answer
#
# A test is `slow` by the durations in tests/durations.json, not by hand: tests/scheduling.py says how.
PYTHON ?= python3
LOCK ?= locks/setup.txt
BIN := .venv/bin
INSTALL = $(if $(shell command -v uv),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install --disable-pip-version-check) --quiet --no-deps
COMPILE = $(BIN)/uv pip compile --quiet pyproject.toml --all-extras --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command 'make locks'
# The tests start hundreds of processes, each of which would compile its modules anew where the environment forbids to keep bytecode.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: setup locks reproduce test test-quick faults ranges coverage lint docs bench endurance figures pictures measure-gpu lab clean

setup: .venv/.stamp

# Exactly the versions of the lock, `make LOCK=locks/highest.txt` those of another: with uv if it is there, with pip otherwise. ltx-video comes last, without its own
# pins: no transformers meets both those and ltx-core's.
.venv/.stamp: pyproject.toml $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit("i2v-lab needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(INSTALL) -r $(LOCK)
	$(INSTALL) -e . ltx-video==0.1.2
	touch $@

# Not part of `make setup`, which they would make 50 MB larger.
$(BIN)/nox: | setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check nox==2026.10.20 uv==0.13.9

locks: $(BIN)/nox
	$(COMPILE) -c locks/setup.in -o locks/setup.txt
	$(COMPILE) -o locks/highest.txt
	$(COMPILE) --resolution lowest-direct -o locks/lowest.txt

reproduce: setup
	$(BIN)/i2v-lab reproduce

test: lint
	@echo 'about 12 min on two cores'
	$(PYTEST) --durations=10

test-quick: lint
	$(PYTEST) -m "not slow" --durations=5

faults: lint
	@echo 'about 35 min on two cores'
	I2V_LAB_FAULTS=$(or $(I2V_LAB_FAULTS),1000) $(PYTEST) tests/faults

ranges: $(BIN)/nox
	$(BIN)/nox

coverage: setup
	@echo 'about 12 min on two cores'
	mkdir -p build
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=html:build/coverage

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/mkdocs build --strict

bench: setup
	@echo 'about 3 min on two idle cores: 1 min of latency, then interleaved generations, which say after the first how long the others take'
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/interleaved.py

endurance: setup
	@echo 'about 10 min'
	$(BIN)/python tests/endurance.py

figures: setup
	$(BIN)/python docs/draw_figures.py
	$(BIN)/python docs/write_summary.py

pictures: setup
	$(BIN)/python docs/draw_jupyterlab.py
	$(BIN)/python docs/draw_answer.py

measure-gpu: setup
	$(BIN)/i2v-lab measure --plan data/plans/h200.yaml --out runs/h200 --device cuda

lab: setup
	$(BIN)/i2v-lab lab $(LAB)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
