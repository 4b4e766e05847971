"""Outputs of modules compared with their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_same_with_gradients(
    got: Tensor, expected: Tensor, inputs: Sequence[Tensor], tolerance: float = 1e-10
) -> None:
    """The same output, and the same gradients of ``inputs`` from a random one of the output."""
    gradient = torch.randn_like(expected)
    grads = (torch.autograd.grad(x, inputs, gradient) for x in (got, expected))
    for a, b in zip(*((x, *g) for x, g in zip((got, expected), grads, strict=True)), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0.0)
