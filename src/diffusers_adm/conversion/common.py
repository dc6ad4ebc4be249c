"""
What conversions of all code bases share: rules for tensors, flags, the folder that is written, and the command line.

(`checkpoint_files.py` reads the files of checkpoints.) To add a family, see `__init__.py`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from ..commands.arguments import BOOLEAN_WORDS
from ..commands.errors import add_debug_argument, did_you_mean
from ..conditioning.image_format import ImageFormat
from ..data.repositories import check_can_be_written
from ..pipelines import ADMImageToImagePipeline, ADMPipeline, ADMSuperResolutionPipeline
from ..schedulers import LearnedVarianceDDPMScheduler
from ..schedulers.noise_schedules import noise_schedule_of
from .checkpoint_files import SAFETENSORS_DTYPES, check_sums, is_mappable, load_checkpoint


Shapes = Mapping[str, Sequence[int]]
Flags = dict[str, Any]
T = TypeVar("T")

# Both code bases and GLIDE are written for RGB images; people change that in the code.
IMAGE_CHANNELS = 3
# Bytes of a checkpoint that may stay in memory while its tensors are written one by one.
MAPPED_BYTES = 2**27
# Next to the components: what a folder was converted from, so that it can be written back in the same order.
RECORD_NAME = "openai_checkpoint.json"
# Flags that do not change what the network computes, or (`channel_mult`, `num_heads_upsample`) whose default follows
# from other flags: not worth a warning if assumed.
SILENT_FLAGS = frozenset(
    ("dropout", "rescale_learned_sigmas", "timestep_respacing", "use_checkpoint", "use_fp16", "use_kl", "clip_denoised")
    + ("classifier_use_fp16", "small_size", "num_heads_upsample", "channel_mult", "cache_text_emb")
)


# 1. Tensors. Every rule is a permutation of rows, a split or a reshape, so a round trip is bit-identical.


class TensorRule(NamedTuple):
    """
    How one tensor of a checkpoint becomes one, two or three of this package's, and back.

    Attributes:
        source: Its name in the checkpoint.
        targets: Names in this package.
        split: From the checkpoint's tensor to the targets.
        join: From the targets to the checkpoint's tensor.
    """

    source: str
    targets: tuple[str, ...]
    split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    join: Callable[..., torch.Tensor]


def kept(source: str, target: str) -> TensorRule:
    """A tensor that is the same on both sides."""
    return TensorRule(source, (target,), lambda tensor: (tensor,), lambda tensor: tensor)


def module_rules(source: str, target: str, dims: int = 0) -> Iterator[TensorRule]:
    """
    Weight and bias of a module. The checkpoint's weight has `dims` trailing dimensions of size 1 (those of a 1x1
    convolution) that the target does not have.
    """
    return fused_rules(source, [target], heads=1, heads_first=False, weight_dims=dims)


def fused_rules(
    source: str, targets: Sequence[str], heads: int, heads_first: bool, weight_dims: int = 1
) -> Iterator[TensorRule]:
    """
    Weight and bias of a module that computes all of `targets` (query, key and value, or two of them) at once.

    Args:
        source (`str`), targets (sequence of `str`): Names of the modules.
        heads (`int`): Number of attention heads.
        heads_first (`bool`): Rows of the checkpoint are ordered (head, target, channel in head), and not (target, head,
            channel in head).
        weight_dims (`int`, defaults to 1): As `dims` of [`module_rules`].
    """

    def split(dims: int, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensor = tensor.flatten(-1 - dims)
        if heads_first:
            tensor = tensor.unflatten(0, (heads, len(targets), -1)).transpose(0, 1).flatten(0, 2)
        return tensor.chunk(len(targets))

    def join(dims: int, *tensors: torch.Tensor) -> torch.Tensor:
        tensor = torch.cat(tensors)
        if heads_first:
            tensor = tensor.unflatten(0, (len(targets), heads, -1)).transpose(0, 1).flatten(0, 2)
        return tensor.reshape(*tensor.shape, *[1] * dims)

    for kind, dims in (("weight", weight_dims), ("bias", 0)):
        names = tuple(f"{target}.{kind}" for target in targets)
        yield TensorRule(f"{source}.{kind}", names, partial(split, dims), partial(join, dims))


def expected_shapes(model: ModelMixin, rules: Sequence[TensorRule]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a checkpoint of `model` holds."""
    own = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    shapes = {rule.source: tuple(rule.join(*(own.pop(target) for target in rule.targets)).shape) for rule in rules}
    if own:  # a mistake in the rules, not in the checkpoint
        raise RuntimeError(f"No rule for {sorted(own)}.")
    return shapes


