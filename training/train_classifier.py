#!/usr/bin/env python
"""
Trains a classifier of noisy images, for classifier guidance; or of clean images, to judge samples by.

    accelerate launch training/train_classifier.py --config training/configs/classifier_emoji_32.yaml

Dhariwal & Nichol 2021 (https://huggingface.co/papers/2105.05233), section 4 and appendix H: cross entropy at uniformly
drawn timesteps. Every argument may stand in the recipe and be overridden on the command line; `--help` lists them.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils.data import DataLoader, Subset

from diffusers_adm import AdaGNClassifierModel, LearnedVarianceDDPMScheduler
from diffusers_adm.commands.errors import run_command
from diffusers_adm.training import (
    AfterStep,
    ClassificationMetrics,
    DataArguments,
    ImageDataset,
    ModelArguments,
    NoiseArguments,
    TrainingArguments,
    TrainingLog,
    TrainingProgress,
    UniformTimestepSampler,
    arg,
    build_dataloader,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    check_at_least,
    check_batch_fits,
    check_config_keys,
    check_effects,
    check_images,
    check_last_validation,
    choose_resolution,
    derive_seed,
    evaluation_weights,
    from_subfolder_or_root,
    learned_classes,
    load_id2label,
    load_image_dataset,
    load_model_config,
    load_noise_scheduler,
    match_classes,
    match_classifier_classes,
    parse_run,
    plot_accuracy_by_timestep,
    plot_classifier_curves,
    prepare_output_dir,
    push_result,
    reading,
    record_noise_schedule,
    renumber_labels,
    rest_of_epoch,
    result_weights,
    run_settings,
    save_checkpoint,
    save_id2label,
    seed_step,
    start_accelerator,
    survives,
    timestep_bin_edges,
    unwrap,
)


logger = get_logger("train_classifier")


@dataclass
class ClassifierDataArguments(DataArguments):
    validation_data_files: list[str] | None = arg(None, "Parquet files of held-out images.")
    validation_split: str | None = arg(
        None, "The split of held-out images: of `validation_data_files` (train), or else of the training data."
    )
    max_validation_samples: int | None = arg(None, "Validate on a random subset of this size.")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "max_validation_samples")
        if self.max_validation_samples is not None and self.validation_source() is None:
            raise ValueError(
                "`max_validation_samples` was given, but no held-out images. Pass `--validation_data_files` or "
                "`--validation_split`."
            )

    def validation_source(self) -> dict[str, Any] | None:
        """As `source`, of the held-out images; None if there are none."""
        source = self.source() | {"max_train_samples": self.max_validation_samples}
        if self.validation_data_files is not None:
            elsewhere = {"dataset_name": None, "dataset_config_name": None, "train_data_dir": None}
            split = self.validation_split or "train"
            return source | elsewhere | {"data_files": self.validation_data_files, "split": split}
        return source | {"split": self.validation_split} if self.validation_split is not None else None


@dataclass
class ClassifierTrainingArguments(TrainingArguments):
    output_dir: str = arg("adm-classifier", "Where the classifier, checkpoints and curves go.")
    use_ema: bool = arg(False, "Keep an exponential moving average of the weights; validation and the result use it.")
    noised: bool = arg(True, "Train on noisy images; otherwise on clean ones, at timestep 0.")
    num_timestep_bins: int = arg(10, "Loss and accuracy are reported for so many equal parts of the timesteps.")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "num_timestep_bins")


ARGUMENT_TYPES = (ModelArguments, ClassifierDataArguments, NoiseArguments, ClassifierTrainingArguments)


def load_classifier_config(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """The config of the network, read before any data."""
    config = load_model_config(AdaGNClassifierModel, "classifier", model_args, data_args)
    pretrained = model_args.pretrained_model_name_or_path
    source = pretrained or model_args.model_config_name_or_path
    class_name = config.get("_class_name", AdaGNClassifierModel.__name__)
    if class_name != AdaGNClassifierModel.__name__:
        raise ValueError(f"{source} is the config of `{class_name}`; this script trains `AdaGNClassifierModel`.")
    if pretrained is None:
        check_config_keys(config, AdaGNClassifierModel, source)
    in_channels = config.get("in_channels", 3)
    if in_channels != 3:
        raise ValueError(f"The classifier takes {in_channels} channels; this script trains on RGB images: 3.")
    return config


def build_classifier(
    model_args: ModelArguments, data_args: DataArguments, config: dict[str, Any], id2label: dict[int, str]
) -> AdaGNClassifierModel:
    """The network: as pretrained, or from scratch for these classes. Refuses one for images of another resolution."""
    pretrained = model_args.pretrained_model_name_or_path
    if pretrained is None:
        if config.get("num_classes", len(id2label)) != len(id2label):
            raise ValueError(
                f"The data has {len(id2label)} classes, but the classifier tells {config['num_classes']} apart. Leave "
                "`num_classes` out of the config, so that the data sets it."
            )
        config = {**config, "num_classes": len(id2label)}
        if data_args.resolution is not None:
            config["sample_size"] = data_args.resolution
        return AdaGNClassifierModel.from_config(config)
    with reading("pretrained_model_name_or_path", pretrained):
        classifier = from_subfolder_or_root(
            AdaGNClassifierModel.from_pretrained,
            pretrained,
            "classifier",
            revision=model_args.revision,
            variant=model_args.variant,
            cache_dir=data_args.cache_dir,
        )
    config, resolution = classifier.config, data_args.resolution
    if config.pool == "attention" and resolution not in (None, config.sample_size):
        raise ValueError(
            f"The resolution is {resolution}, but the attention pool of the pretrained classifier was built for "
            f"{config.sample_size}. Leave `resolution` out."
        )
    return classifier


def classes_of_classifier(model_args: ModelArguments, data_args: DataArguments) -> dict[int, str]:
    """The names of the pretrained classifier's classes, or those of the pipeline it belongs to; none if not saved."""
    pretrained = model_args.pretrained_model_name_or_path
    kwargs = {} if os.path.isdir(pretrained) else {"revision": model_args.revision, "cache_dir": data_args.cache_dir}
    names = load_id2label(pretrained, "classifier", **kwargs) or load_id2label(pretrained, **kwargs)
    return names or learned_classes(model_args, data_args)


