"""Randomness as a function of position, not of history.

Every random draw of a run is seeded from what it belongs to: the sample order from
(seed, epoch), a sample's augmentation from (seed, epoch, index), dropout and mixup from
(seed, step, process). A run can therefore stop and continue anywhere, with any number of loading
processes, and draw the same numbers; no generator state needs saving.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# One stream for each use, so that equal numbers never give equal draws.
ORDER, SAMPLE, STEP = 0, 1, 2


def derive_seed(*key: int) -> int:
    """A well mixed 32-bit seed from a tuple of non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seed_global(seed: int) -> None:
    """Seed `random`, `numpy.random` and `torch` on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators inside the block and restore them after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
