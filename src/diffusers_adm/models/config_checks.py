"""
The configs of U-Net, ControlNet and classifier: what their words mean, and checks that they describe a network.

A mistake is refused here, at construction, if it would otherwise be ignored silently, build another network than asked
for, or fail only in a later call. What torch refuses at construction by itself is not checked again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

from ..ops.adagn import AdaGNActivation
from ..ops.integers import check_integer
from ..ops.values import check_number, describe


# What follows each residual block (None: nothing). "self": the image attends to itself. "transformer": transformer
# blocks, in which it attends to itself and then to the text. "added_kv": it attends to both at once, with keys and
# values added for the text.
AttentionKind = Literal["self", "transformer", "added_kv"]
ResampleKind = Literal["conv", "resnet"]  # a strided convolution, or a residual block that resamples (BigGAN)
TimeInjection = Literal["default", "scale_shift"]  # added before the second norm, or AdaGN
TimeEmbeddingType = Literal["positional", "fourier", "learned"]
ClassEmbedType = Literal["timestep", "identity", "projection"]
CrossAttentionNorm = Literal["layer_norm", "group_norm"]
EncoderHidDimType = Literal["text_proj"]
PoolKind = Literal["attention", "adaptive", "spatial", "spatial_v2"]  # of a classifier
# Pooled text in the time embedding: pooled by the network (DeepFloyd IF), or passed to it and added (GLIDE).
AdditionEmbedType = Literal["text", "text_embeds"]


class BlockSpec(NamedTuple):
    """Meaning of a block type of diffusers. `resample=None`: the config's `downsample_type` or `upsample_type`."""

    attention: AttentionKind | None
    resample: ResampleKind | None


BLOCK_TYPES = {
    "down_block_types": {
        "DownBlock2D": BlockSpec(attention=None, resample="conv"),
        "AttnDownBlock2D": BlockSpec(attention="self", resample=None),
        "ResnetDownsampleBlock2D": BlockSpec(attention=None, resample="resnet"),
        "CrossAttnDownBlock2D": BlockSpec(attention="transformer", resample="conv"),
        "SimpleCrossAttnDownBlock2D": BlockSpec(attention="added_kv", resample="resnet"),
    },
    "up_block_types": {
        "UpBlock2D": BlockSpec(attention=None, resample="conv"),
        "AttnUpBlock2D": BlockSpec(attention="self", resample=None),
        "ResnetUpsampleBlock2D": BlockSpec(attention=None, resample="resnet"),
        "CrossAttnUpBlock2D": BlockSpec(attention="transformer", resample="conv"),
        "SimpleCrossAttnUpBlock2D": BlockSpec(attention="added_kv", resample="resnet"),
    },
}
MID_BLOCK_TYPES: dict[str, AttentionKind] = {
    "UNetMidBlock2D": "self",
    "UNetMidBlock2DCrossAttn": "transformer",
    "UNetMidBlock2DSimpleCrossAttn": "added_kv",
}
ENCODER_CHOICES = {
    "mid_block_type": (*MID_BLOCK_TYPES, None),
    "time_embedding_type": get_args(TimeEmbeddingType),
    "class_embed_type": (*get_args(ClassEmbedType), None),
    "cross_attention_norm": (*get_args(CrossAttentionNorm), None),
    "addition_embed_type": (*get_args(AdditionEmbedType), None),
    "encoder_hid_dim_type": (*get_args(EncoderHidDimType), None),
    "time_embedding_act_fn": (*get_args(AdaGNActivation), None),
}
# Arguments of `UNet2DConditionModel` and `ControlNetModel` for parts that this family lacks, with the values that build
# none of these parts.
NEUTRAL_ARGUMENTS = {
    "dual_cross_attention": False,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "addition_time_embed_dim": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
}


