"""An autoencoder of a training run, and its data: arguments, loading, and validation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import Subset

from ..commands.arguments import arg, check_at_least
from ..conditioning.image_format import ImageFormat, as_sample_size, as_size, describe_size
from ..conditioning.latents import LatentSpace
from ..conditioning.previews import check_preview_channels, check_preview_numbers, describe_preview, preview
from ..data.autoencoder_record import load_recorded_format, save_autoencoder_record
from ..data.checks import check_batch_fits, check_images
from ..data.columns import load_image_dataset
from ..data.images import ImageDataset
from ..models.classifier_adagn import AdaGNClassifierModel
from ..models.patch_discriminator import PatchDiscriminator
from ..ops.finiteness import explain_weights
from ..ops.frechet import GaussianStatistics, frechet_distance
from .arguments import (
    FREE,
    NEVER,
    PROCESS,
    SOURCE,
    DataArguments,
    HeldOutDataArguments,
    ModelArguments,
    TrainingArguments,
    check_needs,
)
from .autoencoder_losses import AutoencoderLosses, Reconstruction, ReconstructionLoss
from .disk import write_whole
from .image_measures import measure
from .images import cell_scale, labelled_strips
from .loading import (
    check_config_keys,
    choose_resolution,
    load_model_config,
    load_pretrained,
    training_image_format,
    usable_images,
)
from .metrics import MeanMetrics
from .perceptual import features_of, load_feature_classifier, load_perceptual_network
from .resume import RunRecord


if TYPE_CHECKING:
    from .run import TrainingRun


MEASURES_NAME = "reconstruction.json"


# 1. Arguments


@dataclass
class AutoencoderArguments:
    """The losses of an autoencoder."""

    decoder_only: bool = arg(
        False,
        "Fine-tune the decoder only. The encoder, and scale and shift of the latents, stay as they are, so models that "
        "were trained in these latents remain usable.",
        resume=NEVER,
    )
    reconstruction_loss: ReconstructionLoss = arg(
        "l1", "Mean absolute error (l1), mean squared error (l2), or their sum (l1+l2).", resume=PROCESS
    )
    kl_weight: float = arg(
        1e-6,
        "Weight of the KL divergence of an image's latents, divided by the number of values of the image.",
        resume=PROCESS,
    )
    standardize_channels: bool = arg(
        False,
        "Store mean and standard deviation of the latents by channel (`latents_mean` and `latents_std` in the config) "
        "instead of one scale and shift, so that each channel of the samples is standard.",
        resume=FREE,
    )
    perceptual_weight: float = arg(0.0, "Weight of the perceptual distance; 0: none.", resume=PROCESS)
    perceptual_network: str | None = arg(
        None,
        "Network of the perceptual distance: lpips (needs the package lpips), or a classifier on the Hub or in a "
        "folder, e.g. spaces/model/base.",
        resume=SOURCE,
    )
    discriminator_start: int | None = arg(
        None,
        "Optimizer step from which on a patch discriminator is trained and used; none: no discriminator.",
        resume=NEVER,
    )
    discriminator_weight: float = arg(
        0.5,
        "Weight of the discriminator relative to the reconstruction: at 1, their gradients at the decoder's last layer "
        "have equal norms.",
        resume=PROCESS,
    )
    discriminator_channels: int = arg(64, "Channels of the discriminator's first layer.", resume=NEVER)
    discriminator_layers: int = arg(
        3, "Convolutions of stride 2 of the discriminator: patches of 16, 34 or 70 pixels for 1, 2 or 3.", resume=NEVER
    )

    def __post_init__(self) -> None:
        check_at_least(self, 0, "kl_weight", "perceptual_weight", "discriminator_weight")
        check_at_least(self, 1, "discriminator_channels", "discriminator_layers")
        if self.perceptual_weight > 0 and self.perceptual_network is None:
            raise ValueError(
                "`perceptual_weight` needs a `perceptual_network`: lpips, or the folder of a classifier. Pass both, or "
                "neither."
            )
        check_needs(self, "perceptual_weight", "perceptual_network")
        if self.discriminator_start is not None and self.discriminator_start < 0:
            raise ValueError(
                f"`discriminator_start` is {self.discriminator_start}; it must be an optimizer step from 0 on. Leave "
                "it out to train without a discriminator."
            )

    def check_steps(self, max_train_steps: int | None) -> None:
        """Raises a `ValueError` for a discriminator that would never start."""
        if self.discriminator_start is not None and self.discriminator_start >= (max_train_steps or math.inf):
            raise ValueError(
                f"`discriminator_start` is {self.discriminator_start}, but the run ends after {max_train_steps} "
                "optimizer steps (`max_train_steps`, or `num_train_epochs`), so the discriminator would never start. "
                "Start it earlier, train longer, or leave it out."
            )

    def check_precision(self, mixed_precision: str) -> None:
        """Raises a `ValueError` for a discriminator in float16."""
        # The gradients of which the adaptive weight is made are not scaled: those of a mean over an image's values are
        # about 1e-6, where float16 has two digits or less. And Accelerate unscales the gradients of both optimizers
        # before each of their steps, those that are still being accumulated twice.
        if self.discriminator_start is not None and mixed_precision == "fp16":
            raise ValueError(
                "`mixed_precision` is fp16, in which the loss against a discriminator cannot be weighted: its "
                "gradients are below the precision of float16. Pass bf16 or no, or leave `discriminator_start` out."
            )


@dataclass
class AutoencoderTrainingArguments(TrainingArguments):
    """Training arguments of an autoencoder."""

    output_dir: str = arg("autoencoder", "Folder of the autoencoder, checkpoints and curves.", resume=FREE)
    num_validation_images: int = arg(16, "Number of validation images.", resume=FREE)
    preview_channels: list[int] | None = arg(
        None,
        "Channels that validation images show, counted from 1: three as red, green and blue, e.g. 3 2 1; others in "
        "grey, side by side. None: images that Pillow can show as they are; of other data the first three, or all if "
        "there are fewer.",
        resume=FREE,
    )
    rfid_network: str | None = arg(
        None,
        "Classifier on the Hub or in a folder, whose features give the Frechet distance of validation images and their "
        "reconstructions (rFID), e.g. spaces/model/base; none: it is not measured.",
        resume=FREE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "num_validation_images")
        check_preview_numbers(self.preview_channels)


AUTOENCODER_ARGUMENTS = (ModelArguments, HeldOutDataArguments, AutoencoderArguments, AutoencoderTrainingArguments)


# 2. Loading


def load_autoencoder_config(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """
    Loads the config of the autoencoder, before any data. Raises a `ValueError` if it is not one of `AutoencoderKL`, or
    describes no network.
    """
    config = load_model_config(AutoencoderKL, "vae", model_args, data_args)
    source = model_args.pretrained_model_name_or_path or model_args.model_config_name_or_path
    class_name = config.get("_class_name", "AutoencoderKL")
    if class_name != "AutoencoderKL":
        raise ValueError(f"{source} is the config of `{class_name}`; this script trains `AutoencoderKL`.")
    if model_args.pretrained_model_name_or_path is not None:
        return config
    check_config_keys(config, AutoencoderKL, source)
    widths, groups = config.get("block_out_channels", (64,)), config.get("norm_num_groups", 32)
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        # `AutoencoderKL` would build fewer levels, or fail with an index.
        if len(config.setdefault(name, [block] * len(widths))) != len(widths):
            raise ValueError(
                f"The config {source} has {len(config[name])} `{name}` and {len(widths)} `block_out_channels`. Give "
                "both one entry for each level."
            )
    odd = [width for width in widths if width % groups]
    if odd:
        raise ValueError(
            f"The config {source} has `block_out_channels` {odd[0]}, which is not divisible by `norm_num_groups` "
            f"{groups}. Change one of them."
        )
    return config


def autoencoder_channels(config: dict[str, Any], pretrained: bool) -> int | None:
    """Channels of its images; `None`: left to the data. Raises a `ValueError` if the two numbers differ."""
    default = 3 if pretrained else None
    channels = [config.get(name, default) for name in ("in_channels", "out_channels")]
    known = {number for number in channels if number is not None}
    if len(known) > 1:
        raise ValueError(
            f"The autoencoder takes {channels[0]} channels and decodes {channels[1]}. Both must be those of the "
            "images: leave `in_channels` and `out_channels` out of its config."
        )
    return known.pop() if known else None


def build_autoencoder(
    model_args: ModelArguments, data_args: DataArguments, config: dict[str, Any], channels: int, decoder_only: bool
) -> AutoencoderKL:
    """
    Loads the pretrained autoencoder, or makes one from scratch for images of `channels`. With `decoder_only`, the
    encoder is frozen.
    """
    if model_args.pretrained_model_name_or_path is None:
        if decoder_only:
            raise ValueError(
                "`decoder_only` needs a trained encoder. Pass `pretrained_model_name_or_path`, or train both."
            )
        config = {"in_channels": channels, "out_channels": channels} | config
        if data_args.size is not None:
            config["sample_size"] = as_sample_size(data_args.size)
        autoencoder = AutoencoderKL.from_config(config)
    else:
        load = AutoencoderKL.from_pretrained
        autoencoder = load_pretrained(load, "vae", model_args, data_args, variant=model_args.variant)
        wrong = explain_weights("pretrained_model_name_or_path", autoencoder)
        if wrong is not None:
            raise ValueError(wrong)
    if autoencoder.config.scaling_factor is None and not decoder_only:
        autoencoder.register_to_config(scaling_factor=1.0)  # until it is measured
    if decoder_only:
        LatentSpace(autoencoder)  # it keeps scale and shift, so it must have them
        for part in encoder_parts(autoencoder).values():
            part.requires_grad_(False)
    return autoencoder


def encoder_parts(autoencoder: AutoencoderKL) -> dict[str, torch.nn.Module]:
    """The parts of an autoencoder that the latents of images depend on."""
    parts = {"encoder": autoencoder.encoder, "quant_conv": autoencoder.quant_conv}
    return {name: part for name, part in parts.items() if part is not None}


def reconstruct(self: AutoencoderKL, sample: torch.Tensor) -> Reconstruction:
    """The `forward` of an autoencoder in training: diffusers' keeps the posterior to itself."""
    posterior = self.encode(sample).latent_dist
    latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
    return Reconstruction(self.decode(latents).sample, posterior.mean, posterior.logvar)


