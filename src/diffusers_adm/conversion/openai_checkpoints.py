"""Converts checkpoints of guided-diffusion and improved-diffusion into folders that `from_pretrained` loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from ..models import AdaGNClassifierModel, AdaGNUNet2DModel
from ..models.config_checks import check_choice
from ..pipelines import ADMImageToImagePipeline, ADMInpaintPipeline, ADMPipeline, ADMSuperResolutionPipeline
from ..schedulers import LearnedVarianceDDPMScheduler
from ..schedulers.noise_schedules import noise_schedule_of
from .checkpoint_files import read_layout
from .common import (
    IMAGE_CHANNELS,
    Component,
    Conversion,
    Flags,
    Shapes,
    add_defaults,
    check_output_dir,
    check_preset,
    differences,
    format_flags,
    make_pipeline,
    recognise_presets,
    write_folder,
)
from .openai_flags import (
    CHANNEL_MULT,
    PRESETS,
    CodeBase,
    Kind,
    Preset,
    default_flags,
    model_config,
    parse_flags,
    possible_kinds,
    scheduler_config,
    size_flag,
)
from .openai_layout import (
    channels_of_file,
    describe_readings,
    image_channel_readings,
    kinds_of_file,
    observed_flags,
    tensor_rules,
)


KIND_NAMES = {"unet": "a U-Net", "upsampler": "an upsampler", "classifier": "a classifier"}
KIND_FLAGS = {
    "unet": "`image_size`, `num_channels` and so on",
    "upsampler": "`large_size` and `small_size`, `num_channels` and so on, and not `image_size`",
    "classifier": "those that begin with `classifier_`, and `image_size`",
}
# A constant of the scripts.
NUM_CLASSES = 1000
# Input channels of inpainting networks for RGB images: x_t, the masked image and the keep mask, and for some the
# upsampled low-resolution image.
INPAINTING_CHANNELS = (2 * IMAGE_CHANNELS + 1, 3 * IMAGE_CHANNELS + 1)


@dataclass
class ConvertedCheckpoint(Conversion):
    """
    The result of `convert_openai`. Further arguments: see [`Conversion`].

    Args:
        kind (`str`): `"unet"`, `"upsampler"` or `"classifier"`.
        code_base (`str`): `"guided-diffusion"` or `"improved-diffusion"`.
        ignored (`list[str]`): Given flags that describe a run or another network.
        image_channels (`int`): Channels of the images that the network denoises or classifies.
        condition_channels (`int`): Further input channels, including the small image of an upsampler.
        pipeline (`str`, *optional*): Class of the pipeline whose index was written; `None` if none takes such a
            network.
        condition_first (`bool`): Whether the checkpoint has the condition channels in front of those of the image.
    """

    kind: Kind
    code_base: CodeBase
    ignored: list[str]
    image_channels: int
    condition_channels: int
    pipeline: str | None
    condition_first: bool = False


class ReadCheckpoint(NamedTuple):
    """
    What a checkpoint was recognised as.

    Attributes:
        result: Its description.
        key: Where the network is in the file, as `LoadedCheckpoint.key`.
        components: The network on the meta device, by the name of its folder.
        scheduler: Its diffusion process.
        pipeline: The pipeline of network and scheduler; `None` if none takes such a network.
    """

    result: ConvertedCheckpoint
    key: str
    components: dict[str, Component]
    scheduler: LearnedVarianceDDPMScheduler
    pipeline: ADMPipeline | None


def convert_openai(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    preset: str | None = None,
    model_flags: str | Mapping[str, Any] | None = None,
    code_base: CodeBase | None = None,
    image_channels: int | None = None,
    key: str | None = None,
    condition_first: bool = False,
) -> ConvertedCheckpoint:
    r"""
    Converts a checkpoint of guided-diffusion or improved-diffusion.

    Args:
        checkpoint (`str` or `Path`): The `.pt` file: a state dict, as their training scripts save it, or the checkpoint
            of a training loop that holds one.
        output_dir (`str` or `Path`): Folder for the result; must not exist, or be empty. A U-Net gives `unet/`,
            `scheduler/` and the index of an `ADMPipeline`, of an `ADMInpaintPipeline` if it takes RGB images and 4 or 7
            further channels, and of an `ADMImageToImagePipeline` for other conditions; an upsampler that of an
            `ADMSuperResolutionPipeline`; a classifier `classifier/` and `scheduler/`.
        preset (`str`, *optional*): Name of a published checkpoint, which determines all flags (`PRESETS`).
        model_flags (`str` or mapping, *optional*): The flags of the scripts that the network was trained with
            (`"--image_size 64 --num_channels 128 ..."`). Flags left out are read from the file as far as possible
            (channels, blocks, attention levels); the rest has the defaults of `code_base`.
        code_base (`str`, *optional*): `"guided-diffusion"` (the default without a preset) or `"improved-diffusion"`.
        image_channels (`int`, *optional*): Channels of the images, if the file and `--learn_sigma` leave them open: a
            network with 5 channels in and 2 out can denoise images of 2 channels with a fixed variance, conditioned on
            3 more, or images of 1 channel with a learned variance, conditioned on 4 more.
        key (`str`, *optional*): Which network, if the file holds several: dictionary keys and parts of the tensor
            names, joined by dots (`"ema"`, `"state_dict.model"`). A single wrapped network is found without it, and a
            warning says where.
        condition_first (`bool`, defaults to `False`): The checkpoint's code concatenates the noisy image after its
            conditions, as forks for segmentation do, and not before them as guided-diffusion's upsampler does. A file
            does not show it.

    Returns:
        [`ConvertedCheckpoint`]: `.assumed` holds the flags that are defaults. With neither `preset` nor `model_flags`
        these are at least the number of attention heads, unless the layout is that of a published checkpoint.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not such a checkpoint or damaged, its tensors are not exactly those that preset or
            flags describe, its channels have two meanings, or `output_dir` is not empty. No folder is left then.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir).resolve()
    read = read_openai(
        checkpoint,
        output_dir,
        preset=preset,
        model_flags=model_flags,
        code_base=code_base,
        image_channels=image_channels,
        key=key,
        condition_first=condition_first,
    )
    write_folder(read.result, checkpoint, read.key, read.components, read.scheduler, read.pipeline)
    return read.result


