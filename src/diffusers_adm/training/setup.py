"""The start of a run: processes and logging, its folder, and a record of its arguments."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration

from ..commands.processes import join_processes
from ..data.repositories import check_can_be_written
from .arguments import TrainingArguments
from .checkpoints import delete_checkpoints, find_latest_checkpoint
from .effects import check_effects
from .power_ema import SNAPSHOT_FOLDER, delete_snapshots, find_snapshots
from .reproducibility import report_machine


if TYPE_CHECKING:
    from .resume import RunRecord


ARGUMENTS_NAME = "train_args.yaml"


def start_run(script: str, all_args: Sequence[Any], record: RunRecord, warnings: Sequence[str] = ()) -> Accelerator:
    """
    Starts a run: looks for arguments without effect, joins the processes, and logs what is resumed.

    Args:
        script (`str`): Name of the script and of its logger.
        all_args (sequence of dataclasses), record (`RunRecord`): From `parse_run`.
        warnings (sequence of `str`): Further sentences to log.
    """
    without_effect = check_effects(*all_args, taken_over=record.left_out)
    (training_args,) = (args for args in all_args if isinstance(args, TrainingArguments))
    accelerator = start_accelerator(training_args, script)
    for sentence in (*without_effect, *warnings):
        get_logger(script).warning(sentence)
    record.begin(run_settings(*all_args))
    return accelerator


def start_accelerator(training_args: TrainingArguments, script: str) -> Accelerator:
    """
    Joins the processes and sets up logging: the main process reports what `script` (the name of its logger) and this
    package do, the others only errors. Raises a `ValueError` if Accelerate would split the weights over processes.
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
        # Not for the libraries, which report each file of a checkpoint and each download.
        for name in (script, "diffusers_adm"):
            logging.getLogger(name).setLevel(logging.INFO)
    datasets.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"Accelerate is configured for {accelerator.distributed_type.value}, which splits the weights over "
            "processes; their average and the checkpoints need them whole. Use `multi_gpu`."
        )
    if training_args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    get_logger(script).info(accelerator.state, main_process_only=True)
    report_machine(accelerator)
    return accelerator


def run_settings(*all_args: Any) -> dict[str, Any]:
    """The arguments of a run by name, for its folder and its log, without the secret token."""
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
    Raises a `ValueError` for a folder that cannot be made, or that holds checkpoints of another run which the arguments
    neither resume nor delete: `latest` would find the highest step, of whichever run. Likewise for snapshots of
    averages.
    """
    output_dir = training_args.output_dir
    check_can_be_written("output_dir", output_dir)
    if training_args.resume_from_checkpoint is not None or training_args.overwrite_output_dir:
        return
    latest = find_latest_checkpoint(output_dir)
    if latest is not None:
        raise ValueError(
            f"`output_dir` {output_dir!r} holds {os.path.basename(latest)} of another run. Pass "
            "`--resume_from_checkpoint latest` to resume it, `--overwrite_output_dir` to delete its checkpoints and "
            "start a new run, or another `--output_dir`."
        )
    if find_snapshots(output_dir):
        raise ValueError(
            f"`output_dir` {output_dir!r} holds snapshots of another run in {SNAPSHOT_FOLDER}. Pass "
            "`--overwrite_output_dir` to delete them and start a new run, or another `--output_dir`."
        )


def prepare_output_dir(accelerator: Accelerator, training_args: TrainingArguments) -> None:
    """
    Creates the folder of the run, and deletes checkpoints and snapshots of another run if the arguments say so.
    Collective.
    """
    output_dir = training_args.output_dir
    if training_args.resume_from_checkpoint is None and find_latest_checkpoint(output_dir) is not None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            delete_checkpoints(output_dir)
        accelerator.wait_for_everyone()
    if training_args.resume_from_checkpoint is None and accelerator.is_main_process:
        delete_snapshots(output_dir)
    if accelerator.is_main_process:
        os.makedirs(output_dir, exist_ok=True)
