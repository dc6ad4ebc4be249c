"""The rules for training arguments that have no effect."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..commands import effects
from ..commands.effects import Rule


COSINE_SCHEDULES = ("cosine", "squaredcos_cap_v2")


def _has(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda given: bool(given[name])


def _has_embeddings(given: Mapping[str, Any]) -> bool:
    return bool(given["image_embeds_column"] or given["image_encoder_name_or_path"])


def _has_held_out(given: Mapping[str, Any]) -> bool:
    names = ("validation_split", "validation_data_files", "validation_data_dir")
    return any(given[name] for name in names)


TRAINING_RULES = (
    Rule(
        ("revision", "variant"),
        _has("pretrained_model_name_or_path"),
        "it belongs to a pretrained model, and `pretrained_model_name_or_path` was not given",
        refused=True,
    ),
    Rule(
        ("revision",),
        lambda given: not os.path.isdir(given["pretrained_model_name_or_path"] or ""),
        "`pretrained_model_name_or_path` {pretrained_model_name_or_path!r} is a folder, which has no revisions",
        refused=True,
    ),
    Rule(
        ("beta_start", "beta_end"),
        lambda given: given["ddpm_beta_schedule"] not in COSINE_SCHEDULES,
        "`ddpm_beta_schedule` is {ddpm_beta_schedule!r}, which is defined without it",
        refused=True,
    ),
    Rule(("class_dropout_prob",), _has("label_column"), "without `label_column` there are no classes to drop"),
    Rule(
        ("class_dropout_prob", "replace_classes"),
        lambda given: not _has_embeddings(given),
        "a decoder of image embeddings has no classes",
    ),
    Rule(
        ("image_embeds_dropout_prob",),
        _has_embeddings,
        "without `image_embeds_column` and `image_encoder_name_or_path` there are no image embeddings to drop",
    ),
    Rule(("caption_dropout_prob",), _has("caption_column"), "without `caption_column` there are no captions to drop"),
    Rule(
        ("num_train_epochs",),
        lambda given: given["max_train_steps"] is None,
        "`max_train_steps` {max_train_steps} says when training ends",
    ),
    Rule(
        ("lr_warmup_steps",),
        lambda given: given["lr_scheduler"] != "constant",
        "`lr_scheduler` 'constant' has no warm-up; 'constant_with_warmup' has one",
    ),
    Rule(
        ("no_check_images", "image_check_num_proc"),
        lambda given: not given["streaming"],
        "with `streaming`, images are never checked before the first step",
    ),
    Rule(("ema_max_decay", "ema_inv_gamma", "ema_power"), _has("use_ema"), "`use_ema` is false"),
    Rule(
        ("overwrite_output_dir",),
        lambda given: given["resume_from_checkpoint"] is None,
        "with `resume_from_checkpoint` the run goes on and nothing is deleted",
    ),
    Rule(
        ("logging_dir",), lambda given: given["report_to"] in ("tensorboard", "wandb"), "`report_to` is {report_to!r}"
    ),
    Rule(("tracker_project_name",), lambda given: given["report_to"] != "none", "`report_to` is 'none'"),
    Rule(("allow_tf32",), lambda given: torch.cuda.is_available(), "it is for CUDA devices, and there is none"),
    # Only classifiers and CLIPs need held-out images.
    Rule(
        ("validation_steps",),
        lambda given: not given.keys() & {"noised", "zero_shot_template"} or _has_held_out(given),
        "there are no held-out images to validate on: name `validation_data_files` or `validation_split`",
    ),
    Rule(
        ("validation_steps", "validation_num_inference_steps", "validation_guidance_scale", "validation_candidates"),
        lambda given: "validation_candidates" not in given or bool(given["validation_data_dir"]),
        "there are no held-out embeddings to validate on: name `validation_data_dir`",
    ),
    Rule(
        ("validation_bits_per_dim", "validation_frechet_network"),
        _has_held_out,
        "there are no held-out images to measure: name `validation_data_files`, `validation_data_dir` or "
        "`validation_split`",
        refused=True,
    ),
    Rule(("num_timestep_bins",), _has("noised"), "`noised` is false, so there is one timestep only"),
    # Of autoencoders, which have no classes.
    Rule(
        ("label_column",),
        lambda given: "decoder_only" not in given or bool(given["class_balanced"]),
        "an autoencoder has no classes; only `class_balanced` uses labels",
    ),
    Rule(
        ("replace_classes",),
        lambda given: "decoder_only" not in given,
        "an autoencoder has no classes",
        refused=True,
    ),
    # Of CLIPs, for which labels only serve their validation.
    Rule(
        ("label_column",),
        lambda given: "zero_shot_template" not in given or bool(given["class_balanced"]) or _has_held_out(given),
        "a CLIP only needs labels for zero-shot accuracy on held-out images, and for `class_balanced`",
    ),
    Rule(
        ("zero_shot_template",),
        lambda given: bool(given["label_column"]) and _has_held_out(given),
        "zero-shot accuracy needs held-out images and a `label_column`",
    ),
    Rule(
        ("replace_classes",),
        lambda given: "zero_shot_template" not in given,
        "a CLIP has no rows for classes",
        refused=True,
    ),
    Rule(
        ("kl_weight",),
        lambda given: not given["decoder_only"],
        "`decoder_only` leaves the encoder, and so the KL divergence, as it is",
    ),
    Rule(
        ("standardize_channels",),
        lambda given: not given["decoder_only"],
        "`decoder_only` leaves the scale of the latents as it is",
    ),
    Rule(
        ("discriminator_weight", "discriminator_channels", "discriminator_layers"),
        lambda given: given["discriminator_start"] is not None,
        "without `discriminator_start` there is no discriminator",
    ),
)

# The rules of the training scripts, unless others are given.
check_effects = functools.partial(effects.check_effects, rules=TRAINING_RULES)
