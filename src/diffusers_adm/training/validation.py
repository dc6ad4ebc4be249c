"""
Validation of a training run: the examples that validation images show, how they are sampled so that steps can be
compared, and what happens if that fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from PIL import Image

from ..commands.errors import CommandError
from ..data.images import ImageDataset
from .arguments import DiffusionTrainingArguments
from .checkpoints import TrainingProgress


logger = get_logger(__name__)


def survives(accelerator: Accelerator, progress: TrainingProgress, work: Callable[[], None]) -> bool:
    """
    Calls `work()`, a validation or a part of one, so that its failure costs neither the run nor its weights.

    An exception is logged with its traceback by the process that met it. Collective; `work` itself must not be, since
    the other processes would wait for one that failed.

    Returns:
        `bool`: Whether `work()` succeeded on all processes.
    """
    failed = torch.zeros((), device=accelerator.device)
    try:
        work()
    except Exception:  # no kind of failure in what is only shown is worth the weights
        failed += 1
        logger.exception(
            f"The validation at step {progress.global_step} has failed; the trained weights are not affected.",
            main_process_only=False,
        )
    return not accelerator.reduce(failed, reduction="sum").item()


def check_last_validation(accelerator: Accelerator, output_dir: str, validated: bool) -> None:
    """
    Ends a run whose last validation has failed with a message that says where the result is.

    Raises:
        CommandError: On the main process, unless the last validation was `validated`, which [`survives`] says.
    """
    if not validated and accelerator.is_main_process:  # the launcher might end it if another one were faster
        raise CommandError(
            f"The last validation has failed; its traceback stands above. The result is saved in {output_dir} all the "
            "same.",
            exit_code=1,
        )


def choose_examples(
    dataset: ImageDataset, number: int, null_class_id: int | None = None
) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """
    Examples, evenly spaced over the data, each with what a pipeline is told of it: its caption as `prompt` and its
    class as `class_labels`, as far as the data has them. Classes of unlabelled ones are `null_class_id`.

    Args:
        dataset (`ImageDataset`): Its crops should be central, or of an epoch that stays.
        number (`int`): Of examples, at most.
    """
    number = min(number, len(dataset))
    chosen = []
    for index in (len(dataset) * place // number for place in range(number)):
        row, told = dataset.dataset[index], {}
        if "caption" in row:
            told["prompt"] = row["caption"]
        if "label" in row:
            told["class_labels"] = null_class_id if row["label"] < 0 else row["label"]
        chosen.append((dataset[index], told))
    return chosen


def draw(
    pipeline: DiffusionPipeline, wanted: list[dict[str, Any]], training_args: DiffusionTrainingArguments
) -> list[Image.Image]:
    """
    One image for each entry of `wanted`, from fixed noise.

    Args:
        pipeline (`DiffusionPipeline`): Of this package; it draws `train_batch_size` images at a time.
        wanted (`list[dict]`): Arguments of the pipeline for one image each, the same ones for all. They are guided if
            there is a `prompt` or are `class_labels`.
    """
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(wanted), training_args.train_batch_size):
        batch = wanted[start : start + training_args.train_batch_size]
        arguments = {name: [each[name] for each in batch] for name in batch[0]}
        how_many = {} if arguments else {"batch_size": len(batch)}
        is_conditional = "prompt" in arguments or "class_labels" in arguments
        images += pipeline(
            **arguments,
            **how_many,
            num_inference_steps=training_args.validation_num_inference_steps,
            guidance_scale=training_args.validation_guidance_scale if is_conditional else 1.0,
            generator=[torch.Generator().manual_seed(training_args.seed + start + i) for i in range(len(batch))],
        ).images
    return images
