"""
Converts GLIDE's checkpoints into folders that `from_pretrained` loads.

GLIDE's U-Nets are guided-diffusion's with text added, so `tensor_rules` of `openai_layout.py` describes them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models import AdaGNUNet2DModel, GLIDETextModel
from ..pipelines import ADMInpaintPipeline, ADMPipeline, ADMSuperResolutionPipeline
from ..schedulers import LearnedVarianceDDPMScheduler
from ..schedulers.noise_schedules import noise_schedule_of
from .checkpoint_files import read_layout
from .common import (
    IMAGE_CHANNELS,
    Component,
    Conversion,
    Flags,
    Shapes,
    check_output_dir,
    differences,
    expected_shapes,
    find_preset,
    format_flags,
    write_folder,
)
from .glide_flags import (
    CODE_BASE,
    GLIDE_PRESETS,
    IMAGE_SIZES,
    GLIDEKind,
    default_flags,
    glide_scheduler_config,
    kind_of,
    parse_glide_flags,
    text_config,
    unet_config,
)
from .glide_layout import image_channels_of, observed_glide_flags, text_rules
from .glide_tokenizer import load_glide_tokenizer
from .openai_layout import tensor_rules


logger = logging.getLogger(__name__)

PIPELINES: dict[GLIDEKind, type[ADMPipeline]] = {
    "base": ADMPipeline,
    "base-inpaint": ADMInpaintPipeline,
    "upsample": ADMSuperResolutionPipeline,
    "upsample-inpaint": ADMInpaintPipeline,
}
# Of the published upsampler.
UPSAMPLING_FACTOR = 4
# Flags that do not change what the network computes, or whose default follows from other flags: not worth a warning.
SILENT_FLAGS = ("cache_text_emb", "dropout", "timestep_respacing", "use_fp16", "num_heads_upsample", "channel_mult")


@dataclass
class ConvertedGLIDECheckpoint(Conversion):
    """
    The result of `convert_glide`.

    Args:
        output_dir (`Path`): The folder.
        kind (`str`): `"base"`, `"base-inpaint"`, `"upsample"` or `"upsample-inpaint"`.
        preset (`str`, *optional*): Name of the published checkpoint.
        recognised (`bool`): Whether `preset` was found by the layout of the file, and not given.
        flags (`dict`): All flags of network and process, by GLIDE's names.
        assumed (`dict`): Those of the flags that neither the caller nor the file determined.
        num_parameters (`int`), dtypes (`list[str]`): Of U-Net and text transformer together.
        has_tokenizer (`bool`): Whether the folder holds one.
    """

    kind: GLIDEKind
    has_tokenizer: bool


def convert_glide(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    preset: str | None = None,
    model_flags: str | Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    key: str | None = None,
) -> ConvertedGLIDECheckpoint:
    r"""
    Converts a checkpoint of GLIDE's code.

    Args:
        checkpoint (`str` or `Path`): The `.pt` file: a state dict with U-Net and text transformer, or the checkpoint of
            a training loop that holds one.
        output_dir (`str` or `Path`): Folder for `unet/`, `text_encoder/`, `scheduler/`, `tokenizer/` if one is given,
            and the index of an `ADMPipeline`, an `ADMSuperResolutionPipeline` or, for inpainting models, an
            `ADMInpaintPipeline`. Must not exist, or be empty.
        preset (`str`, *optional*): Name of a published model, which determines all flags (`GLIDE_PRESETS`).
        model_flags (`str` or mapping, *optional*): Options of `create_model_and_diffusion` that the model was trained
            with. Flags left out are read from the file as far as possible; the rest has GLIDE's defaults.
        tokenizer (`str` or `Path`, *optional*): GPT-2's, as for `load_glide_tokenizer`. `None`: the component is null,
            and the pipeline must be loaded with `tokenizer=`.
        key (`str`, *optional*): Which network, if the file holds several, as for `convert_openai`.

    Returns:
        [`ConvertedGLIDECheckpoint`]: `.assumed` holds the flags that are defaults. With neither `preset` nor
        `model_flags` these are at least the number of attention heads, unless the layout is that of a published model.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not such a checkpoint or damaged, its tensors are not exactly those that preset or
            flags describe, the tokenizer has another number of tokens, or `output_dir` is not empty. No folder is left
            then.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir).resolve()
    if preset is not None and model_flags is not None:
        raise ValueError("`preset` and `model_flags` were both given. A preset determines all flags: omit one.")
    check_output_dir(output_dir)
    if preset is not None:
        find_preset(preset, GLIDE_PRESETS)
    given = parse_glide_flags(model_flags or {})

    # 1. flags, from the preset, the caller, the file and the defaults
    layout = read_layout(checkpoint, key)
    shapes = layout.shapes
    observed = observed_glide_flags(shapes)
    recognised = False
    if preset is None and model_flags is None:
        preset = recognise_glide(shapes)
        recognised = preset is not None
    if preset is not None:
        flags, assumed = GLIDE_PRESETS[preset].settle(), {}
    else:
        determined = observed | given
        if "channel_mult" not in given and "image_size" in given and determined["image_size"] in IMAGE_SIZES:
            del determined["channel_mult"]  # the size determines it, even if the file differs
        flags = default_flags(determined["super_res"]) | determined
        heads = ("num_heads", "num_head_channels")
        silent = {*determined, *SILENT_FLAGS, *(heads if set(heads) & set(determined) else ())}
        assumed = {name: value for name, value in flags.items() if name not in silent}

    # 2. the networks, whose tensors must be exactly those of the file
    image_channels = IMAGE_CHANNELS if preset is not None else image_channels_of(shapes)
    unet, text_encoder = build_glide(flags, shapes["token_embedding.weight"][0], image_channels)
    components, expected = _components(unet, text_encoder)
    problems = differences(expected, shapes)
    if problems:
        described = f"of {preset}" if preset else "described"
        lines = "\n  ".join(problems)
        raise ValueError(
            f"The {layout.num_parameters:,} parameters of {checkpoint} are not those {described}, a model of GLIDE's:"
            f"\n  {lines}\nThe file looks like: {format_flags(observed)}."
        )
    words = None
    if tokenizer is not None:
        words = load_glide_tokenizer(tokenizer, flags["text_ctx"])
        if len(words) != text_encoder.config.vocab_size:
            raise ValueError(
                f"`tokenizer` {tokenizer} has {len(words)} tokens, but the model was trained with "
                f"{text_encoder.config.vocab_size}. Pass the tokenizer that it was trained with."
            )
    else:
        logger.warning(
            "No `tokenizer` was given, so the pipeline has none. GLIDE's is GPT-2's in lower case; convert with "
            "GPT-2's files, or load the pipeline with `tokenizer=load_glide_tokenizer(...)`."
        )

    # 3. the folder
    kind = kind_of(flags)
    scheduler = LearnedVarianceDDPMScheduler(**glide_scheduler_config(flags))
    pipeline = make_pipeline(kind, unet, scheduler, is_published=preset is not None)
    # Not through the constructor, which requires a tokenizer with every text encoder.
    pipeline.register_modules(text_encoder=text_encoder, tokenizer=words)
    write_folder(
        output_dir,
        checkpoint,
        layout.key,
        components,
        scheduler=scheduler,
        pipeline=pipeline,
        tokenizer=words,
        record={"code_base": CODE_BASE, "kind": kind, "preset": preset, "file": checkpoint.name, "flags": flags},
    )
    return ConvertedGLIDECheckpoint(
        output_dir=output_dir,
        kind=kind,
        preset=preset,
        recognised=recognised,
        flags=flags,
        assumed=assumed,
        num_parameters=layout.num_parameters,
        dtypes=layout.dtypes,
        has_tokenizer=words is not None,
    )


