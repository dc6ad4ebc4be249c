"""
Dry runs: a run of one step in a folder of its own, which is deleted afterwards.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from ..commands.errors import CommandError
from .arguments import TrainingArguments
from .checkpoints import find_checkpoint, find_latest_checkpoint


if TYPE_CHECKING:
    from .run import TrainingRun


DRY_RUN_FOLDER = ".dry-run"


def redirect_dry_run(training_args: TrainingArguments) -> None:
    """
    Makes a run write to a folder below its `output_dir`, and neither to trackers nor to the Hub. A checkpoint to resume
    is looked for in `output_dir`.
    """
    output_dir = training_args.output_dir
    if training_args.resume_from_checkpoint is not None:
        path = find_checkpoint(output_dir, training_args.resume_from_checkpoint)
        training_args.resume_from_checkpoint = str(path.resolve()) if path is not None else None
    training_args.output_dir = os.path.join(output_dir, DRY_RUN_FOLDER)
    training_args.report_to, training_args.push_to_hub = "none", False


def clear_dry_run(accelerator: Accelerator, training_args: TrainingArguments) -> None:
    """Deletes what an earlier dry run has left, and, when this process ends, what this one leaves."""
    if accelerator.is_main_process:
        _delete(training_args.output_dir)
        atexit.register(_delete, training_args.output_dir)
    accelerator.wait_for_everyone()


def _delete(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds other files
        os.rmdir(os.path.dirname(folder))


def end_dry_run(run: TrainingRun, has_failed_validation: bool) -> None:
    """
    Logs what the run would need, and deletes the files of the dry run. Raises a `CommandError` if its validation has
    failed. On all processes.
    """
    if not run.accelerator.is_main_process:
        return
    folder, durations = run.training_args.output_dir, run.interruption.longest
    checkpoint = find_latest_checkpoint(folder)
    files = [file for file in Path(checkpoint).rglob("*") if file.is_file()] if checkpoint is not None else []
    size = sum(file.stat().st_size for file in files)
    seconds = run.interruption.steps[-1] if run.interruption.steps else 0.0
    steps, arguments = run.max_train_steps - run.progress.global_step + 1, run.training_args
    saving, validating = durations.get("checkpoint", 0.0), durations.get("validation", 0.0)
    total = steps * seconds + (steps // arguments.checkpointing_steps + 1) * saving
    total += (steps // arguments.validation_steps + 1 if arguments.validation_steps else 1) * validating
    run.logger.info(
        f"Dry run: {_peak_memory(run.accelerator)}; {seconds:.2f} s for a step (the first one, which is slower than "
        f"later ones), {saving:.1f} s and {size / 1e6:.1f} MB for a checkpoint, {validating:.1f} s for a validation. "
        f"{steps} steps would take at most {_hours(total)}. Nothing is left in {os.path.dirname(folder)}."
    )
    _delete(folder)
    if has_failed_validation:
        raise CommandError("The validation of the dry run has failed, see above.", exit_code=1)


def _peak_memory(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(accelerator.device) / 1e9:.2f} GB of memory of the device at most"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    return f"{used / 1e9:.2f} GB of memory at most"


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
