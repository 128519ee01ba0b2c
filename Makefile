# make setup | reproduce | test | test-quick | coverage | lint | docs | bench | endurance | figures | pictures |
#      measure-gpu | lab | clean. Every target sets up what it needs. On two cores:
#
#   lint        20 s   ruff, mypy, and the import contracts of pyproject.toml; nothing is run
#   test-quick  70 s   lint, and the tests without the marker `slow`: request validation, byte-exact profiling, records,
#                      figures, a generation and forecasts of the tiny model. For every change, before a commit
#   test         5 min lint, and every test: all notebooks, JupyterLab and the site in Chromium, parity with upstream
#   coverage     9 min every test again, and which lines of src/i2v_lab they ran, child processes included
#   bench        2 min wall-clock times, which no test asserts: what profilers cost, how quickly commands and views answer
#
# A test is `slow` by the durations in tests/durations.json, not by hand: tests/scheduling.py says how.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: setup reproduce test test-quick coverage lint docs bench endurance figures pictures measure-gpu lab clean

setup: .venv/.stamp

.venv/.stamp: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("i2v-lab needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps ltx-video==0.1.2
	touch $@

reproduce: setup
	$(BIN)/i2v-lab reproduce

test: lint
	$(PYTEST) --durations=10

test-quick: lint
	$(PYTEST) -m "not slow" --durations=5

coverage: setup
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
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/interleaved.py

endurance: setup
	$(BIN)/python tests/endurance.py

figures: setup
	$(BIN)/python docs/draw_figures.py

pictures: setup
	$(BIN)/python docs/draw_jupyterlab.py

measure-gpu: setup
	$(BIN)/i2v-lab measure --plan data/plans/h200.yaml --out runs/h200 --device cuda

lab: setup
	$(BIN)/i2v-lab lab $(LAB)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