def read_openai(
    checkpoint: Path,
    output_dir: Path | None = None,
    *,
    preset: str | None,
    model_flags: str | Mapping[str, Any] | None,
    code_base: CodeBase | None,
    image_channels: int | None,
    key: str | None,
    condition_first: bool,
) -> ReadCheckpoint:
    """
    Recognises the network of a checkpoint, without its weights. Arguments and errors are those of [`convert_openai`];
    without `output_dir`, nothing will be written.
    """
    check_preset(preset, model_flags, PRESETS)
    if preset is not None:
        preset = preset.removesuffix(".pt")
        if code_base not in (None, PRESETS[preset].code_base):
            raise ValueError(f"`code_base` is {code_base!r}, but {preset} comes from {PRESETS[preset].code_base}.")
        if image_channels not in (None, IMAGE_CHANNELS):
            raise ValueError(
                f"`image_channels` is {image_channels}, but {preset} has images of {IMAGE_CHANNELS} channels. Omit it."
            )
    check_choice("code_base", code_base, (None, *get_args(CodeBase)))
    if output_dir is not None:
        check_output_dir(output_dir)

    # 1. flags, from the preset, the caller, the file and the defaults
    layout = read_layout(checkpoint, key)
    shapes = layout.shapes
    recognised = None
    if preset is None and model_flags is None and image_channels in (None, IMAGE_CHANNELS):
        recognised = recognise(checkpoint.stem, shapes, code_base)
    preset = preset or recognised
    ignored: list[str] = []
    if preset is not None:
        code_base = PRESETS[preset].code_base
        kind, flags = PRESETS[preset].settle()
        small_size, assumed = flags.get("small_size"), {}
    else:
        code_base = code_base or "guided-diffusion"
        given, _, ignored = parse_flags(model_flags or {}, code_base)
        kind = _settle_kind(given, shapes, code_base, image_channels)
        defaults = default_flags(code_base, kind)
        ignored += [name for name in given if name not in defaults]  # of the other network of `classifier_sample.py`
        given = {name: value for name, value in given.items() if name in defaults}
        # A file does not contain the size of its small images, and a default must not restrict anybody.
        small_size = given.get("small_size")
        determined = _observe_unless_given(given, kind, shapes, code_base)
        if kind == "classifier":
            check_channels_of_classifier(channels_of_file(shapes)[0], image_channels)
        else:
            determined |= _settle_variance(given, kind, shapes, code_base, image_channels)
        flags, assumed = add_defaults(defaults, determined)

    # 2. the network, whose tensors must be exactly those of the file
    first_channels = _first_channels(kind, flags, shapes) if condition_first else 0
    component = _component(build_network(flags, code_base, kind, None if preset else shapes), flags, first_channels)
    components = {"classifier" if kind == "classifier" else "unet": component}
    problems = differences(components, shapes)
    if problems:
        lines = "\n  ".join(problems)
        described = "described"
        if preset is not None:
            described = f"of {preset}, which has {PRESETS[preset].num_parameters:,} parameters"
        raise ValueError(
            f"The {layout.num_parameters:,} parameters of {checkpoint} are not those {described}, {KIND_NAMES[kind]} "
            f"of {code_base}:\n  {lines}\n{_contradictions(flags, kind, shapes, code_base)}"
        )

    # 3. the process, and the pipeline
    scheduler = LearnedVarianceDDPMScheduler(**scheduler_config(flags))
    channels_in, channels_out = channels_of_file(shapes)
    cls = None
    if kind == "classifier":
        image_channels = channels_in
        component.model.register_to_config(noise_schedule=noise_schedule_of(scheduler))
    else:
        image_channels = channels_out // 2 if flags["learn_sigma"] else channels_out
        cls = _pipeline_class(kind, channels_in, image_channels)
    extra_channels = channels_in - image_channels
    pipeline = None if cls is None else make_pipeline(cls, component.model, scheduler, small_size, extra_channels)
    result = ConvertedCheckpoint(
        output_dir=output_dir,
        code_base=code_base,
        kind=kind,
        preset=preset,
        recognised=recognised is not None,
        flags=flags,
        assumed=assumed,
        ignored=ignored,
        num_parameters=layout.num_parameters,
        dtypes=layout.dtypes,
        image_channels=image_channels,
        condition_channels=extra_channels,
        pipeline=None if cls is None else cls.__name__,
        condition_first=condition_first,
    )
    return ReadCheckpoint(result, layout.key, components, scheduler, pipeline)


