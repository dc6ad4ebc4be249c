#!/usr/bin/env python
"""
Trains an upsampler: an ablated diffusion model that is conditioned on a low-resolution image. From scratch or from a
pretrained one; unconditional, by class, by caption, or both.

    accelerate launch training/train_super_resolution.py --config training/configs/emoji_64_upsampler.yaml \
        --output_dir runs/upsampler

The low-resolution images are made from the training images: downsampled by averaging blocks of pixels, noised,
upsampled, and concatenated to the noisy image (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233; the
noise, whose level conditions the network: Ho et al. 2021, https://huggingface.co/papers/2106.15282). In the latents of
an autoencoder (`--vae`), they are concatenated to those (Rombach et al. 2022, https://huggingface.co/papers/2112.10752,
section 4.4). Every argument can be given in the recipe or on the command line, which wins; `--help` lists them.
"""

from __future__ import annotations

import functools

from PIL import Image

from diffusers_adm import ADMSuperResolutionPipeline
from diffusers_adm.commands.errors import run_command
from diffusers_adm.conditioning.condition import merge
from diffusers_adm.conditioning.image_format import as_sample_size
from diffusers_adm.conditioning.low_resolution import LowResolutionCondition
from diffusers_adm.hub.publication import prepare_repository, push_result
from diffusers_adm.training import (
    DIFFUSION_ARGUMENTS,
    HeldOutMeasures,
    SuperResolutionArguments,
    TrainingRun,
    choose_examples,
    held_out_measures,
    load_diffusion,
    load_held_out,
    low_res_channels,
    low_resolution_arguments,
    parse_run,
    pretrained_pipeline_config,
    start_run,
    super_resolution_grid,
    training_losses,
)


ARGUMENT_TYPES = (*DIFFUSION_ARGUMENTS, SuperResolutionArguments)


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    all_args, record = parse_run(ARGUMENT_TYPES, argv, "train_super_resolution", description=__doc__)
    *common_args, sr_args = all_args  # the former are those of `DIFFUSION_ARGUMENTS`
    model_args, data_args, diffusion_args, training_args, _ = common_args
    model_args.check_source()
    sr_args.inherit(pretrained_pipeline_config(model_args, data_args))
    accelerator = start_run("train_super_resolution", all_args, record)
    prepare_repository(accelerator, training_args)

    # 2. Networks and data
    diffusion = load_diffusion(
        accelerator,
        record,
        common_args,
        extra_channels=low_res_channels,
        upsampler_args=sr_args,
        needs_images="low-resolution images cannot be made from latents",
    )
    record.check_network(diffusion.unet.config, diffusion.resolution, diffusion.frozen_parts())
    train_dataset, validation_dataset = diffusion.datasets()
    with accelerator.main_process_first():
        held_out = load_held_out(diffusion)
    examples = choose_examples(validation_dataset, training_args.num_validation_images, diffusion.null_class_id)
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
        description=diffusion.describe(f", from {sr_args.low_res_size} pixels,"),
        measures=held_out_measures(diffusion, held_out),
        compiles=model_args.compile,
    )
    sizes = {"low_res_size": as_sample_size(sr_args.size), "max_noise_level": sr_args.max_noise_level}
    low_resolution = LowResolutionCondition(
        diffusion.unet.config,
        diffusion.noise_scheduler,
        image_format=diffusion.image_format,
        factor=diffusion.factor,
        **sizes,
    )
    conditions = [low_resolution, *diffusion.conditions(run.networks)]
    build_pipeline = functools.partial(
        diffusion.build_pipeline,
        ADMSuperResolutionPipeline,
        noise_schedule=diffusion.noise_schedule,
        **sizes,
    )

    def save_result(folder: str) -> None:
        build_pipeline().save_pretrained(folder)

    def generate() -> Image.Image:
        return super_resolution_grid(build_pipeline(), examples, training_args)

    measures = HeldOutMeasures(
        run,
        diffusion,
        held_out,
        [low_resolution, *diffusion.conditions(diffusion.trained_networks(), held_out)],
        build_pipeline=build_pipeline,
        arguments_of=functools.partial(
            low_resolution_arguments, image_format=diffusion.image_format, low_res_size=sizes["low_res_size"]
        ),
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

    # 5. The pipeline with the averaged weights; then the last validation, and the Hub
    run.finish(save_result, validate, push_result, "pipeline")


if __name__ == "__main__":
    run_command(main)
