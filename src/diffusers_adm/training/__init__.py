"""
What the training scripts share: functions and small objects that never own the loop.

Importing it needs the core dependencies alone; what reads data, recipes or draws curves imports `datasets`, `yaml` and
`matplotlib` (the `train` extra) when it is called.
"""

from .arguments import (
    DataArguments,
    DiffusionArguments,
    ModelArguments,
    NoiseArguments,
    TrainingArguments,
    arg,
    check_at_least,
    parse_args,
)
from .captions import (
    CaptionEmbeddings,
    Captions,
    CaptionTokens,
    build_text_encoder,
    drop_captions,
    encode_captions,
    freeze_unused_parameters,
    load_text_encoder,
    load_tokenizer,
    stored_conditioning,
)
from .checkpoints import (
    TrainingProgress,
    delete_checkpoints,
    find_latest_checkpoint,
    rest_of_epoch,
    resume_checkpoint,
    save_checkpoint,
)
from .classification import (
    BalancedClassSampler,
    ClassificationMetrics,
    load_id2label,
    match_classes,
    plot_accuracy_by_timestep,
    plot_classifier_curves,
    save_id2label,
    timestep_bin_edges,
    warn_of_other_classes,
)
from .data import (
    EpochShuffleSampler,
    ImageDataset,
    UnusableImageError,
    check_batch_fits,
    check_images,
    decode_rgb,
    load_image_dataset,
)
from .ema import ema_weights, evaluation_weights
from .images import labelled_grid
from .lora import add_lora, checkpoint_adapter_alone, save_lora
from .losses import TrainingLosses, check_objective, min_snr_weights, training_losses
from .metrics import LossMetrics, MetricsHistory, plot_loss_curves
from .repositories import from_subfolder_or_root, reading
from .seeding import derive_seed, seed_step
from .setup import (
    TrainingLog,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    check_config_keys,
    choose_resolution,
    load_model_config,
    load_noise_scheduler,
    prepare_output_dir,
    start_accelerator,
)
from .timestep_samplers import LossSecondMomentTimestepSampler, TimestepSampler, UniformTimestepSampler


__all__ = [
    "BalancedClassSampler",
    "CaptionEmbeddings",
    "CaptionTokens",
    "Captions",
    "ClassificationMetrics",
    "DataArguments",
    "DiffusionArguments",
    "EpochShuffleSampler",
    "ImageDataset",
    "LossMetrics",
    "LossSecondMomentTimestepSampler",
    "MetricsHistory",
    "ModelArguments",
    "NoiseArguments",
    "TimestepSampler",
    "TrainingArguments",
    "TrainingLog",
    "TrainingLosses",
    "TrainingProgress",
    "UniformTimestepSampler",
    "UnusableImageError",
    "add_lora",
    "arg",
    "build_ema",
    "build_lr_scheduler",
    "build_optimizer",
    "build_text_encoder",
    "check_at_least",
    "check_batch_fits",
    "check_config_keys",
    "check_images",
    "check_objective",
    "checkpoint_adapter_alone",
    "choose_resolution",
    "decode_rgb",
    "delete_checkpoints",
    "derive_seed",
    "drop_captions",
    "ema_weights",
    "encode_captions",
    "evaluation_weights",
    "find_latest_checkpoint",
    "freeze_unused_parameters",
    "from_subfolder_or_root",
    "labelled_grid",
    "load_id2label",
    "load_image_dataset",
    "load_model_config",
    "load_noise_scheduler",
    "load_text_encoder",
    "load_tokenizer",
    "match_classes",
    "min_snr_weights",
    "parse_args",
    "plot_accuracy_by_timestep",
    "plot_classifier_curves",
    "plot_loss_curves",
    "prepare_output_dir",
    "reading",
    "rest_of_epoch",
    "resume_checkpoint",
    "save_checkpoint",
    "save_id2label",
    "save_lora",
    "seed_step",
    "start_accelerator",
    "stored_conditioning",
    "timestep_bin_edges",
    "training_losses",
    "warn_of_other_classes",
]
