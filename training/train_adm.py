#!/usr/bin/env python
"""
Trains an ablated diffusion model with a learned variance, from scratch or from a pretrained one: unconditional, by
class, by caption, or both; all of its weights, or a low-rank adapter beside them.

    accelerate launch training/train_adm.py --config training/configs/emoji_32.yaml --output_dir runs/emoji

Nichol & Dhariwal 2021 (https://huggingface.co/papers/2102.09672), Dhariwal & Nichol 2021
(https://huggingface.co/papers/2105.05233). Every argument may stand in the recipe and be overridden on the command
line; `--help` lists them.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.logging import get_logger
from PIL import Image

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.text_encoding import check_text_encoder, cross_attention_width, pads_to_max, text_model_kwargs
from diffusers_adm.training import (
    CaptionEmbeddings,
    CaptionTokens,
    DataArguments,
    DiffusionArguments,
    EpochShuffleSampler,
    ImageDataset,
    LossMetrics,
    LossSecondMomentTimestepSampler,
    TrainingLog,
    TrainingProgress,
    UniformTimestepSampler,
    add_lora,
    arg,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    build_text_encoder,
    check_at_least,
    check_batch_fits,
    check_config_keys,
    check_images,
    check_objective,
    checkpoint_adapter_alone,
    choose_resolution,
    drop_captions,
    encode_captions,
    evaluation_weights,
    freeze_unused_parameters,
    from_subfolder_or_root,
    labelled_grid,
    load_image_dataset,
    load_model_config,
    load_noise_scheduler,
    load_text_encoder,
    load_tokenizer,
    parse_args,
    plot_loss_curves,
    prepare_output_dir,
    reading,
    rest_of_epoch,
    resume_checkpoint,
    save_checkpoint,
    save_lora,
    seed_step,
    start_accelerator,
    stored_conditioning,
    training_losses,
    warn_of_other_classes,
)
from diffusers_adm.training import ModelArguments as BaseModelArguments
from diffusers_adm.training import TrainingArguments as BaseTrainingArguments


logger = get_logger("train_adm")

TIMESTEP_SAMPLERS = {"uniform": UniformTimestepSampler, "loss-second-moment": LossSecondMomentTimestepSampler}
DEFAULT_VALIDATION_PROMPTS = 4


@dataclass
class ModelArguments(BaseModelArguments):
    """
    `pretrained_model_name_or_path` names a pipeline, of which `unet` and `scheduler` are read, and with captions also
    `text_encoder` and `tokenizer`.
    """

    class_dropout_prob: float = arg(
        0.1, "Share of the labels replaced by the null class, so that the model can be guided without a classifier."
    )

    def __post_init__(self):
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` is {self.class_dropout_prob}; it must lie in [0, 1].")


@dataclass
class TextArguments:
    caption_column: str | None = arg(None, "The column of the captions; none: train without text.")
    text_encoder_name_or_path: str | None = arg(
        None, "A text encoder of transformers (CLIP, T5, BERT, ...) on the Hub or in a folder, or a pipeline's."
    )
    tokenizer_name_or_path: str | None = arg(None, "Its tokenizer; none: that of the same repository.")
    text_encoder_config_name_or_path: str | None = arg(
        None, "A JSON file with `model_type` and sizes, for a text encoder that is trained from scratch."
    )
    train_text_encoder: bool = arg(False, "Train the text encoder together with the U-Net.")
    caption_dropout_prob: float = arg(
        0.1, "Share of the captions replaced by the empty one, so that the model can be guided; independent of classes."
    )
    precompute_text_embeddings: bool = arg(
        False, "Encode each distinct caption once, before training, and keep the result on disk."
    )
    validation_prompts: list[str] | None = arg(None, "The prompts of a grid; none: the first captions of the data.")

    def __post_init__(self):
        if not 0 <= self.caption_dropout_prob <= 1:
            raise ValueError(f"`caption_dropout_prob` is {self.caption_dropout_prob}; it must lie in [0, 1].")
        if self.caption_column is None:
            needing = ("text_encoder_name_or_path", "tokenizer_name_or_path", "text_encoder_config_name_or_path")
            needing += ("train_text_encoder", "precompute_text_embeddings", "validation_prompts")
            for name in needing:
                if getattr(self, name):
                    raise ValueError(f"`{name}` was given without a `caption_column`. Name the column of the captions.")
        if self.text_encoder_config_name_or_path is not None:
            if self.text_encoder_name_or_path is not None:
                raise ValueError("Pass either `text_encoder_name_or_path` or `text_encoder_config_name_or_path`.")
            if self.tokenizer_name_or_path is None:
                raise ValueError(
                    "`text_encoder_config_name_or_path` builds a text encoder from scratch, for which there is no "
                    "tokenizer. Pass `tokenizer_name_or_path`; `python -m diffusers_adm.training.tokenizer` makes one."
                )
            if not self.train_text_encoder:
                raise ValueError(
                    "`text_encoder_config_name_or_path` gives a text encoder random weights. Pass "
                    "`--train_text_encoder`, or name a trained one with `text_encoder_name_or_path`."
                )
        if self.precompute_text_embeddings and self.train_text_encoder:
            raise ValueError(
                "`precompute_text_embeddings` and `train_text_encoder` exclude each other: the embeddings change while "
                "their encoder is trained. Drop one."
            )


@dataclass
class LoraArguments:
    lora_rank: int | None = arg(None, "Train an adapter of this rank (4 to 64) instead of the weights.")
    lora_alpha: float | None = arg(None, "The adapter counts `lora_alpha / lora_rank`-fold; none: once.")
    lora_target_modules: list[str] | None = arg(
        None, "Layers to adapt, e.g. to_q to_v conv1 time_emb_proj; none: the projections of attention."
    )

    def __post_init__(self):
        check_at_least(self, 1, "lora_rank")
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_target_modules is not None):
            raise ValueError("`lora_alpha` and `lora_target_modules` need a `lora_rank`. Pass it, e.g. 8.")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"`lora_alpha` is {self.lora_alpha}; it must be positive.")


@dataclass
class TrainingArguments(BaseTrainingArguments):
    validation_steps: int | None = arg(None, "Optimizer steps between sample grids; none: only at the end.")
    num_validation_images: int = arg(16, "Images in a grid; they go through the prompts, or else the classes.")
    validation_num_inference_steps: int = arg(50, "Sampling steps of a grid.")
    validation_guidance_scale: float = arg(1.0, "Classifier-free guidance of a grid; 1 is off.")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "validation_steps", "num_validation_images", "validation_num_inference_steps")


def build_scheduler(
    model_args: ModelArguments, data_args: DataArguments, diffusion_args: DiffusionArguments
) -> LearnedVarianceDDPMScheduler:
    scheduler = load_noise_scheduler(model_args, data_args, diffusion_args)
    check_objective(scheduler, diffusion_args.objective, diffusion_args.snr_gamma)
    if scheduler.has_learned_variance and diffusion_args.objective == "simple":
        logger.warning("`objective` simple does not train the variance; pass hybrid, or `variance_type` fixed_small.")
    return scheduler


def load_unet_config(
    model_args: ModelArguments, data_args: DataArguments, scheduler: LearnedVarianceDDPMScheduler
) -> dict[str, Any]:
    """The config of the network, read before any data, since it may not fit the scheduler."""
    config = load_model_config(AdaGNUNet2DModel, "unet", model_args, data_args)
    if model_args.pretrained_model_name_or_path is None:
        source = model_args.model_config_name_or_path
        if config.get("_class_name") == "AdaGNClassifierModel":
            raise ValueError(f"{source} is the config of a classifier; this script trains U-Nets.")
        check_config_keys(config, AdaGNUNet2DModel, source)
    # For a config written by hand that leaves them out; with cross-attention it is read as `UNet2DConditionModel`'s.
    default = 3 if cross_attention_width(config) is None else 4
    in_channels, out_channels = config.get("in_channels", default), config.get("out_channels", default)
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


def load_text(
    model_args: ModelArguments,
    data_args: DataArguments,
    text_args: TextArguments,
    unet_config: Mapping[str, Any],
    seed: int,
) -> tuple[torch.nn.Module | None, Any | None]:
    """Text encoder and tokenizer, or two None without captions; refuses what does not fit the U-Net."""
    width, column = cross_attention_width(unet_config), text_args.caption_column
    if column is None:
        if width is not None:
            raise ValueError(
                "The U-Net has cross-attention, so it needs captions, but no `caption_column` was named. Name it, or "
                "take a U-Net without `CrossAttn` in its block types."
            )
        return None, None
    if width is None:
        raise ValueError(
            f"`caption_column` is {column!r}, but the U-Net has no cross-attention that could read captions. Take "
            "block types such as `SimpleCrossAttnDownBlock2D` or `CrossAttnDownBlock2D`, or leave `caption_column` out."
        )
    argument, source = "text_encoder_name_or_path", text_args.text_encoder_name_or_path
    hub = {"cache_dir": data_args.cache_dir}
    if source is None and text_args.text_encoder_config_name_or_path is None:
        argument, source = "pretrained_model_name_or_path", model_args.pretrained_model_name_or_path
        hub["revision"] = model_args.revision
        if source is None:
            raise ValueError(
                f"`caption_column` is {column!r}, but no text encoder was named. Pass `text_encoder_name_or_path`, or "
                "`text_encoder_config_name_or_path` and `tokenizer_name_or_path` to train one from scratch."
            )
    if text_args.tokenizer_name_or_path is not None:
        name = text_args.tokenizer_name_or_path
        tokenizer = load_tokenizer("tokenizer_name_or_path", name, cache_dir=data_args.cache_dir)
    else:
        tokenizer = load_tokenizer(argument, source, **hub)
    if source is None:
        text_encoder = build_text_encoder(text_args.text_encoder_config_name_or_path, tokenizer, seed)
    else:
        if argument == "pretrained_model_name_or_path":
            hub["variant"] = model_args.variant
        text_encoder = load_text_encoder(argument, source, trained=text_args.train_text_encoder, **hub)
    check_text_encoder(text_encoder, tokenizer, unet_config)
    return text_encoder, tokenizer


def choose_prompts(
    text_args: TextArguments, images: datasets.Dataset, null_class_id: int | None
) -> list[tuple[str, int | None]]:
    """What grids show: prompts, each with the class of the first image of that caption, or else the null class."""
    captions = images["caption"][:]
    labels = images["label"][:] if "label" in images.column_names else None
    first = {caption: index for index, caption in reversed(list(enumerate(captions)))}
    prompts = text_args.validation_prompts
    if not prompts:
        # A random subset may have empty captions alone.
        prompts = [caption for caption in dict.fromkeys(captions) if caption][:DEFAULT_VALIDATION_PROMPTS] or [""]
    chosen = []
    for prompt in prompts:
        label = None
        if labels is not None:
            label = labels[first[prompt]] if prompt in first and labels[first[prompt]] >= 0 else null_class_id
            if label is None:
                raise ValueError(
                    f"`validation_prompts` holds {prompt!r}, which is no caption of the data, so its class is unknown, "
                    "and the U-Net has no null class. Choose among the captions."
                )
        chosen.append((prompt, label))
    return chosen


def learned_classes(model_args: ModelArguments, data_args: DataArguments) -> dict[int, str]:
    """The names of the pretrained pipeline's classes; none from a repository without `model_index.json`."""
    with contextlib.suppress(OSError):
        index = ADMPipeline.load_config(
            model_args.pretrained_model_name_or_path, revision=model_args.revision, cache_dir=data_args.cache_dir
        )
        return {int(number): name for number, name in (index.get("id2label") or {}).items()}
    return {}


