"""Loaders whose order and augmentation depend only on the seed and the position.

Training: each epoch is one permutation of the data set, cut into global batches; process r of n
takes the r-th part of each. A run on n processes thus sees the same global batches as one process
with n times the batch size. An incomplete last batch is dropped (its images come up in other
epochs). Evaluation: process r takes every n-th image; each image is seen exactly once.

A broken image is replaced by the next good one in training, so that batches stay whole and all
processes take the same number of steps, and left out of evaluation, so that no image counts twice.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from conf.schema import ConfigError
from data.base import BrokenImageError, ImageDataset
from data.broken import Broken, BrokenImages
from data.seeding import ORDER, SAMPLE, derive_seed, seeded

Key = tuple[int, ...]  # epoch, index and, with repeated augmentation, which copy of the image
Batch = tuple[torch.Tensor, torch.Tensor]


class Sample(NamedTuple):
    """An image with its label, and the broken images met on the way to it.

    `image` is None where the search for a good one was given up.
    """

    image: torch.Tensor | None
    label: int
    broken: tuple[Broken, ...] = ()


class SeededSamples(Dataset[Sample]):
    """Seeds each sample's randomness from its key, whichever process loads it.

    Args:
        dataset: The images.
        seed: Seed of the run.
        max_broken: Broken images in a row after which no further one is tried.
    """

    def __init__(self, dataset: ImageDataset, seed: int, max_broken: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.max_broken = max_broken

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Sample:
        broken: list[Broken] = []
        size = len(self.dataset)
        for step in range(size):
            with seeded(derive_seed(self.seed, SAMPLE, *key)):
                try:
                    image, label = self.dataset[(key[1] + step) % size]
                except BrokenImageError as error:
                    broken.append((error.name, error.reason))
                else:
                    return Sample(image, label, tuple(broken))
            if len(broken) > self.max_broken:
                return Sample(None, -1, tuple(broken))
        raise ConfigError(f"none of the {size} training images can be decoded")


class EvalSamples(Dataset[Sample]):
    """The samples themselves; a broken image is an empty one."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        try:
            return Sample(*self.dataset[index])
        except BrokenImageError as error:
            return Sample(None, -1, ((error.name, error.reason),))


class TrainBatches(Sampler[list[Key]]):
    """One process's batches of an epoch, from any batch of it on.

    Args:
        size: Samples in the data set.
        batch_size: Samples per process and batch.
        seed: Seed of the run.
        rank: This process.
        world_size: Number of processes.
        limit: Most batches per epoch; None for all.
        repeats: Copies of each image, one after the other, to be augmented differently (Hoffer et
            al., "Augment your batch"). The epoch is as long as without.
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
        repeats: int = 1,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
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
            yield [self._key(order, place) for place in range(first, first + self.batch_size)]

    def _key(self, order: np.ndarray, place: int) -> Key:
        index, copy = divmod(place, self.repeats)
        key = (self.epoch, int(order[index]))
        return key if self.repeats == 1 else (*key, copy)


class EvalIndices(Sampler[int]):
    """Every `world_size`-th index from `rank` on: disjoint, complete, possibly uneven."""

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def _collate(samples: list[Sample]) -> tuple[Batch | None, list[Broken]]:
    """Stack the images there are; None if there is none."""
    good = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    broken = [entry for sample in samples for entry in sample.broken]
    return tuple(default_collate(good)) if good else None, broken


class Loader:
    """Batches `(images, labels)` of a `DataLoader`; what was broken goes to `broken`."""

    def __init__(self, loader: DataLoader, broken: BrokenImages) -> None:
        self.loader = loader
        self.broken = broken

    def __iter__(self) -> Iterator[Batch]:
        for batch, broken in self.loader:
            self.broken.add(broken)
            if batch is not None:
                yield batch


def train_loader(
    dataset: ImageDataset,
    batches: TrainBatches,
    *,
    broken: BrokenImages | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """A loader that follows `batches`; call `batches.set_position` before each epoch.

    Args:
        dataset: Training images.
        batches: Which of them, in what order.
        broken: Counts broken images; None allows none.
        num_workers: Loading processes.
        pin_memory: Put batches where a GPU can fetch them.
    """
    broken = broken or BrokenImages()
    samples = SeededSamples(dataset, batches.seed, broken.limit)
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        collate_fn=_collate,
    )
    return Loader(loader, broken)


def eval_loader(
    dataset: ImageDataset,
    batch_size: int,
    *,
    broken: BrokenImages | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """A loader over this process's share of `dataset`, in order.

    Args:
        dataset: Evaluation images.
        batch_size: Images per batch; fewer in the last one and where images are broken.
        broken: Counts broken images; None allows none.
        rank: This process.
        world_size: Number of processes.
        num_workers: Loading processes.
        pin_memory: Put batches where a GPU can fetch them.
    """
    loader = DataLoader(
        EvalSamples(dataset),
        batch_size=batch_size,
        sampler=EvalIndices(len(dataset), rank=rank, world_size=world_size),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        collate_fn=_collate,
    )
    return Loader(loader, broken or BrokenImages())
