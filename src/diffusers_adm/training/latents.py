"""The latent space of a training run: its autoencoder, and latents that were stored before."""

from __future__ import annotations

from typing import Any, NamedTuple

from accelerate.logging import get_logger

from ..conditioning.image_format import ImageFormat, Size, as_sample_size, describe_resolution
from ..conditioning.latents import UNSCALED_PIPELINES, LatentSpace
from ..data.folders import LATENTS_NAME
from ..data.latents import (
    StoredLatents,
    autoencoder_folders,
    find_stored_latents,
    hash_autoencoder,
    hash_encoder,
    load_autoencoder,
)
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .arguments import DataArguments, ImageEmbeddingArguments, UNetArguments, size_argument
from .loading import pretrained_pipeline_config


logger = get_logger(__name__)


class TrainedLatents(NamedTuple):
    """The latent space of a run, the hash of its autoencoder, and the format of the latter's images, if recorded."""

    space: LatentSpace
    autoencoder_hash: str
    image_format: ImageFormat | None


def load_latent_space(
    model_args: UNetArguments, data_args: DataArguments, keeps: str | None = None, only_pixels: str | None = None
) -> TrainedLatents | None:
    """
    Loads the autoencoder that `vae` names, or that of the pretrained pipeline; `None` without any.

    Args:
        keeps (`str`, *optional*): Why the pretrained weights stay as they are, for errors: another autoencoder than
            that of the pretrained pipeline is refused.
        only_pixels (`str`, *optional*): Why autoencoders are refused, for errors.

    Raises:
        ValueError: For one that cannot be read or is refused, or that decodes other channels than it encodes.
    """
    pretrained = model_args.pretrained_model_name_or_path
    index = pretrained_pipeline_config(model_args, data_args)
    own_folders = autoencoder_folders(index)
    if only_pixels is not None and (model_args.vae is not None or own_folders):
        source = (
            f"`vae` is {model_args.vae!r}" if model_args.vae is not None else f"{pretrained} has a `{own_folders[0]}`"
        )
        raise ValueError(f"{source}, but {only_pixels}. Train a U-Net in pixels.")
    own = given = None
    if own_folders:
        own = load_autoencoder(
            "pretrained_model_name_or_path",
            pretrained,
            folders=own_folders[:1],
            revision=model_args.revision,
            variant=model_args.variant,
            cache_dir=data_args.cache_dir,
        )
        if index.get("_class_name") in UNSCALED_PIPELINES:
            own.vae.register_to_config(scaling_factor=1.0)
    if model_args.vae is not None:
        given = load_autoencoder("vae", model_args.vae, cache_dir=data_args.cache_dir)
    if own is None and given is None:
        return None
    has_same_latents = own is not None and given is not None and hash_encoder(given.vae) == hash_encoder(own.vae)
    if given is not None and index and not has_same_latents:
        has = "has no autoencoder: its U-Net was trained in pixels" if own is None else "has another one"
        if keeps is not None:
            raise ValueError(f"`vae` is {model_args.vae!r}, but {pretrained} {has}, and {keeps}. Leave `vae` out.")
        logger.warning(f"`vae` is {model_args.vae!r}, but {pretrained} {has}: its weights are trained anew for it.")
        own = None
    vae = (given or own).vae  # with the same latents, the decoder may still be another one
    image_format = next((one.image_format for one in (own, given) if one is not None and one.image_format), None)
    space = LatentSpace(vae)
    encoded, decoded = space.image_channels
    if encoded != decoded:
        raise ValueError(
            f"The autoencoder encodes images of {encoded} channels and decodes to {decoded}. Use one with the same "
            "number of both."
        )
    return TrainedLatents(space, hash_autoencoder(vae), image_format)


def leave_unclipped(scheduler: LearnedVarianceDDPMScheduler) -> None:
    """Switches off what keeps predicted samples in [-1, 1]: latents may have any value."""
    clips = [name for name in ("clip_sample", "thresholding") if scheduler.config.get(name)]
    if clips:
        scheduler.register_to_config(**dict.fromkeys(clips, False))
        logger.info(f"The scheduler's {' and '.join(f'`{name}`' for name in clips)} is off: latents are not clipped")