# Largest values of arguments that count something, far above those of any network: a wrong digit in a file, or a
# malicious one, must not fill the memory or build layers for hours.
MAX_LAYERS, MAX_WIDTH, MAX_ROWS, MAX_LEVELS = 1000, 2**14, 2**24, 64
COUNTS = {
    **dict.fromkeys(("layers_per_block", "num_layers", "num_hidden_layers"), MAX_LAYERS),
    **dict.fromkeys(("transformer_layers_per_block", "reverse_transformer_layers_per_block"), MAX_LAYERS),
    **dict.fromkeys(("in_channels", "out_channels", "block_out_channels", "base_channels"), MAX_WIDTH),
    **dict.fromkeys(("conditioning_channels", "conditioning_embedding_out_channels"), MAX_WIDTH),
    **dict.fromkeys(("norm_num_groups", "attn_norm_num_groups", "addition_embed_type_num_heads"), MAX_WIDTH),
    **dict.fromkeys(("attention_head_dim", "num_attention_heads", "num_attention_heads_up"), MAX_WIDTH),
    **dict.fromkeys(("cross_attention_dim", "encoder_hid_dim", "text_states_dim", "clip_embeddings_dim"), MAX_WIDTH),
    **dict.fromkeys(("time_cond_proj_dim", "time_embedding_dim", "time_proj_dim", "time_embed_dim"), MAX_WIDTH),
    **dict.fromkeys(("projection_class_embeddings_input_dim", "projection_dim", "hidden_size"), MAX_WIDTH),
    **dict.fromkeys(("clip_extra_context_tokens", "max_position_embeddings", "sample_size"), MAX_WIDTH),
    **dict.fromkeys(("num_class_embeds", "num_classes", "num_train_timesteps", "vocab_size"), MAX_ROWS),
}
# The others are at least 1; of these, what reads them says how many there must be.
CHECKED_BY_OWNERS = ("layers_per_block", "num_layers", "num_hidden_layers", "attention_head_dim", "num_attention_heads")
CHECKED_BY_OWNERS += ("num_attention_heads_up", "clip_extra_context_tokens")
FACTORS = ("dropout", "norm_eps", "freq_shift", "timestep_scale", "resnet_out_scale_factor", "mid_block_scale_factor")


def per_level(value: Any, levels: int) -> tuple:
    """One entry per level: a list as it is, any other value repeated."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


def block_types(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The block types of an argument, without the prefix of some early repositories."""
    return tuple(block_type.removeprefix("UNetRes") for block_type in config.get(name) or ())


def block_specs(config: Mapping[str, Any], name: str) -> list[BlockSpec]:
    """Meaning of `down_block_types` or `up_block_types`, in their order. Unknown types are left out."""
    return [BLOCK_TYPES[name][given] for given in block_types(config, name) if given in BLOCK_TYPES[name]]


def has_cross_attention(config: Mapping[str, Any]) -> bool:
    """Whether any block attends to text. Then arguments have the meaning that they have in `UNet2DConditionModel`."""
    kinds = {spec.attention for name in BLOCK_TYPES for spec in block_specs(config, name)}
    return bool({*kinds, MID_BLOCK_TYPES.get(config.get("mid_block_type"))} & {"transformer", "added_kv"})


def with_defaults_of(diffusers_class: type, cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in which arguments of `cls` that it leaves out have the defaults of a class of diffusers."""
    own, theirs = (inspect.signature(c.__init__).parameters for c in (cls, diffusers_class))  # type: ignore[misc]
    defaults = {name: p.default for name, p in theirs.items() if name in own and name != "self"}
    # diffusers drops the arguments listed here, so that a class takes its own defaults for them.
    return {**defaults, **config, "_use_default_values": []}


def drop_neutral_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All other arguments. Those for parts that this family lacks must be neutral (`ValueError`)."""
    for name, neutral in NEUTRAL_ARGUMENTS.items():
        if arguments.get(name, neutral) != neutral:
            raise ValueError(
                f"`{name}` is {arguments[name]!r}, for a part that this family lacks; it must stay {neutral!r}. Load "
                "such a model with diffusers' own class."
            )
    return {name: value for name, value in arguments.items() if name not in NEUTRAL_ARGUMENTS}


def check_neutral_arguments(cls: type, arguments: Mapping[str, Any]) -> None:
    """Check the additional keyword arguments of a constructor: neutral ones only."""
    for name in drop_neutral_arguments(arguments):
        raise TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}")


def check_counts(config: Mapping[str, Any]) -> None:
    """
    Check arguments by their names: counts are integers, or lists of them, and none is absurd; factors are finite
    numbers; block types are texts.
    """
    for name, value in config.items():
        if name in COUNTS:
            _check_count(name, value, value)
        elif name in FACTORS:
            check_number(name, value)
        elif name in BLOCK_TYPES:
            entries = value if isinstance(value, (list, tuple)) else [None]
            if not all(isinstance(entry, str) for entry in entries):
                raise ValueError(f"`{name}` is {describe(value)}; pass a list of block types.")


def _check_count(name: str, value: Any, entry: Any, depth: int = 0) -> None:
    if isinstance(entry, (list, tuple)) and depth < 2 and len(entry) <= MAX_LEVELS:
        for each in entry:
            _check_count(name, value, each, depth + 1)
        return
    maximum = COUNTS[name]
    minimum = -maximum if name in CHECKED_BY_OWNERS else 1
    is_integer = isinstance(entry, Integral) and not isinstance(entry, bool)
    if entry is not None and not (is_integer and minimum <= entry <= maximum):
        raise ValueError(
            f"`{name}` is {describe(value)}; it must be at least 1 and at most {maximum}: an integer, or a list of at "
            f"most {MAX_LEVELS} of them where there is one for each level."
        )


