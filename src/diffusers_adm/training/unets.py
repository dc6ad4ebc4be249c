"""Noise schedule and U-Net of a training run: loaded or built, and checked against each other and the data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..conditioning.inpainting import InpaintingLayout, check_layout, layout_of_pipeline, sample_channels_of
from ..conditioning.text import cross_attention_width
from ..data.labels import renumber_labels
from ..data.latents import autoencoder_folders
from ..deprecations import renamed
from ..models.unet_2d_adagn import AdaGNUNet2DModel
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .arguments import DataArguments, DiffusionArguments, DiffusionTrainingArguments, ModelArguments, UNetArguments
from .classes import ClassPlan, change_config, copy_rows, log_plan, plan_classes
from .loading import (
    check_config_keys,
    check_num_steps,
    load_model_config,
    load_noise_scheduler,
    load_pretrained,
    pretrained_class_names,
    pretrained_pipeline_config,
)
from .losses import check_objective


if TYPE_CHECKING:
    import datasets  # of the `train` extra


logger = logging.getLogger(__name__)

# Number of input channels that a task concatenates to an image, by the image's number of channels.
ExtraChannels = Callable[[int], int]


def constant_channels(number: int, channels: int) -> int:
    """`number` channels, whatever the image."""
    return number


def no_extra_channels(channels: int) -> int:
    """The input is the noisy image only."""
    return 0


def mask_channels(channels: int) -> int:
    """For inpainting: the masked image, or its latents, and its mask."""
    return channels + 1


def choose_inpainting_layout(
    asked: InpaintingLayout | None, model_args: UNetArguments, data_args: DataArguments
) -> InpaintingLayout:
    """
    The layout to train in: the pretrained U-Net's if it takes masks, otherwise the one that was asked for, by default
    GLIDE's.

    Args:
        asked (`str`, *optional*): The argument `inpainting_layout`.

    Raises:
        ValueError: If the pretrained U-Net has another one, or if its layout is not known.
    """
    if model_args.pretrained_model_name_or_path is None:
        return asked or "glide"
    config = load_model_config(AdaGNUNet2DModel, "unet", model_args, data_args)
    in_channels, out_channels = _channels_of(config, pretrained=True)
    channels = {"in_channels": in_channels, "out_channels": out_channels}
    if (sample_channels_of(channels) or in_channels) == in_channels:  # it gets the channels of the mask
        return asked or "glide"
    pipeline = pretrained_pipeline_config(model_args, data_args)
    recorded = layout_of_pipeline(pipeline)
    if None not in (asked, recorded) and asked != recorded:
        raise ValueError(
            f"`inpainting_layout` is {asked!r}, but {model_args.pretrained_model_name_or_path} takes masks in the "
            f"layout {recorded!r}. Leave it out."
        )
    in_latents = model_args.vae is not None or bool(autoencoder_folders(pipeline))
    return check_layout(recorded or asked, channels, in_latents) or "glide"


def low_res_channels(channels: int) -> int:
    """For super-resolution: the upsampled low-resolution image."""
    return channels


def build_scheduler(
    model_args: ModelArguments, data_args: DataArguments, diffusion_args: DiffusionArguments
) -> LearnedVarianceDDPMScheduler:
    """Loads the scheduler as `load_noise_scheduler` does, and checks it against the objective."""
    scheduler = load_noise_scheduler(model_args, data_args, diffusion_args)
    check_objective(scheduler, diffusion_args.objective, diffusion_args.snr_gamma)
    if scheduler.has_learned_variance and diffusion_args.objective == "simple":
        logger.warning("`objective` simple does not train the variance; pass hybrid, or `variance_type` fixed_small.")
    return scheduler


def check_sampling_steps(
    training_args: DiffusionTrainingArguments,
    scheduler: LearnedVarianceDDPMScheduler,
    has_classes: bool,
    has_text: bool,
) -> None:
    """Raises a `ValueError` for validation images with too many steps, or with guidance without a condition."""
    check_num_steps(training_args.validation_num_inference_steps, scheduler)
    if training_args.validation_guidance_scale != 1 and not has_classes and not has_text:
        raise ValueError(
            f"`validation_guidance_scale` is {training_args.validation_guidance_scale}, but without a `label_column` "
            "and a `caption_column` there is no condition to guide towards. Leave it at 1."
        )


def load_unet_config(
    model_args: ModelArguments,
    data_args: DataArguments,
    scheduler: LearnedVarianceDDPMScheduler,
    extra_channels: ExtraChannels = no_extra_channels,
    may_widen: bool = False,
) -> tuple[dict[str, Any], int | None]:
    """
    Loads the config of the U-Net, before any data, since it may be incompatible with the scheduler.

    Args:
        extra_channels (callable, *optional*): Number of input channels that are concatenated to an image, by its number
            of channels.
        may_widen (`bool`, defaults to `False`): A pretrained one may have the channels of an image only; `widen_input`
            adds the others.

    Returns:
        `tuple` of the config and the number of channels of its images; `None` if the config has neither `in_channels`
        nor `out_channels`: `set_channels` then takes them from the data.

    Raises:
        ValueError: If it cannot be read, is not a U-Net's, or has numbers of channels that this task cannot have; or if
            its classes are to be replaced without a `label_column`.
    """
    if model_args.replace_classes and data_args.label_column is None:
        raise ValueError("`replace_classes` was given without `label_column`. Pass both, or neither.")
    config = load_model_config(AdaGNUNet2DModel, "unet", model_args, data_args)
    pretrained = model_args.pretrained_model_name_or_path is not None
    in_channels, out_channels = _channels_of(config, pretrained)
    if not pretrained:
        source = model_args.model_config_name_or_path
        if config.get("_class_name") == "AdaGNClassifierModel":
            raise ValueError(f"{source} is the config of a classifier; this script trains U-Nets.")
        check_config_keys(config, AdaGNUNet2DModel, source)
        if in_channels is None and out_channels is None:
            return config, None
    outputs = 2 if scheduler.has_learned_variance else 1  # for each channel of an image
    channels = [c for c in range(1, (in_channels or 0) + 1) if c + extra_channels(c) == in_channels]
    if pretrained and may_widen:
        channels.append(in_channels)
    if in_channels is None:
        channels = [out_channels // outputs]
    fitting = [c for c in channels if out_channels in (None, c * outputs)]
    if not fitting or fitting[0] < 1:
        raise _wrong_channels(in_channels, out_channels, channels, extra_channels, scheduler)
    return config, fitting[0]


def _channels_of(config: Mapping[str, Any], pretrained: bool) -> tuple[int | None, int | None]:
    """Numbers of input and output channels in the config of a U-Net; `None`: left to the data."""
    # Pretrained ones of other classes may leave them out; with cross-attention they are `UNet2DConditionModel`'s.
    default = None if not pretrained else 3 if cross_attention_width(config) is None else 4
    return config.get("in_channels") or default, config.get("out_channels") or default


def _wrong_channels(
    in_channels: int | None,
    out_channels: int | None,
    channels: list[int],
    extra_channels: ExtraChannels,
    scheduler: LearnedVarianceDDPMScheduler,
) -> ValueError:
    """Numbers of channels that no image has in this task; `channels` are those that the input alone allows."""
    outputs = 2 if scheduler.has_learned_variance else 1
    c = (out_channels or 0) // outputs
    message = f"The U-Net takes {in_channels} channels"
    if out_channels is not None:
        message += f" and has {out_channels} output channels"
    other_task = None
    if c > 0 and out_channels == c * outputs and in_channels is not None:
        kind = "RGB images" if c == 3 else f"images of {c} channels"
        # What it takes may be the channels of another task.
        tasks = {c: "train_adm.py", 2 * c: "train_super_resolution.py", 2 * c + 1: "train_adm.py --task inpaint"}
        if in_channels in tasks and in_channels != c + extra_channels(c):
            other_task = tasks[in_channels]
        # With as many outputs as an image has channels, those of the variance were probably forgotten; but 6 and 6 are
        # most likely an upsampler of RGB images.
        is_without_variance = [out_channels] == channels and c not in (3, out_channels)
        if is_without_variance and out_channels + extra_channels(out_channels) == in_channels:
            hint = f" (Those of {in_channels} for {kind} are trained by {other_task}.)" if other_task else ""
            return ValueError(f"{message}. {_needed_outputs(out_channels, scheduler)}{hint}")
        message += f"; this script trains U-Nets of {c + extra_channels(c)}, on {kind}"
        if other_task:
            message += f". Those of {in_channels} are trained by {other_task}"
    if not channels:
        return ValueError(f"{message}. Change `in_channels` in its config.")
    return ValueError(f"{message}. {_needed_outputs(channels[0], scheduler)}")


def _needed_outputs(channels: int, scheduler: LearnedVarianceDDPMScheduler) -> str:
    outputs = 2 if scheduler.has_learned_variance else 1
    return (
        f"Images of {channels} channels and `variance_type` {scheduler.config.variance_type!r} need "
        f"{channels * outputs} output channels: change `out_channels` in its config, or pass `--variance_type "
        "fixed_small --objective simple` for a network without learned variance."
    )


def set_channels(
    config: dict[str, Any], channels: int, scheduler: LearnedVarianceDDPMScheduler, extra_channels: ExtraChannels
) -> dict[str, Any]:
    """The config of a new U-Net with the numbers of channels that it leaves out, for images of `channels`."""
    outputs = 2 if scheduler.has_learned_variance else 1
    return {"in_channels": channels + extra_channels(channels), "out_channels": outputs * channels} | config


def spare_channels(
    model_args: ModelArguments, data_args: DataArguments, scheduler: LearnedVarianceDDPMScheduler
) -> int | None:
    """
    Number of input channels of the U-Net in addition to those of its output's mean, for a source image; 0 for a
    pretrained one that gets them, `None` for a config that leaves its numbers to the data. Raises a `ValueError` for
    one from scratch without any.
    """
    config = load_model_config(AdaGNUNet2DModel, "unet", model_args, data_args)
    pretrained = model_args.pretrained_model_name_or_path is not None
    in_channels, out_channels = _channels_of(config, pretrained)
    if in_channels is None or out_channels is None:
        return None
    channels = out_channels // (2 if scheduler.has_learned_variance else 1)
    if in_channels <= channels and not pretrained:
        raise ValueError(
            f"The U-Net takes {in_channels} channels and predicts images of {channels}, so that none are left for a "
            "source image. Add those of the source images to `in_channels` in its config, or leave `in_channels` and "
            "`out_channels` out: the data tell them."
        )
    return max(in_channels - channels, 0)


def build_unet(
    model_args: UNetArguments,
    data_args: DataArguments,
    config: Any,
    num_classes: int | None,
    has_image_embeds: bool = False,
) -> AdaGNUNet2DModel:
    """
    Loads the pretrained U-Net (`match_unet_classes` then fits its class embedding to the data), or makes one from
    scratch from the `config` of `load_unet_config`, with a row for each class of the data (None: without classes).
    Raises a `ValueError` if its class embedding is incompatible with the classes of the data or their dropout, or if it
    takes image embeddings in their place, and there are none (`has_image_embeds`).
    """
    pretrained = model_args.pretrained_model_name_or_path
    if pretrained is not None:
        load = AdaGNUNet2DModel.from_pretrained
        unet = load_pretrained(load, "unet", model_args, data_args, variant=model_args.variant)
    else:
        if num_classes is not None and config.get("num_class_embeds") is None:
            with_null = model_args.class_dropout_prob > 0
            config = {**config, "num_class_embeds": num_classes + with_null}
            config["null_class_id"] = num_classes if with_null else None
        unet = AdaGNUNet2DModel.from_config(config)
    config = unet.config

    if has_image_embeds:  # which take the place of classes
        return unet
    if config.class_embed_type == "identity":
        raise ValueError(
            "The U-Net has `class_embed_type='identity'`, as a decoder of unCLIP: it takes a vector in the place of a "
            "class. Train it with `train_adm.py` and `--image_embeds_column` or `--image_encoder_name_or_path`."
        )
    if num_classes is None and config.num_class_embeds is not None and config.null_class_id is None:
        raise ValueError(
            f"The U-Net is class-conditional ({config.num_class_embeds} classes, no null class). Pass `label_column`."
        )
    if num_classes is not None and pretrained is None:
        room = config.num_class_embeds - (config.null_class_id is not None)
        if num_classes > room or (config.null_class_id is not None and config.null_class_id < num_classes):
            raise ValueError(
                f"The data has {num_classes} classes, but the U-Net has room for {room} (`num_class_embeds` "
                f"{config.num_class_embeds}, null class {config.null_class_id}). Leave `num_class_embeds` out of its "
                "config."
            )
        if model_args.class_dropout_prob > 0 and config.null_class_id is None:
            raise _no_null_class(model_args)
    return unet


def _no_null_class(model_args: UNetArguments, because: str = "") -> ValueError:
    return ValueError(
        f"`class_dropout_prob` is {model_args.class_dropout_prob}, but the U-Net has no null class (`null_class_id`) "
        f"to drop to{because}. Pass `--class_dropout_prob 0`."
    )


def match_unet_classes(
    unet: AdaGNUNet2DModel,
    images: datasets.Dataset,
    id2label: dict[int, str] | None,
    model_args: UNetArguments,
    data_args: DataArguments,
    frozen: str | None = None,
) -> tuple[datasets.Dataset, dict[int, str] | None]:
    """
    Matches the classes of the data with those of a pretrained U-Net by name (see `plan_classes`): new classes get rows
    of the class embedding, as does the null class if there is none and labels are to be dropped. A network that is
    trained from scratch and its data stay as they are.

    Args:
        unet ([`AdaGNUNet2DModel`]): From `build_unet`; it is changed in place.
        id2label (`dict[int, str]`, *optional*): The classes of the data; None: trained without classes.
        frozen (`str`, *optional*): Why the weights stay as they are, for errors: what needs new rows is refused.

    Returns:
        `tuple` of the dataset, labelled with the rows of the network, and the names of these rows; None without names.

    Raises:
        ValueError: If the network cannot be trained on these classes, or it is unclear which of its classes they are.
    """
    config = unet.config
    if model_args.pretrained_model_name_or_path is None:
        return images, id2label
    num_rows = config.num_class_embeds or 0
    known = {row: name for row, name in pretrained_class_names(model_args, data_args).items() if row < num_rows}
    if id2label is None:
        return images, known or None
    if config.class_embed_type is not None or (frozen and num_rows == 0):
        kind = config.class_embed_type
        why = f"table of classes (`class_embed_type` {kind!r})" if kind else f"class embedding, and {frozen}"
        raise ValueError(f"The pretrained U-Net has no {why}. Leave `label_column` out.")
    adds_null = model_args.class_dropout_prob > 0
    if frozen and adds_null and config.null_class_id is None:
        raise _no_null_class(model_args, f", and {frozen}")
    plan = plan_classes(
        id2label,
        known,
        num_rows,
        config.null_class_id,
        adds_null=adds_null,
        replaces=model_args.replace_classes,
        frozen=frozen,
    )
    log_plan(plan, "U-Net")
    if num_rows == 0:
        logger.info("The U-Net had no class embedding and gets one of zeros, which leaves its output as it is")
    if config.null_class_id is None and plan.null_class_id is not None:
        logger.info(f"The U-Net gets a null class, row {plan.null_class_id}")
    elif config.null_class_id != plan.null_class_id:
        logger.info(f"The null class of the U-Net moves from row {config.null_class_id} to row {plan.null_class_id}")
    if not plan.keeps_rows:
        fit_class_embedding(unet, plan)
    return renumber_labels(images, plan.to_row), plan.id2label


def fit_class_embedding(unet: AdaGNUNet2DModel, plan: ClassPlan) -> None:
    """
    Gives a U-Net the rows of a plan, in place and in its config.

    New rows start as a copy of the null row: at first a new class is sampled as without a class, and guidance has no
    effect on it. Without a null row, new ones (also that of a null class) start as the mean of all rows. An
    unconditional U-Net gets rows of zeros, which do not change its output.
    """
    table, null_class_id = unet.class_embedding, unet.config.null_class_id
    if table is None:
        rows = torch.zeros(len(plan.sources), unet.time_embed_dim).to(unet.time_embedding.linear_2.weight)
    else:
        start = table.weight.mean(dim=0) if null_class_id is None else table.weight[null_class_id]
        rows = copy_rows(table.weight, plan.sources, start)
    unet.class_embedding = torch.nn.Embedding.from_pretrained(rows, freeze=False)
    change_config(unet, num_class_embeds=len(plan.sources), null_class_id=plan.null_class_id)


def replace_class_embedding(unet: AdaGNUNet2DModel) -> torch.Tensor | None:
    """
    Makes a U-Net add a vector to its embedding of the timestep in the place of that of a class, in place and in its
    config.

    Returns:
        `torch.Tensor` of shape `(time_embed_dim,)` or `None`: The null class of its former table, or else the mean of
        its rows; `None` without a table.
    """
    config, table, vector = unet.config, unet.class_embedding, None
    if config.class_embed_type == "identity":
        return None
    if table is not None:
        rows = table.weight.detach()
        vector = rows.mean(dim=0) if config.null_class_id is None else rows[config.null_class_id].clone()
        logger.info(f"The U-Net loses its {config.num_class_embeds} classes: the image embedding takes their place")
    unet.class_embedding = torch.nn.Identity()
    change_config(unet, class_embed_type="identity", num_class_embeds=None, null_class_id=None)
    return vector


def widen_input(unet: AdaGNUNet2DModel, in_channels: int) -> None:
    """
    Adds input channels to a U-Net, in place and in its config, with weights of 0, so that its output stays (GLIDE,
    https://huggingface.co/papers/2112.10741, section 4).
    """
    old = unet.conv_in
    conv = torch.nn.Conv2d(in_channels, old.out_channels, kernel_size=3, padding=1).to(old.weight)
    with torch.no_grad():
        conv.weight.zero_()[:, : old.in_channels] = old.weight
        conv.bias.copy_(old.bias)
    unet.conv_in = conv
    unet.register_to_config(in_channels=in_channels)


def check_guidance(
    training_args: DiffusionTrainingArguments, unet_config: Any, num_classes: int | None, has_text: bool
) -> None:
    """Raises a `ValueError` for validation images that are guided only by classes if the U-Net has no null class."""
    scale = training_args.validation_guidance_scale
    if scale != 1 and num_classes and unet_config.null_class_id is None and not has_text:
        raise ValueError(
            f"`validation_guidance_scale` is {scale}, but the U-Net has no null class to guide away from. Leave it at "
            "1, or train with `--class_dropout_prob 0.1`."
        )


__getattr__ = renamed(
    __name__,
    {
        "check_grids": "check_sampling_steps",
        "check_guidance_of_grids": "check_guidance",
        "learned_classes": "pretrained_class_names",
    },
)
