"""The arguments that the training scripts have in common. A script adds its own by subclassing these dataclasses."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.utils import validate_repo_id

from ..commands.arguments import HUB_TOKEN, arg, check_at_least


@dataclass
class ModelArguments:
    """Where the weights come from, and how the network runs."""

    pretrained_model_name_or_path: str | None = arg(None, "Fine-tune: a pretrained model, on the Hub or in a folder.")
    revision: str | None = arg(None, "Of the pretrained model: a branch, a tag or a commit.")
    variant: str | None = arg(None, "Of the pretrained weights, e.g. fp16.")
    model_config_name_or_path: str | None = arg(
        None, "From scratch: the config of the network (a JSON file, or a folder or Hub repository that holds one)."
    )
    replace_classes: bool = arg(
        False,
        "Fine-tune: keep only the classes of the data, instead of adding new ones to those of the pretrained model. "
        "Classes of the same name keep their weights either way.",
    )
    gradient_checkpointing: bool = arg(False, "Recompute activations in the backward pass to save memory.")
    channels_last: bool = arg(False, "Keep weights and images in channels-last memory format.")

    def check_source(self) -> None:
        """
        Raises:
            ValueError: Unless exactly one of the two sources of a network is given, or if a network from scratch is to
                replace its classes.
        """
        if (self.pretrained_model_name_or_path is None) == (self.model_config_name_or_path is None):
            raise ValueError(
                "Pass either `--model_config_name_or_path` (from scratch) or `--pretrained_model_name_or_path` "
                "(fine-tune)."
            )
        if self.replace_classes and self.pretrained_model_name_or_path is None:
            raise ValueError(
                "`replace_classes` is for fine-tuning, but there is no `--pretrained_model_name_or_path`. A model from "
                "scratch has the classes of the data only; leave `replace_classes` out."
            )


@dataclass
class DataArguments:
    """The images, and what becomes of them."""

    dataset_name: str | None = arg(None, "A dataset on the Hub, or the path of a local copy.")
    dataset_config_name: str | None = arg(None, "Its configuration.")
    train_data_dir: str | None = arg(None, "A folder of images; the names of its subfolders are the labels.")
    data_files: list[str] | None = arg(None, "Parquet files.")
    split: str = arg("train", "The split to train on.")
    image_column: str = arg("image", "The column of the images.")
    label_column: str | None = arg(None, "The column of the labels; none: train without classes.")
    cache_dir: str | None = arg(None, "Where datasets and pretrained models are cached.")
    max_train_samples: int | None = arg(None, "Train on a random subset of this size.")
    resolution: int | None = arg(None, "Pixels; none: the `sample_size` of the model.")
    center_crop: bool = arg(False, "Crop at the centre instead of at random.")
    random_flip: bool = arg(False, "Mirror half of the images. Not for text, flags or anatomy.")
    class_balanced: bool = arg(False, "Draw the classes equally often, however many images they have.")
    min_image_size: int | None = arg(
        None, "Leave out images whose shorter side is below; none: half the resolution (upsamplers: all of it)."
    )
    dataloader_num_workers: int = arg(0, "Processes that load images; 0: the training process itself.")
    image_check_num_proc: int | None = arg(None, "Processes that check the images before training.")

    def __post_init__(self):
        check_at_least(self, 1, "resolution", "image_check_num_proc")
        check_at_least(self, 0, "min_image_size", "dataloader_num_workers")
        if self.class_balanced and self.label_column is None:
            raise ValueError("`class_balanced` was given without a `label_column`. Name the column of the classes.")

    def source(self) -> dict[str, Any]:
        """What `load_image_dataset` is to load: its keyword arguments, but for the seed."""
        names = ("dataset_name", "dataset_config_name", "train_data_dir", "data_files", "split")
        names += ("image_column", "label_column", "cache_dir", "max_train_samples")
        return {name: getattr(self, name) for name in names}


@dataclass
class NoiseArguments:
    """The noising chain. None: what the pretrained scheduler says, or the default in parentheses."""

    ddpm_num_steps: int | None = arg(None, "Length of the noising chain (1000).")
    ddpm_beta_schedule: (
        Literal["linear", "scaled_linear", "quadratic", "cosine", "squaredcos_cap_v2", "sigmoid"] | None
    ) = arg(None, "How the noise grows (linear); cosine and squaredcos_cap_v2 are the same.")
    beta_start: float | None = arg(None, "First beta (0.0001).")
    beta_end: float | None = arg(None, "Last beta (0.02).")

    def __post_init__(self):
        check_at_least(self, 1, "ddpm_num_steps")

    def given(self) -> dict[str, Any]:
        """What was given, by the names of `LearnedVarianceDDPMScheduler`'s arguments."""
        arguments = {
            "num_train_timesteps": self.ddpm_num_steps,
            "beta_schedule": self.ddpm_beta_schedule,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
        }
        return {name: value for name, value in arguments.items() if value is not None}


