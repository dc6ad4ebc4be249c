#!/usr/bin/env python
"""
Trains an upsampler: an ablated diffusion model that draws a large image while it sees a small one. From scratch or from
a pretrained one; unconditional, by class, by caption, or both.

    accelerate launch training/train_super_resolution.py --config training/configs/emoji_64_upsampler.yaml \
        --output_dir runs/upsampler

The small images are made from the large ones on the way: blocks of pixels are averaged, noise is added, and the result
is enlarged and concatenated to the noisy large image (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233;
the noise, whose level the network is told: Ho et al. 2021, https://huggingface.co/papers/2106.15282). Every argument
may stand in the recipe and be overridden on the command line; `--help` lists them.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffusers_adm import ADMSuperResolutionPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.commands.errors import run_command
from diffusers_adm.conditioning.low_resolution import add_noise_to_low_res, downsample, noise_level_embedding, upsample
from diffusers_adm.schedulers.noise_schedules import noise_schedule_of
from diffusers_adm.training import (
    TIMESTEP_SAMPLERS,
    AfterStep,
    DataArguments,
    DiffusionArguments,
    DiffusionTrainingArguments,
    ImageDataset,
    LossMetrics,
    TextArguments,
    TrainingLog,
    TrainingProgress,
    UNetArguments,
    arg,
    build_dataloader,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    build_scheduler,
    build_unet,
    caption_model_kwargs,
    check_at_least,
    check_batch_fits,
    check_effects,
    check_grids,
    check_guidance_of_grids,
    check_images,
    check_last_validation,
    choose_examples,
    choose_resolution,
    draw,
    drop_labels,
    evaluation_weights,
    labelled_strips,
    load_image_dataset,
    load_text,
    load_unet_config,
    match_unet_classes,
    parse_run,
    plot_loss_curves,
    prepare_captions,
    prepare_output_dir,
    pretrained_pipeline_config,
    push_result,
    record_losses,
    rest_of_epoch,
    result_weights,
    run_settings,
    save_checkpoint,
    save_samples,
    seed_step,
    start_accelerator,
    survives,
    training_losses,
    unwrap,
)


logger = get_logger("train_super_resolution")

IN_CHANNELS = 6  # x_t and the small image, both RGB


@dataclass
class SuperResolutionArguments:
    low_res_size: int | None = arg(
        None,
        "Side of the small images, in pixels; it must divide that of the large ones. None: the pretrained model's.",
    )
    max_noise_level: int | None = arg(
        None,
        "The small images go through 0 to so many steps of the noising chain, all equally likely; 0: no noise. Above "
        "0, the U-Net needs a `time_cond_proj_dim`. None: the pretrained model's, or 0.",
    )

    def __post_init__(self):
        check_at_least(self, 1, "low_res_size")
        check_at_least(self, 0, "max_noise_level")

    def inherit(self, pipeline_config: dict[str, Any]) -> None:
        """
        Takes what was not given from the pretrained pipeline.

        Raises:
            ValueError: If that does not name the size of the small images either.
        """
        if self.low_res_size is None:
            self.low_res_size = pipeline_config.get("low_res_size")
        if self.max_noise_level is None:
            self.max_noise_level = pipeline_config.get("max_noise_level") or 0
        if self.low_res_size is None:
            raise ValueError("`low_res_size` is missing: the side of the small images, in pixels, e.g. 32.")

    def check(self, resolution: int, scheduler: LearnedVarianceDDPMScheduler, time_cond_proj_dim: int | None) -> None:
        """
        Raises:
            ValueError: If the small images do not fit the large ones, or the noise the chain or the network.
        """
        if self.low_res_size >= resolution or resolution % self.low_res_size:
            raise ValueError(
                f"`low_res_size` is {self.low_res_size} and the resolution {resolution}: blocks of whole pixels are "
                "averaged, so the former must divide the latter and be smaller."
            )
        chain = scheduler.config.num_train_timesteps
        if self.max_noise_level > chain:
            raise ValueError(
                f"`max_noise_level` is {self.max_noise_level}, but the noising chain (`ddpm_num_steps`) has {chain} "
                f"steps. Pass `--max_noise_level {chain // 10}` or so."
            )
        if self.max_noise_level > 0 and time_cond_proj_dim is None:
            raise ValueError(
                f"`max_noise_level` is {self.max_noise_level}, but the config of the U-Net has no "
                "`time_cond_proj_dim`, without which it cannot be told the level. Give it one, e.g. its first number "
                "of `block_out_channels`, or pass `--max_noise_level 0`."
            )


ARGUMENT_TYPES = (
    UNetArguments,
    DataArguments,
    DiffusionArguments,
    DiffusionTrainingArguments,
    TextArguments,
    SuperResolutionArguments,
)


def sample_grid(
    pipeline: ADMSuperResolutionPipeline,
    examples: list[tuple[dict[str, torch.Tensor], dict[str, Any]]],
    training_args: DiffusionTrainingArguments,
) -> Image.Image:
    """Small image | sample | large image, each of `examples`."""
    large = torch.stack([tensors["images"] for tensors, _ in examples])
    to_pil = VaeImageProcessor(vae_scale_factor=1).postprocess
    small = to_pil(downsample(large, large.shape[-1] // pipeline.config.low_res_size), output_type="pil")
    wanted = [{"image": image, **told} for image, (_, told) in zip(small, examples, strict=True)]
    columns = {
        "small": [image.resize(large.shape[-2:], Image.Resampling.NEAREST) for image in small],
        "sample": draw(pipeline, wanted, training_args),
        "large": to_pil(large, output_type="pil"),
    }
    return labelled_strips(columns)


def main(argv: list[str] | None = None) -> None:
    all_args, run = parse_run(ARGUMENT_TYPES, argv, "train_super_resolution", description=__doc__)
    without_effect = check_effects(*all_args, taken_over=run.left_out)
    model_args, data_args, diffusion_args, training_args, text_args, sr_args = all_args
    model_args.check_source()
    output_dir = training_args.output_dir

    # 1. processes, logging, trackers
    accelerator = start_accelerator(training_args, "train_super_resolution")
    for sentence in without_effect:
        logger.warning(sentence)
    sr_args.inherit(pretrained_pipeline_config(model_args, data_args))
    settings = run_settings(*all_args)
    run.begin(settings)

    # 2. diffusion process and data: the cheap checks first
    noise_scheduler = build_scheduler(model_args, data_args, diffusion_args)
    run.check_noise(noise_scheduler)
    unet_config = load_unet_config(model_args, data_args, noise_scheduler, in_channels=IN_CHANNELS)
    embedding_dim = unet_config.get("time_cond_proj_dim")
    has_text = text_args.caption_column is not None
    check_grids(training_args, noise_scheduler, data_args.label_column is not None, has_text)
    text_encoder, tokenizer = load_text(model_args, data_args, text_args, unet_config, training_args.seed)
    with accelerator.main_process_first():
        images, id2label = load_image_dataset(
            **data_args.source(), caption_column=text_args.caption_column, seed=training_args.seed
        )
        run.check_classes(id2label)
        num_classes = len(id2label) if id2label is not None else None
        # The same random numbers on every process, and in every run with this seed.
        torch.manual_seed(training_args.seed)
        unet = build_unet(model_args, data_args, unet_config, num_classes)
        images, id2label = match_unet_classes(unet, images, id2label, model_args, data_args)
        run.check_rows(id2label)
        null_class_id = unet.config.null_class_id
        check_guidance_of_grids(training_args, unet.config, num_classes, has_text)
        resolution = choose_resolution(data_args.resolution, unet.config, "U-Net")
        sr_args.check(resolution, noise_scheduler, embedding_dim)
        unet.register_to_config(sample_size=resolution)
        images, _ = check_images(
            images,
            resolution,
            # Enlarged images would teach it blur.
            min_image_size=resolution if data_args.min_image_size is None else data_args.min_image_size,
            allow_unlabelled=num_classes is None or null_class_id is not None,
            num_proc=data_args.image_check_num_proc,
            output_dir=output_dir if accelerator.is_main_process else None,
            id2label=id2label,
        )
        captions = None
        if has_text:
            captions = prepare_captions(
                images, tokenizer, text_encoder, text_args, unet.config, accelerator.device, data_args.cache_dir
            )
    check_batch_fits(len(images), training_args.train_batch_size, accelerator.num_processes)
    run.check_data(len(images))
    frozen = {"text encoder": None if text_args.train_text_encoder else text_encoder, "tokenizer": tokenizer}
    run.check_network(unet.config, resolution, frozen)
    shown_dataset = ImageDataset(images, resolution, center_crop=True, seed=training_args.seed)
    examples = choose_examples(shown_dataset, training_args.num_validation_images, null_class_id)
    train_dataset = ImageDataset(
        images,
        resolution,
        data_args.center_crop,
        data_args.random_flip,
        seed=training_args.seed,
        captions=captions,
    )
    train_dataloader = build_dataloader(train_dataset, data_args, training_args)

    # 3. what is trained; optimizer, learning rate, average
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
    accelerator.register_for_checkpointing(lr_scheduler, timestep_sampler, progress)

    # 4. resume
    prepare_output_dir(accelerator, training_args)
    run.resume(
        accelerator,
        training_args,
        max_train_steps,
        optimizer,
        lr_scheduler,
        progress,
        ema,
        trained_parameters,
        dict(zip(("unet", "text_encoder"), trained_models, strict=False)),
        timestep_sampler,
    )
    if ema is not None:
        ema.to(accelerator.device)
    metrics = LossMetrics(noise_scheduler.config.num_train_timesteps, accelerator.device)

    total_batch_size = (
        training_args.train_batch_size * accelerator.num_processes * training_args.gradient_accumulation_steps
    )
    logger.info(
        f"{sum(p.numel() for p in trained_parameters) / 1e6:.2f}M parameters, {len(images)} images"
        + (f" in {num_classes} classes" if num_classes else "")
        + (f" with {len(captions.texts) - 1} captions" if has_text else "")
        + f", from {sr_args.low_res_size} to {resolution} pixels, {total_batch_size} per optimizer step; steps "
        f"{progress.global_step} to {max_train_steps}, {steps_per_epoch} an epoch"
    )
    log = TrainingLog(accelerator, output_dir, settings, progress.global_step, max_train_steps, total_batch_size)
    after_step = AfterStep(
        accelerator, training_args, max_train_steps, progress, lr_scheduler, ema, trained_parameters, metrics, log
    )

    def build_pipeline() -> ADMSuperResolutionPipeline:
        return ADMSuperResolutionPipeline(
            unet=unwrap(accelerator, unet),
            scheduler=noise_scheduler,
            vae=None,
            text_encoder=unwrap(accelerator, text_encoder) if has_text else None,
            tokenizer=tokenizer,
            classifier=None,
            id2label=id2label,
            low_res_size=sr_args.low_res_size,
            max_noise_level=sr_args.max_noise_level,
            noise_schedule=noise_schedule_of(noise_scheduler),
        )

    def save_result(folder: str) -> None:
        """A pipeline with the averaged weights; only for the main process."""
        with result_weights(ema, trained_parameters):
            build_pipeline().save_pretrained(folder)

    def show() -> None:
        """Curves and grid, on the main process."""
        if accelerator.is_main_process:
            if log.history.rows():
                plot_loss_curves(log.history.rows(), os.path.join(output_dir, "loss_curves.png"))
            pipeline = build_pipeline()
            if has_text:
                pipeline.text_encoder.to(accelerator.device)
            # Mixed precision is in the forward of what was prepared; a frozen encoder is exact here as in training.
            try:
                with evaluation_weights(trained_models, ema, trained_parameters):
                    grid = sample_grid(pipeline, examples, training_args)
            finally:
                if text_args.precompute_text_embeddings:
                    pipeline.text_encoder.to("cpu")
            save_samples(accelerator, grid, output_dir, progress.global_step)

    validate = functools.partial(survives, accelerator, progress, show)  # the other processes wait for the main one

    # 5. train
    trained_models.train()
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(accelerator.device, torch.float32)
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
                low_res = downsample(pixels, resolution // sr_args.low_res_size)
                if embedding_dim is not None:
                    levels = torch.randint(sr_args.max_noise_level + 1, (len(pixels),), device=pixels.device)
                    low_res = add_noise_to_low_res(low_res, torch.randn_like(low_res), levels, alphas_cumprod)
                    model_kwargs["timestep_cond"] = noise_level_embedding(levels, embedding_dim)
                if num_classes is not None:
                    labels = batch["class_labels"]  # (B,), -1 for unlabelled
                    model_kwargs["class_labels"] = drop_labels(labels, null_class_id, model_args.class_dropout_prob)
                if has_text:
                    model_kwargs |= caption_model_kwargs(
                        batch, captions, empty_caption, text_encoder, text_args, unet_config
                    )
                timesteps, weights = timestep_sampler.sample(pixels.shape[0], device=pixels.device)
                terms = training_losses(
                    unet,
                    noise_scheduler,
                    pixels,
                    timesteps,
                    objective=diffusion_args.objective,
                    snr_gamma=diffusion_args.snr_gamma,
                    extra_channels=upsample(low_res, resolution, resolution),
                    model_kwargs=model_kwargs,
                )
                record_losses(terms, timesteps, weights, diffusion_args.objective, timestep_sampler, metrics)
                accelerator.backward((terms.loss * weights).mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained_parameters, training_args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            progress.count_batch()
            if not accelerator.sync_gradients:
                continue

            due = after_step()  # learning rate, average, a row of the log
            if due.checkpoint:
                save_checkpoint(
                    accelerator,
                    output_dir,
                    progress.global_step,
                    training_args.checkpoints_total_limit,
                    save_result,
                    run.write,
                )
            if due.end:  # the last grid is drawn below
                break
            if due.validation:
                validate()
                log.start_clock(progress.global_step)
    log.close()

    # 6. the result: a pipeline with the averaged weights; only then what could fail
    if accelerator.is_main_process:
        save_result(output_dir)
        logger.info(f"Saved the pipeline to {output_dir}")
    validated = validate()
    accelerator.end_training()
    push_result(accelerator, training_args)
    check_last_validation(accelerator, output_dir, validated)


if __name__ == "__main__":
    run_command(main)
