#!/usr/bin/env python
"""
Trains a prior of unCLIP, which predicts the CLIP embedding of an image from its caption: from scratch, or from a
pretrained one.

    python -m diffusers_adm.data.encode_embeddings --clip runs/clip --data_files ... --output_dir runs/embeddings
    accelerate launch training/train_prior.py --config training/configs/prior_emoji_64.yaml \
        --clip runs/clip --train_data_dir runs/embeddings --output_dir runs/prior

Ramesh et al. 2022 (https://huggingface.co/papers/2204.06125, section 2.2): diffusers' `PriorTransformer` gets the
states of the caption's tokens, its text embedding, the timestep and the noisy image embedding, and predicts the image
embedding. Every argument can be given in the recipe or on the command line, which wins; `--help` lists them.
"""

from __future__ import annotations

import functools
import os

from diffusers_adm.commands.errors import run_command
from diffusers_adm.conditioning.text import TextCondition
from diffusers_adm.hub.publication import prepare_repository, push_result
from diffusers_adm.training import (
    PRIOR_ARGUMENTS,
    PRIOR_PANELS,
    TrainingRun,
    UniformTimestepSampler,
    load_prior_training,
    parse_run,
    plot_loss_curves,
    prior_inputs,
    start_run,
    training_losses,
    validate_prior,
)


ARGUMENT_TYPES = PRIOR_ARGUMENTS


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    all_args, record = parse_run(ARGUMENT_TYPES, argv, "train_prior", description=__doc__)
    model_args, data_args, _, training_args = all_args
    model_args.check_source()
    accelerator = start_run("train_prior", all_args, record)
    prepare_repository(accelerator, training_args)

    # 2. Network and data
    training = load_prior_training(accelerator, record, all_args)
    noise_scheduler, metrics = training.noise_scheduler, training.metrics
    timestep_sampler = UniformTimestepSampler(noise_scheduler.config.num_train_timesteps)

    # 3. Optimizer, learning rate, average, log; the checkpoint that is resumed
    run = TrainingRun(
        accelerator,
        record,
        data_args,
        training_args,
        {"prior": training.prior},
        training.train_dataset,
        metrics,
        description=training.describe(),
        measures=training.validation_measures(),
    )
    # No U-Net: only the captions, and how they are dropped. The padding is masked, as in sampling.
    captions = TextCondition(
        {},
        training.text.model,
        empty_caption=training.captions.empty,
        dropout_prob=data_args.caption_dropout_prob,
        masks_padding=True,
    )

    def validate() -> bool:
        """On all processes. Whether it succeeded."""
        measured = run.validate(functools.partial(validate_prior, training, run))
        return all([run.keep_best(training.save), measured and run.validate(plot)])

    def plot() -> None:
        if accelerator.is_main_process:
            path = os.path.join(training_args.output_dir, "loss_curves.png")
            plot_loss_curves(run.log.history.rows(), path, PRIOR_PANELS)

    # 4. Training
    if training.held_out is not None:
        run.make_up(validate, training.save)
    for batch in run.batches():
        with run.accumulate():
            embeds = training.standardize(batch["image_embeds"])  # (B, D), mean 0 and standard deviation 1
            text = captions.training_text(batch)  # some captions are replaced by the empty one
            timesteps, _ = timestep_sampler.sample(len(embeds), device=embeds.device)
            terms = training_losses(
                run.networks["prior"],
                noise_scheduler,
                embeds,
                timesteps,
                objective="simple",
                model_kwargs=prior_inputs(text),
                num_levels=None,
            )
            metrics.update(timesteps, terms.loss.detach(), terms.mse.detach())
            run.backward(terms.loss.mean(), timesteps)
            run.step_optimizer()
        if accelerator.sync_gradients:
            due = run.after_step()  # learning rate, EMA, a row of the log
            if due.checkpoint:
                run.save_checkpoint(training.save)
            if due.validation:
                validate()

    # 5. The prior with the averaged weights; then the last validation, and the Hub
    run.finish(training.save, validate, push_result, "prior")


if __name__ == "__main__":
    run_command(main)
