"""
Converts GLIDE's checkpoints into folders that `from_pretrained` loads.

A checkpoint holds a U-Net and a text transformer. The U-Net is guided-diffusion's with text added, so `tensor_rules` of
`openai_layout.py` describes it.
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
from .checkpoint_files import read_layout
from .common import (
    IMAGE_CHANNELS,
    Component,
    Conversion,
    Flags,
    Shapes,
    TensorRule,
    add_defaults,
    check_output_dir,
    check_preset,
    differences,
    format_flags,
    fused_rules,
    kept,
    make_pipeline,
    module_rules,
    recognise_presets,
    write_folder,
)
from .glide_flags import (
    CODE_BASE,
    GLIDE_PRESETS,
    IMAGE_SIZES,
    GLIDEKind,
    default_flags,
    glide_scheduler_config,
    image_channels_of,
    kind_of,
    observed_glide_flags,
    parse_glide_flags,
    text_config,
    unet_config,
)
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


@dataclass
class ConvertedGLIDECheckpoint(Conversion):
    """
    The result of `convert_glide`. Further arguments: see [`Conversion`].

    Args:
        kind (`str`): `"base"`, `"base-inpaint"`, `"upsample"` or `"upsample-inpaint"`.
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
    check_preset(preset, model_flags, GLIDE_PRESETS)
    check_output_dir(output_dir)
    given = parse_glide_flags(model_flags or {})

    # 1. flags, from the preset, the caller, the file and the defaults
    layout = read_layout(checkpoint, key)
    shapes = layout.shapes
    observed = observed_glide_flags(shapes)
    recognised = None if preset is not None or model_flags is not None else recognise_glide(shapes)
    preset = preset or recognised
    if preset is not None:
        flags, assumed, image_channels = GLIDE_PRESETS[preset].settle(), {}, IMAGE_CHANNELS
    else:
        determined, image_channels = observed | given, image_channels_of(shapes)
        if "channel_mult" not in given and given.get("image_size") in IMAGE_SIZES:
            del determined["channel_mult"]  # the size determines it, even if the file differs
        flags, assumed = add_defaults(default_flags(determined["super_res"]), determined)

    # 2. the networks, whose tensors must be exactly those of the file
    vocab_size = shapes["token_embedding.weight"][0]
    components = glide_components(*build_glide(flags, vocab_size, image_channels))
    problems = differences(components, shapes)
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
        if len(words) != vocab_size:
            raise ValueError(
                f"`tokenizer` {tokenizer} has {len(words)} tokens, but the model was trained with {vocab_size}. Pass "
                "the tokenizer that it was trained with."
            )
    else:
        logger.warning(
            "No `tokenizer` was given, so the pipeline has none. GLIDE's is GPT-2's in lower case; convert with "
            "GPT-2's files, or load the pipeline with `tokenizer=load_glide_tokenizer(...)`."
        )

    # 3. the folder
    unet, text_encoder = (part.model for part in components.values())
    kind = kind_of(flags)
    scheduler = LearnedVarianceDDPMScheduler(**glide_scheduler_config(flags))
    low_res_size = unet.config.sample_size // UPSAMPLING_FACTOR if preset is not None else None
    pipeline = make_pipeline(PIPELINES[kind], unet, scheduler, low_res_size)
    # Not through the constructor, which requires a tokenizer with every text encoder.
    pipeline.register_modules(text_encoder=text_encoder, tokenizer=words)
    result = ConvertedGLIDECheckpoint(
        output_dir=output_dir,
        kind=kind,
        code_base=CODE_BASE,
        preset=preset,
        recognised=recognised is not None,
        flags=flags,
        assumed=assumed,
        num_parameters=layout.num_parameters,
        dtypes=layout.dtypes,
        has_tokenizer=words is not None,
    )
    write_folder(result, checkpoint, layout.key, components, scheduler, pipeline)
    return result


def build_glide(
    flags: Flags, vocab_size: int, image_channels: int = IMAGE_CHANNELS
) -> tuple[AdaGNUNet2DModel, GLIDETextModel]:
    """Builds the networks of a full set of flags on the meta device."""
    unet_arguments, text_arguments = unet_config(flags, image_channels), text_config(flags, vocab_size)
    with torch.device("meta"):
        return AdaGNUNet2DModel(**unet_arguments), GLIDETextModel(**text_arguments)


def glide_components(unet: AdaGNUNet2DModel, text_encoder: GLIDETextModel) -> dict[str, Component]:
    """Both networks with the rules for their tensors."""
    return {
        "unet": Component(unet, tensor_rules(unet, new_attention_order=False)),
        "text_encoder": Component(text_encoder, text_rules(text_encoder)),
    }


def text_rules(model: GLIDETextModel) -> list[TensorRule]:
    """Lists the rules for all tensors of the text transformer `model`, which may be on the meta device."""
    rules = [kept("token_embedding.weight", "embeddings.token_embedding.weight")]
    rules += [kept("positional_embedding", "embeddings.position_embedding")]
    if model.config.use_padding_embedding:
        rules += [kept("padding_embedding", "embeddings.padding_embedding")]
    for number in range(model.config.num_hidden_layers):
        source, target = f"transformer.resblocks.{number}", f"layers.{number}"
        rules += module_rules(f"{source}.ln_1", f"{target}.norm1")
        targets = [f"{target}.to_{part}" for part in "qkv"]
        heads = model.config.num_attention_heads
        rules += fused_rules(f"{source}.attn.c_qkv", targets, heads, heads_first=True, weight_dims=0)
        rules += module_rules(f"{source}.attn.c_proj", f"{target}.to_out")
        rules += module_rules(f"{source}.ln_2", f"{target}.norm2")
        rules += module_rules(f"{source}.mlp.c_fc", f"{target}.linear1")
        rules += module_rules(f"{source}.mlp.c_proj", f"{target}.linear2")
    if model.config.use_final_layer_norm:
        rules += module_rules("final_ln", "final_layer_norm")
    rules += module_rules("transformer_proj", "text_projection")
    return rules


def recognise_glide(shapes: Shapes) -> str | None:
    """The published model with exactly this layout."""
    vocab_size = shapes["token_embedding.weight"][0]
    names = recognise_presets(
        shapes, GLIDE_PRESETS, lambda preset: glide_components(*build_glide(preset.settle(), vocab_size))
    )
    return names[0] if names else None
