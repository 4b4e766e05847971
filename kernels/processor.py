"""What PyTorch tells of the processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["abilities"]


def abilities() -> Mapping[str, Any]:
    """`torch.cpu.get_capabilities`: sizes of caches, instruction sets, a name.

    Nothing where PyTorch is too old to tell, which on GPU machines it may be.
    """
    return getattr(torch.cpu, "get_capabilities", dict)()
