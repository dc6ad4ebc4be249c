"""The config of the network, its resolution and its noise schedule, as the arguments of a run say."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from ..commands.errors import did_you_mean
from ..conditioning.image_format import ImageFormat, Size, as_sample_size, as_size, describe_resolution
from ..data.checks import check_images, keep_labelled
from ..data.decoding import smallest_size
from ..data.formats import find_image_format
from ..data.repositories import from_subfolder_or_root, reading
from ..data.skipped import SkipReport
from ..pipelines.layouts import UNCLIP_LAYOUT
from ..schedulers.noise_schedules import alphas_cumprod_of, describe_noise_schedule, is_same_noise, noise_schedule_of
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .arguments import DataArguments, ModelArguments, NetworkArguments, NoiseArguments, size_argument
from .resume import RunRecord


if TYPE_CHECKING:
    import datasets  # of the `train` extra


logger = get_logger(__name__)

# Images, evenly spaced, that tell the format of data that are not checked before.
NUM_FIRST_IMAGES = 1000


def pretrained_part(index: Mapping[str, Any], part: str) -> str | None:
    """
    The subfolder of a saved pipeline, by its `model_index.json`, that holds one of its parts, also of diffusers'
    `UnCLIPPipeline`; `None` without it.
    """
    names = UNCLIP_LAYOUT.names if UNCLIP_LAYOUT.names["unet"] in index else {}
    name = names.get(part, part)
    return name if (index.get(name) or [None])[0] is not None else None


def load_pretrained(
    load: Callable[..., Any], subfolder: str, model_args: NetworkArguments, data_args: Any, **kwargs: Any
) -> Any:
    """Calls `load` (such as `from_pretrained` of a class) for a part of the pretrained model."""
    name = model_args.pretrained_model_name_or_path
    hub = {"revision": model_args.revision, "cache_dir": data_args.cache_dir}
    subfolder = pretrained_part(pretrained_pipeline_config(model_args, data_args), subfolder) or subfolder
    with reading("pretrained_model_name_or_path", name):
        return from_subfolder_or_root(load, name, subfolder, **hub, **kwargs)


def load_noise_scheduler(
    model_args: NetworkArguments,
    data_args: Any,
    noise_args: NoiseArguments,
    subfolder: str = "scheduler",
    defaults: Mapping[str, Any] | None = None,
) -> LearnedVarianceDDPMScheduler:
    """
    Loads the scheduler of the pretrained model, in its `subfolder`, or that of `defaults`, with the values that
    `noise_args` give. Raises a `ValueError` for values that the betas of the pretrained scheduler do not depend on.
    """
    given = noise_args.given()
    if model_args.pretrained_model_name_or_path is None:
        return LearnedVarianceDDPMScheduler(**{**(defaults or {}), **given})
    load = LearnedVarianceDDPMScheduler.from_pretrained
    scheduler = load_pretrained(load, subfolder, model_args, data_args, **given)
    if scheduler.config.trained_betas is not None:
        idle, why = ("ddpm_num_steps", "ddpm_beta_schedule", "beta_start", "beta_end"), "lists its betas one by one"
    elif scheduler.config.beta_schedule == "squaredcos_cap_v2":
        idle, why = ("beta_start", "beta_end"), "has the cosine schedule"
    else:
        return scheduler
    without_effect = [f"`{name}`" for name in idle if getattr(noise_args, name) is not None]
    if without_effect:
        raise ValueError(
            f"{' and '.join(without_effect)} would have no effect: the scheduler of `pretrained_model_name_or_path` "
            f"{why}. Leave them out, or train from scratch."
        )
    return scheduler


def check_num_steps(num_steps: int, scheduler: LearnedVarianceDDPMScheduler) -> None:
    """Raises a `ValueError` for a validation with more sampling steps than the noise schedule has timesteps."""
    num_timesteps = scheduler.config.num_train_timesteps
    if num_steps > num_timesteps:
        raise ValueError(
            f"`validation_num_inference_steps` is {num_steps}; the noise schedule (`ddpm_num_steps`) allows "
            f"{num_timesteps} at most."
        )


def record_noise_schedule(model: ModelMixin, name: str, scheduler: SchedulerMixin | None) -> None:
    """
    Records the noise schedule of the run (None: clean images) in the config entry `noise_schedule` of `model`, and logs
    if it named another one. `name` is that of the model in the log.
    """
    before, now = model.config.noise_schedule, {} if scheduler is None else noise_schedule_of(scheduler)
    model.register_to_config(noise_schedule=now)
    if before is None or before == now:
        return
    if not before or not now or not is_same_noise(alphas_cumprod_of(before), alphas_cumprod_of(now)):
        logger.warning(
            f"The config of the {name} named the noise schedule {describe_noise_schedule(before)}. It is now trained "
            f"on, and names, the noise schedule {describe_noise_schedule(now)}."
        )


def load_model_config(
    model_class: type, subfolder: str, model_args: NetworkArguments, data_args: Any
) -> dict[str, Any]:
    """
    Loads the config of the network to train: that of the pretrained model, or the one named for training from scratch
    (a file, or a repository that holds it in `subfolder` or in its root).
    """
    load, from_scratch = model_class.load_config, model_args.model_config_name_or_path  # type: ignore[attr-defined]
    if model_args.pretrained_model_name_or_path is not None:
        return load_pretrained(load, subfolder, model_args, data_args)
    with reading("model_config_name_or_path", from_scratch):
        if os.path.isfile(from_scratch):
            return load(from_scratch)
        return from_subfolder_or_root(load, from_scratch, subfolder, cache_dir=data_args.cache_dir)


def check_config_keys(config: Mapping[str, Any], model_class: type, source: str | None) -> None:
    """Raises a `ValueError` for a key that is no argument of `model_class`: diffusers would ignore it."""
    known = list(inspect.signature(model_class.__init__).parameters)  # type: ignore[misc]
    for key in config:
        if key not in known and not key.startswith("_"):
            hint, name = did_you_mean(key, known, 1), model_class.__name__
            raise ValueError(f"The config {source} holds {key!r}, which is no argument of `{name}`.{hint}")


def choose_resolution(resolution: Size | None, config: Any, network: str, factor: int = 1) -> Size:
    """
    Returns the training resolution in pixels: `resolution`, or else the `sample_size` of the network's config; the side
    of a square, or height and width. Raises a `ValueError` for one that the network cannot downsample. `network` is its
    name in messages, and `factor` the downsampling of the autoencoder in front of it.
    """
    if resolution is None and config.sample_size is not None:
        resolution = as_sample_size([side * factor for side in as_size(config.sample_size)])
    if resolution is None:
        raise ValueError(
            f"The {network}'s config has no `sample_size`, so the resolution is not known. Pass `--resolution`."
        )
    sides = as_size(resolution)
    downsampling = factor * 2 ** (len(config.block_out_channels) - 1)
    if any(side % downsampling for side in sides):
        raised = [math.ceil(side / downsampling) * downsampling for side in sides]
        who = f"this {network} downsamples by {downsampling}"
        if factor > 1:
            who = f"the autoencoder downsamples by {factor} and this {network} by {downsampling // factor}"
        raise ValueError(
            f"The resolution is {describe_resolution(resolution)}; {who}, so it must be divisible by {downsampling}. "
            f"Pass e.g. `--resolution {size_argument(raised)}`."
        )
    return as_sample_size(sides)


def pretrained_pipeline_config(model_args: NetworkArguments, data_args: DataArguments) -> dict[str, Any]:
    """Config of the pretrained pipeline; empty without one, or for a repository without `model_index.json`."""
    with contextlib.suppress(OSError):
        if model_args.pretrained_model_name_or_path is not None:
            return DiffusionPipeline.load_config(
                model_args.pretrained_model_name_or_path, revision=model_args.revision, cache_dir=data_args.cache_dir
            )
    return {}


def pretrained_class_names(model_args: ModelArguments, data_args: DataArguments) -> dict[int, str]:
    """Class number -> name in the pretrained pipeline; empty if it names no classes."""
    names = pretrained_pipeline_config(model_args, data_args).get("id2label") or {}
    return {int(number): name for number, name in names.items()}


def pretrained_image_format(model_args: ModelArguments, data_args: DataArguments, channels: int) -> ImageFormat | None:
    """The format that the pretrained pipeline was trained on, whose images have `channels`; `None`: not recorded."""
    config = pretrained_pipeline_config(model_args, data_args).get("image_format")
    return None if config is None else ImageFormat.from_config(config, channels)


def begin_skip_report(accelerator: Accelerator, record: RunRecord, output_dir: str) -> SkipReport:
    """The report of images that are left out while training. That of another run is deleted, unless it is resumed."""
    skips = SkipReport(output_dir)
    if accelerator.is_main_process and record.checkpoint is None:
        skips.clear()
    return skips


def usable_images(
    images: datasets.Dataset,
    resolution: Size,
    data_args: DataArguments,
    accelerator: Accelerator,
    record: RunRecord,
    output_dir: str,
    **options: Any,
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """
    The usable ones of the images, and arguments of `ImageDataset`: with `no_check_images`, all of them, and what leaves
    out others as they are met. `options` are those of `check_images`.
    """
    if not data_args.no_check_images:
        report = output_dir if accelerator.is_main_process else None
        return check_images(images, resolution, output_dir=report, **options)[0], {}
    if not options.get("allow_unlabelled", True):
        images = keep_labelled(images)
    smallest = smallest_size(resolution, options.get("min_image_size"))
    return images, {"smallest": smallest, "skips": begin_skip_report(accelerator, record, output_dir)}


def training_image_format(
    images: datasets.Dataset, channels: int | None, known: ImageFormat | None, data_args: DataArguments
) -> ImageFormat:
    """
    The format of the training images, logged; see `data.formats.find_image_format`.

    Args:
        channels (`int`, *optional*): Of the network's images; `None`: those of the data.
        known (`ImageFormat`, *optional*): That of the pretrained model.
    """
    request = data_args.format_request(channels, known)
    if data_args.no_check_images and len(images) > NUM_FIRST_IMAGES:
        images = images.select([len(images) * place // NUM_FIRST_IMAGES for place in range(NUM_FIRST_IMAGES)])
    image_format = find_image_format(images, request, num_proc=data_args.image_check_num_proc)
    measured = ", measured" if data_args.value_range == ["auto"] else ""
    logger.info(f"The training data are {image_format}{measured}")
    return image_format
