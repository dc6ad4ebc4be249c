"""A ControlNet of a training run: its arguments, and building or loading it for a pretrained U-Net."""

from __future__ import annotations

from dataclasses import dataclass

from ..commands.arguments import arg
from ..conditioning.control_images import ControlImageKind
from ..conditioning.image_format import ImageFormat
from ..data.formats import FormatRequest, parse_value_range, range_word
from ..data.repositories import from_subfolder_or_root, reading
from ..models.controlnet_adagn import AdaGNControlNetModel
from ..models.unet_2d_adagn import AdaGNUNet2DModel
from ..schedulers.noise_schedules import check_same_noise
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .arguments import (
    APPLIED,
    NEVER,
    NOISE_ARGUMENTS,
    PROCESS,
    SOURCE,
    DataArguments,
    DiffusionArguments,
    TextArguments,
    UNetArguments,
    check_needs,
    check_share,
)
from .loading import pretrained_pipeline_config, record_noise_schedule


@dataclass
class ControlArguments:
    """The ControlNet and its conditioning images."""

    condition: ControlImageKind | None = arg(
        None, "Kind of conditioning image to make from each image.", resume=PROCESS
    )
    conditioning_image_column: str | None = arg(
        None, "Column of the data that holds the conditioning images, instead of `condition`.", resume=PROCESS
    )
    condition_value_range: list[float | str] | None = arg(
        None,
        "Values of the conditioning images in the column for 0 and 1, LOW HIGH, or auto; none: those of the ControlNet "
        "to fine-tune, or the whole range of the integer type.",
        resume=PROCESS,
        parse=range_word,
    )
    condition_dropout_prob: float = arg(
        0.0,
        "Share of the conditioning images replaced by black ones, for which the model then samples as without a "
        "ControlNet.",
        resume=APPLIED,
    )
    controlnet_model_name_or_path: str | None = arg(
        None, "Trained ControlNet to fine-tune, on the Hub or in a folder.", resume=SOURCE
    )
    controlnet_width: float = arg(1.0, "Width of a new ControlNet, as a share of the U-Net's channels.", resume=NEVER)
    conditioning_embedding_out_channels: list[int] | None = arg(
        None,
        "Channels of the layers that embed the conditioning image in a new ControlNet; none: 16 and 32.",
        resume=NEVER,
    )

    def __post_init__(self):
        parse_value_range("condition_value_range", self.condition_value_range)
        check_needs(self, "conditioning_image_column", "condition_value_range")
        if (self.condition is None) == (self.conditioning_image_column is None):
            raise ValueError(
                f"`condition` is {self.condition!r} and `conditioning_image_column` "
                f"{self.conditioning_image_column!r}. Pass exactly one, e.g. `--condition edges`."
            )
        check_share(self, "condition_dropout_prob")
        if not 0 < self.controlnet_width <= 1:
            raise ValueError(f"`controlnet_width` is {self.controlnet_width}; it must lie in (0, 1].")
        if self.controlnet_model_name_or_path is not None and (
            self.controlnet_width != 1 or self.conditioning_embedding_out_channels is not None
        ):
            raise ValueError(
                "`controlnet_width` and `conditioning_embedding_out_channels` shape a new ControlNet, but "
                f"`controlnet_model_name_or_path` is {self.controlnet_model_name_or_path!r}. Leave them out."
            )


def check_base_stays(model_args: UNetArguments, diffusion_args: DiffusionArguments, text_args: TextArguments) -> None:
    """Raises a `ValueError` if there is no pretrained model, or an argument would modify it."""
    if model_args.pretrained_model_name_or_path is None or model_args.model_config_name_or_path is not None:
        raise ValueError(
            "A ControlNet is trained for a pretrained model. Name it with `--pretrained_model_name_or_path`, and leave "
            "`model_config_name_or_path` out."
        )
    given = [name for name in NOISE_ARGUMENTS if getattr(diffusion_args, name) is not None]
    # A fixed variance may be given: some repositories of networks without a learned one do not say which they use.
    if (diffusion_args.variance_type or "").startswith("fixed"):
        given.remove("variance_type")
    if text_args.train_text_encoder:
        given.append("train_text_encoder")
    if model_args.replace_classes:
        given.append("replace_classes")
    if given:
        raise ValueError(f"A ControlNet leaves its base model as it is: drop {', '.join(f'`{n}`' for n in given)}.")


