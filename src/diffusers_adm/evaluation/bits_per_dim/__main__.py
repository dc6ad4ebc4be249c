"""
Evaluates the variational bound of a saved model on images, in bits per dimension.

    python -m diffusers_adm.evaluation.bits_per_dim --model runs/mine --dataset path/to/images --label_column label

`accelerate launch -m diffusers_adm.evaluation.bits_per_dim ...` shares the images between processes. The results are
`bits_per_dim.json` and `bits_per_dim.png` in `output_dir`.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ...commands.arguments import arg, check_at_least, parse_args
from ...commands.effects import check_effects
from ...commands.errors import run_command
from ...commands.processes import MixedPrecision, join_processes
from ...conditioning.image_format import ImageFormat, ImageMode, Size, as_size, describe_resolution, parse_size
from ...data.checks import check_images
from ...data.columns import load_image_dataset
from ...data.formats import FormatRequest, find_image_format, parse_value_range
from ...data.images import ImageDataset
from ...data.labels import match_classes, renumber_labels
from ...data.repositories import check_can_be_written, from_subfolder_or_root, reading
from ...measures.bound import bits_per_dim, learned_variance_scheduler
from ...models.unet_2d_adagn import AdaGNUNet2DModel
from ...schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler, VarianceType
from ...schedulers.timestep_spacing import respaced_timesteps
from ..common import REVISION_RULE, require, versions
from ..data import find_dataset, num_real_classes


logger = logging.getLogger(__name__)

JSON_NAME, PLOT_NAME = "bits_per_dim.json", "bits_per_dim.png"


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Pipeline, on the Hub or in a folder; `unet` and `scheduler` are loaded."})
    dataset: list[str] = field(
        metadata={
            "help": "Images: a folder whose subfolders are the labels, parquet files, a dataset on the Hub, or the "
            "folder of a local copy of one."
        }
    )
    revision: str | None = arg(None, "Branch, tag or commit of the model.")
    variant: str | None = arg(None, "Variant of the weights, e.g. fp16.")
    dataset_config_name: str | None = arg(None, "Configuration of a dataset on the Hub.")
    split: str | None = arg(None, "Split of the dataset; required if it has several.")
    image_column: str = arg("image", "Column of the images.")
    label_column: str | None = arg(None, "Column of the labels. None: without labels, as the network's null class.")
    cache_dir: str | None = arg(None, "Cache folder of datasets and models.")
    image_mode: ImageMode | None = arg(
        None,
        "Meaning of the channels: L (grey), LA, RGB, RGBA (A is alpha), or array (no colours). None: the model's.",
    )
    value_range: list[str] | None = arg(
        None,
        "Values of the data for -1 and 1, LOW HIGH; auto: measured over the images. None: the model's, or the whole "
        "range of the integer type.",
    )
    resolution: Size | None = arg(
        None,
        "Image size in pixels: the side of a square, or HEIGHTxWIDTH. None: the model's `sample_size`.",
        parse=functools.partial(parse_size, "resolution"),
    )
    num_images: int | None = arg(None, "Size of a random subset to evaluate. None: all images.")
    batch_size: int = arg(64, "Noisy images per process and forward pass.")
    timestep_respacing: str | None = arg(None, "Fewer timesteps: 250, ddim50, or 10,10,15. None: all.")
    variance_type: VarianceType | None = arg(
        None, "Variance of the reverse process. None: that of the model's scheduler."
    )
    clip_sample: bool | None = arg(None, "Clip the predicted image. None: as in the model's scheduler.")
    seed: int = arg(0, "Random seed of the noise and of the subset.")
    mixed_precision: MixedPrecision | None = arg(None, "None: as configured for Accelerate.")
    output_dir: str = arg("bits-per-dim", "Folder for the results.")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_images", "batch_size")
        parse_value_range("value_range", self.value_range)
        check_effects(self, rules=(REVISION_RULE,))


def _load(load: Callable[..., Any], args: Arguments, subfolder: str, **kwargs: Any) -> Any:
    kwargs |= {"revision": args.revision, "cache_dir": args.cache_dir}
    with reading("model", args.model):
        return from_subfolder_or_root(load, args.model, subfolder, **kwargs)


def load_index(args: Arguments) -> dict[str, Any]:
    """Loads `model_index.json`; empty if there is none."""
    try:
        index = DiffusionPipeline.load_config(args.model, revision=args.revision, cache_dir=args.cache_dir)
    except OSError:
        return {}
    if index.get("vae", [None])[0] is not None:
        raise ValueError(f"{args.model!r} is a model of an autoencoder's latents. Pass a model of pixels.")
    return index


def check_network(args: Arguments, config: Any, resolution: Size | None) -> None:
    """Checks what the network itself does not, before any data are read."""
    has_classes = config.num_class_embeds is not None or config.class_embed_type is not None
    if args.label_column is not None and not has_classes:
        raise ValueError("`label_column` was passed, but the network has no class embedding. Omit it.")
    if args.label_column is None and has_classes:
        logger.warning("Without `label_column`, every image is evaluated with the network's null class.")
    if resolution is None:
        raise ValueError("The model's config has no `sample_size`. Pass `--resolution`.")
    if config.sample_size is not None and as_size(resolution) != as_size(config.sample_size):
        logger.warning(
            f"The resolution is {describe_resolution(resolution)}, but the model was trained at "
            f"{describe_resolution(config.sample_size)}."
        )


def recorded_format(index: dict[str, Any], channels: int) -> ImageFormat | None:
    """The format of the images of training in `model_index.json`; `None`: not recorded."""
    recorded = index.get("image_format")
    return None if recorded is None else ImageFormat.from_config(recorded, channels)


def check_range(value_range: Sequence[float] | str | None, known: ImageFormat | None) -> None:
    """Raises a `ValueError` for another range than that of training; "auto" is checked once it is known."""
    if value_range in (None, "auto") or known is None or tuple(map(float, value_range)) == known.value_range:
        return
    low, high = map(float, value_range)
    raise ValueError(
        f"`--value_range` is {low:g} {high:g}, but the model was trained on {known}. Its bits per dimension can only "
        "be measured with this range: leave `--value_range` out, and convert images of another range to this one."
    )


def check_levels(image_format: ImageFormat) -> None:
    if image_format.num_levels is None:
        raise ValueError(
            f"These are {image_format}. Values without levels have a probability density, whose bits depend on the "
            "unit and cannot be compared with those of levels, so this command does not measure them. The function "
            "`bits_per_dim(..., num_levels=None)` does."
        )


def main(argv: Sequence[str] | None = None) -> None:
    (args,) = parse_args(Arguments, argv, description=__doc__)
    require("datasets", "matplotlib")
    import datasets

    check_can_be_written("output_dir", args.output_dir)
    accelerator = join_processes(args.mixed_precision)
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()

    # 1. model and process
    index = load_index(args)
    config = _load(LearnedVarianceDDPMScheduler.load_config, args, "scheduler")
    given = {} if args.variance_type is None else {"variance_type": args.variance_type}
    scheduler = learned_variance_scheduler(config.get("_class_name"), config, **given)
    if args.timestep_respacing is not None:
        respaced_timesteps(scheduler.config.num_train_timesteps, args.timestep_respacing)  # raises
    unet = _load(AdaGNUNet2DModel.from_pretrained, args, "unet", variant=args.variant).to(accelerator.device)
    resolution = args.resolution or unet.config.sample_size
    check_network(args, unet.config, resolution)
    channels, value_range = unet.config.in_channels, parse_value_range("value_range", args.value_range)
    known = recorded_format(index, channels)
    check_range(value_range, known)

    # 2. data
    with accelerator.main_process_first():
        images, id2label = load_image_dataset(
            **find_dataset(args.dataset, args.dataset_config_name, args.split),
            image_column=args.image_column,
            label_column=args.label_column,
            cache_dir=args.cache_dir,
            max_train_samples=args.num_images,
            seed=args.seed,
        )
        if id2label is not None:
            num_classes = num_real_classes(unet.config)
            to_class = match_classes(id2label, index.get("id2label"), num_classes, by_number=True)
            images = renumber_labels(images, to_class)
        request = FormatRequest(channels, args.image_mode, value_range, known)
        image_format = find_image_format(images, request)
        check_range(image_format.value_range, known)
        check_levels(image_format)
        images, _ = check_images(
            images,
            resolution,
            image_format=image_format,
            allow_unlabelled=id2label is None or unet.config.null_class_id is not None,
            output_dir=args.output_dir if accelerator.is_main_process else None,
            range_argument=None,
        )
    data = ImageDataset(images, resolution, center_crop=True, random_flip=False, image_format=image_format)

    # 3. the bound
    result = bits_per_dim(
        unet,
        scheduler,
        data,
        batch_size=args.batch_size,
        timestep_respacing=args.timestep_respacing,
        clip_sample=args.clip_sample,
        seed=args.seed,
        accelerator=accelerator,
        num_levels=data.image_format.num_levels,
    )
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        settings = vars(args) | {
            "resolution": resolution,
            "image_format": data.image_format.to_config(),
            "variance_type": scheduler.config.variance_type,
            "clip_sample": scheduler.config.clip_sample if args.clip_sample is None else args.clip_sample,
            "mixed_precision": accelerator.mixed_precision,
        }
        content = {**result.to_dict(), "settings": settings, "versions": versions()}
        (output_dir / JSON_NAME).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        result.plot(output_dir / PLOT_NAME)
        print(f"{result}\n{output_dir / JSON_NAME}\n{output_dir / PLOT_NAME}")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
