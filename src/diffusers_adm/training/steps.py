"""What the loops of the training scripts do alike: what a batch tells sampler and metrics, and what ends a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from .arguments import TrainingArguments
from .checkpoints import TrainingProgress
from .classification import ClassificationMetrics
from .losses import Objective, TrainingLosses
from .metrics import LossMetrics
from .setup import ADVICE, TrainingLog
from .timestep_samplers import TimestepSampler


def record_losses(
    terms: TrainingLosses,
    timesteps: torch.Tensor,
    weights: torch.Tensor,
    objective: Objective,
    timestep_sampler: TimestepSampler,
    metrics: LossMetrics,
) -> None:
    """
    Tells sampler and metrics the losses of a batch as they are: the sampler would learn from its own weights.
    Collective, for samplers that learn.

    Args:
        terms (`TrainingLosses`): Of `training_losses` with this `objective`.
        timesteps, weights (`torch.Tensor` of shape `(batch_size,)`): From the sampler.
    """
    timestep_sampler.update(timesteps, terms.loss.detach())
    vb = terms.vb.detach() if objective != "simple" else None
    metrics.update(timesteps, terms.loss.detach(), terms.mse.detach(), vb, weights)


@dataclass
class Due:
    """
    What is to be done after an optimizer step, in this order.

    Attributes:
        checkpoint (`bool`): At every `checkpointing_steps`, and at the end.
        end (`bool`): It was the last step.
        validation (`bool`): At every `validation_steps`.
    """

    checkpoint: bool
    end: bool
    validation: bool


class AfterStep:
    """
    What follows an optimizer step: learning rate, average, counters, and a row of the log where one is due. Collective.

    Where a checkpoint is due, the weights are looked at first: it would take the place of one that is sound.

    Args:
        accelerator (`Accelerator`): Of the run.
        training_args (`TrainingArguments`): How often rows, checkpoints and validations are due.
        max_train_steps (`int`): Optimizer steps of the whole run.
        progress (`TrainingProgress`): Where it stands.
        lr_scheduler (`LRScheduler`): From `build_lr_scheduler`.
        ema (`EMAModel`, *optional*): The average of `parameters`.
        parameters (sequence of `torch.nn.Parameter`): What is trained.
        metrics (`LossMetrics` or `ClassificationMetrics`): What rows hold.
        log (`TrainingLog`): Where they go.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        training_args: TrainingArguments,
        max_train_steps: int,
        progress: TrainingProgress,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        ema: EMAModel | None,
        parameters: Sequence[torch.nn.Parameter],
        metrics: LossMetrics | ClassificationMetrics,
        log: TrainingLog,
    ):
        self.accelerator = accelerator
        self.training_args = training_args
        self.max_train_steps = max_train_steps
        self.progress = progress
        self.lr_scheduler = lr_scheduler
        self.ema = ema
        self.parameters = parameters
        self.metrics = metrics
        self.log = log

    def __call__(self) -> Due:
        """
        To be called after each optimizer step. Returns what is due now.

        Raises:
            RuntimeError: If the loss of a row, or a weight that is to be saved, is not finite.
        """
        if not self.accelerator.optimizer_step_was_skipped:  # by the gradient scaler of fp16
            self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.progress.global_step += 1
        self.log.advance()
        due = self._due()
        # A checkpoint ends a row, too: it does not hold the sums of an unfinished one.
        if self.progress.global_step % self.training_args.logging_steps == 0 or due.checkpoint:
            values = self.metrics.compute(self.accelerator)  # the one place that waits for the device
            self.metrics.reset()
            self.log.write(self.progress.global_step, values, float(self.lr_scheduler.get_last_lr()[0]))
        if due.checkpoint:
            self._check_weights()
        return due

    def _check_weights(self) -> None:
        for name, tensors in (("weights", self.parameters), ("averaged weights", self.ema and self.ema.shadow_params)):
            finite = [torch.isfinite(tensor).all() for tensor in tensors or ()]
            if finite and not torch.stack(finite).all():  # waits for the device once
                raise RuntimeError(
                    f"The {name} are not finite at step {self.progress.global_step}, so no checkpoint of them is "
                    f"saved. {ADVICE}"
                )

    def _due(self) -> Due:
        step, arguments = self.progress.global_step, self.training_args
        end = step == self.max_train_steps
        return Due(
            checkpoint=end or step % arguments.checkpointing_steps == 0,
            end=end,
            validation=bool(arguments.validation_steps and step % arguments.validation_steps == 0),
        )
