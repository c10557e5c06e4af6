# Each command makes its own .venv when there is none. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALLED := $(VENV)/.installed
COMPILE_ON_ALL_CORES := 'import compileall as c, sysconfig as s; c.compile_dir(s.get_path("purelib"), quiet=2, workers=0)'
TEACHER ?=
DATASET ?=
ARGS ?=

.PHONY: demo test test-long gpu check lint types structure gate style clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[demo,test]'
	$(BIN)/python -c $(COMPILE_ON_ALL_CORES)
	touch $@

demo: $(INSTALLED)  ## distil a real classifier into half its layers; TEACHER= and DATASET= name your own
	@$(BIN)/python scripts/demo.py $(if $(TEACHER),--teacher '$(TEACHER)') $(if $(DATASET),--dataset '$(DATASET)') $(ARGS)

test: $(INSTALLED)  ## the test suite; test-long runs the widest cases too
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-long: $(INSTALLED)  ## everything that needs no GPU
	$(BIN)/python -m pytest -n 2 -m 'not gpu' $(ARGS)
	$(BIN)/python scripts/checks/static_gate.py

gpu: $(INSTALLED)  ## tests, tiles and speeds of the kernels on the GPU that is there; without one it says so
	$(BIN)/python scripts/checks/device.py $(ARGS)

check: lint types structure gate  ## lint, format, types of the public names, import direction, compiled kernels, the products on this CPU
	$(BIN)/python scripts/checks/engines.py --short

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

structure: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_project.py

gate: $(INSTALLED)
	$(BIN)/python scripts/checks/static_gate.py --short

style: $(INSTALLED)  ## format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was made, the teacher of the demo included
	rm -rf $(VENV) runs build dist *.egg-info