def check_channels_of_classifier(in_channels: int, image_channels: int | None) -> None:
    if image_channels not in (None, in_channels):
        raise ValueError(f"`image_channels` is {image_channels}, but the classifier takes {in_channels}. Omit it.")


def _component(model: AdaGNUNet2DModel | AdaGNClassifierModel, flags: Flags, first_channels: int = 0) -> Component:
    return Component(model, tensor_rules(model, flags.get("use_new_attention_order", False), first_channels))


def _first_channels(kind: Kind, flags: Flags, shapes: Shapes) -> int:
    """Number of condition channels in front of the noisy image; a `ValueError` if there are no conditions."""
    channels_in, channels_out = channels_of_file(shapes)
    if kind == "unet":
        first_channels = channels_in - (channels_out // 2 if flags["learn_sigma"] else channels_out)
        if first_channels > 0:
            return first_channels
    raise ValueError(
        f"`condition_first` was given, but {KIND_NAMES[kind]} of {channels_in} input channels has no conditions in "
        "front of the noisy image. Omit it."
    )


def recognise(stem: str, shapes: Shapes, code_base: CodeBase | None) -> str | None:
    """The published checkpoint with exactly this layout, if all checkpoints that share it mean the same network."""

    def components_of(preset: Preset) -> dict[str, Component]:
        kind, flags = preset.settle()
        return {kind: _component(build_network(flags, preset.code_base, kind, None), flags)}

    candidates = {name: preset for name, preset in PRESETS.items() if code_base in (None, preset.code_base)}
    names = recognise_presets(shapes, candidates, components_of)
    if stem in names:
        return stem
    meanings = [PRESETS[name].settle()[1] | {"dropout": None, "use_kl": None} for name in names]
    return names[0] if names and all(meaning == meanings[0] for meaning in meanings) else None


def build_network(flags: Flags, code_base: CodeBase, kind: Kind, shapes: Shapes | None) -> Any:
    """
    Builds the network of these flags on the meta device, with the numbers of channels and classes of a file with these
    shapes; with `None`, with those of the published files.
    """
    if shapes is not None:
        # These numbers are constants that people change in the scripts: none of them follows from another.
        in_channels, out_channels = channels_of_file(shapes)
        classes = shapes.get("label_emb.weight", (NUM_CLASSES,))[0]
    else:
        in_channels, classes = IMAGE_CHANNELS * (2 if kind == "upsampler" else 1), NUM_CLASSES
        out_channels = classes if kind == "classifier" else IMAGE_CHANNELS * (2 if flags["learn_sigma"] else 1)
    config = model_config(
        flags, code_base, kind, in_channels=in_channels, out_channels=out_channels, num_classes=classes
    )
    with torch.device("meta"):
        return AdaGNClassifierModel(**config) if kind == "classifier" else AdaGNUNet2DModel(**config)


def _pipeline_class(kind: Kind, channels_in: int, image_channels: int) -> type[ADMPipeline] | None:
    """The pipeline that samples from such a network, if there is one."""
    if kind == "upsampler":
        return ADMSuperResolutionPipeline if channels_in == 2 * image_channels else None
    if channels_in == image_channels:
        return ADMPipeline
    inpaints = image_channels == IMAGE_CHANNELS and channels_in in INPAINTING_CHANNELS
    return ADMInpaintPipeline if inpaints else ADMImageToImagePipeline


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
            contradicting = [f"`--learn_sigma {given['learn_sigma']}` was given"] if "learn_sigma" in given else []
            contradicting += [f"`image_channels` is {image_channels}"] if image_channels is not None else []
            raise ValueError(
                f"The network takes {channels_in} channels and returns {channels_out}, which means "
                f"{describe_readings(channels_in, channels_out, kind)}. But {' and '.join(contradicting)}. Correct "
                "or omit it."
            )
    kinds = " or ".join(KIND_NAMES[kind] for kind in by_flags)
    returned = "classes" if by_file[0] == "classifier" else "output channels"
    raise ValueError(
        f"`model_flags` describe {kinds} of {code_base}, but the file holds {KIND_NAMES[by_file[0]]} "
        f"({channels_in} input channels, {channels_out} {returned}). Its flags are {KIND_FLAGS[by_file[0]]}."
    )


def _settle_variance(
    given: Flags, kind: Kind, shapes: Shapes, code_base: CodeBase, image_channels: int | None
) -> Flags:
    """
    `learn_sigma` of a U-Net or an upsampler; empty if the default may be assumed: for a network with the inputs of the
    code bases, the image (and the small one, given flags of an upsampler) and nothing else.
    """
    channels_in, channels_out = channels_of_file(shapes)
    readings = image_channel_readings(
        channels_in, channels_out, kind, learn_sigma=given.get("learn_sigma"), image_channels=image_channels
    )
    if len(readings) == 1:
        return {"learn_sigma": next(iter(readings))}
    is_usual = channels_in == (channels_out if kind == "unet" else 2 * channels_out)
    if is_usual and (kind == "unet" or possible_kinds(given, code_base) == ["upsampler"]):
        return {}
    raise ValueError(
        f"The network takes {channels_in} channels and returns {channels_out}, which can mean "
        f"{describe_readings(channels_in, channels_out, kind)}. Pass `image_channels` (on the command line "
        "`--image_channels`), or `--learn_sigma` as one of the `model_flags`."
    )


def _observe_unless_given(given: Flags, kind: Kind, shapes: Shapes, code_base: CodeBase) -> Flags:
    """The given flags, which override those of the file, and the latter; only the former if the file is unreadable."""
    try:
        observed = _observe(given, kind, shapes, code_base)
    except ValueError:
        if not given:
            raise
        return given
    if given.get("image_size") in CHANNEL_MULT[code_base, kind]:
        observed.pop("channel_mult", None)  # the size determines it, even if the file differs
    return observed | given


def _observe(given: Flags, kind: Kind, shapes: Shapes, code_base: CodeBase) -> Flags:
    """Flags that the file reveals for the given image size, without a `channel_mult` that follows from that size."""
    size = given.get(size_flag(kind))
    observed = observed_flags(shapes, code_base, kind, size)
    usual = CHANNEL_MULT[code_base, kind].get(size or observed.get(size_flag(kind)), ())
    if observed.get("channel_mult") == ",".join(f"{multiple:g}" for multiple in usual):
        del observed["channel_mult"]
    return observed


def _contradictions(flags: Flags, kind: Kind, shapes: Shapes, code_base: CodeBase) -> str:
    """Describes what the file looks like, and the flags that differ from it."""
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