class Component(NamedTuple):
    """A network to be written: its model, which may be on the meta device, and the rules for all of its tensors."""

    model: ModelMixin
    rules: list[TensorRule]


def differences(components: Mapping[str, Component], found: Shapes, limit: int = 6) -> list[str]:
    """Lists tensors that the networks lack, do not use, or have in another shape; at most `limit` of each kind."""
    expected = {name: shape for part in components.values() for name, shape in expected_shapes(*part).items()}
    missing = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    unused = [f"not used: {name} {tuple(shape)}" for name, shape in found.items() if name not in expected]
    other = [
        f"{name}: has shape {tuple(found[name])}, expected {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    lines = []
    for group in (missing, unused, other):
        lines += group[:limit]
        if len(group) > limit:
            lines.append(f"... and {len(group) - limit} more of this kind")
    return lines


def recognise_presets(
    shapes: Shapes, presets: Mapping[str, Any], components_of: Callable[[Any], Mapping[str, Component]]
) -> list[str]:
    """Names of the published checkpoints with exactly these tensors; `components_of` builds their networks."""
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    candidates = {name: preset for name, preset in presets.items() if preset.num_parameters == num_parameters}
    return [name for name, preset in candidates.items() if not differences(components_of(preset), shapes)]


# 2. Flags


def named_flags(model_flags: str | Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of their flags, without dashes; from a command line or a mapping."""
    if isinstance(model_flags, Mapping):
        return {name.removeprefix("--"): value for name, value in model_flags.items()}
    explanation = f"`model_flags` are {model_flags!r}: every flag needs one value (`--image_size 64`), but"
    try:
        words = shlex.split(model_flags)
    except ValueError as error:
        raise ValueError(f"{explanation} this is not a command line ({error}).") from None
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    # A pasted command line begins with `python scripts/image_sample.py`.
    first = next((i for i, word in enumerate(words) if word.startswith("--")), 0)
    flags = {}
    for i in range(first, len(words), 2):
        name, value = words[i], words[i + 1] if i + 1 < len(words) else "--"
        if not name.startswith("--") or value.startswith("--"):
            raise ValueError(f"{explanation} {name!r} does not fit that.")
        flags[name.removeprefix("--")] = value
    return flags


def typed_flags(given: Mapping[str, Any], known: Flags, code_base: str) -> Flags:
    """Converts values to the types of the defaults in `known`; a `ValueError` for other flags or types."""
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"`model_flags` hold --{unknown[0]}, which {code_base} does not have."
            f"{did_you_mean(unknown[0], known, most=1)} It has: {', '.join(sorted(known))}."
        )
    return {name: _convert(name, value, known[name]) for name, value in given.items()}


def _convert(name: str, value: Any, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return BOOLEAN_WORDS[str(value).lower()]
        return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else type(default)(str(value))
    except (KeyError, ValueError):
        kind = "True or False" if isinstance(default, bool) else f"a value like {default!r}"
        raise ValueError(f"`--{name}` is {value!r}; it takes {kind}.") from None


def add_defaults(defaults: Flags, determined: Flags) -> tuple[Flags, Flags]:
    """All flags, and those of them that are defaults and that neither the caller nor the file determined."""
    heads = {"num_heads", "num_head_channels"}  # one of them suffices
    silent = SILENT_FLAGS | (heads if heads & determined.keys() else set()) | determined.keys()
    return defaults | determined, {name: value for name, value in defaults.items() if name not in silent}


def format_flags(flags: Mapping[str, Any]) -> str:
    """Flags as on a command line; those whose value is an empty string are left out."""
    return " ".join(f"--{name} {value}" for name, value in flags.items() if value != "")


def find_preset(name: str, presets: Mapping[str, T]) -> T:
    """Looks up a published checkpoint by name, with or without `.pt`."""
    name = name.removesuffix(".pt")
    if name not in presets:
        names = ", ".join(presets)
        raise ValueError(f"`preset` is {name!r}; it must be one of {names}.{did_you_mean(name, presets)}")
    return presets[name]


def check_preset(preset: str | None, model_flags: str | Mapping[str, Any] | None, presets: Mapping[str, Any]) -> None:
    """Checks that a preset exists and is not given together with flags."""
    if preset is not None:
        if model_flags is not None:
            raise ValueError("`preset` and `model_flags` were both given. A preset determines all flags: omit one.")
        find_preset(preset, presets)


# 3. The folder


@dataclass
class Conversion:
    """
    Attributes that the results of all conversions share.

    Args:
        output_dir (`Path`): The folder; `None` for a network that is only loaded.
        kind (`str`): Kind of network: one of `GLIDEKind`, or of `Kind` for OpenAI's other code bases.
        code_base (`str`): The code base that defines the flags.
        preset (`str`, *optional*): Name of the published checkpoint.
        recognised (`bool`): Whether `preset` was found by the layout of the file, and not given.
        flags (`dict`): All flags of network and process, by the code base's names.
        assumed (`dict`): Those of the flags that neither the caller nor the file determined.
        num_parameters (`int`), dtypes (`list[str]`): Of all networks together.
    """

    output_dir: Path
    kind: str
    code_base: str
    preset: str | None
    recognised: bool
    flags: Flags
    assumed: Flags
    num_parameters: int
    dtypes: list[str]


def make_pipeline(
    cls: type[ADMPipeline],
    unet: ModelMixin,
    scheduler: LearnedVarianceDDPMScheduler,
    low_res_size: int | None = None,
    source_channels: int | None = None,
) -> ADMPipeline:
    """
    A pipeline of a U-Net only; `low_res_size` is saved with an upsampler, if known: files do not contain it. With
    `source_channels` the format of source images is saved: 8-bit grey or RGB, or else numbers that the network takes as
    they are.
    """
    options: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None}
    if issubclass(cls, ADMSuperResolutionPipeline):
        options |= {"low_res_size": low_res_size, "noise_schedule": noise_schedule_of(scheduler)}
    if issubclass(cls, ADMImageToImagePipeline):
        usual = ImageFormat.of_channels(source_channels)
        as_they_are = ImageFormat("array", source_channels, value_range=(-1, 1), num_levels=None)
        options["source_format"] = (usual if usual.is_viewable else as_they_are).to_config()
    return cls(unet, scheduler, **options)


def check_output_dir(output_dir: Path) -> None:
    """Raises a `ValueError` if the folder exists with content, or cannot be created."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` {output_dir} exists and is not empty. Name another folder, or remove it.")
    check_can_be_written("output_dir", output_dir.parent)  # where it is written first, under another name


def write_folder(
    result: Conversion,
    checkpoint: Path,
    key: str,
    components: Mapping[str, Component],
    scheduler: LearnedVarianceDDPMScheduler,
    pipeline: ADMPipeline | None,
) -> None:
    """
    Writes the folder `result.output_dir`, completely or not at all: networks by their subfolder, scheduler, tokenizer
    and index of the pipeline, and what the folder was converted from. A `ValueError` if the checkpoint is damaged.
    """
    check_sums(checkpoint)
    record: dict[str, Any] = {"code_base": result.code_base, "kind": result.kind, "preset": result.preset}
    record |= {"file": checkpoint.name, "flags": result.flags} | ({"key": key} if key else {})
    record |= {"condition_first": True} if getattr(result, "condition_first", False) else {}
    output_dir = result.output_dir
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output_dir.parent / f".{output_dir.name}.{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        for name, (model, rules) in components.items():
            model.save_config(unfinished / name)
            write_weights(unfinished / name / SAFETENSORS_WEIGHTS_NAME, checkpoint, key, rules)
        scheduler.save_pretrained(unfinished / "scheduler")
        if pipeline is not None:
            pipeline.save_config(unfinished)
            if pipeline.tokenizer is not None:
                pipeline.tokenizer.save_pretrained(unfinished / "tokenizer")
        (unfinished / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(output_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_weights(file: Path, checkpoint: Path, key: str, rules: list[TensorRule]) -> None:
    """
    Writes the tensors that `rules` make of a checkpoint's network `key`, in the format of safetensors
    (https://github.com/huggingface/safetensors#format). The library's writer needs all tensors at once, and every page
    that was read stays in memory while the checkpoint is mapped: here it is mapped again after each `MAPPED_BYTES`.
    """
    state_dict = load_checkpoint(checkpoint, key).state_dict
    # Widest dtype first, so that each tensor starts at a multiple of its item size.
    rules = sorted(rules, key=lambda rule: -state_dict[rule.source].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for rule in rules:
        for name, tensor in zip(rule.targets, rule.split(state_dict[rule.source].to("meta")), strict=True):
            start, end = end, end + tensor.nbytes
            dtype = SAFETENSORS_DTYPES[tensor.dtype]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        mapped = 0
        for rule in rules:
            if mapped > MAPPED_BYTES and is_mappable(checkpoint):
                del state_dict
                state_dict, mapped = load_checkpoint(checkpoint, key).state_dict, 0
            source = state_dict[rule.source]
            mapped += source.nbytes
            for tensor in rule.split(source):
                stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def load_weights(component: Component, checkpoint: Path, key: str, dtype: torch.dtype) -> None:
    """
    Loads the weights of a checkpoint's network `key` into a model on the meta device. A `ValueError` if the checkpoint
    is damaged.
    """
    check_sums(checkpoint)
    state_dict = load_checkpoint(checkpoint, key).state_dict
    weights = {}
    for rule in component.rules:
        for name, tensor in zip(rule.targets, rule.split(state_dict.pop(rule.source)), strict=True):
            # A copy: the tensors of the file are mapped, and may be parts of a larger one.
            weights[name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    component.model.load_state_dict(weights, assign=True)
    component.model.eval()


# 4. The command line


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of every conversion from a `.pt` file."""
    parser.add_argument("--checkpoint", metavar="FILE.pt", help="The checkpoint to convert.")
    parser.add_argument("--output_dir", metavar="FOLDER", help="Folder for the result; must be new or empty.")
    parser.add_argument("--preset", metavar="NAME", help="Name of the published checkpoint (see --list_presets).")
    parser.add_argument(
        "--model_flags",
        metavar='"--image_size 64 ..."',
        help="Instead of a preset: the flags the model was trained with, in one pair of quotes, with the names of the "
        "code base. Flags left out are read from the file as far as possible, and else have the code base's defaults.",
    )
    parser.add_argument(
        "--key", metavar="NAME", help="Network to convert if the file holds several, e.g. ema or state_dict.model."
    )
    parser.add_argument("--list_presets", action="store_true", help="Print the published checkpoints and their flags.")
    add_debug_argument(parser)


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line. The value of `--model_flags` begins with dashes, which argparse does not accept."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--model_flags" in argv[:-1]:
        position = argv.index("--model_flags")
        argv[position : position + 2] = [f"--model_flags={argv[position + 1]}"]
    return parser.parse_args(argv)


def describe_conversion(result: Conversion, what: str) -> list[str]:
    """Lines that say what was converted (`what`: in words) and which flags were assumed."""
    lines = [
        f"Wrote {result.output_dir}: {what}, {result.num_parameters:,} parameters in {', '.join(result.dtypes)}.",
        f"Flags: {format_flags(result.flags)}",
    ]
    if result.recognised:
        lines.append(
            f"Recognised as the published {result.preset}: its tensors have these names and shapes. If it is another "
            "one, pass its --model_flags; attention heads and diffusion process cannot be read from a file."
        )
    if result.assumed:
        lines.append(
            "WARNING: these flags are defaults that neither the file nor you confirmed. A wrong one gives wrong images "
            f"without any error. Check them and pass those that differ with --model_flags: "
            f"{format_flags(result.assumed)}"
        )
    return lines
