"""Image classification data: one file per source, all returned as `ImageData`.

A new source is one file here with a `build_*` function, one dataclass in `conf/schema.py`, one
YAML file in `conf/data/` and one line in `data/sources.py`.
"""

from data.base import BrokenImageError, ImageData
from data.broken import BrokenImages
from data.loading import eval_loader, train_loader
from data.sources import build

__all__ = [
    "BrokenImageError",
    "BrokenImages",
    "ImageData",
    "build",
    "eval_loader",
    "train_loader",
]
