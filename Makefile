# `make demo` and `make test` set everything up on a machine with Python 3.11 and nothing else; both may be repeated.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help install demo test lint unit test-reliability benchmark clean

help:
	@echo "make demo               set up, then run the built-in task: MLE, ESRL, a table, report.html"
	@echo "make test               set up, then lint, format and type check, all tests"
	@echo "make benchmark          set up, then measure speed and memory beside other tools (over an hour)"
	@echo "make test-reliability   the kill tests in their long form: 100 random kills, and one at every file operation"
	@echo "make clean              remove the virtual environment and caches"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "esrl needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and alone: whatever else asks for it is then satisfied by the pinned build
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

install: $(STAMP)

demo: install
	$(BIN)/esrl demo

lint: install
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

# two processes with a thread each: many small tests, so threads would only get in each other's way
unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: lint unit

test-reliability: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m kill --n 100

benchmark: install
	$(BIN)/esrl benchmark

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
