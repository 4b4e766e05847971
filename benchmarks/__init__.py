"""Measurements: ``python -m benchmarks.<name>``. Each checks correctness before it measures."""

import os

# As in `train.py`, for every model that is timed: huge pages, asked for before torch is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
