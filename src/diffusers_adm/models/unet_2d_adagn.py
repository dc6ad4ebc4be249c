"""
AdaGNUNet2DModel: the U-Net of ablated diffusion models (ADM), whole, in one file.

DDPM (Ho et al. 2020, https://huggingface.co/papers/2006.11239), Improved DDPM (Nichol & Dhariwal 2021,
https://huggingface.co/papers/2102.09672) and ADM (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233,
appendix of architectures). One residual block, one block each for the way down, the middle and the way up; what the
block types of diffusers distinguish are two parameters here: the kind of attention and the kind of resampling.
Parameter names are those of diffusers' `UNet2DModel`.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ..ops.adagn import ADAGN_ACTIVATIONS, AdaGNActivation, AdaGroupNormAct


AttentionKind = Literal["self"]  # what follows each residual block; None: nothing
ResampleKind = Literal["conv", "resnet"]  # a strided convolution, or a residual block that resamples (BigGAN)
TimeInjection = Literal["default", "scale_shift"]  # added before the second norm, or AdaGN
TimeEmbeddingType = Literal["positional", "fourier", "learned"]
ClassEmbedType = Literal["timestep", "identity"]


class BlockSpec(NamedTuple):
    """What a diffusers block type stands for. `resample=None`: the model's `downsample_type` or `upsample_type`."""

    attention: AttentionKind | None
    resample: ResampleKind | None


DOWN_BLOCK_TYPES = {
    "DownBlock2D": BlockSpec(attention=None, resample="conv"),
    "AttnDownBlock2D": BlockSpec(attention="self", resample=None),
    "ResnetDownsampleBlock2D": BlockSpec(attention=None, resample="resnet"),
}
UP_BLOCK_TYPES = {
    "UpBlock2D": BlockSpec(attention=None, resample="conv"),
    "AttnUpBlock2D": BlockSpec(attention="self", resample=None),
    "ResnetUpsampleBlock2D": BlockSpec(attention=None, resample="resnet"),
}
MID_BLOCK_TYPES = ("UNetMidBlock2D",)


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
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=padding)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.padding == 0:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


