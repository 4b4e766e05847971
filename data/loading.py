"""Loaders whose order and augmentation depend only on the seed and the position.

Training: each epoch is one permutation of the data set, cut into global batches; process r of n
takes the r-th part of each. A run on n processes thus sees the same global batches as one process
with n times the batch size. An incomplete last batch is dropped (its images come up in other
epochs). Evaluation: process r takes every n-th image; each image is seen exactly once.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.base import ImageDataset
from data.seeding import ORDER, SAMPLE, derive_seed, seeded

Key = tuple[int, int]  # (epoch, index)


class SeededSamples(Dataset[tuple[torch.Tensor, int]]):
    """Seeds each sample's randomness from (seed, epoch, index), whichever process loads it."""

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int]:
        epoch, index = key
        with seeded(derive_seed(self.seed, SAMPLE, epoch, index)):
            return self.dataset[index]


class TrainBatches(Sampler[list[Key]]):
    """One process's batches of an epoch, from any batch of it on.

    Args:
        size: Samples in the data set.
        batch_size: Samples per process and batch.
        seed: Seed of the run.
        rank: This process.
        world_size: Number of processes.
        limit: Most batches per epoch; None for all.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_batches = size // (batch_size * world_size)
        if limit is not None:
            self.num_batches = min(self.num_batches, limit)
        self.epoch = 0
        self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Make the next iteration yield batches `start`, `start + 1`, … of `epoch`."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        order = np.random.default_rng(derive_seed(self.seed, ORDER, epoch)).permutation(self.size)
        for batch in range(self.start, self.num_batches):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(epoch, int(index)) for index in order[first : first + self.batch_size]]


class EvalIndices(Sampler[int]):
    """Every `world_size`-th index from `rank` on: disjoint, complete, possibly uneven."""

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def train_loader(
    dataset: ImageDataset, batches: TrainBatches, *, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """A loader that follows `batches`; call `batches.set_position` before each epoch."""
    return DataLoader(
        SeededSamples(dataset, batches.seed),
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def eval_loader(
    dataset: ImageDataset,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader over this process's share of `dataset`, in order."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=batch_size,
        sampler=EvalIndices(len(dataset), rank=rank, world_size=world_size),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
