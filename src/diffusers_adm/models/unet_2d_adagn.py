"""
AdaGNUNet2DModel: the complete U-Net of ablated diffusion models (ADM).

DDPM (Ho et al. 2020, https://huggingface.co/papers/2006.11239), Improved DDPM (Nichol & Dhariwal 2021,
https://huggingface.co/papers/2102.09672) and ADM (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233,
appendix of architectures). Text enters by cross-attention in transformer blocks (latent diffusion,
https://huggingface.co/papers/2112.10752) or by added keys and values (GLIDE, https://huggingface.co/papers/2112.10741).
There is one class each for the blocks of the down path, the middle and the up path; diffusers' block types choose their
kinds of attention and resampling (the tables in config_checks.py). Parameter names are diffusers'.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0
from diffusers.models.embeddings import GaussianFourierProjection, TextTimeEmbedding, TimestepEmbedding, Timesteps
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from ..ops.adagn import ADAGN_ACTIVATIONS, AdaGNActivation, AdaGroupNormAct
from ..ops.conv import Conv2d
from .config_checks import (
    MID_BLOCK_TYPES,
    AdditionEmbedType,
    AttentionKind,
    BlockSpec,
    ClassEmbedType,
    CrossAttentionNorm,
    EncoderHidDimType,
    ResampleKind,
    TimeEmbeddingType,
    TimeInjection,
    block_specs,
    check_encoder,
    check_neutral_arguments,
    check_up_path,
    drop_neutral_arguments,
    has_cross_attention,
    per_level,
    with_defaults_of,
)
from .input_checks import check_class_labels, check_conditions, check_residuals, check_sample
from .loading import WholeModelMixin


BlockAttention: TypeAlias = Attention | Transformer2DModel | None

# Added to the attention scores of masked keys, as in diffusers.
MASKED = -10000.0


class TextContext(NamedTuple):
    """Inputs of cross-attention: states `(B, L, C)`; masks as biases `(B, 1, keys)`, 0 or very negative."""

    encoder_hidden_states: torch.Tensor
    attention_mask: torch.Tensor | None
    encoder_attention_mask: torch.Tensor | None
    cross_attention_kwargs: dict[str, Any]


class TimeEmbedding(NamedTuple):
    """Conditioning of the residual blocks, `(B, time_embed_dim)`: as it is, and with their first activation."""

    emb: torch.Tensor
    activated_emb: torch.Tensor

    def of(self, block: nn.Module) -> torch.Tensor:
        return self.emb if block.skip_time_act else self.activated_emb


class Heads(NamedTuple):
    number: int
    width: int  # channels of each


def resolve_heads(config: Any, kinds: Iterable[AttentionKind | None], up: bool = False) -> list[Heads | None]:
    """
    Heads of the attention at each level, from the highest resolution; `None` where the kind of attention is `None`.

    `num_attention_heads`, and on the up path `num_attention_heads_up`, is always the number of heads, and takes
    precedence. Two readings of `attention_head_dim` are diffusers', and published weights depend on them:
    - in transformer blocks it is the *number* of heads, elsewhere the *width* of a head (`None`: one head);
    - a list of widths is indexed from the highest resolution, but on the up path from the lowest.
    """
    levels = len(config.block_out_channels)
    head_dims = per_level(config.attention_head_dim, levels)
    widths = head_dims[::-1] if up else head_dims
    numbers = per_level(config.num_attention_heads, levels)
    if up and config.num_attention_heads_up is not None:
        numbers = (config.num_attention_heads_up,) * levels
    table: list[Heads | None] = []
    for level, (kind, channels) in enumerate(zip(kinds, config.block_out_channels, strict=True)):
        number = head_dims[level] if kind == "transformer" and numbers[level] is None else numbers[level]
        if kind is None:
            table.append(None)
        elif number is not None:
            table.append(Heads(number, channels // number))
        else:
            width = widths[level] or channels
            table.append(Heads(channels // width, width))
    return table


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters to 0, so that a residual block starts as its shortcut and the network as 0 (ADM)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Downsample(nn.Module):
    """Halve height and width by a strided 3x3 convolution. `padding=0` pads right and bottom only, as DDPM did."""

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.padding = padding
        self.conv = Conv2d(channels, channels, kernel_size=3, stride=2, padding=padding)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.padding == 0:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


class Upsample(nn.Module):
    """Double height and width by nearest-neighbour repetition, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    r"""
    Residual block, conditioned by adaptive group normalisation (ADM, section 3.1) or by addition (DDPM).

    Args:
        in_channels, out_channels (`int`): Multiples of `groups`.
        temb_channels (`int`): Width of the conditioning vector.
        groups (`int`), eps (`float`), act_fn (`str`): Groups, epsilon and activation of both norms.
        time_injection (`str`): `"scale_shift"` (AdaGN) or `"default"` (added before the second norm).
        dropout (`float`, defaults to 0.0): Dropout probability before the second convolution.
        resample (`str`, *optional*): Halve (`"down"`) or double (`"up"`) the size, also of the shortcut (BigGAN).
        output_scale_factor (`float`, defaults to 1.0): Divides the output.
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
    Attention to image and text at once. The text has keys and values of its own, which come first, and only the text is
    masked; diffusers' base class would guess from the length of a mask whether it covers the image.
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
    """
    Residual blocks, each followed by attention where there is any. `skip_time_act`: they take the time embedding
    without an activation (DeepFloyd IF).
    """

    def __init__(self, resnets: list[ResBlock], attentions: list[BlockAttention], skip_time_act: bool = False):
        super().__init__()
        self.skip_time_act = skip_time_act
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
        # the next layers would then mix both layouts and copy at every operation.
        planar = hidden_states.is_contiguous()
        if isinstance(attention, Transformer2DModel):  # checkpoints its layers by itself
            states, mask, encoder_mask, kwargs = context
            if attention.transformer_blocks[0].only_cross_attention:
                mask = encoder_mask  # its first attention also attends to the text
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
            mask = encoder_mask if mask is None else mask  # unCLIP's pipelines pass either for the text
            hidden_states = self.run(attention, hidden_states, states, mask, **kwargs)
        else:
            hidden_states = self.run(attention, hidden_states)
        return hidden_states.contiguous() if planar else hidden_states


class DownBlock(_Block):
    """Residual blocks, then the downsampler; every output is a skip connection."""

    def __init__(
        self,
        resnets: list[ResBlock],
        attentions: list[BlockAttention],
        downsampler: nn.Module | None,
        skip_time_act: bool,
    ):
        super().__init__(resnets, attentions, skip_time_act)
        self.downsamplers = None if downsampler is None else nn.ModuleList([downsampler])

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
    """Residual block, attention (or none), residual block; or one residual block only, in some networks with text."""

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
    """Residual blocks, each after concatenating a skip connection (the last one first), then the upsampler."""

    def __init__(
        self,
        resnets: list[ResBlock],
        attentions: list[BlockAttention],
        upsampler: nn.Module | None,
        skip_time_act: bool,
    ):
        super().__init__(resnets, attentions, skip_time_act)
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

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


class Layers:
    """
    Makes the layers of one network, with the arguments that its config gives to all of them. The config of a classifier
    lacks those about text. `temb_channels` is the width of the conditioning vector.
    """

    def __init__(self, config: Any, temb_channels: int):
        self.config = config
        self.plain_res_block = functools.partial(
            ResBlock,
            temb_channels=temb_channels,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            act_fn=config.act_fn,
            time_injection=config.resnet_time_scale_shift,
            dropout=config.dropout,
        )

    def res_block(
        self, in_channels: int, out_channels: int, spec: BlockSpec, resample: Literal["down", "up"] | None = None
    ) -> ResBlock:
        scale = self.config.get("resnet_out_scale_factor", 1.0) if spec.resample == "resnet" else 1.0
        return self.plain_res_block(in_channels, out_channels, resample=resample, output_scale_factor=scale)

    def skips_time_act(self, spec: BlockSpec) -> bool:
        return self.config.get("resnet_skip_time_act", False) and spec.resample == "resnet"

    def downsampler(self, channels: int, spec: BlockSpec) -> nn.Module:
        if (spec.resample or self.config.downsample_type) == "resnet":
            return self.res_block(channels, channels, spec, "down")
        return Downsample(channels, self.config.get("downsample_padding", 1))

    def upsampler(self, channels: int, spec: BlockSpec) -> nn.Module:
        if (spec.resample or self.config.upsample_type) == "resnet":
            return self.res_block(channels, channels, spec, "up")
        return Upsample(channels)

    def self_attention(self, channels: int, heads: Heads, groups: int | None, scale: float = 1.0) -> Attention:
        """Attention of the image to itself. `groups=None`: without a norm before it."""
        attention = Attention(
            channels,
            heads=heads.number,
            dim_head=heads.width,
            norm_num_groups=groups,
            eps=self.config.norm_eps,
            rescale_output_factor=scale,
            residual_connection=True,
            bias=True,
            upcast_softmax=True,
            # Lets `from_pretrained` rename the `query/key/value/proj_attn` of files from 2022.
            _from_deprecated_attn_block=True,
        )
        zero_init(attention.to_out[0])
        return attention

    def attention(
        self, kind: AttentionKind | None, level: int, heads: Heads | None, depth: int = 1, only_text: bool | None = None
    ) -> BlockAttention:
        """Attention, in transformer blocks of `depth` layers. `only_text=None`: the config's `only_cross_attention`."""
        if kind is None:
            return None
        config, levels = self.config, len(self.config.block_out_channels)
        channels = config.block_out_channels[level]
        if kind == "self":
            return self.self_attention(channels, heads, config.norm_num_groups)
        text_channels = per_level(config.cross_attention_dim, levels)[level]
        if only_text is None:
            only_text = per_level(config.only_cross_attention, levels)[level]
        if kind == "transformer":
            # Each layer: attention to the image, attention to the text, GEGLU feed-forward.
            transformer = Transformer2DModel(
                heads.number,
                heads.width,
                in_channels=channels,
                num_layers=depth,
                cross_attention_dim=text_channels,
                norm_num_groups=config.norm_num_groups,
                only_cross_attention=only_text,
                use_linear_projection=config.use_linear_projection,
                upcast_attention=config.upcast_attention,
            )
            zero_init(transformer.proj_out)
            return transformer
        attention = AddedKVAttention(
            channels,
            cross_attention_dim=channels,
            heads=heads.number,
            dim_head=heads.width,
            added_kv_proj_dim=text_channels,
            norm_num_groups=config.norm_num_groups,
            bias=True,
            upcast_softmax=True,
            only_cross_attention=only_text,
            cross_attention_norm=config.cross_attention_norm,
            processor=AttnAddedKVProcessor2_0(),
        )
        zero_init(attention.to_out[0])
        return attention

    def mid_block(self) -> MidBlock | None:
        """The middle block of a U-Net or ControlNet: residual block, attention, residual block."""
        config, level = self.config, len(self.config.block_out_channels) - 1
        if config.mid_block_type is None:
            return None
        kind = MID_BLOCK_TYPES[config.mid_block_type]
        # In networks with text, diffusers' `UNetMidBlock2D` is one residual block. The attention made for it below is
        # dropped, but has drawn its random numbers: a seed gives the same network as in earlier versions.
        num_resnets = 1 if kind == "self" and has_cross_attention(config) else 2
        if kind == "self" and not config.add_attention:
            kind = None
        heads = resolve_heads(config, [None] * level + [kind])[level]
        channels, scale = config.block_out_channels[level], config.mid_block_scale_factor
        if kind == "self":
            groups = config.attn_norm_num_groups
            if groups is None and config.resnet_time_scale_shift == "default":
                groups = config.norm_num_groups
            attention = self.self_attention(channels, heads, groups, scale)
        else:
            only_text = config.mid_block_only_cross_attention
            if only_text is None:
                only_text = config.only_cross_attention is True
            depths = per_level(config.transformer_layers_per_block, level + 1)[level]
            depth = depths[0] if isinstance(depths, (list, tuple)) else depths
            attention = self.attention(kind, level, heads, depth, only_text and kind == "added_kv")
        resnets = [self.plain_res_block(channels, channels, output_scale_factor=scale) for _ in range(num_resnets)]
        return MidBlock(resnets, [attention] * (num_resnets - 1), config.resnet_skip_time_act and kind == "added_kv")


