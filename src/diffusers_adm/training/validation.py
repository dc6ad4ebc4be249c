"""Grids of samples on the way of a training run: what they show, and how it is drawn, so that they can be compared."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .arguments import DiffusionTrainingArguments
from .data import ImageDataset


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