@dataclass
class Autoencoding:
    """An autoencoder in training, its discriminator, and its data."""

    autoencoder: AutoencoderKL
    discriminator: PatchDiscriminator | None
    perceptual: torch.nn.Module | None
    feature_network: AdaGNClassifierModel | None
    train_dataset: ImageDataset
    held_out: ImageDataset | None
    image_format: ImageFormat
    keeps_scale: bool  # `decoder_only`
    standardizes_channels: bool
    metrics: MeanMetrics
    latents: dict[str, Any] = field(default_factory=dict)  # entries of the record, once they are measured

    def describe(self) -> str:
        """The data in words."""
        size, factor = self.train_dataset.size, LatentSpace(self.autoencoder).factor
        channels = self.autoencoder.config.latent_channels
        return (
            f"{len(self.train_dataset)} images at {describe_size(size)}, latents of {channels} channels at "
            f"{describe_size([side // factor for side in size])}, "
            + ("" if self.image_format == ImageFormat() else f"{self.image_format}, ")
            + f"{len(self.held_out) if self.held_out else 0} held-out images"
        )

    def validation_measures(self) -> list[str]:
        """The names of what `validate_reconstructions` measures, as in the log, for `keep_best`."""
        image = self.image_format.to_values(torch.zeros(1, self.image_format.channels, *self.train_dataset.size))
        names = [name for name in measure(image, image) if name in ("psnr", "ssim")]
        return [f"validation_{name}" for name in (*names, *(["rfid"] if self.feature_network is not None else []))]

    def centred_images(self) -> ImageDataset:
        """The training images as they are measured: cropped at the centre, without flips."""
        data = self.train_dataset
        return ImageDataset(data.dataset, data.resolution, center_crop=True, image_format=self.image_format)

    @property
    def last_layer(self) -> torch.Tensor:
        """The weights at which the gradients of reconstruction and discriminator are compared."""
        return self.autoencoder.decoder.conv_out.weight

    def record_losses(self, losses: AutoencoderLosses, loss: torch.Tensor, **others: torch.Tensor) -> None:
        """Adds the losses of a batch to the metrics: `loss`, their weighted sum, and its parts."""
        terms = {"loss": loss, "reconstruction": losses.fidelity, "mse": losses.mse, "kl": losses.kl}
        if self.perceptual is not None:
            terms["perceptual"] = losses.perceptual
        self.metrics.update(terms | others)

    def save(self, folder: str) -> None:
        """Saves the autoencoder, and its record."""
        self.autoencoder.save_pretrained(folder)
        resolution = as_sample_size(self.train_dataset.size)
        record = {"image_format": self.image_format.to_config(), **self.latents, "resolution": resolution}
        save_autoencoder_record(folder, record)


