"""Converts OpenAI's checkpoints into folders that `from_pretrained` loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from ..models import AdaGNClassifierModel, AdaGNUNet2DModel
from ..pipelines import ADMInpaintPipeline, ADMPipeline, ADMSuperResolutionPipeline
from ..schedulers import LearnedVarianceDDPMScheduler
from ..schedulers.noise_schedules import noise_schedule_of
from .common import (
    check_output_dir,
    check_sums,
    dtypes_of,
    load_checkpoint,
    new_folder,
    report_unwrapping,
    write_record,
    write_weights,
)
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
from .openai_layout import (
    Shapes,
    channels_of_file,
    differences,
    expected_shapes,
    image_channel_readings,
    kinds_of_file,
    observed_flags,
    tensor_rules,
)
from .openai_presets import PRESETS, get_preset


KIND_NAMES = {"unet": "a U-Net", "upsampler": "an upsampler", "classifier": "a classifier"}
KIND_FLAGS = {
    "unet": "`image_size`, `num_channels` and so on",
    "upsampler": "`large_size` and `small_size`, `num_channels` and so on, and not `image_size`",
    "classifier": "those that begin with `classifier_`, and `image_size`",
}
# Constants of both code bases: their networks are for RGB images.
IMAGE_CHANNELS = 3
# Input channels of inpainting networks for RGB images: x_t, the known pixels and the keep mask, and the enlarged small
# image with some.
INPAINTING_CHANNELS = (2 * IMAGE_CHANNELS + 1, 3 * IMAGE_CHANNELS + 1)


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
        image_channels (`int`): Channels of the images that the network denoises or classifies.
        condition_channels (`int`): Those that it takes besides, an upsampler's small image included.
        pipeline (`str`, *optional*): The class of the pipeline whose index was written; `None` if there is none for
            such a network.
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
    image_channels: int
    condition_channels: int
    pipeline: str | None


def convert_openai(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    preset: str | None = None,
    model_flags: str | Mapping[str, Any] | None = None,
    code_base: CodeBase | None = None,
    image_channels: int | None = None,
    key: str | None = None,
) -> ConvertedCheckpoint:
    r"""
    Converts a checkpoint of guided-diffusion or improved-diffusion.

    Args:
        checkpoint (`str` or `Path`): The `.pt` file: a state dict, as their training scripts save it, or the checkpoint
            of a training loop that holds one.
        output_dir (`str` or `Path`): Gets `unet/`, `scheduler/` and a pipeline's index, which
            `ADMPipeline.from_pretrained` loads, for an upsampler `ADMSuperResolutionPipeline.from_pretrained`, for a
            U-Net that takes RGB images and 4 or 7 channels more `ADMInpaintPipeline.from_pretrained`; no index for
            other U-Nets with conditions; for a classifier `classifier/` and `scheduler/`. Each component is loadable
            by its class. Must not exist, or be empty.
        preset (`str`, *optional*): Name of a published checkpoint, which settles all flags (`PRESETS`).
        model_flags (`str` or mapping, *optional*): The flags of the scripts that the network was trained with, under
            their names (`"--image_size 64 --num_channels 128 ..."`). What they leave out the file tells as far as it
            can (channels, blocks, attention levels); the rest has the default values of `code_base`.
        code_base (`str`, *optional*): `"guided-diffusion"` (the default without a preset) or `"improved-diffusion"`.
        image_channels (`int`, *optional*): Channels of the images, where the file and `--learn_sigma` do not tell: a
            network with 5 channels in and 2 out can denoise images of 2 channels with a fixed variance, conditioned on
            3 more, or images of 1 channel with a learned variance, conditioned on 4 more.
        key (`str`, *optional*): Which network, where the file holds several: keys of its dictionaries and parts of the
            names, joined by dots (`"ema"`, `"state_dict.model"`). One network in the checkpoint of a training loop is
            found without it, and a warning says where.

    Returns:
        [`ConvertedCheckpoint`]: `.assumed` holds what was not told. With neither `preset` nor `model_flags` that is
        at least the number of attention heads, unless the layout is that of a published checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no such checkpoint or damaged, its tensors are not exactly those that preset or
            flags describe, its channels can mean two networks, or `output_dir` is not empty. Nothing is left behind
            then.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir).resolve()
    if preset is not None and model_flags is not None:
        raise ValueError("`preset` and `model_flags` were both given. A preset settles all flags: leave one out.")
    if preset is not None and code_base not in (None, get_preset(preset).code_base):
        raise ValueError(f"`code_base` is {code_base!r}, but {preset} comes from {get_preset(preset).code_base}.")
    if code_base not in (None, *get_args(CodeBase)):
        raise ValueError(f"`code_base` is {code_base!r}; it must be one of {list(get_args(CodeBase))}.")
    check_image_channels(image_channels)
    if preset is not None and image_channels not in (None, IMAGE_CHANNELS):
        raise ValueError(
            f"`image_channels` is {image_channels}, but {preset} has images of {IMAGE_CHANNELS} channels. Leave it out."
        )
    check_output_dir(output_dir)

    loaded = load_checkpoint(checkpoint, key)
    report_unwrapping(checkpoint, loaded)
    state_dict, key = loaded.state_dict, loaded.key
    del loaded
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    num_parameters = sum(tensor.numel() for tensor in state_dict.values())
    recognised = False
    if preset is None and model_flags is None and image_channels in (None, IMAGE_CHANNELS):
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
        kind = _settle_kind(given, shapes, code_base, image_channels)
        known = default_flags(code_base, kind)
        ignored += [name for name in given if name not in known]  # of the other network of `classifier_sample.py`
        given = {name: value for name, value in given.items() if name in known}
        learn_sigma = None
        if kind == "classifier":
            check_channels_of_classifier(channels_of_file(shapes)[0], image_channels)
        else:
            learn_sigma = _settle_variance(given, kind, shapes, code_base, image_channels)
        flags, assumed = _complete(given, kind, shapes, code_base)
        if learn_sigma is not None:
            flags["learn_sigma"] = learn_sigma
            assumed.pop("learn_sigma", None)

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
            f"{code_base}:\n  {lines}\n{_contradictions(flags, kind, shapes, code_base)}"
        )
    check_sums(checkpoint)
    dtypes = dtypes_of(state_dict)
    record = {"code_base": code_base, "kind": kind, "preset": preset, "file": checkpoint.name, "flags": flags}
    record |= {"key": key} if key else {}
    scheduler = LearnedVarianceDDPMScheduler(**scheduler_config(flags, code_base))
    if kind == "classifier":
        model.register_to_config(noise_schedule=noise_schedule_of(scheduler))

    channels_in, channels_out = channels_of_file(shapes)
    image_channels = channels_in
    if kind != "classifier":
        image_channels = channels_out // 2 if flags["learn_sigma"] else channels_out

    with new_folder(output_dir) as folder:
        model_dir = folder / ("classifier" if kind == "classifier" else "unet")
        model.save_config(model_dir)
        scheduler.save_pretrained(folder / "scheduler")
        pipeline = _make_pipeline(kind, model, scheduler, image_channels, given.get("small_size"))
        if pipeline is not None:
            pipeline.save_config(folder)
        write_record(folder, record)
        del state_dict
        write_weights(model_dir / SAFETENSORS_WEIGHTS_NAME, checkpoint, key, rules)
    return ConvertedCheckpoint(
        output_dir=output_dir,
        code_base=code_base,
        kind=kind,
        preset=preset,
        recognised=recognised,
        flags=flags,
        assumed=assumed,
        ignored=ignored,
        num_parameters=num_parameters,
        dtypes=dtypes,
        image_channels=image_channels,
        condition_channels=channels_in - image_channels,
        pipeline=None if pipeline is None else type(pipeline).__name__,
    )


