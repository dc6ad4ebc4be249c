#!/usr/bin/env python
"""
Trains an ablated diffusion model with a learned variance, from scratch or from a pretrained one: unconditional, by
class, by caption, or both; all weights or a low-rank adapter; to generate images or to inpaint them. Or a decoder of
unCLIP, which is conditioned on CLIP image embeddings.

    accelerate launch training/train_adm.py --config training/configs/emoji_32.yaml --output_dir runs/emoji

Nichol & Dhariwal 2021 (https://huggingface.co/papers/2102.09672), Dhariwal & Nichol 2021
(https://huggingface.co/papers/2105.05233). Every argument can be given in the recipe or on the command line, which
wins; `--help` lists them.

Inpainting (`--task inpaint`) is that of GLIDE (https://huggingface.co/papers/2112.10741, section 4): the network takes
the masked image and its mask as further input channels, and predicts the whole image. Both tasks can be trained in the
latents of an autoencoder (`--vae`, Rombach et al. 2022, https://huggingface.co/papers/2112.10752).

Decoders (`--image_embeds_column` or `--image_encoder_name_or_path`) are those of Ramesh et al. 2022
(https://huggingface.co/papers/2204.06125, section 2.1).
"""

from __future__ import annotations

import functools
from typing import Any

from PIL import Image

from diffusers_adm import ADMInpaintPipeline, ADMPipeline, ADMUnCLIPPipeline
from diffusers_adm.commands.errors import run_command
from diffusers_adm.conditioning.condition import merge
from diffusers_adm.conditioning.inpainting import InpaintingCondition
from diffusers_adm.hub.publication import prepare_repository, push_result
from diffusers_adm.training import (
    DIFFUSION_ARGUMENTS,
    HeldOutMeasures,
    ImageEmbeddingArguments,
    LoraArguments,
    TaskArguments,
    TrainingRun,
    choose_inpainting_layout,
    held_out_measures,
    inpainting_arguments,
    inpainting_grid,
    load_diffusion,
    load_held_out,
    mask_channels,
    no_extra_channels,
    num_shown,
    parse_run,
    sample_grid,
    save_lora,
    start_run,
    train_lora,
    training_losses,
    variation_grid,
)
from diffusers_adm.training.validation import Example


