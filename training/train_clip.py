#!/usr/bin/env python
"""
Trains a CLIP, which embeds images and texts in one space: from scratch, or from a pretrained one.

    accelerate launch training/train_clip.py --config training/configs/clip_emoji_64.yaml --output_dir runs/clip

Radford et al. 2021 (https://huggingface.co/papers/2103.00020): transformers' `CLIPModel` with the symmetric contrastive
loss over the batches of all processes and a learned temperature. The result loads with `transformers` alone, as
`CLIPModel`, `CLIPVisionModelWithProjection` or `CLIPTextModelWithProjection`. Every argument can be given in the recipe
or on the command line, which wins; `--help` lists them.
"""

from __future__ import annotations

import os

from diffusers_adm.commands.errors import run_command
from diffusers_adm.hub.publication import prepare_repository, push_result
from diffusers_adm.training import (
    CLIP_ARGUMENTS,
    CLIP_PANELS,
    MeanMetrics,
    TrainingRun,
    checkpoint_weights_apart,
    clamp_logit_scale,
    contrastive_loss,
    describe_measures,
    load_clip_training,
    parse_run,
    plot_loss_curves,
    start_run,
    validate_clip,
    write_measures,
)


ARGUMENT_TYPES = CLIP_ARGUMENTS


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    all_args, record = parse_run(ARGUMENT_TYPES, argv, "train_clip", description=__doc__)
    model_args, data_args, training_args = all_args
    model_args.check_source()
    data_args.check()
    model_args.refuse_compile("CLIPs are networks of transformers, which were never tried with it")
    accelerator = start_run("train_clip", all_args, record)
    prepare_repository(accelerator, training_args)

    # 2. Networks and data
    training = load_clip_training(accelerator, record, all_args)
    clip, held_out = training.clip, training.held_out
    model_args.apply_to(clip)
    checkpoint_weights_apart(accelerator)  # transformers names the file of the averaged ones as Accelerate names theirs

    # 3. Optimizer, learning rate, average, log; the checkpoint that is resumed
    metrics = MeanMetrics(accelerator.device)
    run = TrainingRun(
        accelerator,
        record,
        data_args,
        training_args,
        {"": clip},
        training.train_dataset,
        metrics,
        can_split=False,
        description=training.describe(),
        decays_vectors=False,
        measures=training.validation_measures(),
    )

    def measure() -> None:
        """On the main process, whose log it is: the towers are small, and the others only wait."""
        if not accelerator.is_main_process:
            return
        with run.evaluation_weights():
            values = validate_clip(training, training_args.train_batch_size, data_args.dataloader_num_workers)
        run.log.write_validation(run.progress.global_step, values)
        write_measures(values, held_out, training_args.output_dir, run.progress.global_step)
        run.logger.info(f"Step {run.progress.global_step}, {describe_measures(values, held_out)}")

    def validate() -> bool:
        """On all processes. Whether all of it succeeded."""
        return all([run.validate(measure), run.keep_best(training.save)])

    def plot() -> None:
        if accelerator.is_main_process:
            path = os.path.join(training_args.output_dir, "loss_curves.png")
            plot_loss_curves(run.log.history.rows(), path, CLIP_PANELS)

    # 4. Training
    # A run that ended between a checkpoint and its validation makes up for it when it is resumed.
    resumed_at = run.progress.global_step
    owes_validation = held_out is not None and run.log.lacks_validation(resumed_at)
    if held_out is not None:
        run.make_up(validate, training.save)
    for batch in run.batches():
        with run.accumulate():
            images = data_args.augment(batch["images"])  # (B, 3, H, W) in [-1, 1]
            pixel_values = training.pixel_values(images).contiguous(memory_format=model_args.memory_format)
            output = run.networks[""](input_ids=batch["input_ids"], pixel_values=pixel_values)
            losses = contrastive_loss(
                output.image_embeds,  # (B, projection_dim)
                output.text_embeds,
                clip.logit_scale,
                batch["caption_number"],
                batch["caption_numbers"],
                accelerator,
            )
            run.backward(losses.loss)
            run.step_optimizer()
            clamp_logit_scale(clip.logit_scale)
            values = {name: value.detach() for name, value in losses._asdict().items()}
            metrics.update(values | {"logit_scale": clip.logit_scale.detach().exp()})
        if accelerator.sync_gradients:
            due = run.after_step()  # learning rate, EMA, a row of the log
            if due.checkpoint:
                run.save_checkpoint(training.save)
            if due.validation and held_out is not None:
                validate()

    # 5. The CLIP with the averaged weights; then the last validation, the curves, and the Hub
    def validate_and_plot() -> bool:
        is_due = held_out is not None and (run.progress.global_step > resumed_at or owes_validation)
        validated = validate() if is_due else True
        return run.validate(plot) and validated

    run.finish(training.save, validate_and_plot, push_result, "CLIP")


if __name__ == "__main__":
    run_command(main)