def check_latent_channels(latent_space: LatentSpace, channels: int | None) -> None:
    """Raises a `ValueError` unless the U-Net has the channels of the latents; `None`: it gets them."""
    if channels not in (None, latent_space.channels):
        raise ValueError(
            f"The U-Net is for samples of {channels} channels, but the latents of the autoencoder have "
            f"{latent_space.channels}. Leave `in_channels` and `out_channels` out of its config, or use another "
            "autoencoder or U-Net."
        )


def find_latents(
    data_args: DataArguments,
    latents: TrainedLatents | None,
    condition: str | None = None,
    conditioning_image_column: str | None = None,
    needs_images: str | None = None,
    embedding_args: ImageEmbeddingArguments | None = None,
) -> StoredLatents | None:
    """
    How the stored latents in `train_data_dir` were made; `None` if it holds images. Raises a `ValueError` for those of
    another autoencoder, for arguments that they contradict or that would have no effect on them, and if images are
    needed: `needs_images` says why, and a CLIP that encodes them is another reason.
    """
    folder = data_args.train_data_dir
    stored = find_stored_latents(folder)
    if stored is None:
        return None
    if embedding_args is not None and embedding_args.encodes:
        needs_images = (
            "a CLIP encodes images; store its embeddings next to the latents (`--image_embeds_column` of "
            "`diffusers_adm.data.encode_latents`)"
        )
    if needs_images is not None:
        raise ValueError(
            f"`train_data_dir` {folder!r} holds latents ({LATENTS_NAME}), but {needs_images}. Train on the images "
            "themselves, which are then encoded in the loop."
        )
    if latents is None:
        raise ValueError(
            f"`train_data_dir` {folder!r} holds latents ({LATENTS_NAME}) of the autoencoder {stored.vae}. Pass it as "
            "`--vae`."
        )
    stored.check(latents.space, latents.autoencoder_hash, folder)
    if data_args.random_flip and not stored.random_flip:
        raise ValueError(
            f"`random_flip` needs the latents of mirrored images, which {folder} does not hold. Encode the images "
            "again with `--random_flip`, or leave it out."
        )
    if not data_args.center_crop and stored.num_cropped:
        raise ValueError(
            f"{stored.num_cropped} of {stored.num_images} images in {folder} were cropped at the centre before they "
            "were encoded, and cannot be cropped at random. Pass `--center_crop`, or train on the images themselves."
        )
    if condition is not None:
        raise ValueError(
            f"`condition` {condition!r} is made from the pixels of an image, but {folder} holds latents. Train on the "
            "images themselves, or encode them with a `--conditioning_image_column`."
        )
    embeds_column = None if embedding_args is None else embedding_args.image_embeds_column
    for argument, given, kept in (
        ("label_column", data_args.label_column, stored.label_column),
        ("conditioning_image_column", conditioning_image_column, stored.conditioning_image_column),
        ("image_embeds_column", embeds_column, stored.image_embeds_column),
    ):
        if given not in (None, kept):
            raise ValueError(
                f"`{argument}` is {given!r}, but the latents in {folder} were encoded with {kept!r}. Pass that, or "
                "encode the images again."
            )
    without_effect: dict[str, Any] = {"min_image_size": None, "image_column": "image", "split": "train"}
    for name, default in without_effect.items():
        if getattr(data_args, name) != default:
            raise ValueError(
                f"`{name}` is {getattr(data_args, name)!r}, which has no effect on stored latents ({folder}). Leave it "
                "out; it is an argument of `diffusers_adm.data.encode_latents`."
            )
    known, request = stored.image_format, data_args.format_request(None, stored.image_format)
    if request.value_range is not None and request.value_range != known.value_range:
        raise ValueError(
            f"`value_range` is {' '.join(map(str, data_args.value_range or ()))}, but the latents in {folder} are "
            f"those of {known}. Leave it out, or encode the images again."
        )
    if latents.image_format is not None and latents.image_format != known:
        raise ValueError(
            f"The latents in {folder} are those of {known}, but the autoencoder was trained on "
            f"{latents.image_format}. Encode the images again."
        )
    return stored


def check_stored_resolution(stored: StoredLatents, resolution: Size, folder: str) -> None:
    """Raises a `ValueError` unless the latents are those of images of this size."""
    if as_sample_size(resolution) != stored.resolution:
        raise ValueError(
            f"The resolution is {describe_resolution(resolution)}, but the latents in {folder} are those of images of "
            f"{describe_resolution(stored.resolution)}. Pass `--resolution {size_argument(stored.resolution)}`, or "
            "encode the images again."
        )
