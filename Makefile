# Needs python3 and make, nothing else. Every target installs what it needs into .venv, once.
.PHONY: quickstart test quality style install clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

quickstart: install  ## score, tune and compare on the shipped images: about 3 minutes on 2 cores
	$(BIN)/surgical-peft quickstart

test: install  ## the whole test suite
	$(BIN)/python -m pytest -n auto --dist loadfile

quality: install  ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: install  ## fix what lint and format can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/installed

# torch first: once it is there, nothing else pulls another build of it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) quickstart
