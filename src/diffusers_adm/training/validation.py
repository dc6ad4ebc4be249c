"""
Validation of a training run: images that are sampled so that steps can be compared, and the handling of failures.

All validation images come from fixed noise, and the examples that they show are the same at every step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from PIL import Image

from ..commands.errors import CommandError
from ..conditioning.image_format import ImageFormat, Size, as_size
from ..conditioning.low_resolution import downsample
from ..conditioning.previews import describe_preview, preview
from ..data.columns import first_caption
from ..data.images import ImageDataset
from ..deprecations import renamed
from .arguments import DiffusionTrainingArguments
from .checkpoints import TrainingProgress
from .images import cell_scale, labelled_grid, labelled_strips


if TYPE_CHECKING:
    import datasets  # of the `train` extra


logger = get_logger(__name__)

DEFAULT_VALIDATION_PROMPTS = 4
MASKED_GREY = 0.0  # of the pixels to inpaint, in validation images: the middle of [-1, 1]

# A condition of validation images: a label, and arguments of the pipeline.
Row = tuple[str, dict[str, Any]]
# Tensors of an example of the data, and arguments of the pipeline for its class and caption.
Example = tuple[dict[str, torch.Tensor], dict[str, Any]]


# 1. Failures


def survives(accelerator: Accelerator, progress: TrainingProgress, work: Callable[[], None]) -> bool:
    """
    Calls `work()`, a validation or a part of one, so that its failure costs neither the run nor its weights. Returns
    whether it succeeded on all processes.

    An exception is logged with its traceback by the process that met it. Collective; `work` itself must not be, since
    the other processes would wait for one that failed.
    """
    failed = torch.zeros((), device=accelerator.device)
    try:
        work()
    except Exception:  # whatever it is, the trained weights are worth more
        failed += 1
        logger.exception(
            f"The validation at step {progress.global_step} has failed; the trained weights are not affected.",
            main_process_only=False,
        )
    return not accelerator.reduce(failed, reduction="sum").item()


def check_last_validation(accelerator: Accelerator, output_dir: str, validated: bool) -> None:
    """Raises a `CommandError` that says where the result is, on the main process, if the last validation has failed."""
    if not validated and accelerator.is_main_process:  # the launcher might stop it if another process were faster
        message = f"The last validation has failed, see above. The result is saved in {output_dir} all the same."
        raise CommandError(message, exit_code=1)


# 2. What validation images show


def choose_rows(
    images: datasets.Dataset,
    id2label: dict[int, str] | None,
    null_class_id: int | None,
    prompts: Sequence[str] | None = None,
) -> list[Row]:
    """
    Chooses the conditions of validation images: `prompts` (None: the first captions of the data), each with the class
    of the first image of that caption, or else the null class; without captions, the classes of the data; an empty list
    without either. Of several captions of an image, the first one is used, and all are known as prompts. Raises a
    `ValueError` if the class of a prompt is unknown and there is no null class.
    """
    labels = images["label"][:] if "label" in images.column_names else None
    if "caption" not in images.column_names:  # a pretrained model may have many other classes
        classes = sorted({label for label in labels or () if label >= 0})
        return [(id2label[label], {"class_labels": label}) for label in classes]
    all_captions = images["caption"][:]
    captions = [first_caption(caption) for caption in all_captions]
    first: dict[str, int] = {}
    for index, caption in reversed(list(enumerate(all_captions))):
        first |= dict.fromkeys([caption] if isinstance(caption, str) else caption, index)
    # An image whose first caption it is says more about a prompt than one that also has it.
    first |= {caption: index for index, caption in reversed(list(enumerate(captions)))}
    if not prompts:
        # All captions of a random subset may be empty.
        prompts = [caption for caption in dict.fromkeys(captions) if caption][:DEFAULT_VALIDATION_PROMPTS] or [""]
    rows = []
    for prompt in prompts:
        arguments = {"prompt": prompt}
        if labels is not None:
            label = labels[first[prompt]] if prompt in first and labels[first[prompt]] >= 0 else null_class_id
            if label is None:
                raise ValueError(
                    f"`validation_prompts` holds {prompt!r}, which is no caption of the data, so its class is unknown "
                    "(and there is no null class). Choose among the captions."
                )
            arguments["class_labels"] = label
        rows.append((prompt, arguments))
    return rows


def choose_examples(dataset: ImageDataset, number: int, null_class_id: int | None = None) -> list[Example]:
    """
    Chooses at most `number` examples, evenly spaced over the data, each with the arguments of a pipeline for it: its
    first caption as `prompt` and its class as `class_labels`, as far as the data has them. Unlabelled examples get the
    `null_class_id`.
    """
    number = min(number, len(dataset))
    return [example_at(dataset, len(dataset) * place // number, null_class_id) for place in range(number)]


def example_at(dataset: ImageDataset, index: int, null_class_id: int | None = None) -> Example:
    """An example as `choose_examples` returns it."""
    row, arguments = dataset.dataset[index], {}
    if "caption" in row:
        arguments["prompt"] = first_caption(row["caption"])
    if "label" in row:
        arguments["class_labels"] = null_class_id if row["label"] < 0 else row["label"]
    return dataset[index], arguments


def generate(
    pipeline: DiffusionPipeline, wanted: Sequence[dict[str, Any]], training_args: DiffusionTrainingArguments
) -> list[Image.Image]:
    """Generates images as `generate_samples` does, shown as by `previews.preview` with `preview_channels`."""
    samples = generate_samples(pipeline, wanted, training_args)
    return preview(samples, pipeline.image_format, training_args.preview_channels)


def generate_samples(
    pipeline: DiffusionPipeline,
    wanted: Sequence[dict[str, Any]],
    training_args: DiffusionTrainingArguments,
    numbers: Sequence[int] | None = None,
) -> torch.Tensor:
    """
    Generates one sample for each entry of `wanted`, in [-1, 1] on the CPU, from fixed noise, `train_batch_size` at a
    time. A text encoder on another device (precomputed embeddings do not need it) is moved to that of the U-Net
    meanwhile.

    Args:
        wanted (sequence of `dict`): Arguments of the pipeline for one image each, with the same keys for all. Guidance
            is used if `prompt`, `class_labels` or `image_embeds` is among them, or source images were dropped in
            training.
        numbers (sequence of `int`, *optional*): Of each, which its noise depends on; `None`: its place in `wanted`.
    """
    numbers = range(len(wanted)) if numbers is None else numbers
    pipeline.set_progress_bar_config(disable=True)
    text_encoder, samples = getattr(pipeline, "text_encoder", None), []
    home = text_encoder.device if text_encoder is not None else None
    try:
        if text_encoder is not None:
            text_encoder.to(pipeline.unet.device)
        for start in range(0, len(wanted), training_args.train_batch_size):
            batch = wanted[start : start + training_args.train_batch_size]
            arguments = {name: [each[name] for each in batch] for name in batch[0]}
            if "image_embeds" in arguments:
                arguments["image_embeds"] = torch.stack(arguments["image_embeds"])
            size = {} if arguments else {"batch_size": len(batch)}
            is_conditional = any(name in arguments for name in ("prompt", "class_labels", "image_embeds"))
            is_conditional = is_conditional or bool(pipeline.config.get("source_dropout_prob"))
            values = pipeline(
                **arguments,
                **size,
                num_inference_steps=training_args.validation_num_inference_steps,
                guidance_scale=training_args.validation_guidance_scale if is_conditional else 1.0,
                generator=[
                    torch.Generator().manual_seed(training_args.seed + number)
                    for number in numbers[start : start + len(batch)]
                ],
                output_type="np",  # unlike tensors, arrays are checked for NaN
            ).images
            samples.append(from_pipeline(torch.from_numpy(values).movedim(-1, 1), pipeline.image_format))
    finally:
        if text_encoder is not None:
            text_encoder.to(home)
    return torch.cat(samples)


def from_pipeline(values: torch.Tensor, image_format: ImageFormat) -> torch.Tensor:
    """Samples in [-1, 1] from the outputs of a pipeline: fractions of the value range (viewable images), or values."""
    return 2 * values - 1 if image_format.is_viewable else image_format.to_samples(values)


def to_pipeline(samples: torch.Tensor, image_format: ImageFormat) -> torch.Tensor:
    """Samples in [-1, 1] as an argument of a pipeline, on the levels of the data; the inverse of `from_pipeline`."""
    values = image_format.to_values(samples)
    return image_format.to_unit(values) if image_format.is_viewable else values


# 3. Validation images of each task


def sample_grid(
    pipeline: DiffusionPipeline, rows: Sequence[Row], training_args: DiffusionTrainingArguments
) -> Image.Image:
    """Samples, one row per condition of `choose_rows`; unconditional ones in a square."""
    total = training_args.num_validation_images
    rows = rows[:total]
    num_rows = len(rows) or math.ceil(math.sqrt(total))
    cols = math.ceil(total / num_rows)
    wanted = [arguments for _, arguments in rows for _ in range(cols)][:total] or [{}] * total
    images = generate(pipeline, wanted, training_args)
    labels = [label for label, _ in rows] or None
    caption = describe_preview(pipeline.image_format, training_args.preview_channels)
    return labelled_grid(images, num_rows, cols, row_labels=labels, scale=cell_scale(images), caption=caption)


def inpainting_arguments(example: Example, image_format: ImageFormat) -> dict[str, Any]:
    """The arguments of a pipeline for an example: the image, the mask of the part to inpaint, and what it is told."""
    tensors, given = example
    image = to_pipeline(tensors["images"], image_format)
    return {"image": image, "mask_image": 1 - tensors["keep_mask"], **given}


def inpainting_grid(
    pipeline: DiffusionPipeline,
    dataset: ImageDataset,
    null_class_id: int | None,
    training_args: DiffusionTrainingArguments,
) -> Image.Image:
    """One row per example: the kept part of the image, then inpainted ones."""
    total, image_format = training_args.num_validation_images, pipeline.image_format
    examples = choose_examples(dataset, math.ceil(math.sqrt(total)), null_class_id)
    rows, cols = len(examples), math.ceil(total / len(examples))
    masked, wanted = [], []
    for tensors, arguments in examples:
        masked.append(torch.where(tensors["keep_mask"] == 1, tensors["images"], MASKED_GREY))
        wanted += [inpainting_arguments((tensors, arguments), image_format)] * cols
    inpainted = generate(pipeline, wanted, training_args)
    kept = preview(torch.stack(masked), image_format, training_args.preview_channels)
    cells = [cell for row in range(rows) for cell in (kept[row], *inpainted[row * cols : (row + 1) * cols])]
    caption = describe_preview(image_format, training_args.preview_channels)
    return labelled_grid(cells, rows, cols + 1, scale=cell_scale(cells), caption=caption)


def low_resolution_arguments(example: Example, image_format: ImageFormat, low_res_size: Size) -> dict[str, Any]:
    """The arguments of a pipeline for an example: its image at the low resolution, and what it is told."""
    tensors, given = example
    small = downsample(
        tensors["images"][None], low_resolution_factor(tensors["images"], low_res_size), image_format.num_levels
    )[0]
    return {"image": to_pipeline(small, image_format), **given}


def low_resolution_factor(images: torch.Tensor, low_res_size: Size) -> int:
    """The size of images relative to that of the low-resolution ones."""
    return images.shape[-2] // as_size(low_res_size)[0]


def super_resolution_grid(
    pipeline: DiffusionPipeline, examples: Sequence[Example], training_args: DiffusionTrainingArguments
) -> Image.Image:
    """Small image | sample | large image of each example."""
    image_format, channels = pipeline.image_format, training_args.preview_channels
    large = torch.stack([tensors["images"] for tensors, _ in examples])
    factor = low_resolution_factor(large, pipeline.config.low_res_size)
    small = downsample(large, factor, image_format.num_levels)
    wanted = [low_resolution_arguments(example, image_format, pipeline.config.low_res_size) for example in examples]
    samples = generate(pipeline, wanted, training_args)
    resized = F.interpolate(small, scale_factor=factor, mode="nearest")
    columns = {
        "small": preview(resized, image_format, channels),
        "sample": samples,
        "large": preview(large, image_format, channels),
    }
    return labelled_strips(columns, caption=describe_preview(image_format, channels))


def control_arguments(example: Example, condition_format: ImageFormat | None = None) -> dict[str, Any]:
    """The arguments of a pipeline for an example: its conditioning image, and what it is told."""
    tensors, given = example
    return {"image": to_pipeline(2 * tensors["conditions"] - 1, condition_format or ImageFormat()), **given}


def control_grid(
    pipeline: DiffusionPipeline,
    examples: Sequence[Example],
    training_args: DiffusionTrainingArguments,
    condition_format: ImageFormat | None = None,
) -> Image.Image:
    """Condition | sample | target of each example. `condition_format` is that of the conditions; `None`: RGB."""
    image_format, channels = pipeline.image_format, training_args.preview_channels
    condition_format = condition_format or ImageFormat()
    targets, conditions = (torch.stack([tensors[name] for tensors, _ in examples]) for name in ("images", "conditions"))
    wanted = [control_arguments(example, condition_format) for example in examples]
    samples = generate(pipeline, wanted, training_args)
    columns = {
        "condition": preview(conditions * 2 - 1, condition_format),
        "sample": samples,
        "target": preview(targets, image_format, channels),
    }
    notes = {"condition": describe_preview(condition_format), "images": describe_preview(image_format, channels)}
    return strips_of_two_formats(columns, notes)


def strips_of_two_formats(columns: dict[str, list[Image.Image]], notes: Mapping[str, str | None]) -> Image.Image:
    """Strips of images that may differ in size, with `notes` on what is shown of each kind as their caption."""
    columns = same_size(columns)
    caption = "; ".join(f"{name}: {note}" for name, note in notes.items() if note) or None
    return labelled_strips(columns, scale=cell_scale(columns["target"]), caption=caption)


def same_size(columns: dict[str, list[Image.Image]]) -> dict[str, list[Image.Image]]:
    """Puts images of several sizes on white ones of the largest width and height."""
    sizes = {image.size for images in columns.values() for image in images}
    if len(sizes) == 1:
        return columns
    size = max(width for width, _ in sizes), max(height for _, height in sizes)

    def place(image: Image.Image) -> Image.Image:
        canvas = Image.new("RGB", size, "white")
        canvas.paste(image.convert("RGB"))
        return canvas

    return {name: [place(image) for image in images] for name, images in columns.items()}


def save_samples(accelerator: Accelerator, images: Image.Image, output_dir: str, global_step: int) -> None:
    """
    Writes validation images to the folder of the run and to TensorBoard or Weights & Biases. Call it on the main
    process only.
    """
    images.save(os.path.join(output_dir, f"samples-{global_step:07d}.png"))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("samples", np.asarray(images), global_step, dataformats="HWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": [images]}, step=global_step)


__getattr__ = renamed(__name__, {"draw": "generate"})