@torch.no_grad()
def evaluate(
    classifier: AdaGNClassifierModel,
    images: ImageDataset,
    noise_scheduler: LearnedVarianceDDPMScheduler | None,
    metrics: ClassificationMetrics,
    edges: list[int],
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
) -> None:
    """
    Gives `metrics` the loss and accuracy on this process's share of held-out images, each seen once in every bin of
    timesteps; without a scheduler, as they are.

    Timestep (uniform in the bin) and noise are functions of seed, image and bin alone, so that validations can be
    compared, and neither the batch size nor the number of processes changes them. The classifier brings its mixed
    precision along: `Accelerator.prepare` gave it to its forward, and unwrapping leaves it there.
    """
    metrics.reset()
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    for number, batch in enumerate(DataLoader(Subset(images, own), batch_size, num_workers=num_workers)):
        labels = batch["class_labels"].to(accelerator.device)
        for index in range(len(edges) - 1):
            pixels = batch["images"]
            timesteps = torch.zeros(len(pixels), dtype=torch.long)
            if noise_scheduler is not None:
                noise = torch.empty_like(pixels)
                for place, image in enumerate(own[number * batch_size : number * batch_size + len(pixels)]):
                    generator = torch.Generator().manual_seed(derive_seed(images.seed, "validation", image, index))
                    timesteps[place] = torch.randint(edges[index], edges[index + 1], (), generator=generator)
                    noise[place] = torch.randn(pixels.shape[1:], generator=generator)
                pixels = noise_scheduler.add_noise(pixels, noise, timesteps)
            timesteps = timesteps.to(accelerator.device)
            logits = classifier(pixels.to(accelerator.device), timesteps).logits.float()
            metrics.update(timesteps, logits, labels, F.cross_entropy(logits, labels, reduction="none"))


