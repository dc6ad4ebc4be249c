#!/usr/bin/env python
"""
Trains a classifier of noisy images, for classifier guidance; or of clean images, to evaluate samples.

    accelerate launch training/train_classifier.py --config training/configs/classifier_emoji_32.yaml

Dhariwal & Nichol 2021 (https://huggingface.co/papers/2105.05233), section 4 and appendix H: cross entropy at uniform
random timesteps. Every argument can be given in the recipe or on the command line, which wins; `--help` lists them.
"""

from __future__ import annotations

import functools
import os
from collections import Counter

import torch
import torch.nn.functional as F

from diffusers_adm.commands.errors import run_command
from diffusers_adm.hub.publication import prepare_repository, push_result
from diffusers_adm.training import (
    CLASSIFIER_ARGUMENTS,
    ClassificationMetrics,
    TrainingRun,
    UniformTimestepSampler,
    evaluate,
    load_classification,
    parse_run,
    plot_accuracy_by_timestep,
    plot_classifier_curves,
    start_run,
)


ARGUMENT_TYPES = CLASSIFIER_ARGUMENTS


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    all_args, record = parse_run(ARGUMENT_TYPES, argv, "train_classifier", description=__doc__)
    model_args, data_args, _, training_args = all_args
    model_args.check_source()
    if data_args.label_column is None:
        raise ValueError("A classifier is trained on labelled images. Name their column with `--label_column`.")
    accelerator = start_run("train_classifier", all_args, record)
    prepare_repository(accelerator, training_args)

    # 2. Network and data
    classification = load_classification(accelerator, record, all_args)
    classifier, held_out, edges = classification.classifier, classification.held_out, classification.edges
    noise_scheduler, output_dir = classification.noise_scheduler, training_args.output_dir
    model_args.apply_to(classifier)

    # 3. Optimizer, learning rate, average, log; the checkpoint that is resumed
    num_timesteps, num_classes = edges[-1], classifier.config.num_classes
    metrics, validation_metrics = (
        ClassificationMetrics(num_timesteps, num_classes, len(edges) - 1, accelerator.device) for _ in range(2)
    )
    run = TrainingRun(
        accelerator,
        record,
        data_args,
        training_args,
        {"classifier": classifier},
        classification.train_dataset,
        metrics,
        description=classification.describe(),
        measures=[f"validation_{name}" for name in ("loss", "accuracy", "balanced_accuracy") if held_out is not None],
        compiles=model_args.compile,
    )
    timestep_sampler = UniformTimestepSampler(num_timesteps)

    def measure() -> None:
        with run.evaluation_weights():
            batch_size, num_workers = training_args.train_batch_size, data_args.dataloader_num_workers
            evaluate(classification, validation_metrics, accelerator, batch_size, num_workers)

    def report(values: dict[str, float]) -> None:
        run.log.write_validation(run.progress.global_step, values)
        by_bin = [values[f"accuracy_bin{index}"] for index in range(len(edges) - 1)] if len(edges) > 2 else []
        run.logger.info(
            f"Step {run.progress.global_step}, {len(held_out)} held-out images: loss {values['loss']:.3f}, "
            f"accuracy {values['accuracy']:.1%}, balanced {values['balanced_accuracy']:.1%}"
            + (f"; accuracy by timestep {' '.join(f'{accuracy:.0%}' for accuracy in by_bin)}" if by_bin else "")
        )
        if accelerator.is_main_process and by_bin:
            counts = Counter(held_out.dataset["label"][:])
            plot_accuracy_by_timestep(
                values,
                edges,
                os.path.join(output_dir, "accuracy_by_timestep.png"),
                f"{len(held_out)} held-out images",
                [counts[number] / len(held_out) for number in classification.id2label],
            )

    def validate() -> bool:
        """On all processes; log and plots on the main one. Whether it succeeded."""
        validated = run.validate(measure) and run.validate(
            functools.partial(report, validation_metrics.compute(accelerator))
        )
        return run.keep_best(classification.save) and validated

    def plot() -> None:
        if accelerator.is_main_process:
            plot_classifier_curves(run.log.history.rows(), os.path.join(output_dir, "classifier_curves.png"))

    # 4. Training
    # A run that ended between a checkpoint and its validation makes up for it when it is resumed.
    resumed_at = run.progress.global_step
    owes_validation = held_out is not None and run.log.lacks_validation(resumed_at)
    if held_out is not None:
        run.make_up(validate, classification.save)
    for batch in run.batches():
        with run.accumulate():
            pixels, class_labels = batch["images"], batch["class_labels"]  # (B, C, H, W) in [-1, 1]; (B,)
            if noise_scheduler is not None:
                timesteps, _ = timestep_sampler.sample(len(pixels), device=pixels.device)
                pixels = noise_scheduler.add_noise(pixels, torch.randn_like(pixels), timesteps)
            else:
                timesteps = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)
            pixels = pixels.contiguous(memory_format=model_args.memory_format)
            logits = run.networks["classifier"](pixels, timesteps).logits.float()  # (B, num_classes)
            loss = F.cross_entropy(logits, class_labels, reduction="none")  # (B,)
            metrics.update(timesteps, logits.detach(), class_labels, loss.detach())
            run.backward(loss.mean(), timesteps)
            run.step_optimizer()
        if accelerator.sync_gradients:
            due = run.after_step()  # learning rate, EMA, a row of the log
            if due.checkpoint:
                run.save_checkpoint(classification.save)
            if due.validation and held_out is not None:
                validate()

    # 5. The classifier with the averaged weights; then the last validation, the curves, and the Hub
    def validate_and_plot() -> bool:
        is_due = held_out is not None and (run.progress.global_step > resumed_at or owes_validation)
        validated = validate() if is_due else True
        return run.validate(plot) and validated

    run.finish(classification.save, validate_and_plot, push_result, "classifier")


if __name__ == "__main__":
    run_command(main)
