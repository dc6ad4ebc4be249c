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
from ..models.unclip_projection import TextConditioningType
from ..schedulers.noise_schedules import BetaScheduleName
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler, PredictionType, VarianceType
from .interruption import parse_max_time
from .losses import Objective
from .power_ema import check_std
from .timestep_samplers import (
    TIMESTEP_SAMPLERS,
    BiasedTimestepSampler,
    TimestepBiasStrategy,
    TimestepSampler,
    TimestepSamplerName,
)
from .trackers import TrackerName


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
class NetworkArguments:
    """Where the weights come from."""

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

    def check_source(self) -> None:
        """Raises a `ValueError` unless exactly one source of the network is given."""
        if (self.pretrained_model_name_or_path is None) == (self.model_config_name_or_path is None):
            raise ValueError(
                "Pass either `--model_config_name_or_path` (from scratch) or `--pretrained_model_name_or_path` "
                "(fine-tune)."
            )


@dataclass
class ModelArguments(NetworkArguments):
    """Where the weights come from, and how the network runs."""

    replace_classes: bool = arg(
        False,
        "Fine-tune: keep only the classes of the data instead of adding new ones to those of the pretrained model. "
        "Classes of the same name keep their weights either way.",
        resume=NEVER,
    )
    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass to save memory.", resume=FREE)
    channels_last: bool = arg(False, "Keep weights and images in channels-last memory format.", resume=FREE)
    compile: bool = arg(
        False,
        "Compile the network of the training step with `torch.compile`; the first step takes longer. Not for "
        "autoencoders and CLIPs.",
        resume=FREE,
    )

    def check_source(self) -> None:
        """Raises a `ValueError` unless exactly one source of the network is given, and for arguments of another one."""
        super().check_source()
        check_needs(self, "pretrained_model_name_or_path", "replace_classes")

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def refuse_compile(self, why: str) -> None:
        """Raises a `ValueError` if the network is to be compiled, which this script cannot, and `why`."""
        if self.compile:
            raise ValueError(f"`compile` was given, but {why}. Leave it out.")

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
    data_files: list[str] | None = arg(
        None, "Parquet files; with `streaming`, parquet files or WebDataset tars.", resume=PROCESS
    )
    streaming: bool = arg(
        False,
        "Read the images from shards while training, for data larger than the disk: parquet files or WebDataset tars, "
        "of a dataset on the Hub or `data_files`.",
        resume=PROCESS,
    )
    shuffle_buffer_size: int | None = arg(
        None,
        "Size of each worker's shuffle buffer for a stream, in examples; none: 1000. The order of the shards is "
        "shuffled as well.",
        resume=PROCESS,
    )
    class_names: str | None = arg(
        None,
        "File with the class names of a stream whose labels are numbers without names: one name per line, in the order "
        "of the numbers, or a JSON list, or the `id2label.json` of a classifier.",
        resume=SOURCE,
    )
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
    no_check_images: bool = arg(
        False,
        "Start training without decoding all images first; unusable ones are skipped as they are met. A stream is "
        "never checked first.",
        resume=PROCESS,
    )

    def __post_init__(self):
        if self.resolution is not None:
            self.resolution = size_argument(parse_size("resolution", self.resolution))
        parse_value_range("value_range", self.value_range)
        check_at_least(self, 1, "image_check_num_proc", "shuffle_buffer_size")
        check_at_least(self, 0, "min_image_size", "dataloader_num_workers")
        check_needs(self, "label_column", "class_balanced", "class_names")
        check_needs(self, "streaming", "shuffle_buffer_size", "class_names")
        self._check_unchecked()

    def _check_unchecked(self) -> None:
        """Raises a `ValueError` for what needs all images before the first step, if they are not read before."""
        needs = {"value_range": "its `auto` measures all images"} if self.value_range == ["auto"] else {}
        if self.streaming:
            needs |= {
                "train_data_dir": "images in a folder are not in shards; write parquet files or tars",
                "max_train_samples": "a random subset needs a list of all images; name fewer shards",
                "class_balanced": "equal shares of the classes need a list of all labels",
            }
        unchecked = "streaming" if self.streaming else "no_check_images" if self.no_check_images else None
        for name, why in needs.items():
            if unchecked is not None and getattr(self, name):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, and `{unchecked}` does not read the data before the first "
                    f"step: {why}. Drop one of them."
                )

    def refuse_streaming(self, what: str) -> None:
        """Raises a `ValueError` if the images are to be streamed, which `what` cannot."""
        if self.streaming:
            raise ValueError(
                f"`streaming` was given, but {what}. Leave it out. train_adm.py, train_controlnet.py and "
                "train_super_resolution.py can stream."
            )

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
        """
        Keyword arguments of `load_image_dataset`, without the seed. Raises a `ValueError` for `streaming`, which is
        read by `open_stream`.
        """
        self.refuse_streaming("this script reads its images at random")
        return self._source()

    def _source(self) -> dict[str, Any]:
        names = ("dataset_name", "dataset_config_name", "train_data_dir", "data_files", "split")
        names += ("image_column", "label_column", "cache_dir", "max_train_samples")
        return {name: getattr(self, name) for name in names}


