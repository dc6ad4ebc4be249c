"""Converts OpenAI's checkpoints into folders that `from_pretrained` loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from ..models import AdaGNClassifierModel, AdaGNUNet2DModel
from ..pipelines import ADMPipeline, ADMSuperResolutionPipeline
from ..schedulers import LearnedVarianceDDPMScheduler
from .common import check_output_dir, check_sums, dtypes_of, load_state_dict, new_folder, write_record, write_weights
from .openai_flags import (
    CHANNEL_MULT,
    CodeBase,
    Flags,
    Kind,
    default_flags,
    format_flags,
    model_config,
    parse_flags,
    possible_kinds,
    scheduler_config,
)
from .openai_layout import differences, expected_shapes, kinds_of_file, observed_flags, tensor_rules
from .openai_presets import PRESETS, get_preset


KIND_NAMES = {"unet": "a U-Net", "upsampler": "an upsampler", "classifier": "a classifier"}
KIND_FLAGS = {
    "unet": "`image_size`, `num_channels` and so on",
    "upsampler": "`large_size` and `small_size`, `num_channels` and so on, and not `image_size`",
    "classifier": "those that begin with `classifier_`, and `image_size`",
}


@dataclass
class ConvertedCheckpoint:
    """
    What `convert_openai` has done.

    Args:
        output_dir (`Path`): The folder.
        code_base (`str`): `"guided-diffusion"` or `"improved-diffusion"`.
        kind (`str`): `"unet"`, `"upsampler"` or `"classifier"`.
        preset (`str`, *optional*): The published checkpoint that it is.
        recognised (`bool`): Whether `preset` was found by the layout of the file, and not given.
        flags (`dict`): All flags of network and process, by the code base's names.
        assumed (`dict`): Those of them that neither the caller nor the file said.
        ignored (`list[str]`): Given flags that describe a run or another network.
        num_parameters (`int`), dtypes (`list[str]`): Of the network.
    """

    output_dir: Path
    code_base: CodeBase
    kind: Kind
    preset: str | None
    recognised: bool
    flags: Flags
    assumed: Flags
    ignored: list[str]
    num_parameters: int
    dtypes: list[str]


def convert_openai(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    preset: str | None = None,
    model_flags: str | Mapping[str, Any] | None = None,
    code_base: CodeBase | None = None,
) -> ConvertedCheckpoint:
    r"""
    Converts a checkpoint of guided-diffusion or improved-diffusion.

    Args:
        checkpoint (`str` or `Path`): The `.pt` file: a state dict, as their training scripts save it.
        output_dir (`str` or `Path`): Gets `unet/`, `scheduler/` and a pipeline's index, which
            `ADMPipeline.from_pretrained` loads, for an upsampler `ADMSuperResolutionPipeline.from_pretrained`; for a
            classifier `classifier/` and `scheduler/`, each loadable by its class. Must not exist, or be empty.
        preset (`str`, *optional*): Name of a published checkpoint, which settles all flags (`PRESETS`).
        model_flags (`str` or mapping, *optional*): The flags of the scripts that the network was trained with, under
            their names (`"--image_size 64 --num_channels 128 ..."`). What they leave out the file tells as far as it
            can (channels, blocks, attention levels); the rest has the default values of `code_base`.
        code_base (`str`, *optional*): `"guided-diffusion"` (the default without a preset) or `"improved-diffusion"`.

    Returns:
        [`ConvertedCheckpoint`]: `.assumed` holds what was not told. With neither `preset` nor `model_flags` that is
        at least the number of attention heads, unless the layout is that of a published checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no such checkpoint or damaged, its tensors are not exactly those that preset or
            flags describe, or `output_dir` is not empty. Nothing is left behind then.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir).resolve()
    if preset is not None and model_flags is not None:
        raise ValueError("`preset` and `model_flags` were both given. A preset settles all flags: leave one out.")
    if preset is not None and code_base not in (None, get_preset(preset).code_base):
        raise ValueError(f"`code_base` is {code_base!r}, but {preset} comes from {get_preset(preset).code_base}.")
    if code_base not in (None, *get_args(CodeBase)):
        raise ValueError(f"`code_base` is {code_base!r}; it must be one of {list(get_args(CodeBase))}.")
    check_output_dir(output_dir)

    state_dict = load_state_dict(checkpoint)
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    num_parameters = sum(tensor.numel() for tensor in state_dict.values())
    recognised = False
    if preset is None and model_flags is None:
        preset = recognise(checkpoint.stem, shapes, code_base)
        recognised = preset is not None
    ignored: list[str] = []
    if preset is not None:
        preset = preset.removesuffix(".pt")
        code_base = get_preset(preset).code_base
        kind, flags = get_preset(preset).settle()
        given, assumed = flags, {}
    else:
        code_base = code_base or "guided-diffusion"
        given, _, ignored = parse_flags(model_flags or {}, code_base)
        kind = _settle_kind(given, shapes, code_base)
        known = default_flags(code_base, kind)
        ignored += [name for name in given if name not in known]  # of the other network of `classifier_sample.py`
        given = {name: value for name, value in given.items() if name in known}
        flags, assumed = _complete(given, kind, shapes, code_base)

    model = build_network(flags, code_base, kind, None if preset else shapes)
    rules = tensor_rules(model, flags.get("use_new_attention_order", False))
    problems = differences(expected_shapes(model, rules), shapes)
    if problems:
        lines = "\n  ".join(problems)
        described = (
            f"of {preset}, which has {get_preset(preset).num_parameters:,} parameters" if preset else "described"
        )
        raise ValueError(
            f"The {num_parameters:,} parameters of {checkpoint} are not those {described}, {KIND_NAMES[kind]} of "
            f"{code_base}:\n  {lines}\n{_contradictions(given, kind, shapes, code_base)}"
        )
    check_sums(checkpoint)
    dtypes = dtypes_of(state_dict)
    record = {"code_base": code_base, "kind": kind, "preset": preset, "file": checkpoint.name, "flags": flags}
    scheduler = LearnedVarianceDDPMScheduler(**scheduler_config(flags, code_base))

    with new_folder(output_dir) as folder:
        model_dir = folder / ("classifier" if kind == "classifier" else "unet")
        model.save_config(model_dir)
        scheduler.save_pretrained(folder / "scheduler")
        others = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None}
        if kind == "unet":
            ADMPipeline(model, scheduler, **others).save_config(folder)
        elif kind == "upsampler":
            # The file does not tell the size of its small images, so that an assumed one shall bind nobody.
            upsampler = ADMSuperResolutionPipeline(model, scheduler, **others, low_res_size=given.get("small_size"))
            upsampler.save_config(folder)
        write_record(folder, record)
        del state_dict
        write_weights(model_dir / SAFETENSORS_WEIGHTS_NAME, checkpoint, rules)
    return ConvertedCheckpoint(
        output_dir, code_base, kind, preset, recognised, flags, assumed, ignored, num_parameters, dtypes
    )


