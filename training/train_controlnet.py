#!/usr/bin/env python
"""
Trains a ControlNet branch beside an ablated diffusion model that stays as it is, so that a picture (edges, blocks of
colour, regions, ...) decides where things are.

    accelerate launch training/train_controlnet.py --config training/configs/emoji_32_edges.yaml \
        --output_dir runs/edges

Zhang et al. 2023 (https://huggingface.co/papers/2302.05543). The pictures are made from the images on the way, or read
from a column of the data. What is saved is the branch alone. Every argument may stand in the recipe and be overridden
on the command line; `--help` lists them.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffusers_adm import AdaGNControlNetModel, AdaGNUNet2DModel, ADMControlNetPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.commands.errors import run_command
from diffusers_adm.schedulers.noise_schedules import check_same_noise
from diffusers_adm.training import (
    TIMESTEP_SAMPLERS,
    AfterStep,
    DataArguments,
    DiffusionArguments,
    DiffusionTrainingArguments,
    FrozenNetworks,
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
    from_subfolder_or_root,
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
    reading,
    record_losses,
    record_noise_schedule,
    rest_of_epoch,
    result_weights,
    run_settings,
    save_checkpoint,
    save_samples,
    seed_step,
    start_accelerator,
    survives,
    training_losses,
)


logger = get_logger("train_controlnet")

# Arguments that would change the noise of the pretrained model, or what it predicts.
OF_THE_SCHEDULER = ("ddpm_num_steps", "ddpm_beta_schedule", "beta_start", "beta_end", "prediction_type")


@dataclass
class ControlArguments:
    condition: Literal["edges", "color_blocks", "regions", "low_resolution"] | None = arg(
        None, "What the branch is shown, made from each image."
    )
    conditioning_image_column: str | None = arg(None, "Or the column of the data that holds it.")
    condition_dropout_prob: float = arg(
        0.0, "Share of the conditions replaced by black, so that the branch leaves the model alone there."
    )
    controlnet_model_name_or_path: str | None = arg(None, "Go on with a trained branch, on the Hub or in a folder.")
    controlnet_width: float = arg(1.0, "Channels of a new branch, as a share of the model's.")
    conditioning_embedding_out_channels: list[int] | None = arg(
        None, "Channels of the layers that embed the condition in a new branch; none: 16 and 32."
    )

    def __post_init__(self):
        if (self.condition is None) == (self.conditioning_image_column is None):
            raise ValueError(
                f"`condition` is {self.condition!r} and `conditioning_image_column` "
                f"{self.conditioning_image_column!r}. Pass exactly one: what to make from the images, e.g. "
                "`--condition edges`, or the column that holds it."
            )
        if not 0 <= self.condition_dropout_prob <= 1:
            raise ValueError(f"`condition_dropout_prob` is {self.condition_dropout_prob}; it must lie in [0, 1].")
        if not 0 < self.controlnet_width <= 1:
            raise ValueError(f"`controlnet_width` is {self.controlnet_width}; it must lie in (0, 1].")
        if self.controlnet_model_name_or_path is not None and (
            self.controlnet_width != 1 or self.conditioning_embedding_out_channels is not None
        ):
            raise ValueError(
                "`controlnet_width` and `conditioning_embedding_out_channels` shape a new branch, but "
                f"`controlnet_model_name_or_path` is {self.controlnet_model_name_or_path!r}, which has its shape. "
                "Leave them out."
            )


ARGUMENT_TYPES = (
    UNetArguments,
    DataArguments,
    DiffusionArguments,
    DiffusionTrainingArguments,
    TextArguments,
    ControlArguments,
)


def check_base_stays(model_args: UNetArguments, diffusion_args: DiffusionArguments, text_args: TextArguments) -> None:
    """
    Raises:
        ValueError: If there shall be no pretrained model, or it shall change.
    """
    if model_args.pretrained_model_name_or_path is None or model_args.model_config_name_or_path is not None:
        raise ValueError(
            "A branch is trained beside a trained model. Name it with `--pretrained_model_name_or_path`, and leave "
            "`model_config_name_or_path` out."
        )
    given = [name for name in OF_THE_SCHEDULER if getattr(diffusion_args, name) is not None]
    # Which of the fixed variances they mean, some repositories of networks without a learned one do not say.
    if (diffusion_args.variance_type or "").startswith("learned"):
        given.append("variance_type")
    if given:
        raise ValueError(
            "The pretrained model stays as it is, and so does its scheduler: drop "
            f"{', '.join(f'`{name}`' for name in given)}."
        )
    if text_args.train_text_encoder:
        raise ValueError("The pretrained model stays as it is, its text encoder included: drop `train_text_encoder`.")
    if model_args.replace_classes:
        raise ValueError("A ControlNet leaves its base model as it is, its classes included: drop `replace_classes`.")


def check_text_stays(model_args: UNetArguments, data_args: DataArguments, text_args: TextArguments) -> None:
    """
    Raises:
        ValueError: If another text encoder or tokenizer shall take the place of the pretrained model's own.
    """
    index = pretrained_pipeline_config(model_args, data_args)
    for name in ("text_encoder", "tokenizer"):
        argument = f"{name}_name_or_path"
        has_own = (index.get(name) or [None])[0] is not None
        if has_own and getattr(text_args, argument) is not None:
            raise ValueError(
                f"`{argument}` is {getattr(text_args, argument)!r}, but the pretrained model has a {name} of its own "
                f"({index[name][1]}), and stays as it is. Leave the argument out."
            )


def build_controlnet(
    control_args: ControlArguments,
    data_args: DataArguments,
    unet: AdaGNUNet2DModel,
    noise_scheduler: LearnedVarianceDDPMScheduler,
) -> AdaGNControlNetModel:
    """
    The branch: a new one, or the one to go on with.

    Raises:
        ValueError: If that cannot be read, belongs to another U-Net or noise schedule, or takes other conditioning
            images than this script makes.
    """
    name = control_args.controlnet_model_name_or_path
    if name is None:
        return AdaGNControlNetModel.from_unet(
            unet,
            conditioning_embedding_out_channels=control_args.conditioning_embedding_out_channels,
            width=control_args.controlnet_width,
        )
    with reading("controlnet_model_name_or_path", name):
        controlnet = from_subfolder_or_root(
            AdaGNControlNetModel.from_pretrained, name, "controlnet", cache_dir=data_args.cache_dir
        )
    controlnet.check_base(unet)
    check_same_noise(
        f"The ControlNet {name}",
        controlnet.config.noise_schedule,
        noise_scheduler,
        controlnet,
        how_to_record="this run records that of the pretrained model",
    )
    channels, factor = controlnet.config.conditioning_channels, controlnet.conditioning_factor
    if channels != 3 or factor != 1:
        raise ValueError(
            f"The branch {name} is shown {channels} channels, {factor} times as large as the image; this script shows "
            "RGB pictures of its size. Train a new one."
        )
    return controlnet


def predict(
    unet: AdaGNUNet2DModel,
    controlnet: torch.nn.Module,
    accelerator: Accelerator,
    noisy_samples: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    controlnet_cond: torch.Tensor,
    **model_kwargs: Any,
) -> torch.Tensor:
    """The prediction of the frozen U-Net with its branch; gradients reach the branch through the U-Net's decoder."""
    down_residuals, mid_residual = controlnet(
        noisy_samples, timesteps, controlnet_cond=controlnet_cond, return_dict=False, **model_kwargs
    )
    device = noisy_samples.device.type
    with accelerator.autocast():  # which `prepare` gave to the branch
        # It also made its output float32, which the U-Net would carry through its decoder: 5% of the time of a step.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else noisy_samples.dtype
        return unet(
            noisy_samples,
            timesteps,
            down_block_additional_residuals=tuple(residual.to(dtype) for residual in down_residuals),
            mid_block_additional_residual=mid_residual.to(dtype),
            **model_kwargs,
        ).sample


