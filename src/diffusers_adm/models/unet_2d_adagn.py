"""
AdaGNUNet2DModel: the U-Net of ablated diffusion models (ADM), whole, in one file.

DDPM (Ho et al. 2020, https://huggingface.co/papers/2006.11239), Improved DDPM (Nichol & Dhariwal 2021,
https://huggingface.co/papers/2102.09672) and ADM (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233,
appendix of architectures). One residual block, one block each for the way down, the middle and the way up; what the
block types of diffusers distinguish are two parameters here: the kind of attention and the kind of resampling. Text
comes in by cross-attention in transformer blocks (latent diffusion, https://huggingface.co/papers/2112.10752) or by
added keys and values (GLIDE, https://huggingface.co/papers/2112.10741). Parameter names are those of diffusers'
`UNet2DModel` and `UNet2DConditionModel`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0
from diffusers.models.embeddings import GaussianFourierProjection, TextTimeEmbedding, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from ..ops.adagn import ADAGN_ACTIVATIONS, AdaGNActivation, AdaGroupNormAct
from ..ops.conv import Conv2d


# What follows each residual block (None: nothing): self-attention; transformer blocks, in which the image attends to
# itself and then to the text; or attention to both at once, with keys and values added for the text.
AttentionKind = Literal["self", "transformer", "added_kv"]
BlockAttention: TypeAlias = Attention | Transformer2DModel
ResampleKind = Literal["conv", "resnet"]  # a strided convolution, or a residual block that resamples (BigGAN)
TimeInjection = Literal["default", "scale_shift"]  # added before the second norm, or AdaGN
TimeEmbeddingType = Literal["positional", "fourier", "learned"]
ClassEmbedType = Literal["timestep", "identity", "projection"]
# Pooled text in the time embedding: pooled here by attention (DeepFloyd IF), or given as it is to be added (GLIDE).
AdditionEmbedType = Literal["text", "text_embeds"]


class BlockSpec(NamedTuple):
    """What a diffusers block type stands for. `resample=None`: the model's `downsample_type` or `upsample_type`."""

    attention: AttentionKind | None
    resample: ResampleKind | None


DOWN_BLOCK_TYPES = {
    "DownBlock2D": BlockSpec(attention=None, resample="conv"),
    "AttnDownBlock2D": BlockSpec(attention="self", resample=None),
    "ResnetDownsampleBlock2D": BlockSpec(attention=None, resample="resnet"),
    "CrossAttnDownBlock2D": BlockSpec(attention="transformer", resample="conv"),
    "SimpleCrossAttnDownBlock2D": BlockSpec(attention="added_kv", resample="resnet"),
}
UP_BLOCK_TYPES = {
    "UpBlock2D": BlockSpec(attention=None, resample="conv"),
    "AttnUpBlock2D": BlockSpec(attention="self", resample=None),
    "ResnetUpsampleBlock2D": BlockSpec(attention=None, resample="resnet"),
    "CrossAttnUpBlock2D": BlockSpec(attention="transformer", resample="conv"),
    "SimpleCrossAttnUpBlock2D": BlockSpec(attention="added_kv", resample="resnet"),
}
MID_BLOCK_TYPES: dict[str, AttentionKind] = {
    "UNetMidBlock2D": "self",
    "UNetMidBlock2DCrossAttn": "transformer",
    "UNetMidBlock2DSimpleCrossAttn": "added_kv",
}
# Arguments of `UNet2DConditionModel` for parts that this family does not have: only these values are taken.
NEUTRAL_ARGUMENTS = {
    "dual_cross_attention": False,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "addition_time_embed_dim": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
}

# Added to the score of a key that is not to be seen, as in diffusers.
MASKED = -10000.0


class TextContext(NamedTuple):
    """What cross-attention sees: states `(B, L, C)`; masks as biases `(B, 1, keys)`, 0 or very negative."""

    encoder_hidden_states: torch.Tensor
    attention_mask: torch.Tensor | None
    encoder_attention_mask: torch.Tensor | None
    cross_attention_kwargs: dict[str, Any]


def reads_text(block_types: Iterable[str | None]) -> bool:
    """Whether any block has cross-attention. Then the arguments mean what they mean in `UNet2DConditionModel`."""
    specs = {**DOWN_BLOCK_TYPES, **UP_BLOCK_TYPES}
    kinds = {MID_BLOCK_TYPES.get(name) or (specs[name].attention if name in specs else None) for name in block_types}
    return bool(kinds & {"transformer", "added_kv"})


def per_level(value: Any, levels: int) -> tuple:
    """One entry a level: a list as it is, anything else repeated."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


def _mask_to_bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`(B, keys)` of 1 (seen) and 0, as what is added to the scores."""
    return None if mask is None else (1 - mask.to(dtype))[:, None, :] * MASKED


def _check_choice(name: str, value: Any, choices: tuple | list | dict) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {list(choices)}.")