def build_network(flags: Flags, code_base: CodeBase, kind: Kind, shapes: Mapping[str, tuple] | None) -> Any:
    """
    The network of these flags, on the meta device, with the numbers of channels and classes of a file with these
    shapes; `None`: with those of the published files.
    """
    in_channels, out_channels, classes = (6 if kind == "upsampler" else 3), (6 if flags["learn_sigma"] else 3), 1000
    if kind == "classifier":
        out_channels = 1000
    if shapes is not None:
        # The scripts fix these numbers, and people change them there.
        in_channels = shapes.get("input_blocks.0.0.weight", (0, in_channels))[1]
        classes = shapes.get("label_emb.weight", (classes,))[0]
        if kind == "classifier":
            last = [name for name in ("out.2.c_proj.bias", "out.3.bias", "out.2.bias") if name in shapes]
            out_channels = shapes[last[0]][0] if last else out_channels
        else:
            image_channels = in_channels // 2 if kind == "upsampler" else in_channels
            out_channels = image_channels * (2 if flags["learn_sigma"] else 1)
    config = model_config(
        flags, code_base, kind, in_channels=in_channels, out_channels=out_channels, num_classes=classes
    )
    with torch.device("meta"):
        return AdaGNClassifierModel(**config) if kind == "classifier" else AdaGNUNet2DModel(**config)


