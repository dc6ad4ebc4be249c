"""The arguments of the training scripts. Each declares with `resume=` what a changed value does to a resumed run."""

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.utils import validate_repo_id

from ..commands.arguments import HUB_TOKEN, arg, check_at_least
from ..commands.processes import MixedPrecision
from ..conditioning.image_format import ImageFormat, ImageMode, Size, as_size, describe_size, parse_size
from ..conditioning.inpainting import InpaintingLayout
from ..conditioning.low_resolution import check_fits_latents
from ..conditioning.previews import check_preview_numbers
from ..data.formats import FormatRequest, parse_value_range, range_word
from ..schedulers.noise_schedules import BetaScheduleName
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler, PredictionType, VarianceType
from .losses import Objective
from .power_ema import check_std
from .timestep_samplers import TimestepSamplerName


class Verdict(enum.Enum):
    """What happens if the value of an argument is not that of the checkpoint that is resumed."""

    # The new value is used; it has no influence on the trained weights.
    FREE = "free"
    # The new value takes effect from the checkpoint on; optimizer moments and averages are kept.
    APPLIED = "applied"
    # Refused unless `--force_resume` is given: another noise, loss, order of the data, ...
    PROCESS = "process"
    # Refused: the checkpoint could not be loaded.
    NEVER = "never"
    # The argument says where something is read: its content is compared, not its name.
    SOURCE = "source"


FREE, APPLIED, PROCESS, NEVER, SOURCE = Verdict.FREE, Verdict.APPLIED, Verdict.PROCESS, Verdict.NEVER, Verdict.SOURCE


# Arguments of the noise schedule -> keys in the config of a scheduler.
NOISE_ARGUMENTS = {
    "ddpm_num_steps": "num_train_timesteps",
    "ddpm_beta_schedule": "beta_schedule",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "prediction_type": "prediction_type",
    "variance_type": "variance_type",
}


def resume_verdicts(argument_types: Sequence[type]) -> dict[str, Verdict]:
    """The verdict of each argument of a script, by name."""
    return {f.name: f.metadata["resume"] for types in argument_types for f in dataclasses.fields(types)}


def check_share(arguments: object, name: str) -> None:
    """Raises a `ValueError` unless the named attribute lies in [0, 1]."""
    if not 0 <= getattr(arguments, name) <= 1:
        raise ValueError(f"`{name}` is {getattr(arguments, name)}; it must lie in [0, 1].")