class Upsample(nn.Module):
    """Doubles height and width by nearest-neighbour repetition, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

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
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, (2 if time_injection == "scale_shift" else 1) * out_channels)
        self.norm2 = AdaGroupNormAct(groups, out_channels, eps, act_fn)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1))
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

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


class _Block(nn.Module):
    """What the three kinds of block share: residual blocks, each followed by attention where there is any."""

    def __init__(self, resnets: list[ResBlock], attentions: list[Attention | None]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if any(attention is not None for attention in attentions):
            self.attentions = nn.ModuleList(attentions)
        else:
            self.attentions = [None] * len(attentions)
        self.gradient_checkpointing = False

    def run(self, module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)

    def attend(self, attention: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
        # The processors return a transposed view of (B, H*W, C), so planar activations would leave as channels-last;
        # what follows would then mix both layouts and copy at every operation.
        planar = hidden_states.is_contiguous()
        hidden_states = self.run(attention, hidden_states)
        return hidden_states.contiguous() if planar else hidden_states


class DownBlock(_Block):
    """`num_layers` residual blocks, then the downsampler; every output is a skip connection."""

    def __init__(self, resnets: list[ResBlock], attentions: list[Attention | None], downsampler: nn.Module | None):
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([downsampler]) if downsampler is not None else None

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        skips = ()
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            hidden_states = self.run(resnet, hidden_states, temb)
            if attention is not None:
                hidden_states = self.attend(attention, hidden_states)
            skips += (hidden_states,)
        if self.downsamplers is not None:
            downsampler = self.downsamplers[0]
            arguments = (hidden_states, temb) if isinstance(downsampler, ResBlock) else (hidden_states,)
            hidden_states = self.run(downsampler, *arguments)
            skips += (hidden_states,)
        return hidden_states, skips


class MidBlock(_Block):
    """Residual block, attention (or none), residual block."""

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        hidden_states = self.run(self.resnets[0], hidden_states, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                hidden_states = self.attend(attention, hidden_states)
            hidden_states = self.run(resnet, hidden_states, temb)
        return hidden_states


class UpBlock(_Block):
    """Residual blocks, each after joining one skip connection (the last one stored first), then the upsampler."""

    def __init__(self, resnets: list[ResBlock], attentions: list[Attention | None], upsampler: nn.Module | None):
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([upsampler]) if upsampler is not None else None

    def forward(self, hidden_states: torch.Tensor, skips: tuple[torch.Tensor, ...], temb: torch.Tensor) -> torch.Tensor:
        for resnet, attention, skip in zip(self.resnets, self.attentions, reversed(skips), strict=True):
            hidden_states = self.run(resnet, torch.cat([hidden_states, skip], dim=1), temb)
            if attention is not None:
                hidden_states = self.attend(attention, hidden_states)
        if self.upsamplers is not None:
            upsampler = self.upsamplers[0]
            arguments = (hidden_states, temb) if isinstance(upsampler, ResBlock) else (hidden_states,)
            hidden_states = self.run(upsampler, *arguments)
        return hidden_states


class BlockFactory:
    """
    Builds the blocks of one network: what U-Net and classifier share. Levels count from the highest resolution.

    Args:
        config (`FrozenDict`): Of the network; the arguments that both have mean the same.
        temb_channels (`int`): Width of the conditioning vector.
    """

    def __init__(self, config: Any, temb_channels: int):
        self.block_out_channels = config.block_out_channels
        self.norm_num_groups = config.norm_num_groups
        self.norm_eps = config.norm_eps
        self.attention_head_dim = config.attention_head_dim
        self.num_attention_heads = config.num_attention_heads
        self.res_block = functools.partial(
            ResBlock,
            temb_channels=temb_channels,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            act_fn=config.act_fn,
            time_injection=config.resnet_time_scale_shift,
            dropout=config.dropout,
        )

    def heads(self, level: int, num_heads: int | None = None) -> tuple[int, int]:
        """Number and width of the heads of a level; `num_heads` wins over those of the network."""
        channels = self.block_out_channels[level]
        if num_heads is None:
            heads = self.num_attention_heads
            num_heads = heads[level] if isinstance(heads, (list, tuple)) else heads
        if num_heads is not None:
            return num_heads, channels // num_heads
        head_dim = self.attention_head_dim or channels
        return channels // head_dim, head_dim

    def self_attention(
        self, level: int, groups: int | None, rescale: float = 1.0, num_heads: int | None = None
    ) -> Attention:
        num_heads, head_dim = self.heads(level, num_heads)
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

    def down_blocks(
        self, block_types: tuple[str, ...], layers_per_block: int, downsample_type: ResampleKind, padding: int = 1
    ) -> tuple[nn.ModuleList, list[int]]:
        """One block a level, and the channels of the skip connections, that of the input convolution first."""
        blocks = nn.ModuleList()
        channels = self.block_out_channels[0]
        skip_channels = [channels]
        for level, block_type in enumerate(block_types):
            spec = DOWN_BLOCK_TYPES[block_type]
            resnets, attentions = [], []
            for _ in range(layers_per_block):
                resnets.append(self.res_block(channels, self.block_out_channels[level]))
                channels = self.block_out_channels[level]
                attends = spec.attention == "self"
                attentions.append(self.self_attention(level, self.norm_num_groups) if attends else None)
                skip_channels.append(channels)
            downsampler = None
            if level < len(block_types) - 1:
                residual = (spec.resample or downsample_type) == "resnet"
                if residual:
                    downsampler = self.res_block(channels, channels, resample="down")
                else:
                    downsampler = Downsample(channels, padding)
                skip_channels.append(channels)
            blocks.append(DownBlock(resnets, attentions, downsampler))
        return blocks, skip_channels

    def mid_block(self, add_attention: bool, groups: int | None, scale_factor: float = 1.0) -> MidBlock:
        level, channels = len(self.block_out_channels) - 1, self.block_out_channels[-1]
        attention = self.self_attention(level, groups, scale_factor) if add_attention else None
        resnets = [self.res_block(channels, channels, output_scale_factor=scale_factor) for _ in range(2)]
        return MidBlock(resnets, [attention])


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
    if config.layers_per_block < 1:
        raise ValueError(f"`layers_per_block` is {config.layers_per_block}; each level needs one at least.")


def check_heads(config: Any, attends: list[bool], name: str = "num_attention_heads") -> None:
    """Raises a `ValueError` where the heads do not fit the channels of a level that attends."""
    heads, head_dim, levels = config[name], config.attention_head_dim, len(config.block_out_channels)
    if isinstance(heads, (list, tuple)) and len(heads) != levels:
        raise ValueError(f"`{name}` has {len(heads)} entries for {levels} levels. Give one per level.")
    for level, channels in enumerate(config.block_out_channels):
        number = heads[level] if isinstance(heads, (list, tuple)) else heads
        if attends[level] and number is not None and (number < 1 or channels % number):
            raise ValueError(f"`{name}` is {number}; it must divide the {channels} channels of level {level}.")
        if attends[level] and number is None and head_dim is not None and not 1 <= head_dim <= channels:
            raise ValueError(
                f"`attention_head_dim` is {head_dim}; it must lie between 1 and the {channels} channels of level "
                f"{level}, which has attention. Choose a divisor of {channels}, or set `num_attention_heads`."
            )


def check_sample(sample: torch.Tensor, timestep: torch.Tensor | float | int, in_channels: int, levels: int) -> None:
    """Raises a `ValueError` for a sample or timestep that a network with `levels` levels cannot take."""
    if sample.ndim != 4 or sample.shape[1] != in_channels:
        raise ValueError(
            f"`sample` has shape {tuple(sample.shape)}; this model takes (batch_size, {in_channels}, height, width). "
            f"Pass {in_channels} channels, or build a model with another `in_channels`."
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


class AdaGNUNet2DModel(ResBlockCompileMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    U-Net that predicts noise (and, with twice the output channels, a variance) from a noisy image and a timestep.

    It takes every argument of diffusers' [`UNet2DModel`] under the same name and with the same default, loads its
    repositories with `from_pretrained`, and gives the same numbers. The last convolution of every residual branch, of
    every attention and of the network starts at zero, as in ADM, so an untrained model predicts exactly 0.

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
            block), `"ResnetDownsampleBlock2D"` (residual downsampling) per level.
        mid_block_type (`str`, *optional*, defaults to `"UNetMidBlock2D"`): `None` leaves the middle out.
        up_block_types (`tuple[str]`): `"UpBlock2D"`, `"AttnUpBlock2D"`, `"ResnetUpsampleBlock2D"`, from the lowest
            resolution up.
        block_out_channels (`tuple[int]`, defaults to `(224, 448, 672, 896)`): Channels per level.
        layers_per_block (`int`, defaults to 2): Residual blocks per level on the way down; one more on the way up.
        mid_block_scale_factor (`float`, defaults to 1): Divides the sums in the middle block.
        downsample_padding (`int`, defaults to 1): Padding of the downsampling convolution; 0 pads one side only.
        downsample_type, upsample_type (`str`, default to `"conv"`): `"conv"` or `"resnet"` (residual), for the block
            types with attention; the other block types say it in their names.
        dropout (`float`, defaults to 0.0): Before the second convolution of each residual block.
        act_fn (`str`, defaults to `"silu"`): `"silu"`, `"swish"` (the same), `"mish"`, `"gelu"` or `"relu"`, in the
            residual blocks. The head is always SiLU, as in diffusers.
        attention_head_dim (`int`, *optional*, defaults to 8): Channels of an attention head; `None`: one head.
        norm_num_groups (`int`, defaults to 32): Groups of every group norm.
        attn_norm_num_groups (`int`, *optional*): Groups of the norm before the attention in the middle. `None`:
            `norm_num_groups` for `resnet_time_scale_shift="default"`, *no norm* for `"scale_shift"`, as in diffusers.
        norm_eps (`float`, defaults to 1e-5): Epsilon of every group norm.
        resnet_time_scale_shift (`str`, defaults to `"default"`): `"default"` adds the time embedding, `"scale_shift"`
            is AdaGN.
        add_attention (`bool`, defaults to `True`): Attention in the middle block.
        class_embed_type (`str`, *optional*): `None` (a table of `num_class_embeds` rows), `"timestep"` or `"identity"`.
        num_class_embeds (`int`, *optional*): Rows of the class embedding, the null class included.
        num_train_timesteps (`int`, *optional*): Rows of the table of `time_embedding_type="learned"`.
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
    _no_split_modules = ["ResBlock", "Attention", "UpBlock"]
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
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: ResampleKind = "conv",
        upsample_type: ResampleKind = "conv",
        dropout: float = 0.0,
        act_fn: AdaGNActivation = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: TimeInjection = "default",
        add_attention: bool = True,
        class_embed_type: ClassEmbedType | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
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
        self._check_config(down_block_types, up_block_types)

        time_embed_dim = time_embedding_dim or 4 * block_out_channels[0]
        time_proj_dim = time_proj_dim or block_out_channels[0]

        # 1. input
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=3, padding=1)

        # 2. time and class
        timestep_input_dim = time_proj_dim
        if time_embedding_type == "fourier":
            self.time_proj = GaussianFourierProjection(embedding_size=time_proj_dim, scale=16)
            timestep_input_dim = 2 * time_proj_dim
        elif time_embedding_type == "positional":
            self.time_proj = Timesteps(time_proj_dim, flip_sin_to_cos, freq_shift)
        else:
            self.time_proj = nn.Embedding(num_train_timesteps, time_proj_dim)
        self.time_embedding = TimestepEmbedding(timestep_input_dim, time_embed_dim)

        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(timestep_input_dim, time_embed_dim)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, time_embed_dim)
        else:
            self.class_embedding = None

        factory = BlockFactory(self.config, time_embed_dim)

        # 3. down
        self.down_blocks, skip_channels = factory.down_blocks(
            down_block_types, layers_per_block, downsample_type, downsample_padding
        )

        # 4. middle
        self.mid_block = None
        if mid_block_type is not None:
            groups = attn_norm_num_groups
            if groups is None and resnet_time_scale_shift == "default":
                groups = norm_num_groups
            self.mid_block = factory.mid_block(add_attention, groups, mid_block_scale_factor)

        # 5. up: each residual block takes the newest skip connection that is left
        self.up_blocks = nn.ModuleList()
        channels = block_out_channels[-1]
        for level, block_type in zip(reversed(range(levels)), up_block_types, strict=True):
            spec = UP_BLOCK_TYPES[block_type]
            resnets, attentions = [], []
            for _ in range(layers_per_block + 1):
                resnets.append(factory.res_block(channels + skip_channels.pop(), block_out_channels[level]))
                channels = block_out_channels[level]
                attention = None
                if spec.attention == "self":
                    attention = factory.self_attention(level, norm_num_groups, num_heads=num_attention_heads_up)
                attentions.append(attention)
            upsampler = None
            if level > 0:
                residual = (spec.resample or upsample_type) == "resnet"
                upsampler = factory.res_block(channels, channels, resample="up") if residual else Upsample(channels)
            self.up_blocks.append(UpBlock(resnets, attentions, upsampler))

        # 6. output
        self.conv_norm_out = AdaGroupNormAct(norm_num_groups, channels, norm_eps, "silu")
        self.conv_out = zero_init(nn.Conv2d(channels, out_channels, kernel_size=3, padding=1))

    def _check_config(self, down_block_types: tuple[str, ...], up_block_types: tuple[str, ...]) -> None:
        """Raises a `ValueError` for what would otherwise fail late, or build something else than was asked for."""
        config = self.config
        levels = len(config.block_out_channels)
        check_levels(config, down_block_types)
        if len(up_block_types) != levels:
            raise ValueError(
                f"`up_block_types` has {len(up_block_types)} entries {tuple(up_block_types)} but `block_out_channels` "
                f"has {levels} {tuple(config.block_out_channels)}. Give one block type per level."
            )
        for block_type in up_block_types:
            _check_choice("up_block_types", block_type, UP_BLOCK_TYPES)
        _check_choice("mid_block_type", config.mid_block_type, (*MID_BLOCK_TYPES, None))
        _check_choice("time_embedding_type", config.time_embedding_type, get_args(TimeEmbeddingType))
        _check_choice("upsample_type", config.upsample_type, get_args(ResampleKind))
        _check_choice("class_embed_type", config.class_embed_type, (*get_args(ClassEmbedType), None))

        has_mid_attention = config.mid_block_type is not None and config.add_attention
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

        attends_down = [DOWN_BLOCK_TYPES[block_type].attention is not None for block_type in down_block_types]
        attends_up = [UP_BLOCK_TYPES[block_type].attention is not None for block_type in reversed(up_block_types)]
        attends_down[-1] |= has_mid_attention
        check_heads(config, attends_down)
        heads_up = config.num_attention_heads_up
        if isinstance(heads_up, (list, tuple)):
            raise ValueError(
                f"`num_attention_heads_up` is {heads_up}; it must be one number, for all levels on the way up."
            )
        check_heads(config, attends_up, "num_attention_heads" if heads_up is None else "num_attention_heads_up")

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; a config of `UNet2DConditionModel`, whose keys mean other things, is refused."""
        if isinstance(config, dict) and config.get("_class_name") == "UNet2DConditionModel":
            raise ValueError(
                "This is the config of a `UNet2DConditionModel`, which has cross-attention; `AdaGNUNet2DModel` builds "
                "the layouts of `UNet2DModel`. Load it with `diffusers.UNet2DConditionModel`."
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Noisy images; height and width
                divisible by `2 ** (len(block_out_channels) - 1)`.
            timestep (`int`, `float` or `torch.Tensor` of shape `()` or `(batch_size,)`): Numbers of the full training
                chain; 0 is one step of noise.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): In `[0, num_class_embeds)`; `None`
                is the null class, where the model has one.
            return_dict (`bool`, defaults to `True`): Return a [`~diffusers.models.unets.unet_2d.UNet2DOutput`].

        Returns:
            `UNet2DOutput` or `tuple`: `.sample` of shape `(batch_size, out_channels, height, width)`.

        Raises:
            ValueError: For a wrong number of channels, a size that cannot be halved often enough, one class label too
                many or too few, labels out of range (checked for labels on the CPU: elsewhere it would stall), and
                labels missing on a class-conditional model without a null class.
        """
        check_sample(sample, timestep, self.config.in_channels, len(self.config.block_out_channels))
        self._check_class_labels(sample, class_labels)

        # 0. centre
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0

        # 1. time and class -> (B, time_embed_dim)
        timesteps = expand_timesteps(timestep, sample)
        scaled_timesteps = timesteps
        if self.config.timestep_scale != 1.0:
            scaled_timesteps = timesteps.float() * self.config.timestep_scale
        # The sinusoid is float32 whatever the timesteps are; a half-precision embedding needs it in its own dtype.
        emb = self.time_embedding(self.time_proj(scaled_timesteps).to(sample.dtype))
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full_like(timesteps, self.config.null_class_id, dtype=torch.long)
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(sample.dtype)
            emb = emb + self.class_embedding(class_labels).to(emb.dtype)
        # Every residual block starts with this activation: once here instead of once in each.
        emb = ADAGN_ACTIVATIONS[self.config.act_fn](emb)

        # 2. input -> (B, block_out_channels[0], H, W)
        hidden_states = self.conv_in(sample)

        # 3. down
        skips = (hidden_states,)
        for block in self.down_blocks:
            hidden_states, block_skips = block(hidden_states, emb)
            skips += block_skips

        # 4. middle
        if self.mid_block is not None:
            hidden_states = self.mid_block(hidden_states, emb)

        # 5. up
        num_skips = self.config.layers_per_block + 1
        for block in self.up_blocks:
            block_skips, skips = skips[-num_skips:], skips[:-num_skips]
            hidden_states = block(hidden_states, block_skips, emb)

        # 6. output -> (B, out_channels, H, W)
        hidden_states = self.conv_out(self.conv_norm_out(hidden_states))
        if self.config.time_embedding_type == "fourier":
            hidden_states = hidden_states / timesteps.to(hidden_states.dtype)[:, None, None, None]

        if not return_dict:
            return (hidden_states,)
        return UNet2DOutput(sample=hidden_states)

    def _check_class_labels(self, sample: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        config = self.config
        label_ndim = 2 if config.class_embed_type == "identity" else 1
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
                'for each example: shape (batch_size,); for `class_embed_type="identity"` one vector each.'
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
