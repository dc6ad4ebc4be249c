"""The end of a step: losses go to the timestep sampler and the metrics; learning rate, average and log are updated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from .arguments import TrainingArguments
from .checkpoints import TrainingProgress
from .classification import ClassificationMetrics
from .log import ADVICE, TrainingLog
from .losses import Objective, TrainingLosses
from .metrics import LossMetrics
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
    Passes the unweighted losses of a batch to sampler and metrics: with weights, the sampler would learn from its own.
    Collective, for samplers that learn.

    Args:
        terms (`TrainingLosses`): From `training_losses` with this `objective`.
        timesteps, weights (`torch.Tensor` of shape `(batch_size,)`): From the sampler.
    """
    timestep_sampler.update(timesteps, terms.loss.detach())
    vb = terms.vb.detach() if objective != "simple" else None
    metrics.update(timesteps, terms.loss.detach(), terms.mse.detach(), vb, weights)


@dataclass
class Due:
    """
    What is due after an optimizer step, in this order.

    Attributes:
        checkpoint (`bool`): Every `checkpointing_steps`, and after the last step.
        validation (`bool`): Every `validation_steps`, but not after the last step, when the result is saved first.
    """

    checkpoint: bool
    validation: bool


@dataclass
class AfterStep:
    """
    Updates learning rate, average and counters after an optimizer step, and writes a row of the log where one is due.
    Collective.

    Args:
        accelerator (`Accelerator`): The accelerator of the run.
        training_args (`TrainingArguments`): How often rows, checkpoints and validations are due.
        max_train_steps (`int`): Optimizer steps of the whole run.
        progress (`TrainingProgress`): The counters.
        lr_scheduler (`LRScheduler`): From `build_lr_scheduler`.
        ema (`EMAModel`, *optional*): The average of `parameters`.
        parameters (sequence of `torch.nn.Parameter`): The trained weights.
        metrics (`LossMetrics` or `ClassificationMetrics`): Source of the rows.
        log (`TrainingLog`): Destination of the rows.
    """

    accelerator: Accelerator
    training_args: TrainingArguments
    max_train_steps: int
    progress: TrainingProgress
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    parameters: Sequence[torch.nn.Parameter]
    metrics: LossMetrics | ClassificationMetrics
    log: TrainingLog

    def __call__(self) -> Due:
        """
        Call it after each optimizer step. Returns what is due now. Raises a `RuntimeError` if the loss of a row, or a
        weight that would be saved in a checkpoint, is not finite.
        """
        if not self.accelerator.optimizer_step_was_skipped:  # by the gradient scaler of fp16
            self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.progress.global_step += 1
        self.log.advance()
        step, arguments = self.progress.global_step, self.training_args
        is_last = step == self.max_train_steps
        due = Due(
            checkpoint=is_last or step % arguments.checkpointing_steps == 0,
            validation=not is_last and bool(arguments.validation_steps) and step % arguments.validation_steps == 0,
        )
        # A checkpoint ends a row, too: it does not hold the sums of an unfinished one.
        if step % arguments.logging_steps == 0 or due.checkpoint:
            values = self.metrics.compute(self.accelerator)  # the one place that waits for the device
            self.metrics.reset()
            self.log.write(step, values, float(self.lr_scheduler.get_last_lr()[0]))
        if due.checkpoint:
            self._check_weights()
        return due

    def _check_weights(self) -> None:
        """Raises a `RuntimeError` for weights that are not finite: their checkpoint could replace a sound one."""
        for name, tensors in (("weights", self.parameters), ("averaged weights", self.ema and self.ema.shadow_params)):
            finite = [torch.isfinite(tensor).all() for tensor in tensors or ()]
            if finite and not torch.stack(finite).all():  # waits for the device once
                raise RuntimeError(
                    f"The {name} are not finite at step {self.progress.global_step}, so no checkpoint of them is "
                    f"saved. {ADVICE}"
                )
