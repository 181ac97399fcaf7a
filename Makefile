# Set-up, checks and the two commands of the README. Everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check install

install: $(VENV)/.installed

# torch first and alone: the resolver then keeps it, and a machine with its own build (CUDA) can put that in its place.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

assets/news.txt: | $(VENV)/.installed
	$(BIN)/lsi sample-material assets

# A real model to 3 bits on two Ray actors; shows perplexities, leaves runs/quickstart/checkpoint and runs/quickstart/result.json.
quickstart: install assets/news.txt
	$(BIN)/lsi quantize configs/quickstart.yaml

# Two processes, a file of tests each: most tests wait for processes of their own or compute on one thread. Long tests come first,
# many short ones last (tests/conftest.py), so that neither waits for the other at the end.
test: install assets/news.txt
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
