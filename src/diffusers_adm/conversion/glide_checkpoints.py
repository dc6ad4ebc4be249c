"""Converts GLIDE's checkpoints into folders that `from_pretrained` loads, in the way of `openai_checkpoints`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from ..models import AdaGNUNet2DModel, GLIDETextModel
from ..pipelines import ADMInpaintPipeline, ADMPipeline, ADMSuperResolutionPipeline
from ..schedulers import LearnedVarianceDDPMScheduler
from ..schedulers.noise_schedules import noise_schedule_of
from .common import (
    TensorRule,
    check_output_dir,
    check_sums,
    dtypes_of,
    load_checkpoint,
    new_folder,
    report_unwrapping,
    write_record,
    write_weights,
)
from .glide_flags import (
    CODE_BASE,
    GLIDE_PRESETS,
    IMAGE_CHANNELS,
    IMAGE_SIZES,
    GLIDEKind,
    default_flags,
    get_glide_preset,
    glide_scheduler_config,
    kind_of,
    parse_glide_flags,
    text_config,
    unet_config,
)
from .glide_layout import Shapes, image_channels_of, observed_glide_flags, text_rules
from .glide_tokenizer import load_glide_tokenizer
from .openai_flags import Flags, format_flags
from .openai_layout import differences, expected_shapes, tensor_rules


logger = logging.getLogger(__name__)

PIPELINES: dict[GLIDEKind, type[ADMPipeline]] = {
    "base": ADMPipeline,
    "base-inpaint": ADMInpaintPipeline,
    "upsample": ADMSuperResolutionPipeline,
    "upsample-inpaint": ADMInpaintPipeline,
}
# Of the published upsampler.
UPSAMPLING_FACTOR = 4
# They say how a network was trained or is run: what it computes does not depend on them.
SILENT_FLAGS = ("cache_text_emb", "dropout", "timestep_respacing", "use_fp16", "num_heads_upsample", "channel_mult")


@dataclass
class ConvertedGLIDECheckpoint:
    """
    What `convert_glide` has done.

    Args:
        output_dir (`Path`): The folder.
        kind (`str`): `"base"`, `"base-inpaint"`, `"upsample"` or `"upsample-inpaint"`.
        preset (`str`, *optional*): The published checkpoint that it is.
        recognised (`bool`): Whether `preset` was found by the layout of the file, and not given.
        flags (`dict`): All flags of network and process, by GLIDE's names.
        assumed (`dict`): Those of them that neither the caller nor the file said.
        has_tokenizer (`bool`): Whether the folder holds one.
        num_parameters (`int`), dtypes (`list[str]`): Of U-Net and text transformer together.
    """

    output_dir: Path
    kind: GLIDEKind
    preset: str | None
    recognised: bool
    flags: Flags
    assumed: Flags
    has_tokenizer: bool
    num_parameters: int
    dtypes: list[str]


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
        output_dir (`str` or `Path`): Gets `unet/`, `text_encoder/`, `scheduler/`, with `tokenizer` `tokenizer/`, and a
            pipeline's index: of `ADMPipeline`, `ADMSuperResolutionPipeline` or, for both that inpaint,
            `ADMInpaintPipeline`. Must not exist, or be empty.
        preset (`str`, *optional*): Name of a published model, which settles all flags (`GLIDE_PRESETS`).
        model_flags (`str` or mapping, *optional*): Options of `create_model_and_diffusion` that the model was trained
            with. What they leave out the file tells as far as it can; the rest has GLIDE's defaults.
        tokenizer (`str` or `Path`, *optional*): GPT-2's, as for `load_glide_tokenizer`. `None`: the component is null,
            and the pipeline is to be loaded with `tokenizer=`.
        key (`str`, *optional*): Which network, where the file holds several, as for `convert_openai`.

    Returns:
        [`ConvertedGLIDECheckpoint`]: `.assumed` holds what was not told. With neither `preset` nor `model_flags` that
        is at least the number of attention heads, unless the layout is that of a published checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no such checkpoint or damaged, its tensors are not exactly those that preset or
            flags describe, the tokenizer has another number of tokens, or `output_dir` is not empty. Nothing is left
            behind then.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir).resolve()
    if preset is not None and model_flags is not None:
        raise ValueError("`preset` and `model_flags` were both given. A preset settles all flags: leave one out.")
    check_output_dir(output_dir)
    if preset is not None:
        get_glide_preset(preset)
    given = parse_glide_flags(model_flags or {})

    loaded = load_checkpoint(checkpoint, key)
    report_unwrapping(checkpoint, loaded)
    state_dict, key = loaded.state_dict, loaded.key
    del loaded
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    num_parameters = sum(tensor.numel() for tensor in state_dict.values())
    observed = observed_glide_flags(shapes)
    recognised = False
    if preset is None and model_flags is None:
        preset = recognise_glide(shapes)
        recognised = preset is not None
    if preset is not None:
        flags, assumed = get_glide_preset(preset).settle(), {}
    else:
        told = observed | given
        if "channel_mult" not in given and "image_size" in given and told["image_size"] in IMAGE_SIZES:
            del told["channel_mult"]  # the size settles it, even if it says otherwise than the file
        flags = default_flags(told["super_res"]) | told
        of_heads = ("num_heads", "num_head_channels") if {"num_heads", "num_head_channels"} & set(told) else ()
        silent = {*told, *SILENT_FLAGS, *of_heads}
        assumed = {name: value for name, value in flags.items() if name not in silent}

    image_channels = IMAGE_CHANNELS if preset is not None else image_channels_of(shapes)
    unet, text_encoder = build_glide(flags, shapes["token_embedding.weight"][0], image_channels)
    rules = {"unet": tensor_rules(unet, new_attention_order=False), "text_encoder": text_rules(text_encoder)}
    problems = differences(_expected(unet, text_encoder, rules), shapes)
    if problems:
        described = f"of {preset}" if preset else "described"
        lines = "\n  ".join(problems)
        raise ValueError(
            f"The {num_parameters:,} parameters of {checkpoint} are not those {described}, a model of GLIDE's:\n  "
            f"{lines}\nThe file looks like: {format_flags(observed)}."
        )
    words = None
    if tokenizer is not None:
        words = load_glide_tokenizer(tokenizer, flags["text_ctx"])
        if len(words) != text_encoder.config.vocab_size:
            raise ValueError(
                f"`tokenizer` {tokenizer} has {len(words)} tokens, but the model was trained with "
                f"{text_encoder.config.vocab_size}. Name the tokenizer that it was trained with."
            )
    else:
        logger.warning(
            "No `tokenizer` was given, so the pipeline has none. GLIDE's is GPT-2's in lower case; convert with "
            "GPT-2's files, or load the pipeline with `tokenizer=load_glide_tokenizer(...)`."
        )
    check_sums(checkpoint)
    dtypes = dtypes_of(state_dict)
    kind = kind_of(flags)
    scheduler = LearnedVarianceDDPMScheduler(**glide_scheduler_config(flags))
    record = {"code_base": CODE_BASE, "kind": kind, "preset": preset, "file": checkpoint.name, "flags": flags}
    record |= {"key": key} if key else {}

    with new_folder(output_dir) as folder:
        unet.save_config(folder / "unet")
        text_encoder.save_config(folder / "text_encoder")
        scheduler.save_pretrained(folder / "scheduler")
        if words is not None:
            words.save_pretrained(folder / "tokenizer")
        pipeline = make_pipeline(kind, unet, scheduler, is_published=preset is not None)
        # Past the constructor, which wants a tokenizer with every text encoder.
        pipeline.register_modules(text_encoder=text_encoder, tokenizer=words)
        pipeline.save_config(folder)
        write_record(folder, record)
        del state_dict
        for component, component_rules in rules.items():
            write_weights(folder / component / SAFETENSORS_WEIGHTS_NAME, checkpoint, key, component_rules)
    return ConvertedGLIDECheckpoint(
        output_dir, kind, preset, recognised, flags, assumed, words is not None, num_parameters, dtypes
    )


def build_glide(
    flags: Flags, vocab_size: int, image_channels: int = IMAGE_CHANNELS
) -> tuple[AdaGNUNet2DModel, GLIDETextModel]:
    """The networks of a full set of flags, on the meta device."""
    unet_arguments, text_arguments = unet_config(flags, image_channels), text_config(flags, vocab_size)
    with torch.device("meta"):
        return AdaGNUNet2DModel(**unet_arguments), GLIDETextModel(**text_arguments)


def make_pipeline(
    kind: GLIDEKind, unet: AdaGNUNet2DModel, scheduler: LearnedVarianceDDPMScheduler, is_published: bool
) -> ADMPipeline:
    """The pipeline of this kind of model, without what reads the text."""
    components = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None}
    if kind == "upsample":
        # A file does not tell the size of its small images.
        size = unet.config.sample_size // UPSAMPLING_FACTOR if is_published else None
        trained = {"low_res_size": size, "noise_schedule": noise_schedule_of(scheduler)}
        return ADMSuperResolutionPipeline(unet, scheduler, **components, **trained)
    return PIPELINES[kind](unet, scheduler, **components)


def recognise_glide(shapes: Shapes) -> str | None:
    """The published model with exactly this layout."""
    for name, preset in GLIDE_PRESETS.items():
        if preset.num_parameters == sum(torch.Size(shape).numel() for shape in shapes.values()):
            unet, text_encoder = build_glide(preset.settle(), shapes["token_embedding.weight"][0])
            rules = {"unet": tensor_rules(unet, new_attention_order=False), "text_encoder": text_rules(text_encoder)}
            if not differences(_expected(unet, text_encoder, rules), shapes):
                return name
    return None


def _expected(
    unet: AdaGNUNet2DModel, text_encoder: GLIDETextModel, rules: Mapping[str, list[TensorRule]]
) -> dict[str, tuple[int, ...]]:
    return expected_shapes(unet, rules["unet"]) | expected_shapes(text_encoder, rules["text_encoder"])