def check_choice(name: str, value: Any, choices: Iterable) -> None:
    """Check that an argument has one of the values that there are."""
    if value not in (choices := tuple(choices)):
        raise ValueError(f"`{name}` is {value!r}; it must be one of {list(choices)}.")


def entries_per_level(config: Any, name: str) -> tuple:
    """The entries of an argument, of which a list must have one per level."""
    value, levels = config[name], len(config.block_out_channels)
    if isinstance(value, (list, tuple)) and len(value) != levels:
        raise ValueError(f"`{name}` has {len(value)} entries for {levels} levels. Give one per level.")
    return per_level(value, levels)


def check_block_types(config: Any, name: str) -> None:
    """Check that there is one known block type per level."""
    given, channels = block_types(config, name), tuple(config.block_out_channels)
    if len(given) != len(channels):
        raise ValueError(
            f"`{name}` has {len(given)} entries {given} but `block_out_channels` has {len(channels)} {channels}. Give "
            "one block type per level."
        )
    for block_type in given:
        check_choice(name, block_type, BLOCK_TYPES[name])


def check_levels(config: Any) -> None:
    """Check what U-Net, ControlNet and classifier have in common: the levels of an encoder."""
    check_counts(config)
    channels = config.block_out_channels
    if not isinstance(channels, (list, tuple)) or not channels:
        raise ValueError(f"`block_out_channels` is {describe(channels)}; pass a list of one number per level.")
    for name in ("in_channels", "out_channels", "norm_num_groups"):
        check_integer(name, config.get(name, 1), 1)
    for number in channels:
        check_integer("block_out_channels", number, 1)
    check_block_types(config, "down_block_types")
    check_choice("resnet_time_scale_shift", config.resnet_time_scale_shift, get_args(TimeInjection))
    check_choice("downsample_type", config.downsample_type, get_args(ResampleKind))
    check_choice("act_fn", config.act_fn, get_args(AdaGNActivation))
    if min(entries_per_level(config, "layers_per_block")) < 1:
        raise ValueError(f"`layers_per_block` is {config.layers_per_block}; each level needs at least 1.")


def check_heads(config: Any, kinds: Iterable[AttentionKind | None], up: bool = False) -> None:
    """Check the heads of the levels with attention, by the readings that `resolve_heads` explains."""
    number_name = (
        "num_attention_heads_up" if up and config.num_attention_heads_up is not None else "num_attention_heads"
    )
    numbers, head_dims = entries_per_level(config, number_name), entries_per_level(config, "attention_head_dim")
    widths = head_dims[::-1] if up else head_dims
    for level, (kind, channels) in enumerate(zip(kinds, config.block_out_channels, strict=True)):
        name, number, width = number_name, numbers[level], widths[level]
        if kind == "transformer" and number is None:
            name, number = "attention_head_dim", head_dims[level] or 0
        if kind is not None and number is not None and (number < 1 or channels % number):
            raise ValueError(
                f"`{name}` is {number}; it must divide the {channels} channels of level {level}, as the number of "
                "attention heads."
            )
        if kind is not None and number is None and width is not None and not 1 <= width <= channels:
            raise ValueError(
                f"`attention_head_dim` is {width}; it must lie between 1 and the {channels} channels of level "
                f"{level}, which has attention. Choose a divisor of {channels}, or set `num_attention_heads`."
            )