def build_glide(
    flags: Flags, vocab_size: int, image_channels: int = IMAGE_CHANNELS
) -> tuple[AdaGNUNet2DModel, GLIDETextModel]:
    """Builds the networks of a full set of flags on the meta device."""
    unet_arguments, text_arguments = unet_config(flags, image_channels), text_config(flags, vocab_size)
    with torch.device("meta"):
        return AdaGNUNet2DModel(**unet_arguments), GLIDETextModel(**text_arguments)


def _components(
    unet: AdaGNUNet2DModel, text_encoder: GLIDETextModel
) -> tuple[dict[str, Component], dict[str, tuple[int, ...]]]:
    """Both networks with their rules, and the shapes of a checkpoint that holds them."""
    components = {
        "unet": Component(unet, tensor_rules(unet, new_attention_order=False)),
        "text_encoder": Component(text_encoder, text_rules(text_encoder)),
    }
    return components, {name: shape for part in components.values() for name, shape in expected_shapes(*part).items()}


def make_pipeline(
    kind: GLIDEKind, unet: AdaGNUNet2DModel, scheduler: LearnedVarianceDDPMScheduler, is_published: bool
) -> ADMPipeline:
    """The pipeline of this kind of model, without text encoder and tokenizer."""
    components = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None}
    if kind == "upsample":
        # A file does not contain the size of its small images.
        size = unet.config.sample_size // UPSAMPLING_FACTOR if is_published else None
        trained = {"low_res_size": size, "noise_schedule": noise_schedule_of(scheduler)}
        return ADMSuperResolutionPipeline(unet, scheduler, **components, **trained)
    return PIPELINES[kind](unet, scheduler, **components)


def recognise_glide(shapes: Shapes) -> str | None:
    """The published model with exactly this layout."""
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    for name, preset in GLIDE_PRESETS.items():
        if preset.num_parameters == num_parameters:
            _, expected = _components(*build_glide(preset.settle(), shapes["token_embedding.weight"][0]))
            if not differences(expected, shapes):
                return name
    return None
