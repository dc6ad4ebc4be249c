"""
Batches that do not fit in memory, split into halves whose gradients are accumulated.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import find_batch_size
from accelerate.utils.memory import should_reduce_batch_size

from ..commands.errors import CommandError


def is_out_of_memory(error: BaseException) -> bool:
    """
    Whether an error says that memory is exhausted, that of a device or of the CPU. Not one that explains another for
    the user, and ends the run.
    """
    if isinstance(error, CommandError):
        return False
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)


@dataclass
class Part:
    """
    A batch, or a part of one.

    Attributes:
        batch (`dict`): Its tensors.
        share (`float`): Share of the images of the batch.
        micro_step (`int`, *optional*): That of the batch, in its first part.
        is_new (`bool`): Whether it is the first of a batch that was not tried before.
        is_last (`bool`): Whether it is the last before the gradient is complete, as far as batches were loaded.
    """

    batch: dict[str, Any]
    share: float = 1.0
    micro_step: int | None = None
    is_new: bool = True
    is_last: bool = True


class BatchSplitter:
    """
    Gives the batches of an optimizer step whole, or again in parts after one did not fit in memory. The step then has
    the same images and the same mean gradient, up to rounding and to the random numbers, which are drawn for each part.

    Args:
        can_split (`bool`, defaults to `True`): Whether the loss of a batch is the mean of those of its parts.
        accumulation (`int`, defaults to 1): Batches of an optimizer step.
        num_processes (`int`, defaults to 1): With several, which do not wait for another attempt, none is made.

    Attributes:
        parts (`int`): Number of parts of a batch, from now on.
        part (`Part`): The one that was given last.
    """

    def __init__(self, can_split: bool = True, accumulation: int = 1, num_processes: int = 1) -> None:
        self.can_split, self.accumulation, self.num_processes = can_split, accumulation, num_processes
        self.parts = 1
        self.part = Part({})
        self._batches: list[tuple[int, dict[str, Any]]] = []  # of this optimizer step
        self._again = False

    def begin(self) -> None:
        """Begins an optimizer step."""
        self._batches = []

    def give(self, micro_step: int, batch: dict[str, Any]) -> Iterator[Part]:
        """Yields a batch in its parts; if `split` is called meanwhile, all batches of the optimizer step."""
        self._batches.append((micro_step, batch))
        todo, is_new = self._batches[-1:], True
        while True:
            self._again = False
            for part in self._split(todo, is_new):
                self.part = part
                yield part
                if self._again:
                    break
            else:
                return
            todo, is_new = self._batches, False

    def give_one(self, batch: dict[str, Any]) -> Part:
        """Gives the first image of a batch, which is not part of the optimizer step."""
        share = 1 / find_batch_size(batch)
        self.part = Part({name: values[:1] for name, values in batch.items()}, share, is_new=False, is_last=False)
        return self.part

    def split(self, error: Exception, step: int, again: bool = True) -> str:
        """
        Halves the parts of later batches, and of those of this step if `again`, which are given again. Returns a
        sentence on it, for the log.

        Args:
            error (`Exception`): That of the batch that did not fit in memory.
            step (`int`): Number of the optimizer step.

        Raises:
            CommandError: If they cannot be halved.
        """
        batch_size = find_batch_size(self._batches[-1][1])
        size = math.ceil(batch_size / (2 * self.parts))
        parts = math.ceil(batch_size / size)
        instead = f"`--train_batch_size {size} --gradient_accumulation_steps {parts * self.accumulation}`"
        message = (str(error).splitlines() or [type(error).__name__])[0]  # Python's own `MemoryError` has none
        reason = f"A batch of {batch_size} images does not fit in memory at step {step} ({message})"
        if self.num_processes > 1:
            raise CommandError(f"{reason}. Pass, for example, {instead}.", exit_code=1) from error
        if not self.can_split:
            raise CommandError(
                f"{reason}. Its loss compares the images of a batch, which therefore cannot be split. Pass a smaller "
                "`--train_batch_size`, or `--gradient_checkpointing` or `--mixed_precision bf16`.",
                exit_code=1,
            ) from error
        if self.parts >= batch_size:
            raise CommandError(
                f"{reason}, not even in parts of one image. Use smaller images, a smaller network, "
                "`--gradient_checkpointing` or `--mixed_precision bf16`.",
                exit_code=1,
            ) from error
        self.parts *= 2
        self._again = again
        return (
            f"{reason}. From now on each batch is split into {parts} parts of at most {size} images, whose gradients "
            f"are accumulated: the optimizer steps have the same images. Without the attempts: {instead}."
        )

    def _split(self, todo: list[tuple[int, dict[str, Any]]], is_new: bool) -> Iterator[Part]:
        for micro_step, batch in todo:
            is_last_batch = batch is todo[-1][1]
            if self.parts == 1:
                # A copy, since scripts replace tensors in it.
                yield Part(dict(batch), 1.0, micro_step, is_new, is_last_batch)
                continue
            total = find_batch_size(batch)
            size = math.ceil(total / self.parts)
            for start in range(0, total, size):
                stop = min(start + size, total)
                yield Part(
                    {name: values[start:stop] for name, values in batch.items()},
                    (stop - start) / total,
                    micro_step if start == 0 else None,
                    is_new and start == 0,
                    is_last_batch and stop == total,
                )


def release_graphs() -> None:
    """
    Releases what a failed backward pass keeps for its continuation. The variables of the loop refer to it, and only
    give it up when they are replaced, in the middle of the next forward pass.
    """
    for value in gc.get_objects():
        if type(value) is torch.Tensor and value.grad_fn is not None:
            with contextlib.suppress(RuntimeError):  # views cannot be detached in place
                value.detach_()