def check_encoder(config: Any) -> None:
    """Check the arguments that U-Net and ControlNet have in common."""
    check_levels(config)
    for name, choices in ENCODER_CHOICES.items():
        check_choice(name, config[name], choices)
    has_text = has_cross_attention(config)
    check_heads(config, [spec.attention for spec in block_specs(config, "down_block_types")])
    mid_kind = MID_BLOCK_TYPES.get(config.mid_block_type)
    if mid_kind == "self" and (has_text or not config.add_attention):
        mid_kind = None
    check_heads(config, [None] * (len(config.block_out_channels) - 1) + [mid_kind])

    # Time and class
    if config.time_embedding_type == "learned" and config.num_train_timesteps is None:
        raise ValueError('`time_embedding_type="learned"` needs `num_train_timesteps`, the rows of its table.')
    if config.time_embedding_type == "learned" and config.timestep_scale != 1.0:
        raise ValueError(f"`timestep_scale` is {config.timestep_scale}, but learned time embeddings are not scaled.")
    if config.class_embed_type is not None and config.num_class_embeds is not None:
        raise ValueError(
            f"`class_embed_type` is {config.class_embed_type!r} and `num_class_embeds` is {config.num_class_embeds}: "
            "only `class_embed_type=None` has a table. Drop one of them."
        )
    if config.null_class_id is not None and not 0 <= config.null_class_id < (config.num_class_embeds or 0):
        raise ValueError(
            f"`null_class_id` is {config.null_class_id}; it must name one of the `num_class_embeds` "
            f"({config.num_class_embeds}) rows of the class embedding. Count the null class as one of them."
        )
    if (config.class_embed_type == "projection") != (config.projection_class_embeddings_input_dim is not None):
        raise ValueError(
            f"`class_embed_type` is {config.class_embed_type!r} and `projection_class_embeddings_input_dim` is "
            f"{config.projection_class_embeddings_input_dim}: 'projection' needs the latter, and nothing else uses it."
        )

    # Text
    for name in ("encoder_hid_dim", "addition_embed_type"):
        if config[name] is not None and not has_text:
            raise ValueError(f"`{name}` is {config[name]!r}, but none of the block types has cross-attention.")
    if has_text and config.time_embedding_type != "positional":
        raise ValueError(
            f"`time_embedding_type` is {config.time_embedding_type!r}; networks with text support only 'positional'."
        )
    if config.encoder_hid_dim_type is not None and config.encoder_hid_dim is None:
        raise ValueError("`encoder_hid_dim_type` needs `encoder_hid_dim`, the width of the states to project.")
    widths = entries_per_level(config, "cross_attention_dim")
    reads_states_once = config.encoder_hid_dim is not None or config.addition_embed_type == "text"
    if reads_states_once and not isinstance(config.cross_attention_dim, int):
        raise ValueError(
            f"`cross_attention_dim` is {widths}, but the states are projected (`encoder_hid_dim`) or pooled "
            "(`addition_embed_type='text'`) once. Pass one number."
        )
    entries_per_level(config, "only_cross_attention")
    check_depths(config, "transformer_layers_per_block")


def check_depths(config: Any, name: str, up: bool = False) -> None:
    """Check the depths of transformer blocks, which may differ by level and by block of a level."""
    blocks = per_level(config.layers_per_block, len(config.block_out_channels))
    numbers = [number + 1 for number in reversed(blocks)] if up else blocks
    for entry, number in zip(entries_per_level(config, name), numbers, strict=True):
        if isinstance(entry, (list, tuple)) and len(entry) != number:
            raise ValueError(f"`{name}` has {tuple(entry)} for a level of {number} blocks. Give one number per block.")


def check_up_path(config: Any) -> None:
    """Check the arguments that only the U-Net has."""
    check_block_types(config, "up_block_types")
    check_choice("upsample_type", config.upsample_type, get_args(ResampleKind))
    if isinstance(config.num_attention_heads_up, (list, tuple)):
        raise ValueError(f"`num_attention_heads_up` is {config.num_attention_heads_up}; it must be one number.")
    check_heads(config, [spec.attention for spec in reversed(block_specs(config, "up_block_types"))], up=True)
    if config.reverse_transformer_layers_per_block is not None:
        check_depths(config, "reverse_transformer_layers_per_block", up=True)
    elif any(isinstance(entry, (list, tuple)) for entry in entries_per_level(config, "transformer_layers_per_block")):
        raise ValueError(
            f"`transformer_layers_per_block` is {config.transformer_layers_per_block}, with one number per block. The "
            "up path has one more block per level: pass `reverse_transformer_layers_per_block` as well."
        )


def check_classifier(config: Any) -> None:
    """Check the arguments of a classifier."""
    check_levels(config)
    check_choice("pool", config.pool, get_args(PoolKind))
    kinds = [spec.attention for spec in block_specs(config, "down_block_types")]
    if set(kinds) - {None, "self"}:
        raise ValueError(f"`down_block_types` is {config.down_block_types}; a classifier has no cross-attention.")
    check_heads(config, [*kinds[:-1], "self"])  # the last level's are those of the middle block and attention pool
    channels, head_dim = config.block_out_channels[-1], config.attention_head_dim
    if config.pool == "attention" and config.num_attention_heads is None and channels % (head_dim or channels):
        raise ValueError(
            f"`attention_head_dim` is {head_dim}; the attention pool needs a divisor of the {channels} channels of "
            "the last level. Choose one, or set `num_attention_heads`."
        )
    size, factor = config.sample_size, 2 ** (len(config.block_out_channels) - 1)
    sides = per_level(size, 2)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 and side % factor == 0 for side in sides):
        raise ValueError(
            f"`sample_size` is {size}; it must be one number or (height, width), positive and divisible by "
            f"{factor}, the total downsampling of this model."
        )
