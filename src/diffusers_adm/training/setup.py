"""The start of a run: processes and logging, its folder, and a record of its arguments."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration

from ..commands.processes import join_processes
from ..commands.recipes import portable
from ..data.repositories import check_can_be_written
from .arguments import ModelArguments, TrainingArguments
from .best import BEST_FOLDER, BEST_NAME, delete_best
from .checkpoints import delete_checkpoints, find_latest_checkpoint
from .compiled import check_compile
from .disk import write_whole
from .dry_run import clear_dry_run, redirect_dry_run
from .effects import check_effects
from .power_ema import SNAPSHOT_FOLDER, delete_snapshots, find_snapshots
from .reproducibility import report_machine
from .sharding import configure_engine
from .trackers import check_tracker


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
    if training_args.dry_run:
        check_output_dir(training_args)  # as the real run would
        redirect_dry_run(training_args)
    accelerator = start_accelerator(training_args, script)
    if any(isinstance(args, ModelArguments) and args.compile for args in all_args):
        check_compile(accelerator)
    if training_args.dry_run:
        clear_dry_run(accelerator, training_args)
    for sentence in (*without_effect, *warnings):
        get_logger(script).warning(sentence)
    settings = run_settings(*all_args)
    record.begin(settings)
    record.check_processes(accelerator.num_processes, settings)
    return accelerator


def start_accelerator(training_args: TrainingArguments, script: str) -> Accelerator:
    """
    Joins the processes and sets up logging: the main process reports what `script` (the name of its logger) and this
    package do, the others only errors. Raises a `ValueError` for what Accelerate cannot be configured for.
    """
    import datasets

    if not training_args.dry_run:  # whose own folder may hold what a killed one has left, see `clear_dry_run`
        check_output_dir(training_args)
    check_tracker(training_args.report_to)
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
    configure_engine(accelerator, training_args)
    if training_args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    get_logger(script).info(accelerator.state, main_process_only=True)
    report_machine(accelerator)
    return accelerator


def run_settings(*all_args: Any) -> dict[str, Any]:
    """
    The arguments of a run by name, for its folder and its log, without the secret token, and without the place of the
    environment, which the run may outlive.
    """
    settings = {name: portable(value) for arguments in all_args for name, value in vars(arguments).items()}
    settings.pop("hub_token")
    return settings


def write_settings(folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Writes the arguments of a run as `train_args.yaml`, which reads back as a recipe."""
    import yaml  # comes with the `train` extra

    write_whole(Path(folder, ARGUMENTS_NAME), yaml.safe_dump(dict(settings), sort_keys=False))


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
    if os.path.isfile(os.path.join(output_dir, BEST_FOLDER, BEST_NAME)):
        raise ValueError(
            f"`output_dir` {output_dir!r} holds the best result of another run in {BEST_FOLDER}. Pass "
            "`--overwrite_output_dir` to delete it and start a new run, or another `--output_dir`."
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
    starts_anew = training_args.resume_from_checkpoint is None
    if starts_anew and (training_args.overwrite_output_dir or find_latest_checkpoint(output_dir) is not None):
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            delete_checkpoints(output_dir)
        accelerator.wait_for_everyone()
    if starts_anew and accelerator.is_main_process:
        delete_snapshots(output_dir)
        delete_best(output_dir)
    if accelerator.is_main_process:
        os.makedirs(output_dir, exist_ok=True)