def zero_init(module: nn.Module) -> nn.Module:
    """Residual branches start as the identity and the network as the zero function, as in ADM."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Downsample(nn.Module):
    """Halves height and width by a strided 3x3 convolution. `padding=0` pads right and below only, as DDPM did."""

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.padding = padding
        self.conv = Conv2d(channels, channels, kernel_size=3, stride=2, padding=padding)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.padding == 0:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


class Upsample(nn.Module):
    """Doubles height and width by nearest-neighbour repetition, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    r"""
    Residual block, conditioned by adaptive group normalisation (ADM, section 3.1) or by addition (DDPM). With
    `resample` it halves ("down") or doubles ("up") height and width inside, on both branches (BigGAN, ADM's
    `resblock_updown`).

    Args:
        in_channels, out_channels (`int`): Multiples of `groups`, the number of groups of either norm.
        temb_channels (`int`): Width of the conditioning vector.
        time_injection (`str`): `"scale_shift"` (AdaGN) or `"default"` (added before the second norm).
        output_scale_factor (`float`, defaults to 1.0): The sum of both branches is divided by it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        groups: int,
        eps: float,
        act_fn: AdaGNActivation,
        time_injection: TimeInjection,
        dropout: float = 0.0,
        resample: Literal["down", "up"] | None = None,
        output_scale_factor: float = 1.0,
    ):
        super().__init__()
        self.time_injection = time_injection
        self.resample = resample
        self.output_scale_factor = output_scale_factor
        self.norm1 = AdaGroupNormAct(groups, in_channels, eps, act_fn)
        self.conv1 = Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, (2 if time_injection == "scale_shift" else 1) * out_channels)
        self.norm2 = AdaGroupNormAct(groups, out_channels, eps, act_fn)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(Conv2d(out_channels, out_channels, kernel_size=3, padding=1))
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        # (B, C_in, H, W) and the activated (B, temb_channels)
        residual = hidden_states
        hidden_states = self.norm1(hidden_states)
        if self.resample == "down":
            hidden_states, residual = F.avg_pool2d(hidden_states, 2), F.avg_pool2d(residual, 2)
        elif self.resample == "up":
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
            residual = F.interpolate(residual, scale_factor=2.0, mode="nearest")
        hidden_states = self.conv1(hidden_states)  # (B, C_out, H', W')

        temb = self.time_emb_proj(temb)
        if self.time_injection == "scale_shift":
            # (B, C_out) each. Checkpoints of this family store scale first (DiT: shift); swapped, nothing crashes.
            scale, shift = temb.chunk(2, dim=1)
            hidden_states = self.norm2(hidden_states, scale, shift)
        else:
            hidden_states = self.norm2(hidden_states + temb[:, :, None, None])
        hidden_states = self.conv2(self.dropout(hidden_states))

        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(residual)
        hidden_states = residual + hidden_states
        if self.output_scale_factor != 1.0:
            hidden_states = hidden_states / self.output_scale_factor
        return hidden_states


class AddedKVAttention(Attention):
    """
    Attention to image and text at once, with keys and values of their own for the text, which come first. A mask is one
    of the text; diffusers' base class would guess from its length whether the image is in it.
    """

    def prepare_attention_mask(
        self, attention_mask: torch.Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> torch.Tensor | None:
        # (B, 1, L) to (B, 1, 1, keys), or (B * heads, 1, keys) for processors that fold heads into the batch
        if attention_mask is None:
            return None
        if not self.only_cross_attention:
            attention_mask = F.pad(attention_mask, (0, target_length))
        return attention_mask[:, None] if out_dim == 4 else attention_mask.repeat_interleave(self.heads, dim=0)


class _Block(nn.Module):
    """What the three kinds of block share: residual blocks, each followed by attention where there is any."""

    def __init__(self, resnets: list[ResBlock], attentions: list[BlockAttention | None], skip_time_act: bool = False):
        super().__init__()
        self.skip_time_act = skip_time_act  # the time embedding comes in without an activation (DeepFloyd IF)
        self.resnets = nn.ModuleList(resnets)
        if any(attention is not None for attention in attentions):
            self.attentions = nn.ModuleList(attentions)
        else:
            self.attentions = [None] * len(attentions)
        self.gradient_checkpointing = False

    def run(self, module: nn.Module, *args: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *args, **kwargs)
        return module(*args, **kwargs)

    def attend(
        self, attention: BlockAttention, hidden_states: torch.Tensor, context: TextContext | None
    ) -> torch.Tensor:
        # The processors return a transposed view of (B, H*W, C), so planar activations would leave as channels-last;
        # what follows would then mix both layouts and copy at every operation.
        planar = hidden_states.is_contiguous()
        if isinstance(attention, Transformer2DModel):  # which checkpoints its layers by itself
            states, mask, encoder_mask, kwargs = context
            if attention.transformer_blocks[0].only_cross_attention:
                mask = encoder_mask  # its first attention sees the text as well
            hidden_states = attention(
                hidden_states,
                encoder_hidden_states=states,
                attention_mask=mask,
                encoder_attention_mask=encoder_mask,
                cross_attention_kwargs=kwargs,
                return_dict=False,
            )[0]
        elif isinstance(attention, AddedKVAttention):
            states, mask, encoder_mask, kwargs = context
            mask = encoder_mask if mask is None else mask  # unCLIP's pipelines use either for the text
            hidden_states = self.run(attention, hidden_states, states, mask, **kwargs)
        else:
            hidden_states = self.run(attention, hidden_states)
        return hidden_states.contiguous() if planar else hidden_states


class DownBlock(_Block):
    """`num_layers` residual blocks, then the downsampler; every output is a skip connection."""

    def __init__(
        self,
        resnets: list[ResBlock],
        attentions: list[BlockAttention | None],
        downsampler: nn.Module | None,
        skip_time_act: bool = False,
    ):
        super().__init__(resnets, attentions, skip_time_act)
        self.downsamplers = nn.ModuleList([downsampler]) if downsampler is not None else None

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, context: TextContext | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        skips = ()
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            hidden_states = self.run(resnet, hidden_states, temb)
            if attention is not None:
                hidden_states = self.attend(attention, hidden_states, context)
            skips += (hidden_states,)
        if self.downsamplers is not None:
            downsampler = self.downsamplers[0]
            arguments = (hidden_states, temb) if isinstance(downsampler, ResBlock) else (hidden_states,)
            hidden_states = self.run(downsampler, *arguments)
            skips += (hidden_states,)
        return hidden_states, skips


class MidBlock(_Block):
    """Residual block, attention (or none), residual block. Text nets may have the first block alone."""

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, context: TextContext | None = None
    ) -> torch.Tensor:
        hidden_states = self.run(self.resnets[0], hidden_states, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                hidden_states = self.attend(attention, hidden_states, context)
            hidden_states = self.run(resnet, hidden_states, temb)
        return hidden_states


class UpBlock(_Block):
    """Residual blocks, each after joining one skip connection (the last one stored first), then the upsampler."""

    def __init__(
        self,
        resnets: list[ResBlock],
        attentions: list[BlockAttention | None],
        upsampler: nn.Module | None,
        skip_time_act: bool = False,
    ):
        super().__init__(resnets, attentions, skip_time_act)
        self.upsamplers = nn.ModuleList([upsampler]) if upsampler is not None else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        skips: tuple[torch.Tensor, ...],
        temb: torch.Tensor,
        context: TextContext | None = None,
    ) -> torch.Tensor:
        for resnet, attention, skip in zip(self.resnets, self.attentions, reversed(skips), strict=True):
            hidden_states = self.run(resnet, torch.cat([hidden_states, skip], dim=1), temb)
            if attention is not None:
                hidden_states = self.attend(attention, hidden_states, context)
        if self.upsamplers is not None:
            upsampler = self.upsamplers[0]
            arguments = (hidden_states, temb) if isinstance(upsampler, ResBlock) else (hidden_states,)
            hidden_states = self.run(upsampler, *arguments)
        return hidden_states


class BlockFactory:
    """
    Builds the blocks of one network: what U-Net and classifier share. Levels count from the highest resolution; what
    may differ by level is a list with one entry a level.

    Args:
        config (`FrozenDict`): Of the network; the arguments that both have mean the same, and the classifier, which
            reads no text, lacks those about text.
        temb_channels (`int`): Width of the conditioning vector.
    """

    def __init__(self, config: Any, temb_channels: int):
        levels = len(config.block_out_channels)
        self.block_out_channels = config.block_out_channels
        self.norm_num_groups = config.norm_num_groups
        self.norm_eps = config.norm_eps
        self.attention_head_dim = per_level(config.attention_head_dim, levels)
        self.num_attention_heads = per_level(config.num_attention_heads, levels)
        self.residual_scale_factor = config.get("resnet_out_scale_factor", 1.0)
        self.skip_time_act = config.get("resnet_skip_time_act", False)
        self.use_linear_projection = config.get("use_linear_projection", False)
        self.upcast_attention = config.get("upcast_attention", False)
        self.cross_attention_norm = config.get("cross_attention_norm")
        self.cross_attention_dim = per_level(config.get("cross_attention_dim"), levels)
        self.only_cross_attention = per_level(config.get("only_cross_attention", False), levels)
        self.res_block = functools.partial(
            ResBlock,
            temb_channels=temb_channels,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            act_fn=config.act_fn,
            time_injection=config.resnet_time_scale_shift,
            dropout=config.dropout,
        )

    def heads(
        self,
        level: int,
        kind: AttentionKind = "self",
        num_heads: int | None = None,
        head_level: int | None = None,
    ) -> tuple[int, int]:
        """
        Number and width of the heads of a level; `num_heads` wins over those of the network, and `head_level` is where
        else their width is read (see `up_blocks`).
        """
        channels = self.block_out_channels[level]
        if num_heads is None:
            num_heads = self.num_attention_heads[level]
        if num_heads is None and kind == "transformer":
            num_heads = self.attention_head_dim[level]
        if num_heads is not None:
            return num_heads, channels // num_heads
        head_dim = self.attention_head_dim[level if head_level is None else head_level] or channels
        return channels // head_dim, head_dim

    def self_attention(
        self,
        level: int,
        groups: int | None,
        rescale: float = 1.0,
        num_heads: int | None = None,
        head_level: int | None = None,
    ) -> Attention:
        num_heads, head_dim = self.heads(level, num_heads=num_heads, head_level=head_level)
        attention = Attention(
            self.block_out_channels[level],
            heads=num_heads,
            dim_head=head_dim,
            norm_num_groups=groups,
            eps=self.norm_eps,
            rescale_output_factor=rescale,
            residual_connection=True,
            bias=True,
            upcast_softmax=True,
            # Lets `from_pretrained` rename the `query/key/value/proj_attn` of files from 2022.
            _from_deprecated_attn_block=True,
        )
        zero_init(attention.to_out[0])
        return attention

    def transformer_block(
        self, level: int, num_layers: int, only_cross_attention: bool, num_heads: int | None = None
    ) -> Transformer2DModel:
        """`num_layers` times: attention to the image, attention to the text, GEGLU feed-forward."""
        num_heads, head_dim = self.heads(level, "transformer", num_heads)
        block = Transformer2DModel(
            num_heads,
            head_dim,
            in_channels=self.block_out_channels[level],
            num_layers=num_layers,
            cross_attention_dim=self.cross_attention_dim[level],
            norm_num_groups=self.norm_num_groups,
            only_cross_attention=only_cross_attention,
            use_linear_projection=self.use_linear_projection,
            upcast_attention=self.upcast_attention,
        )
        zero_init(block.proj_out)
        return block

    def added_kv_attention(
        self, level: int, only_cross_attention: bool, head_level: int | None = None, num_heads: int | None = None
    ) -> Attention:
        channels = self.block_out_channels[level]
        num_heads, head_dim = self.heads(level, num_heads=num_heads, head_level=head_level)
        attention = AddedKVAttention(
            channels,
            cross_attention_dim=channels,
            heads=num_heads,
            dim_head=head_dim,
            added_kv_proj_dim=self.cross_attention_dim[level],
            norm_num_groups=self.norm_num_groups,
            bias=True,
            upcast_softmax=True,
            only_cross_attention=only_cross_attention,
            cross_attention_norm=self.cross_attention_norm,
            processor=AttnAddedKVProcessor2_0(),
        )
        zero_init(attention.to_out[0])
        return attention

    def layers(
        self, spec: BlockSpec, level: int, in_channels: list[int], depths: tuple[int, ...], **heads: int | None
    ) -> tuple[list[ResBlock], list[BlockAttention | None]]:
        """Residual blocks for these inputs, each with the attention that follows it (of these depths, if any)."""
        scale = self.residual_scale_factor if spec.resample == "resnet" else 1.0
        resnets, attentions = [], []
        for channels, depth in zip(in_channels, depths, strict=True):
            resnets.append(self.res_block(channels, self.block_out_channels[level], output_scale_factor=scale))
            only_cross_attention = self.only_cross_attention[level]
            attention = None
            if spec.attention == "self":
                attention = self.self_attention(level, self.norm_num_groups, **heads)
            elif spec.attention == "transformer":
                attention = self.transformer_block(level, depth, only_cross_attention, heads.get("num_heads"))
            elif spec.attention == "added_kv":
                attention = self.added_kv_attention(level, only_cross_attention, **heads)
            attentions.append(attention)
        return resnets, attentions

    def skips_time_act(self, spec: BlockSpec) -> bool:
        return self.skip_time_act and spec.resample == "resnet"

    def resampler(
        self, spec: BlockSpec, level: int, way: Literal["down", "up"], default: ResampleKind, padding: int = 1
    ) -> nn.Module:
        channels = self.block_out_channels[level]
        if (spec.resample or default) == "resnet":
            scale = self.residual_scale_factor if spec.resample == "resnet" else 1.0
            return self.res_block(channels, channels, resample=way, output_scale_factor=scale)
        return Downsample(channels, padding) if way == "down" else Upsample(channels)

    def down_blocks(
        self,
        block_types: tuple[str, ...],
        layers_per_block: int | tuple[int, ...],
        downsample_type: ResampleKind,
        padding: int = 1,
        transformer_layers: int | tuple = 1,
    ) -> tuple[nn.ModuleList, list[int]]:
        """One block a level, and the channels of the skip connections, that of the input convolution first."""
        levels = len(block_types)
        blocks = nn.ModuleList()
        skip_channels = [self.block_out_channels[0]]
        for level, block_type in enumerate(block_types):
            spec, channels = DOWN_BLOCK_TYPES[block_type], self.block_out_channels[level]
            number = per_level(layers_per_block, levels)[level]
            in_channels = [skip_channels[-1]] + [channels] * (number - 1)
            depths = per_level(per_level(transformer_layers, levels)[level], number)
            resnets, attentions = self.layers(spec, level, in_channels, depths)
            skip_channels += [channels] * number
            downsampler = None
            if level < levels - 1:
                downsampler = self.resampler(spec, level, "down", downsample_type, padding)
                skip_channels.append(channels)
            blocks.append(DownBlock(resnets, attentions, downsampler, self.skips_time_act(spec)))
        return blocks, skip_channels

    def up_blocks(
        self,
        block_types: tuple[str, ...],
        layers_per_block: int | tuple[int, ...],
        upsample_type: ResampleKind,
        skip_channels: list[int],
        transformer_layers: tuple = (),
        num_heads: int | None = None,
    ) -> nn.ModuleList:
        """The way back: each residual block takes the newest skip connection that is left."""
        levels = len(block_types)
        blocks = nn.ModuleList()
        channels, skip_channels = self.block_out_channels[-1], list(skip_channels)
        for index, block_type in enumerate(block_types):
            level, spec = levels - 1 - index, UP_BLOCK_TYPES[block_type]
            number = per_level(layers_per_block, levels)[level] + 1
            in_channels = []
            for _ in range(number):
                in_channels.append(channels + skip_channels.pop())
                channels = self.block_out_channels[level]
            depths = per_level(transformer_layers[index] if transformer_layers else 1, number)
            # diffusers reads a list of head widths from the front on the way up as well; its models are trained so.
            resnets, attentions = self.layers(spec, level, in_channels, depths, head_level=index, num_heads=num_heads)
            upsampler = self.resampler(spec, level, "up", upsample_type) if level > 0 else None
            blocks.append(UpBlock(resnets, attentions, upsampler, self.skips_time_act(spec)))
        return blocks

    def mid_block(
        self,
        kind: AttentionKind | None,
        groups: int | None = None,
        scale_factor: float = 1.0,
        depth: int = 1,
        only_cross_attention: bool = False,
        num_resnets: int = 2,
    ) -> MidBlock:
        level, channels = len(self.block_out_channels) - 1, self.block_out_channels[-1]
        attention = None
        if kind == "self":
            attention = self.self_attention(level, groups, scale_factor)
        elif kind == "transformer":
            attention = self.transformer_block(level, depth, only_cross_attention=False)
        elif kind == "added_kv":
            attention = self.added_kv_attention(level, only_cross_attention)
        resnets = [self.res_block(channels, channels, output_scale_factor=scale_factor) for _ in range(num_resnets)]
        return MidBlock(resnets, [attention] * (num_resnets - 1), self.skip_time_act and kind == "added_kv")


def _entries(config: Any, name: str) -> tuple:
    """An argument by level; a list must have one entry for each."""
    value, levels = config[name], len(config.block_out_channels)
    if isinstance(value, (list, tuple)) and len(value) != levels:
        raise ValueError(f"`{name}` has {len(value)} entries for {levels} levels. Give one per level.")
    return per_level(value, levels)


def check_levels(config: Any, down_block_types: tuple[str, ...]) -> None:
    """Raises a `ValueError` where a network's config does not describe the levels of an encoder."""
    levels = len(config.block_out_channels)
    if len(down_block_types) != levels:
        raise ValueError(
            f"`down_block_types` has {len(down_block_types)} entries {tuple(down_block_types)} but "
            f"`block_out_channels` has {levels} {tuple(config.block_out_channels)}. Give one block type per level."
        )
    for block_type in down_block_types:
        _check_choice("down_block_types", block_type, DOWN_BLOCK_TYPES)
    _check_choice("resnet_time_scale_shift", config.resnet_time_scale_shift, get_args(TimeInjection))
    _check_choice("downsample_type", config.downsample_type, get_args(ResampleKind))
    _check_choice("act_fn", config.act_fn, ADAGN_ACTIVATIONS)
    groups = config.norm_num_groups
    for channels in config.block_out_channels:
        if not isinstance(groups, int) or groups < 1 or channels % groups:
            raise ValueError(
                f"`norm_num_groups` is {groups}, but every entry of `block_out_channels` "
                f"{tuple(config.block_out_channels)} must be a multiple of it. Choose a common divisor, at best 32."
            )
    if min(_entries(config, "layers_per_block")) < 1:
        raise ValueError(f"`layers_per_block` is {config.layers_per_block}; each level needs one at least.")


