"""
Skips the optimizer steps whose loss or gradient is not finite, on all processes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from ..commands.errors import CommandError
from ..data.labels import list_names


MAX_SKIPPED_STEPS = 10  # in a row


@dataclass
class Batch:
    """What is known of a batch: whether its loss is finite, its timesteps, and the indices of its examples."""

    is_finite: torch.Tensor
    timesteps: torch.Tensor | None
    examples: torch.Tensor | None


class StepGuard:
    """
    Decides before each optimizer step whether it is taken: loss and gradient must be finite on every process. A single
    NaN in the weights cannot be undone, and would reach the other processes.

    The decision waits for the device once in each optimizer step; on a CPU there is nothing to wait for. Several
    processes agree by one sum of a few numbers, with which other wishes of a process can travel.

    Under the gradient scaler of fp16, gradients overflow now and then: it skips these steps itself and lowers its
    scale, which is no fault. A loss that is not finite is one.

    DeepSpeed takes the step within its backward pass, so that none can be skipped: there, no step is faulty.

    Args:
        accelerator (`Accelerator`): Joins the processes.
        name_of (function of an index): Names an example of the data.
        max_skipped (`int`, *optional*): Number of skipped steps in a row that end the run. None: 10.
    """

    def __init__(self, accelerator: Accelerator, name_of: Callable[[int], str], max_skipped: int | None = None):
        self.accelerator, self.name_of = accelerator, name_of
        self.max_skipped = MAX_SKIPPED_STEPS if max_skipped is None else max_skipped
        self.in_a_row = 0
        self.begin()

    def begin(self) -> None:
        """Begins an optimizer step."""
        self.batches: list[Batch] = []
        self.is_faulty = False

    def record(self, loss: torch.Tensor, timesteps: torch.Tensor | None, batch: Mapping[str, Any]) -> None:
        """Remembers a batch of the step, without waiting for the device."""
        self.batches.append(Batch(loss.detach().isfinite().all(), timesteps, batch.get("index")))

    def agree(self, norm: torch.Tensor | None, wishes: Sequence[bool] = ()) -> list[bool]:
        """
        Decides on the step, for `is_faulty`. Collective.

        Args:
            norm (`torch.Tensor`, *optional*): The norm of the gradient; None: it may overflow.
            wishes (sequence of `bool`): Further questions.

        Returns:
            list of `bool`: Which of `wishes` some process has.
        """
        sound = [batch.is_finite for batch in self.batches]
        if isinstance(norm, torch.Tensor):
            # With FSDP2, each process has its own part of the sum.
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            sound.append(norm.detach().isfinite().all())
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            sound = []
        device = self.accelerator.device
        fault = torch.zeros((), device=device)
        if sound:
            fault = 1 - torch.stack([each.to(device) for each in sound]).all().float()
        votes = torch.cat([fault[None], torch.tensor([float(wish) for wish in wishes], device=device)])
        counts = self.accelerator.reduce(votes, reduction="sum").tolist()  # the one place that waits for the device
        self.is_faulty = self.is_faulty or counts[0] > 0
        return [count > 0 for count in counts[1:]]

    def report(self, step: int) -> str:
        """Describes the faulty step: its number, and timesteps and examples of the batches in question. Collective."""
        mine = [(bool(batch.is_finite), self._describe(batch)) for batch in self.batches]
        batches = gather_object(mine) if self.accelerator.num_processes > 1 else mine
        faulty = [text for is_finite, text in batches if not is_finite]
        # The gradient of all batches is that of their sum.
        texts = [text for text in (faulty or [text for _, text in batches]) if text]
        what = "loss" if faulty else "gradient"
        return f"The {what} of step {step} is not finite" + "".join(f"; {text}" for text in texts)

    def count(self, step: int, report: str | None, checkpoint: str | None) -> None:
        """
        Counts a step, faulty if there is a `report`. Raises a `CommandError` after too many in a row.

        Args:
            checkpoint (`str`, *optional*): The last checkpoint.
        """
        self.in_a_row = self.in_a_row + 1 if report is not None else 0
        if self.in_a_row >= self.max_skipped:
            last = f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
            raise CommandError(
                f"{report}. {self.in_a_row} steps in a row were skipped, so the run ends (`--max_skipped_steps`). "
                f"{last} Look at these examples, or resume with a lower `--learning_rate`, or with `--mixed_precision "
                "bf16` or `no` instead of fp16.",
                exit_code=1,
            )

    def _describe(self, batch: Batch) -> str:
        parts = []
        if batch.timesteps is not None:
            parts.append(f"timesteps {list_names(batch.timesteps.tolist(), quote=str)}")
        if batch.examples is not None:
            names = [self.name_of(index) for index in batch.examples.tolist()]
            parts.append(f"examples {list_names(names, quote=str)}")
        return ", ".join(parts)
