"""
Setup, checkpoints, log, validation and final save of a training run. The loop and the loss are in the script.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image

from ..data.images import ImageDataset
from ..data.samplers import BalancedClassSampler, EpochShuffleSampler
from ..data.seeding import seed_step
from ..deprecations import renamed
from .arguments import DataArguments, TrainingArguments
from .checkpoints import TrainingProgress, rest_of_epoch, resume_checkpoint, save_checkpoint
from .ema import evaluation_weights, result_weights
from .frozen import FrozenNetworks
from .log import ADVICE, TrainingLog
from .metrics import ClassificationMetrics, LossMetrics, MeanMetrics
from .plots import plot_loss_curves
from .power_ema import PowerEMA, continue_snapshots
from .resume import RunRecord, apply_arguments, apply_optimizer_arguments
from .setup import prepare_output_dir, write_settings
from .timestep_samplers import TimestepSampler
from .validation import check_last_validation, save_samples, survives


GLOO_RELEASE_SECONDS = 0.5


# 1. Data loader, optimizer, learning rate, average


def build_dataloader(
    train_dataset: ImageDataset, data_args: DataArguments, training_args: TrainingArguments
) -> torch.utils.data.DataLoader:
    """
    Batches in an order that depends only on the seed and the epoch of `train_dataset`; with `class_balanced`, the
    classes equally often (unlabelled images count as one more). Incomplete batches are dropped.
    """
    if data_args.class_balanced:
        sampler = BalancedClassSampler(train_dataset, train_dataset.dataset["label"][:])
    else:
        sampler = EpochShuffleSampler(train_dataset)
    return torch.utils.data.DataLoader(
        train_dataset,
        batch_size=training_args.train_batch_size,
        sampler=sampler,
        num_workers=data_args.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


def build_optimizer(parameters: Iterable[torch.nn.Parameter], training_args: TrainingArguments) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=training_args.learning_rate,
        betas=(training_args.adam_beta1, training_args.adam_beta2),
        weight_decay=training_args.adam_weight_decay,
        eps=training_args.adam_epsilon,
    )


def build_lr_scheduler(
    optimizer: Any, training_args: TrainingArguments, max_train_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """
    The learning rate schedule for a prepared optimizer, to be stepped once per optimizer step. Do not prepare it:
    Accelerate would step it once per process.
    """
    return get_scheduler(
        training_args.lr_scheduler,
        optimizer=optimizer.optimizer,
        num_warmup_steps=training_args.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )


def build_ema(parameters: Iterable[torch.nn.Parameter], training_args: TrainingArguments) -> EMAModel | None:
    """The moving average of these weights (of models not wrapped for distribution); None without `use_ema`."""
    if not training_args.use_ema:
        return None
    return EMAModel(
        parameters,
        decay=training_args.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=training_args.ema_inv_gamma,
        power=training_args.ema_power,
        foreach=True,
    )


# 2. The run


@dataclass
class Due:
    """What is due after an optimizer step, in this order."""

    checkpoint: bool  # every `checkpointing_steps`, and after the last step
    validation: bool  # every `validation_steps`, but not after the last step, when the result is saved first


class TrainingRun:
    """
    A training run around the loop of its script: prepares networks, optimizer and data, loads the checkpoint that is
    resumed, and keeps log, checkpoints and result. Every process makes all calls.

        for batch in run.batches():
            with run.accumulate():
                ...  # loss, backward, clip, optimizer step
            if accelerator.sync_gradients:
                due = run.after_step()
                if due.checkpoint:
                    run.save_checkpoint(save_result)
                if due.validation:
                    run.validate(...)
        run.finish(save_result, ...)

    Args:
        accelerator (`Accelerator`), record (`RunRecord`): From `start_run` and `parse_run`.
        networks (mapping of `torch.nn.Module`): The networks to train, by the subfolder of the result that holds them
            (`""` for its root). Weights that do not require gradients stay as they are.
        metrics (`LossMetrics`, `ClassificationMetrics` or `MeanMetrics`): Source of the rows of the log.
        timestep_sampler (`TimestepSampler`, *optional*): Kept in checkpoints.
        frozen (`FrozenNetworks`, *optional*): Networks that are used but not trained: their hashes are kept in
            checkpoints and verified before the result is saved.
        opponent (`torch.nn.Module`, *optional*): A network that is trained against the others, by an optimizer of its
            own with the same settings and the same learning rate in every step, such as a discriminator. It is kept in
            checkpoints, but has no average and is no part of the result.
        description (`str`): The data in words, for the log.

    Attributes:
        networks (`dict[str, torch.nn.Module]`): The networks as prepared by Accelerate, for the loop.
        trained (`torch.nn.ModuleList`): The same networks, not prepared.
        parameters (list of `torch.nn.Parameter`): The trained weights.
        optimizer (`AcceleratedOptimizer`), dataloader (`torch.utils.data.DataLoader`): As prepared by Accelerate.
        opponent (`torch.nn.Module`, *optional*), opponent_optimizer (`AcceleratedOptimizer`, *optional*): As prepared
            by Accelerate.
        ema (`EMAModel`, *optional*): The average of `parameters`.
        power_ema (`PowerEMA`, *optional*): Power-function averages of `parameters`, of which only snapshots are kept.
        progress (`TrainingProgress`), log (`TrainingLog`): Counters and log.
        max_train_steps (`int`): Number of optimizer steps of the whole run, those of a resumed checkpoint included.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        record: RunRecord,
        data_args: DataArguments,
        training_args: TrainingArguments,
        networks: Mapping[str, torch.nn.Module],
        train_dataset: ImageDataset,
        metrics: LossMetrics | ClassificationMetrics | MeanMetrics,
        timestep_sampler: TimestepSampler | None = None,
        frozen: FrozenNetworks | None = None,
        opponent: torch.nn.Module | None = None,
        description: str = "",
    ):
        self.accelerator, self.record, self.training_args, self.frozen = accelerator, record, training_args, frozen
        self.metrics, self.logger = metrics, get_logger(record.script)
        self.trained = torch.nn.ModuleList(networks.values())
        self.parameters = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        dataloader = build_dataloader(train_dataset, data_args, training_args)
        # With some backends (FSDP2) Accelerate takes only one network together with an optimizer, so the others are
        # prepared separately. The optimizer already has their parameters.
        first, *others = networks
        prepared, self.optimizer, self.dataloader = accelerator.prepare(
            networks[first], build_optimizer(self.parameters, training_args), dataloader
        )
        self.networks = {first: prepared} | {name: accelerator.prepare(networks[name]) for name in others}
        self.opponent, self.opponent_optimizer = opponent, None
        if opponent is not None:
            self.opponent, self.opponent_optimizer = accelerator.prepare(
                opponent, build_optimizer(opponent.parameters(), training_args)
            )
        steps_per_epoch = math.ceil(len(self.dataloader) / training_args.gradient_accumulation_steps)
        self.max_train_steps = training_args.max_train_steps or training_args.num_train_epochs * steps_per_epoch
        self.lr_scheduler = build_lr_scheduler(self.optimizer, training_args, self.max_train_steps)
        self.ema, self.progress = build_ema(self.parameters, training_args), TrainingProgress()
        self.power_ema = PowerEMA(networks, training_args.power_ema_stds) if training_args.power_ema_stds else None
        # Their order is that of the files in a checkpoint.
        states = (self.lr_scheduler, timestep_sampler, self.progress, frozen)
        accelerator.register_for_checkpointing(*(state for state in states if state is not None))

        prepare_output_dir(accelerator, training_args)
        self._resume(networks, timestep_sampler)
        self._equal_rates()
        if self.ema is not None:
            self.ema.to(accelerator.device)
        step = self.progress.global_step
        total_batch_size = (
            training_args.train_batch_size * accelerator.num_processes * training_args.gradient_accumulation_steps
        )
        self.logger.info(
            f"{self._count_parameters()}, {description}, {total_batch_size} per optimizer step; steps {step} to "
            f"{self.max_train_steps}, {steps_per_epoch} an epoch"
        )
        self.log = TrainingLog(
            accelerator, training_args.output_dir, record.settings, step, self.max_train_steps, total_batch_size
        )
        self.trained.train()

    def _resume(self, networks: Mapping[str, torch.nn.Module], timestep_sampler: TimestepSampler | None) -> None:
        """Loads the checkpoint, if there is one, applies changed arguments, and writes the arguments of the run."""
        record, training_args = self.record, self.training_args
        record.check_steps(self.max_train_steps)
        # A sampler whose kind or number of timesteps was changed by force starts anew.
        is_other_sampler = record.forced_arguments & {"timestep_sampler", "ddpm_num_steps"}
        path = resume_checkpoint(
            self.accelerator,
            training_args.output_dir,
            training_args.resume_from_checkpoint,
            self.ema,
            functools.partial(record.load_average, self.ema, self.parameters, networks),
            not_restored=[timestep_sampler] if is_other_sampler else [],
        )
        if self.power_ema is not None:
            if path is not None:
                self.power_ema.load(path)
            if self.accelerator.is_main_process:
                continue_snapshots(training_args.output_dir, path, self.progress.global_step)
        if path is not None:
            apply_arguments(training_args, self.optimizer, self.lr_scheduler, self.ema)
            if self.opponent_optimizer is not None:
                apply_optimizer_arguments(training_args, self.opponent_optimizer)
            record.checkpoint.step = self.progress.global_step
            record.check_steps(self.max_train_steps)
            if self.progress.global_step == self.max_train_steps:
                self.logger.info(f"{record.checkpoint.name} is that of the last step: only the result is saved.")
        if self.accelerator.is_main_process:
            write_settings(training_args.output_dir, record.settings)

    def _equal_rates(self) -> None:
        """Gives the opponent's optimizer the learning rate of the other one."""
        if self.opponent_optimizer is not None:
            for group in self.opponent_optimizer.param_groups:
                group["lr"] = self.lr_scheduler.get_last_lr()[0]

    def _count_parameters(self) -> str:
        num_trained = sum(parameter.numel() for parameter in self.parameters)
        networks = [*self.trained, *(self.frozen.networks.values() if self.frozen is not None else ())]
        num_frozen = sum(parameter.numel() for network in networks for parameter in network.parameters()) - num_trained
        return f"{num_trained / 1e6:.2f}M parameters" + (f", {num_frozen / 1e6:.2f}M frozen ones" if num_frozen else "")

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """
        Yields the remaining batches, across epochs. PyTorch's global generators are reseeded before each batch.
        """
        while self.progress.global_step < self.max_train_steps:
            for batch in rest_of_epoch(self.dataloader, self.progress):
                seed_step(self.training_args.seed, self.accelerator.process_index, self.progress.micro_step)
                self.progress.count_batch()
                yield batch
                if self.progress.global_step >= self.max_train_steps:
                    return

    def accumulate(self) -> AbstractContextManager[Any]:
        opponent = [] if self.opponent is None else [self.opponent]
        return self.accelerator.accumulate(*self.networks.values(), *opponent)

    def after_step(self) -> Due:
        """
        Updates learning rate, averages and counters after an optimizer step, and writes a row of the log where one is
        due, and snapshots of the power-function averages. Returns what is due now. Raises a `RuntimeError` if the loss
        of a row, or a weight that would be saved in a checkpoint or snapshot, is not finite.
        """
        if not self.accelerator.optimizer_step_was_skipped:  # by the gradient scaler of fp16
            self.lr_scheduler.step()
            self._equal_rates()
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.progress.global_step += 1
        if self.power_ema is not None:
            self.power_ema.step(self.parameters, self.progress.global_step)
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
        if due.checkpoint:  # a checkpoint of weights that are not finite could replace a sound one
            averages = self.ema.shadow_params if self.ema is not None else []
            powers = self.power_ema.averages if self.power_ema is not None else []
            opponent = list(self.opponent.parameters()) if self.opponent is not None else []
            for name, tensors in (
                ("weights", self.parameters),
                ("averaged weights", averages),
                *(("power-function averages", tensors) for tensors in powers),
                ("discriminator's weights", opponent),
            ):
                finite = [torch.isfinite(tensor).all() for tensor in tensors]
                if finite and not torch.stack(finite).all():  # waits for the device once
                    raise RuntimeError(
                        f"The {name} are not finite at step {step}, so no checkpoint of them is saved. {ADVICE}"
                    )
        # The last snapshot is saved by `finish`, also if the run was resumed at its last step.
        if step % (arguments.power_ema_snapshot_steps or arguments.checkpointing_steps) == 0 and not is_last:
            self._save_snapshots()
        return due

    def _save_snapshots(self) -> None:
        if self.power_ema is not None and self.accelerator.is_main_process:
            self.power_ema.save_snapshots(self.training_args.output_dir, self.progress.global_step)

    def save_checkpoint(self, save_result: Callable[[str], None]) -> None:
        """
        Saves a checkpoint. `save_result` writes the result that the run would have if it ended here into a folder, on
        the main process and with the averaged weights in place. Collective.
        """
        save_checkpoint(
            self.accelerator,
            self.training_args.output_dir,
            self.progress.global_step,
            self.training_args.checkpoints_total_limit,
            functools.partial(self._save, save_result),
            self._save_record,
        )

    def _save_record(self, folder: str) -> None:
        if self.power_ema is not None:
            self.power_ema.save(folder)
        self.record.write(folder, self.progress.global_step, self.ema)

    def _save(self, save_result: Callable[[str], None], folder: str) -> None:
        with result_weights(self.ema, self.parameters):
            save_result(folder)

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """The networks in evaluation mode with the averaged weights, for the duration of a `with` block."""
        return evaluation_weights(self.trained, self.ema, self.parameters)

    def validate(self, work: Callable[[], None]) -> bool:
        """
        Calls `work()` on all processes and returns whether it succeeded. A failure is logged and does not end the run;
        see `validation.survives`.
        """
        succeeded = survives(self.accelerator, self.progress, work)
        self.log.start_clock(self.progress.global_step)
        return succeeded

    def show_samples(
        self, generate: Callable[[], Image.Image], panels: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        """
        Plots the loss and saves validation images, on the main process. `generate`, called in evaluation mode with the
        averaged weights, returns them. `panels` are those of `plot_loss_curves`, `None`: of a diffusion model.
        """
        if not self.accelerator.is_main_process:
            return
        output_dir = self.training_args.output_dir
        if self.log.history.rows():
            arguments = () if panels is None else (panels,)
            plot_loss_curves(self.log.history.rows(), os.path.join(output_dir, "loss_curves.png"), *arguments)
        with self.evaluation_weights():
            images = generate()
        save_samples(self.accelerator, images, output_dir, self.progress.global_step)

    def finish(
        self,
        save_result: Callable[[str], None],
        validate: Callable[[], bool],
        publish: Callable[[Accelerator, TrainingArguments], None],
        name: str,
    ) -> None:
        """
        Saves the result with the averaged weights first, because validation and publishing may fail. Raises a
        `CommandError` if the last validation has failed.

        Args:
            save_result (function of a folder): See `save_checkpoint`.
            validate (callable): The last validation; whether it succeeded. Every process calls it.
            publish (callable): Pushes the folder of the run to the Hub, if the arguments say so.
            name (`str`): What was trained, for the log.
        """
        self.log.close()
        output_dir = self.training_args.output_dir
        if self.frozen is not None:
            self.frozen.check()
            hashes = ", ".join(f"{name} {value}" for name, value in self.frozen.hashes.items())
            self.logger.info(f"The frozen networks are unchanged (hashes: {hashes})")
        self._save_snapshots()
        if self.accelerator.is_main_process:
            self._save(save_result, output_dir)
            self.logger.info(f"Saved the {name} to {output_dir}")
        validated = validate()
        if self.accelerator.num_processes > 1:
            # The thread of Gloo needs the interpreter to release the tensors of the last collective. Were the networks
            # freed before, their process group would wait for that thread with the interpreter held: a deadlock.
            time.sleep(GLOO_RELEASE_SECONDS)
        self.accelerator.end_training()
        publish(self.accelerator, self.training_args)
        check_last_validation(self.accelerator, output_dir, validated)


__getattr__ = renamed(__name__, {"AfterStep": "TrainingRun"})