def check_heads(config: Any, kinds: list[AttentionKind | None], name: str = "num_attention_heads") -> None:
    """Raises a `ValueError` where the heads do not fit the channels of a level that attends."""
    numbers, widths = _entries(config, name), _entries(config, "attention_head_dim")
    for level, (channels, kind) in enumerate(zip(config.block_out_channels, kinds, strict=True)):
        number, width = numbers[level], widths[level]
        if kind is not None and number is not None and (number < 1 or channels % number):
            raise ValueError(f"`{name}` is {number}; it must divide the {channels} channels of level {level}.")
        if kind == "transformer" and number is None and (width is None or width < 1 or channels % width):
            raise ValueError(
                f"`attention_head_dim` is {width}, in transformer blocks the number of heads; it must divide the "
                f"{channels} channels of level {level}. Or set `num_attention_heads`."
            )
        if kind in ("self", "added_kv") and number is None and width is not None and not 1 <= width <= channels:
            raise ValueError(
                f"`attention_head_dim` is {width}; it must lie between 1 and the {channels} channels of level "
                f"{level}, which has attention. Choose a divisor of {channels}, or set `num_attention_heads`."
            )


def check_sample(sample: torch.Tensor, timestep: torch.Tensor | float | int, in_channels: int, levels: int) -> None:
    """Raises a `ValueError`, or a `TypeError`, for what a network with `levels` levels cannot take."""
    if sample.ndim != 4 or sample.shape[1] != in_channels:
        raise ValueError(
            f"`sample` has shape {tuple(sample.shape)}; this model takes (batch_size, {in_channels}, height, width). "
            f"Pass {in_channels} channels, or build a model with another `in_channels`."
        )
    if not sample.is_floating_point():
        raise TypeError(
            f"`sample` is {sample.dtype}; floating point numbers are needed, images scaled to [-1, 1]. Convert 8-bit "
            "images by `images.float() / 127.5 - 1`."
        )
    factor = 2 ** (levels - 1)
    height, width = sample.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"`sample` is {height} x {width}; both must be divisible by {factor}, the total downsampling of this "
            f"model. Pad or crop to {math.ceil(height / factor) * factor} x {math.ceil(width / factor) * factor}."
        )
    if torch.is_tensor(timestep) and timestep.ndim > 0 and timestep.shape not in ((1,), (sample.shape[0],)):
        raise ValueError(
            f"`timestep` has shape {tuple(timestep.shape)} for {sample.shape[0]} examples. Pass one number, or one for "
            "each example."
        )