ARGUMENT_TYPES = (*DIFFUSION_ARGUMENTS, TaskArguments, LoraArguments, ImageEmbeddingArguments)


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    all_args, record = parse_run(ARGUMENT_TYPES, argv, "train_adm", description=__doc__)
    *common_args, task_args, lora_args, embedding_args = all_args  # the former are those of `DIFFUSION_ARGUMENTS`
    model_args, data_args, diffusion_args, training_args, text_args = common_args
    model_args.check_source()
    lora_args.check(model_args, text_args)
    task_args.check(text_args)
    embedding_args.check(data_args, text_args, task_args, lora_args.lora_rank)
    inpaints, trains_adapter = task_args.task == "inpaint", lora_args.lora_rank is not None
    warnings = []
    if unused := (task_args.validation_prompts or [])[training_args.num_validation_images :]:
        warnings.append(
            f"`num_validation_images` is {training_args.num_validation_images}, so these of `validation_prompts` are "
            f"not used: {', '.join(map(repr, unused))}."
        )
    accelerator = start_run("train_adm", all_args, record, warnings)
    prepare_repository(accelerator, training_args)

    # 2. Networks and data
    layout = None
    if inpaints:
        layout = choose_inpainting_layout(task_args.inpainting_layout, model_args, data_args)
    diffusion = load_diffusion(
        accelerator,
        record,
        common_args,
        extra_channels=mask_channels if inpaints else no_extra_channels,
        may_widen=inpaints,
        # Reason in error messages: "The pretrained U-Net takes no masks, and `lora_rank` leaves ..."
        keeps="`lora_rank` leaves the pretrained weights as they are" if trains_adapter else None,
        needs_images="masked images cannot be made from latents (`task` inpaint)" if inpaints else None,
        embedding_args=embedding_args,
    )
    frozen_parts = diffusion.frozen_parts(trains_unet=not trains_adapter)
    record.check_network(diffusion.unet.config, diffusion.resolution, frozen_parts)
    train_dataset, validation_dataset = diffusion.datasets(masks=inpaints)
    with accelerator.main_process_first():
        held_out = load_held_out(diffusion, masks=inpaints)
    if embedding_args.are_given:
        variations = diffusion.examples(validation_dataset, num_shown(training_args, diffusion.captions is not None))
    else:
        validation_rows = diffusion.validation_rows(task_args.validation_prompts)
    if trains_adapter:
        train_lora(accelerator, diffusion.unet, lora_args, diffusion.noise_schedule)
    model_args.apply_to(diffusion.unet)

    # 3. Optimizer, learning rate, average, log; the checkpoint that is resumed
    run = TrainingRun(
        accelerator,
        record,
        data_args,
        training_args,
        diffusion.trained_networks(),
        train_dataset,
        diffusion.metrics,
        diffusion.timestep_sampler,
        description=diffusion.describe(),
        measures=held_out_measures(diffusion, held_out),
        compiles=model_args.compile,
    )
    masked = [InpaintingCondition(vae=diffusion.vae, layout=layout)] if inpaints else []
    conditions = [*diffusion.conditions(run.networks), *masked]

    def build_pipeline() -> ADMPipeline:
        if inpaints:
            return diffusion.build_pipeline(ADMInpaintPipeline, inpainting_layout=layout)
        return diffusion.build_pipeline(ADMUnCLIPPipeline if embedding_args.are_given else ADMPipeline)

    def save_result(folder: str) -> None:
        if trains_adapter:
            save_lora(diffusion.unet, folder, diffusion.noise_schedule)
        else:
            build_pipeline().save_pretrained(folder)

    def generate() -> Image.Image:
        if inpaints:
            return inpainting_grid(build_pipeline(), validation_dataset, diffusion.null_class_id, training_args)
        if embedding_args.are_given:
            return variation_grid(build_pipeline(), variations, training_args)
        return sample_grid(build_pipeline(), validation_rows, training_args)

    def arguments_of(example: Example) -> dict[str, Any]:
        """Arguments of the pipeline for an image of the data."""
        if inpaints:
            return inpainting_arguments(example, diffusion.image_format)
        return {"image_embeds": example[0]["image_embeds"]} if embedding_args.are_given else example[1]

    measures = HeldOutMeasures(
        run,
        diffusion,
        held_out,
        [*diffusion.conditions(diffusion.trained_networks(), held_out), *masked],
        build_pipeline=build_pipeline,
        arguments_of=arguments_of,
    )
    show = functools.partial(run.show_samples, generate)

    def validate() -> bool:
        """On all processes. Whether all of it succeeded."""
        return all([measures.validate(), run.validate(show), run.keep_best(save_result)])

    # 4. Training
    if held_out is not None:
        run.make_up(validate, save_result)
    for batch in run.batches():
        with run.accumulate():
            samples = diffusion.samples(batch)  # (B, C, H, W): pixels in [-1, 1], or latents
            inputs = merge(condition.for_training(batch) for condition in conditions)
            timesteps, weights = diffusion.timestep_sampler.sample(len(samples), device=samples.device)
            # As in GLIDE, the loss includes the kept part of an inpainted image; the network soon learns to copy it.
            terms = training_losses(
                run.networks["unet"],
                diffusion.noise_scheduler,
                samples,
                timesteps,
                objective=diffusion_args.objective,
                snr_gamma=diffusion_args.snr_gamma,
                num_levels=diffusion.num_levels,
                extra_channels=inputs.extra_channels,
                model_kwargs=inputs.kwargs,
            )
            diffusion.record_losses(terms, timesteps, weights)
            run.backward((terms.loss * weights).mean(), timesteps)
            run.step_optimizer()
        if accelerator.sync_gradients:
            due = run.after_step()  # learning rate, EMA, a row of the log
            if due.checkpoint:
                run.save_checkpoint(save_result)
            if due.validation:
                validate()

    # 5. The result with the averaged weights; then the last validation, and the Hub
    run.finish(save_result, validate, push_result, "adapter" if trains_adapter else "pipeline")


if __name__ == "__main__":
    run_command(main)
