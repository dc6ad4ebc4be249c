#!/usr/bin/env python
"""
Trains an ablated diffusion model with a learned variance, from scratch or from a pretrained one.

    accelerate launch training/train_adm.py --config training/configs/emoji_32.yaml --output_dir runs/emoji

Nichol & Dhariwal 2021 (https://huggingface.co/papers/2102.09672), Dhariwal & Nichol 2021
(https://huggingface.co/papers/2105.05233). Every argument may stand in the recipe and be overridden on the command
line; `--help` lists them.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import math
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import datasets
import numpy as np
import torch
import transformers
import yaml
from accelerate import Accelerator, skip_first_batches
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.training import (
    EpochShuffleSampler,
    ImageDataset,
    LossMetrics,
    LossSecondMomentTimestepSampler,
    MetricsHistory,
    TrainingProgress,
    UniformTimestepSampler,
    check_batch_fits,
    check_images,
    check_objective,
    delete_checkpoints,
    ema_weights,
    find_latest_checkpoint,
    from_subfolder_or_root,
    labelled_grid,
    load_image_dataset,
    parse_args,
    plot_loss_curves,
    reading,
    resume_checkpoint,
    save_checkpoint,
    seed_step,
    training_losses,
)


logger = get_logger("train_adm")

TIMESTEP_SAMPLERS = {"uniform": UniformTimestepSampler, "loss-second-moment": LossSecondMomentTimestepSampler}


def arg(default, help: str):
    return field(default=default, metadata={"help": help})


def check_at_least(arguments: object, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            raise ValueError(f"`{name}` is {value}; it must be at least {minimum}.")


@dataclass
class ModelArguments:
    pretrained_model_name_or_path: str | None = arg(
        None, "Fine-tune: a pipeline on the Hub or in a folder, of which `unet` and `scheduler` are read."
    )
    revision: str | None = arg(None, "Of the pretrained pipeline: a branch, a tag or a commit.")
    variant: str | None = arg(None, "Of the pretrained weights, e.g. fp16.")
    model_config_name_or_path: str | None = arg(
        None, "From scratch: the config of the U-Net (a JSON file, or a folder or Hub repository that holds one)."
    )
    class_dropout_prob: float = arg(
        0.1, "Share of the labels replaced by the null class, so that the model can be guided without a classifier."
    )
    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass to save memory.")
    channels_last: bool = arg(False, "Keep weights and images in channels-last memory format.")

    def __post_init__(self):
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` is {self.class_dropout_prob}; it must lie in [0, 1].")


@dataclass
class DataArguments:
    dataset_name: str | None = arg(None, "A dataset on the Hub, or the path of a local copy.")
    dataset_config_name: str | None = arg(None, "Its configuration.")
    train_data_dir: str | None = arg(None, "A folder of images; the names of its subfolders are the labels.")
    data_files: list[str] | None = arg(None, "Parquet files.")
    split: str = arg("train", "The split to train on.")
    image_column: str = arg("image", "The column of the images.")
    label_column: str | None = arg(None, "The column of the labels; none: train without classes.")
    cache_dir: str | None = arg(None, "Where datasets and pretrained models are cached.")
    max_train_samples: int | None = arg(None, "Train on a random subset of this size.")
    resolution: int | None = arg(None, "Pixels; none: the `sample_size` of the model.")
    center_crop: bool = arg(False, "Crop at the centre instead of at random.")
    random_flip: bool = arg(False, "Mirror half of the images. Not for text, flags or anatomy.")
    min_image_size: int | None = arg(None, "Leave out images whose shorter side is below; none: half the resolution.")
    dataloader_num_workers: int = arg(0, "Processes that load images; 0: the training process itself.")
    image_check_num_proc: int | None = arg(None, "Processes that check the images before training.")

    def __post_init__(self):
        check_at_least(self, 1, "resolution", "image_check_num_proc")
        check_at_least(self, 0, "min_image_size", "dataloader_num_workers")


@dataclass
class DiffusionArguments:
    """None: what the pretrained scheduler says, or the default in parentheses."""

    ddpm_num_steps: int | None = arg(None, "Length of the noising chain (1000).")
    ddpm_beta_schedule: (
        Literal["linear", "scaled_linear", "quadratic", "cosine", "squaredcos_cap_v2", "sigmoid"] | None
    ) = arg(None, "How the noise grows (linear); cosine and squaredcos_cap_v2 are the same.")
    beta_start: float | None = arg(None, "First beta (0.0001).")
    beta_end: float | None = arg(None, "Last beta (0.02).")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = arg(None, "What is predicted (epsilon).")
    variance_type: Literal["learned_range", "learned_log", "fixed_small", "fixed_large"] | None = arg(
        None, "The variance of a reverse step (learned_range)."
    )
    objective: Literal["simple", "hybrid", "hybrid_unscaled", "vlb"] = arg(
        "hybrid", "The loss: simple (squared error), hybrid (with the bound, for the variance), or vlb (the bound)."
    )
    snr_gamma: float | None = arg(None, "Min-SNR weighting of the squared error; 5.0 is usual.")
    timestep_sampler: Literal["uniform", "loss-second-moment"] = arg(
        "uniform", "How timesteps are drawn; loss-second-moment is meant for vlb."
    )

    def __post_init__(self):
        check_at_least(self, 1, "ddpm_num_steps")


@dataclass
class TrainingArguments:
    output_dir: str = arg("adm-model", "Where the pipeline, checkpoints, curves and grids go.")
    seed: int = arg(0, "Of everything random.")
    train_batch_size: int = arg(16, "Images per process and forward pass.")
    num_train_epochs: int = arg(100, "Passes over the images, unless `max_train_steps` is given.")
    max_train_steps: int | None = arg(None, "Optimizer steps.")
    gradient_accumulation_steps: int = arg(1, "Forward passes per optimizer step.")
    learning_rate: float = arg(1e-4, "After warm-up.")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = arg(
        "constant_with_warmup", "How the learning rate changes."
    )
    lr_warmup_steps: int = arg(500, "Optimizer steps of warm-up.")
    adam_beta1: float = arg(0.9, "Of AdamW.")
    adam_beta2: float = arg(0.999, "Of AdamW.")
    adam_weight_decay: float = arg(0.0, "Of AdamW.")
    adam_epsilon: float = arg(1e-8, "Of AdamW.")
    max_grad_norm: float = arg(1.0, "Gradients are scaled down to this norm.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = arg(None, "None: as configured for Accelerate.")
    allow_tf32: bool = arg(False, "Let float32 matrix products run in TF32, as PyTorch's convolutions do anyway.")
    use_ema: bool = arg(True, "Keep an exponential moving average of the weights; samples and the result use it.")
    ema_max_decay: float = arg(0.9999, "The decay that the average warms up to.")
    ema_inv_gamma: float = arg(1.0, "Of the warm-up, decay = 1 - (1 + step / inv_gamma) ** -power.")
    ema_power: float = arg(3 / 4, "Of the warm-up.")
    checkpointing_steps: int = arg(1000, "Optimizer steps between checkpoints.")
    checkpoints_total_limit: int | None = arg(None, "Keep this many; none: all.")
    resume_from_checkpoint: str | None = arg(None, "`latest`, or a checkpoint folder.")
    overwrite_output_dir: bool = arg(False, "Start anew where another run left checkpoints, and delete those.")
    logging_steps: int = arg(20, "Optimizer steps between rows of the curves.")
    logging_dir: str = arg("logs", "For TensorBoard, below `output_dir`.")
    report_to: Literal["tensorboard", "none"] = arg("tensorboard", "Where curves and grids go beside the PNG files.")
    validation_steps: int | None = arg(None, "Optimizer steps between sample grids; none: only at the end.")
    num_validation_images: int = arg(16, "Images in a grid; with classes they go through the labels.")
    validation_num_inference_steps: int = arg(50, "Sampling steps of a grid.")
    validation_guidance_scale: float = arg(1.0, "Classifier-free guidance of a grid; 1 is off.")

    def __post_init__(self):
        check_at_least(self, 1, "train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
        check_at_least(self, 1, "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "logging_steps")
        check_at_least(self, 1, "validation_steps", "num_validation_images", "validation_num_inference_steps")
        check_at_least(self, 0, "lr_warmup_steps")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be positive.")
        if not 0 <= self.ema_max_decay < 1:
            raise ValueError(f"`ema_max_decay` is {self.ema_max_decay}; it must lie in [0, 1).")


def build_scheduler(
    model_args: ModelArguments, data_args: DataArguments, diffusion_args: DiffusionArguments
) -> LearnedVarianceDDPMScheduler:
    arguments = {
        "num_train_timesteps": diffusion_args.ddpm_num_steps,
        "beta_schedule": diffusion_args.ddpm_beta_schedule,
        "beta_start": diffusion_args.beta_start,
        "beta_end": diffusion_args.beta_end,
        "prediction_type": diffusion_args.prediction_type,
        "variance_type": diffusion_args.variance_type,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    pretrained = model_args.pretrained_model_name_or_path
    if pretrained is None:
        scheduler = LearnedVarianceDDPMScheduler(**given)
    else:
        with reading("pretrained_model_name_or_path", pretrained):
            scheduler = from_subfolder_or_root(
                LearnedVarianceDDPMScheduler.from_pretrained,
                pretrained,
                "scheduler",
                revision=model_args.revision,
                cache_dir=data_args.cache_dir,
                **given,
            )
    check_objective(scheduler, diffusion_args.objective, diffusion_args.snr_gamma)
    if scheduler.has_learned_variance and diffusion_args.objective == "simple":
        logger.warning("`objective` simple does not train the variance; pass hybrid, or `variance_type` fixed_small.")
    return scheduler


def load_unet_config(
    model_args: ModelArguments, data_args: DataArguments, scheduler: LearnedVarianceDDPMScheduler
) -> dict[str, Any]:
    """The config of the network, read before any data, since it may not fit the scheduler."""
    pretrained, from_scratch = model_args.pretrained_model_name_or_path, model_args.model_config_name_or_path
    if pretrained is not None:
        with reading("pretrained_model_name_or_path", pretrained):
            config = from_subfolder_or_root(
                AdaGNUNet2DModel.load_config,
                pretrained,
                "unet",
                revision=model_args.revision,
                cache_dir=data_args.cache_dir,
            )
    else:
        with reading("model_config_name_or_path", from_scratch):
            if os.path.isfile(from_scratch):
                config = AdaGNUNet2DModel.load_config(from_scratch)
            else:
                load = AdaGNUNet2DModel.load_config
                config = from_subfolder_or_root(load, from_scratch, "unet", cache_dir=data_args.cache_dir)
        if config.get("_class_name") == "AdaGNClassifierModel":
            raise ValueError(f"{from_scratch} is the config of a classifier; this script trains U-Nets.")
        known = list(inspect.signature(AdaGNUNet2DModel.__init__).parameters)
        for key in config:
            if key not in known and not key.startswith("_"):  # diffusers would pass over it
                close = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean `{close[0]}`?" if close else ""
                raise ValueError(f"The config {from_scratch} holds {key!r}, which `AdaGNUNet2DModel` has not.{hint}")
    # Defaults of the constructor, for a config written by hand that leaves them out.
    in_channels, out_channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if in_channels != 3:
        raise ValueError(
            f"The U-Net takes {in_channels} channels; this script trains on RGB images: 3. (Upsamplers, with 6, it "
            "cannot train.)"
        )
    expected = in_channels * (2 if scheduler.has_learned_variance else 1)
    if out_channels != expected:
        raise ValueError(
            f"The U-Net has {out_channels} output channels for {in_channels} input channels, but `variance_type` "
            f"{scheduler.config.variance_type!r} needs {expected}. Change `out_channels` in its config, or pass "
            "`--variance_type fixed_small --objective simple` for a network without learned variance."
        )
    return config


def build_unet(
    model_args: ModelArguments, data_args: DataArguments, config: dict[str, Any], num_classes: int | None
) -> AdaGNUNet2DModel:
    """The network, its class embedding fitted to the data; refuses what would train something else than asked for."""
    pretrained = model_args.pretrained_model_name_or_path
    if pretrained is not None:
        with reading("pretrained_model_name_or_path", pretrained):
            unet = from_subfolder_or_root(
                AdaGNUNet2DModel.from_pretrained,
                pretrained,
                "unet",
                revision=model_args.revision,
                variant=model_args.variant,
                cache_dir=data_args.cache_dir,
            )
    else:
        if num_classes is not None and config.get("num_class_embeds") is None:
            with_null = model_args.class_dropout_prob > 0
            config = {**config, "num_class_embeds": num_classes + with_null}
            config["null_class_id"] = num_classes if with_null else None
        unet = AdaGNUNet2DModel.from_config(config)
    config = unet.config

    if num_classes is None and config.num_class_embeds is not None and config.null_class_id is None:
        raise ValueError(
            f"The U-Net is class-conditional ({config.num_class_embeds} classes, no null class), but no `label_column` "
            "was named. Name the column that holds the classes."
        )
    if num_classes is not None:
        if config.num_class_embeds is None:
            raise ValueError(
                "`label_column` was named, but the pretrained U-Net has no class embedding. Leave `label_column` out."
            )
        room = config.num_class_embeds - (config.null_class_id is not None)
        if num_classes > room or (config.null_class_id is not None and config.null_class_id < num_classes):
            raise ValueError(
                f"The data has {num_classes} classes, but the U-Net has room for {room} (`num_class_embeds` "
                f"{config.num_class_embeds}, null class {config.null_class_id}). Leave `num_class_embeds` out of a "
                "config for training from scratch, so that the data sets it; for fine-tuning, use the same classes."
            )
        if model_args.class_dropout_prob > 0 and config.null_class_id is None:
            raise ValueError(
                f"`class_dropout_prob` is {model_args.class_dropout_prob}, but the U-Net has no null class "
                "(`null_class_id`) to drop to. Pass `--class_dropout_prob 0`."
            )
    return unet


def warn_of_other_classes(model_args: ModelArguments, data_args: DataArguments, id2label: dict[int, str]) -> None:
    """One class folder less moves the numbers of those that follow: each would be trained as its neighbour."""
    with contextlib.suppress(OSError):  # a folder without `model_index.json` names no classes
        index = ADMPipeline.load_config(
            model_args.pretrained_model_name_or_path, revision=model_args.revision, cache_dir=data_args.cache_dir
        )
        learned = index.get("id2label") or {}
        moved = [i for i, name in id2label.items() if learned.get(str(i), name) != name]
        if moved:
            logger.warning(
                f"{len(moved)} classes of the pretrained model have other names in the data: {moved[0]} is "
                f"{learned[str(moved[0])]!r} there and {id2label[moved[0]]!r} here. Unless it shall learn new classes, "
                "give the data the same ones, in the same order."
            )


def sample_grid(
    unet: AdaGNUNet2DModel,
    scheduler: LearnedVarianceDDPMScheduler,
    id2label: dict[int, str] | None,
    training_args: TrainingArguments,
) -> Image.Image:
    """Validation images from fixed noise, so that grids of different steps can be compared. One row per class."""
    total = training_args.num_validation_images
    classes = sorted(id2label)[:total] if id2label is not None else None
    rows = len(classes) if classes else math.ceil(math.sqrt(total))
    cols = math.ceil(total / rows)
    pipeline = ADMPipeline(
        unet=unet,
        # A copy: sampling chooses timesteps, and a component that is shared with training must not change.
        scheduler=LearnedVarianceDDPMScheduler.from_config(scheduler.config),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        classifier=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    labels = [label for label in classes for _ in range(cols)][:total] if classes else None
    images = []
    for start in range(0, total, training_args.train_batch_size):
        count = min(training_args.train_batch_size, total - start)
        images += pipeline(
            class_labels=labels[start : start + count] if labels else None,
            batch_size=count,
            num_inference_steps=training_args.validation_num_inference_steps,
            guidance_scale=training_args.validation_guidance_scale if labels else 1.0,
            generator=[torch.Generator().manual_seed(training_args.seed + start + i) for i in range(count)],
        ).images
    row_labels = [id2label[label] for label in classes] if classes else None
    return labelled_grid(images, rows, cols, row_labels=row_labels, scale=max(1, 64 // images[0].width))


def main(argv: list[str] | None = None) -> None:
    types = (ModelArguments, DataArguments, DiffusionArguments, TrainingArguments)
    model_args, data_args, diffusion_args, training_args = parse_args(types, argv, description=__doc__)
    if (model_args.pretrained_model_name_or_path is None) == (model_args.model_config_name_or_path is None):
        raise ValueError(
            "Pass either `--model_config_name_or_path` (from scratch) or `--pretrained_model_name_or_path` (fine-tune)."
        )
    output_dir = training_args.output_dir

    # 1. processes, logging, trackers
    accelerator = Accelerator(
        # Unless told so, Accelerate takes each of several processes without a GPU for the only one.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=training_args.gradient_accumulation_steps,
        mixed_precision=training_args.mixed_precision,
        log_with=None if training_args.report_to == "none" else training_args.report_to,
        project_config=ProjectConfiguration(
            project_dir=output_dir, logging_dir=os.path.join(output_dir, training_args.logging_dir)
        ),
        # The others wait while the main process checks the images or draws a grid; NCCL would give up after 10 minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
    )
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        level=logging.WARNING if accelerator.is_main_process else logging.ERROR,
    )
    if accelerator.is_main_process:  # not of the libraries, which report each file of a checkpoint and each download
        for name in ("train_adm", "diffusers_adm"):
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
    settings = {k: v for a in (model_args, data_args, diffusion_args, training_args) for k, v in vars(a).items()}
    logger.info(accelerator.state, main_process_only=True)

    # 2. diffusion process and data: the cheap checks first
    noise_scheduler = build_scheduler(model_args, data_args, diffusion_args)
    chain = noise_scheduler.config.num_train_timesteps
    if training_args.validation_num_inference_steps > chain:
        raise ValueError(
            f"`validation_num_inference_steps` is {training_args.validation_num_inference_steps}, but the noising "
            f"chain (`ddpm_num_steps`) has {chain} steps. Pass `--validation_num_inference_steps {chain}` or less."
        )
    unet_config = load_unet_config(model_args, data_args, noise_scheduler)
    if training_args.validation_guidance_scale != 1 and data_args.label_column is None:
        raise ValueError(
            f"`validation_guidance_scale` is {training_args.validation_guidance_scale}, but without a `label_column` "
            "there are no classes to guide towards. Leave it at 1."
        )
    with accelerator.main_process_first():
        images, id2label = load_image_dataset(
            dataset_name=data_args.dataset_name,
            dataset_config_name=data_args.dataset_config_name,
            train_data_dir=data_args.train_data_dir,
            data_files=data_args.data_files,
            split=data_args.split,
            image_column=data_args.image_column,
            label_column=data_args.label_column,
            cache_dir=data_args.cache_dir,
            max_train_samples=data_args.max_train_samples,
            seed=training_args.seed,
        )
        num_classes = len(id2label) if id2label is not None else None
        # The same random numbers on every process, and in every run with this seed.
        torch.manual_seed(training_args.seed)
        unet = build_unet(model_args, data_args, unet_config, num_classes)
        null_class_id = unet.config.null_class_id
        if num_classes and null_class_id is None and training_args.validation_guidance_scale != 1:
            raise ValueError(
                f"`validation_guidance_scale` is {training_args.validation_guidance_scale}, but the U-Net has no null "
                "class to guide away from. Leave it at 1, or train with `--class_dropout_prob 0.1`."
            )
        resolution = data_args.resolution or unet.config.sample_size
        if not isinstance(resolution, int):
            raise ValueError(
                f"The resolution is {resolution!r}: the U-Net's `sample_size` does not name a square size. Pass "
                "`--resolution`."
            )
        downsampling = 2 ** (len(unet.config.block_out_channels) - 1)
        if resolution % downsampling:
            raise ValueError(
                f"The resolution is {resolution}; this U-Net halves images {len(unet.config.block_out_channels) - 1} "
                f"times, so it must be divisible by {downsampling}. Pass e.g. `--resolution "
                f"{math.ceil(resolution / downsampling) * downsampling}`."
            )
        unet.register_to_config(sample_size=resolution)
        images, _ = check_images(
            images,
            resolution,
            min_image_size=data_args.min_image_size,
            allow_unlabelled=num_classes is None or null_class_id is not None,
            num_proc=data_args.image_check_num_proc,
            output_dir=output_dir if accelerator.is_main_process else None,
        )
    if id2label is not None and model_args.pretrained_model_name_or_path is not None:
        warn_of_other_classes(model_args, data_args, id2label)
    check_batch_fits(len(images), training_args.train_batch_size, accelerator.num_processes)
    train_dataset = ImageDataset(
        images, resolution, data_args.center_crop, data_args.random_flip, seed=training_args.seed
    )
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset,
        batch_size=training_args.train_batch_size,
        sampler=EpochShuffleSampler(train_dataset),
        num_workers=data_args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        drop_last=True,
    )

    # 3. optimizer, learning rate, average
    if model_args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if model_args.channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=training_args.learning_rate,
        betas=(training_args.adam_beta1, training_args.adam_beta2),
        weight_decay=training_args.adam_weight_decay,
        eps=training_args.adam_epsilon,
    )
    unet, optimizer, train_dataloader = accelerator.prepare(unet, optimizer, train_dataloader)
    steps_per_epoch = math.ceil(len(train_dataloader) / training_args.gradient_accumulation_steps)
    max_train_steps = training_args.max_train_steps or training_args.num_train_epochs * steps_per_epoch
    # Not prepared: Accelerate would step it once per process, for examples instead of optimizer steps.
    lr_scheduler = get_scheduler(
        training_args.lr_scheduler,
        optimizer=optimizer.optimizer,
        num_warmup_steps=training_args.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )
    ema = None
    if training_args.use_ema:
        ema = EMAModel(
            accelerator.unwrap_model(unet).parameters(),
            decay=training_args.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=training_args.ema_inv_gamma,
            power=training_args.ema_power,
            foreach=True,
        )
    timestep_sampler = TIMESTEP_SAMPLERS[diffusion_args.timestep_sampler](noise_scheduler.config.num_train_timesteps)
    progress = TrainingProgress()
    accelerator.register_for_checkpointing(lr_scheduler, timestep_sampler, progress, *([ema] if ema else []))

    # 4. resume
    if training_args.resume_from_checkpoint is None and find_latest_checkpoint(output_dir) is not None:
        # A new run would mix with it: `latest` finds the highest step, whoever wrote it.
        if not training_args.overwrite_output_dir:
            raise ValueError(
                f"`output_dir` {output_dir!r} holds {os.path.basename(find_latest_checkpoint(output_dir))} of another "
                "run. Pass `--resume_from_checkpoint latest` to go on with it, `--overwrite_output_dir` to delete its "
                "checkpoints and start anew, or another `--output_dir`."
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            delete_checkpoints(output_dir)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.makedirs(output_dir, exist_ok=True)
        # Reads back as a recipe: `--config <output_dir>/train_args.yaml`.
        with open(os.path.join(output_dir, "train_args.yaml"), "w", encoding="utf-8") as file:
            yaml.safe_dump(settings, file, sort_keys=False)
    resume_checkpoint(accelerator, output_dir, training_args.resume_from_checkpoint)
    if ema is not None:
        ema.to(accelerator.device)
    metrics = LossMetrics(noise_scheduler.config.num_train_timesteps, accelerator.device)
    history = MetricsHistory(os.path.join(output_dir, "metrics.jsonl"))
    if accelerator.is_main_process:
        history.rewind(progress.global_step)
    accelerator.init_trackers(
        "train",
        config={k: str(v) for k, v in settings.items()},
        # TensorBoard, too, drops what this run writes again.
        init_kwargs={"tensorboard": {"purge_step": progress.global_step + 1}},
    )

    total_batch_size = (
        training_args.train_batch_size * accelerator.num_processes * training_args.gradient_accumulation_steps
    )
    logger.info(
        f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f}M parameters, {len(images)} images"
        + (f" in {num_classes} classes" if num_classes else "")
        + f" at {resolution} x {resolution}, {total_batch_size} per optimizer step; steps {progress.global_step} to "
        f"{max_train_steps}, {steps_per_epoch} an epoch"
    )

    def validate() -> None:
        """Grid and curves, on the main process; the others wait for it."""
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            model = accelerator.unwrap_model(unet)
            averaged = ema_weights(ema, model.parameters()) if ema is not None else contextlib.nullcontext()
            model.eval()
            try:
                with averaged, accelerator.autocast():
                    grid = sample_grid(model, noise_scheduler, id2label, training_args)
            finally:
                model.train()
            grid.save(os.path.join(output_dir, f"samples-{progress.global_step:07d}.png"))
            if history.rows():
                plot_loss_curves(history.rows(), os.path.join(output_dir, "loss_curves.png"))
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.writer.add_image("samples", np.asarray(grid), progress.global_step, dataformats="HWC")
        accelerator.wait_for_everyone()

    # 5. train
    progress_bar = tqdm(
        total=max_train_steps,
        initial=progress.global_step,
        desc="Training",
        disable=not accelerator.is_local_main_process,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file keeps every update
    )
    window_start, window_step = time.perf_counter(), progress.global_step
    unet.train()
    while progress.global_step < max_train_steps:
        if progress.batch_in_epoch >= len(train_dataloader):  # also: resumed with larger batches, or fewer of them
            progress.epoch, progress.batch_in_epoch = progress.epoch + 1, 0
        # `set_epoch` reaches the dataset, whose shuffling, crops and flips depend on it.
        epoch_dataloader = train_dataloader
        if progress.batch_in_epoch:
            epoch_dataloader = skip_first_batches(train_dataloader, progress.batch_in_epoch)
        epoch_dataloader.set_epoch(progress.epoch)
        for batch in epoch_dataloader:
            seed_step(training_args.seed, accelerator.process_index, progress.micro_step)
            with accelerator.accumulate(unet):
                pixels = batch["images"]  # (B, 3, H, W) in [-1, 1]
                if model_args.channels_last:
                    pixels = pixels.contiguous(memory_format=torch.channels_last)
                model_kwargs = {}
                if num_classes is not None:
                    class_labels = batch["class_labels"]  # (B,), -1 for unlabelled
                    if null_class_id is not None:
                        dropped = torch.rand(class_labels.shape, device=pixels.device) < model_args.class_dropout_prob
                        class_labels = class_labels.masked_fill(dropped | (class_labels < 0), null_class_id)
                    model_kwargs["class_labels"] = class_labels
                timesteps, weights = timestep_sampler.sample(pixels.shape[0], device=pixels.device)
                terms = training_losses(
                    unet,
                    noise_scheduler,
                    pixels,
                    timesteps,
                    objective=diffusion_args.objective,
                    snr_gamma=diffusion_args.snr_gamma,
                    model_kwargs=model_kwargs,
                )
                # Both see the loss as it is: the sampler would learn from its own weights.
                timestep_sampler.update(timesteps, terms.loss.detach())
                vb = terms.vb.detach() if diffusion_args.objective != "simple" else None
                metrics.update(timesteps, terms.loss.detach(), terms.mse.detach(), vb, weights)
                accelerator.backward((terms.loss * weights).mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), training_args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            progress.micro_step += 1
            progress.batch_in_epoch += 1
            if not accelerator.sync_gradients:
                continue

            if not accelerator.optimizer_step_was_skipped:  # by the gradient scaler of fp16
                lr_scheduler.step()
            if ema is not None:
                ema.step(accelerator.unwrap_model(unet).parameters())
            progress.global_step += 1
            progress_bar.update()
            is_last = progress.global_step == max_train_steps
            save_now = progress.global_step % training_args.checkpointing_steps == 0 or is_last

            # A checkpoint ends a row, too: it does not hold the sums of an unfinished one.
            if progress.global_step % training_args.logging_steps == 0 or save_now:
                values = metrics.compute(accelerator)  # collective, and the one place that waits for the device
                metrics.reset()
                if not math.isfinite(values["loss"]):
                    raise RuntimeError(
                        f"The loss is {values['loss']} at step {progress.global_step}. Resume an earlier checkpoint "
                        "with a lower `--learning_rate`, or with `--mixed_precision bf16` or `no` instead of fp16."
                    )
                now = time.perf_counter()
                images_per_second = (progress.global_step - window_step) * total_batch_size / (now - window_start)
                window_start, window_step = now, progress.global_step
                values |= {"lr": lr_scheduler.get_last_lr()[0], "images_per_second": images_per_second}
                accelerator.log({f"train/{k}": v for k, v in values.items()}, step=progress.global_step)
                if accelerator.is_main_process:
                    history.append(progress.global_step, values)
                shown = {"loss": f"{values['loss']:.4f}", "images_per_s": f"{images_per_second:.1f}"}
                progress_bar.set_postfix(shown, refresh=False)

            if save_now:
                save_checkpoint(accelerator, output_dir, progress.global_step, training_args.checkpoints_total_limit)
            if is_last:  # the last grid is drawn below
                break
            if training_args.validation_steps and progress.global_step % training_args.validation_steps == 0:
                validate()
                window_start, window_step = time.perf_counter(), progress.global_step
    progress_bar.close()

    # 6. the result: a pipeline with the averaged weights
    validate()
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(unet)
        if ema is not None:
            ema.copy_to(model.parameters())
        pipeline = ADMPipeline(
            unet=model,
            scheduler=noise_scheduler,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            classifier=None,
            id2label=id2label,
        )
        pipeline.save_pretrained(output_dir)
        logger.info(f"Saved the pipeline, its samples and loss_curves.png to {output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
