#!/usr/bin/env python
"""
Trains an ablated diffusion model with a learned variance, from scratch or from a pretrained one: unconditional, by
class, by caption, or both; all of its weights, or a low-rank adapter beside them; to draw images or to inpaint them.

    accelerate launch training/train_adm.py --config training/configs/emoji_32.yaml --output_dir runs/emoji

Nichol & Dhariwal 2021 (https://huggingface.co/papers/2102.09672), Dhariwal & Nichol 2021
(https://huggingface.co/papers/2105.05233). Every argument may stand in the recipe and be overridden on the command
line; `--help` lists them.

Inpainting (`--task inpaint`) is that of GLIDE (https://huggingface.co/papers/2112.10741, section 4): the network sees
what is known of an image and where, and predicts all of it.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from typing import Literal

import datasets
import torch
from accelerate.logging import get_logger
from PIL import Image

from diffusers_adm import ADMInpaintPipeline, ADMPipeline
from diffusers_adm.commands.errors import run_command
from diffusers_adm.conditioning.inpainting import masked_image_channels
from diffusers_adm.schedulers.noise_schedules import noise_schedule_of
from diffusers_adm.training import (
    IMAGE_CHANNELS,
    INPAINT_CHANNELS,
    TIMESTEP_SAMPLERS,
    AfterStep,
    DataArguments,
    DiffusionArguments,
    DiffusionTrainingArguments,
    ImageDataset,
    InpaintingDataset,
    LossMetrics,
    TextArguments,
    TrainingLog,
    TrainingProgress,
    UNetArguments,
    add_lora,
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
    checkpoint_adapter_alone,
    choose_examples,
    choose_resolution,
    draw,
    drop_labels,
    evaluation_weights,
    labelled_grid,
    load_image_dataset,
    load_text,
    load_unet_config,
    match_unet_classes,
    parse_run,
    plot_loss_curves,
    prepare_captions,
    prepare_output_dir,
    push_result,
    record_losses,
    rest_of_epoch,
    result_weights,
    run_settings,
    save_checkpoint,
    save_lora,
    save_samples,
    seed_step,
    start_accelerator,
    survives,
    training_losses,
    unwrap,
    widen_input,
)


logger = get_logger("train_adm")

DEFAULT_VALIDATION_PROMPTS = 4
UNKNOWN_GREY = 0.5  # of what is to be painted, in grids


@dataclass
class PromptArguments(TextArguments):
    validation_prompts: list[str] | None = arg(None, "The prompts of a grid; none: the first captions of the data.")

    def __post_init__(self):
        super().__post_init__()
        if self.caption_column is None and self.validation_prompts:
            raise ValueError(
                "`validation_prompts` was given without a `caption_column`. Name the column of the captions."
            )


@dataclass
class TaskArguments:
    task: Literal["generate", "inpaint"] = arg(
        "generate", "What to learn: to draw images, or to fill in what is masked. An ordinary model may become either."
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


ARGUMENT_TYPES = (
    UNetArguments,
    DataArguments,
    DiffusionArguments,
    DiffusionTrainingArguments,
    PromptArguments,
    TaskArguments,
    LoraArguments,
)


def choose_prompts(
    text_args: PromptArguments, images: datasets.Dataset, null_class_id: int | None
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


def sample_grid(
    pipeline: ADMPipeline,
    training_args: DiffusionTrainingArguments,
    prompts: list[tuple[str, int | None]] | None = None,
    classes: list[int] | None = None,
) -> Image.Image:
    """Validation images: one row per prompt (with its class, if the model has classes), or else one per class."""
    total = training_args.num_validation_images
    if prompts is not None:
        conditions, row_labels = prompts[:total], [prompt for prompt, _ in prompts[:total]]
    elif classes:
        conditions = [(None, label) for label in classes[:total]]
        row_labels = [pipeline.id2label[label] for label in classes[:total]]
    else:
        conditions, row_labels = [(None, None)], None
    rows = len(conditions) if row_labels else math.ceil(math.sqrt(total))
    cols = math.ceil(total / rows)
    drawn = [condition for condition in conditions for _ in range(cols if row_labels else total)][:total]
    wanted = [
        {name: value for name, value in (("prompt", prompt), ("class_labels", label)) if value is not None}
        for prompt, label in drawn
    ]
    images = draw(pipeline, wanted, training_args)
    return labelled_grid(images, rows, cols, row_labels=row_labels, scale=max(1, 64 // images[0].width))


def inpainting_grid(
    pipeline: ADMPipeline,
    training_args: DiffusionTrainingArguments,
    dataset: InpaintingDataset,
    null_class_id: int | None,
) -> Image.Image:
    """Validation images: one row per image, evenly spaced over the data; what is known of it, then what is drawn."""
    total = training_args.num_validation_images
    examples = choose_examples(dataset, math.ceil(math.sqrt(total)), null_class_id)
    rows, cols = len(examples), math.ceil(total / len(examples))
    masked, wanted = [], []
    for tensors, told in examples:
        image, known = tensors["images"] / 2 + 0.5, tensors["keep_mask"]
        masked.append(torch.where(known == 1, image, UNKNOWN_GREY))
        wanted += [{"image": image, "mask_image": 1 - known, **told}] * cols
    drawn = draw(pipeline, wanted, training_args)
    shown = pipeline.image_processor.numpy_to_pil(torch.stack(masked).permute(0, 2, 3, 1).numpy())
    cells = [cell for row in range(rows) for cell in (shown[row], *drawn[row * cols : (row + 1) * cols])]
    return labelled_grid(cells, rows, cols + 1, scale=max(1, 64 // dataset.resolution))


def main(argv: list[str] | None = None) -> None:
    all_args, run = parse_run(ARGUMENT_TYPES, argv, "train_adm", description=__doc__)
    without_effect = check_effects(*all_args, taken_over=run.left_out)
    model_args, data_args, diffusion_args, training_args, text_args, task_args, lora_args = all_args
    model_args.check_source()
    if lora_args.lora_rank is not None:
        if model_args.pretrained_model_name_or_path is None:
            raise ValueError("`lora_rank` adapts a trained model. Name it with `--pretrained_model_name_or_path`.")
        if text_args.train_text_encoder:
            raise ValueError("`lora_rank` adapts the U-Net alone. Drop `train_text_encoder`, or train all weights.")
        if model_args.replace_classes:
            raise ValueError(
                "`lora_rank` leaves the pretrained weights as they are, those of its classes included. Drop "
                "`replace_classes`, or train all weights."
            )
    inpaints = task_args.task == "inpaint"
    if inpaints and text_args.validation_prompts:
        raise ValueError(
            "`validation_prompts` was given, but grids of inpainting show images of the data with their own captions. "
            "Leave it out."
        )
    not_shown = (text_args.validation_prompts or [])[training_args.num_validation_images :]
    if not_shown:
        without_effect.append(
            f"`num_validation_images` is {training_args.num_validation_images}, so that these of `validation_prompts` "
            f"are not shown: {', '.join(map(repr, not_shown))}."
        )
    output_dir = training_args.output_dir

    # 1. processes, logging, trackers
    accelerator = start_accelerator(training_args, "train_adm")
    for sentence in without_effect:
        logger.warning(sentence)
    settings = run_settings(*all_args)
    run.begin(settings)

    # 2. diffusion process and data: the cheap checks first
    noise_scheduler = build_scheduler(model_args, data_args, diffusion_args)
    run.check_noise(noise_scheduler)
    in_channels = INPAINT_CHANNELS if inpaints else IMAGE_CHANNELS
    unet_config = load_unet_config(model_args, data_args, noise_scheduler, in_channels, may_widen=inpaints)
    if lora_args.lora_rank is not None and unet_config.get("in_channels") != in_channels:
        raise ValueError(
            "`lora_rank` adapts a model whose other weights stay as they are, but this one takes no masks yet: the "
            "weights of its new input channels must be trained. Train all weights, or adapt a model that inpaints."
        )
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
        keeps = "`lora_rank` leaves the pretrained weights as they are" if lora_args.lora_rank is not None else None
        images, id2label = match_unet_classes(unet, images, id2label, model_args, data_args, keeps)
        run.check_rows(id2label)
        if unet.config.in_channels < in_channels:
            widen_input(unet, in_channels)
        null_class_id = unet.config.null_class_id
        check_guidance_of_grids(training_args, unet.config, num_classes, has_text)
        resolution = choose_resolution(data_args.resolution, unet.config, "U-Net")
        unet.register_to_config(sample_size=resolution)
        images, _ = check_images(
            images,
            resolution,
            min_image_size=data_args.min_image_size,
            allow_unlabelled=num_classes is None or null_class_id is not None,
            num_proc=data_args.image_check_num_proc,
            output_dir=output_dir if accelerator.is_main_process else None,
            id2label=id2label,
        )
        captions, prompts = None, None
        # A pretrained model may have many others.
        shown_classes = None if num_classes is None else sorted({label for label in images["label"][:] if label >= 0})
        if has_text:
            prompts = None if inpaints else choose_prompts(text_args, images, null_class_id)
            captions = prepare_captions(
                images, tokenizer, text_encoder, text_args, unet.config, accelerator.device, data_args.cache_dir
            )
    check_batch_fits(len(images), training_args.train_batch_size, accelerator.num_processes)
    run.check_data(len(images))
    frozen = {
        "U-Net": unet if lora_args.lora_rank is not None else None,
        "text encoder": None if text_args.train_text_encoder else text_encoder,
        "tokenizer": tokenizer,
    }
    run.check_network(unet.config, resolution, frozen)
    train_dataset = (InpaintingDataset if inpaints else ImageDataset)(
        images,
        resolution,
        data_args.center_crop,
        data_args.random_flip,
        seed=training_args.seed,
        captions=captions,
    )
    # The same crops and masks in all grids: its epoch stays the first.
    shown_dataset = InpaintingDataset(images, resolution, center_crop=True, seed=training_args.seed)
    train_dataloader = build_dataloader(train_dataset, data_args, training_args)

    # 3. what is trained; optimizer, learning rate, average
    if lora_args.lora_rank is not None:
        add_lora(unet, lora_args.lora_rank, lora_args.lora_alpha, lora_args.lora_target_modules)
        checkpoint_adapter_alone(accelerator, noise_schedule_of(noise_scheduler))
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
    after_step = AfterStep(
        accelerator, training_args, max_train_steps, progress, lr_scheduler, ema, trained_parameters, metrics, log
    )

    def build_pipeline() -> ADMPipeline:
        return (ADMInpaintPipeline if inpaints else ADMPipeline)(
            unet=unwrap(accelerator, unet),
            scheduler=noise_scheduler,
            vae=None,
            text_encoder=unwrap(accelerator, text_encoder) if has_text else None,
            tokenizer=tokenizer,
            classifier=None,
            id2label=id2label,
        )

    def save_result(folder: str) -> None:
        """A pipeline, or an adapter, with the averaged weights; only for the main process."""
        with result_weights(ema, trained_parameters):
            if lora_args.lora_rank is not None:
                save_lora(unwrap(accelerator, unet), folder, noise_schedule_of(noise_scheduler))
            else:
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
                    if inpaints:
                        grid = inpainting_grid(pipeline, training_args, shown_dataset, null_class_id)
                    else:
                        grid = sample_grid(pipeline, training_args, prompts, shown_classes)
            finally:
                if text_args.precompute_text_embeddings:
                    pipeline.text_encoder.to("cpu")
            save_samples(accelerator, grid, output_dir, progress.global_step)

    validate = functools.partial(survives, accelerator, progress, show)  # the other processes wait for the main one

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
                    labels = batch["class_labels"]  # (B,), -1 for unlabelled
                    model_kwargs["class_labels"] = drop_labels(labels, null_class_id, model_args.class_dropout_prob)
                if has_text:
                    model_kwargs |= caption_model_kwargs(
                        batch, captions, empty_caption, text_encoder, text_args, unet_config
                    )
                # The loss is that of the whole image, as in GLIDE: what is known must be copied, which is soon learned.
                extra_channels = masked_image_channels(pixels, batch["keep_mask"]) if inpaints else None
                timesteps, weights = timestep_sampler.sample(pixels.shape[0], device=pixels.device)
                terms = training_losses(
                    unet,
                    noise_scheduler,
                    pixels,
                    timesteps,
                    objective=diffusion_args.objective,
                    snr_gamma=diffusion_args.snr_gamma,
                    extra_channels=extra_channels,
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

    # 6. the result: a pipeline, or an adapter, with the averaged weights; only then what could fail
    if accelerator.is_main_process:
        save_result(output_dir)
        logger.info(f"Saved the {'adapter' if lora_args.lora_rank is not None else 'pipeline'} to {output_dir}")
    validated = validate()
    accelerator.end_training()
    push_result(accelerator, training_args)
    check_last_validation(accelerator, output_dir, validated)


if __name__ == "__main__":
    run_command(main)
