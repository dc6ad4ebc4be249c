"""
How a training script starts: processes and logging, the network's config and the scheduler, optimizer and average, the
folder of the run, and the log that it keeps.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list
from diffusers import ModelMixin, SchedulerMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm

from ..commands.processes import join_processes
from ..data.images import ImageDataset
from ..data.repositories import check_can_be_written, from_subfolder_or_root, reading
from ..data.samplers import BalancedClassSampler, EpochShuffleSampler
from ..hub.publication import prepare_repository
from ..schedulers.noise_schedules import alphas_cumprod_of, describe_noise_schedule, is_same_noise, noise_schedule_of
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .arguments import DataArguments, ModelArguments, NoiseArguments, TrainingArguments
from .checkpoints import delete_checkpoints, find_latest_checkpoint
from .metrics import MetricsHistory
from .reproducibility import report_machine


logger = get_logger(__name__)

ARGUMENTS_NAME = "train_args.yaml"


# 1. Processes


def start_accelerator(training_args: TrainingArguments, script: str) -> Accelerator:
    """
    Joins the processes and sets up logging: the main process reports what `script` (the name of its logger) and this
    package do, the others only errors. If the result is to be pushed to the Hub, its repository is made.

    Raises:
        ValueError: If the results cannot go to `output_dir`, Accelerate is configured to split the weights over
            processes, or the Hub refuses.
    """
    import datasets

    check_output_dir(training_args)
    accelerator = join_processes(
        training_args.mixed_precision,
        gradient_accumulation_steps=training_args.gradient_accumulation_steps,
        log_with=None if training_args.report_to == "none" else training_args.report_to,
        project_config=ProjectConfiguration(
            project_dir=training_args.output_dir,
            logging_dir=os.path.join(training_args.output_dir, training_args.logging_dir),
        ),
    )
    if accelerator.is_main_process:
        # Not of the libraries, which report each file of a checkpoint and each download.
        for name in (script, "diffusers_adm"):
            logging.getLogger(name).setLevel(logging.INFO)
    datasets.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"Accelerate is configured for {accelerator.distributed_type.value}, which splits the weights over "
            "processes; the averaged weights and checkpoints of this script need them whole. Use `multi_gpu`."
        )
    if training_args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    get_logger(script).info(accelerator.state, main_process_only=True)
    report_machine(accelerator)
    prepare_repository(accelerator, training_args)
    return accelerator


# 2. Network and scheduler


def load_noise_scheduler(
    model_args: ModelArguments, data_args: DataArguments, noise_args: NoiseArguments
) -> LearnedVarianceDDPMScheduler:
    """
    The scheduler of the pretrained model, or the default one; what `noise_args` give takes the place of its values.

    Raises:
        ValueError: If the pretrained scheduler cannot be read, or does not depend on what is given.
    """
    pretrained, given = model_args.pretrained_model_name_or_path, noise_args.given()
    if pretrained is None:
        return LearnedVarianceDDPMScheduler(**given)
    with reading("pretrained_model_name_or_path", pretrained):
        scheduler = from_subfolder_or_root(
            LearnedVarianceDDPMScheduler.from_pretrained,
            pretrained,
            "scheduler",
            revision=model_args.revision,
            cache_dir=data_args.cache_dir,
            **given,
        )
    _check_noise_acts(given, scheduler)
    return scheduler


def _check_noise_acts(given: Mapping[str, Any], scheduler: LearnedVarianceDDPMScheduler) -> None:
    """Raises a `ValueError` for an argument that the betas of the pretrained scheduler do not depend on."""
    if scheduler.config.trained_betas is not None:
        idle, why = {"num_train_timesteps", "beta_schedule", "beta_start", "beta_end"}, "lists its betas one by one"
    elif scheduler.config.beta_schedule == "squaredcos_cap_v2":
        idle, why = {"beta_start", "beta_end"}, "has the cosine schedule, which is defined without them"
    else:
        return
    names = {"num_train_timesteps": "ddpm_num_steps", "beta_schedule": "ddpm_beta_schedule"}
    without_effect = [f"`{names.get(name, name)}`" for name in given if name in idle]
    if without_effect:
        raise ValueError(
            f"{' and '.join(without_effect)} would have no effect: the scheduler of `pretrained_model_name_or_path` "
            f"{why}. Leave out what is not needed, or train from scratch."
        )


def record_noise_schedule(model: ModelMixin, name: str, scheduler: SchedulerMixin | None) -> None:
    """
    Writes into the config of `model` which noise schedule it is trained on. The log says so if it named another one.

    Args:
        model (`ModelMixin`): With the config entry `noise_schedule`.
        name (`str`): What the log calls it.
        scheduler ([`SchedulerMixin`], *optional*): Of the run; `None`: it is trained on clean images.
    """
    before, now = model.config.noise_schedule, {} if scheduler is None else noise_schedule_of(scheduler)
    model.register_to_config(noise_schedule=now)
    if before is None or before == now:
        return
    if not before or not now or not is_same_noise(alphas_cumprod_of(before), alphas_cumprod_of(now)):
        logger.warning(
            f"The config of the {name} named the noise schedule {describe_noise_schedule(before)}. It is now trained "
            f"on the noise schedule {describe_noise_schedule(now)}, which takes its place."
        )


def load_model_config(
    model_class: type, subfolder: str, model_args: ModelArguments, data_args: DataArguments
) -> dict[str, Any]:
    """
    The config of the network to train: that of the pretrained model, or the one named for training from scratch (a
    file, or a repository that holds it in `subfolder` or in its root).

    Raises:
        ValueError: If it cannot be read.
    """
    pretrained, from_scratch = model_args.pretrained_model_name_or_path, model_args.model_config_name_or_path
    load = model_class.load_config  # type: ignore[attr-defined]
    if pretrained is not None:
        with reading("pretrained_model_name_or_path", pretrained):
            return from_subfolder_or_root(
                load, pretrained, subfolder, revision=model_args.revision, cache_dir=data_args.cache_dir
            )
    with reading("model_config_name_or_path", from_scratch):
        if os.path.isfile(from_scratch):
            return load(from_scratch)
        return from_subfolder_or_root(load, from_scratch, subfolder, cache_dir=data_args.cache_dir)


def check_config_keys(config: Mapping[str, Any], model_class: type, source: str | None) -> None:
    """
    Raises:
        ValueError: If the config holds a key that is no argument of `model_class`, which diffusers would pass over.
    """
    known = list(inspect.signature(model_class.__init__).parameters)  # type: ignore[misc]
    for key in config:
        if key not in known and not key.startswith("_"):
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"The config {source} holds {key!r}, which `{model_class.__name__}` has not.{hint}")


def choose_resolution(resolution: int | None, config: Any, network: str) -> int:
    """
    The training resolution in pixels: `resolution`, or else the `sample_size` of the network.

    Args:
        resolution (`int`, *optional*): As given by the user.
        config (`FrozenDict`): Of the network, with `sample_size` and `block_out_channels`.
        network (`str`): What error messages call it.

    Raises:
        ValueError: If it is no square size, or one that the network cannot halve as often as it does.
    """
    resolution = resolution or config.sample_size
    if not isinstance(resolution, int):
        raise ValueError(
            f"The resolution is {resolution!r}: the {network}'s `sample_size` does not name a square size. Pass "
            "`--resolution`."
        )
    downsampling = 2 ** (len(config.block_out_channels) - 1)
    if resolution % downsampling:
        raise ValueError(
            f"The resolution is {resolution}; this {network} halves images {len(config.block_out_channels) - 1} "
            f"times, so it must be divisible by {downsampling}. Pass e.g. `--resolution "
            f"{math.ceil(resolution / downsampling) * downsampling}`."
        )
    return resolution


# 3. Data loader, optimizer, learning rate, average


def build_dataloader(
    train_dataset: ImageDataset, data_args: DataArguments, training_args: TrainingArguments
) -> torch.utils.data.DataLoader:
    """
    Batches in an order that depends on the seed and the epoch of `train_dataset` alone; with `class_balanced`, the
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
    To be stepped once an optimizer step. It is not to be prepared: Accelerate would step it once per process, for
    examples instead of optimizer steps.

    Args:
        optimizer (`AcceleratedOptimizer`): As prepared.
    """
    return get_scheduler(
        training_args.lr_scheduler,
        optimizer=optimizer.optimizer,
        num_warmup_steps=training_args.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )


def build_ema(parameters: Iterable[torch.nn.Parameter], training_args: TrainingArguments) -> EMAModel | None:
    """The average of these weights (of models not wrapped for distribution); None if there shall be none."""
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


# 4. The folder of the run, and its log


def run_settings(*all_args: Any) -> dict[str, Any]:
    """The arguments of a run by name, for its folder and its log: without the token, which is nobody else's matter."""
    settings = {name: value for arguments in all_args for name, value in vars(arguments).items()}
    settings.pop("hub_token")
    return settings


