"""The batches of an epoch: which images, in which order, for which process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from .data import Images, collate
from .seeds import mixed


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """One epoch in a shuffled order; a last batch that is not full is left out.

    All processes draw the same order, and each takes its own part of every batch, so a step has
    the same images however many processes share it.

    Args:
        count: Number of images.
        batch: Images of a step, of all processes together.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        start: Steps of the epoch that are done.
        rank: Number of this process.
        world: Number of processes, a divisor of ``batch``.

    Attributes:
        share: Images of a step in this process.
    """

    def __init__(
        self, count: int, batch: int, seed: int, epoch: int, start: int, rank: int, world: int
    ) -> None:
        self.count, self.batch, self.seed, self.epoch = count, batch, seed, epoch
        self.start, self.rank, self.share = start, rank, batch // world

    def __len__(self) -> int:
        return self.count // self.batch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mixed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        for step in range(self.start, self.count // self.batch):
            first = step * self.batch + self.rank * self.share
            yield [(self.epoch, index) for index in order[first : first + self.share]]


class ValBatches(Sampler[list[tuple[int, int]]]):
    """Every image once, each in one process.

    Args:
        count: Number of images.
        batch: Images of a batch in this process.
        rank: Number of this process.
        world: Number of processes.

    Attributes:
        mine: Indices of this process's images.
    """

    def __init__(self, count: int, batch: int, rank: int, world: int) -> None:
        self.mine, self.batch = range(rank, count, world), batch

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.mine), self.batch):
            yield [(0, index) for index in self.mine[first : first + self.batch]]


def loader(images: Images, batches: Sampler[list[tuple[int, int]]], workers: int) -> DataLoader:
    """Reads batches, in worker processes if there are any.

    Args:
        images: The images.
        batches: Keys of the images, a list for each batch.
        workers: Number of worker processes.
    """
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader draws a seed, and not from the run's generator
    )
