"""
What the training scripts share: functions and small objects that never own the loop.

Importing it needs the core dependencies alone; what reads data, recipes or draws curves imports `datasets`, `yaml` and
`matplotlib` (the `train` extra) when it is called.
"""

from ..commands.arguments import arg, check_at_least, given_arguments, parse_args
from ..conditioning.class_labels import drop_labels
from ..conditioning.text import drop_captions, encode_captions, stored_conditioning
from ..data.captions import CaptionEmbeddings, Captions, CaptionTokens
from ..data.checks import check_batch_fits, check_images
from ..data.columns import load_image_dataset
from ..data.decoding import UnusableImageError, decode_rgb
from ..data.fingerprints import FrozenNetworks
from ..data.images import ImageDataset
from ..data.labels import load_id2label, match_classes, renumber_labels, save_id2label
from ..data.masks import MASK_SHARES, InpaintingDataset, random_keep_mask
from ..data.repositories import from_subfolder_or_root, reading
from ..data.samplers import BalancedClassSampler, EpochShuffleSampler
from ..data.seeding import derive_seed, seed_step
from ..data.text_encoders import build_text_encoder, freeze_unused_parameters, load_text_encoder, load_tokenizer
from ..deprecations import renamed
from ..hub.publication import prepare_repository, push_result
from .arguments import (
    DataArguments,
    DiffusionArguments,
    DiffusionTrainingArguments,
    ModelArguments,
    NoiseArguments,
    TextArguments,
    TrainingArguments,
    UNetArguments,
)
from .checkpoints import (
    TrainingProgress,
    delete_checkpoints,
    find_checkpoint,
    find_latest_checkpoint,
    rest_of_epoch,
    resume_checkpoint,
    save_checkpoint,
    unwrap,
)
from .classes import ClassPlan, plan_classes
from .classification import (
    ClassificationMetrics,
    match_classifier_classes,
    plot_accuracy_by_timestep,
    plot_classifier_curves,
    timestep_bin_edges,
)
from .conditioning import caption_model_kwargs, load_text, prepare_captions
from .effects import check_effects
from .ema import ema_weights, evaluation_weights, result_weights
from .images import labelled_grid, labelled_strips
from .lora import add_lora, checkpoint_adapter_alone, save_lora
from .losses import TrainingLosses, check_objective, min_snr_weights, training_losses
from .metrics import LossMetrics, MetricsHistory, plot_loss_curves
from .resume import RunRecord, parse_run
from .setup import (
    TrainingLog,
    build_dataloader,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    check_config_keys,
    choose_resolution,
    load_model_config,
    load_noise_scheduler,
    prepare_output_dir,
    record_noise_schedule,
    run_settings,
    save_samples,
    start_accelerator,
)
from .steps import AfterStep, record_losses
from .timestep_samplers import (
    TIMESTEP_SAMPLERS,
    LossSecondMomentTimestepSampler,
    TimestepSampler,
    UniformTimestepSampler,
)
from .unets import (
    IMAGE_CHANNELS,
    INPAINT_CHANNELS,
    build_scheduler,
    build_unet,
    check_grids,
    check_guidance_of_grids,
    learned_classes,
    load_unet_config,
    match_unet_classes,
    pretrained_pipeline_config,
    widen_input,
)
from .validation import check_last_validation, choose_examples, draw, survives


__all__ = [
    "IMAGE_CHANNELS",
    "INPAINT_CHANNELS",
    "MASK_SHARES",
    "TIMESTEP_SAMPLERS",
    "AfterStep",
    "BalancedClassSampler",
    "CaptionEmbeddings",
    "CaptionTokens",
    "Captions",
    "ClassPlan",
    "ClassificationMetrics",
    "DataArguments",
    "DiffusionArguments",
    "DiffusionTrainingArguments",
    "EpochShuffleSampler",
    "FrozenNetworks",
    "ImageDataset",
    "InpaintingDataset",
    "LossMetrics",
    "LossSecondMomentTimestepSampler",
    "MetricsHistory",
    "ModelArguments",
    "NoiseArguments",
    "RunRecord",
    "TextArguments",
    "TimestepSampler",
    "TrainingArguments",
    "TrainingLog",
    "TrainingLosses",
    "TrainingProgress",
    "UNetArguments",
    "UniformTimestepSampler",
    "UnusableImageError",
    "add_lora",
    "arg",
    "build_dataloader",
    "build_ema",
    "build_lr_scheduler",
    "build_optimizer",
    "build_scheduler",
    "build_text_encoder",
    "build_unet",
    "caption_model_kwargs",
    "check_at_least",
    "check_batch_fits",
    "check_config_keys",
    "check_effects",
    "check_grids",
    "check_guidance_of_grids",
    "check_images",
    "check_last_validation",
    "check_objective",
    "checkpoint_adapter_alone",
    "choose_examples",
    "choose_resolution",
    "decode_rgb",
    "delete_checkpoints",
    "derive_seed",
    "draw",
    "drop_captions",
    "drop_labels",
    "ema_weights",
    "encode_captions",
    "evaluation_weights",
    "find_checkpoint",
    "find_latest_checkpoint",
    "freeze_unused_parameters",
    "from_subfolder_or_root",
    "given_arguments",
    "labelled_grid",
    "labelled_strips",
    "learned_classes",
    "load_id2label",
    "load_image_dataset",
    "load_model_config",
    "load_noise_scheduler",
    "load_text",
    "load_text_encoder",
    "load_tokenizer",
    "load_unet_config",
    "match_classes",
    "match_classifier_classes",
    "match_unet_classes",
    "min_snr_weights",
    "parse_args",
    "parse_run",
    "plan_classes",
    "plot_accuracy_by_timestep",
    "plot_classifier_curves",
    "plot_loss_curves",
    "prepare_captions",
    "prepare_output_dir",
    "prepare_repository",
    "pretrained_pipeline_config",
    "push_result",
    "random_keep_mask",
    "reading",
    "record_losses",
    "record_noise_schedule",
    "renumber_labels",
    "rest_of_epoch",
    "result_weights",
    "resume_checkpoint",
    "run_settings",
    "save_checkpoint",
    "save_id2label",
    "save_lora",
    "save_samples",
    "seed_step",
    "start_accelerator",
    "stored_conditioning",
    "survives",
    "timestep_bin_edges",
    "training_losses",
    "unwrap",
    "widen_input",
]

__getattr__ = renamed(__name__, {"ControlDataset": "ImageDataset", "random_known": "random_keep_mask"})
