# Continuous integration calls these targets too: .ci/run.
.PHONY: help install lint format types imports test notebooks
.PHONY: test-gpu bench-gpu bench-gpu-check tune-gpu codegen
.NOTPARALLEL:  # timings want the machine to themselves

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

install:  ## install for development into the active environment
	pip install -e ".[dev]"

lint:  ## style, format, types, import rules, stored outputs
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	nbstripout --verify notebooks/*.ipynb

format:  ## rewrite files in the house format
	ruff format .
	ruff check --fix .
	nbstripout notebooks/*.ipynb

test:  ## everything that a CPU can tell
	pytest

notebooks:  ## execute the notebooks and export their figures to docs/figures
	python -m notebooks

# Together they take less than 9 minutes and write benchmarks/reports/gpu.md; after failed tests the
# benchmarks run all the same, and the exit code is theirs.
test-gpu:  ## the tests that need a GPU
	python -m benchmarks.gpu_report tests $(if $(filter bench-gpu,$(MAKECMDGOALS)),--defer)

bench-gpu:  ## attention, model throughput and a trial of the tuner, on a GPU
	python -m benchmarks.gpu_report benchmarks

bench-gpu-check:  ## the same work on a CPU, at tiny sizes
	python -m benchmarks.gpu_report check

tune-gpu:  ## rewrite the launch table for this GPU (half an hour)
	python -m benchmarks.tune

codegen:  ## what the compiler makes of the kernels, without a GPU
	python -m benchmarks.codegen