def write_settings(folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Writes the arguments of a run as `train_args.yaml`, which reads back as a recipe."""
    import yaml  # comes with the `train` extra

    with open(os.path.join(folder, ARGUMENTS_NAME), "w", encoding="utf-8") as file:
        yaml.safe_dump(dict(settings), file, sort_keys=False)


def check_output_dir(training_args: TrainingArguments) -> None:
    """
    Checks that the results of a run can go to its folder, before anything is read.

    Raises:
        ValueError: If the folder of the run cannot be made; or if another run left checkpoints there, and the arguments
            say neither to go on with it nor to start anew. A new run would mix with it: `latest` finds the highest
            step, whoever wrote it.
    """
    output_dir = training_args.output_dir
    check_can_be_written("output_dir", output_dir)
    latest = find_latest_checkpoint(output_dir)
    if latest is not None and training_args.resume_from_checkpoint is None and not training_args.overwrite_output_dir:
        raise ValueError(
            f"`output_dir` {output_dir!r} holds {os.path.basename(latest)} of another run. Pass "
            "`--resume_from_checkpoint latest` to go on with it, `--overwrite_output_dir` to delete its "
            "checkpoints and start anew, or another `--output_dir`."
        )


def prepare_output_dir(
    accelerator: Accelerator, training_args: TrainingArguments, settings: Mapping[str, Any] | None = None
) -> None:
    """
    Creates the folder of the run, with its `settings` if they are given already, and deletes the checkpoints of another
    run if so asked. Collective.

    Raises:
        ValueError: As `check_output_dir`.
    """
    check_output_dir(training_args)
    output_dir = training_args.output_dir
    if training_args.resume_from_checkpoint is None and find_latest_checkpoint(output_dir) is not None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            delete_checkpoints(output_dir)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.makedirs(output_dir, exist_ok=True)
        if settings is not None:
            write_settings(output_dir, settings)


def save_samples(accelerator: Accelerator, grid: Image.Image, output_dir: str, global_step: int) -> None:
    """Writes a grid of validation images to the folder of the run and to TensorBoard. For the main process alone."""
    grid.save(os.path.join(output_dir, f"samples-{global_step:07d}.png"))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("samples", np.asarray(grid), global_step, dataformats="HWC")


# What to do about a run that has gone astray.
ADVICE = (
    "Resume an earlier checkpoint with a lower `--learning_rate`, or with `--mixed_precision bf16` or `no` instead of "
    "fp16."
)
# A network that always predicts 0 has a squared error of about 1 (images and noise have unit scale), one that guesses
# among a million classes a cross entropy of 14: a mean a hundred times as large is out of reach of any that learns.
ABSURD_ERROR = 100.0
# So much above the lowest mean over that many rows is beyond what rows of few images differ by. But a classifier that
# knows its images by heart has errors near 0, and single ones far above: below half the error of an untrained network,
# nothing has diverged.
DIVERGED_FACTOR, DIVERGENCE_SPAN, LEAST_DIVERGED_ERROR = 100.0, 20, 0.5


class DivergenceWatch:
    """
    Notices that a run has diverged though its loss is finite: the squared error (a classifier's cross entropy) is
    absurdly large, or has risen far above the lowest mean that it had.
    """

    def __init__(self) -> None:
        self.values: list[float] = []  # of the latest rows, oldest first
        self.lowest = math.inf  # of the means over `DIVERGENCE_SPAN` rows

    def update(self, values: Mapping[str, float]) -> str | None:
        """Takes a row of metrics. What is wrong with it; None for nothing."""
        name = "mse" if "mse" in values else "loss"
        value = values[name]
        if not math.isfinite(value):  # a row of the history that could not be written as a number
            return f"its {name} is {value}"
        if value > ABSURD_ERROR:
            return f"its {name} is {value:.3g}, far above that of an untrained network"
        if value > max(DIVERGED_FACTOR * self.lowest, LEAST_DIVERGED_ERROR):
            return f"its {name} is {value:.3g}, and had come down to {self.lowest:.3g}"
        self.values = [*self.values, value][-DIVERGENCE_SPAN:]
        if len(self.values) == DIVERGENCE_SPAN:
            self.lowest = min(self.lowest, sum(self.values) / DIVERGENCE_SPAN)
        return None


class TrainingLog:
    """
    Progress bar, throughput, `metrics.jsonl` (the main process writes it) and trackers of a run. Every process has one
    and makes every call.

    Args:
        accelerator (`Accelerator`): Of the run.
        output_dir (`str`): Its folder.
        settings (mapping): Its arguments, for the trackers.
        global_step (`int`): Optimizer steps taken before; rows of later ones, which will be written again, are dropped.
        max_train_steps (`int`): Optimizer steps of the whole run.
        total_batch_size (`int`): Images per optimizer step, over all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str,
        settings: Mapping[str, Any],
        global_step: int,
        max_train_steps: int,
        total_batch_size: int,
    ):
        self.accelerator = accelerator
        self.total_batch_size = total_batch_size
        self.history = MetricsHistory(os.path.join(output_dir, "metrics.jsonl"))
        self.watch, self.divergence = DivergenceWatch(), None
        if accelerator.is_main_process:
            self.history.rewind(global_step)
            for row in self.history.rows():
                if "loss" in row:
                    self.watch.update(row)
        accelerator.init_trackers(
            "train",
            config={name: str(value) for name, value in settings.items()},
            init_kwargs={"tensorboard": {"purge_step": global_step + 1}},
        )
        self.progress_bar = tqdm(
            total=max_train_steps,
            initial=global_step,
            desc="Training",
            disable=not accelerator.is_local_main_process,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file keeps every update
        )
        self.start_clock(global_step)

    def start_clock(self, global_step: int) -> None:
        """Begins to measure images per second; call it also after a pause, such as validation."""
        self._clock_start, self._clock_step = time.perf_counter(), global_step

    def advance(self) -> None:
        """One optimizer step was taken."""
        self.progress_bar.update()

    def write(self, step: int, values: Mapping[str, float], learning_rate: float) -> None:
        """
        A row of training metrics, `loss` among them, with learning rate and throughput since the last row.

        Logs a warning when the run has diverged although its loss is finite.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        if not math.isfinite(values["loss"]):
            raise RuntimeError(f"The loss is {values['loss']} at step {step}. {ADVICE}")
        before, self.divergence = self.divergence, self.watch.update(values)
        if self.divergence is not None and before is None:
            logger.warning(f"The run seems to have diverged at step {step}: {self.divergence}. {ADVICE}")
        images = (step - self._clock_step) * self.total_batch_size
        images_per_second = images / (time.perf_counter() - self._clock_start)
        self.start_clock(step)
        row = {**values, "lr": learning_rate, "images_per_second": images_per_second}
        self._write(step, row, "train/", "")
        shown = {"loss": f"{values['loss']:.4f}", "images_per_s": f"{images_per_second:.1f}"}
        self.progress_bar.set_postfix(shown, refresh=False)

    def write_validation(self, step: int, values: Mapping[str, float]) -> None:
        """A row of its own, whose names begin with `validation_` (for the trackers: `validation/`)."""
        self._write(step, values, "validation/", "validation_")

    def lacks_validation(self, step: int) -> bool:
        """Whether this folder has rows of `step`, but none of the validation after it. Collective."""
        rows = self.history.rows() if self.accelerator.is_main_process else []
        names = {name for row in rows if row["step"] == step for name in row}
        lacks = bool(names) and not any(name.startswith("validation_") for name in names)
        (lacks,) = broadcast_object_list([lacks])  # of the main process, which writes them
        return lacks

    def _write(self, step: int, values: Mapping[str, float], tracker_prefix: str, file_prefix: str) -> None:
        self.accelerator.log({f"{tracker_prefix}{name}": value for name, value in values.items()}, step=step)
        if self.accelerator.is_main_process:
            self.history.append(step, {f"{file_prefix}{name}": value for name, value in values.items()})

    def close(self) -> None:
        """At the end of the training; a run that has diverged must not end as if nothing had happened."""
        self.progress_bar.close()
        if self.divergence is not None:
            logger.warning(
                f"The run has diverged: {self.divergence}. Its result is saved all the same, but is of no use. {ADVICE}"
            )