def check_positive(arguments: object, *names: str) -> None:
    """Raises a `ValueError` unless the named attributes are None or positive."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` is {value}; it must be positive.")


def check_needs(arguments: object, needed: str, *names: str) -> None:
    """Raises a `ValueError` if one of the named attributes is set although `needed` is not."""
    for name in names:
        if getattr(arguments, name) and not getattr(arguments, needed):
            raise ValueError(f"`{name}` was given without `{needed}`. Pass both, or neither.")


# Sizes in the arguments: the side of a square, or "64x256", height x width, which a recipe holds as it is given.
SizeArgument = int | str


def size_argument(size: Size) -> SizeArgument:
    """The size as recipes hold it."""
    height, width = as_size(size)
    return height if height == width else f"{height}x{width}"


def size_word(text: str) -> SizeArgument:
    """A size on the command line; `parse_size` refuses what is none."""
    try:
        return size_argument(parse_size("", text))
    except ValueError:
        return text


@dataclass
class ModelArguments:
    """Where the weights come from, and how the network runs."""

    pretrained_model_name_or_path: str | None = arg(
        None, "Pretrained model to fine-tune, on the Hub or in a folder.", resume=SOURCE
    )
    revision: str | None = arg(None, "Branch, tag or commit of the pretrained model.", resume=SOURCE)
    variant: str | None = arg(None, "Variant of the pretrained weights, e.g. fp16.", resume=SOURCE)
    model_config_name_or_path: str | None = arg(
        None,
        "Config of a network to train from scratch: a JSON file, or a folder or Hub repository that holds one.",
        resume=SOURCE,
    )
    replace_classes: bool = arg(
        False,
        "Fine-tune: keep only the classes of the data instead of adding new ones to those of the pretrained model. "
        "Classes of the same name keep their weights either way.",
        resume=NEVER,
    )
    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass to save memory.", resume=FREE)
    channels_last: bool = arg(False, "Keep weights and images in channels-last memory format.", resume=FREE)

    def check_source(self) -> None:
        """Raises a `ValueError` unless exactly one source of the network is given."""
        if (self.pretrained_model_name_or_path is None) == (self.model_config_name_or_path is None):
            raise ValueError(
                "Pass either `--model_config_name_or_path` (from scratch) or `--pretrained_model_name_or_path` "
                "(fine-tune)."
            )
        check_needs(self, "pretrained_model_name_or_path", "replace_classes")

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def apply_to(self, network: Any) -> None:
        """Sets gradient checkpointing and memory format of a network."""
        if self.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if self.channels_last:
            network.to(memory_format=torch.channels_last)


@dataclass
class DataArguments:
    """The images, and how they are prepared."""

    dataset_name: str | None = arg(None, "Dataset on the Hub, or path of a local copy.", resume=PROCESS)
    dataset_config_name: str | None = arg(None, "Configuration of the dataset.", resume=PROCESS)
    train_data_dir: str | None = arg(
        None, "Folder of images; the names of its subfolders are the labels.", resume=PROCESS
    )
    data_files: list[str] | None = arg(None, "Parquet files.", resume=PROCESS)
    split: str = arg("train", "Split to train on.", resume=PROCESS)
    image_column: str = arg("image", "Column of the images.", resume=PROCESS)
    label_column: str | None = arg(None, "Column of the labels; none: train without classes.", resume=PROCESS)
    cache_dir: str | None = arg(None, "Cache folder of datasets and pretrained models.", resume=FREE)
    max_train_samples: int | None = arg(None, "Size of a random subset to train on; none: all images.", resume=PROCESS)
    image_mode: ImageMode | None = arg(
        None,
        "Meaning of the channels: L (grey), LA, RGB, RGBA (A is alpha), or array (no colours; nothing is converted). "
        "Images of another mode are converted. None: by the channels of the model, or of the data.",
        resume=PROCESS,
    )
    value_range: list[float | str] | None = arg(
        None,
        "Values of the data for -1 and 1, LOW HIGH; auto: measured once over all images. It is saved with the model. "
        "None: the pretrained model's, or the whole range of the integer type; floating point data need it.",
        resume=PROCESS,
        parse=range_word,
    )
    resolution: SizeArgument | None = arg(
        None,
        "Size of the training images in pixels: the side of a square, or HEIGHTxWIDTH, e.g. 64x256; none: the "
        "`sample_size` of the model.",
        resume=PROCESS,
        parse=size_word,
    )
    center_crop: bool = arg(False, "Crop at the centre instead of at random.", resume=PROCESS)
    random_flip: bool = arg(
        False, "Mirror half of the images at random. Unsuitable for text, flags or anatomy.", resume=PROCESS
    )
    class_balanced: bool = arg(
        False, "Sample the classes equally often, whatever their numbers of images.", resume=PROCESS
    )
    min_image_size: int | None = arg(
        None,
        "Skip images whose shorter side is below this many pixels; none: half the resolution (upsamplers: all of it).",
        resume=PROCESS,
    )
    dataloader_num_workers: int = arg(
        0, "Number of processes that load images; 0: the training process itself.", resume=FREE
    )
    image_check_num_proc: int | None = arg(
        None, "Number of processes that check the images before training.", resume=FREE
    )

    def __post_init__(self):
        if self.resolution is not None:
            self.resolution = size_argument(parse_size("resolution", self.resolution))
        parse_value_range("value_range", self.value_range)
        check_at_least(self, 1, "image_check_num_proc")
        check_at_least(self, 0, "min_image_size", "dataloader_num_workers")
        check_needs(self, "label_column", "class_balanced")

    @property
    def size(self) -> Size | None:
        """`resolution` as a number, or as height and width."""
        return None if self.resolution is None else parse_size("resolution", self.resolution)

    def format_request(self, channels: int | None, known: ImageFormat | None) -> FormatRequest:
        """
        What is asked of the format of the images.

        Args:
            channels (`int`, *optional*): Of the network's images; `None`: those of the data.
            known (`ImageFormat`, *optional*): That of the pretrained model.
        """
        return FormatRequest(channels, self.image_mode, parse_value_range("value_range", self.value_range), known)

    def source(self) -> dict[str, Any]:
        """Keyword arguments of `load_image_dataset`, without the seed."""
        names = ("dataset_name", "dataset_config_name", "train_data_dir", "data_files", "split")
        names += ("image_column", "label_column", "cache_dir", "max_train_samples")
        return {name: getattr(self, name) for name in names}


@dataclass
class NoiseArguments:
    """The noise schedule. None: that of the pretrained scheduler, or the default in parentheses."""

    ddpm_num_steps: int | None = arg(None, "Number of timesteps of the noise schedule (1000).", resume=PROCESS)
    ddpm_beta_schedule: BetaScheduleName | None = arg(
        None, "Noise schedule (linear); cosine and squaredcos_cap_v2 are the same.", resume=PROCESS
    )
    beta_start: float | None = arg(None, "First beta of the schedule (0.0001).", resume=PROCESS)
    beta_end: float | None = arg(None, "Last beta of the schedule (0.02).", resume=PROCESS)

    def __post_init__(self):
        check_at_least(self, 1, "ddpm_num_steps")

    def given(self) -> dict[str, Any]:
        """The values that were given, by the names of `LearnedVarianceDDPMScheduler`'s arguments."""
        values = {key: getattr(self, name, None) for name, key in NOISE_ARGUMENTS.items()}
        return {key: value for key, value in values.items() if value is not None}


