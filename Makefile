# Continuous integration calls these targets too: .ci/run.
.PHONY: help install lint format types imports test test-gpu codegen

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install:  ## install for development into the active environment
	pip install -e ".[dev]"

lint:  ## style, format, types and import rules
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format:  ## rewrite files in the house format
	ruff format .
	ruff check --fix .

test:  ## everything that a CPU can tell
	pytest

test-gpu:  ## the tests that need a GPU
	pytest -m gpu -n 0

codegen:  ## what the compiler makes of the kernels, without a GPU
	python -m benchmarks.codegen
