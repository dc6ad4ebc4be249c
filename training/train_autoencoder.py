#!/usr/bin/env python
"""
Trains an autoencoder, in whose latents a diffusion model can be trained: from scratch, or from a pretrained one, whole
or its decoder only.

    accelerate launch training/train_autoencoder.py --config training/configs/autoencoder_emoji_64.yaml \
        --output_dir runs/autoencoder

Rombach et al. 2022 (https://huggingface.co/papers/2112.10752, appendix G): diffusers' `AutoencoderKL` with an L1 or L2
loss, a KL divergence and, optionally, a perceptual loss and a patch discriminator. At the end the latents of the
training images are measured, so that samples of `diffusers_adm.conditioning.latents.LatentSpace` have mean 0 and
standard deviation 1. Every argument can be given in the recipe or on the command line, which wins; `--help` lists them.
"""

from __future__ import annotations

import functools

import torch
from PIL import Image

from diffusers_adm.commands.errors import run_command
from diffusers_adm.hub.publication import prepare_repository, push_result
from diffusers_adm.training import (
    AUTOENCODER_ARGUMENTS,
    AUTOENCODER_PANELS,
    CHECKPOINT_IMAGES,
    TrainingRun,
    adaptive_weight,
    autoencoder_losses,
    generator_loss,
    hinge_loss,
    load_autoencoding,
    measure_latents,
    parse_run,
    start_run,
    validate_reconstructions,
)


ARGUMENT_TYPES = AUTOENCODER_ARGUMENTS


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    all_args, record = parse_run(ARGUMENT_TYPES, argv, "train_autoencoder", description=__doc__)
    model_args, data_args, loss_args, training_args = all_args
    model_args.check_source()
    model_args.refuse_compile("the weight of the adversarial loss needs two backward passes through one forward pass")
    loss_args.check_steps(training_args.max_train_steps)
    accelerator = start_run("train_autoencoder", all_args, record)
    prepare_repository(accelerator, training_args)

    # 2. Networks and data
    autoencoding = load_autoencoding(accelerator, record, all_args)
    autoencoder, discriminator = autoencoding.autoencoder, autoencoding.discriminator
    model_args.apply_to(autoencoder)

    # 3. Optimizers, learning rate, average, log; the checkpoint that is resumed
    run = TrainingRun(
        accelerator,
        record,
        data_args,
        training_args,
        {"": autoencoder},
        autoencoding.train_dataset,
        autoencoding.metrics,
        opponent=discriminator,
        description=autoencoding.describe(),
        measures=autoencoding.validation_measures(),
    )
    loss_args.check_steps(run.max_train_steps)
    measured_at = None

    def measure(is_last: bool) -> None:
        """Collective. A checkpoint gets the scale of some images, the result that of all."""
        nonlocal measured_at
        max_images = None if is_last else CHECKPOINT_IMAGES
        measure_latents(autoencoding, run, data_args.dataloader_num_workers, max_images)
        measured_at = run.progress.global_step

    def generate() -> Image.Image:
        return validate_reconstructions(autoencoding, run)

    show = functools.partial(run.show_samples, generate, AUTOENCODER_PANELS)

    def validate() -> bool:
        """On all processes. Whether all of it succeeded."""
        validated = run.validate(show)
        if training_args.keep_best is not None and measured_at != run.progress.global_step:
            measure(is_last=False)  # for the result that may be kept
        return run.keep_best(autoencoding.save) and validated

    # 4. Training
    run.make_up(validate, autoencoding.save)
    for batch in run.batches():
        with run.accumulate():
            images = batch["images"].contiguous(memory_format=model_args.memory_format)  # (B, C, H, W) in [-1, 1]
            output = run.networks[""](images)
            losses = autoencoder_losses(
                output, images, loss_args.reconstruction_loss, loss_args.perceptual_weight, autoencoding.perceptual
            )
            loss, against = losses.fidelity + loss_args.kl_weight * losses.kl, {}
            is_adversarial = discriminator is not None and run.progress.global_step >= loss_args.discriminator_start
            if is_adversarial:
                # Not the prepared one: the discriminator gets no gradient here.
                generator = generator_loss(discriminator, output.sample)
                weight = adaptive_weight(losses.fidelity, generator, autoencoding.last_layer)
                loss = loss + loss_args.discriminator_weight * weight * generator
                against["adaptive_weight"] = weight
            run.backward(loss)
            run.step_optimizer()

            if is_adversarial:
                # One forward pass: with group norm, images do not see each other.
                real, fake = run.opponent(torch.cat([images, output.sample.detach()])).chunk(2)
                discriminator_loss = hinge_loss(real, fake)
                run.backward(discriminator_loss)
                run.step_opponent()
                against |= {"discriminator_loss": discriminator_loss.detach()}
                against |= {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
            autoencoding.record_losses(losses, loss.detach(), **against)
        if accelerator.sync_gradients:
            due = run.after_step()  # learning rate, EMA, a row of the log
            if due.checkpoint:
                measure(is_last=run.progress.global_step == run.max_train_steps)
                run.save_checkpoint(autoencoding.save)
            if due.validation:
                validate()

    # 5. The autoencoder with the averaged weights; then the last validation, and the Hub
    if measured_at != run.progress.global_step:  # a run that was resumed only to save its result
        measure(is_last=True)
    run.finish(autoencoding.save, validate, push_result, "autoencoder")


if __name__ == "__main__":
    run_command(main)