def check_text_stays(model_args: UNetArguments, data_args: DataArguments, text_args: TextArguments) -> None:
    """Raises a `ValueError` if an argument would replace text encoder or tokenizer of the pretrained model."""
    index = pretrained_pipeline_config(model_args, data_args)
    for name in ("text_encoder", "tokenizer"):
        argument = f"{name}_name_or_path"
        has_own = (index.get(name) or [None])[0] is not None
        if has_own and getattr(text_args, argument) is not None:
            raise ValueError(
                f"`{argument}` is {getattr(text_args, argument)!r}, but the pretrained model has a {name} "
                f"({index[name][1]}) and stays as it is. Leave the argument out."
            )


def condition_request(control_args: ControlArguments, data_args: DataArguments) -> FormatRequest:
    """What the ControlNet to fine-tune, or a new one, and the arguments ask of the conditioning images in a column."""
    name, channels, known = control_args.controlnet_model_name_or_path, None, None
    if name is not None:
        load = AdaGNControlNetModel.load_config
        with reading("controlnet_model_name_or_path", name):
            config = from_subfolder_or_root(load, name, "controlnet", cache_dir=data_args.cache_dir)
        channels, recorded = config.get("conditioning_channels", 3), config.get("condition_format")
        known = None if recorded is None else ImageFormat.from_config(recorded, channels)
    value_range = parse_value_range("condition_value_range", control_args.condition_value_range)
    return FormatRequest(
        channels, None, value_range, known, mode_argument=None, range_argument="--condition_value_range"
    )


def build_controlnet(
    control_args: ControlArguments,
    data_args: DataArguments,
    unet: AdaGNUNet2DModel,
    noise_scheduler: LearnedVarianceDDPMScheduler,
    image_format: ImageFormat,
    condition_format: ImageFormat,
    factor: int = 1,
) -> AdaGNControlNetModel:
    """
    Makes a new ControlNet, or loads the one to fine-tune, and records in its config the noise schedule and the formats
    of the images of the base model and of the conditioning images, whose sides are `factor` times as long as those of
    the samples. Raises a `ValueError` for one of another U-Net, noise schedule, or format or size of either.
    """
    name = control_args.controlnet_model_name_or_path
    if name is None:
        controlnet = AdaGNControlNetModel.from_unet(
            unet,
            conditioning_channels=condition_format.channels,
            conditioning_embedding_out_channels=control_args.conditioning_embedding_out_channels,
            conditioning_downsampling_factor=factor,
            width=control_args.controlnet_width,
        )
    else:
        load = AdaGNControlNetModel.from_pretrained
        with reading("controlnet_model_name_or_path", name):
            controlnet = from_subfolder_or_root(load, name, "controlnet", cache_dir=data_args.cache_dir)
        _check_controlnet(name, controlnet, unet, noise_scheduler, image_format, condition_format, factor)
    record_noise_schedule(controlnet, "ControlNet", noise_scheduler)
    controlnet.register_to_config(image_format=image_format.to_config(), condition_format=condition_format.to_config())
    return controlnet


def _check_controlnet(
    name: str,
    controlnet: AdaGNControlNetModel,
    unet: AdaGNUNet2DModel,
    noise_scheduler: LearnedVarianceDDPMScheduler,
    image_format: ImageFormat,
    condition_format: ImageFormat,
    factor: int,
) -> None:
    controlnet.check_base(unet)
    config = controlnet.config
    check_same_noise(
        f"The ControlNet {name}",
        config.noise_schedule,
        noise_scheduler,
        controlnet,
        how_to_record="this run records that of the pretrained model",
    )
    channels, expected = config.conditioning_channels, controlnet.conditioning_factor
    if channels != condition_format.channels or expected != factor:
        size = "the size of the samples" if factor == 1 else f"sides {factor} times as long as those of the samples"
        raise ValueError(
            f"The ControlNet {name} takes conditioning images of {channels} channels, {expected} times as large as the "
            f"samples; those of this run have {condition_format.channels}, and {size}. Train a new one."
        )
    for what, recorded, now in (
        ("a base model of", config.image_format, image_format),
        ("conditions that are", config.condition_format, condition_format),
    ):
        if recorded is not None and (before := ImageFormat.from_config(recorded, now.channels)) != now:
            raise ValueError(
                f"The ControlNet {name} was trained for {what} {before}; in this run they are {now}. Train a new one."
            )
