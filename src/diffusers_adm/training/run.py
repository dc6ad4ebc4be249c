"""
Setup, checkpoints, log, validation and final save of a training run. The loop and the loss are in the script.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from PIL import Image

from ..commands.errors import STOPPED_EARLY_EXIT_CODE, CommandError
from ..data.embeddings import EmbeddingDataset
from ..data.images import ImageDataset
from ..data.seeding import seed_step
from ..data.streaming import StreamDataset
from ..deprecations import renamed
from .arguments import DataArguments, TrainingArguments
from .batch_split import BatchSplitter, is_out_of_memory, release_graphs
from .best import BestResult, check_keep_best
from .building import build_dataloader, build_ema, build_lr_scheduler, build_optimizer, prepare_stream
from .checkpoints import (
    TrainingProgress,
    find_latest_checkpoint,
    rest_of_epoch,
    resume_checkpoint,
    save_checkpoint,
)
from .compiled import compile_network, uncompiled
from .disk import explained_disk_errors
from .dry_run import end_dry_run
from .ema import evaluation_weights, result_weights
from .frozen import FrozenNetworks
from .interruption import Interruption
from .log import ADVICE, TrainingLog
from .metrics import ClassificationMetrics, LossMetrics, MeanMetrics
from .plots import plot_loss_curves
from .power_ema import PowerEMA, continue_snapshots
from .resume import RunRecord, apply_arguments, apply_optimizer_arguments
from .setup import prepare_output_dir, write_settings
from .sharding import (
    WholeNetworks,
    all_finite,
    check_networks,
    in_place,
    is_sharded,
    local_parameters,
    whole_norm,
    wrap_layers,
)
from .step_guard import StepGuard
from .timestep_samplers import TimestepSampler
from .validation import check_last_validation, save_samples, survives


GLOO_RELEASE_SECONDS = 0.5


@dataclass
class Due:
    """What is due after an optimizer step, in this order."""

    checkpoint: bool  # every `checkpointing_steps`, or at the next step that is not skipped; and after the last step
    validation: bool  # every `validation_steps`, but not after the last step, when the result is saved first


class TrainingRun:
    """
    A training run around the loop of its script: prepares networks, optimizer and data, loads the checkpoint that is
    resumed, and keeps log, checkpoints and result. Every process makes all calls.

        for batch in run.batches():
            with run.accumulate():
                ...  # loss
                run.backward(loss)
                run.step_optimizer()
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
        decays_vectors (`bool`, defaults to `True`): See `build_optimizer`.
        can_split (`bool`, defaults to `True`): Whether the loss of a batch is the mean of those of its parts, so that
            a batch that does not fit in memory can be split.
        measures (collection of `str`, *optional*): What the validations measure, as in the log (`validation_loss`), for
            `keep_best`.
        compiles (`bool`, defaults to `False`): Whether calls of the first network in the loop are compiled.

    Attributes:
        networks (`dict[str, torch.nn.Module]`): The networks as prepared by Accelerate, for the loop; the first of them
            compiled if `compiles`.
        trained (`torch.nn.ModuleList`): The same networks, not prepared.
        is_sharded (`bool`): Whether a process holds only a part of weights or optimizer state (FSDP2, ZeRO). Then
            saving is collective; only the main process writes.
        parameters (list of `torch.nn.Parameter`): The trained weights.
        optimizer (`AcceleratedOptimizer`), dataloader (`torch.utils.data.DataLoader`): As prepared by Accelerate.
        opponent (`torch.nn.Module`, *optional*), opponent_optimizer (`AcceleratedOptimizer`, *optional*): As prepared
            by Accelerate.
        ema (`EMAModel`, *optional*): The average of `parameters`.
        power_ema (`PowerEMA`, *optional*): Power-function averages of `parameters`, of which only snapshots are kept.
        progress (`TrainingProgress`), log (`TrainingLog`): Counters and log.
        max_train_steps (`int`): Number of optimizer steps of the whole run, those of a resumed checkpoint included.
        guard (`StepGuard`): Skips steps that are not finite.
        interruption (`Interruption`): Whether the run ends early, and why.
    """

    _owes_checkpoint = False  # which was due in a step that was skipped

    def __init__(
        self,
        accelerator: Accelerator,
        record: RunRecord,
        data_args: DataArguments,
        training_args: TrainingArguments,
        networks: Mapping[str, torch.nn.Module],
        train_dataset: ImageDataset | EmbeddingDataset | StreamDataset,
        metrics: LossMetrics | ClassificationMetrics | MeanMetrics,
        timestep_sampler: TimestepSampler | None = None,
        frozen: FrozenNetworks | None = None,
        opponent: torch.nn.Module | None = None,
        description: str = "",
        decays_vectors: bool = True,
        can_split: bool = True,
        measures: Collection[str] = (),
        compiles: bool = False,
    ):
        if training_args.keep_best is not None:
            check_keep_best(training_args.keep_best, measures)
        self.accelerator, self.record, self.training_args, self.frozen = accelerator, record, training_args, frozen
        self.metrics, self._timestep_sampler, self.logger = metrics, timestep_sampler, get_logger(record.script)
        self.skips = getattr(train_dataset, "skips", None)
        self.is_sharded = is_sharded(accelerator)
        check_networks(accelerator, networks, opponent)
        self.trained = torch.nn.ModuleList(networks.values())
        self._whole = WholeNetworks(accelerator, networks.values())
        dataloader = build_dataloader(train_dataset, data_args, training_args)
        # With some backends (FSDP2) Accelerate takes only one network together with an optimizer, so the others are
        # prepared separately. The optimizer already has their parameters.
        first, *others = networks
        wrap_layers(accelerator, networks[first])
        first_network = networks[first]
        # The fused kernel goes through memory as it lies. Moments are loaded contiguous, weights may be channels-last.
        fused = accelerator.device.type == "cpu" and not self.is_sharded
        fused = fused and all(parameter.is_contiguous() for parameter in self._trained_parameters())
        optimizer = build_optimizer(self._trained_parameters(), training_args, decays_vectors, fused)
        if isinstance(train_dataset, StreamDataset):
            prepared, self.optimizer = accelerator.prepare(first_network, optimizer)
            self.dataloader = prepare_stream(accelerator, dataloader)
        else:
            prepared, self.optimizer, self.dataloader = accelerator.prepare(first_network, optimizer, dataloader)
        self.parameters = self._trained_parameters()  # FSDP2 has put others in their place
        self._prepared = {first: prepared} | {name: accelerator.prepare(networks[name]) for name in others}
        # The others, text encoders and projections, take little of the time.
        self.networks = self._prepared | ({first: compile_network(prepared)} if compiles else {})
        self.opponent, self.opponent_optimizer = opponent, None
        if opponent is not None:
            self.opponent, self.opponent_optimizer = accelerator.prepare(
                opponent, build_optimizer(opponent.parameters(), training_args, fused=fused)
            )
        steps_per_epoch = math.ceil(len(self.dataloader) / training_args.gradient_accumulation_steps)
        self.max_train_steps = training_args.max_train_steps or training_args.num_train_epochs * steps_per_epoch
        self.lr_scheduler = build_lr_scheduler(self.optimizer, training_args, self.max_train_steps)
        self.ema, self.progress = build_ema(self.parameters, training_args), TrainingProgress()
        self.power_ema = PowerEMA(networks, training_args.power_ema_stds) if training_args.power_ema_stds else None
        # Their order is that of the files in a checkpoint.
        states = (self.lr_scheduler, timestep_sampler, self.progress, frozen)
        accelerator.register_for_checkpointing(*(state for state in states if state is not None))

        self.guard = StepGuard(accelerator, train_dataset.name_of, training_args.max_skipped_steps)
        self.interruption = Interruption(training_args.max_time, record.started, training_args.dry_run)
        self.splitter = BatchSplitter(can_split, training_args.gradient_accumulation_steps, accelerator.num_processes)
        self.step_was_taken, self._has_failed_validation = True, False

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
        # Compiled code does not say what it computes.
        self._counts_ahead = compiles and can_split and not self.log.flop_meter.is_off
        self.best = None
        if training_args.keep_best is not None and accelerator.is_main_process:
            is_other_run = bool(record.forced_arguments)
            self.best = BestResult(training_args.output_dir, training_args.keep_best, step, is_other_run)
        self.trained.train()

    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.trained.parameters() if parameter.requires_grad]

    @property
    def _opponents(self) -> list[torch.nn.Module]:
        return [] if self.opponent is None else [self.opponent]

    def _opponent_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for network in self._opponents for parameter in network.parameters()]

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
            self.progress.batch_in_epoch = record.resumed_position(self.progress.batch_in_epoch)
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
        Yields the remaining batches, across epochs, until the last step or until the run is interrupted. PyTorch's
        global generators are reseeded before each batch. A batch that did not fit in memory comes again, in parts.
        With a compiled network, one image comes before, see `_count_uncompiled`.
        """
        self.interruption.install()
        ends = self.progress.global_step >= self.max_train_steps
        try:
            is_new_step = True
            while not ends:
                for batch in rest_of_epoch(self.dataloader, self.progress):
                    if is_new_step:
                        self.splitter.begin()
                        self._begin_step()
                    if self._counts_ahead:
                        yield self.splitter.give_one(batch).batch
                        self._counts_ahead = False
                    micro_step = self.progress.micro_step
                    self.progress.count_batch()
                    for part in self.splitter.give(micro_step, batch):
                        if part.micro_step is not None:
                            seed_step(self.training_args.seed, self.accelerator.process_index, part.micro_step)
                        yield part.batch
                    is_new_step = self.accelerator.sync_gradients
                    ends = self.progress.global_step >= self.max_train_steps or bool(self.interruption.reason)
                    if ends:
                        break
        finally:
            if not ends:  # `finish` will not be called
                self.interruption.uninstall()

    def _begin_step(self) -> None:
        self.guard.begin()
        self.metrics.mark()
        self.step_was_taken = False

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """
        Trains on a batch in a `with` block. If the batch does not fit in memory, the block ends without an error, and
        `batches` gives all batches of the optimizer step again, in parts.
        """
        if self._counts_ahead:
            with self._count_uncompiled():
                yield
            return
        part, accumulated = self.splitter.part, nullcontext()
        if part.is_new:  # Accelerate counts the others with the first one
            accumulated = self.accelerator.accumulate(*self._prepared.values(), *self._opponents)
        with accumulated:
            if part.is_new:
                self._is_last_batch = self.accelerator.sync_gradients
            self.accelerator.sync_gradients = self._is_last_batch and part.is_last
            try:
                with self.log.flop_meter.count(part.share):  # in the first batch only
                    yield
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._split_batches(error)

    @contextmanager
    def _count_uncompiled(self) -> Iterator[None]:
        """
        Counts the operations of one image in a `with` block, in which the networks run uncompiled. Its gradient and
        what it adds to metrics and sampler are dropped. One image and not the batch, which may only fit in memory if it
        is compiled.
        """
        sampler = self._timestep_sampler
        state = None if sampler is None else sampler.state_dict()
        # No optimizer step follows, and processes do not wait for each other's gradients.
        self.accelerator.sync_gradients = False
        with ExitStack() as stack:
            for network in self._prepared.values():
                stack.enter_context(self.accelerator.no_sync(network))
            stack.enter_context(uncompiled())
            stack.enter_context(self.log.flop_meter.count(self.splitter.part.share))
            try:
                yield
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                release_graphs()  # compiled, it may fit; otherwise, the batch says what to do
                self.log.flop_meter.give_up()
        for parameter in self.parameters:
            parameter.grad = None
        if state is not None:
            sampler.load_state_dict(state)
        self.metrics.revert()
        self._begin_step()

    def _split_batches(self, error: Exception) -> None:
        """Splits the batches of this and later optimizer steps, after an error for lack of memory."""
        step = self.progress.global_step + 1
        self.logger.warning(self.splitter.split(error, step, again=not self.step_was_taken))
        for parameter in (*self.parameters, *self._opponent_parameters()):
            parameter.grad = None
        release_graphs()
        if self.step_was_taken:  # the opponent's memory did not suffice: its step is left out this time
            self.logger.warning(f"The step {step} of the discriminator is left out.")
            return
        self.metrics.revert()
        self._begin_step()
        self.accelerator.sync_gradients = False

    def backward(self, loss: torch.Tensor, timesteps: torch.Tensor | None = None) -> None:
        """
        Adds the gradient of `loss`, the mean over a batch, to that of the optimizer step. The `timesteps` are for
        messages.
        """
        self.guard.record(loss, timesteps, self.splitter.part.batch)
        share = self.splitter.part.share
        self.accelerator.backward(loss if share == 1 else loss * share)

    def step_optimizer(self) -> None:
        """
        Clips the gradients, takes the optimizer step unless it is not finite on some process (see `StepGuard`), and
        clears them; nothing before the last batch of a step.
        """
        if self.accelerator.sync_gradients:
            self.step_was_taken = self._step(self.optimizer, self.parameters)

    def step_opponent(self) -> None:
        """The same for the opponent, whose step is also skipped if that of the networks was."""
        if self.accelerator.sync_gradients:
            self._step(self.opponent_optimizer, self._opponent_parameters())

    def _step(self, optimizer: Any, parameters: Iterable[torch.nn.Parameter]) -> bool:
        """Returns whether the step was taken. Collective; waits for the device."""
        has_scaler, norm = self.accelerator.scaler is not None, None
        if not has_scaler:
            norm = whole_norm(self.accelerator.clip_grad_norm_(parameters, self.training_args.max_grad_norm))
        self.interruption.decide(self.guard.agree(norm, self.interruption.wishes))
        is_sound = not self.guard.is_faulty
        if is_sound:
            if has_scaler:
                self.accelerator.clip_grad_norm_(parameters, self.training_args.max_grad_norm)
            try:
                optimizer.step()
            except RuntimeError as error:
                if is_out_of_memory(error):  # some weights may have been updated
                    raise CommandError(
                        f"The state of the optimizer does not fit in memory ({error}). Use a smaller network, or "
                        "several devices.",
                        exit_code=1,
                    ) from error
                raise
        optimizer.zero_grad()
        return is_sound

    def after_step(self) -> Due:
        """
        Updates learning rate, averages and counters after an optimizer step, and writes a row of the log where one is
        due, and snapshots of the power-function averages. Returns what is due now. Raises a `RuntimeError` if the loss
        of a row, or a weight that would be saved in a checkpoint or snapshot, is not finite.
        """
        if self.step_was_taken:
            if not self.accelerator.optimizer_step_was_skipped:  # by the gradient scaler of fp16
                self.lr_scheduler.step()
                self._equal_rates()
            if self.ema is not None:
                self.ema.step(local_parameters(self.parameters))
        self.progress.global_step += 1
        if self.power_ema is not None:
            # Also after a skipped step: its profile, which a reconstruction relies on, has a weight for each step.
            self.power_ema.step(self.parameters, self.progress.global_step)
        self._count_skipped()
        self.interruption.count_step()
        self.log.advance()
        step, arguments = self.progress.global_step, self.training_args
        is_last, ends_early = step == self.max_train_steps, self.interruption.reason is not None
        validates = bool(arguments.validation_steps) and step % arguments.validation_steps == 0
        self._owes_checkpoint = self._owes_checkpoint or step % arguments.checkpointing_steps == 0
        # Weights that have diverged may be finite, and all their losses NaN: a checkpoint waits for a finite one.
        due = Due(
            checkpoint=is_last or ends_early or (self._owes_checkpoint and not self.guard.is_faulty),
            validation=arguments.dry_run or (validates and not is_last and not ends_early),
        )
        self._owes_checkpoint = self._owes_checkpoint and not due.checkpoint
        # A checkpoint ends a row, too: it does not hold the sums of an unfinished one.
        if step % arguments.logging_steps == 0 or due.checkpoint:
            values = self.metrics.compute(self.accelerator)  # the one place that waits for the device
            self.metrics.reset()
            if self.progress.skipped_steps:
                values["skipped_steps"] = self.progress.skipped_steps
            if "loss" in values:  # not if all steps of the row were skipped
                self.log.write(step, values, float(self.lr_scheduler.get_last_lr()[0]))
        if due.checkpoint:
            self._check_finite()
        # The last snapshot is saved by `finish`, also if the run was resumed at its last step.
        if step % (arguments.power_ema_snapshot_steps or arguments.checkpointing_steps) == 0 and not is_last:
            self._save_snapshots()
        return due

    def _check_finite(self) -> None:
        """Raises a `RuntimeError` for weights that are not finite: their checkpoint could replace a sound one."""
        averages = self.ema.shadow_params if self.ema is not None else []
        powers = self.power_ema.averages if self.power_ema is not None else []
        for name, tensors in (
            ("weights", self.parameters),
            ("averaged weights", averages),
            *(("power-function averages", tensors) for tensors in powers),
            ("discriminator's weights", self._opponent_parameters()),
        ):
            if not all_finite(self.accelerator, tensors):  # waits for the device once
                step = self.progress.global_step
                raise RuntimeError(
                    f"The {name} are not finite at step {step}, so no checkpoint of them is saved. {ADVICE}"
                )

    def _count_skipped(self) -> None:
        """Counts and reports a step that was skipped. Raises a `CommandError` after too many in a row. Collective."""
        step, report = self.progress.global_step, None
        if self.guard.is_faulty:
            self.progress.skipped_steps += 1
            self.metrics.revert()
            report = self.guard.report(step)
            self.logger.warning(f"{report}. The step is skipped.")
        last = find_latest_checkpoint(self.training_args.output_dir) if report is not None else None
        self.guard.count(step, report, last)

    def _save_snapshots(self) -> None:
        is_main = self.accelerator.is_main_process
        if self.power_ema is not None and (self.is_sharded or is_main):
            output_dir, step = self.training_args.output_dir, self.progress.global_step
            what, kept = f"The snapshots of the averages of step {step} could not be written", self._newest_checkpoint()
            with explained_disk_errors(output_dir, what, kept):
                self.power_ema.save_snapshots(output_dir, step, writes=is_main)

    def _newest_checkpoint(self) -> str:
        """A sentence on what a run that fails now can go on from."""
        latest = find_latest_checkpoint(self.training_args.output_dir)
        return "There is no checkpoint." if latest is None else f"{os.path.basename(latest)} is the newest checkpoint."

    def save_checkpoint(self, save_result: Callable[[str], None]) -> None:
        """
        Saves a checkpoint. `save_result` writes the result that the run would have if it ended here into a folder, on
        the main process and with the averaged weights in place. Collective.
        """
        # A run may have to end in a step that is skipped: then earlier checkpoints may be the last sound ones.
        total_limit = None if self.guard.is_faulty else self.training_args.checkpoints_total_limit
        with self.interruption.measuring("checkpoint"):
            save_checkpoint(
                self.accelerator,
                self.training_args.output_dir,
                self.progress.global_step,
                total_limit,
                functools.partial(self._save, save_result),
                self._save_record,
            )

    def _save_record(self, folder: str) -> None:
        if self.power_ema is not None:
            self.power_ema.save(folder, writes=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            self.record.write(folder, self.progress.global_step, self.ema)

    def _save(self, save_result: Callable[[str], None], folder: str) -> None:
        with self._averaged_weights(everywhere=False):
            if self.accelerator.is_main_process:
                save_result(folder)

    def _averaged_weights(self, everywhere: bool) -> AbstractContextManager[None]:
        """The averaged weights for the duration of a `with` block, and whole; see `WholeNetworks.gather`."""
        weights = result_weights(self.ema, self.parameters)
        if not self._whole.networks:
            return weights
        with weights:
            pairs = self._whole.gather(everywhere)
        return in_place(pairs)

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """
        The networks in evaluation mode with the averaged weights, for the duration of a `with` block. If the run is
        sharded, collective at its start: every process gets whole networks, to use or not.
        """
        if self._whole.networks:
            return self._averaged_weights(everywhere=True)
        return evaluation_weights(self.trained, self.ema, self.parameters)

    def validate(self, work: Callable[[], None]) -> bool:
        """
        Calls `work()` on all processes and returns whether it succeeded. A failure is logged and does not end the run;
        see `validation.survives`.
        """
        with self.interruption.measuring("validation"):
            succeeded = survives(self.accelerator, self.progress, work)
        self._has_failed_validation = self._has_failed_validation or not succeeded
        self.log.start_clock(self.progress.global_step)
        return succeeded

    def keep_best(self, save_result: Callable[[str], None]) -> bool:
        """
        With the argument `keep_best`, saves the result if the last validation was the best one so far. Call it after
        each validation. Collective. Returns whether it succeeded, as `validate`.

        Args:
            save_result (function of a folder): See `save_checkpoint`.
        """
        name = self.training_args.keep_best
        if name is None:
            return True
        step, values = self.log.validation or (-1, {})
        value = values.get(name) if step == self.progress.global_step else None
        (is_best,) = broadcast_object_list([self.best is not None and self.best.is_better(value)])
        if not is_best:
            return True

        def save() -> None:
            with self._averaged_weights(everywhere=False):  # collective, if the run is sharded
                if self.best is not None and value is not None:
                    self.best.save(save_result, value, step)

        return self.validate(save)

    def make_up(self, validate: Callable[[], bool], save_result: Callable[[str], None]) -> None:
        """
        What a resumed run owes, because it ended between a checkpoint and its validation: `validate()`, or to keep the
        result of that validation as the best one. Collective. `save_result` is as for `save_checkpoint`.
        """
        step, every = self.progress.global_step, self.training_args.validation_steps
        if not step or not every or step % every or step >= self.max_train_steps:
            return
        if self.log.lacks_validation(step):
            validate()
        else:
            self.keep_best(save_result)

    def show_samples(
        self, generate: Callable[[], Image.Image], panels: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        """
        Plots the loss and saves validation images, on the main process. `generate`, called in evaluation mode with the
        averaged weights, returns them. `panels` are those of `plot_loss_curves`, `None`: of a diffusion model.
        """
        is_main, output_dir = self.accelerator.is_main_process, self.training_args.output_dir
        if is_main and self.log.history.rows():
            arguments = () if panels is None else (panels,)
            plot_loss_curves(self.log.history.rows(), os.path.join(output_dir, "loss_curves.png"), *arguments)
        if not is_main and not self.is_sharded:
            return
        with self.evaluation_weights():
            images = generate() if is_main else None
        if images is not None:
            save_samples(self.accelerator, images, output_dir, self.progress.global_step)

    def _log_skipped(self) -> None:
        """Logs how many images were left out because they could not be used, if they were not checked before."""
        if self.skips is not None and self.accelerator.is_main_process:
            summary = self.skips.summary()
            if summary is None:
                self.logger.info("All images that were met can be used.")
            else:
                self.logger.warning(f"Left out as they were met: {summary}. All names are in {self.skips.path}.")

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

        If the run was interrupted, nothing is saved after its last checkpoint, and the process ends with exit code 75
        (`SystemExit`). After a dry run, its files are deleted.

        Args:
            save_result (function of a folder): See `save_checkpoint`.
            validate (callable): The last validation; whether it succeeded. Every process calls it.
            publish (callable): Pushes the folder of the run to the Hub, if the arguments say so.
            name (`str`): What was trained, for the log.
        """
        try:
            self._finish(save_result, validate, publish, name)
        finally:
            self.interruption.uninstall()

    def _finish(
        self,
        save_result: Callable[[str], None],
        validate: Callable[[], bool],
        publish: Callable[[Accelerator, TrainingArguments], None],
        name: str,
    ) -> None:
        self.log.close()
        output_dir = self.training_args.output_dir
        if self.training_args.dry_run:
            self._end_processes()
            end_dry_run(self, self._has_failed_validation)
            return
        if self.interruption.reason is not None and self.progress.global_step < self.max_train_steps:
            self._stop_early(f"stopped after step {self.progress.global_step} of {self.max_train_steps}")
        if self.progress.skipped_steps:
            self.logger.warning(f"{self.progress.skipped_steps} of {self.max_train_steps} steps were skipped.")
        if self.guard.is_faulty:
            self.logger.warning("The last step is one of them: look at the result, whose weights may have diverged.")
        self._log_skipped()
        if self.frozen is not None:
            self.frozen.check()
            hashes = ", ".join(f"{name} {value}" for name, value in self.frozen.hashes.items())
            self.logger.info(f"The frozen networks are unchanged (hashes: {hashes})")
        self._save_snapshots()
        if self.is_sharded or self.accelerator.is_main_process:
            kept = f"{self._newest_checkpoint()} It holds the result, which is saved again when the run is resumed."
            with explained_disk_errors(output_dir, f"The {name} could not be written to {output_dir}", kept):
                self._save(save_result, output_dir)
        if self.accelerator.is_main_process:
            self.logger.info(f"Saved the {name} to {output_dir}")
        self.interruption.decide(self.guard.agree(None, [self.interruption.received is not None, False]))
        if self.interruption.reason is not None:
            self._stop_early("saved its result, but has not been validated or published")
        validated = validate()
        self._end_processes()
        publish(self.accelerator, self.training_args)
        check_last_validation(self.accelerator, output_dir, validated)

    def _stop_early(self, state: str) -> NoReturn:
        self.logger.warning(
            f"The run has {state}, because of {self.interruption.reason}. Run the same command with "
            "`--resume_from_checkpoint latest` to go on."
        )
        self._end_processes()
        raise SystemExit(STOPPED_EARLY_EXIT_CODE)

    def _end_processes(self) -> None:
        if self.accelerator.num_processes > 1:
            # The thread of Gloo needs the interpreter to release the tensors of the last collective. Were the networks
            # freed before, their process group would wait for that thread with the interpreter held: a deadlock.
            time.sleep(GLOO_RELEASE_SECONDS)
        self.accelerator.end_training()


__getattr__ = renamed(__name__, {"AfterStep": "TrainingRun"})
