# One virtual environment for everything; both targets set it up by themselves in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test format clean

help:
	@echo "make demo    train a small transformer plain and self-distilled, print the table, draw the curves"
	@echo "make test    style, types and all tests"
	@echo "make format  format the code and sort imports"
	@echo "make clean   remove the virtual environment and build products"

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable ".[dev]"
	@touch $@

demo: .venv/installed
	$(BIN)/python examples/quickstart.py

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --cov --cov-report=term-missing:skip-covered

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage
