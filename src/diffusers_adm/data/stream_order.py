"""
The order of streamed examples: which process reads which rows in which order, as a function of the seed and the epoch.

A position in training is an epoch and a number of batches, as for data that are read at random. Nothing else is saved:
the order, and the content of the shuffle buffer at any position, follow from the numbers of rows in the shards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .seeding import derive_seed


class Rows(NamedTuple):
    """The rows from `first` up to, but without, `last` of a shard."""

    shard: int
    first: int
    last: int


class StreamOrder:
    """
    Distributes the rows of shards over processes, their lanes and batches.

    In each epoch, the shards are shuffled, and their rows, in this order, are cut into one range for each lane. A
    process has `num_lanes` lanes, and batch b of a process is read from its lane b modulo `num_lanes`. The workers of a
    loader share the lanes of their process, so a range is a few whole shards and parts of two others, and each row is
    read by one worker. All processes have the same number of batches; the rows that do not fill a batch on all of them
    are left out, other ones in each epoch. Within a lane, a [`ShuffleBuffer`] mixes neighbours.

    Args:
        sizes (sequence of `int`): Number of rows of each shard.
        seed (`int`): The seed of the run.
        batch_size (`int`): Examples per batch of one process.
        num_processes (`int`, defaults to 1), num_lanes (`int`, defaults to 1): Number of processes, and of the lanes of
            each.
        buffer_size (`int`, defaults to 1000): Examples that are held at a time to be shuffled, for each lane; 1 keeps
            the order within shards.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        batch_size: int,
        num_processes: int = 1,
        num_lanes: int = 1,
        buffer_size: int = 1000,
    ):
        self.sizes, self.seed, self.batch_size = np.asarray(sizes, dtype=np.int64), seed, batch_size
        self.num_processes, self.num_lanes, self.buffer_size = num_processes, num_lanes, buffer_size
        self.num_rows = int(self.sizes.sum())
        # The id of the first row of each shard. Row i of the whole data has the id i, in every epoch.
        self.first_ids = np.cumsum(self.sizes) - self.sizes

    @property
    def num_batches(self) -> int:
        """Number of batches of each process in an epoch."""
        return self.num_rows // (self.batch_size * self.num_processes)

    def lane(self, process: int, lane: int) -> range:
        """The positions, in the sequence of all rows of an epoch, of the rows of a lane."""
        share, rest = divmod(self.num_batches, self.num_lanes)
        first = process * self.num_batches + lane * share + min(lane, rest)
        return range(first * self.batch_size, (first + share + (lane < rest)) * self.batch_size)

    def shards(self, epoch: int) -> np.ndarray:
        """The numbers of the shards in the order of an epoch."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "shards", epoch))
        return torch.randperm(len(self.sizes), generator=generator).numpy()

    def rows(self, epoch: int, first: int, last: int) -> Iterator[Rows]:
        """The rows at the positions from `first` up to, but without, `last` of an epoch."""
        shards = self.shards(epoch)
        ends = np.cumsum(self.sizes[shards])
        place = int(np.searchsorted(ends, first, side="right"))
        while first < last:
            start = int(ends[place] - self.sizes[shards[place]])
            end = min(last, int(ends[place]))
            if end > first:  # not of an empty shard
                yield Rows(int(shards[place]), first - start, end - start)
            first, place = end, place + 1

    def buffer(self, epoch: int, process: int, lane: int, skipped: int = 0) -> ShuffleBuffer:
        """The shuffle buffer of a lane after `skipped` examples."""
        positions = self.lane(process, lane)
        seed = derive_seed(self.seed, "shuffle buffer", epoch, process, lane)
        buffer = ShuffleBuffer(positions.start, positions.stop, self.buffer_size, seed)
        for _ in range(skipped):
            next(buffer)
        return buffer


class ShuffleBuffer(Iterator[int]):
    """
    The positions from `start` up to, but without, `stop` in the order of a shuffle buffer: each next one is drawn from
    those held, and the next position of the sequence takes its place.

    It holds positions, not examples, so that the buffer at any place is found without reading (a million draws take
    less than a second).

    Args:
        start (`int`), stop (`int`): The positions.
        size (`int`): Number of positions that are held.
        seed (`int`): Of the draws.

    Attributes:
        held (list of `int`): The positions that are held.
        coming (`int`): The next position of the sequence.
    """

    def __init__(self, start: int, stop: int, size: int, seed: int):
        self.stop, self.coming = stop, min(start + size, stop)
        self.held = list(range(start, self.coming))
        # `random()` is the one method whose results all versions of Python share.
        self._draw = random.Random(seed).random

    def __next__(self) -> int:
        if not self.held:
            raise StopIteration
        place = int(self._draw() * len(self.held))
        position = self.held[place]
        if self.coming < self.stop:
            self.held[place] = self.coming
            self.coming += 1
        else:
            self.held[place] = self.held[-1]
            self.held.pop()
        return position