def sample_grid(
    unet: AdaGNUNet2DModel,
    scheduler: LearnedVarianceDDPMScheduler,
    id2label: dict[int, str] | None,
    training_args: TrainingArguments,
    text_encoder: torch.nn.Module | None = None,
    tokenizer: Any | None = None,
    prompts: list[tuple[str, int | None]] | None = None,
) -> Image.Image:
    """
    Validation images from fixed noise, so that grids of different steps can be compared. One row per prompt (with its
    class, if the model has classes), or else per class.
    """
    total = training_args.num_validation_images
    if prompts is not None:
        conditions, row_labels = prompts[:total], [prompt for prompt, _ in prompts[:total]]
    elif id2label is not None:
        conditions = [(None, label) for label in sorted(id2label)[:total]]
        row_labels = [id2label[label] for _, label in conditions]
    else:
        conditions, row_labels = [(None, None)], None
    rows = len(conditions) if row_labels else math.ceil(math.sqrt(total))
    cols = math.ceil(total / rows)
    drawn = [condition for condition in conditions for _ in range(cols if row_labels else total)][:total]
    pipeline = ADMPipeline(
        unet=unet,
        # A copy: sampling chooses timesteps, and a component that is shared with training must not change.
        scheduler=LearnedVarianceDDPMScheduler.from_config(scheduler.config),
        vae=None,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        classifier=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, total, training_args.train_batch_size):
        batch = drawn[start : start + training_args.train_batch_size]
        condition = {}
        for name, values in zip(("prompt", "class_labels"), zip(*batch, strict=True), strict=True):
            if values[0] is not None:
                condition[name] = list(values)
        images += pipeline(
            **condition or {"batch_size": len(batch)},
            num_inference_steps=training_args.validation_num_inference_steps,
            guidance_scale=training_args.validation_guidance_scale if condition else 1.0,
            generator=[torch.Generator().manual_seed(training_args.seed + start + i) for i in range(len(batch))],
        ).images
    return labelled_grid(images, rows, cols, row_labels=row_labels, scale=max(1, 64 // images[0].width))


def main(argv: list[str] | None = None) -> None:
    types = (ModelArguments, DataArguments, DiffusionArguments, TrainingArguments, TextArguments, LoraArguments)
    all_args = parse_args(types, argv, description=__doc__)
    model_args, data_args, diffusion_args, training_args, text_args, lora_args = all_args
    model_args.check_source()
    if lora_args.lora_rank is not None:
        if model_args.pretrained_model_name_or_path is None:
            raise ValueError("`lora_rank` adapts a trained model. Name it with `--pretrained_model_name_or_path`.")
        if text_args.train_text_encoder:
            raise ValueError("`lora_rank` adapts the U-Net alone. Drop `train_text_encoder`, or train all weights.")
    output_dir = training_args.output_dir

    # 1. processes, logging, trackers
    accelerator = start_accelerator(training_args, "train_adm")
    settings = {name: value for arguments in all_args for name, value in vars(arguments).items()}

    # 2. diffusion process and data: the cheap checks first
    noise_scheduler = build_scheduler(model_args, data_args, diffusion_args)
    chain = noise_scheduler.config.num_train_timesteps
    if training_args.validation_num_inference_steps > chain:
        raise ValueError(
            f"`validation_num_inference_steps` is {training_args.validation_num_inference_steps}, but the noising "
            f"chain (`ddpm_num_steps`) has {chain} steps. Pass `--validation_num_inference_steps {chain}` or less."
        )
    unet_config = load_unet_config(model_args, data_args, noise_scheduler)
    has_text = text_args.caption_column is not None
    if training_args.validation_guidance_scale != 1 and data_args.label_column is None and not has_text:
        raise ValueError(
            f"`validation_guidance_scale` is {training_args.validation_guidance_scale}, but without a `label_column` "
            "there are no classes to guide towards, and without a `caption_column` no text. Leave it at 1."
        )
    text_encoder, tokenizer = load_text(model_args, data_args, text_args, unet_config, training_args.seed)
    with accelerator.main_process_first():
        images, id2label = load_image_dataset(
            **data_args.source(), caption_column=text_args.caption_column, seed=training_args.seed
        )
        num_classes = len(id2label) if id2label is not None else None
        # The same random numbers on every process, and in every run with this seed.
        torch.manual_seed(training_args.seed)
        unet = build_unet(model_args, data_args, unet_config, num_classes)
        null_class_id = unet.config.null_class_id
        if num_classes and null_class_id is None and training_args.validation_guidance_scale != 1 and not has_text:
            raise ValueError(
                f"`validation_guidance_scale` is {training_args.validation_guidance_scale}, but the U-Net has no null "
                "class to guide away from. Leave it at 1, or train with `--class_dropout_prob 0.1`."
            )
        resolution = choose_resolution(data_args.resolution, unet.config, "U-Net")
        unet.register_to_config(sample_size=resolution)
        images, _ = check_images(
            images,
            resolution,
            min_image_size=data_args.min_image_size,
            allow_unlabelled=num_classes is None or null_class_id is not None,
            num_proc=data_args.image_check_num_proc,
            output_dir=output_dir if accelerator.is_main_process else None,
        )
        captions, prompts = None, None
        if has_text:
            prompts = choose_prompts(text_args, images, null_class_id)
            captions = CaptionTokens(
                images["caption"][:], tokenizer, text_encoder, pads_to_max(text_encoder, unet.config)
            )
            text_encoder.to(accelerator.device)
            if text_args.train_text_encoder:
                freeze_unused_parameters(text_encoder, captions, unet.config)
            else:
                text_encoder.requires_grad_(False).eval()
            if text_args.precompute_text_embeddings:
                captions = CaptionEmbeddings(captions, text_encoder, data_args.cache_dir)
                text_encoder.to("cpu")  # from here on it draws grids only
    if id2label is not None and model_args.pretrained_model_name_or_path is not None:
        warn_of_other_classes(learned_classes(model_args, data_args), id2label, "model")
    check_batch_fits(len(images), training_args.train_batch_size, accelerator.num_processes)
    train_dataset = ImageDataset(
        images,
        resolution,
        data_args.center_crop,
        data_args.random_flip,
        seed=training_args.seed,
        captions=captions,
    )
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset,
        batch_size=training_args.train_batch_size,
        sampler=EpochShuffleSampler(train_dataset),
        num_workers=data_args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        drop_last=True,
    )

    # 3. what is trained; optimizer, learning rate, average
    if lora_args.lora_rank is not None:
        add_lora(unet, lora_args.lora_rank, lora_args.lora_alpha, lora_args.lora_target_modules)
        checkpoint_adapter_alone(accelerator)
    if model_args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if model_args.channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    trained_models = torch.nn.ModuleList([unet, text_encoder] if text_args.train_text_encoder else [unet])
    trained_parameters = [p for p in trained_models.parameters() if p.requires_grad]
    optimizer = build_optimizer(trained_parameters, training_args)
    unet, optimizer, train_dataloader = accelerator.prepare(unet, optimizer, train_dataloader)
    prepared_models = [unet]
    if text_args.train_text_encoder:
        text_encoder = accelerator.prepare(text_encoder)
        prepared_models.append(text_encoder)
    steps_per_epoch = math.ceil(len(train_dataloader) / training_args.gradient_accumulation_steps)
    max_train_steps = training_args.max_train_steps or training_args.num_train_epochs * steps_per_epoch
    lr_scheduler = build_lr_scheduler(optimizer, training_args, max_train_steps)
    ema = build_ema(trained_parameters, training_args)
    timestep_sampler = TIMESTEP_SAMPLERS[diffusion_args.timestep_sampler](noise_scheduler.config.num_train_timesteps)
    progress = TrainingProgress()
    accelerator.register_for_checkpointing(lr_scheduler, timestep_sampler, progress, *([ema] if ema else []))

    # 4. resume
    prepare_output_dir(accelerator, training_args, settings)
    resume_checkpoint(accelerator, output_dir, training_args.resume_from_checkpoint)
    if ema is not None:
        ema.to(accelerator.device)
    metrics = LossMetrics(noise_scheduler.config.num_train_timesteps, accelerator.device)

    total_batch_size = (
        training_args.train_batch_size * accelerator.num_processes * training_args.gradient_accumulation_steps
    )
    num_trained = sum(p.numel() for p in trained_parameters)
    num_frozen = (
        sum(p.numel() for model in (unet, text_encoder) if model is not None for p in model.parameters()) - num_trained
    )
    logger.info(
        f"{num_trained / 1e6:.2f}M parameters"
        + (f" beside {num_frozen / 1e6:.2f}M frozen ones" if num_frozen else "")
        + f", {len(images)} images"
        + (f" in {num_classes} classes" if num_classes else "")
        + (f" with {len(captions.texts) - 1} captions" if has_text else "")
        + f" at {resolution} x {resolution}, {total_batch_size} per optimizer step; steps {progress.global_step} to "
        f"{max_train_steps}, {steps_per_epoch} an epoch"
    )
    log = TrainingLog(accelerator, output_dir, settings, progress.global_step, max_train_steps, total_batch_size)

    def validate() -> None:
        """Grid and curves, on the main process; the others wait for it."""
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            model, encoder = accelerator.unwrap_model(unet), text_encoder
            if has_text:
                encoder = accelerator.unwrap_model(text_encoder).to(accelerator.device)
            # Mixed precision is in the forward of what was prepared; a frozen encoder is exact here as in training.
            with evaluation_weights(trained_models, ema, trained_parameters):
                grid = sample_grid(model, noise_scheduler, id2label, training_args, encoder, tokenizer, prompts)
            if text_args.precompute_text_embeddings:
                encoder.to("cpu")
            grid.save(os.path.join(output_dir, f"samples-{progress.global_step:07d}.png"))
            if log.history.rows():
                plot_loss_curves(log.history.rows(), os.path.join(output_dir, "loss_curves.png"))
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.writer.add_image("samples", np.asarray(grid), progress.global_step, dataformats="HWC")
        accelerator.wait_for_everyone()

    # 5. train
    trained_models.train()
    if has_text:
        empty_caption = {name: value.to(accelerator.device) for name, value in captions.empty.items()}
    while progress.global_step < max_train_steps:
        for batch in rest_of_epoch(train_dataloader, progress):
            seed_step(training_args.seed, accelerator.process_index, progress.micro_step)
            with accelerator.accumulate(*prepared_models):
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
                if has_text:
                    dropped = torch.rand(pixels.shape[0], device=pixels.device) < text_args.caption_dropout_prob
                    caption = drop_captions(batch, empty_caption, dropped)
                    if text_args.precompute_text_embeddings:
                        conditioning = stored_conditioning(caption)
                    else:
                        # Without autocast, as where embeddings are stored; `prepare` gave it to a trained encoder.
                        with torch.set_grad_enabled(text_args.train_text_encoder):
                            conditioning = encode_captions(text_encoder, caption, pad_to_max=captions.pad_to_max)
                    model_kwargs |= text_model_kwargs(conditioning, unet_config)
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
                    accelerator.clip_grad_norm_(trained_parameters, training_args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            progress.micro_step += 1
            progress.batch_in_epoch += 1
            if not accelerator.sync_gradients:
                continue

            if not accelerator.optimizer_step_was_skipped:  # by the gradient scaler of fp16
                lr_scheduler.step()
            if ema is not None:
                ema.step(trained_parameters)
            progress.global_step += 1
            log.advance()
            is_last = progress.global_step == max_train_steps
            save_now = progress.global_step % training_args.checkpointing_steps == 0 or is_last

            # A checkpoint ends a row, too: it does not hold the sums of an unfinished one.
            if progress.global_step % training_args.logging_steps == 0 or save_now:
                values = metrics.compute(accelerator)  # collective, and the one place that waits for the device
                metrics.reset()
                log.write(progress.global_step, values, lr_scheduler.get_last_lr()[0])

            if save_now:
                save_checkpoint(accelerator, output_dir, progress.global_step, training_args.checkpoints_total_limit)
            if is_last:  # the last grid is drawn below
                break
            if training_args.validation_steps and progress.global_step % training_args.validation_steps == 0:
                validate()
                log.start_clock(progress.global_step)
    log.close()

    # 6. the result: a pipeline, or an adapter, with the averaged weights
    validate()
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(unet)
        if ema is not None:
            ema.copy_to(trained_parameters)
        if lora_args.lora_rank is not None:
            save_lora(model, output_dir)
            saved = "adapter"
        else:
            pipeline = ADMPipeline(
                unet=model,
                scheduler=noise_scheduler,
                vae=None,
                text_encoder=accelerator.unwrap_model(text_encoder) if has_text else None,
                tokenizer=tokenizer,
                classifier=None,
                id2label=id2label,
            )
            pipeline.save_pretrained(output_dir)
            saved = "pipeline"
        logger.info(f"Saved the {saved}, its samples and loss_curves.png to {output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
