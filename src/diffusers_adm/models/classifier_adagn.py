"""
AdaGNClassifierModel: tells the class of a noisy image, for classifier guidance.

ADM (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233), section 4: the encoder half of the U-Net and its
middle, then a pool. The blocks are the U-Net's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..ops.adagn import ADAGN_ACTIVATIONS, AdaGNActivation, AdaGroupNormAct
from .unet_2d_adagn import (
    DOWN_BLOCK_TYPES,
    BlockFactory,
    ResampleKind,
    ResBlockCompileMixin,
    TimeInjection,
    check_heads,
    check_levels,
    check_sample,
    expand_timesteps,
    zero_init,
)


PoolKind = Literal["attention", "adaptive", "spatial", "spatial_v2"]

# Width of the hidden layer of the spatial pools, and groups of its norm; whatever the config says of the other norms.
# Both as in guided-diffusion.
SPATIAL_POOL_HIDDEN_DIM, SPATIAL_POOL_NUM_GROUPS = 2048, 32


@dataclass
class AdaGNClassifierOutput(BaseOutput):
    """
    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_classes)`): Before the softmax.
        features (`torch.Tensor` of shape `(batch_size, channels)`, *optional*): What the last linear layer makes the
            logits of: a description of the image, which samples are compared by. As many channels as the last level
            has, or the 2048 of the hidden layer of a spatial pool.
    """

    logits: torch.Tensor
    # With a default, because Accelerate's mixed precision makes the output anew from a dict.
    features: torch.Tensor | None = None


class AttentionPool2D(nn.Module):
    """
    One vector an image: the mean over all places attends to every place and to itself (CLIP, Radford et al. 2021,
    https://huggingface.co/papers/2103.00020, section 2.4). Each place has its own position vector, so the size is
    fixed.
    """

    def __init__(self, size: tuple[int, int], channels: int, num_heads: int, out_dim: int):
        super().__init__()
        self.size = size
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(size[0] * size[1] + 1, channels) / channels**0.5)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, out_dim)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = hidden_states.flatten(2).transpose(1, 2)  # (B, H*W, C)
        tokens = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        # What the places themselves would attend to is not used, so the mean is the only query.
        query, key, value = self.to_q(tokens[:, 0])[:, None], self.to_k(tokens), self.to_v(tokens)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)) for x in (query, key, value))
        pooled = dispatch_attention_fn(query, key, value).flatten(1)  # (B, 1, heads, C / heads) -> (B, C)
        return self.to_out(pooled), pooled  # (B, out_dim), (B, C)


class SpatialPool(nn.Sequential):
    """Layers on joined vectors. They are joined in here, where a model that is split over devices has them on one."""

    def forward(self, means: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.cat(means, dim=1)
        *hidden_layers, to_out = self
        for layer in hidden_layers:
            features = layer(features)
        return to_out(features), features  # (B, out_dim), (B, SPATIAL_POOL_HIDDEN_DIM)


class AdaGNClassifierModel(ResBlockCompileMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    Classifies noisy images: log p(y | x_t) and, by its gradient with respect to x_t, classifier guidance.

    Its arguments have the names and meanings of [`AdaGNUNet2DModel`]'s; the defaults are those of ADM's classifiers
    (128 channels, two residual blocks a level, heads of 64 channels, residual resampling, attention pool).

    Args:
        sample_size (`int` or `tuple[int, int]`): Height and width of the images. The attention pool takes no other;
            the others take any size divisible by `2 ** (len(block_out_channels) - 1)`.
        in_channels (`int`, defaults to 3): Channels of the images.
        num_classes (`int`, defaults to 1000): Number of logits.
        down_block_types (`tuple[str]`): `"DownBlock2D"`, `"AttnDownBlock2D"` (self-attention after each residual
            block) or `"ResnetDownsampleBlock2D"` (residual downsampling) per level.
        block_out_channels (`tuple[int]`, defaults to `(128, 256, 384, 512)`): Channels per level.
        layers_per_block (`int`, defaults to 2): Residual blocks per level.
        downsample_type (`str`, defaults to `"resnet"`): `"conv"` or `"resnet"`, for the levels with attention; the
            other block types say it in their names.
        dropout (`float`, defaults to 0.0): Before the second convolution of each residual block.
        act_fn (`str`, defaults to `"silu"`): Activation of the residual blocks.
        attention_head_dim (`int`, *optional*, defaults to 64): Channels of an attention head; `None`: one head. The
            attention pool has as many heads as the last level.
        num_attention_heads (`int` or `tuple[int]`, *optional*): Number of heads, for all levels or per level; wins
            over `attention_head_dim`.
        norm_num_groups (`int`, defaults to 32): Groups of every group norm but that of the pool `"spatial_v2"`.
        norm_eps (`float`, defaults to 1e-5): Epsilon of every group norm.
        resnet_time_scale_shift (`str`, defaults to `"scale_shift"`): AdaGN, or `"default"` (added).
        pool (`str`, defaults to `"attention"`): From activations to logits. `"attention"`: one layer of attention, with
            their mean as the query; `"adaptive"`: mean and linear layer; `"spatial"`: means over every skip connection
            and the middle, joined, then two linear layers with a ReLU between them, or (`"spatial_v2"`) group norm and
            SiLU.
        time_embedding_dim (`int`, *optional*): Width of the time embedding; `None`: `4 * block_out_channels[0]`.
        time_proj_dim (`int`, *optional*): Width of the sinusoid; `None`: `block_out_channels[0]`.
        timestep_scale (`float`, defaults to 1.0): Multiplies t before the embedding: 0.25 for 4000 steps that are
            embedded as 0..1000.
        noise_schedule (`dict`, *optional*): The noise schedule that it was trained on, which pipelines compare with
            that of their scheduler: what `diffusers_adm.schedulers.noise_schedules.noise_schedule_of(scheduler)`
            gives. It changes nothing in the network. Empty: trained on clean images. `None`: not known.

    Raises:
        ValueError: For a combination of arguments that describes no network of this family.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock", "Attention", "AttentionPool2D", "SpatialPool"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int],
        in_channels: int = 3,
        num_classes: int = 1000,
        down_block_types: tuple[str, ...] = (
            "ResnetDownsampleBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
        ),
        block_out_channels: tuple[int, ...] = (128, 256, 384, 512),
        layers_per_block: int = 2,
        downsample_type: ResampleKind = "resnet",
        dropout: float = 0.0,
        act_fn: AdaGNActivation = "silu",
        attention_head_dim: int | None = 64,
        num_attention_heads: int | tuple[int, ...] | None = None,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: TimeInjection = "scale_shift",
        pool: PoolKind = "attention",
        time_embedding_dim: int | None = None,
        time_proj_dim: int | None = None,
        timestep_scale: float = 1.0,
        noise_schedule: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._check_config()
        time_embed_dim = time_embedding_dim or 4 * block_out_channels[0]
        time_proj_dim = time_proj_dim or block_out_channels[0]

        # 1. input and time
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.time_proj = Timesteps(time_proj_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_proj_dim, time_embed_dim)

        # 2. encoder and middle
        factory = BlockFactory(self.config, time_embed_dim)
        self.down_blocks, skip_channels = factory.down_blocks(down_block_types, layers_per_block, downsample_type)
        self.mid_block = factory.mid_block("self", norm_num_groups)

        # 3. pool
        channels = block_out_channels[-1]
        if pool in ("attention", "adaptive"):
            self.conv_norm_out = AdaGroupNormAct(norm_num_groups, channels, norm_eps, "silu")
        if pool == "attention":
            height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
            last_level = len(block_out_channels) - 1
            num_heads, _ = factory.heads(last_level)
            size = (height // 2**last_level, width // 2**last_level)
            self.head = AttentionPool2D(size, channels, num_heads, num_classes)
        elif pool == "adaptive":
            # As in guided-diffusion, an untrained classifier of this kind finds all classes equally likely.
            self.head = zero_init(nn.Linear(channels, num_classes))
        else:
            width = SPATIAL_POOL_HIDDEN_DIM
            between = [nn.ReLU()] if pool == "spatial" else [nn.GroupNorm(SPATIAL_POOL_NUM_GROUPS, width), nn.SiLU()]
            self.head = SpatialPool(
                nn.Linear(sum(skip_channels) + channels, width), *between, nn.Linear(width, num_classes)
            )

    def _check_config(self) -> None:
        config = self.config
        check_levels(config, config.down_block_types)
        if config.pool not in get_args(PoolKind):
            raise ValueError(f"`pool` is {config.pool!r}; it must be one of {list(get_args(PoolKind))}.")
        kinds = [DOWN_BLOCK_TYPES[block_type].attention for block_type in config.down_block_types]
        if set(kinds) - {None, "self"}:
            raise ValueError(f"`down_block_types` is {tuple(config.down_block_types)}; a classifier reads no text.")
        check_heads(config, [*kinds[:-1], "self"])  # the last level's are those of the middle and the attention pool
        channels, head_dim = config.block_out_channels[-1], config.attention_head_dim
        if config.pool == "attention" and config.num_attention_heads is None and channels % (head_dim or channels):
            raise ValueError(
                f"`attention_head_dim` is {head_dim}; the attention pool needs a divisor of the {channels} channels of "
                "the last level. Choose one, or set `num_attention_heads`."
            )
        size, factor = config.sample_size, 2 ** (len(config.block_out_channels) - 1)
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 and side % factor == 0 for side in sides):
            raise ValueError(
                f"`sample_size` is {size}; it must be one number or (height, width), positive and divisible by "
                f"{factor}, the total downsampling of this model."
            )

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> AdaGNClassifierOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Noisy images x_t.
            timestep (`int`, `float` or `torch.Tensor` of shape `()` or `(batch_size,)`): Numbers of the full training
                chain; 0 is one step of noise.
            return_dict (`bool`, defaults to `True`): Return an [`AdaGNClassifierOutput`] instead of a tuple.

        Returns:
            [`AdaGNClassifierOutput`] or `tuple`: `.logits` of shape `(batch_size, num_classes)` and `.features`, what
            the last linear layer made them of, of shape `(batch_size, channels)`.

        Raises:
            ValueError: For a wrong number of channels, a size that the network or its attention pool cannot take, and
                a number of timesteps that is neither one nor one for each example.
        """
        config = self.config
        check_sample(sample, timestep, config.in_channels, len(config.block_out_channels))
        if config.pool == "attention":
            factor = 2 ** (len(config.block_out_channels) - 1)
            expected = tuple(factor * size for size in self.head.size)
            if tuple(sample.shape[-2:]) != expected:
                raise ValueError(
                    f"`sample` is {sample.shape[-2]} x {sample.shape[-1]}, but the attention pool of this classifier "
                    f"was built for {expected[0]} x {expected[1]}. Resize the images, or use a classifier of that size."
                )

        # 1. time -> (B, time_embed_dim)
        timesteps = expand_timesteps(timestep, sample)
        if config.timestep_scale != 1.0:
            timesteps = timesteps.float() * config.timestep_scale
        emb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        emb = ADAGN_ACTIVATIONS[config.act_fn](emb)  # every residual block starts with it

        # 2. encoder and middle
        hidden_states = self.conv_in(sample)  # (B, block_out_channels[0], H, W)
        is_spatial = config.pool in ("spatial", "spatial_v2")
        # The means alone: without gradients, nothing else needs the skip connections of a classifier.
        means = [hidden_states.mean(dim=(2, 3))] if is_spatial else []  # (B, C) each
        for block in self.down_blocks:
            hidden_states, skips = block(hidden_states, emb)
            if is_spatial:
                means += [skip.mean(dim=(2, 3)) for skip in skips]
        hidden_states = self.mid_block(hidden_states, emb)

        # 3. pool -> (B, num_classes), (B, C)
        if config.pool == "attention":
            logits, features = self.head(self.conv_norm_out(hidden_states))
        elif config.pool == "adaptive":
            features = self.conv_norm_out(hidden_states).mean(dim=(2, 3))
            logits = self.head(features)
        else:
            logits, features = self.head([*means, hidden_states.mean(dim=(2, 3))])

        if not return_dict:
            return logits, features
        return AdaGNClassifierOutput(logits=logits, features=features)