@dataclass
class DiffusionArguments(NoiseArguments):
    """The noise schedule, the prediction of the network, and the loss."""

    prediction_type: PredictionType | None = arg(None, "Quantity that the network predicts (epsilon).", resume=PROCESS)
    variance_type: VarianceType | None = arg(None, "Variance of a reverse step (learned_range).", resume=PROCESS)
    objective: Objective = arg(
        "hybrid",
        "Loss: simple (squared error), hybrid (with the bound, for the variance), or vlb (the bound).",
        resume=PROCESS,
    )
    snr_gamma: float | None = arg(
        None, "Gamma of the Min-SNR weighting of the squared error, usually 5.0; none: no weighting.", resume=PROCESS
    )
    timestep_sampler: TimestepSamplerName = arg(
        "uniform", "Distribution of the training timesteps; loss-second-moment is meant for vlb.", resume=PROCESS
    )


@dataclass
class TrainingArguments:
    """Steps, optimizer, moving average, checkpoints and logs."""

    output_dir: str = arg("adm-model", "Folder of the result, checkpoints and curves.", resume=FREE)
    seed: int = arg(0, "Random seed.", resume=PROCESS)
    train_batch_size: int = arg(16, "Images per process and forward pass.", resume=PROCESS)
    num_train_epochs: int = arg(100, "Passes over the images, unless `max_train_steps` is given.", resume=APPLIED)
    max_train_steps: int | None = arg(None, "Number of optimizer steps.", resume=APPLIED)
    gradient_accumulation_steps: int = arg(1, "Forward passes per optimizer step.", resume=PROCESS)
    learning_rate: float = arg(1e-4, "Learning rate after warm-up.", resume=APPLIED)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = arg(
        "constant_with_warmup", "Learning rate schedule.", resume=APPLIED
    )
    lr_warmup_steps: int = arg(500, "Optimizer steps of learning rate warm-up.", resume=APPLIED)
    adam_beta1: float = arg(0.9, "AdamW beta1.", resume=APPLIED)
    adam_beta2: float = arg(0.999, "AdamW beta2.", resume=APPLIED)
    adam_weight_decay: float = arg(0.0, "AdamW weight decay.", resume=APPLIED)
    adam_epsilon: float = arg(1e-8, "AdamW epsilon.", resume=APPLIED)
    max_grad_norm: float = arg(1.0, "Gradients are clipped to this norm.", resume=APPLIED)
    mixed_precision: MixedPrecision | None = arg(
        None, "Mixed precision; none: as configured for Accelerate.", resume=APPLIED
    )
    allow_tf32: bool = arg(
        False, "Run float32 matrix products in TF32, as PyTorch's convolutions do by default.", resume=APPLIED
    )
    use_ema: bool = arg(
        True, "Keep an exponential moving average of the weights, for validation and the result.", resume=NEVER
    )
    ema_max_decay: float = arg(0.9999, "EMA decay after its warm-up.", resume=APPLIED)
    ema_inv_gamma: float = arg(
        1.0, "Inverse gamma of the EMA decay warm-up: decay = 1 - (1 + step / inv_gamma) ** -power.", resume=APPLIED
    )
    ema_power: float = arg(3 / 4, "Exponent of the EMA decay warm-up.", resume=APPLIED)
    power_ema_stds: list[float] | None = arg(
        None,
        "Relative standard deviations of power-function averages of the weights, e.g. 0.05 0.1, of which snapshots are "
        "kept, so that any other length can be reconstructed after training; none: no such averages.",
        resume=NEVER,
    )
    power_ema_snapshot_steps: int | None = arg(
        None, "Optimizer steps between these snapshots; none: `checkpointing_steps`.", resume=FREE
    )
    checkpointing_steps: int = arg(1000, "Optimizer steps between checkpoints.", resume=FREE)
    checkpoints_total_limit: int | None = arg(None, "Number of checkpoints to keep; none: all.", resume=FREE)
    resume_from_checkpoint: str | None = arg(
        None, "Checkpoint folder, or `latest`. Arguments that are left out are taken from its run.", resume=FREE
    )
    force_resume: bool = arg(
        False, "Resume with the new values although an argument or the data has changed.", resume=FREE
    )
    overwrite_output_dir: bool = arg(
        False, "Start a new run in a folder with checkpoints of another one, and delete those.", resume=FREE
    )
    logging_steps: int = arg(20, "Optimizer steps between rows of the curves.", resume=FREE)
    logging_dir: str = arg("logs", "Folder for TensorBoard, below `output_dir`.", resume=FREE)
    report_to: Literal["tensorboard", "none"] = arg(
        "tensorboard", "Tracker of the curves, in addition to files.", resume=FREE
    )
    validation_steps: int | None = arg(None, "Optimizer steps between validations; none: only at the end.", resume=FREE)
    push_to_hub: bool = arg(False, "Push the result to the Hub at the end, with a model card.", resume=FREE)
    hub_model_id: str | None = arg(
        None, "Repository on the Hub, `user/name`; none: the name of `output_dir`, in your own account.", resume=FREE
    )
    hub_token: str | None = dataclasses.field(
        default=None,
        repr=False,
        metadata={
            "help": "Hub token with write access; none: that of `hf auth login` or $HF_TOKEN, which other users of "
            "this machine cannot see.",
            "resume": FREE,
        },
    )
    hub_private_repo: bool = arg(False, "Make a new repository private.", resume=FREE)

    def __post_init__(self):
        check_needs(self, "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo")
        if self.hub_model_id is not None:
            validate_repo_id(self.hub_model_id)
        if self.hub_token is not None and not HUB_TOKEN.fullmatch(self.hub_token):
            raise ValueError(
                "`hub_token` holds other characters than letters, digits, `_`, `-`, `.` and `|`, so it is no token."
            )
        check_needs(self, "resume_from_checkpoint", "force_resume")
        check_at_least(self, 1, "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "logging_steps")
        check_at_least(self, 1, "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "validation_steps")
        check_at_least(self, 0, "lr_warmup_steps")
        check_positive(self, "learning_rate", "max_grad_norm")
        if not 0 <= self.ema_max_decay < 1:
            raise ValueError(f"`ema_max_decay` is {self.ema_max_decay}; it must lie in [0, 1).")
        stds = self.power_ema_stds or []
        for std in stds:
            check_std("power_ema_stds", std)
        if len(set(stds)) != len(stds):
            raise ValueError(f"`power_ema_stds` is {stds}; its values must differ.")
        check_needs(self, "power_ema_stds", "power_ema_snapshot_steps")
        check_at_least(self, 1, "power_ema_snapshot_steps")


@dataclass
class UNetArguments(ModelArguments):
    """
    Arguments of a U-Net: `pretrained_model_name_or_path` names a pipeline, of which `unet` and `scheduler` are read,
    and with captions also `text_encoder` and `tokenizer`.
    """

    class_dropout_prob: float = arg(
        0.1, "Share of the labels replaced by the null class, for classifier-free guidance.", resume=APPLIED
    )
    vae: str | None = arg(
        None,
        "Autoencoder in whose latents the U-Net is trained, on the Hub or in a folder: in its root, or in that of a "
        "pipeline. None: the pretrained pipeline's, or pixels if it has none.",
        resume=SOURCE,
    )

    def __post_init__(self):
        check_share(self, "class_dropout_prob")


@dataclass
class TextArguments:
    """Captions, and the text encoder for them."""

    caption_column: str | None = arg(
        None,
        "Column of the captions: texts, or lists of which each epoch draws one text; none: train without text.",
        resume=PROCESS,
    )
    text_encoder_name_or_path: str | None = arg(
        None,
        "Text encoder of transformers (CLIP, T5, BERT, ...) on the Hub or in a folder, or a pipeline's.",
        resume=SOURCE,
    )
    tokenizer_name_or_path: str | None = arg(
        None, "Tokenizer; none: that of the text encoder's repository.", resume=SOURCE
    )
    text_encoder_config_name_or_path: str | None = arg(
        None,
        "Config of a text encoder to train from scratch: a JSON file with sizes and `model_type` (or `_class_name` "
        "GLIDETextModel).",
        resume=SOURCE,
    )
    train_text_encoder: bool = arg(False, "Train the text encoder together with the U-Net.", resume=NEVER)
    caption_dropout_prob: float = arg(
        0.1,
        "Share of the captions replaced by the empty one, for classifier-free guidance; independent of classes.",
        resume=APPLIED,
    )
    precompute_text_embeddings: bool = arg(
        False, "Encode each distinct caption once, before training, and store the result on disk.", resume=FREE
    )

    def __post_init__(self):
        check_share(self, "caption_dropout_prob")
        text = ("text_encoder_name_or_path", "tokenizer_name_or_path", "text_encoder_config_name_or_path")
        check_needs(self, "caption_column", *text, "train_text_encoder", "precompute_text_embeddings")
        if self.text_encoder_config_name_or_path is not None:
            if self.text_encoder_name_or_path is not None:
                raise ValueError("Pass either `text_encoder_name_or_path` or `text_encoder_config_name_or_path`.")
            if self.tokenizer_name_or_path is None:
                raise ValueError(
                    "A text encoder from scratch (`text_encoder_config_name_or_path`) has no tokenizer. Pass "
                    "`tokenizer_name_or_path`; `python -m diffusers_adm.training.tokenizer` makes one."
                )
            if not self.train_text_encoder:
                raise ValueError(
                    "A text encoder from scratch (`text_encoder_config_name_or_path`) has random weights. Pass "
                    "`--train_text_encoder`, or `text_encoder_name_or_path` for a trained one."
                )
        if self.precompute_text_embeddings and self.train_text_encoder:
            raise ValueError(
                "`precompute_text_embeddings` and `train_text_encoder` exclude each other: training changes the "
                "embeddings. Drop one."
            )


@dataclass
class DiffusionTrainingArguments(TrainingArguments):
    """Training arguments with validation images."""

    num_validation_images: int = arg(16, "Number of validation images.", resume=FREE)
    validation_num_inference_steps: int = arg(50, "Sampling steps of validation images.", resume=FREE)
    validation_guidance_scale: float = arg(
        1.0, "Classifier-free guidance scale of validation images; 1 is off.", resume=FREE
    )
    preview_channels: list[int] | None = arg(
        None,
        "Channels that validation images show, counted from 1: three as red, green and blue, e.g. 3 2 1; others in "
        "grey, side by side. None: images that Pillow can show as they are; of other data the first three, or all if "
        "there are fewer.",
        resume=FREE,
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "num_validation_images", "validation_num_inference_steps")
        check_preview_numbers(self.preview_channels)


# What all scripts that train a diffusion model have in common, in this order.
DIFFUSION_ARGUMENTS = (UNetArguments, DataArguments, DiffusionArguments, DiffusionTrainingArguments, TextArguments)


@dataclass
class TaskArguments:
    """What train_adm.py trains for."""

    validation_prompts: list[str] | None = arg(
        None, "Prompts of the validation images; none: the first captions of the data.", resume=FREE
    )
    task: Literal["generate", "inpaint"] = arg(
        "generate",
        "Generate images, or inpaint them. A model for either can be fine-tuned for the other.",
        resume=NEVER,
    )
    inpainting_layout: InpaintingLayout | None = arg(
        None,
        "Order of the channels of an inpainting U-Net after those of the noisy image: `glide` (masked image, keep "
        "mask) or `stable-diffusion` (mask of the part to inpaint, masked image). None: the pretrained model's, or "
        "glide for new channels.",
        resume=NEVER,
    )

    def check(self, text_args: TextArguments) -> None:
        """Raises a `ValueError` for `validation_prompts` that would not be used, and a layout without inpainting."""
        if self.inpainting_layout is not None and self.task != "inpaint":
            raise ValueError(
                f"`inpainting_layout` is {self.inpainting_layout!r}, but `task` is {self.task}. Pass `--task inpaint`, "
                "or leave it out."
            )
        if self.validation_prompts and (text_args.caption_column is None or self.task == "inpaint"):
            raise ValueError(
                "`validation_prompts` needs a `caption_column`, and `task` generate: inpainting is validated on images "
                "of the data with their own captions."
            )


@dataclass
class SuperResolutionArguments:
    """The low-resolution images of train_super_resolution.py."""

    low_res_size: SizeArgument | None = arg(
        None,
        "Size of the low-resolution images in pixels: the side of a square, or HEIGHTxWIDTH; the resolution is a "
        "multiple of it. None: the pretrained model's.",
        resume=PROCESS,
        parse=size_word,
    )
    max_noise_level: int | None = arg(
        None,
        "Highest noise level of the low-resolution images, in timesteps of the noise schedule; levels from 0 (no "
        "noise) are equally likely. Above 0, the U-Net needs a `time_cond_proj_dim`. None: the pretrained model's, or "
        "0.",
        resume=PROCESS,
    )

    def __post_init__(self):
        if self.low_res_size is not None:
            self.low_res_size = size_argument(parse_size("low_res_size", self.low_res_size))
        check_at_least(self, 0, "max_noise_level")

    @property
    def size(self) -> Size:
        """`low_res_size` as a number, or as height and width."""
        return parse_size("low_res_size", self.low_res_size)

    def inherit(self, pipeline_config: dict[str, Any]) -> None:
        """Takes what was not given from the config of the pretrained pipeline."""
        if self.low_res_size is None and pipeline_config.get("low_res_size") is not None:
            self.low_res_size = size_argument(pipeline_config["low_res_size"])
        if self.max_noise_level is None:
            self.max_noise_level = pipeline_config.get("max_noise_level") or 0
        if self.low_res_size is None:
            raise ValueError("`low_res_size` is missing: the size of the low-resolution images in pixels, e.g. 32.")

    def check(
        self,
        resolution: Size,
        scheduler: LearnedVarianceDDPMScheduler,
        time_cond_proj_dim: int | None,
        latent_factor: int = 1,
    ) -> None:
        """
        Raises a `ValueError` if size or noise level do not match resolution, noise schedule or network. `latent_factor`
        is the number of image pixels per sample pixel.
        """
        (height, width), (low_height, low_width) = as_size(resolution), as_size(self.size)
        factor = height // low_height
        if factor < 2 or (height, width) != (factor * low_height, factor * low_width):
            raise ValueError(
                f"`low_res_size` is {self.low_res_size} and the resolution {describe_size(resolution)}: the latter "
                "must be a multiple of the former, by the same factor along both sides and at least 2 times as large."
                + (" Pass both as HEIGHTxWIDTH, e.g. `--low_res_size 16x64`." if height != width else "")
            )
        latent_size = height // latent_factor, width // latent_factor
        check_fits_latents((low_height, low_width), latent_size, "`low_res_size` is")
        num_steps = scheduler.config.num_train_timesteps
        if self.max_noise_level > num_steps:
            raise ValueError(
                f"`max_noise_level` is {self.max_noise_level}, but the noise schedule (`ddpm_num_steps`) has "
                f"{num_steps} timesteps. Pass `--max_noise_level {num_steps // 10}` or so."
            )
        if self.max_noise_level > 0 and time_cond_proj_dim is None:
            raise ValueError(
                f"`max_noise_level` is {self.max_noise_level}, but the U-Net's config has no `time_cond_proj_dim`. Set "
                "it, e.g. to the first of `block_out_channels`, or pass `--max_noise_level 0`."
            )
