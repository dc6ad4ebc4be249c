"""
Evaluates the variational bound of a saved model on a set of images, in bits per dimension.

    python -m diffusers_adm.evaluation.bits_per_dim --model runs/mine --dataset path/to/images --label_column label

`accelerate launch -m diffusers_adm.evaluation.bits_per_dim ...` shares the images between processes. `output_dir`
receives `bits_per_dim.json` and `bits_per_dim.png`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline

from ... import __version__
from ...commands.arguments import parse_args
from ...commands.errors import run_command
from ...commands.processes import join_processes
from ...data.checks import check_images
from ...data.columns import load_image_dataset
from ...data.images import ImageDataset
from ...data.labels import match_classes, renumber_labels
from ...data.repositories import check_can_be_written, from_subfolder_or_root, reading
from ...models.unet_2d_adagn import AdaGNUNet2DModel
from ...schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler, respaced_timesteps
from ..data import find_dataset, num_real_classes
from .bound import bits_per_dim


logger = logging.getLogger(__name__)

JSON_NAME, PLOT_NAME = "bits_per_dim.json", "bits_per_dim.png"


def _arg(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
    model: str = field(metadata={"help": "A pipeline, on the Hub or in a folder: `unet` and `scheduler` are read."})
    dataset: list[str] = field(
        metadata={
            "help": "A folder of images, whose subfolders are the labels; parquet files; or a dataset on the Hub, or "
            "the folder of a local copy of one."
        }
    )
    revision: str | None = _arg(None, "Of the model: a branch, a tag or a commit.")
    variant: str | None = _arg(None, "Of its weights, e.g. fp16.")
    dataset_config_name: str | None = _arg(None, "Of a dataset on the Hub: its configuration.")
    split: str | None = _arg(None, "The split to evaluate; needed where the dataset has several.")
    image_column: str = _arg("image", "The column of the images.")
    label_column: str | None = _arg(
        None, "The column of the labels; none: without classes, for which the network needs a null class if it has any."
    )
    cache_dir: str | None = _arg(None, "Where datasets and models are cached.")
    resolution: int | None = _arg(None, "Pixels; none: the `sample_size` of the model.")
    num_images: int | None = _arg(None, "Evaluate a random subset of this size.")
    batch_size: int = _arg(64, "Noisy images per process and forward pass.")
    timestep_respacing: str | None = _arg(None, "Of a shorter chain: 250, ddim50, or 10,10,15; none: all timesteps.")
    variance_type: Literal["learned_range", "learned_log", "fixed_small", "fixed_large"] | None = _arg(
        None, "None: what the model's scheduler says."
    )
    clip_sample: bool | None = _arg(None, "Clip the predicted image; none: as the model's scheduler says.")
    seed: int = _arg(0, "Of the noise and of the subset.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _arg(None, "None: as configured for Accelerate.")
    output_dir: str = _arg("bits-per-dim", "Where the results go.")

    def __post_init__(self) -> None:
        for name in ("resolution", "num_images", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        if self.revision is not None and os.path.isdir(self.model):
            raise ValueError(
                f"`revision` is {self.revision!r}, but `model` is a folder, which has no revisions. Leave it out."
            )


def _load(load: Callable[..., Any], args: Arguments, subfolder: str, **kwargs: Any) -> Any:
    kwargs |= {"revision": args.revision, "cache_dir": args.cache_dir}
    with reading("model", args.model):
        return from_subfolder_or_root(load, args.model, subfolder, **kwargs)


def load_scheduler(args: Arguments) -> LearnedVarianceDDPMScheduler:
    config = _load(LearnedVarianceDDPMScheduler.load_config, args, "scheduler")
    if config.get("_class_name") not in LearnedVarianceDDPMScheduler._compatibles:
        raise ValueError(
            f"The scheduler of {args.model!r} is a {config.get('_class_name')}, whose process has no such bound here. "
            "It must be a `LearnedVarianceDDPMScheduler`, a `DDPMScheduler`, or another with a config like theirs."
        )
    given = {} if args.variance_type is None else {"variance_type": args.variance_type}
    return LearnedVarianceDDPMScheduler.from_config(config, **given)


def load_index(args: Arguments) -> dict[str, Any]:
    """`model_index.json`, empty where the model has none."""
    try:
        index = DiffusionPipeline.load_config(args.model, revision=args.revision, cache_dir=args.cache_dir)
    except OSError:
        return {}
    if index.get("vae", [None])[0] is not None:
        raise ValueError(
            f"{args.model!r} diffuses the latents of an autoencoder. Their bound is not in bits of an image; "
            "evaluate a model of pixels."
        )
    return index


def check_network(args: Arguments, config: Any, scheduler: LearnedVarianceDDPMScheduler, resolution: Any) -> None:
    """Raises what the first forward pass would, before any data are read."""
    if config.in_channels != 3:
        raise ValueError(f"The network takes {config.in_channels} channels; this command evaluates RGB images: 3.")
    expected = 6 if scheduler.has_learned_variance else 3
    if config.out_channels != expected:
        raise ValueError(
            f"The network has {config.out_channels} output channels, but `variance_type` "
            f"{scheduler.config.variance_type!r} takes {expected}. Pass another `--variance_type`: "
            + ("fixed_small or fixed_large." if expected == 6 else "learned_range or learned_log.")
        )
    has_classes = config.num_class_embeds is not None or config.class_embed_type is not None
    if args.label_column is not None and not has_classes:
        raise ValueError("`label_column` was named, but the network has no class embedding. Leave `label_column` out.")
    if args.label_column is None and has_classes:
        if config.null_class_id is None:
            raise ValueError(
                "The network is class-conditional and has no null class, but no `label_column` was named. Name the "
                "column that holds the classes."
            )
        logger.warning("Without `label_column`, every image is evaluated as one of the network's null class.")
    if not isinstance(resolution, int):
        raise ValueError(f"The model's `sample_size` is {resolution!r}, no square size. Pass `--resolution`.")
    downsampling = 2 ** (len(config.block_out_channels) - 1)
    if resolution % downsampling:
        raise ValueError(f"The resolution is {resolution}; it must be divisible by {downsampling} for this network.")
    if config.sample_size is not None and resolution != config.sample_size:
        logger.warning(
            f"The resolution is {resolution}, but the model was made for {config.sample_size}. It is evaluated on "
            "images of a size that it has not learned."
        )


def main(argv: Sequence[str] | None = None) -> None:
    (args,) = parse_args(Arguments, argv, description=__doc__)
    for module in ("datasets", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"This command needs {module}. Install the extra: `pip install diffusers-adm[eval]`.")
    import datasets

    check_can_be_written("output_dir", args.output_dir)
    accelerator = join_processes(args.mixed_precision)
    if not accelerator.is_main_process:
        datasets.disable_progress_bars()

    # 1. model and process
    index, scheduler = load_index(args), load_scheduler(args)
    if args.timestep_respacing is not None:
        respaced_timesteps(scheduler.config.num_train_timesteps, args.timestep_respacing)  # raises
    unet = _load(AdaGNUNet2DModel.from_pretrained, args, "unet", variant=args.variant).to(accelerator.device)
    resolution = args.resolution or unet.config.sample_size
    check_network(args, unet.config, scheduler, resolution)

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
        images, _ = check_images(
            images,
            resolution,
            allow_unlabelled=id2label is None or unet.config.null_class_id is not None,
            output_dir=args.output_dir if accelerator.is_main_process else None,
        )
    data = ImageDataset(images, resolution, center_crop=True, random_flip=False)

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
    )
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        settings = vars(args) | {
            "resolution": resolution,
            "variance_type": scheduler.config.variance_type,
            "clip_sample": scheduler.config.clip_sample if args.clip_sample is None else args.clip_sample,
            "mixed_precision": accelerator.mixed_precision,
        }
        versions = {"diffusers_adm": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
        content = {**result.to_dict(), "settings": settings, "versions": versions}
        (output_dir / JSON_NAME).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        result.plot(output_dir / PLOT_NAME)
        print(f"{result}\n{output_dir / JSON_NAME}\n{output_dir / PLOT_NAME}")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
