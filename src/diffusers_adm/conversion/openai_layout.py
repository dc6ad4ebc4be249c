"""
Names and shapes of the tensors in OpenAI's checkpoints, and how each becomes a tensor of ours and back.

guided-diffusion, improved-diffusion and GLIDE number the modules of their U-Nets through
(`input_blocks.7.1.qkv.weight`); the same walk over our levels and layers names them all. Every change is a permutation
of rows, a split or a reshape, so the way there and back gives the same bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin

from ..models import AdaGNClassifierModel
from .common import TensorRule
from .openai_flags import CHANNEL_MULT, CodeBase, Flags, Kind, default_flags


Shapes = Mapping[str, Sequence[int]]

# What a state dict must hold for its flags to be read off it, and the number of dimensions.
ALWAYS_THERE = {
    "time_embed.0.weight": 2,
    "input_blocks.0.0.weight": 4,
    "input_blocks.1.0.in_layers.2.weight": 4,
    "input_blocks.1.0.emb_layers.1.bias": 1,
    "input_blocks.1.0.out_layers.3.bias": 1,
    "middle_block.1.qkv.weight": 3,
}


def _keep(tensor: torch.Tensor) -> tuple[torch.Tensor]:
    return (tensor,)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def kept(source: str, target: str) -> TensorRule:
    """For a tensor that is the same on both sides."""
    return TensorRule(source, (target,), _keep, _same)


def _squeeze(tensor: torch.Tensor, dims: int) -> tuple[torch.Tensor]:
    return (tensor.flatten(-1 - dims),)


def _unsqueeze(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    return tensor.reshape(*tensor.shape, *[1] * dims)


def _split_heads(
    tensor: torch.Tensor, parts: int, heads: int, heads_first: bool, dims: int
) -> tuple[torch.Tensor, ...]:
    """
    Rows ordered (head, part, channel in head), or (part, head, channel): to one tensor for each part (query, key,
    value), ordered (head, channel).
    """
    (tensor,) = _squeeze(tensor, dims)
    if heads_first:
        tensor = tensor.unflatten(0, (heads, parts, -1)).transpose(0, 1).flatten(0, 2)
    return tensor.chunk(parts)


def _join_heads(*tensors: torch.Tensor, heads: int, heads_first: bool, dims: int) -> torch.Tensor:
    tensor = torch.cat(tensors)
    if heads_first:
        tensor = tensor.unflatten(0, (len(tensors), heads, -1)).transpose(0, 1).flatten(0, 2)
    return _unsqueeze(tensor, dims)


def module_rules(source: str, target: str, dims: int = 0) -> Iterator[TensorRule]:
    """A weight and a bias; `dims`: how many dimensions of size 1 their weight (a convolution's) has and ours not."""
    squeeze, unsqueeze = partial(_squeeze, dims=dims), partial(_unsqueeze, dims=dims)
    yield TensorRule(f"{source}.weight", (f"{target}.weight",), squeeze, unsqueeze)
    yield kept(f"{source}.bias", f"{target}.bias")


def fused_rules(
    source: str, targets: Sequence[str], heads: int, heads_first: bool, weight_dims: int = 1
) -> Iterator[TensorRule]:
    """Queries, keys and values (or two of them) of one layer there and of several here; `weight_dims`: see above."""
    for kind, dims in (("weight", weight_dims), ("bias", 0)):
        yield TensorRule(
            f"{source}.{kind}",
            tuple(f"{target}.{kind}" for target in targets),
            partial(_split_heads, parts=len(targets), heads=heads, heads_first=heads_first, dims=dims),
            partial(_join_heads, heads=heads, heads_first=heads_first, dims=dims),
        )


def _res_block(source: str, target: str, has_shortcut: bool) -> Iterator[TensorRule]:
    yield from module_rules(f"{source}.in_layers.0", f"{target}.norm1")
    yield from module_rules(f"{source}.in_layers.2", f"{target}.conv1")
    yield from module_rules(f"{source}.emb_layers.1", f"{target}.time_emb_proj")
    yield from module_rules(f"{source}.out_layers.0", f"{target}.norm2")
    yield from module_rules(f"{source}.out_layers.3", f"{target}.conv2")
    if has_shortcut:
        yield from module_rules(f"{source}.skip_connection", f"{target}.conv_shortcut")


def _attention(source: str, target: str, attention: Any, heads_first: bool) -> Iterator[TensorRule]:
    yield from module_rules(f"{source}.norm", f"{target}.group_norm")
    yield from fused_rules(f"{source}.qkv", [f"{target}.to_{part}" for part in "qkv"], attention.heads, heads_first)
    if getattr(attention, "add_k_proj", None) is not None:  # of the text, in GLIDE
        added = [f"{target}.add_{part}_proj" for part in "kv"]
        yield from fused_rules(f"{source}.encoder_kv", added, attention.heads, heads_first)
    yield from module_rules(f"{source}.proj_out", f"{target}.to_out.0", dims=1)


def tensor_rules(model: ModelMixin, new_attention_order: bool) -> list[TensorRule]:
    r"""
    Every tensor of the checkpoint that holds `model`, in the order of OpenAI's modules.

    Args:
        model ([`AdaGNUNet2DModel`] or [`AdaGNClassifierModel`]): May lie on the meta device.
        new_attention_order (`bool`): Whether the rows of a `qkv` are ordered (qkv, head, channel), and not (head, qkv,
            channel) as in improved-diffusion and in most published models. Of no effect with a single head.
    """
    return list(_walk(model, heads_first=not new_attention_order))


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
    number = 1
    for level, block in enumerate(model.down_blocks):
        target = f"down_blocks.{level}"
        for index in range(len(block.resnets)):
            yield from layer(f"input_blocks.{number}", target, index, block)
            number += 1
        if block.downsamplers is not None:
            if hasattr(block.downsamplers[0], "norm1"):
                yield from _res_block(f"input_blocks.{number}.0", f"{target}.downsamplers.0", has_shortcut=False)
            else:
                yield from module_rules(f"input_blocks.{number}.0.op", f"{target}.downsamplers.0.conv")
            number += 1

    yield from _res_block("middle_block.0", "mid_block.resnets.0", has_shortcut=False)
    yield from _attention("middle_block.1", "mid_block.attentions.0", model.mid_block.attentions[0], heads_first)
    yield from _res_block("middle_block.2", "mid_block.resnets.1", has_shortcut=False)

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
            if hasattr(block.upsamplers[0], "norm1"):
                yield from _res_block(source, f"{target}.upsamplers.0", has_shortcut=False)
            else:
                yield from module_rules(f"{source}.conv", f"{target}.upsamplers.0.conv")
    yield from module_rules("out.0", "conv_norm_out")
    yield from module_rules("out.2", "conv_out")


def _pool(model: Any) -> Iterator[TensorRule]:
    pool = model.config.pool
    if pool in ("attention", "adaptive"):
        yield from module_rules("out.0", "conv_norm_out")
    if pool == "adaptive":
        yield from module_rules("out.3", "head", dims=2)
    elif pool == "attention":
        yield TensorRule(
            "out.2.positional_embedding",
            ("head.positional_embedding",),
            lambda tensor: (tensor.t(),),
            lambda tensor: tensor.t(),
        )
        # The pool has the newer order whatever the blocks have.
        targets = [f"head.to_{part}" for part in "qkv"]
        yield from fused_rules("out.2.qkv_proj", targets, model.head.num_heads, heads_first=False)
        yield from module_rules("out.2.c_proj", "head.to_out", dims=1)
    else:
        for layer in (0, 1, 3) if pool == "spatial_v2" else (0, 2):
            yield from module_rules(f"out.{layer}", f"head.{layer}")


def expected_shapes(model: ModelMixin, rules: Sequence[TensorRule]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the checkpoint of `model` holds."""
    own = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    shapes = {rule.source: tuple(rule.join(*(own.pop(target) for target in rule.targets)).shape) for rule in rules}
    if own:  # a module that the walk does not know: a mistake here, not in the checkpoint
        raise RuntimeError(f"No rule for {sorted(own)}.")
    return shapes


# What a state dict tells about its network


def image_channel_readings(
    channels_in: int,
    channels_out: int,
    kind: Kind,
    *,
    learn_sigma: bool | None = None,
    image_channels: int | None = None,
) -> dict[bool, int]:
    r"""
    What the channels of a U-Net or an upsampler can mean: a network returns as many channels as its images have, or
    twice as many with a learned variance. It takes the noisy image, an upsampler the enlarged small one as well, and
    any number of further channels that it is conditioned on.

    Args:
        channels_in, channels_out (`int`): Of the network.
        kind (`str`): `"unet"` or `"upsampler"`.
        learn_sigma (`bool`, *optional*), image_channels (`int`, *optional*): What is known; other readings are dropped.

    Returns:
        `dict`: From `learn_sigma` to the channels of an image; with none, one or two entries.
    """
    readings = {False: channels_out} | ({True: channels_out // 2} if channels_out % 2 == 0 else {})
    return {
        learned: channels
        for learned, channels in readings.items()
        if channels * (2 if kind == "upsampler" else 1) <= channels_in
        and learn_sigma in (None, learned)
        and image_channels in (None, channels)
    }


def kinds_of_file(shapes: Shapes, learn_sigma: bool | None = None, image_channels: int | None = None) -> list[Kind]:
    """
    The kinds of network that a state dict can be, the likeliest first: what a U-Net is conditioned on may have as many
    channels as an enlarged small image. With `learn_sigma` and `image_channels`, where they are known, fewer are left,
    and none if they contradict the file.

    Raises:
        ValueError: If this is no network of the two code bases.
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
    # As many channels out as in are rather those of a U-Net without learned variance, except for RGB images.
    is_told = learn_sigma is not None or image_channels is not None
    is_usual = any(channels_in == 2 * channels for channels in readings.values())
    if is_usual and (is_told or channels_in != channels_out or channels_in == 6):
        return ["upsampler", "unet"]
    return ["unet", "upsampler"]


def observed_flags(shapes: Shapes, code_base: CodeBase, kind: Kind) -> Flags:
    r"""
    Those flags of a network of this kind that names and shapes of its tensors tell. They do not tell the number of
    attention heads nor their order, and nothing of the diffusion process but `learn_sigma`, where the numbers of
    channels have one meaning.

    Raises:
        ValueError: If this is no network of the two code bases.
    """
    channels_in, channels_out = channels_of_file(shapes)
    encoder = _encoder(shapes, has_decoder=kind != "classifier")
    width = shapes["time_embed.0.weight"][1]
    multiples = tuple(channels / width for channels in encoder.channels)
    prefix = "classifier_" if kind == "classifier" else ""
    size_name = "large_size" if kind == "upsampler" else "image_size"
    flags: Flags = {
        f"{prefix}use_scale_shift_norm": 2 * shapes["input_blocks.1.0.out_layers.3.bias"][0]
        == shapes["input_blocks.1.0.emb_layers.1.bias"][0],
        "classifier_width" if prefix else "num_channels": width,
        "classifier_depth" if prefix else "num_res_blocks": encoder.layers,
    }
    sizes = [size for size, known in CHANNEL_MULT[code_base, kind].items() if known == multiples]
    if kind == "classifier":
        flags["classifier_pool"] = _pool_kind(shapes)
        if flags["classifier_pool"] == "attention":
            places = math.isqrt(shapes["out.2.positional_embedding"][1] - 1)
            sizes = [places * 2 ** (len(multiples) - 1)]
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
    size = flags.get(size_name, default_flags(code_base, kind)[size_name])
    attending = [f"{size // 2**level}" for level, attends in enumerate(encoder.attends) if attends]
    # No attention but the middle's: a size that no level has.
    flags[f"{prefix}attention_resolutions"] = ",".join(attending) or str(2 * size)
    return flags


class _Encoder(NamedTuple):
    channels: tuple[int, ...]  # of each level
    attends: tuple[bool, ...]  # whether each level has attention
    layers: int  # residual blocks of each level
    residual: bool  # whether it resamples in residual blocks


def channels_of_file(shapes: Shapes) -> tuple[int, int]:
    """Input channels, and output channels or classes. Raises a `ValueError` if this is no network of the code bases."""
    last = [name for name in shapes if re.fullmatch(r"out\.\d\.(c_proj\.)?weight", name) and len(shapes[name]) > 1]
    if not last or any(len(shapes.get(name, ())) != dims for name, dims in ALWAYS_THERE.items()):
        names = ", ".join(list(shapes)[:4])
        raise ValueError(
            "This is not a U-Net or classifier of guided-diffusion or improved-diffusion: tensors that each of them "
            f"has are missing. It holds {len(shapes)} tensors: {names} ..."
        )
    return shapes["input_blocks.0.0.weight"][1], shapes[max(last)][0]


def _pool_kind(shapes: Shapes) -> str:
    if "out.2.positional_embedding" in shapes:
        return "attention"
    if "out.3.weight" not in shapes:
        return "spatial"
    return "adaptive" if len(shapes["out.3.weight"]) == 4 else "spatial_v2"


def _encoder(shapes: Shapes, has_decoder: bool) -> _Encoder:
    blocks = _blocks(shapes, "input_blocks")[1:]
    if has_decoder:
        up = _blocks(shapes, "output_blocks")
        resamples = [bool({"1.conv", "2.conv", "1.in_layers", "2.in_layers"} & set(block)) for block in up]
        number = sum(resamples) + 1
        depths = [len(up) // number - 1]
    else:
        # Every level has as many blocks, and a resampling one behind them except for the last level.
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
            is_residual = bool(resampling) and not has_convolution
            fitting.append(_Encoder(channels, attends, layers, is_residual))
    if not fitting:
        raise ValueError(
            "The blocks of this state dict are not those of a network of guided-diffusion or improved-diffusion."
        )
    if len(fitting) > 1:
        raise ValueError(
            f"The state dict does not tell its levels: {len(fitting)} readings fit its {len(blocks) + 1} input blocks. "
            "Pass `preset` or `model_flags`, with the channels, the depth and the image size."
        )
    return fitting[0]


def _blocks(shapes: Shapes, part: str) -> list[dict[str, int]]:
    """For each block of a part its modules ("0.in_layers", "1.qkv", "0.op" ...), and the channels it leaves behind."""
    blocks: dict[int, dict[str, int]] = {}
    for name, shape in shapes.items():
        match = re.match(rf"{part}\.(\d+)\.(\d\.\w+)", name)
        if match:
            block = blocks.setdefault(int(match[1]), {})
            block[match[2]] = 1
            if match[2] in ("0.out_layers", "0.op") and len(shape) > 0:
                block["channels"] = shape[0]
    return [blocks.get(number, {}) for number in range(len(blocks))]


def differences(expected: Shapes, found: Shapes, limit: int = 6) -> list[str]:
    """What is missing, superfluous or of another shape, in words; one entry a tensor, `limit` of each kind."""
    missing = [f"missing: {name} {tuple(expected[name])}" for name in expected if name not in found]
    unused = [f"not used: {name} {tuple(found[name])}" for name in found if name not in expected]
    other = [
        f"{name}: has shape {tuple(found[name])}, expected {tuple(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    lines = []
    for group in (missing, unused, other):
        lines += group[:limit]
        if len(group) > limit:
            lines.append(f"... and {len(group) - limit} more of this kind")
    return lines
