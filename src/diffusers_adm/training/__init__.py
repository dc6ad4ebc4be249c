"""
The parts of the training scripts: functions and small objects that never own the loop.

Importing it needs only the core dependencies; `datasets`, `yaml` and `matplotlib` (the `train` extra) are imported by
the functions that use them.
"""

# ruff: noqa: F401, every import is a public name of this package

from ..commands.arguments import arg, check_at_least, given_arguments, parse_args
from ..conditioning.class_labels import drop_labels
from ..conditioning.image_format import ImageFormat
from ..conditioning.previews import check_preview_channels, describe_preview, preview
from ..conditioning.text import drop_captions, encode_captions, stored_conditioning
from ..data.captions import CaptionEmbeddings, Captions, CaptionTokens
from ..data.checks import check_batch_fits, check_images
from ..data.columns import load_image_dataset
from ..data.decoding import UnusableImageError, decode_rgb
from ..data.formats import FormatRequest, find_image_format
from ..data.images import ImageDataset
from ..data.labels import load_id2label, match_classes, renumber_labels, save_id2label
from ..data.masks import MASK_SHARES, InpaintingDataset, random_keep_mask
from ..data.repositories import from_subfolder_or_root, reading
from ..data.samplers import BalancedClassSampler, EpochShuffleSampler
from ..data.seeding import derive_seed, seed_step
from ..data.text_encoders import build_text_encoder, freeze_unused_parameters, load_text_encoder, load_tokenizer
from ..deprecations import moved
from .arguments import (
    DIFFUSION_ARGUMENTS,
    DataArguments,
    DiffusionArguments,
    DiffusionTrainingArguments,
    HeldOutDataArguments,
    ImageEmbeddingArguments,
    ModelArguments,
    NoiseArguments,
    SuperResolutionArguments,
    TaskArguments,
    TextArguments,
    TrainingArguments,
    UNetArguments,
)
from .augmentation import random_colors, random_motion
from .autoencoder_losses import (
    AutoencoderLosses,
    Reconstruction,
    adaptive_weight,
    autoencoder_losses,
    generator_loss,
    hinge_loss,
    kl_per_value,
)
from .autoencoders import AUTOENCODER_ARGUMENTS, load_autoencoding, validate_reconstructions
from .building import build_dataloader, build_ema, build_lr_scheduler, build_optimizer
from .checkpoints import (
    TrainingProgress,
    checkpoint_weights_apart,
    delete_checkpoints,
    find_checkpoint,
    find_latest_checkpoint,
    rest_of_epoch,
    resume_checkpoint,
    save_checkpoint,
    unwrap,
)
from .classes import ClassPlan, plan_classes
from .classifiers import CLASSIFIER_ARGUMENTS, evaluate, load_classification, match_classifier_classes
from .clip import CLIP_ARGUMENTS, CLIP_PANELS, describe_measures, load_clip_training, validate_clip, write_measures
from .compiled import compile_network
from .contrastive import (
    ContrastiveLoss,
    clamp_logit_scale,
    contrastive_loss,
    gather_with_gradient,
    recall_at,
    retrieval_measures,
    zero_shot_measures,
)
from .controlnets import ControlArguments, build_controlnet, check_base_stays, check_text_stays, condition_request
from .diffusion import Diffusion, caption_model_kwargs, load_diffusion, load_text, prepare_captions
from .effects import check_effects
from .ema import ema_weights, evaluation_weights, result_weights
from .frozen import FrozenNetworks
from .held_out import HeldOutMeasures, held_out_measures, load_held_out
from .image_embeddings import BatchEncoder, ImageEmbeddings, load_image_embeddings, num_shown, variation_grid
from .image_measures import dice, measure, psnr, ssim
from .image_to_image import (
    ImageToImageArguments,
    record_measures,
    source_arguments,
    source_column_in_errors,
    translate_examples,
    translation_measures,
)
from .images import cell_scale, labelled_grid, labelled_strips
from .latent_statistics import CHECKPOINT_IMAGES, LatentMoments, latent_moments, measure_latents
from .loading import (
    check_config_keys,
    choose_resolution,
    load_model_config,
    load_noise_scheduler,
    pretrained_class_names,
    pretrained_image_format,
    pretrained_pipeline_config,
    record_noise_schedule,
)
from .log import TrainingLog
from .lora import LoraArguments, add_lora, checkpoint_adapter_only, save_lora, train_lora
from .losses import TrainingLosses, check_objective, min_snr_weights, training_losses
from .metrics import ClassificationMetrics, LossMetrics, MeanMetrics, MetricsHistory, record_losses, timestep_bin_edges
from .plots import (
    AUTOENCODER_PANELS,
    PRIOR_PANELS,
    plot_accuracy_by_timestep,
    plot_classifier_curves,
    plot_loss_curves,
)
from .priors import (
    PRIOR_ARGUMENTS,
    load_prior_training,
    measure_embeddings,
    prior_inputs,
    similarity_measures,
    validate_prior,
)
from .resume import RunRecord, parse_run
from .run import TrainingRun
from .setup import prepare_output_dir, run_settings, start_accelerator, start_run
from .timestep_samplers import (
    TIMESTEP_SAMPLERS,
    BiasedTimestepSampler,
    LossSecondMomentTimestepSampler,
    TimestepSampler,
    UniformTimestepSampler,
)
from .unets import (
    build_scheduler,
    build_unet,
    check_guidance,
    check_sampling_steps,
    choose_inpainting_layout,
    load_unet_config,
    low_res_channels,
    mask_channels,
    match_unet_classes,
    no_extra_channels,
    set_channels,
    widen_input,
)
from .validation import (
    check_last_validation,
    choose_examples,
    control_arguments,
    control_grid,
    generate,
    inpainting_arguments,
    inpainting_grid,
    low_resolution_arguments,
    sample_grid,
    save_samples,
    super_resolution_grid,
    survives,
)


__getattr__ = moved(
    __name__,
    {
        "AfterStep": "training.run.TrainingRun",
        "ControlDataset": "data.images.ImageDataset",
        "checkpoint_adapter_alone": "training.lora.checkpoint_adapter_only",
        "check_grids": "training.unets.check_sampling_steps",
        "check_guidance_of_grids": "training.unets.check_guidance",
        "draw": "training.validation.generate",
        "learned_classes": "training.loading.pretrained_class_names",
        "prepare_repository": "hub.publication.prepare_repository",
        "push_result": "hub.publication.push_result",
        "random_known": "data.masks.random_keep_mask",
    },
)