def check_image_channels(image_channels: int | None) -> None:
    """Raises a `ValueError` for what is no number of channels."""
    if image_channels is not None and (not isinstance(image_channels, int) or image_channels < 1):
        raise ValueError(f"`image_channels` is {image_channels!r}; it must be a positive integer.")


def check_channels_of_classifier(in_channels: int, image_channels: int | None) -> None:
    """Raises a `ValueError` unless it takes images of so many channels."""
    if image_channels not in (None, in_channels):
        raise ValueError(
            f"`image_channels` is {image_channels}, but the classifier takes {in_channels} channels. Leave it out."
        )


def _make_pipeline(
    kind: Kind,
    model: AdaGNUNet2DModel | AdaGNClassifierModel,
    scheduler: LearnedVarianceDDPMScheduler,
    image_channels: int,
    small_size: int | None,
) -> ADMPipeline | None:
    """The pipeline that samples from such a network, if there is one."""
    others = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None}
    channels_in = model.config.in_channels
    if kind == "unet" and channels_in == image_channels:
        return ADMPipeline(model, scheduler, **others)
    if kind == "upsampler" and channels_in == 2 * image_channels:
        # The file does not tell the size of its small images, so an assumed one must not bind anybody.
        trained = {"low_res_size": small_size, "noise_schedule": noise_schedule_of(scheduler)}
        return ADMSuperResolutionPipeline(model, scheduler, **others, **trained)
    if kind == "unet" and image_channels == IMAGE_CHANNELS and channels_in in INPAINTING_CHANNELS:
        return ADMInpaintPipeline(model, scheduler, **others)
    return None


