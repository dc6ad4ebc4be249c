"""
AdaGNClassifierModel: classifies noisy images, for classifier guidance.

ADM (Dhariwal & Nichol 2021, https://huggingface.co/papers/2105.05233), section 4: the down path and the middle block of
the U-Net, then a pool. The blocks are the U-Net's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import nn

from ..ops.adagn import ADAGN_ACTIVATIONS, AdaGNActivation, AdaGroupNormAct
from .config_checks import PoolKind, ResampleKind, TimeInjection, block_specs, check_classifier, per_level
from .input_checks import check_sample, check_shape
from .loading import WholeModelMixin
from .unet_2d_adagn import (
    DownBlock,
    Layers,
    MidBlock,
    ResBlockCompileMixin,
    expand_timesteps,
    resolve_heads,
    zero_init,
)


# Width of the hidden layer of the spatial pools, and groups of its norm, as in guided-diffusion. The config's number of
# groups does not apply to it.
SPATIAL_POOL_HIDDEN_DIM, SPATIAL_POOL_NUM_GROUPS = 2048, 32


@dataclass
class AdaGNClassifierOutput(BaseOutput):
    """
    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_classes)`): Before the softmax.
        features (`torch.Tensor` of shape `(batch_size, channels)`, *optional*): Input of the last linear layer: a
            description of the image, for comparing samples. The channels are those of the last level, or the 2048 of
            the hidden layer of a spatial pool.
    """

    logits: torch.Tensor
    # With a default, because Accelerate's mixed precision builds the output again from a dict.
    features: torch.Tensor | None = None


class AttentionPool2D(nn.Module):
    """
    One vector per image: the mean over all positions attends to every position and to itself (CLIP, Radford et al.
    2021, https://huggingface.co/papers/2103.00020, section 2.4). Each position has a learned vector, so the size is
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
        positions = hidden_states.flatten(2).transpose(1, 2)  # (B, H*W, C)
        tokens = torch.cat([positions.mean(dim=1, keepdim=True), positions], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        # The outputs of the other tokens are not used, so the mean is the only query.
        query, key, value = self.to_q(tokens[:, 0])[:, None], self.to_k(tokens), self.to_v(tokens)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)) for x in (query, key, value))
        pooled = dispatch_attention_fn(query, key, value).flatten(1)  # (B, 1, heads, C / heads) -> (B, C)
        return self.to_out(pooled), pooled  # (B, out_dim), (B, C)


class SpatialPool(nn.Sequential):
    """Layers on concatenated vectors; concatenated here, where a model split over devices has them on one device."""

    def forward(self, means: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.cat(means, dim=1)
        *hidden_layers, to_out = self
        for layer in hidden_layers:
            features = layer(features)
        return to_out(features), features  # (B, out_dim), (B, SPATIAL_POOL_HIDDEN_DIM)


class AdaGNClassifierModel(ResBlockCompileMixin, WholeModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    Classifier of noisy images: log p(y | x_t) and, by its gradient with respect to x_t, classifier guidance.

    Its arguments have the names and meanings of [`AdaGNUNet2DModel`]'s; the defaults are those of ADM's classifiers
    (128 channels, two residual blocks per level, heads of 64 channels, residual resampling, attention pool).

    Args:
        sample_size (`int` or `tuple[int, int]`): Height and width of the images. The attention pool takes no other
            size; the other pools take any size divisible by `2 ** (len(block_out_channels) - 1)`.
        in_channels (`int`, defaults to 3): Channels of the images.
        num_classes (`int`, defaults to 1000): Number of logits.
        down_block_types (`tuple[str]`): One per level: `"DownBlock2D"`, `"AttnDownBlock2D"` (self-attention after each
            residual block) or `"ResnetDownsampleBlock2D"` (residual downsampling).
        block_out_channels (`tuple[int]`, defaults to `(128, 256, 384, 512)`): Channels per level.
        layers_per_block (`int`, defaults to 2): Residual blocks per level.
        downsample_type (`str`, defaults to `"resnet"`): `"conv"` or `"resnet"`, for the levels with attention; the
            other block types imply it.
        dropout (`float`, defaults to 0.0): Dropout before the second convolution of each residual block.
        act_fn (`str`, defaults to `"silu"`): Activation of the residual blocks.
        attention_head_dim (`int`, *optional*, defaults to 64): Channels of an attention head; `None`: one head. The
            attention pool has as many heads as the last level.
        num_attention_heads (`int` or `tuple[int]`, *optional*): Number of heads, for all levels or per level; takes
            precedence over `attention_head_dim`.
        norm_num_groups (`int`, defaults to 32): Groups of every group norm except that of the pool `"spatial_v2"`.
        norm_eps (`float`, defaults to 1e-5): Epsilon of every group norm.
        resnet_time_scale_shift (`str`, defaults to `"scale_shift"`): AdaGN, or `"default"` (added).
        pool (`str`, defaults to `"attention"`): From activations to logits. `"attention"`: one layer of attention, with
            their mean as the query; `"adaptive"`: mean and linear layer; `"spatial"`: means over every skip connection
            and the middle block, concatenated, then two linear layers with a ReLU between them, or (`"spatial_v2"`)
            group norm and SiLU.
        time_embedding_dim (`int`, *optional*): Width of the time embedding; `None`: `4 * block_out_channels[0]`.
        time_proj_dim (`int`, *optional*): Width of the sinusoid; `None`: `block_out_channels[0]`.
        timestep_scale (`float`, defaults to 1.0): Multiplies t before the embedding: 0.25 for 4000 steps that are
            embedded as 0..1000.
        noise_schedule (`dict`, *optional*): The noise schedule that it was trained with, as returned by
            `diffusers_adm.schedulers.noise_schedules.noise_schedule_of(scheduler)`; pipelines compare it with that of
            their scheduler. It does not change the network. Empty: trained on clean images. `None`: not known.
        image_format (`dict`, *optional*): Format of the images that it was trained on, the result of
            `diffusers_adm.conditioning.image_format.ImageFormat.to_config()`; pipelines compare it with theirs. It does
            not change the network. `None`: not known.

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
        image_format: dict[str, Any] | None = None,
    ):
        super().__init__()
        config, last = self.config, len(block_out_channels) - 1
        check_classifier(config)
        time_embed_dim = time_embedding_dim or 4 * block_out_channels[0]
        time_proj_dim = time_proj_dim or block_out_channels[0]

        # 1. input and time
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.time_proj = Timesteps(time_proj_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_proj_dim, time_embed_dim)

        # 2. down path and middle block
        layers = Layers(config, time_embed_dim)
        specs = block_specs(config, "down_block_types")
        heads = resolve_heads(config, [spec.attention for spec in specs])
        self.down_blocks = nn.ModuleList()
        skip_channels = [block_out_channels[0]]
        for level, (spec, channels) in enumerate(zip(specs, block_out_channels, strict=True)):
            resnets, attentions, downsampler = [], [], None
            for _ in range(per_level(layers_per_block, last + 1)[level]):
                resnets.append(layers.res_block(skip_channels[-1], channels, spec))
                attentions.append(layers.attention(spec.attention, level, heads[level]))
                skip_channels.append(channels)
            if level < last:
                downsampler = layers.downsampler(channels, spec)
                skip_channels.append(channels)
            self.down_blocks.append(DownBlock(resnets, attentions, downsampler, layers.skips_time_act(spec)))
        channels = block_out_channels[last]
        last_heads = resolve_heads(config, [None] * last + ["self"])[last]
        attention = layers.self_attention(channels, last_heads, norm_num_groups)
        self.mid_block = MidBlock([layers.plain_res_block(channels, channels) for _ in range(2)], [attention])

        # 3. pool
        if pool in ("attention", "adaptive"):
            self.conv_norm_out = AdaGroupNormAct(norm_num_groups, channels, norm_eps, "silu")
        if pool == "attention":
            height, width = per_level(sample_size, 2)
            self.head = AttentionPool2D((height // 2**last, width // 2**last), channels, last_heads.number, num_classes)
        elif pool == "adaptive":
            # As in guided-diffusion, such a classifier starts with all classes equally likely.
            self.head = zero_init(nn.Linear(channels, num_classes))
        else:
            width = SPATIAL_POOL_HIDDEN_DIM
            between = [nn.ReLU()] if pool == "spatial" else [nn.GroupNorm(SPATIAL_POOL_NUM_GROUPS, width), nn.SiLU()]
            self.head = SpatialPool(
                nn.Linear(sum(skip_channels) + channels, width), *between, nn.Linear(width, num_classes)
            )

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> AdaGNClassifierOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        Classify noisy images.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Noisy images x_t.
            timestep (`int`, `float` or `torch.Tensor` of shape `()` or `(batch_size,)`): Timesteps of the full
                training schedule; 0 is one step of noise.
            return_dict (`bool`, defaults to `True`): Return an [`AdaGNClassifierOutput`] instead of a tuple.

        Returns:
            [`AdaGNClassifierOutput`] or `tuple`: `.logits` of shape `(batch_size, num_classes)` and `.features`, the
            input of the last linear layer, of shape `(batch_size, channels)`.

        Raises:
            ValueError: For a wrong number of channels or timesteps, or a size that the network or its attention pool
                cannot take.
            TypeError: For samples that are not floating point.
        """
        config = self.config
        check_sample(config, sample, timestep)
        if config.pool == "attention":
            factor = 2 ** (len(config.block_out_channels) - 1)
            check_shape(
                "sample", sample, ("batch_size", config.in_channels, *(factor * size for size in self.head.size))
            )

        # 1. time -> (B, time_embed_dim)
        timesteps = expand_timesteps(timestep, sample)
        if config.timestep_scale != 1.0:
            timesteps = timesteps.float() * config.timestep_scale
        emb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        emb = ADAGN_ACTIVATIONS[config.act_fn](emb)  # every residual block starts with it

        # 2. down path and middle block
        hidden_states = self.conv_in(sample)  # (B, block_out_channels[0], H, W)
        is_spatial = config.pool in ("spatial", "spatial_v2")
        # Only the means are kept: without gradients, nothing else needs the skip connections of a classifier.
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
