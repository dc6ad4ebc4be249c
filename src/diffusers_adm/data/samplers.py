"""The order of the examples in an epoch: a function of the seed and the epoch only, so that runs can be resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from .embeddings import EmbeddingDataset
from .images import ImageDataset
from .seeding import derive_seed


class EpochShuffleSampler(torch.utils.data.Sampler[int]):
    """
    Shuffles the examples anew each epoch, by the seed and the epoch of an `ImageDataset` only.

    PyTorch's `RandomSampler` uses a generator, whose state a resumed run would have to restore. The epoch is read from
    the dataset on purpose: if the sampler has a `set_epoch` of its own, Accelerate does not call that of the dataset.

    Args:
        dataset (`ImageDataset` or `EmbeddingDataset`): Gives the seed and the epoch.
    """

    def __init__(self, dataset: ImageDataset | EmbeddingDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.dataset.seed, "shuffle", self.dataset.epoch))
        yield from torch.randperm(len(self.dataset), generator=generator).tolist()


class BalancedClassSampler(torch.utils.data.Sampler[int]):
    """
    Samples all classes equally often (their counts differ by at most 1), however many images they have. An epoch is as
    long as the dataset; it holds each image of a small class several times, and a random subset of a large one.

    Like `EpochShuffleSampler`, it depends only on the seed and the epoch of an `ImageDataset`.

    Args:
        dataset (`ImageDataset` or `EmbeddingDataset`): Gives the seed and the epoch.
        labels (sequence of `int`): The class of each example.
    """

    def __init__(self, dataset: ImageDataset | EmbeddingDataset, labels: Sequence[int]):
        if len(labels) != len(dataset):
            raise ValueError(f"Got {len(labels)} labels for {len(dataset)} examples. Pass one for each.")
        self.dataset = dataset
        ids = torch.as_tensor(labels)
        self.members = [torch.nonzero(ids == label)[:, 0] for label in ids.unique()]

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        seed = derive_seed(self.dataset.seed, "balanced shuffle", self.dataset.epoch)
        generator = torch.Generator().manual_seed(seed)
        share, rest = divmod(len(self.dataset), len(self.members))
        with_one_more = set(torch.randperm(len(self.members), generator=generator)[:rest].tolist())
        chosen = []
        for number, members in enumerate(self.members):
            wanted = share + (number in with_one_more)
            rounds = math.ceil(wanted / len(members))
            # Every image once before any is repeated.
            order = [torch.randperm(len(members), generator=generator) for _ in range(rounds)]
            chosen += [members[torch.cat(order)[:wanted]]] if wanted else []
        indices = torch.cat(chosen)
        yield from indices[torch.randperm(len(indices), generator=generator)].tolist()