def expand_timesteps(timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
    """One timestep an example, `(batch_size,)`, on the device of `sample`."""
    timesteps = torch.as_tensor(timestep, device=sample.device)
    if timesteps.ndim == 0 or timesteps.shape[0] == 1:
        timesteps = timesteps.expand(sample.shape[0])
    return timesteps


class ResBlockCompileMixin(ModelMixin):
    """`compile_repeated_blocks` compiles the residual blocks, of which these networks have many kinds."""

    _repeated_blocks = ["ResBlock"]

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers: compiles each residual block with the given arguments of `torch.compile`."""
        # torch compiles one function 8 times and then gives up, or raises for `fullgraph=True`. To it all residual
        # blocks are one function, and ADM's 64x64 net has 23 widths of them: let it be 8 times for each block.
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # older versions have a global one alone
            number = sum(isinstance(module, ResBlock) for module in self.modules())
            kwargs.setdefault("recompile_limit", number * torch._dynamo.config.recompile_limit)
        super().compile_repeated_blocks(*args, **kwargs)


class TimeEmbedding(NamedTuple):
    """What residual blocks are conditioned by, `(B, time_embed_dim)`: as it is, and with their first activation."""

    emb: torch.Tensor
    activated_emb: torch.Tensor

    def of(self, block: nn.Module) -> torch.Tensor:
        return self.emb if block.skip_time_act else self.activated_emb


class EncoderMixin(ResBlockCompileMixin):
    """
    What a U-Net and its ControlNet share: the embedding of time, class and text, the way down and the middle, with one
    set of names for arguments and parameters. All of it reads `self.config`.
    """

    reads_text: bool
    embedding_act_fn: AdaGNActivation
    time_embed_dim: int

    def _check_encoder(self, down_block_types: tuple[str, ...]) -> None:
        """Raises a `ValueError` for what would otherwise fail late, or build something else than was asked for."""
        config = self.config
        levels = len(config.block_out_channels)
        check_levels(config, down_block_types)
        _check_choice("mid_block_type", config.mid_block_type, (*MID_BLOCK_TYPES, None))
        _check_choice("time_embedding_type", config.time_embedding_type, get_args(TimeEmbeddingType))
        _check_choice("class_embed_type", config.class_embed_type, (*get_args(ClassEmbedType), None))

        mid_kind = MID_BLOCK_TYPES.get(config.mid_block_type)
        if mid_kind == "self" and (self.reads_text or not config.add_attention):
            mid_kind = None
        has_mid_attention = mid_kind == "self"
        groups, channels = config.attn_norm_num_groups, config.block_out_channels[-1]
        if has_mid_attention and groups is not None and (groups < 1 or channels % groups):
            raise ValueError(
                f"`attn_norm_num_groups` is {groups}; it must divide the {channels} channels of the middle block."
            )
        if config.time_embedding_type == "learned":
            if config.num_train_timesteps is None:
                raise ValueError('`time_embedding_type="learned"` needs `num_train_timesteps`, the rows of its table.')
            if config.timestep_scale != 1.0:
                raise ValueError(
                    f"`timestep_scale` is {config.timestep_scale}, but the table of "
                    '`time_embedding_type="learned"` has rows for whole timesteps alone. Leave `timestep_scale` at 1.0.'
                )
        if config.class_embed_type is not None and config.num_class_embeds is not None:
            raise ValueError(
                f"`class_embed_type` is {config.class_embed_type!r} and `num_class_embeds` is "
                f"{config.num_class_embeds}: only `class_embed_type=None` has a table. Drop one of them."
            )
        if config.null_class_id is not None and not 0 <= config.null_class_id < (config.num_class_embeds or 0):
            raise ValueError(
                f"`null_class_id` is {config.null_class_id}; it must name one of the `num_class_embeds` "
                f"({config.num_class_embeds}) rows of the class embedding. Count the null class as one of them."
            )

        check_heads(config, [DOWN_BLOCK_TYPES[block_type].attention for block_type in down_block_types])
        if mid_kind is not None:
            check_heads(config, [None] * (levels - 1) + [mid_kind])
        self._check_text_config()

    def _check_text_config(self) -> None:
        config = self.config
        for name, value in NEUTRAL_ARGUMENTS.items():
            if config.get(name, value) != value:
                raise ValueError(
                    f"`{name}` is {config[name]!r}, for a part that this family does not have; it must stay {value!r}. "
                    "Load such a model with `diffusers.UNet2DConditionModel`."
                )
        for name in ("cross_attention_dim", "transformer_layers_per_block", "only_cross_attention"):
            _entries(config, name)
        self._check_transformer_layers()
        _check_choice("cross_attention_norm", config.cross_attention_norm, ("layer_norm", "group_norm", None))
        _check_choice("addition_embed_type", config.addition_embed_type, (*get_args(AdditionEmbedType), None))
        _check_choice("encoder_hid_dim_type", config.encoder_hid_dim_type, ("text_proj", None))
        _check_choice("time_embedding_act_fn", config.time_embedding_act_fn, (*ADAGN_ACTIVATIONS, None))
        pools_text = config.addition_embed_type == "text" and config.encoder_hid_dim is None
        if pools_text and not isinstance(config.cross_attention_dim, int):
            raise ValueError(
                f"`addition_embed_type` is 'text' and `cross_attention_dim` is {config.cross_attention_dim}: states "
                "are pooled once, from one width. Pass one number."
            )
        if config.encoder_hid_dim_type is not None and config.encoder_hid_dim is None:
            raise ValueError("`encoder_hid_dim_type` needs `encoder_hid_dim`, the width of the states to project.")
        if not self.reads_text:
            for name in ("encoder_hid_dim", "addition_embed_type"):
                if config[name] is not None:
                    raise ValueError(
                        f"`{name}` is {config[name]!r}, but none of the block types has cross-attention. Leave it out, "
                        "or choose such block types."
                    )
        if config.encoder_hid_dim is not None and not isinstance(config.cross_attention_dim, int):
            raise ValueError(
                f"`encoder_hid_dim` is {config.encoder_hid_dim} and `cross_attention_dim` is "
                f"{config.cross_attention_dim}: states are projected once, to one width. Pass one number."
            )
        if (config.class_embed_type == "projection") != (config.projection_class_embeddings_input_dim is not None):
            raise ValueError(
                f"`class_embed_type` is {config.class_embed_type!r} and `projection_class_embeddings_input_dim` is "
                f"{config.projection_class_embeddings_input_dim}: 'projection' and the width of what it projects go "
                "together."
            )
        if self.reads_text and config.time_embedding_type != "positional":
            raise ValueError(
                f"`time_embedding_type` is {config.time_embedding_type!r}; networks with text have 'positional' alone."
            )

    def _check_transformer_layers(self) -> None:
        config, levels = self.config, len(self.config.block_out_channels)
        number = per_level(config.layers_per_block, levels)
        depths, depths_up = config.transformer_layers_per_block, config.get("reverse_transformer_layers_per_block")
        nested = any(isinstance(depth, (list, tuple)) for depth in per_level(depths, levels))
        if depths_up is not None and len(depths_up) != levels:
            raise ValueError(
                f"`reverse_transformer_layers_per_block` has {len(depths_up)} entries for {levels} levels. Give one "
                "per level, the lowest resolution first."
            )
        if nested and depths_up is None and "up_block_types" in config:
            raise ValueError(
                f"`transformer_layers_per_block` is {depths}, with a number for each block of a level. The way up has "
                "one block more: pass `reverse_transformer_layers_per_block` as well."
            )
        ways = {
            "transformer_layers_per_block": (per_level(depths, levels), number),
            "reverse_transformer_layers_per_block": (depths_up or (), [n + 1 for n in reversed(number)]),
        }
        for name, (entries, blocks) in ways.items():
            for entry, expected in zip(entries, blocks, strict=False):
                if isinstance(entry, (list, tuple)) and len(entry) != expected:
                    raise ValueError(
                        f"`{name}` holds {tuple(entry)} for a level of {expected} blocks. Give one number a block, or "
                        "one for all."
                    )

    def _build_encoder(self, down_block_types: tuple[str, ...]) -> tuple[BlockFactory, list[int]]:
        """Adds the layers; returns what builds further blocks, and the channels of the skip connections."""
        config = self.config
        levels = len(config.block_out_channels)
        # `act_fn` reaches further in nets with text than in those without.
        self.embedding_act_fn = act_fn = config.act_fn if self.reads_text else "silu"
        self.time_embed_dim = time_embed_dim = config.time_embedding_dim or 4 * config.block_out_channels[0]
        time_proj_dim = config.time_proj_dim or config.block_out_channels[0]

        # 1. input
        self.conv_in = nn.Conv2d(config.in_channels, config.block_out_channels[0], kernel_size=3, padding=1)

        # 2. time and class
        timestep_input_dim = time_proj_dim
        if config.time_embedding_type == "fourier":
            self.time_proj = GaussianFourierProjection(embedding_size=time_proj_dim, scale=16)
            timestep_input_dim = 2 * time_proj_dim
        elif config.time_embedding_type == "positional":
            self.time_proj = Timesteps(time_proj_dim, config.flip_sin_to_cos, config.freq_shift)
        else:
            self.time_proj = nn.Embedding(config.num_train_timesteps, time_proj_dim)
        self.time_embedding = TimestepEmbedding(
            timestep_input_dim, time_embed_dim, act_fn=act_fn, cond_proj_dim=config.time_cond_proj_dim
        )

        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(timestep_input_dim, time_embed_dim, act_fn=act_fn)
        elif config.class_embed_type == "projection":
            self.class_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, time_embed_dim)
        elif config.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_embed_dim)
        else:
            self.class_embedding = None

        # 3. text
        self.encoder_hid_proj = None
        if config.encoder_hid_dim is not None:
            self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, per_level(config.cross_attention_dim, 1)[0])
        self.add_embedding = None
        if config.addition_embed_type == "text":
            text_dim = config.encoder_hid_dim or config.cross_attention_dim
            self.add_embedding = TextTimeEmbedding(
                text_dim, time_embed_dim, num_heads=config.addition_embed_type_num_heads
            )

        factory = BlockFactory(config, time_embed_dim)

        # 4. down
        depths = per_level(config.transformer_layers_per_block, levels)
        self.down_blocks, skip_channels = factory.down_blocks(
            down_block_types, config.layers_per_block, config.downsample_type, config.downsample_padding, depths
        )

        # 5. middle
        self.mid_block = None
        if config.mid_block_type is not None:
            kind = MID_BLOCK_TYPES[config.mid_block_type]
            groups = config.attn_norm_num_groups
            if groups is None and config.resnet_time_scale_shift == "default":
                groups = config.norm_num_groups
            only_cross_attention = config.mid_block_only_cross_attention
            if only_cross_attention is None:
                only_cross_attention = config.only_cross_attention is True
            self.mid_block = factory.mid_block(
                kind if config.add_attention or kind != "self" else None,
                groups,
                config.mid_block_scale_factor,
                depth=per_level(depths[-1], 1)[0],
                only_cross_attention=only_cross_attention,
                # In nets with text a plain middle is one residual block alone.
                num_resnets=1 if kind == "self" and self.reads_text else 2,
            )
        return factory, skip_channels

    def _embed(
        self,
        timesteps: torch.Tensor,
        dtype: torch.dtype,
        *,
        class_labels: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
        timestep_cond: torch.Tensor | None,
    ) -> TimeEmbedding:
        """Time, class and pooled text, for `(B,)` timesteps, in `dtype`."""
        config = self.config
        scaled_timesteps = timesteps
        if config.timestep_scale != 1.0:
            scaled_timesteps = timesteps.float() * config.timestep_scale
        # The sinusoid is float32 whatever the timesteps are; a half-precision embedding needs it in its own dtype.
        if timestep_cond is not None:
            timestep_cond = timestep_cond.to(dtype)
        emb = self.time_embedding(self.time_proj(scaled_timesteps).to(dtype), timestep_cond)
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full_like(timesteps, config.null_class_id, dtype=torch.long)
            if config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels)
            if class_labels.is_floating_point():
                class_labels = class_labels.to(dtype)
            emb = emb + self.class_embedding(class_labels).to(emb.dtype)
        if config.addition_embed_type == "text":
            emb = emb + self.add_embedding(encoder_hidden_states)
        elif config.addition_embed_type == "text_embeds":
            emb = emb + added_cond_kwargs["text_embeds"].to(emb.dtype)
        if config.time_embedding_act_fn is not None:
            emb = ADAGN_ACTIVATIONS[config.time_embedding_act_fn](emb)
        # Every residual block starts with this activation: once here instead of once in each.
        return TimeEmbedding(emb, ADAGN_ACTIVATIONS[config.act_fn](emb))

    def _text_context(
        self,
        dtype: torch.dtype,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        cross_attention_kwargs: dict[str, Any] | None,
    ) -> TextContext | None:
        if not self.reads_text:
            return None
        if self.encoder_hid_proj is not None:
            encoder_hidden_states = self.encoder_hid_proj(encoder_hidden_states)  # (B, L, cross_attention_dim)
        return TextContext(
            encoder_hidden_states,
            _mask_to_bias(attention_mask, dtype),
            _mask_to_bias(encoder_attention_mask, dtype),
            cross_attention_kwargs or {},
        )

    def _encode(
        self, hidden_states: torch.Tensor, temb: TimeEmbedding, context: TextContext | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The way down and the middle: its output, and the skip connections, that of the input convolution first."""
        skips = (hidden_states,)
        for block in self.down_blocks:
            hidden_states, block_skips = block(hidden_states, temb.of(block), context)
            skips += block_skips
        if self.mid_block is not None:
            hidden_states = self.mid_block(hidden_states, temb.of(self.mid_block), context)
        return hidden_states, skips

    def _check_conditions(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        *,
        class_labels: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
        timestep_cond: torch.Tensor | None,
    ) -> None:
        """Raises the `ValueError`s and `TypeError`s of `forward`."""
        check_sample(sample, timestep, self.config.in_channels, len(self.config.block_out_channels))
        self._check_class_labels(sample, class_labels)
        self._check_timestep_cond(sample, timestep_cond)
        self._check_text(sample, encoder_hidden_states, encoder_attention_mask, added_cond_kwargs)

    def _check_timestep_cond(self, sample: torch.Tensor, timestep_cond: torch.Tensor | None) -> None:
        width = self.config.time_cond_proj_dim
        if timestep_cond is None:
            return
        if width is None:
            raise ValueError(
                "`timestep_cond` was given to a model without `time_cond_proj_dim`, which takes none. Leave it at None."
            )
        if tuple(timestep_cond.shape) != (sample.shape[0], width):
            raise ValueError(
                f"`timestep_cond` has shape {tuple(timestep_cond.shape)}; this model takes {(sample.shape[0], width)}, "
                "one vector an example."
            )

    def _check_text(
        self,
        sample: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
    ) -> None:
        config = self.config
        if self.reads_text != (encoder_hidden_states is not None):
            raise ValueError(
                "`encoder_hidden_states` are missing: this model has cross-attention. Pass (batch_size, L, width)."
                if self.reads_text
                else "`encoder_hidden_states` were given to a model without cross-attention. Leave them out."
            )
        if self.reads_text:
            widths = per_level(config.encoder_hid_dim or config.cross_attention_dim, 1)
            states = encoder_hidden_states
            if states.ndim != 3 or states.shape[0] != sample.shape[0] or states.shape[-1] not in widths:
                raise ValueError(
                    f"`encoder_hidden_states` has shape {tuple(states.shape)} for {sample.shape[0]} examples; this "
                    f"model takes ({sample.shape[0]}, length, {widths[0]})."
                )
            if encoder_attention_mask is not None and encoder_attention_mask.shape != states.shape[:2]:
                raise ValueError(
                    f"`encoder_attention_mask` has shape {tuple(encoder_attention_mask.shape)}; these states need "
                    f"{tuple(states.shape[:2])}, one number a state."
                )
        if config.addition_embed_type == "text_embeds":
            pooled, expected = (added_cond_kwargs or {}).get("text_embeds"), (len(sample), self.time_embed_dim)
            if pooled is None or tuple(pooled.shape) != expected:
                raise ValueError(
                    f"`added_cond_kwargs` {'lack' if pooled is None else f'hold {tuple(pooled.shape)} as'} "
                    f"`text_embeds`: this model adds a pooled text, {expected}, to the time embedding."
                )

    def _check_class_labels(self, sample: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        config = self.config
        label_ndim = 2 if config.class_embed_type in ("identity", "projection") else 1
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError(
                    "`class_labels` were given to a model without class embedding. Leave them out, or build the model "
                    "with `num_class_embeds`."
                )
        elif class_labels is None:
            if config.null_class_id is None:
                raise ValueError(
                    "`class_labels` are missing: this model is class-conditional and its config names no "
                    "`null_class_id`. Pass one label per example."
                )
        elif class_labels.shape[:1] != sample.shape[:1] or class_labels.ndim != label_ndim:
            raise ValueError(
                f"`class_labels` has shape {tuple(class_labels.shape)} for {sample.shape[0]} examples. Pass one label "
                "for each example, shape (batch_size,); for `class_embed_type` identity and projection one vector each."
            )
        elif isinstance(self.class_embedding, nn.Embedding) and class_labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"`class_labels` are {class_labels.dtype}, but this model has a table of classes and takes their "
                "numbers. Pass `class_labels.long()`."
            )
        elif (
            isinstance(self.class_embedding, nn.Embedding)
            and class_labels.device.type == "cpu"
            and not torch.compiler.is_compiling()
        ):
            low, high = int(class_labels.min()), int(class_labels.max())
            if low < 0 or high >= config.num_class_embeds:
                raise ValueError(
                    f"`class_labels` reach from {low} to {high}; this model has the classes 0 to "
                    f"{config.num_class_embeds - 1}."
                )


class AdaGNUNet2DModel(EncoderMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    U-Net that predicts noise (and, with twice the output channels, a variance) from a noisy image and a timestep.

    It takes every argument of diffusers' [`UNet2DModel`] under the same name and with the same default, loads its
    repositories with `from_pretrained`, and gives the same numbers; so it does for those layouts of
    [`UNet2DConditionModel`] that condition on text by cross-attention. What a config leaves out has the default of the
    class that it names; one without a class but with cross-attention is read as `UNet2DConditionModel`'s. The last
    convolution or projection of every residual branch, of every attention and of the network starts at zero, as in
    ADM, so an untrained model predicts exactly 0.

    Args:
        sample_size (`int` or `tuple[int, int]`, *optional*): Height and width of the samples that pipelines draw. The
            network itself takes any size divisible by `2 ** (len(block_out_channels) - 1)`.
        in_channels (`int`, defaults to 3): Channels of the input.
        out_channels (`int`, defaults to 3): Channels of the output, literally: 2 x the image channels for a model with
            learned variance (mean first, variance second).
        center_input_sample (`bool`, defaults to `False`): Map inputs in [0, 1] to [-1, 1] first.
        time_embedding_type (`str`, defaults to `"positional"`): `"positional"` (sinusoid), `"fourier"` (random Fourier
            features of log t; the output is divided by t, as in score-based models) or `"learned"` (a table).
        time_embedding_dim (`int`, *optional*): Width of the time embedding; `None`: `4 * block_out_channels[0]`.
        freq_shift (`int`, defaults to 0), flip_sin_to_cos (`bool`, defaults to `True`): Conventions of the sinusoid.
        down_block_types (`tuple[str]`): One of `"DownBlock2D"`, `"AttnDownBlock2D"` (self-attention after each residual
            block), `"ResnetDownsampleBlock2D"` (residual downsampling), `"CrossAttnDownBlock2D"` (transformer blocks
            that attend to the text) or `"SimpleCrossAttnDownBlock2D"` (attention to image and text at once, residual
            downsampling) per level.
        mid_block_type (`str`, *optional*, defaults to `"UNetMidBlock2D"`): `None` leaves the middle out. Networks with
            text name theirs: `"UNetMidBlock2DCrossAttn"`, `"UNetMidBlock2DSimpleCrossAttn"`, or `"UNetMidBlock2D"`,
            which is then one residual block without attention, as in `UNet2DConditionModel`.
        up_block_types (`tuple[str]`): `"UpBlock2D"`, `"AttnUpBlock2D"`, `"ResnetUpsampleBlock2D"`,
            `"CrossAttnUpBlock2D"`, `"SimpleCrossAttnUpBlock2D"`, from the lowest resolution up.
        block_out_channels (`tuple[int]`, defaults to `(224, 448, 672, 896)`): Channels per level.
        layers_per_block (`int` or `tuple[int]`, defaults to 2): Residual blocks per level on the way down; one more on
            the way up.
        mid_block_scale_factor (`float`, defaults to 1): Divides the sums in the middle block.
        downsample_padding (`int`, defaults to 1): Padding of the downsampling convolution; 0 pads one side only.
        downsample_type, upsample_type (`str`, default to `"conv"`): `"conv"` or `"resnet"` (residual), for the block
            types with attention; the other block types say it in their names.
        dropout (`float`, defaults to 0.0): Before the second convolution of each residual block.
        act_fn (`str`, defaults to `"silu"`): `"silu"`, `"swish"` (the same), `"mish"`, `"gelu"` or `"relu"`, in the
            residual blocks; in networks with text also in time embedding and head, which are SiLU elsewhere, as in
            diffusers.
        attention_head_dim (`int` or `tuple[int]`, *optional*, defaults to 8): Channels of an attention head; `None`:
            one head. In transformer blocks, as in diffusers, the number of heads.
        norm_num_groups (`int`, defaults to 32): Groups of every group norm.
        attn_norm_num_groups (`int`, *optional*): Groups of the norm before the attention in the middle. `None`:
            `norm_num_groups` for `resnet_time_scale_shift="default"`, *no norm* for `"scale_shift"`, as in diffusers.
        norm_eps (`float`, defaults to 1e-5): Epsilon of every group norm.
        resnet_time_scale_shift (`str`, defaults to `"default"`): `"default"` adds the time embedding, `"scale_shift"`
            is AdaGN.
        add_attention (`bool`, defaults to `True`): Attention in the middle block.
        class_embed_type (`str`, *optional*): `None` (a table of `num_class_embeds` rows), `"timestep"` (the sinusoid of
            a number), `"identity"` (vectors, added as they are) or `"projection"` (vectors, through two layers).
        num_class_embeds (`int`, *optional*): Rows of the class embedding, the null class included.
        num_train_timesteps (`int`, *optional*): Rows of the table of `time_embedding_type="learned"`.
        cross_attention_dim (`int` or `tuple[int]`, defaults to 1280): Width of the text's states, for all levels or per
            level.
        transformer_layers_per_block (`int` or `tuple`, defaults to 1): Layers of each transformer block, for all levels
            or per level; a level's may be a tuple with one number for each of its blocks.
        reverse_transformer_layers_per_block (`tuple`, *optional*): The same on the way up, from the lowest resolution;
            `None`: as on the way down.
        use_linear_projection (`bool`, defaults to `False`): Linear instead of convolutional projections into and out of
            transformer blocks (Stable Diffusion 2).
        upcast_attention (`bool`, defaults to `False`): Scores of transformer blocks in float32.
        only_cross_attention (`bool` or `tuple[bool]`, defaults to `False`): The image attends to the text alone.
        mid_block_only_cross_attention (`bool`, *optional*): The same for added keys and values in the middle; `None`:
            `only_cross_attention`, where that is one `bool`.
        cross_attention_norm (`str`, *optional*): `"layer_norm"` or `"group_norm"` of the states before added keys and
            values.
        encoder_hid_dim (`int`, *optional*): Width of states that are projected to `cross_attention_dim` first.
        encoder_hid_dim_type (`str`, *optional*): `"text_proj"`, or `None`, which means the same where `encoder_hid_dim`
            is given.
        addition_embed_type (`str`, *optional*): Pooled text in the time embedding: `"text"` (states pooled by attention
            here, DeepFloyd IF) or `"text_embeds"` (`added_cond_kwargs["text_embeds"]`, added as it is, GLIDE).
        addition_embed_type_num_heads (`int`, defaults to 64): Heads of the pooling of `"text"`.
        projection_class_embeddings_input_dim (`int`, *optional*): Width of the vectors of
            `class_embed_type="projection"`.
        resnet_skip_time_act (`bool`, defaults to `False`): Residual blocks at levels with residual resampling take the
            time embedding without an activation (DeepFloyd IF).
        resnet_out_scale_factor (`float`, defaults to 1.0): Divides the sums of those blocks.
        time_embedding_act_fn (`str`, *optional*): Activation of the finished time embedding.
        time_cond_proj_dim (`int`, *optional*): Width of `timestep_cond`, a vector that is projected and added to the
            sinusoid of the timestep. Upsamplers learn the noise on their small image from it.
        dual_cross_attention (`bool`, defaults to `False`), attention_type (`str`, defaults to `"default"`),
            class_embeddings_concat (`bool`, defaults to `False`), addition_time_embed_dim (`int`, *optional*),
            timestep_post_act (`str`, *optional*), conv_in_kernel (`int`, defaults to 3), conv_out_kernel (`int`,
            defaults to 3): Of parts of `UNet2DConditionModel` that this family does not have; they take no other value.
        num_attention_heads (`int` or `tuple[int]`, *optional*): Number of heads, for all levels or per level. Where
            given, it wins over `attention_head_dim`.
        num_attention_heads_up (`int`, *optional*): Number of heads at every level on the way up (`num_heads_upsample`
            of OpenAI's code); wins over the other two arguments for heads. `None`: as on the way down.
        null_class_id (`int`, *optional*): Row of the class embedding that means "no class" (normally the last). With
            it, `class_labels=None` is the unconditional model.
        time_proj_dim (`int`, *optional*): Width of the sinusoid; `None`: `block_out_channels[0]`.
        timestep_scale (`float`, defaults to 1.0): Multiplies t before the embedding. Models of improved-diffusion
            that rescale 4000 steps to 0..1000 have 0.25.

    Raises:
        ValueError: For a combination of arguments that describes no network of this family.
    """

    _supports_gradient_checkpointing = True
    # `UpBlock` joins its input with skip connections outside of any child, so both must be on one device.
    _no_split_modules = ["ResBlock", "Attention", "AddedKVAttention", "BasicTransformerBlock", "UpBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: TimeEmbeddingType = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int | tuple[int, ...] = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: ResampleKind = "conv",
        upsample_type: ResampleKind = "conv",
        dropout: float = 0.0,
        act_fn: AdaGNActivation = "silu",
        attention_head_dim: int | tuple[int, ...] | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: TimeInjection = "default",
        add_attention: bool = True,
        class_embed_type: ClassEmbedType | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        cross_attention_dim: int | tuple[int, ...] = 1280,
        transformer_layers_per_block: int | tuple = 1,
        reverse_transformer_layers_per_block: tuple | None = None,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        only_cross_attention: bool | tuple[bool, ...] = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: Literal["layer_norm", "group_norm"] | None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: Literal["text_proj"] | None = None,
        addition_embed_type: AdditionEmbedType | None = None,
        addition_embed_type_num_heads: int = 64,
        projection_class_embeddings_input_dim: int | None = None,
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_act_fn: AdaGNActivation | None = None,
        time_cond_proj_dim: int | None = None,
        dual_cross_attention: bool = False,
        attention_type: str = "default",
        class_embeddings_concat: bool = False,
        addition_time_embed_dim: int | None = None,
        timestep_post_act: str | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        num_attention_heads: int | tuple[int, ...] | None = None,
        num_attention_heads_up: int | None = None,
        null_class_id: int | None = None,
        time_proj_dim: int | None = None,
        timestep_scale: float = 1.0,
    ):
        super().__init__()
        levels = len(block_out_channels)
        # Some early repositories carry this prefix.
        down_block_types = tuple(name.removeprefix("UNetRes") for name in down_block_types)
        up_block_types = tuple(name.removeprefix("UNetRes") for name in up_block_types)
        self.reads_text = reads_text((*down_block_types, mid_block_type, *up_block_types))
        self._check_encoder(down_block_types)
        self._check_way_up(up_block_types)

        # 1. input, 2. time and class, 3. text, 4. down, 5. middle
        factory, skip_channels = self._build_encoder(down_block_types)

        # 6. up
        self.up_blocks = factory.up_blocks(
            up_block_types,
            layers_per_block,
            upsample_type,
            skip_channels,
            reverse_transformer_layers_per_block or per_level(transformer_layers_per_block, levels)[::-1],
            num_attention_heads_up,
        )
        self.num_up_skips = [number + 1 for number in reversed(per_level(layers_per_block, levels))]

        # 7. output
        self.conv_norm_out = AdaGroupNormAct(norm_num_groups, block_out_channels[0], norm_eps, self.embedding_act_fn)
        self.conv_out = zero_init(Conv2d(block_out_channels[0], out_channels, kernel_size=3, padding=1))

    def _check_way_up(self, up_block_types: tuple[str, ...]) -> None:
        """Raises a `ValueError` for what would otherwise fail late, or build something else than was asked for."""
        config, levels = self.config, len(self.config.block_out_channels)
        if len(up_block_types) != levels:
            raise ValueError(
                f"`up_block_types` has {len(up_block_types)} entries {tuple(up_block_types)} but `block_out_channels` "
                f"has {levels} {tuple(config.block_out_channels)}. Give one block type per level."
            )
        for block_type in up_block_types:
            _check_choice("up_block_types", block_type, UP_BLOCK_TYPES)
        _check_choice("upsample_type", config.upsample_type, get_args(ResampleKind))
        kinds_up = [UP_BLOCK_TYPES[block_type].attention for block_type in reversed(up_block_types)]
        heads_up = config.num_attention_heads_up
        if isinstance(heads_up, (list, tuple)):
            raise ValueError(
                f"`num_attention_heads_up` is {heads_up}; it must be one number, for all levels on the way up."
            )
        check_heads(config, kinds_up, "num_attention_heads" if heads_up is None else "num_attention_heads_up")

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """
        As in diffusers. What the config of a `UNet2DConditionModel`, or any with cross-attention, leaves out has that
        class's defaults.
        """
        if isinstance(config, dict):
            keys = ("down_block_types", "up_block_types")
            block_types = [name for key in keys for name in config.get(key) or ()] + [config.get("mid_block_type")]
            is_condition_model = config.get("_class_name") == "UNet2DConditionModel"
            if is_condition_model or reads_text(block_types):
                own = inspect.signature(cls.__init__).parameters
                parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
                config = {name: p.default for name, p in parameters.items() if name in own and name != "self"} | config
                config["_use_default_values"] = []  # what that class chose by default counts as given
            block_types = [*config.get("down_block_types", ()), config.get("mid_block_type")]
            if is_condition_model and not reads_text([*block_types, *config.get("up_block_types", ())]):
                raise ValueError(
                    "This is the config of a `UNet2DConditionModel` without any cross-attention, whose arguments mean "
                    "other things than those of a `UNet2DModel`. Load it with `diffusers.UNet2DConditionModel`."
                )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Noisy images; height and width
                divisible by `2 ** (len(block_out_channels) - 1)`.
            timestep (`int`, `float` or `torch.Tensor` of shape `()` or `(batch_size,)`): Numbers of the full training
                chain; 0 is one step of noise.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): In `[0, num_class_embeds)`; `None`
                is the null class, where the model has one. For `class_embed_type="timestep"` numbers of any kind, for
                `"identity"` and `"projection"` vectors, `(batch_size, width)`.
            return_dict (`bool`, defaults to `True`): Return a [`~diffusers.models.unets.unet_2d.UNet2DOutput`].
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, length, width)`, *optional*): States of the
                text, of width `encoder_hid_dim` where the model has it, else `cross_attention_dim`.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*): 1 for states that are
                seen, 0 for padding; `None`: all are.
            attention_mask (`torch.Tensor` of shape `(batch_size, keys)`, *optional*): The same for self-attention in
                transformer blocks, and, as in diffusers, for the states at added keys and values.
            added_cond_kwargs (`dict`, *optional*): `"text_embeds"` of shape `(batch_size, time_embed_dim)`, for
                `addition_embed_type="text_embeds"`.
            cross_attention_kwargs (`dict`, *optional*): Passed on to the attention processors.
            down_block_additional_residuals (`tuple[torch.Tensor]`, *optional*): Added to the skip connections, that of
                the input convolution first (a ControlNet's).
            mid_block_additional_residual (`torch.Tensor`, *optional*): Added to the output of the middle.
            timestep_cond (`torch.Tensor` of shape `(batch_size, time_cond_proj_dim)`, *optional*): Projected without a
                bias and added to the sinusoid of `timestep`; `None` adds nothing, as in diffusers.

        Returns:
            `UNet2DOutput` or `tuple`: `.sample` of shape `(batch_size, out_channels, height, width)`.

        Raises:
            ValueError: For a wrong number of channels, a size that cannot be halved often enough, one class label too
                many or too few, labels out of range (checked for labels on the CPU: elsewhere it would stall), labels
                missing on a class-conditional model without a null class, states that are missing, superfluous or of
                another width or number, and a `timestep_cond` of another shape or for a model that takes none.
        """
        self._check_conditions(
            sample,
            timestep,
            class_labels=class_labels,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            added_cond_kwargs=added_cond_kwargs,
            timestep_cond=timestep_cond,
        )

        # 0. centre
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0

        # 1. time and class -> (B, time_embed_dim)
        timesteps = expand_timesteps(timestep, sample)
        temb = self._embed(
            timesteps,
            sample.dtype,
            class_labels=class_labels,
            encoder_hidden_states=encoder_hidden_states,
            added_cond_kwargs=added_cond_kwargs,
            timestep_cond=timestep_cond,
        )

        # 2. text
        context = self._text_context(
            sample.dtype, encoder_hidden_states, attention_mask, encoder_attention_mask, cross_attention_kwargs
        )

        # 3. input -> (B, block_out_channels[0], H, W)
        hidden_states = self.conv_in(sample)

        # 4. down, 5. middle
        hidden_states, skips = self._encode(hidden_states, temb, context)
        if down_block_additional_residuals is not None:
            skips = tuple(
                skip + residual for skip, residual in zip(skips, down_block_additional_residuals, strict=True)
            )
        if mid_block_additional_residual is not None:
            hidden_states = hidden_states + mid_block_additional_residual

        # 6. up
        for block, number in zip(self.up_blocks, self.num_up_skips, strict=True):
            block_skips, skips = skips[-number:], skips[:-number]
            hidden_states = block(hidden_states, block_skips, temb.of(block), context)

        # 7. output -> (B, out_channels, H, W)
        hidden_states = self.conv_out(self.conv_norm_out(hidden_states))
        if self.config.time_embedding_type == "fourier":
            hidden_states = hidden_states / timesteps.to(hidden_states.dtype)[:, None, None, None]

        if not return_dict:
            return (hidden_states,)
        return UNet2DOutput(sample=hidden_states)