def expand_timesteps(timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
    """One timestep per example, `(batch_size,)`, on the device of `sample`."""
    timesteps = torch.as_tensor(timestep, device=sample.device)
    if timesteps.ndim == 0 or timesteps.shape[0] == 1:
        timesteps = timesteps.expand(sample.shape[0])
    return timesteps


class ResBlockCompileMixin(WholeModelMixin):
    """`compile_repeated_blocks` compiles the residual blocks, of which these networks have many kinds."""

    _repeated_blocks = ["ResBlock"]

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile each residual block with the given arguments of `torch.compile`, as in diffusers."""
        # torch compiles one function 8 times and then gives up, or raises for `fullgraph=True`. To it all residual
        # blocks are one function, and ADM's 64x64 network has 23 widths of them: allow 8 times for each block.
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # older versions have only a global one
            number = sum(isinstance(module, ResBlock) for module in self.modules())
            kwargs.setdefault("recompile_limit", number * torch._dynamo.config.recompile_limit)
        super().compile_repeated_blocks(*args, **kwargs)


class EncoderMixin(ResBlockCompileMixin):
    """The part that U-Net and ControlNet share: reading of configs, and the embedding of time, class and text."""

    ignore_for_config = ["neutral_arguments"]

    @property
    def reads_text(self) -> bool:
        """The former name of `has_cross_attention`."""
        warnings.warn("`reads_text` is now `has_cross_attention`, and will be removed in 0.3.", FutureWarning, 2)
        return self.has_cross_attention

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """Pick the arguments of the constructor from a raw config, for `from_config` and `from_pretrained`."""
        # diffusers drops arguments that the constructor lacks, silently if the config is of one of its own classes. So
        # what would build another network there is refused before.
        return super().extract_init_dict(drop_neutral_arguments(config_dict), **drop_neutral_arguments(kwargs))

    def _build_embeddings(self) -> None:
        config = self.config
        self.has_cross_attention = has_cross_attention(config)
        # In networks with text, and only there, `act_fn` also applies outside of the residual blocks, as in diffusers.
        act_fn = config.act_fn if self.has_cross_attention else "silu"
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
        else:  # "learned"; `check_encoder` allows no other
            self.time_proj = nn.Embedding(config.num_train_timesteps, time_proj_dim)
        self.time_embedding = TimestepEmbedding(
            timestep_input_dim, time_embed_dim, act_fn=act_fn, cond_proj_dim=config.time_cond_proj_dim
        )

        self.class_embedding = None
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(timestep_input_dim, time_embed_dim, act_fn=act_fn)
        elif config.class_embed_type == "projection":
            self.class_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, time_embed_dim)
        elif config.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_embed_dim)

        # 3. text
        self.encoder_hid_proj = None
        if config.encoder_hid_dim is not None:
            self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
        self.add_embedding = None
        if config.addition_embed_type == "text":
            text_dim = config.encoder_hid_dim or config.cross_attention_dim
            num_heads = config.addition_embed_type_num_heads
            self.add_embedding = TextTimeEmbedding(text_dim, time_embed_dim, num_heads)

    def _embed(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        *,
        class_labels: torch.Tensor | None,
        timestep_cond: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
        cross_attention_kwargs: dict[str, Any] | None,
    ) -> tuple[TimeEmbedding, TextContext | None]:
        """Check the inputs of `forward`, and embed all but the sample, in its dtype."""
        config, dtype, batch_size = self.config, sample.dtype, sample.shape[0]
        check_sample(config, sample, timestep)
        check_class_labels(config, batch_size, class_labels)
        text = (encoder_hidden_states, encoder_attention_mask, added_cond_kwargs)
        check_conditions(config, self.has_cross_attention, batch_size, timestep_cond, *text)

        # 1. time, class and pooled text -> (B, time_embed_dim)
        timesteps = scaled_timesteps = expand_timesteps(timestep, sample)
        if config.timestep_scale != 1.0:
            scaled_timesteps = timesteps.float() * config.timestep_scale
        if timestep_cond is not None:
            timestep_cond = timestep_cond.to(dtype)
        # The sinusoid is float32 whatever the timesteps are; a half-precision embedding needs it in its own dtype.
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
        temb = TimeEmbedding(emb, ADAGN_ACTIVATIONS[config.act_fn](emb))
        if not self.has_cross_attention:
            return temb, None

        # 2. text -> (B, L, cross_attention_dim); masks of 1 and 0 as what is added to the scores
        if self.encoder_hid_proj is not None:
            encoder_hidden_states = self.encoder_hid_proj(encoder_hidden_states)
        mask, encoder_mask = (
            None if mask is None else (1 - mask.to(dtype))[:, None, :] * MASKED
            for mask in (attention_mask, encoder_attention_mask)
        )
        return temb, TextContext(encoder_hidden_states, mask, encoder_mask, cross_attention_kwargs or {})

    def _encode(
        self, hidden_states: torch.Tensor, temb: TimeEmbedding, context: TextContext | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Run the down path and the middle block; return its output and the skip connections, the input's first."""
        skips = (hidden_states,)
        for block in self.down_blocks:
            hidden_states, block_skips = block(hidden_states, temb.of(block), context)
            skips += block_skips
        if self.mid_block is not None:
            hidden_states = self.mid_block(hidden_states, temb.of(self.mid_block), context)
        return hidden_states, skips


class AdaGNUNet2DModel(EncoderMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    U-Net that predicts the noise (or x_0 or v; with twice the output channels also a variance) of a noisy image.

    It takes every argument of diffusers' [`UNet2DModel`] under the same name and with the same default, loads its
    repositories with `from_pretrained`, and gives the same numbers; the same holds for the layouts of
    [`UNet2DConditionModel`] that condition on text by cross-attention. Arguments that a config leaves out have the
    defaults of the class that it names; a config without a class but with cross-attention is read as one of
    `UNet2DConditionModel`. The last convolution or projection of every residual block, of every attention and of the
    network starts at zero, as in ADM, so an untrained model predicts exactly 0.

    Args:
        sample_size (`int` or `tuple[int, int]`, *optional*): Height and width of the samples that pipelines generate;
            the network itself takes any size divisible by `2 ** (len(block_out_channels) - 1)`.
        in_channels (`int`, defaults to 3): Channels of the input.
        out_channels (`int`, defaults to 3): Channels of the output: 2 x the image channels for a model with
            learned variance (mean first, variance second).
        center_input_sample (`bool`, defaults to `False`): Map inputs in [0, 1] to [-1, 1] first.
        time_embedding_type (`str`, defaults to `"positional"`): `"positional"` (sinusoid), `"fourier"` (random Fourier
            features of log t; the output is divided by t, as in score-based models) or `"learned"` (a table).
        time_embedding_dim (`int`, *optional*): Width of the time embedding; `None`: `4 * block_out_channels[0]`.
        freq_shift (`int`, defaults to 0), flip_sin_to_cos (`bool`, defaults to `True`): Conventions of the sinusoid.
        down_block_types (`tuple[str]`): One per level: `"DownBlock2D"`, `"AttnDownBlock2D"` (self-attention after each
            residual block), `"ResnetDownsampleBlock2D"` (residual downsampling), `"CrossAttnDownBlock2D"` (transformer
            blocks that attend to the text) or `"SimpleCrossAttnDownBlock2D"` (attention to image and text at once,
            residual downsampling).
        mid_block_type (`str`, *optional*, defaults to `"UNetMidBlock2D"`): `None` leaves the middle block out. Networks
            with text name theirs: `"UNetMidBlock2DCrossAttn"`, `"UNetMidBlock2DSimpleCrossAttn"`, or
            `"UNetMidBlock2D"`, which is then one residual block without attention, as in `UNet2DConditionModel`.
        up_block_types (`tuple[str]`): One per level, from the lowest resolution: `"UpBlock2D"`, `"AttnUpBlock2D"`,
            `"ResnetUpsampleBlock2D"`, `"CrossAttnUpBlock2D"` or `"SimpleCrossAttnUpBlock2D"`.
        block_out_channels (`tuple[int]`, defaults to `(224, 448, 672, 896)`): Channels per level.
        layers_per_block (`int` or `tuple[int]`, defaults to 2): Residual blocks per level of the down path; the up path
            has one more.
        mid_block_scale_factor (`float`, defaults to 1): Divides the outputs of the layers in the middle block.
        downsample_padding (`int`, defaults to 1): Padding of the downsampling convolution; 0 pads right and bottom.
        downsample_type, upsample_type (`str`, default to `"conv"`): `"conv"` or `"resnet"` (residual), for
            `"AttnDownBlock2D"` and `"AttnUpBlock2D"`; the other block types imply it.
        dropout (`float`, defaults to 0.0): Dropout before the second convolution of each residual block.
        act_fn (`str`, defaults to `"silu"`): `"silu"`, `"swish"` (the same), `"mish"`, `"gelu"` or `"relu"`. As in
            diffusers, time embedding and output of networks without text always use SiLU.
        attention_head_dim (`int` or `tuple[int]`, *optional*, defaults to 8): Channels per attention head (`None`: one
            head). In transformer blocks it is the number of heads, as in diffusers.
        norm_num_groups (`int`, defaults to 32): Groups of every group norm.
        attn_norm_num_groups (`int`, *optional*): Groups of the norm before the attention of the middle block. `None`:
            `norm_num_groups` for `resnet_time_scale_shift="default"`, *no norm* for `"scale_shift"`, as in diffusers.
        norm_eps (`float`, defaults to 1e-5): Epsilon of every group norm.
        resnet_time_scale_shift (`str`, defaults to `"default"`): `"default"` adds the time embedding, `"scale_shift"`
            is AdaGN.
        add_attention (`bool`, defaults to `True`): Attention in the middle block.
        class_embed_type (`str`, *optional*): `None` (a table of `num_class_embeds` rows), `"timestep"` (the sinusoid of
            a number), `"identity"` (vectors, added as they are) or `"projection"` (vectors, through two layers).
        num_class_embeds (`int`, *optional*): Rows of the class embedding, the null class included.
        num_train_timesteps (`int`, *optional*): Rows of the table of `time_embedding_type="learned"`.
        cross_attention_dim (`int` or `tuple[int]`, defaults to 1280): Width of the text states, optionally per level.
        transformer_layers_per_block (`int` or `tuple`, defaults to 1): Layers of each transformer block, for all levels
            or per level; the entry of a level may be a tuple with one number per block.
        reverse_transformer_layers_per_block (`tuple`, *optional*): The same for the up path, from the lowest
            resolution; `None`: as in the down path.
        use_linear_projection (`bool`, defaults to `False`): Linear instead of convolutional projections into and out of
            transformer blocks (Stable Diffusion 2).
        upcast_attention (`bool`, defaults to `False`): Attention scores of transformer blocks in float32.
        only_cross_attention (`bool` or `tuple[bool]`, defaults to `False`): The image attends only to the text.
        mid_block_only_cross_attention (`bool`, *optional*): The same for added keys and values in the middle block;
            `None`: `only_cross_attention`, where that is one `bool`.
        cross_attention_norm (`str`, *optional*): `"layer_norm"` or `"group_norm"` before added keys and values.
        encoder_hid_dim (`int`, *optional*): Width of states that are projected to `cross_attention_dim` first.
        encoder_hid_dim_type (`str`, *optional*): `"text_proj"`, or `None`, which means the same with `encoder_hid_dim`.
        addition_embed_type (`str`, *optional*): Pooled text in the time embedding: `"text"` (states, pooled by
            attention here, DeepFloyd IF) or `"text_embeds"` (`added_cond_kwargs["text_embeds"]`, as it is, GLIDE).
        addition_embed_type_num_heads (`int`, defaults to 64): Heads of the pooling of `"text"`.
        projection_class_embeddings_input_dim (`int`, *optional*): Width of vectors for `class_embed_type="projection"`.
        resnet_skip_time_act (`bool`, defaults to `False`): Residual blocks at levels with residual resampling take the
            time embedding without an activation (DeepFloyd IF).
        resnet_out_scale_factor (`float`, defaults to 1.0): Divides the outputs of those blocks.
        time_embedding_act_fn (`str`, *optional*): Activation of the finished time embedding.
        time_cond_proj_dim (`int`, *optional*): Width of `timestep_cond`, a vector that is projected and added to the
            sinusoid of the timestep, e.g. the noise level of the low-resolution image.
        num_attention_heads (`int` or `tuple[int]`, *optional*): Number of heads, for all levels or per level; takes
            precedence over `attention_head_dim`.
        num_attention_heads_up (`int`, *optional*): Number of heads at every level of the up path, as
            `num_heads_upsample` in OpenAI's code; takes precedence over both. `None`: as in the down path.
        null_class_id (`int`, *optional*): Row of the class embedding that means "no class" (normally the last), which
            `class_labels=None` selects.
        time_proj_dim (`int`, *optional*): Width of the sinusoid; `None`: `block_out_channels[0]`.
        timestep_scale (`float`, defaults to 1.0): Multiplies t before the embedding: 0.25 for models of
            improved-diffusion that rescale 4000 steps to 0..1000.
        neutral_arguments (`Any`): Arguments of `UNet2DConditionModel` for parts that this family lacks; only the values
            in `config_checks.NEUTRAL_ARGUMENTS` are allowed.

    Raises:
        ValueError: For a combination of arguments that describes no network of this family.
    """

    _supports_gradient_checkpointing = True
    # `UpBlock` concatenates its input with skip connections outside of any child, so both must be on one device.
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
        cross_attention_norm: CrossAttentionNorm | None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: EncoderHidDimType | None = None,
        addition_embed_type: AdditionEmbedType | None = None,
        addition_embed_type_num_heads: int = 64,
        projection_class_embeddings_input_dim: int | None = None,
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_act_fn: AdaGNActivation | None = None,
        time_cond_proj_dim: int | None = None,
        num_attention_heads: int | tuple[int, ...] | None = None,
        num_attention_heads_up: int | None = None,
        null_class_id: int | None = None,
        time_proj_dim: int | None = None,
        timestep_scale: float = 1.0,
        **neutral_arguments: Any,
    ):
        super().__init__()
        config, levels = self.config, len(block_out_channels)
        check_neutral_arguments(type(self), neutral_arguments)
        check_encoder(config)
        check_up_path(config)

        # 1. input, 2. time and class, 3. text
        self._build_embeddings()

        layers = Layers(config, self.time_embed_dim)
        num_resnets = per_level(layers_per_block, levels)
        num_layers = per_level(transformer_layers_per_block, levels)

        # 4. down path, from the highest resolution: residual blocks, each followed by the attention of its level
        specs = block_specs(config, "down_block_types")
        heads = resolve_heads(config, [spec.attention for spec in specs])
        self.down_blocks = nn.ModuleList()
        skip_channels = [block_out_channels[0]]  # of the skip connections, that of the input convolution first
        for level, (spec, channels) in enumerate(zip(specs, block_out_channels, strict=True)):
            resnets, attentions, downsampler = [], [], None
            for depth in per_level(num_layers[level], num_resnets[level]):
                resnets.append(layers.res_block(skip_channels[-1], channels, spec))
                attentions.append(layers.attention(spec.attention, level, heads[level], depth))
                skip_channels.append(channels)
            if level < levels - 1:
                downsampler = layers.downsampler(channels, spec)
                skip_channels.append(channels)
            self.down_blocks.append(DownBlock(resnets, attentions, downsampler, layers.skips_time_act(spec)))

        # 5. middle: residual block, attention, residual block
        self.mid_block = layers.mid_block()

        # 6. up path, from the lowest resolution: each residual block also takes the newest skip connection that is left
        specs = block_specs(config, "up_block_types")[::-1]
        heads = resolve_heads(config, [spec.attention for spec in specs], up=True)
        if reverse_transformer_layers_per_block:
            num_layers = per_level(reverse_transformer_layers_per_block, levels)[::-1]
        self.up_blocks = nn.ModuleList()
        previous_channels = block_out_channels[-1]
        for level in reversed(range(levels)):
            spec, channels = specs[level], block_out_channels[level]
            resnets, attentions, upsampler = [], [], None
            for depth in per_level(num_layers[level], num_resnets[level] + 1):
                resnets.append(layers.res_block(previous_channels + skip_channels.pop(), channels, spec))
                attentions.append(layers.attention(spec.attention, level, heads[level], depth))
                previous_channels = channels
            if level > 0:
                upsampler = layers.upsampler(channels, spec)
            self.up_blocks.append(UpBlock(resnets, attentions, upsampler, layers.skips_time_act(spec)))

        # 7. output
        act_fn = act_fn if self.has_cross_attention else "silu"
        self.conv_norm_out = AdaGroupNormAct(norm_num_groups, block_out_channels[0], norm_eps, act_fn)
        self.conv_out = zero_init(Conv2d(block_out_channels[0], out_channels, kernel_size=3, padding=1))

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """As in `EncoderMixin`; a config with cross-attention is completed with defaults of `UNet2DConditionModel`."""
        is_condition_model = config_dict.get("_class_name") == "UNet2DConditionModel"
        if is_condition_model or has_cross_attention(config_dict):
            config_dict = with_defaults_of(UNet2DConditionModel, cls, config_dict)
        if is_condition_model and not has_cross_attention(config_dict):
            raise ValueError(
                "This is the config of a `UNet2DConditionModel` without any cross-attention, whose arguments do not "
                "mean the same as those of a `UNet2DModel`. Load it with `diffusers.UNet2DConditionModel`."
            )
        return super().extract_init_dict(config_dict, **kwargs)

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
        Predict the noise of images (or x_0 or v, as trained), and the raw variance if the network learns one.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Noisy images; height and width
                divisible by `2 ** (len(block_out_channels) - 1)`.
            timestep (`int`, `float` or `torch.Tensor` of shape `()` or `(batch_size,)`): Timesteps of the full training
                schedule; 0 is one step of noise.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): In `[0, num_class_embeds)`; `None`
                is the null class, where the model has one. For `class_embed_type="timestep"` numbers of any kind, for
                `"identity"` and `"projection"` vectors, `(batch_size, width)`.
            return_dict (`bool`, defaults to `True`): Return a [`~diffusers.models.unets.unet_2d.UNet2DOutput`].
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, length, width)`, *optional*): States of the
                text, of width `encoder_hid_dim` where the model has it, else `cross_attention_dim`.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*): 1 for states to attend
                to, 0 for padding; `None`: all 1.
            attention_mask (`torch.Tensor` of shape `(batch_size, keys)`, *optional*): The same for self-attention in
                transformer blocks, and, as in diffusers, for the states at added keys and values.
            added_cond_kwargs (`dict`, *optional*): `"text_embeds"` of shape `(batch_size, time_embed_dim)`, for
                `addition_embed_type="text_embeds"`.
            cross_attention_kwargs (`dict`, *optional*): Passed on to the attention processors.
            down_block_additional_residuals (`tuple[torch.Tensor]`, *optional*): Added to the skip connections, that of
                the input convolution first (from a ControlNet).
            mid_block_additional_residual (`torch.Tensor`, *optional*): Added to the output of the middle block.
            timestep_cond (`torch.Tensor` of shape `(batch_size, time_cond_proj_dim)`, *optional*): Projected without a
                bias and added to the sinusoid of `timestep`; `None` adds nothing, as in diffusers.

        Returns:
            `UNet2DOutput` or `tuple`: `.sample` of shape `(batch_size, out_channels, height, width)`.

        Raises:
            ValueError: If an input has a wrong shape, is missing, or belongs to a part that this network lacks; for
                class labels out of range (checked only on the CPU).
            TypeError: For samples that are not floating point.
        """
        # 1. time and class -> (B, time_embed_dim), 2. text
        temb, context = self._embed(
            sample,
            timestep,
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            attention_mask=attention_mask,
            added_cond_kwargs=added_cond_kwargs,
            cross_attention_kwargs=cross_attention_kwargs,
        )

        # 3. input -> (B, block_out_channels[0], H, W)
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        hidden_states = self.conv_in(sample)

        # 4. down path, 5. middle
        hidden_states, skips = self._encode(hidden_states, temb, context)
        if down_block_additional_residuals is not None:
            check_residuals(down_block_additional_residuals, skips)
            skips = tuple(map(torch.add, skips, down_block_additional_residuals))
        if mid_block_additional_residual is not None:
            hidden_states = hidden_states + mid_block_additional_residual

        # 6. up path
        for block in self.up_blocks:
            number = len(block.resnets)  # type: ignore[arg-type]
            hidden_states = block(hidden_states, skips[-number:], temb.of(block), context)
            skips = skips[:-number]

        # 7. output -> (B, out_channels, H, W)
        hidden_states = self.conv_out(self.conv_norm_out(hidden_states))
        if self.config.time_embedding_type == "fourier":
            timesteps = expand_timesteps(timestep, hidden_states)
            hidden_states = hidden_states / timesteps.to(hidden_states.dtype)[:, None, None, None]

        if not return_dict:
            return (hidden_states,)
        return UNet2DOutput(sample=hidden_states)
