# make setup | reproduce | test | endurance | figures | pictures | bench | measure-gpu | lab | clean. Every target sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup reproduce test endurance figures pictures bench measure-gpu lab clean

setup: .venv/.stamp

.venv/.stamp: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("i2v-lab needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps ltx-video==0.1.2
	touch $@

reproduce: setup
	$(BIN)/i2v-lab reproduce

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

endurance: setup
	$(BIN)/python tests/endurance.py

figures: setup
	$(BIN)/python docs/draw_figures.py

pictures: setup
	$(BIN)/python docs/draw_jupyterlab.py

bench: setup
	$(BIN)/python benchmarks/turns.py

measure-gpu: setup
	$(BIN)/i2v-lab measure --plan data/plans/h200.yaml --out runs/h200 --device cuda

lab: setup
	$(BIN)/i2v-lab lab $(LAB)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