def main(argv: list[str] | None = None) -> None:
    all_args, run = parse_run(ARGUMENT_TYPES, argv, "train_classifier", description=__doc__)
    model_args, data_args, noise_args, training_args = all_args
    without_effect = check_effects(*all_args, taken_over=run.left_out)
    model_args.check_source()
    if data_args.label_column is None:
        raise ValueError("A classifier is trained on labelled images. Name their column with `--label_column`.")
    output_dir = training_args.output_dir

    # 1. processes, logging, trackers
    accelerator = start_accelerator(training_args, "train_classifier")
    for sentence in without_effect:
        logger.warning(sentence)
    settings = run_settings(*all_args)
    run.begin(settings)

    # 2. noise and data: the cheap checks first
    config = load_classifier_config(model_args, data_args)
    noise_scheduler, num_train_timesteps, edges = None, 1, [0, 1]
    if training_args.noised:
        noise_scheduler = load_noise_scheduler(model_args, data_args, noise_args)
        num_train_timesteps = noise_scheduler.config.num_train_timesteps
        edges = timestep_bin_edges(num_train_timesteps, training_args.num_timestep_bins)
    elif noise_args.given():
        raise ValueError(f"`noised` is false, so there is no noise to describe: drop {', '.join(noise_args.given())}.")
    run.check_noise(noise_scheduler)
    validation_source, validation_images = data_args.validation_source(), None
    with accelerator.main_process_first():
        images, id2label = load_image_dataset(**data_args.source(), seed=training_args.seed)
        run.check_classes(id2label)
        # The same random numbers on every process, and in every run with this seed.
        torch.manual_seed(training_args.seed)
        classifier = build_classifier(model_args, data_args, config, id2label)
        if model_args.pretrained_model_name_or_path is not None:
            known = classes_of_classifier(model_args, data_args)
            images, id2label = match_classifier_classes(classifier, images, id2label, known, model_args.replace_classes)
            run.check_rows(id2label)
        resolution = choose_resolution(data_args.resolution, classifier.config, "classifier")
        classifier.register_to_config(sample_size=resolution)
        record_noise_schedule(classifier, "classifier", noise_scheduler)
        images, _ = check_images(
            images,
            resolution,
            min_image_size=data_args.min_image_size,
            allow_unlabelled=False,
            num_proc=data_args.image_check_num_proc,
            output_dir=output_dir if accelerator.is_main_process else None,
            id2label=id2label,
        )
        if validation_source is not None:
            validation_images, names = load_image_dataset(**validation_source, seed=training_args.seed)
            validation_images = renumber_labels(validation_images, match_classes(names, id2label))
            validation_images, _ = check_images(
                validation_images,
                resolution,
                min_image_size=data_args.min_image_size,
                allow_unlabelled=False,
                num_proc=data_args.image_check_num_proc,
            )
    label_counts = Counter(images["label"][:])
    if len(label_counts) < 2:
        only = id2label[next(iter(label_counts))]
        raise ValueError(
            f"All {len(images)} usable images are of one class, {only!r}. A classifier needs two classes or more."
        )
    missing = [name for number, name in id2label.items() if number not in label_counts]
    if missing:
        logger.warning(f"{len(missing)} of {len(id2label)} classes have no image: {', '.join(missing[:10])}")
    check_batch_fits(len(images), training_args.train_batch_size, accelerator.num_processes)
    run.check_data(len(images))
    run.check_network(classifier.config, resolution)
    train_dataset = ImageDataset(
        images, resolution, data_args.center_crop, data_args.random_flip, seed=training_args.seed
    )
    train_dataloader = build_dataloader(train_dataset, data_args, training_args)
    if validation_images is not None:
        validation_images = ImageDataset(validation_images, resolution, center_crop=True, seed=training_args.seed)

    # 3. optimizer, learning rate, average
    if model_args.gradient_checkpointing:
        classifier.enable_gradient_checkpointing()
    if model_args.channels_last:
        classifier = classifier.to(memory_format=torch.channels_last)
    trained_parameters = list(classifier.parameters())
    optimizer = build_optimizer(trained_parameters, training_args)
    classifier, optimizer, train_dataloader = accelerator.prepare(classifier, optimizer, train_dataloader)
    steps_per_epoch = math.ceil(len(train_dataloader) / training_args.gradient_accumulation_steps)
    max_train_steps = training_args.max_train_steps or training_args.num_train_epochs * steps_per_epoch
    lr_scheduler = build_lr_scheduler(optimizer, training_args, max_train_steps)
    ema = build_ema(trained_parameters, training_args)
    timestep_sampler = UniformTimestepSampler(num_train_timesteps)
    progress = TrainingProgress()
    accelerator.register_for_checkpointing(lr_scheduler, progress)

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
        {"classifier": unwrap(accelerator, classifier)},
    )
    if ema is not None:
        ema.to(accelerator.device)
    num_classes = unwrap(accelerator, classifier).config.num_classes
    metrics, validation_metrics = (
        ClassificationMetrics(num_train_timesteps, num_classes, len(edges) - 1, accelerator.device) for _ in range(2)
    )
    total_batch_size = (
        training_args.train_batch_size * accelerator.num_processes * training_args.gradient_accumulation_steps
    )
    logger.info(
        f"{sum(p.numel() for p in trained_parameters) / 1e6:.2f}M parameters, {len(images)} "
        f"{'noisy' if training_args.noised else 'clean'} images in {len(id2label)} classes at {resolution} x "
        f"{resolution}, {total_batch_size} per optimizer step; steps {progress.global_step} to {max_train_steps}, "
        f"{steps_per_epoch} an epoch; {len(validation_images) if validation_images else 0} held-out images"
    )
    log = TrainingLog(accelerator, output_dir, settings, progress.global_step, max_train_steps, total_batch_size)
    after_step = AfterStep(
        accelerator, training_args, max_train_steps, progress, lr_scheduler, ema, trained_parameters, metrics, log
    )

    def save_result(folder: str) -> None:
        """The classifier with the averaged weights, if there are any, and its noise; only for the main process."""
        with result_weights(ema, trained_parameters):
            unwrap(accelerator, classifier).save_pretrained(os.path.join(folder, "classifier"))
        save_id2label(os.path.join(folder, "classifier"), id2label)
        if noise_scheduler is not None:
            noise_scheduler.save_pretrained(os.path.join(folder, "scheduler"))

    def measure() -> None:
        model = unwrap(accelerator, classifier)
        with evaluation_weights(model, ema):
            evaluate(
                model,
                validation_images,
                noise_scheduler,
                validation_metrics,
                edges,
                accelerator,
                training_args.train_batch_size,
                data_args.dataloader_num_workers,
            )

    def report(values: dict[str, float]) -> None:
        log.write_validation(progress.global_step, values)
        by_bin = [values[f"accuracy_bin{index}"] for index in range(len(edges) - 1)] if len(edges) > 2 else []
        logger.info(
            f"Step {progress.global_step}, {len(validation_images)} held-out images: loss {values['loss']:.3f}, "
            f"accuracy {values['accuracy']:.1%}, balanced {values['balanced_accuracy']:.1%}"
            + (f"; accuracy by timestep {' '.join(f'{accuracy:.0%}' for accuracy in by_bin)}" if by_bin else "")
        )
        if accelerator.is_main_process and by_bin:
            counts = Counter(validation_images.dataset["label"][:])
            plot_accuracy_by_timestep(
                values,
                edges,
                os.path.join(output_dir, "accuracy_by_timestep.png"),
                f"{len(validation_images)} held-out images",
                [counts[number] / len(validation_images) for number in id2label],
            )

    def validate() -> bool:
        """On all processes; log and plots on the main one. Whether it succeeded."""
        return survives(accelerator, progress, measure) and survives(
            accelerator, progress, functools.partial(report, validation_metrics.compute(accelerator))
        )

    def plot() -> None:
        if accelerator.is_main_process:
            plot_classifier_curves(log.history.rows(), os.path.join(output_dir, "classifier_curves.png"))

    # 5. train
    classifier.train()
    # A run that ended between a checkpoint and its validation makes up for it when it is resumed.
    resumed_at, every = progress.global_step, training_args.validation_steps
    owes_validation = validation_images is not None and log.lacks_validation(resumed_at)
    if owes_validation and every and resumed_at % every == 0 and resumed_at < max_train_steps:
        validate()
    while progress.global_step < max_train_steps:
        for batch in rest_of_epoch(train_dataloader, progress):
            seed_step(training_args.seed, accelerator.process_index, progress.micro_step)
            with accelerator.accumulate(classifier):
                pixels, class_labels = batch["images"], batch["class_labels"]  # (B, 3, H, W) in [-1, 1]; (B,)
                if noise_scheduler is not None:
                    timesteps, _ = timestep_sampler.sample(pixels.shape[0], device=pixels.device)
                    pixels = noise_scheduler.add_noise(pixels, torch.randn_like(pixels), timesteps)
                else:
                    timesteps = torch.zeros(pixels.shape[0], dtype=torch.long, device=pixels.device)
                if model_args.channels_last:
                    pixels = pixels.contiguous(memory_format=torch.channels_last)
                logits = classifier(pixels, timesteps).logits.float()  # (B, num_classes)
                loss = F.cross_entropy(logits, class_labels, reduction="none")  # (B,)
                metrics.update(timesteps, logits.detach(), class_labels, loss.detach())
                accelerator.backward(loss.mean())
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
            if due.end:  # the last validation follows below
                break
            if due.validation and validation_images is not None:
                validate()
                log.start_clock(progress.global_step)

    # 6. the result, with the averaged weights if there are any; only then what could fail
    if accelerator.is_main_process:
        save_result(output_dir)
        logger.info(f"Saved the classifier to {output_dir}")
    validated = True
    if validation_images is not None and (progress.global_step > resumed_at or owes_validation):
        validated = validate()
    validated = survives(accelerator, progress, plot) and validated
    log.close()
    accelerator.end_training()
    push_result(accelerator, training_args)
    check_last_validation(accelerator, output_dir, validated)


if __name__ == "__main__":
    run_command(main)