def _settle_kind(given: Flags, shapes: Mapping[str, tuple], code_base: CodeBase) -> Kind:
    """The likeliest kind of network that flags and file agree on."""
    by_flags, by_file = possible_kinds(given, code_base), kinds_of_file(shapes)
    for kind in by_file:
        if kind in by_flags:
            return kind
    kinds = " or ".join(KIND_NAMES[kind] for kind in by_flags)
    raise ValueError(
        f"`model_flags` describe {kinds} of {code_base}, but the file holds {KIND_NAMES[by_file[0]]} "
        f"({shapes['input_blocks.0.0.weight'][1]} input channels). Its flags are {KIND_FLAGS[by_file[0]]}."
    )


def _observe(given: Flags, kind: Kind, shapes: Mapping[str, tuple], code_base: CodeBase) -> Flags:
    """What the file tells, seen from the image size that was given, without channels per level that the size says."""
    observed = observed_flags(shapes, code_base, kind)
    size_name = "large_size" if kind == "upsampler" else "image_size"
    usual = CHANNEL_MULT[code_base, kind].get(given.get(size_name, observed.get(size_name)), ())
    if observed.get("channel_mult") == ",".join(f"{multiple:g}" for multiple in usual):
        del observed["channel_mult"]
    if size_name in given:
        name = "classifier_attention_resolutions" if kind == "classifier" else "attention_resolutions"
        seen_from = observed.get(size_name, default_flags(code_base, kind)[size_name])
        sizes = [int(size) * given[size_name] // seen_from for size in observed[name].split(",")]
        observed[name] = ",".join(map(str, sizes))
    return observed


def _complete(given: Flags, kind: Kind, shapes: Mapping[str, tuple], code_base: CodeBase) -> tuple[Flags, Flags]:
    """All flags, and those of them that nobody has told: the caller's win, then the file's."""
    flags = default_flags(code_base, kind)
    try:
        observed = _observe(given, kind, shapes, code_base)
        if given.get("image_size") in CHANNEL_MULT[code_base, kind]:
            observed.pop("channel_mult", None)  # the size settles it, even if it says otherwise than the file
        told = observed | given
    except ValueError:
        if not given:
            raise
        told = given
    # How it was trained does not change what the network computes, and a head count is not missed where there is one.
    silent = {"dropout", "rescale_learned_sigmas", "timestep_respacing", "use_checkpoint", "use_fp16", "use_kl"}
    silent |= {"classifier_use_fp16", "clip_denoised", "small_size", "num_heads_upsample", "channel_mult"}
    if {"num_heads", "num_head_channels"} & set(told):
        silent |= {"num_heads", "num_head_channels"}
    assumed = {name: value for name, value in flags.items() if name not in told and name not in silent}
    return flags | told, assumed


def recognise(stem: str, shapes: Mapping[str, tuple], code_base: CodeBase | None) -> str | None:
    """The published checkpoint with exactly this layout, if all those that have it mean the same network."""
    matches: dict[str, Any] = {}
    for name, preset in PRESETS.items():
        if code_base not in (None, preset.code_base):
            continue
        if preset.num_parameters != sum(torch.Size(shape).numel() for shape in shapes.values()):
            continue
        kind, flags = preset.settle()
        model = build_network(flags, preset.code_base, kind, None)
        if not differences(expected_shapes(model, tensor_rules(model, False)), shapes):
            matches[name] = {key: value for key, value in flags.items() if key not in ("dropout", "use_kl")}
    if stem in matches:
        return stem
    meanings = list(matches.values())
    return next(iter(matches)) if meanings and all(meaning == meanings[0] for meaning in meanings) else None


def _contradictions(given: Flags, kind: Kind, shapes: Mapping[str, tuple], code_base: CodeBase) -> str:
    """What the file looks like instead of what was given."""
    try:
        kinds = kinds_of_file(shapes)
        if kind not in kinds:
            return f"The file looks like {KIND_NAMES[kinds[0]]}."
        observed = _observe(given, kind, shapes, code_base)
    except ValueError as error:
        return str(error)
    given = default_flags(code_base, kind) | given
    other = {name: value for name, value in observed.items() if given[name] != value}
    text = f"The file looks like: {format_flags(observed)}."
    return f"{text} Other than given or by default: {', '.join(f'--{name}' for name in other)}." if other else text
