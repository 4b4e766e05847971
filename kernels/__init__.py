"""Focal self-attention: one operator, three backends.

Public names: `FocalLevel`, `FocalGeometry` (which keys a window attends), `Pooling`, `PooledMap`
(how a coarse level gets its keys), `focal_attention` and `focal_attention_qkvpacked`.
"""

from kernels.api import (
    BACKENDS,
    focal_attention,
    focal_attention_qkvpacked,
    resolve_backend,
)
from kernels.coarse import PooledMap, Pooling
from kernels.geometry import FocalGeometry, FocalLevel

__all__ = [
    "BACKENDS",
    "FocalGeometry",
    "FocalLevel",
    "PooledMap",
    "Pooling",
    "focal_attention",
    "focal_attention_qkvpacked",
    "resolve_backend",
]
