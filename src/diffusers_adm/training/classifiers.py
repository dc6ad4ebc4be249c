"""A classifier of a training run, and its data: arguments, loading, and matching with the classes of the data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils.data import DataLoader, Subset

from ..commands.arguments import arg, check_at_least
from ..conditioning.image_format import ImageFormat, as_sample_size, as_size, describe_size
from ..data.checks import check_batch_fits, check_images
from ..data.columns import load_image_dataset
from ..data.images import ImageDataset
from ..data.labels import load_id2label, match_classes, renumber_labels, save_id2label
from ..data.seeding import derive_seed
from ..models.classifier_adagn import AdaGNClassifierModel, AttentionPool2D
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .arguments import (
    FREE,
    NEVER,
    PROCESS,
    DataArguments,
    HeldOutDataArguments,
    ModelArguments,
    NoiseArguments,
    TrainingArguments,
    size_argument,
)
from .classes import ClassPlan, change_config, copy_rows, log_plan, plan_classes
from .interruption import keep_to_parent
from .loading import (
    check_config_keys,
    choose_resolution,
    load_model_config,
    load_noise_scheduler,
    load_pretrained,
    pretrained_class_names,
    record_noise_schedule,
    training_image_format,
    usable_images,
)
from .metrics import ClassificationMetrics, timestep_bin_edges
from .resume import RunRecord


if TYPE_CHECKING:
    import datasets  # of the `train` extra


logger = get_logger(__name__)


# 1. Arguments


@dataclass
class ClassifierTrainingArguments(TrainingArguments):
    """Training arguments of a classifier."""

    output_dir: str = arg("adm-classifier", "Folder of the classifier, checkpoints and curves.", resume=FREE)
    use_ema: bool = arg(
        False, "Keep an exponential moving average of the weights, for validation and the result.", resume=NEVER
    )
    noised: bool = arg(True, "Train on noisy images; otherwise on clean ones, at timestep 0.", resume=PROCESS)
    num_timestep_bins: int = arg(
        10, "Number of equal parts of the timesteps for which loss and accuracy are reported.", resume=FREE
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "num_timestep_bins")


CLASSIFIER_ARGUMENTS = (ModelArguments, HeldOutDataArguments, NoiseArguments, ClassifierTrainingArguments)


# 2. Loading


def load_classifier_config(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """Loads the config of the network, before any data."""
    config = load_model_config(AdaGNClassifierModel, "classifier", model_args, data_args)
    pretrained = model_args.pretrained_model_name_or_path
    source = pretrained or model_args.model_config_name_or_path
    class_name = config.get("_class_name", "AdaGNClassifierModel")
    if class_name != "AdaGNClassifierModel":
        raise ValueError(f"{source} is the config of `{class_name}`; this script trains `AdaGNClassifierModel`.")
    if pretrained is None:
        check_config_keys(config, AdaGNClassifierModel, source)
    return config


def classifier_image_format(
    images: datasets.Dataset, model_args: ModelArguments, data_args: DataArguments, config: dict[str, Any]
) -> ImageFormat:
    """
    The format of the training images, logged; see `training_image_format`. A new config may leave out `in_channels`; it
    then takes those of the data.
    """
    channels, known = config.get("in_channels"), None
    if model_args.pretrained_model_name_or_path is not None:
        channels = channels or 3
        recorded = config.get("image_format")
        known = ImageFormat.from_config(recorded, channels) if recorded is not None else None
    return training_image_format(images, channels, known, data_args)


def build_classifier(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: dict[str, Any],
    id2label: dict[int, str],
    channels: int = 3,
) -> AdaGNClassifierModel:
    """
    Loads the pretrained network, or makes one from scratch for these classes and images of `channels`. Raises a
    `ValueError` for a config of another number of classes, or an attention pool of another resolution.
    """
    if model_args.pretrained_model_name_or_path is None:
        if config.get("num_classes", len(id2label)) != len(id2label):
            raise ValueError(
                f"The data has {len(id2label)} classes; `num_classes` in the config is {config['num_classes']}. Leave "
                "it out."
            )
        config = {"in_channels": channels} | config | {"num_classes": len(id2label)}
        if data_args.size is not None:
            config["sample_size"] = as_sample_size(data_args.size)
        return AdaGNClassifierModel.from_config(config)
    load = AdaGNClassifierModel.from_pretrained
    classifier = load_pretrained(load, "classifier", model_args, data_args, variant=model_args.variant)
    built_for, size = classifier.config.sample_size, data_args.size
    if classifier.config.pool == "attention" and size is not None and as_size(size) != as_size(built_for):
        raise ValueError(
            f"The resolution is {data_args.resolution}; the pretrained attention pool is for "
            f"{size_argument(built_for)}. Leave it out."
        )
    return classifier


def classifier_class_names(model_args: ModelArguments, data_args: DataArguments) -> dict[int, str]:
    """Class names of the pretrained classifier, or of the pipeline that holds it; empty if neither names any."""
    pretrained = model_args.pretrained_model_name_or_path
    kwargs = {} if os.path.isdir(pretrained) else {"revision": model_args.revision, "cache_dir": data_args.cache_dir}
    names = load_id2label(pretrained, "classifier", **kwargs) or load_id2label(pretrained, **kwargs)
    return names or pretrained_class_names(model_args, data_args)


@dataclass
class Classification:
    """A classifier in training, and its data."""

    classifier: AdaGNClassifierModel
    noise_scheduler: LearnedVarianceDDPMScheduler | None  # None: clean images
    edges: list[int]  # bins of the timesteps, see `timestep_bin_edges`
    id2label: dict[int, str]
    train_dataset: ImageDataset
    held_out: ImageDataset | None
    image_format: ImageFormat

    def save(self, folder: str) -> None:
        """Saves the classifier with the names of its classes, and its noise schedule."""
        self.classifier.save_pretrained(os.path.join(folder, "classifier"))
        save_id2label(os.path.join(folder, "classifier"), self.id2label)
        if self.noise_scheduler is not None:
            self.noise_scheduler.save_pretrained(os.path.join(folder, "scheduler"))

    def describe(self) -> str:
        """The data in words."""
        return (
            f"{len(self.train_dataset)} {'clean' if self.noise_scheduler is None else 'noisy'} images in "
            f"{len(self.id2label)} classes at {describe_size(self.train_dataset.resolution)}, "
            + ("" if self.image_format == ImageFormat() else f"{self.image_format}, ")
            + f"{len(self.held_out) if self.held_out else 0} held-out images"
        )


def load_classification(accelerator: Accelerator, record: RunRecord, args: Sequence[Any]) -> Classification:
    """
    Loads noise schedule, classifier and data of a run, checks that they are compatible with each other and with the
    checkpoint that is resumed, and fits the classifier to the classes of the data. Cheap checks come first.

    Args:
        accelerator (`Accelerator`), record (`RunRecord`): From `start_run` and `parse_run`.
        args (sequence of dataclasses): Those of `CLASSIFIER_ARGUMENTS`, in this order.
    """
    model_args, data_args, noise_args, training_args = args
    seed, validation_source, held_out = training_args.seed, data_args.validation_source(), None
    config = load_classifier_config(model_args, data_args)
    noise_scheduler, edges = None, [0, 1]
    if training_args.noised:
        noise_scheduler = load_noise_scheduler(model_args, data_args, noise_args)
        edges = timestep_bin_edges(noise_scheduler.config.num_train_timesteps, training_args.num_timestep_bins)
    elif noise_args.given():
        raise ValueError(f"`noised` is false, so there is no noise to describe: drop {', '.join(noise_args.given())}.")
    record.check_noise(noise_scheduler)
    with accelerator.main_process_first():
        images, id2label = load_image_dataset(**data_args.source(), seed=seed)
        record.check_classes(id2label)
        image_format = classifier_image_format(images, model_args, data_args, config)
        record.check_format(image_format)
        # The same random numbers on every process, and in every run with this seed.
        torch.manual_seed(seed)
        classifier = build_classifier(model_args, data_args, config, id2label, image_format.channels)
        if model_args.pretrained_model_name_or_path is not None:
            known = classifier_class_names(model_args, data_args)
            images, id2label = match_classifier_classes(classifier, images, id2label, known, model_args.replace_classes)
            record.check_rows(id2label)
        resolution = choose_resolution(data_args.size, classifier.config, "classifier")
        classifier.register_to_config(sample_size=resolution, image_format=image_format.to_config())
        record_noise_schedule(classifier, "classifier", noise_scheduler)
        usable: dict[str, Any] = {"min_image_size": data_args.min_image_size, "allow_unlabelled": False}
        usable |= {"num_proc": data_args.image_check_num_proc, "image_format": image_format}
        output_dir = training_args.output_dir
        images, unchecked = usable_images(
            images, resolution, data_args, accelerator, record, output_dir, id2label=id2label, **usable
        )
        if validation_source is not None:
            held_out, names = load_image_dataset(**validation_source, seed=seed)
            held_out = renumber_labels(held_out, match_classes(names, id2label))
            held_out, _ = check_images(held_out, resolution, **usable)
            held_out = ImageDataset(held_out, resolution, center_crop=True, seed=seed, image_format=image_format)
    counts = Counter(images["label"][:])
    if len(counts) < 2:
        raise ValueError(f"All {len(images)} usable images are of one class. A classifier needs two or more.")
    missing = [name for number, name in id2label.items() if number not in counts]
    if missing:
        logger.warning(f"{len(missing)} of {len(id2label)} classes have no image: {', '.join(missing[:10])}")
    check_batch_fits(len(images), training_args.train_batch_size, accelerator.num_processes)
    record.check_data(len(images))
    record.check_network(classifier.config, resolution)
    train_dataset = ImageDataset(
        images,
        resolution,
        data_args.center_crop,
        data_args.random_flip,
        seed=seed,
        image_format=image_format,
        **unchecked,
    )
    return Classification(classifier, noise_scheduler, edges, id2label, train_dataset, held_out, image_format)


# 3. Validation


@torch.no_grad()
def evaluate(
    classification: Classification,
    metrics: ClassificationMetrics,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
) -> None:
    """
    Updates `metrics` with the loss and accuracy on this process's share of the held-out images, each of them noised
    once to a timestep of every bin; without a noise schedule, on clean images.

    Timestep (uniform in the bin) and noise depend only on seed, image and bin, so that validations can be compared
    whatever the batch size and the number of processes.
    """
    images, edges, scheduler = classification.held_out, classification.edges, classification.noise_scheduler
    metrics.reset()
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    loader = DataLoader(Subset(images, own), batch_size, num_workers=num_workers, worker_init_fn=keep_to_parent)
    for number, batch in enumerate(loader):
        labels = batch["class_labels"].to(accelerator.device)
        for index in range(len(edges) - 1):
            pixels = batch["images"]
            timesteps = torch.zeros(len(pixels), dtype=torch.long)
            if scheduler is not None:
                noise = torch.empty_like(pixels)
                for place, image in enumerate(own[number * batch_size : number * batch_size + len(pixels)]):
                    generator = torch.Generator().manual_seed(derive_seed(images.seed, "validation", image, index))
                    timesteps[place] = torch.randint(edges[index], edges[index + 1], (), generator=generator)
                    noise[place] = torch.randn(pixels.shape[1:], generator=generator)
                pixels = scheduler.add_noise(pixels, noise, timesteps)
            timesteps = timesteps.to(accelerator.device)
            logits = classification.classifier(pixels.to(accelerator.device), timesteps).logits.float()
            metrics.update(timesteps, logits, labels, F.cross_entropy(logits, labels, reduction="none"))


# 4. Fine-tuning on other classes


def match_classifier_classes(
    classifier: AdaGNClassifierModel,
    images: datasets.Dataset,
    id2label: Mapping[int, str],
    known: Mapping[int, str],
    replaces: bool = False,
) -> tuple[datasets.Dataset, dict[int, str]]:
    """
    Matches the classes of the data with those of a pretrained classifier by name (see `plan_classes`): new classes get
    rows of the last layer.

    Args:
        classifier ([`AdaGNClassifierModel`]): It is changed in place.
        id2label, known, replaces: As for `plan_classes`.

    Returns:
        `tuple` of the dataset, labelled with the numbers of the classifier, and the names of these.
    """
    plan = plan_classes(id2label, known, classifier.config.num_classes, replaces=replaces, network="classifier")
    log_plan(plan, "classifier")
    if not plan.keeps_rows:
        fit_classifier_head(classifier, plan)
    return renumber_labels(images, plan.to_row), plan.id2label


def fit_classifier_head(classifier: AdaGNClassifierModel, plan: ClassPlan) -> None:
    """
    Gives the last layer of a classifier the rows of a plan, in place and in its config.

    New rows start as the mean of all rows, so that the logit of a new class is the mean of the others. Unlike 0, this
    does not depend on a constant added to all logits, which a softmax ignores. The old classes keep their proportions.
    """
    head = classifier.head
    if isinstance(head, torch.nn.Linear):  # of the pool "adaptive"
        layer = head
    else:
        layer = head.to_out if isinstance(head, AttentionPool2D) else head[-1]
    layer.weight = torch.nn.Parameter(copy_rows(layer.weight, plan.sources, layer.weight.mean(dim=0)))
    layer.bias = torch.nn.Parameter(copy_rows(layer.bias, plan.sources, layer.bias.mean()))
    layer.out_features = len(plan.sources)
    change_config(classifier, num_classes=len(plan.sources))
