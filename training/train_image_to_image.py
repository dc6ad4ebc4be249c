#!/usr/bin/env python
"""
Trains an ablated diffusion model that translates images: grey to colour, one style to another, a scan to its
segmentation, noisy to clean. From scratch or from a pretrained model; also by class, by caption, or both.

    accelerate launch training/train_image_to_image.py --config training/configs/emoji_32_colorize.yaml \
        --output_dir runs/colorize

The source image is concatenated to the noisy target image of the same size (Palette, Saharia et al. 2022,
https://huggingface.co/papers/2111.05826). Pairs of images come from a second column, a second folder or second files,
or the source is made from the target. Every argument can be given in the recipe or on the command line, which wins;
`--help` lists them.
"""

from __future__ import annotations

import functools

from PIL import Image

from diffusers_adm import ADMImageToImagePipeline
from diffusers_adm.commands.errors import run_command
from diffusers_adm.conditioning.condition import merge
from diffusers_adm.conditioning.source_image import SourceImageCondition
from diffusers_adm.hub.publication import prepare_repository, push_result
from diffusers_adm.training import (
    DIFFUSION_ARGUMENTS,
    HeldOutMeasures,
    ImageToImageArguments,
    TrainingRun,
    choose_examples,
    held_out_measures,
    load_diffusion,
    load_held_out,
    parse_run,
    record_measures,
    source_arguments,
    source_column_in_errors,
    start_run,
    training_losses,
    translate_examples,
    translation_measures,
)


ARGUMENT_TYPES = (*DIFFUSION_ARGUMENTS, ImageToImageArguments)


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    all_args, record = parse_run(ARGUMENT_TYPES, argv, "train_image_to_image", description=__doc__)
    *common_args, pair_args = all_args  # the former are those of `DIFFUSION_ARGUMENTS`
    model_args, data_args, diffusion_args, training_args, text_args = common_args
    model_args.check_source()
    pair_args.check(data_args)
    accelerator = start_run("train_image_to_image", all_args, record)
    prepare_repository(accelerator, training_args)

    # 2. Networks and data
    with source_column_in_errors():
        diffusion = load_diffusion(
            accelerator,
            record,
            common_args,
            may_widen=True,
            translation=pair_args,
            only_pixels="train_image_to_image.py trains in pixels",
        )
    record.check_network(diffusion.unet.config, diffusion.resolution, diffusion.frozen_parts())
    train_dataset, validation_dataset = diffusion.datasets(dataset_class=pair_args.dataset_class())
    with accelerator.main_process_first():
        held_out = load_held_out(
            diffusion,
            dataset_class=pair_args.dataset_class(),
            pair=functools.partial(pair_args.pair, files=pair_args.validation_source_data_files),
        )
    shown, number = held_out or validation_dataset, training_args.num_validation_images
    examples = choose_examples(shown, number, diffusion.null_class_id)
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
        description=diffusion.describe(f", from {pair_args.describe()},"),
        measures=[
            *held_out_measures(diffusion, held_out),
            *translation_measures(examples, diffusion.image_format),
        ],
        compiles=model_args.compile,
    )
    source = SourceImageCondition(dropout_prob=pair_args.source_dropout_prob)
    conditions = [source, *diffusion.conditions(run.networks)]
    build_pipeline = functools.partial(
        diffusion.build_pipeline,
        ADMImageToImagePipeline,
        source_format=diffusion.condition_format,
        source_dropout_prob=pair_args.source_dropout_prob,
    )

    def save_result(folder: str) -> None:
        build_pipeline().save_pretrained(folder)

    def generate() -> Image.Image:
        images, measures = translate_examples(build_pipeline(), examples, training_args)
        record_measures(run, training_args, measures, len(examples), held_out is not None)
        return images

    measures = HeldOutMeasures(
        run,
        diffusion,
        held_out,
        [SourceImageCondition(), *diffusion.conditions(diffusion.trained_networks(), held_out)],
        build_pipeline=build_pipeline,
        arguments_of=functools.partial(source_arguments, source_format=diffusion.condition_format),
    )
    show = functools.partial(run.show_samples, generate)

    def validate() -> bool:
        """On all processes. Whether all of it succeeded."""
        return all([measures.validate(), run.validate(show), run.keep_best(save_result)])

    # 4. Training
    run.make_up(validate, save_result)
    for batch in run.batches():
        with run.accumulate():
            batch["images"] = batch["images"].contiguous(memory_format=model_args.memory_format)
            pixels = batch["images"]  # (B, C, H, W) in [-1, 1]
            inputs = merge(condition.for_training(batch) for condition in conditions)
            timesteps, weights = diffusion.timestep_sampler.sample(len(pixels), device=pixels.device)
            terms = training_losses(
                run.networks["unet"],
                diffusion.noise_scheduler,
                pixels,
                timesteps,
                objective=diffusion_args.objective,
                snr_gamma=diffusion_args.snr_gamma,
                num_levels=diffusion.image_format.num_levels,
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
