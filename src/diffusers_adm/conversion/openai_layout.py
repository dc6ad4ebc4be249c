"""
Names and shapes of the tensors in OpenAI's checkpoints: the rule for each tensor, and the flags that a layout reveals.

The modules of the U-Nets of guided-diffusion, improved-diffusion and GLIDE are numbered consecutively
(`input_blocks.7.1.qkv.weight`); one walk over our levels and layers names them all.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from diffusers import ModelMixin

from ..models import AdaGNClassifierModel
from .common import Flags, Shapes, TensorRule, fused_rules, kept, module_rules
from .openai_flags import CHANNEL_MULT, CodeBase, Kind, default_flags, size_flag


# Tensors from which the flags are read, and their numbers of dimensions.
ALWAYS_THERE = {
    "time_embed.0.weight": 2,
    "input_blocks.0.0.weight": 4,
    "input_blocks.1.0.in_layers.2.weight": 4,
    "input_blocks.1.0.emb_layers.1.bias": 1,
    "input_blocks.1.0.out_layers.3.bias": 1,
    "middle_block.1.qkv.weight": 3,
}


# 1. The rule for each tensor


def _res_block(source: str, target: str, has_shortcut: bool = False) -> Iterator[TensorRule]:
    yield from module_rules(f"{source}.in_layers.0", f"{target}.norm1")
    yield from module_rules(f"{source}.in_layers.2", f"{target}.conv1")
    yield from module_rules(f"{source}.emb_layers.1", f"{target}.time_emb_proj")
    yield from module_rules(f"{source}.out_layers.0", f"{target}.norm2")
    yield from module_rules(f"{source}.out_layers.3", f"{target}.conv2")
    if has_shortcut:
        yield from module_rules(f"{source}.skip_connection", f"{target}.conv_shortcut")


def _resampler(source: str, op: str, target: str, resampler: Any) -> Iterator[TensorRule]:
    """A residual block, or a convolution that the checkpoint calls `op`."""
    if hasattr(resampler, "norm1"):
        yield from _res_block(source, target)
    else:
        yield from module_rules(f"{source}.{op}", f"{target}.conv")


def _attention(source: str, target: str, attention: Any, heads_first: bool) -> Iterator[TensorRule]:
    yield from module_rules(f"{source}.norm", f"{target}.group_norm")
    yield from fused_rules(f"{source}.qkv", [f"{target}.to_{part}" for part in "qkv"], attention.heads, heads_first)
    if getattr(attention, "add_k_proj", None) is not None:  # of the text, in GLIDE
        added = [f"{target}.add_{part}_proj" for part in "kv"]
        yield from fused_rules(f"{source}.encoder_kv", added, attention.heads, heads_first)
    yield from module_rules(f"{source}.proj_out", f"{target}.to_out.0", dims=1)


def tensor_rules(model: ModelMixin, new_attention_order: bool, first_channels: int = 0) -> list[TensorRule]:
    r"""
    Lists the rules for all tensors of a checkpoint of `model`, in the order of OpenAI's modules.

    Args:
        model ([`AdaGNUNet2DModel`] or [`AdaGNClassifierModel`]): May be on the meta device.
        new_attention_order (`bool`): The rows of a `qkv` are ordered (qkv, head, channel), and not (head, qkv, channel)
            as in improved-diffusion and in most published models. No effect with a single head.
        first_channels (`int`, defaults to 0): Number of input channels of conditions that the checkpoint has in front
            of those of the noisy image. Here they are behind them.
    """
    rules = list(_walk(model, heads_first=not new_attention_order))
    if first_channels == 0:
        return rules
    # The first convolution is a sum over its input channels, so another order of these is one of its weights.
    behind = TensorRule(
        "input_blocks.0.0.weight",
        ("conv_in.weight",),
        lambda weight: (weight.roll(-first_channels, dims=1),),
        lambda weight: weight.roll(first_channels, dims=1),
    )
    return [behind if rule.source == behind.source else rule for rule in rules]


def _walk(model: Any, heads_first: bool) -> Iterator[TensorRule]:
    yield from module_rules("time_embed.0", "time_embedding.linear_1")
    yield from module_rules("time_embed.2", "time_embedding.linear_2")
    if getattr(model, "class_embedding", None) is not None:
        yield kept("label_emb.weight", "class_embedding.weight")

    def layer(source: str, target: str, index: int, block: Any) -> Iterator[TensorRule]:
        resnet, attention = block.resnets[index], block.attentions[index]
        yield from _res_block(f"{source}.0", f"{target}.resnets.{index}", resnet.conv_shortcut is not None)
        if attention is not None:
            yield from _attention(f"{source}.1", f"{target}.attentions.{index}", attention, heads_first)

    yield from module_rules("input_blocks.0.0", "conv_in")
    numbers = itertools.count(1)
    for level, block in enumerate(model.down_blocks):
        target = f"down_blocks.{level}"
        for index in range(len(block.resnets)):
            yield from layer(f"input_blocks.{next(numbers)}", target, index, block)
        if block.downsamplers is not None:
            source = f"input_blocks.{next(numbers)}.0"
            yield from _resampler(source, "op", f"{target}.downsamplers.0", block.downsamplers[0])

    yield from _res_block("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0", model.mid_block.attentions[0], heads_first)
    yield from _res_block("middle_block.2", "mid_block.resnets.1")

    if isinstance(model, AdaGNClassifierModel):
        yield from _pool(model)
        return

    number = 0
    for level, block in enumerate(model.up_blocks):
        target = f"up_blocks.{level}"
        for index in range(len(block.resnets)):
            yield from layer(f"output_blocks.{number}", target, index, block)
            number += 1
        if block.upsamplers is not None:
            # The upsampler is the last part of the module of the last layer.
            source = f"output_blocks.{number - 1}.{1 if block.attentions[-1] is None else 2}"
            yield from _resampler(source, "conv", f"{target}.upsamplers.0", block.upsamplers[0])
    yield from module_rules("out.0", "conv_norm_out")
    yield from module_rules("out.2", "conv_out")


def _pool(model: Any) -> Iterator[TensorRule]:
    pool = model.config.pool
    if pool in ("attention", "adaptive"):
        yield from module_rules("out.0", "conv_norm_out")
    if pool == "adaptive":
        yield from module_rules("out.3", "head", dims=2)
    elif pool == "attention":
        name = "positional_embedding"
        yield TensorRule(f"out.2.{name}", (f"head.{name}",), lambda tensor: (tensor.t(),), lambda tensor: tensor.t())
        # The pool has the newer order regardless of that of the blocks.
        targets = [f"head.to_{part}" for part in "qkv"]
        yield from fused_rules("out.2.qkv_proj", targets, model.head.num_heads, heads_first=False)
        yield from module_rules("out.2.c_proj", "head.to_out", dims=1)
    else:
        for layer in (0, 1, 3) if pool == "spatial_v2" else (0, 2):
            yield from module_rules(f"out.{layer}", f"head.{layer}")


# 2. What a layout reveals


def channels_of_file(shapes: Shapes) -> tuple[int, int]:
    """Input channels, and output channels or classes; a `ValueError` if this is not a network of the code bases."""
    last = [name for name in shapes if re.fullmatch(r"out\.\d\.(c_proj\.)?weight", name) and len(shapes[name]) > 1]
    if not last or any(len(shapes.get(name, ())) != dims for name, dims in ALWAYS_THERE.items()):
        names = ", ".join(list(shapes)[:4])
        raise ValueError(
            "This is not a U-Net or classifier of guided-diffusion or improved-diffusion: tensors that each of them "
            f"has are missing. It holds {len(shapes)} tensors: {names} ..."
        )
    return shapes["input_blocks.0.0.weight"][1], shapes[max(last)][0]


def image_channel_readings(
    channels_in: int,
    channels_out: int,
    kind: Kind,
    *,
    learn_sigma: bool | None = None,
    image_channels: int | None = None,
) -> dict[bool, int]:
    """
    What the channels of a U-Net or an upsampler can mean: from `learn_sigma` to the channels of an image, without those
    readings that contradict `learn_sigma` or `image_channels`, if known.

    A network returns as many channels as its images have, or twice as many with a learned variance. It takes the noisy
    image, an upsampler also the upsampled low-resolution image, and any number of channels that it is conditioned on.
    """
    readings = {False: channels_out} | ({True: channels_out // 2} if channels_out % 2 == 0 else {})
    return {
        learned: channels
        for learned, channels in readings.items()
        if channels * (2 if kind == "upsampler" else 1) <= channels_in
        and learn_sigma in (None, learned)
        and image_channels in (None, channels)
    }


def describe_readings(channels_in: int, channels_out: int, kind: Kind) -> str:
    """All readings of the channels, in words."""
    return ", or ".join(
        f"`--learn_sigma {learned}`: images of {channels} channel{'' if channels == 1 else 's'}"
        + (f", conditioned on {channels_in - channels} more" if channels_in > channels else "")
        for learned, channels in image_channel_readings(channels_in, channels_out, kind).items()
    )


def kinds_of_file(shapes: Shapes, learn_sigma: bool | None = None, image_channels: int | None = None) -> list[Kind]:
    """
    Kinds of network that a state dict can be, the likeliest first: the conditions of a U-Net may have as many channels
    as an upsampled small image. `learn_sigma` and `image_channels`, if known, exclude some, or all that the file
    allows.
    """
    channels_in, channels_out = channels_of_file(shapes)
    if not any(name.startswith("output_blocks.") for name in shapes):
        return ["classifier"]
    read = partial(
        image_channel_readings, channels_in, channels_out, learn_sigma=learn_sigma, image_channels=image_channels
    )
    readings = read("upsampler")
    if not readings:
        return ["unet"] if read("unet") else []
    # Equal numbers of input and output channels rather mean a U-Net without learned variance, except for RGB images.
    is_known = learn_sigma is not None or image_channels is not None
    is_usual = any(channels_in == 2 * channels for channels in readings.values())
    if is_usual and (is_known or channels_in != channels_out or channels_in == 6):
        return ["upsampler", "unet"]
    return ["unet", "upsampler"]


def observed_flags(shapes: Shapes, code_base: CodeBase, kind: Kind, image_size: int | None = None) -> Flags:
    """
    Reads the flags that names and shapes of the tensors reveal: everything but the number of attention heads, their
    order and the diffusion process; of the latter only `learn_sigma`, if the channels have one reading. The attention
    resolutions are those for `image_size`; `None`: for the size that the file reveals, or else the default. A
    `ValueError` if this is not a network of the two code bases.
    """
    channels_in, channels_out = channels_of_file(shapes)
    encoder = _read_encoder(shapes, has_decoder=kind != "classifier")
    width = shapes["time_embed.0.weight"][1]
    multiples = tuple(channels / width for channels in encoder.channels)
    prefix, size_name = ("classifier_" if kind == "classifier" else ""), size_flag(kind)
    flags: Flags = {
        f"{prefix}use_scale_shift_norm": 2 * shapes["input_blocks.1.0.out_layers.3.bias"][0]
        == shapes["input_blocks.1.0.emb_layers.1.bias"][0],
        "classifier_width" if prefix else "num_channels": width,
        "classifier_depth" if prefix else "num_res_blocks": encoder.layers,
    }
    sizes = [size for size, known in CHANNEL_MULT[code_base, kind].items() if known == multiples]
    if kind == "classifier":
        if "out.2.positional_embedding" in shapes:
            flags["classifier_pool"] = "attention"
            places = math.isqrt(shapes["out.2.positional_embedding"][1] - 1)
            sizes = [places * 2 ** (len(multiples) - 1)]
        else:
            by_dims = {0: "spatial", 2: "spatial_v2", 4: "adaptive"}
            flags["classifier_pool"] = by_dims.get(len(shapes.get("out.3.weight", ())), "spatial_v2")
    else:
        flags["class_cond"] = "label_emb.weight" in shapes
        readings = image_channel_readings(channels_in, channels_out, kind)
        if len(readings) == 1:
            flags["learn_sigma"] = next(iter(readings))
    if len(sizes) == 1:
        flags[size_name] = sizes[0]
    if code_base == "guided-diffusion":
        flags[f"{prefix}resblock_updown"] = encoder.residual
        if kind == "unet":
            flags["channel_mult"] = ",".join(f"{multiple:g}" for multiple in multiples)
    size = image_size or flags.get(size_name, default_flags(code_base, kind)[size_name])
    attending = [f"{size // 2**level}" for level, attends in enumerate(encoder.attends) if attends]
    # Attention in the middle block only: a size that no level has.
    flags[f"{prefix}attention_resolutions"] = ",".join(attending) or str(2 * size)
    return flags


class _Encoder(NamedTuple):
    channels: tuple[int, ...]  # of each level
    attends: tuple[bool, ...]  # whether each level has attention
    layers: int  # residual blocks per level
    residual: bool  # resampling in residual blocks


def _read_encoder(shapes: Shapes, has_decoder: bool) -> _Encoder:
    blocks = _blocks(shapes, "input_blocks")[1:]
    if has_decoder:
        up = _blocks(shapes, "output_blocks")
        resamples = [bool({"1.conv", "2.conv", "1.in_layers", "2.in_layers"} & set(block)) for block in up]
        number = sum(resamples) + 1
        depths = [len(up) // number - 1]
    else:
        # Every level has as many blocks, followed by a resampling one except at the last level.
        depths = [size - 1 for size in range(2, len(blocks) + 2) if (len(blocks) + 1) % size == 0]
    has_convolution = any("0.op" in block for block in blocks)

    fitting = []
    for layers in (depth for depth in depths if depth > 0):
        levels = [blocks[i : i + layers] for i in range(0, len(blocks), layers + 1)]
        resampling = blocks[layers :: layers + 1]
        if (
            len(blocks) == len(levels) * (layers + 1) - 1
            and all("channels" in block for block in blocks)
            and all(len({(block["channels"], "1.qkv" in block) for block in level}) == 1 for level in levels)
            and not any("0.skip_connection" in block for level in levels for block in level[1:])
            and not any({"1.qkv", "0.skip_connection"} & set(block) for block in resampling)
            and all(("0.op" in block) == has_convolution for block in resampling)
        ):
            channels = tuple(level[0]["channels"] for level in levels)
            attends = tuple("1.qkv" in level[0] for level in levels)
            fitting.append(_Encoder(channels, attends, layers, bool(resampling) and not has_convolution))
    if not fitting:
        raise ValueError(
            "The blocks of this state dict are not those of a network of guided-diffusion or improved-diffusion."
        )
    if len(fitting) > 1:
        raise ValueError(
            f"The levels cannot be read from the state dict: {len(fitting)} readings fit its {len(blocks) + 1} input "
            "blocks. Pass `preset` or `model_flags`, with the channels, the depth and the image size."
        )
    return fitting[0]


def _blocks(shapes: Shapes, part: str) -> list[dict[str, int]]:
    """For each block of a part: its modules ("0.in_layers", "1.qkv", "0.op" ...), and its output channels."""
    blocks: dict[int, dict[str, int]] = {}
    for name, shape in shapes.items():
        match = re.match(rf"{part}\.(\d+)\.(\d\.\w+)", name)
        if match:
            block = blocks.setdefault(int(match[1]), {})
            block[match[2]] = 1
            if match[2] in ("0.out_layers", "0.op") and len(shape) > 0:
                block["channels"] = shape[0]
    return [blocks.get(number, {}) for number in range(len(blocks))]