def sample_grid(
    pipeline: ADMControlNetPipeline,
    examples: list[tuple[dict[str, torch.Tensor], dict[str, Any]]],
    training_args: DiffusionTrainingArguments,
) -> Image.Image:
    """Condition | sample | target of each of `examples`."""
    targets, conditions = (torch.stack([tensors[name] for tensors, _ in examples]) for name in ("images", "conditions"))
    to_pil = VaeImageProcessor(vae_scale_factor=1).postprocess
    wanted = [{"image": condition, **told} for condition, (_, told) in zip(conditions, examples, strict=True)]
    columns = {
        "condition": to_pil(conditions * 2 - 1, output_type="pil"),
        "sample": draw(pipeline, wanted, training_args),
        "target": to_pil(targets, output_type="pil"),
    }
    return labelled_strips(columns, scale=max(1, 64 // targets.shape[-1]))


def main(argv: list[str] | None = None) -> None:
    all_args, run = parse_run(ARGUMENT_TYPES, argv, "train_controlnet", description=__doc__)
    without_effect = check_effects(*all_args, taken_over=run.left_out)
    model_args, data_args, diffusion_args, training_args, text_args, control_args = all_args
    check_base_stays(model_args, diffusion_args, text_args)
    output_dir = training_args.output_dir

    # 1. processes, logging, trackers
    accelerator = start_accelerator(training_args, "train_controlnet")
    for sentence in without_effect:
        logger.warning(sentence)
    settings = run_settings(*all_args)
    run.begin(settings)

    # 2. diffusion process and data: the cheap checks first
    noise_scheduler = build_scheduler(model_args, data_args, diffusion_args)
    run.check_noise(noise_scheduler)
    unet_config = load_unet_config(model_args, data_args, noise_scheduler)
    has_text = text_args.caption_column is not None
    check_grids(training_args, noise_scheduler, data_args.label_column is not None, has_text)
    check_text_stays(model_args, data_args, text_args)
    text_encoder, tokenizer = load_text(model_args, data_args, text_args, unet_config, training_args.seed)
    with accelerator.main_process_first():
        images, id2label = load_image_dataset(
            **data_args.source(),
            caption_column=text_args.caption_column,
            conditioning_image_column=control_args.conditioning_image_column,
            seed=training_args.seed,
        )
        run.check_classes(id2label)
        num_classes = len(id2label) if id2label is not None else None
        # The same random numbers on every process, and in every run with this seed.
        torch.manual_seed(training_args.seed)
        unet = build_unet(model_args, data_args, unet_config, num_classes)
        keeps = "a ControlNet leaves its base model as it is"
        images, id2label = match_unet_classes(unet, images, id2label, model_args, data_args, keeps)
        run.check_rows(id2label)
        null_class_id = unet.config.null_class_id
        check_guidance_of_grids(training_args, unet.config, num_classes, has_text)
        resolution = choose_resolution(data_args.resolution, unet.config, "U-Net")
        unet.register_to_config(sample_size=resolution)
        controlnet = build_controlnet(control_args, data_args, unet, noise_scheduler)
        record_noise_schedule(controlnet, "ControlNet", noise_scheduler)
        images, _ = check_images(
            images,
            resolution,
            min_image_size=data_args.min_image_size,
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
    run.check_network(controlnet.config, resolution, {"tokenizer": tokenizer})  # `FrozenNetworks` compares the others
    shown_dataset = ImageDataset(
        images, resolution, center_crop=True, seed=training_args.seed, condition=control_args.condition
    )
    examples = choose_examples(shown_dataset, training_args.num_validation_images, null_class_id)
    train_dataset = ImageDataset(
        images,
        resolution,
        data_args.center_crop,
        data_args.random_flip,
        seed=training_args.seed,
        captions=captions,
        condition=control_args.condition,
    )
    train_dataloader = build_dataloader(train_dataset, data_args, training_args)

    # 3. what is frozen and what is trained; optimizer, learning rate, average
    frozen = FrozenNetworks({"U-Net": unet} | ({"text encoder": text_encoder} if has_text else {}))
    unet.to(accelerator.device)
    if model_args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        controlnet.enable_gradient_checkpointing()
    if model_args.channels_last:
        unet, controlnet = (model.to(memory_format=torch.channels_last) for model in (unet, controlnet))
    trained_model, trained_parameters = controlnet, list(controlnet.parameters())
    optimizer = build_optimizer(trained_parameters, training_args)
    controlnet, optimizer, train_dataloader = accelerator.prepare(controlnet, optimizer, train_dataloader)
    steps_per_epoch = math.ceil(len(train_dataloader) / training_args.gradient_accumulation_steps)
    max_train_steps = training_args.max_train_steps or training_args.num_train_epochs * steps_per_epoch
    lr_scheduler = build_lr_scheduler(optimizer, training_args, max_train_steps)
    ema = build_ema(trained_parameters, training_args)
    timestep_sampler = TIMESTEP_SAMPLERS[diffusion_args.timestep_sampler](noise_scheduler.config.num_train_timesteps)
    progress = TrainingProgress()
    accelerator.register_for_checkpointing(lr_scheduler, timestep_sampler, progress, frozen)

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
        {"": trained_model},
        timestep_sampler,
    )
    if ema is not None:
        ema.to(accelerator.device)
    metrics = LossMetrics(noise_scheduler.config.num_train_timesteps, accelerator.device)

    total_batch_size = (
        training_args.train_batch_size * accelerator.num_processes * training_args.gradient_accumulation_steps
    )
    num_trained, num_frozen = (
        sum(p.numel() for model in models for p in model.parameters())
        for models in ([trained_model], frozen.networks.values())
    )
    logger.info(
        f"{num_trained / 1e6:.2f}M parameters beside {num_frozen / 1e6:.2f}M frozen ones, {len(images)} images"
        + (f" in {num_classes} classes" if num_classes else "")
        + (f" with {len(captions.texts) - 1} captions" if has_text else "")
        + f" and {control_args.condition or control_args.conditioning_image_column} at {resolution} x {resolution}, "
        f"{total_batch_size} per optimizer step; steps {progress.global_step} to {max_train_steps}, {steps_per_epoch} "
        "an epoch"
    )
    log = TrainingLog(accelerator, output_dir, settings, progress.global_step, max_train_steps, total_batch_size)
    after_step = AfterStep(
        accelerator, training_args, max_train_steps, progress, lr_scheduler, ema, trained_parameters, metrics, log
    )

    def save_result(folder: str) -> None:
        """The ControlNet with the averaged weights; only for the main process."""
        with result_weights(ema, trained_parameters):
            trained_model.save_pretrained(folder)

    def show() -> None:
        """Curves and grid, on the main process."""
        if accelerator.is_main_process:
            if log.history.rows():
                plot_loss_curves(log.history.rows(), os.path.join(output_dir, "loss_curves.png"))
            pipeline = ADMControlNetPipeline(
                unet=unet,
                scheduler=noise_scheduler,
                vae=None,
                text_encoder=text_encoder,
                tokenizer=tokenizer,
                classifier=None,
                controlnet=trained_model,
                id2label=id2label,
            )
            if has_text:
                text_encoder.to(accelerator.device)
            try:
                with evaluation_weights(trained_model, ema, trained_parameters):
                    grid = sample_grid(pipeline, examples, training_args)
            finally:
                if text_args.precompute_text_embeddings:
                    text_encoder.to("cpu")
            save_samples(accelerator, grid, output_dir, progress.global_step)

    validate = functools.partial(survives, accelerator, progress, show)  # the other processes wait for the main one

    # 5. train
    controlnet.train()
    if has_text:
        empty_caption = {name: value.to(accelerator.device) for name, value in captions.empty.items()}
    while progress.global_step < max_train_steps:
        for batch in rest_of_epoch(train_dataloader, progress):
            seed_step(training_args.seed, accelerator.process_index, progress.micro_step)
            with accelerator.accumulate(controlnet):
                pixels = batch["images"]  # (B, 3, H, W) in [-1, 1]
                if model_args.channels_last:
                    pixels = pixels.contiguous(memory_format=torch.channels_last)
                model_kwargs = {}
                if num_classes is not None:
                    labels = batch["class_labels"]  # (B,), -1 for unlabelled
                    model_kwargs["class_labels"] = drop_labels(labels, null_class_id, model_args.class_dropout_prob)
                if has_text:
                    model_kwargs |= caption_model_kwargs(
                        batch, captions, empty_caption, text_encoder, text_args, unet_config
                    )
                conditions = batch["conditions"]  # (B, 3, H, W) in [0, 1]
                dropped = torch.rand(len(conditions), device=conditions.device) < control_args.condition_dropout_prob
                model_kwargs["controlnet_cond"] = conditions.masked_fill(dropped[:, None, None, None], 0)
                timesteps, weights = timestep_sampler.sample(pixels.shape[0], device=pixels.device)
                terms = training_losses(
                    functools.partial(predict, unet, controlnet, accelerator),
                    noise_scheduler,
                    pixels,
                    timesteps,
                    objective=diffusion_args.objective,
                    snr_gamma=diffusion_args.snr_gamma,
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
                frozen.check()
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

    # 6. the result: the ControlNet with the averaged weights; only then what could fail
    frozen.check()
    hashes = ", ".join(f"{name} {value}" for name, value in frozen.hashes.items())
    logger.info(f"What was frozen has the weights that it began with (hashes: {hashes})")
    if accelerator.is_main_process:
        save_result(output_dir)
        logger.info(f"Saved the ControlNet to {output_dir}")
    validated = validate()
    accelerator.end_training()
    push_result(accelerator, training_args)
    check_last_validation(accelerator, output_dir, validated)


if __name__ == "__main__":
    run_command(main)