@dataclass
class DiffusionArguments(NoiseArguments):
    """The noising chain, what the network predicts, and the loss."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = arg(None, "What is predicted (epsilon).")
    variance_type: Literal["learned_range", "learned_log", "fixed_small", "fixed_large"] | None = arg(
        None, "The variance of a reverse step (learned_range)."
    )
    objective: Literal["simple", "hybrid", "hybrid_unscaled", "vlb"] = arg(
        "hybrid", "The loss: simple (squared error), hybrid (with the bound, for the variance), or vlb (the bound)."
    )
    snr_gamma: float | None = arg(None, "Min-SNR weighting of the squared error; 5.0 is usual.")
    timestep_sampler: Literal["uniform", "loss-second-moment"] = arg(
        "uniform", "How timesteps are drawn; loss-second-moment is meant for vlb."
    )

    def given(self) -> dict[str, Any]:
        arguments = {"prediction_type": self.prediction_type, "variance_type": self.variance_type}
        return super().given() | {name: value for name, value in arguments.items() if value is not None}


@dataclass
class TrainingArguments:
    """Steps, optimizer, average, checkpoints and logs."""

    output_dir: str = arg("adm-model", "Where the result, checkpoints and curves go.")
    seed: int = arg(0, "Of everything random.")
    train_batch_size: int = arg(16, "Images per process and forward pass.")
    num_train_epochs: int = arg(100, "Passes over the images, unless `max_train_steps` is given.")
    max_train_steps: int | None = arg(None, "Optimizer steps.")
    gradient_accumulation_steps: int = arg(1, "Forward passes per optimizer step.")
    learning_rate: float = arg(1e-4, "After warm-up.")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = arg(
        "constant_with_warmup", "How the learning rate changes."
    )
    lr_warmup_steps: int = arg(500, "Optimizer steps of warm-up.")
    adam_beta1: float = arg(0.9, "Of AdamW.")
    adam_beta2: float = arg(0.999, "Of AdamW.")
    adam_weight_decay: float = arg(0.0, "Of AdamW.")
    adam_epsilon: float = arg(1e-8, "Of AdamW.")
    max_grad_norm: float = arg(1.0, "Gradients are scaled down to this norm.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = arg(None, "None: as configured for Accelerate.")
    allow_tf32: bool = arg(False, "Let float32 matrix products run in TF32, as PyTorch's convolutions do anyway.")
    use_ema: bool = arg(True, "Keep an exponential moving average of the weights; validation and the result use it.")
    ema_max_decay: float = arg(0.9999, "The decay that the average warms up to.")
    ema_inv_gamma: float = arg(1.0, "Of the warm-up, decay = 1 - (1 + step / inv_gamma) ** -power.")
    ema_power: float = arg(3 / 4, "Of the warm-up.")
    checkpointing_steps: int = arg(1000, "Optimizer steps between checkpoints.")
    checkpoints_total_limit: int | None = arg(None, "Keep this many; none: all.")
    resume_from_checkpoint: str | None = arg(
        None, "`latest`, or a checkpoint folder. Arguments that are left out are those of the run."
    )
    force_resume: bool = arg(
        False, "Resume even where an argument or the data would make it another training; the new value is used."
    )
    overwrite_output_dir: bool = arg(False, "Start anew where another run left checkpoints, and delete those.")
    logging_steps: int = arg(20, "Optimizer steps between rows of the curves.")
    logging_dir: str = arg("logs", "For TensorBoard, below `output_dir`.")
    report_to: Literal["tensorboard", "none"] = arg("tensorboard", "Where curves go beside the files.")
    validation_steps: int | None = arg(None, "Optimizer steps between validations; none: only at the end.")
    push_to_hub: bool = arg(False, "Push the result to the Hub at the end, with a model card.")
    hub_model_id: str | None = arg(None, "The repository, `user/name`; none: the name of `output_dir`, for yourself.")
    hub_token: str | None = dataclasses.field(
        default=None,
        repr=False,
        metadata={"help": "To write there; none: that of `hf auth login` or $HF_TOKEN, which other users cannot see."},
    )
    hub_private_repo: bool = arg(False, "Make the repository a private one, if it is not there yet.")

    def __post_init__(self):
        for name in ("hub_model_id", "hub_token", "hub_private_repo"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"`{name}` was given without `push_to_hub`, so nothing would be pushed. Pass both.")
        if self.hub_model_id is not None:
            validate_repo_id(self.hub_model_id)
        if self.hub_token is not None and not HUB_TOKEN.fullmatch(self.hub_token):
            raise ValueError(
                "`hub_token` holds other characters than letters, digits, `_`, `-`, `.` and `|`, so it is no token."
            )
        if self.force_resume and self.resume_from_checkpoint is None:
            raise ValueError(
                "`force_resume` was given without `resume_from_checkpoint`, so nothing is resumed. Pass both."
            )
        check_at_least(self, 1, "train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
        check_at_least(self, 1, "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "logging_steps")
        check_at_least(self, 1, "validation_steps")
        check_at_least(self, 0, "lr_warmup_steps")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be positive.")
        if not 0 <= self.ema_max_decay < 1:
            raise ValueError(f"`ema_max_decay` is {self.ema_max_decay}; it must lie in [0, 1).")


@dataclass
class UNetArguments(ModelArguments):
    """
    For U-Nets: `pretrained_model_name_or_path` names a pipeline, of which `unet` and `scheduler` are read, and with
    captions also `text_encoder` and `tokenizer`.
    """

    class_dropout_prob: float = arg(
        0.1, "Share of the labels replaced by the null class, so that the model can be guided without a classifier."
    )

    def __post_init__(self):
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` is {self.class_dropout_prob}; it must lie in [0, 1].")


@dataclass
class TextArguments:
    """Captions, and what reads them."""

    caption_column: str | None = arg(None, "The column of the captions; none: train without text.")
    text_encoder_name_or_path: str | None = arg(
        None, "A text encoder of transformers (CLIP, T5, BERT, ...) on the Hub or in a folder, or a pipeline's."
    )
    tokenizer_name_or_path: str | None = arg(None, "Its tokenizer; none: that of the same repository.")
    text_encoder_config_name_or_path: str | None = arg(
        None, "A JSON file with sizes and `model_type` (or `_class_name` GLIDETextModel), for one trained from scratch."
    )
    train_text_encoder: bool = arg(False, "Train the text encoder together with the U-Net.")
    caption_dropout_prob: float = arg(
        0.1, "Share of the captions replaced by the empty one, so that the model can be guided; independent of classes."
    )
    precompute_text_embeddings: bool = arg(
        False, "Encode each distinct caption once, before training, and keep the result on disk."
    )

    def __post_init__(self):
        if not 0 <= self.caption_dropout_prob <= 1:
            raise ValueError(f"`caption_dropout_prob` is {self.caption_dropout_prob}; it must lie in [0, 1].")
        if self.caption_column is None:
            needing = ("text_encoder_name_or_path", "tokenizer_name_or_path", "text_encoder_config_name_or_path")
            needing += ("train_text_encoder", "precompute_text_embeddings")
            for name in needing:
                if getattr(self, name):
                    raise ValueError(f"`{name}` was given without a `caption_column`. Name the column of the captions.")
        if self.text_encoder_config_name_or_path is not None:
            if self.text_encoder_name_or_path is not None:
                raise ValueError("Pass either `text_encoder_name_or_path` or `text_encoder_config_name_or_path`.")
            if self.tokenizer_name_or_path is None:
                raise ValueError(
                    "`text_encoder_config_name_or_path` builds a text encoder from scratch, for which there is no "
                    "tokenizer. Pass `tokenizer_name_or_path`; `python -m diffusers_adm.training.tokenizer` makes one."
                )
            if not self.train_text_encoder:
                raise ValueError(
                    "`text_encoder_config_name_or_path` gives a text encoder random weights. Pass "
                    "`--train_text_encoder`, or name a trained one with `text_encoder_name_or_path`."
                )
        if self.precompute_text_embeddings and self.train_text_encoder:
            raise ValueError(
                "`precompute_text_embeddings` and `train_text_encoder` exclude each other: the embeddings change while "
                "their encoder is trained. Drop one."
            )


@dataclass
class DiffusionTrainingArguments(TrainingArguments):
    """Validation is a grid of samples."""

    num_validation_images: int = arg(16, "Images in a grid.")
    validation_num_inference_steps: int = arg(50, "Sampling steps of a grid.")
    validation_guidance_scale: float = arg(1.0, "Classifier-free guidance of a grid; 1 is off.")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "num_validation_images", "validation_num_inference_steps")


# 2. From recipe and command line to dataclasses