@dataclass
class HeldOutDataArguments(DataArguments):
    """Training images, and held-out ones for validation."""

    validation_data_files: list[str] | None = arg(None, "Parquet files of held-out images.", resume=FREE)
    validation_data_dir: str | None = arg(
        None,
        "Folder of held-out images, as `train_data_dir`; for training on stored latents, of held-out latents.",
        resume=FREE,
    )
    validation_split: str | None = arg(
        None,
        "Split of the held-out images: of `validation_data_files` or `validation_data_dir` (default: train), or else "
        "of the training data.",
        resume=FREE,
    )
    max_validation_samples: int | None = arg(
        None, "Size of a random subset to validate on; none: all held-out images.", resume=FREE
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "max_validation_samples")
        if self.validation_data_files is not None and self.validation_data_dir is not None:
            raise ValueError("Got `validation_data_files` and `validation_data_dir`. Pass one of them.")
        if self.max_validation_samples is not None and self.validation_source() is None:
            raise ValueError(
                "`max_validation_samples` was given without `validation_data_files`, `validation_data_dir` or "
                "`validation_split`. Pass one."
            )

    def validation_source(self) -> dict[str, Any] | None:
        """As `source`, for the held-out images, which are never streamed; None if there are none."""
        source = self._source() | {"max_train_samples": self.max_validation_samples}
        if self.validation_data_files is not None or self.validation_data_dir is not None:
            elsewhere = {"dataset_name": None, "dataset_config_name": None, "split": self.validation_split or "train"}
            files, folder = self.validation_data_files, self.validation_data_dir
            return source | elsewhere | {"data_files": files, "train_data_dir": folder}
        return source | {"split": self.validation_split} if self.validation_split is not None else None


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
    timestep_bias_strategy: TimestepBiasStrategy | None = arg(
        None,
        "Timesteps that are trained on more often, so that they count more: the first or the last of them (earlier, "
        "later), or a range. Later ones determine the content. None, or none (as in diffusers): all alike.",
        resume=PROCESS,
    )
    timestep_bias_multiplier: float | None = arg(
        None, "Sampling weight of each of them relative to the other timesteps, e.g. 2.", resume=PROCESS
    )
    timestep_bias_portion: float | None = arg(
        None, "Share of the timesteps that earlier and later mean (0.25).", resume=PROCESS
    )
    timestep_bias_begin: int | None = arg(None, "First timestep of the range (0).", resume=PROCESS)
    timestep_bias_end: int | None = arg(None, "Timestep that the range ends before (all).", resume=PROCESS)

    def __post_init__(self):
        super().__post_init__()
        strategy = self.timestep_bias_strategy or "none"
        needed = {"timestep_bias_multiplier": strategy != "none"}
        needed["timestep_bias_portion"] = strategy in ("earlier", "later")
        needed |= dict.fromkeys(("timestep_bias_begin", "timestep_bias_end"), strategy == "range")
        for name, is_used in needed.items():
            if getattr(self, name) is not None and not is_used:
                raise ValueError(
                    f"`{name}` was given, but `timestep_bias_strategy` is {strategy!r}, which does not use it. Leave "
                    "it out, or pass another strategy."
                )
        if strategy == "none":
            return
        if self.timestep_bias_multiplier is None:
            raise ValueError(
                f"`timestep_bias_strategy` is {strategy!r} and `timestep_bias_multiplier` was not given. Pass it, "
                "e.g. 2."
            )
        if self.timestep_sampler != "uniform":
            raise ValueError(
                f"`timestep_sampler` is {self.timestep_sampler!r}, whose weights would undo `timestep_bias_strategy` "
                f"{strategy!r}. Leave one of them out."
            )
        check_positive(self, "timestep_bias_multiplier", "timestep_bias_portion")
        if self.timestep_bias_portion is not None and self.timestep_bias_portion > 1:
            raise ValueError(f"`timestep_bias_portion` is {self.timestep_bias_portion}; it must lie in (0, 1].")

    def build_timestep_sampler(self, num_train_timesteps: int) -> TimestepSampler:
        """Raises a `ValueError` for biased timesteps that the noise schedule does not have."""
        if self.timestep_bias_strategy in (None, "none"):
            return TIMESTEP_SAMPLERS[self.timestep_sampler](num_train_timesteps)
        names = {name: f"timestep_bias_{name}" for name in ("multiplier", "portion", "begin", "end")}
        given = {name: value for name, full in names.items() if (value := getattr(self, full)) is not None}
        try:
            return BiasedTimestepSampler.from_strategy(num_train_timesteps, self.timestep_bias_strategy, **given)
        except ValueError as error:
            raise ValueError(f"`timestep_bias_strategy` is {self.timestep_bias_strategy!r}: {error}") from error


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
    max_skipped_steps: int | None = arg(
        None,
        "Number of optimizer steps in a row, skipped because loss or gradient is not finite, after which the run ends; "
        "none: 10.",
        resume=FREE,
    )
    max_time: str | None = arg(
        None,
        "Time limit, HH:MM:SS or a number of minutes: the run ends before it with a checkpoint and exit code 75; none: "
        "no limit.",
        resume=FREE,
    )
    dry_run: bool = arg(
        False,
        "Try data, network, one optimizer step, one checkpoint and one validation, report memory and time, and leave "
        "nothing behind.",
        resume=FREE,
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
    report_to: TrackerName = arg(
        "tensorboard",
        "Tracker of the curves, in addition to files. All but TensorBoard need a package to be installed, and an "
        "account or a server.",
        resume=FREE,
    )
    tracker_project_name: str | None = arg(
        None, "Project of the run in its tracker; for TensorBoard, the folder of its logs; none: train.", resume=FREE
    )
    validation_steps: int | None = arg(None, "Optimizer steps between validations; none: only at the end.", resume=FREE)
    keep_best: str | None = arg(
        None,
        "Measure of validation, e.g. validation_loss: the result with its best value is kept in the folder `best` of "
        "`output_dir`; none: it is not kept.",
        resume=FREE,
    )
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
        check_at_least(self, 1, "max_skipped_steps")
        if self.max_time is not None:
            parse_max_time(self.max_time)
        check_needs(self, "validation_steps", "keep_best")  # or there is one validation only, of the last step
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
    validation_bits_per_dim: int | None = arg(
        None,
        "Number of held-out images on which validation measures bits per dimension: one forward pass per image and "
        "timestep; none: not measured.",
        resume=FREE,
    )
    validation_frechet_network: str | None = arg(
        None,
        "Classifier on the Hub or in a folder, e.g. spaces/model/base: validation measures the Frechet distance "
        "between samples and held-out images in its features; none: not measured.",
        resume=FREE,
    )
    validation_frechet_samples: int | None = arg(
        None,
        "Number of samples for the Frechet distance; none: as many as there are held-out images.",
        resume=FREE,
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "num_validation_images", "validation_num_inference_steps", "validation_bits_per_dim")
        check_at_least(self, 2, "validation_frechet_samples")
        check_needs(self, "validation_frechet_network", "validation_frechet_samples")
        check_preview_numbers(self.preview_channels)


# What all scripts that train a diffusion model have in common, in this order.
DIFFUSION_ARGUMENTS = (
    UNetArguments,
    HeldOutDataArguments,
    DiffusionArguments,
    DiffusionTrainingArguments,
    TextArguments,
)


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
class ImageEmbeddingArguments:
    """The CLIP image embeddings that a decoder of unCLIP is conditioned on."""

    image_embeds_column: str | None = arg(
        None,
        "Column of CLIP image embeddings, to train a decoder of unCLIP; those of mirrored images, for `random_flip`, "
        "are in the column of this name with `_flipped`. `diffusers_adm.data.encode_embeddings` writes both.",
        resume=PROCESS,
    )
    image_encoder_name_or_path: str | None = arg(
        None,
        "CLIP with projections, on the Hub or in a folder, to train a decoder of unCLIP: it encodes the images of each "
        "batch, unless `image_embeds_column` holds its embeddings, and becomes part of the result.",
        resume=SOURCE,
    )
    image_embeds_dropout_prob: float | None = arg(
        None,
        "Share of the image embeddings replaced by a learned one, for classifier-free guidance; independent of "
        "captions. None: 0.1, as in the paper.",
        resume=APPLIED,
    )
    num_image_tokens: int | None = arg(
        None,
        "Number of context tokens made of an image embedding, for a U-Net with cross-attention; 0: none. None: those "
        "of the pretrained decoder, or 4.",
        resume=NEVER,
    )
    image_embeds_in_time: bool | None = arg(
        None,
        "Add the image embedding to that of the timestep. None: as in the pretrained decoder, or true.",
        resume=NEVER,
    )
    text_conditioning: TextConditioningType | None = arg(
        None,
        "Captions of a decoder: states (the states of the text encoder follow the tokens of the image) or clip "
        "(projected states and text embedding of a CLIP, as in Karlo). None: that of the pretrained decoder, or "
        "states.",
        resume=NEVER,
    )

    def __post_init__(self) -> None:
        if self.image_embeds_dropout_prob is not None:
            check_share(self, "image_embeds_dropout_prob")
        check_at_least(self, 0, "num_image_tokens")
        if not self.are_given:
            for name in ("num_image_tokens", "image_embeds_in_time", "text_conditioning"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` is {getattr(self, name)!r}, but there are no image embeddings. Pass "
                        "`image_embeds_column` or `image_encoder_name_or_path`, or leave it out."
                    )
        if self.num_image_tokens == 0 and self.image_embeds_in_time is False:
            raise ValueError(
                "`num_image_tokens` is 0 and `image_embeds_in_time` is False: the image embedding would have no "
                "effect. Leave one of them out."
            )

    @property
    def dropout_prob(self) -> float:
        """Share of the image embeddings that are replaced."""
        return 0.1 if self.image_embeds_dropout_prob is None else self.image_embeds_dropout_prob

    @property
    def are_given(self) -> bool:
        """Whether a decoder is trained."""
        return self.image_embeds_column is not None or self.image_encoder_name_or_path is not None

    @property
    def encodes(self) -> bool:
        """Whether the images of each batch are encoded."""
        return self.image_embeds_column is None and self.image_encoder_name_or_path is not None

    def check(
        self, data_args: DataArguments, text_args: TextArguments, task_args: TaskArguments, lora_rank: int | None
    ) -> None:
        """Raises a `ValueError` for arguments that are incompatible with image embeddings."""
        if not self.are_given:
            return
        if task_args.task != "generate" or lora_rank is not None:
            name = "lora_rank" if lora_rank is not None else "task"
            raise ValueError(
                f"`{name}` is {lora_rank if lora_rank is not None else task_args.task!r}, but a decoder of image "
                f"embeddings is trained to generate, with all its weights. Leave `{name}` out, or the image embeddings."
            )
        if data_args.label_column is not None and not data_args.class_balanced:
            raise ValueError(
                f"`label_column` is {data_args.label_column!r}, but a decoder has no classes: the image embedding "
                "takes their place. Leave it out, or pass `--class_balanced` to draw the classes equally often."
            )
        if task_args.validation_prompts:
            raise ValueError(
                "`validation_prompts` has no use for a decoder, which is validated on images of the data with their "
                "own captions. Leave it out."
            )
        if self.text_conditioning is not None and text_args.caption_column is None:
            raise ValueError(
                f"`text_conditioning` is {self.text_conditioning!r}, but there is no `caption_column`. Pass both, or "
                "neither."
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