def load_autoencoding(accelerator: Accelerator, record: RunRecord, args: Sequence[Any]) -> Autoencoding:
    """
    Loads the networks and the data of a run, and checks that they are compatible with each other and with the
    checkpoint that is resumed. Cheap checks come first.

    Args:
        accelerator (`Accelerator`), record (`RunRecord`): From `start_run` and `parse_run`.
        args (sequence of dataclasses): Those of `AUTOENCODER_ARGUMENTS`, in this order.
    """
    model_args, data_args, loss_args, training_args = args
    pretrained, seed = model_args.pretrained_model_name_or_path is not None, training_args.seed
    loss_args.check_precision(accelerator.mixed_precision)
    config = load_autoencoder_config(model_args, data_args)
    channels, known = autoencoder_channels(config, pretrained), None
    if pretrained:
        hub = {"revision": model_args.revision, "cache_dir": data_args.cache_dir}
        known = load_recorded_format(model_args.pretrained_model_name_or_path, channels, **hub)
    held_out, validation_source = None, data_args.validation_source()
    with accelerator.main_process_first():
        images, _ = load_image_dataset(**data_args.source(), seed=seed)
        image_format = training_image_format(images, channels, known, data_args)
        if loss_args.decoder_only and known not in (None, image_format):
            raise ValueError(
                f"The training data are {image_format}, but the encoder was trained on {known}, and `decoder_only` "
                "keeps it. Leave `image_mode` and `value_range` out, or train the whole autoencoder."
            )
        record.check_format(image_format)
        check_preview_channels(training_args.preview_channels, image_format)
        # The same random numbers on every process, and in every run with this seed.
        torch.manual_seed(seed)
        only = loss_args.decoder_only
        autoencoder = build_autoencoder(model_args, data_args, config, image_format.channels, only)
        resolution = choose_resolution(data_args.size, autoencoder.config, "autoencoder")
        size = as_size(resolution)
        discriminator = build_discriminator(loss_args, image_format.channels, size)
        perceptual = feature_network = None
        if loss_args.perceptual_network is not None:
            source = loss_args.perceptual_network
            perceptual = load_perceptual_network(source, image_format, size, data_args.cache_dir)
            perceptual.to(accelerator.device)
        if training_args.rfid_network is not None:
            source = training_args.rfid_network
            feature_network = load_feature_classifier("rfid_network", source, image_format, data_args.cache_dir)
            feature_network.to(accelerator.device)
        usable: dict[str, Any] = {"min_image_size": data_args.min_image_size, "image_format": image_format}
        usable["num_proc"] = data_args.image_check_num_proc
        output_dir = training_args.output_dir
        images, unchecked = usable_images(images, resolution, data_args, accelerator, record, output_dir, **usable)
        if validation_source is not None:
            held_out, _ = load_image_dataset(**validation_source, seed=seed)
            held_out, _ = check_images(held_out, resolution, **usable)
            held_out = ImageDataset(held_out, resolution, center_crop=True, seed=seed, image_format=image_format)
    check_batch_fits(len(images), training_args.train_batch_size, accelerator.num_processes)
    record.check_data(len(images))
    frozen = {} if perceptual is None else {"perceptual network": perceptual}
    frozen |= encoder_parts(autoencoder) if only else {}
    record.check_network(autoencoder.config, resolution, frozen)
    autoencoder.register_to_config(sample_size=as_sample_size(resolution))
    autoencoder.forward = MethodType(reconstruct, autoencoder)
    train_dataset = ImageDataset(
        images,
        resolution,
        data_args.center_crop,
        data_args.random_flip,
        seed=seed,
        image_format=image_format,
        **unchecked,
    )
    metrics = MeanMetrics(accelerator.device)
    return Autoencoding(
        autoencoder,
        discriminator,
        perceptual,
        feature_network,
        train_dataset,
        held_out,
        image_format,
        only,
        loss_args.standardize_channels,
        metrics,
    )


