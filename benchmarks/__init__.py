"""Measurements: ``python -m benchmarks.<name>``. Each checks correctness before it measures."""