def build_network(flags: Flags, code_base: CodeBase, kind: Kind, shapes: Shapes | None) -> Any:
    """
    The network of these flags, on the meta device, with the numbers of channels and classes of a file with these
    shapes; `None`: with those of the published files.
    """
    in_channels, out_channels, classes = IMAGE_CHANNELS, IMAGE_CHANNELS * (2 if flags["learn_sigma"] else 1), 1000
    if kind == "upsampler":
        in_channels *= 2
    elif kind == "classifier":
        out_channels = classes
    if shapes is not None:
        # The scripts fix these numbers, and people change them there: neither follows from another.
        in_channels, out_channels = channels_of_file(shapes)
        classes = shapes.get("label_emb.weight", (classes,))[0]
    config = model_config(
        flags, code_base, kind, in_channels=in_channels, out_channels=out_channels, num_classes=classes
    )
    with torch.device("meta"):
        return AdaGNClassifierModel(**config) if kind == "classifier" else AdaGNUNet2DModel(**config)


def _settle_kind(given: Flags, shapes: Shapes, code_base: CodeBase, image_channels: int | None) -> Kind:
    """The likeliest kind of network that flags and file agree on."""
    by_flags = possible_kinds(given, code_base)
    for kind in kinds_of_file(shapes, given.get("learn_sigma"), image_channels):
        if kind in by_flags:
            return kind
    channels_in, channels_out = channels_of_file(shapes)
    by_file = kinds_of_file(shapes)
    if not by_file:
        raise ValueError(
            f"The network takes {channels_in} channels and returns {channels_out}. A U-Net of {code_base} returns as "
            "many channels as its images have, or twice as many with a learned variance, and takes at least as many "
            "as they have."
        )
    for kind in by_file:
        if kind in by_flags:
            given_numbers = [f"`--learn_sigma {given['learn_sigma']}` was given"] if "learn_sigma" in given else []
            given_numbers += [f"`image_channels` is {image_channels}"] if image_channels is not None else []
            raise ValueError(
                f"The network takes {channels_in} channels and returns {channels_out}, which means "
                f"{describe_readings(channels_in, channels_out, kind)}. But {' and '.join(given_numbers)}. Correct "
                "that, or leave it out."
            )
    kinds = " or ".join(KIND_NAMES[kind] for kind in by_flags)
    returned = "classes" if by_file[0] == "classifier" else "output channels"
    raise ValueError(
        f"`model_flags` describe {kinds} of {code_base}, but the file holds {KIND_NAMES[by_file[0]]} "
        f"({channels_in} input channels, {channels_out} {returned}). Its flags are {KIND_FLAGS[by_file[0]]}."
    )


def describe_readings(channels_in: int, channels_out: int, kind: Kind) -> str:
    """All meanings that numbers of channels can have."""
    lines = []
    for learned, channels in image_channel_readings(channels_in, channels_out, kind).items():
        line = f"`--learn_sigma {learned}`: images of {channels} channel{'' if channels == 1 else 's'}"
        others = channels_in - channels
        lines.append(line + (f", conditioned on {others} more" if others else ""))
    return ", or ".join(lines)


def _settle_variance(
    given: Flags, kind: Kind, shapes: Shapes, code_base: CodeBase, image_channels: int | None
) -> bool | None:
    """
    `learn_sigma` of a U-Net or an upsampler; `None` if it is the default that may be assumed: for a network that takes
    what those of the code bases take, the image (with the small one, for flags of an upsampler) and nothing else.
    """
    channels_in, channels_out = channels_of_file(shapes)
    readings = image_channel_readings(
        channels_in, channels_out, kind, learn_sigma=given.get("learn_sigma"), image_channels=image_channels
    )
    if len(readings) == 1:
        return next(iter(readings))
    is_usual = channels_in == (channels_out if kind == "unet" else 2 * channels_out)
    if is_usual and (kind == "unet" or possible_kinds(given, code_base) == ["upsampler"]):
        return None
    raise ValueError(
        f"The network takes {channels_in} channels and returns {channels_out}, which can mean "
        f"{describe_readings(channels_in, channels_out, kind)}. Pass `image_channels` (on the command line "
        "`--image_channels`), or `--learn_sigma` as one of the `model_flags`."
    )


def _observe(given: Flags, kind: Kind, shapes: Shapes, code_base: CodeBase) -> Flags:
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


def _complete(given: Flags, kind: Kind, shapes: Shapes, code_base: CodeBase) -> tuple[Flags, Flags]:
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


def recognise(stem: str, shapes: Shapes, code_base: CodeBase | None) -> str | None:
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


def _contradictions(flags: Flags, kind: Kind, shapes: Shapes, code_base: CodeBase) -> str:
    """What the file looks like instead of what was given."""
    try:
        kinds = kinds_of_file(shapes)
        if kinds and kind not in kinds:
            return f"The file looks like {KIND_NAMES[kinds[0]]}."
        observed = _observe(flags, kind, shapes, code_base)
    except ValueError as error:
        return str(error)
    other = {name: value for name, value in observed.items() if flags[name] != value}
    text = f"The file looks like: {format_flags(observed)}."
    return f"{text} Other than given or by default: {', '.join(f'--{name}' for name in other)}." if other else text