def build_discriminator(args: AutoencoderArguments, channels: int, size: tuple[int, int]) -> PatchDiscriminator | None:
    """The discriminator of a run, if it has one. Raises a `ValueError` for images that are too small for it."""
    if args.discriminator_start is None:
        return None
    discriminator = PatchDiscriminator(channels, args.discriminator_channels, args.discriminator_layers)
    if min(size) < discriminator.min_size:
        raise ValueError(
            f"`discriminator_layers` is {args.discriminator_layers}, which needs images of {discriminator.min_size} "
            f"pixels or more; the resolution is {describe_size(size)}. Pass fewer layers or a larger resolution."
        )
    return discriminator


# 3. Validation


@torch.no_grad()
def validate_reconstructions(autoencoding: Autoencoding, run: TrainingRun) -> Image.Image:
    """
    Reconstructs the held-out images (without any, the first `num_validation_images` training images) from the modes of
    their posteriors. Writes PSNR, SSIM and, with a feature network, the Frechet distance to the log and, for the model
    card, to the folder of the run. Returns input | output of some of them.
    """
    training_args, image_format = run.training_args, autoencoding.image_format
    space, network = LatentSpace(autoencoding.autoencoder), autoencoding.feature_network
    number: int = training_args.num_validation_images  # type: ignore[attr-defined]
    dataset: Any = autoencoding.held_out
    if dataset is None:
        dataset = autoencoding.centred_images()
        dataset = Subset(dataset, range(min(number, len(dataset))))
    number = min(number, len(dataset))
    shown = {len(dataset) * place // number for place in range(number)}
    low, high = image_format.value_range
    sums: dict[str, float] = {}
    statistics = GaussianStatistics(), GaussianStatistics()
    examples: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(dataset), training_args.train_batch_size):
        places = range(start, min(start + training_args.train_batch_size, len(dataset)))
        images = torch.stack([dataset[place]["images"] for place in places])
        decoded = space.decode(space.encode(images.to(run.accelerator.device))).cpu()
        # As they would be saved: clipped, and rounded to the levels of the data.
        samples = image_format.to_samples(image_format.to_values(decoded)).float()
        measures = measure(image_format.to_values(samples), image_format.to_values(images), high - low)
        for name in ("psnr", "ssim"):
            if name in measures:
                sums[name] = sums.get(name, 0.0) + len(places) * measures[name]
        if network is not None:
            for moments, tensors in zip(statistics, (images, samples), strict=True):
                moments.update(features_of(network, tensors).cpu())
        examples += [(images[i], samples[i]) for i, place in enumerate(places) if place in shown]
    values = {name: total / len(dataset) for name, total in sums.items()}
    if network is not None and len(dataset) > 1:
        real, fake = statistics
        values["rfid"] = frechet_distance(real.mean, real.covariance, fake.mean, fake.covariance)
    _record(autoencoding, run, values, len(dataset))
    channels = training_args.preview_channels  # type: ignore[attr-defined]
    images, samples = (torch.stack(tensors) for tensors in zip(*examples, strict=True))
    columns = {
        "input": preview(images, image_format, channels),
        "output": preview(samples, image_format, channels),
    }
    return labelled_strips(columns, cell_scale(columns["input"]), describe_preview(image_format, channels))


def _record(autoencoding: Autoencoding, run: TrainingRun, measures: dict[str, float], num_images: int) -> None:
    step, held_out = run.progress.global_step, autoencoding.held_out is not None
    run.log.write_validation(step, measures)
    values = {**measures, "num_images": num_images, "held_out": held_out, "step": step}
    values["rfid_network"] = run.training_args.rfid_network  # type: ignore[attr-defined]
    path = Path(run.training_args.output_dir, MEASURES_NAME)
    write_whole(path, json.dumps(values, indent=2) + "\n")
    described = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
    images = f"{num_images} {'held-out' if held_out else 'training'} images"
    run.logger.info(f"Validation at step {step} on {images}: {described}")
