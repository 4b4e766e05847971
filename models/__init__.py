"""The Focal Transformer; importing this package registers its variants with timm."""

from models import checkpoint, loading
from models.checkpoint import load_weights
from models.focal_transformer import FocalTransformer
from models.loading import describe, load, save
from models.variants import (
    focal_base,
    focal_base_conv,
    focal_large,
    focal_large_conv,
    focal_micro,
    focal_small,
    focal_small_conv,
    focal_tiny,
    focal_tiny_conv,
)

__all__ = [
    "FocalTransformer",
    "checkpoint",
    "describe",
    "focal_base",
    "focal_base_conv",
    "focal_large",
    "focal_large_conv",
    "focal_micro",
    "focal_small",
    "focal_small_conv",
    "focal_tiny",
    "focal_tiny_conv",
    "load",
    "load_weights",
    "loading",
    "save",
]
