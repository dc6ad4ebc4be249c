"""
AdaGNControlNetModel: a trainable branch that makes an ablated diffusion model follow a picture (edges, colours, ...).

ControlNet (Zhang, Rao & Agrawala 2023, https://huggingface.co/papers/2302.05543), section 3: a copy of the encoder and
the middle of a U-Net, which sees the picture as well, and whose activations are added to those of the U-Net through
convolutions that start at zero. The blocks are the U-Net's own; parameter names are those of diffusers'
`ControlNetModel`.
"""

from __future__ import annotations

import inspect
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.controlnets.controlnet import ControlNetModel, ControlNetOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..ops.adagn import AdaGNActivation
from .unet_2d_adagn import (
    AdaGNUNet2DModel,
    ClassEmbedType,
    EncoderMixin,
    ResampleKind,
    TimeEmbeddingType,
    TimeInjection,
    expand_timesteps,
    per_level,
    reads_text,
    zero_init,
)


ChannelOrder = Literal["rgb", "bgr"]

# Of the first convolutions over the conditioning image, as in diffusers, which halve it three times. A branch that
# halves it less often takes the first of them: at full resolution 256 channels cost more than the rest of the branch.
CONDITIONING_CHANNELS = (16, 32, 96, 256)
# Parts that a narrower branch copies all the same: they do not depend on the width of the blocks.
CONDITION_PARTS = ("time_proj", "time_embedding", "class_embedding", "encoder_hid_proj", "add_embedding")
# In guess mode the residuals of the first skip connection count a tenth of the middle's, as in diffusers.
GUESS_MODE_FIRST_SCALE = 0.1
# Keys that must be equal in the configs of a branch and of a U-Net for the branch to understand what both are given.
SHARED_CONDITIONS = (
    "in_channels",
    "center_input_sample",
    "time_embedding_type",
    "timestep_scale",
    "time_cond_proj_dim",
    "class_embed_type",
    "num_class_embeds",
    "null_class_id",
    "projection_class_embeddings_input_dim",
    "addition_embed_type",
)


def residual_channels(block_out_channels: Sequence[int], layers_per_block: int | Sequence[int]) -> list[int]:
    """Channels of the skip connections of a U-Net, that of the input convolution first, and of its middle."""
    levels = len(block_out_channels)
    channels = [block_out_channels[0]]
    for level, number in enumerate(per_level(layers_per_block, levels)):
        has_downsampler = level < levels - 1
        channels += [block_out_channels[level]] * (number + has_downsampler)
    return [*channels, block_out_channels[-1]]


def strides_of(factor: int, stages: int) -> list[int]:
    """
    The strides of `stages` convolutions that shrink an image `factor` times: its prime factors, then ones.

    Raises:
        ValueError: If it is no whole number from 1 on, or has more prime factors than there are stages.
    """
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"`conditioning_downsampling_factor` is {factor}; it must be a whole number from 1 on.")
    strides, rest = [], factor
    while rest > 1:
        divisor = next(d for d in range(2, rest + 1) if rest % d == 0)
        strides.append(divisor)
        rest //= divisor
    if len(strides) > stages:
        raise ValueError(
            f"`conditioning_downsampling_factor` is {factor}, but `conditioning_embedding_out_channels` has "
            f"{stages + 1} entries, for {stages} steps by a prime factor. Give it {len(strides) + 1} entries or more."
        )
    return strides + [1] * (stages - len(strides))


class ConditioningEmbedding(nn.Module):
    """
    From the conditioning image to features of the size of the sample: a small convolutional network with SiLUs, whose
    last layer starts at zero (ControlNet, section 3.2).

    Args:
        channels (`int`): Of the features.
        conditioning_channels (`int`): Of the image.
        block_out_channels (`tuple[int]`): Channels of the stages.
        factor (`int`): The image is so many times as high and wide as the sample.
    """

    def __init__(self, channels: int, conditioning_channels: int, block_out_channels: tuple[int, ...], factor: int):
        super().__init__()
        self.conv_in = nn.Conv2d(conditioning_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.blocks = nn.ModuleList()
        for stage, stride in enumerate(strides_of(factor, len(block_out_channels) - 1)):
            in_channels, out_channels = block_out_channels[stage], block_out_channels[stage + 1]
            self.blocks.append(nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1))
            # A kernel that is smaller than its stride would not see all of the image.
            kernel_size = max(3, stride)
            self.blocks.append(
                nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=(kernel_size - 1) // 2)
            )
        self.conv_out = zero_init(nn.Conv2d(block_out_channels[-1], channels, kernel_size=3, padding=1))

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        # (B, conditioning_channels, factor * H, factor * W) -> (B, channels, H, W)
        hidden_states = F.silu(self.conv_in(conditioning))
        for block in self.blocks:
            hidden_states = F.silu(block(hidden_states))
        return self.conv_out(hidden_states)


class AdaGNControlNetModel(EncoderMixin, AttentionMixin, ConfigMixin):
    r"""
    A ControlNet for [`AdaGNUNet2DModel`], [`~diffusers.UNet2DModel`] and [`~diffusers.UNet2DConditionModel`]: of
    pixels or latents, by class, by text, with a learned variance, with further input channels.

    Make one with `from_unet`. It loads files of diffusers' [`~diffusers.ControlNetModel`] with `from_pretrained`, and
    gives the same numbers. At creation all its residuals are exactly 0.

    Args:
        in_channels, center_input_sample, time_embedding_type, time_embedding_dim, freq_shift, flip_sin_to_cos,
            down_block_types, mid_block_type, block_out_channels, layers_per_block, mid_block_scale_factor,
            downsample_padding, downsample_type, dropout, act_fn, attention_head_dim, norm_num_groups,
            attn_norm_num_groups, norm_eps, resnet_time_scale_shift, add_attention, class_embed_type, num_class_embeds,
            num_train_timesteps, cross_attention_dim, transformer_layers_per_block, use_linear_projection,
            upcast_attention, only_cross_attention, mid_block_only_cross_attention, cross_attention_norm,
            encoder_hid_dim, encoder_hid_dim_type, addition_embed_type, addition_embed_type_num_heads,
            projection_class_embeddings_input_dim, resnet_skip_time_act, resnet_out_scale_factor,
            time_embedding_act_fn, time_cond_proj_dim, addition_time_embed_dim, num_attention_heads, null_class_id,
            time_proj_dim, timestep_scale: Of its own encoder, as in [`AdaGNUNet2DModel`].
        conditioning_channels (`int`, defaults to 3): Channels of the conditioning image.
        controlnet_conditioning_channel_order (`str`, defaults to `"rgb"`): `"bgr"` turns the order of its channels
            round first.
        conditioning_embedding_out_channels (`tuple[int]`, defaults to `(16, 32, 96, 256)`): Channels of the layers that
            embed it.
        conditioning_downsampling_factor (`int`, *optional*): How many times higher and wider than the sample it is: 1
            for pixels, what the autoencoder shrinks for latents. `None`, as in diffusers: each layer after the first
            halves it. It may have one prime factor for each of these layers.
        global_pool_conditions (`bool`, defaults to `False`): Residuals are averaged over all places.
        unet_block_out_channels (`tuple[int]`, *optional*): `block_out_channels` of the U-Net, where the branch is
            narrower than it; `None`: they are the same.
        noise_schedule (`dict`, *optional*): The noise schedule that it was trained on, which pipelines compare with
            that of their scheduler: what `diffusers_adm.schedulers.noise_schedules.noise_schedule_of(scheduler)`
            gives. It changes nothing in the network. `None`: not known.

    Raises:
        ValueError: For a combination of arguments that describes no branch of this family.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock", "Attention", "AddedKVAttention", "BasicTransformerBlock", "ConditioningEmbedding"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: TimeEmbeddingType = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int | tuple[int, ...] = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: ResampleKind = "conv",
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
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        only_cross_attention: bool | tuple[bool, ...] = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: Literal["layer_norm", "group_norm"] | None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: Literal["text_proj"] | None = None,
        addition_embed_type: Literal["text", "text_embeds"] | None = None,
        addition_embed_type_num_heads: int = 64,
        projection_class_embeddings_input_dim: int | None = None,
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_act_fn: AdaGNActivation | None = None,
        time_cond_proj_dim: int | None = None,
        addition_time_embed_dim: int | None = None,
        num_attention_heads: int | tuple[int, ...] | None = None,
        null_class_id: int | None = None,
        time_proj_dim: int | None = None,
        timestep_scale: float = 1.0,
        conditioning_channels: int = 3,
        controlnet_conditioning_channel_order: ChannelOrder = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] = CONDITIONING_CHANNELS,
        conditioning_downsampling_factor: int | None = None,
        global_pool_conditions: bool = False,
        unet_block_out_channels: tuple[int, ...] | None = None,
        noise_schedule: dict[str, Any] | None = None,
    ):
        super().__init__()
        down_block_types = tuple(name.removeprefix("UNetRes") for name in down_block_types)
        self.reads_text = reads_text((*down_block_types, mid_block_type))
        self._check_encoder(down_block_types)
        if controlnet_conditioning_channel_order not in get_args(ChannelOrder):
            raise ValueError(
                f"`controlnet_conditioning_channel_order` is {controlnet_conditioning_channel_order!r}; it must be one "
                f"of {list(get_args(ChannelOrder))}."
            )
        wide = unet_block_out_channels or block_out_channels
        if len(wide) != len(block_out_channels):
            raise ValueError(
                f"`unet_block_out_channels` has {len(wide)} entries {tuple(wide)} but `block_out_channels` has "
                f"{len(block_out_channels)} {tuple(block_out_channels)}. Give one per level."
            )
        factor = conditioning_downsampling_factor
        if factor is None:
            factor = 2 ** (len(conditioning_embedding_out_channels) - 1)
        self.conditioning_factor = factor

        # 1. encoder and middle, of the U-Net's blocks
        _, skip_channels = self._build_encoder(down_block_types)

        # 2. conditioning image
        self.controlnet_cond_embedding = ConditioningEmbedding(
            block_out_channels[0], conditioning_channels, conditioning_embedding_out_channels, factor
        )

        # 3. zero convolutions, to the widths of the U-Net
        *unet_channels, unet_mid_channels = self.residual_channels
        self.controlnet_down_blocks = nn.ModuleList(
            zero_init(nn.Conv2d(own, of_unet, kernel_size=1))
            for own, of_unet in zip(skip_channels, unet_channels, strict=True)
        )
        self.controlnet_mid_block = zero_init(nn.Conv2d(block_out_channels[-1], unet_mid_channels, kernel_size=1))

    @property
    def residual_channels(self) -> list[int]:
        """Channels of the residuals: those of the skip connections and the middle of the U-Net."""
        wide = self.config.unet_block_out_channels or self.config.block_out_channels
        return residual_channels(wide, self.config.layers_per_block)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers. What the config of a [`~diffusers.ControlNetModel`] leaves out has that class's defaults."""
        saved_as = config.get("_class_name") if isinstance(config, dict) else None
        if saved_as in ("AdaGNUNet2DModel", "UNet2DModel", "UNet2DConditionModel"):
            raise ValueError(
                f"This is the config of a U-Net (`{saved_as}`). Load it with its class, and make a branch for it with "
                "`AdaGNControlNetModel.from_unet`."
            )
        if saved_as == "ControlNetModel":
            own = inspect.signature(cls.__init__).parameters
            parameters = inspect.signature(ControlNetModel.__init__).parameters
            config = {name: p.default for name, p in parameters.items() if name in own and name != "self"} | config
            config["_use_default_values"] = []  # what that class chose by default counts as given
            if not reads_text([*config["down_block_types"], config["mid_block_type"]]):
                raise ValueError(
                    "This is the config of a `ControlNetModel` without any cross-attention, whose arguments mean other "
                    "things than those of an `AdaGNControlNetModel`. Load it with `diffusers.ControlNetModel`."
                )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_unet(
        cls,
        unet: ModelMixin,
        controlnet_conditioning_channel_order: ChannelOrder = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = None,
        load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
        *,
        conditioning_downsampling_factor: int = 1,
        width: float = 1.0,
    ) -> AdaGNControlNetModel:
        r"""
        A branch for a U-Net, with a copy of the weights of its encoder and middle. Weights of adapters (LoRA) that have
        not been fused are not copied.

        Args:
            unet ([`AdaGNUNet2DModel`], [`~diffusers.UNet2DModel`] or [`~diffusers.UNet2DConditionModel`]): Stays as it
                is.
            controlnet_conditioning_channel_order (`str`, defaults to `"rgb"`): Of the conditioning image; or `"bgr"`.
            conditioning_embedding_out_channels (`tuple[int]`, *optional*): Channels of the layers that embed it.
                `None`: as many of 16, 32, 96, 256 as the factor below needs, two at least.
            load_weights_from_unet (`bool`, defaults to `True`): `False` keeps the random weights.
            conditioning_channels (`int`, defaults to 3): Channels of the conditioning image.
            conditioning_downsampling_factor (`int`, defaults to 1): How many times higher and wider than the samples
                it is; for latents what the autoencoder shrinks, such as 8.
            width (`float`, defaults to 1.0): Less makes a narrower branch, whose blocks have about so many times the
                U-Net's channels. It copies only what embeds time, class and text; its blocks start at random.

        Raises:
            ValueError: For a `width` outside (0, 1], a U-Net that reads its text on the way up alone, and what the
                constructor raises.
        """
        unet = getattr(unet, "_orig_mod", unet)  # of a compiled one
        if not 0 < width <= 1:
            raise ValueError(f"`width` is {width}; it must lie in (0, 1]: 1 is the width of the U-Net.")
        # Which gives all arguments, also those of other classes, the meaning that they have here.
        with torch.device("meta"):
            blank = AdaGNUNet2DModel.from_config({**unet.config, "_class_name": type(unet).__name__})
        own = inspect.signature(cls.__init__).parameters
        arguments = {name: value for name, value in blank.config.items() if name in own}
        if blank.reads_text != reads_text([*arguments["down_block_types"], arguments["mid_block_type"]]):
            raise ValueError(
                "`unet` has cross-attention on its way up alone, of which a branch has no part. Take one that reads "
                "its text in `down_block_types` or `mid_block_type`."
            )
        if width != 1:
            arguments |= _narrow(blank, width)
        if conditioning_embedding_out_channels is None:
            stages = len(strides_of(conditioning_downsampling_factor, len(CONDITIONING_CHANNELS) - 1))
            used = sum(stride > 1 for stride in strides_of(conditioning_downsampling_factor, stages))
            conditioning_embedding_out_channels = CONDITIONING_CHANNELS[: max(used, 1) + 1]
        controlnet = cls(
            **arguments,
            conditioning_channels=conditioning_channels,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
            conditioning_downsampling_factor=conditioning_downsampling_factor,
        )
        if load_weights_from_unet:
            controlnet._copy_weights(unet, CONDITION_PARTS if width != 1 else None)
        # Not by `ModelMixin.to`, which warns of every dtype.
        return nn.Module.to(controlnet, device=unet.device, dtype=unet.dtype)

    def _copy_weights(self, unet: ModelMixin, parts: tuple[str, ...] | None) -> None:
        """Copies what a U-Net has under the same names, or of that these `parts` alone."""
        # PEFT keeps the layer that it adapts as `base_layer`, one that it trains a copy of as `original_module`.
        weights = {
            name.replace(".base_layer.", ".").replace(".original_module.", "."): value
            for name, value in unet.state_dict().items()
            if ".lora_" not in name and ".modules_to_save." not in name
        }
        state = {
            name: weights[name]
            for name in self.state_dict()
            if not name.startswith("controlnet_") and (parts is None or name.partition(".")[0] in parts)
        }
        self.load_state_dict(state, strict=False)

    def check_base(self, unet: ModelMixin) -> None:
        """
        Raises:
            ValueError: If this branch was made for another kind of U-Net: one with other skip connections, or which is
                given other conditions.
        """
        config, base = self.config, unet.config
        if "up_block_types" not in base:
            raise ValueError(f"A {type(self).__name__} belongs to a U-Net, but this is a {type(unet).__name__}.")
        base_types = [*base["down_block_types"], base.get("mid_block_type"), *base["up_block_types"]]
        base_channels = residual_channels(base["block_out_channels"], base["layers_per_block"])
        found = {"channels of skip connections and middle": (self.residual_channels, base_channels)}
        found["width of the text"] = (
            _text_width(config, self.reads_text),
            _text_width(base, reads_text(base_types)),
        )
        defaults = inspect.signature(AdaGNUNet2DModel.__init__).parameters
        for name in SHARED_CONDITIONS:
            found[f"`{name}`"] = (config[name], base.get(name, defaults[name].default))
        if config.addition_embed_type == "text_embeds":
            base_width = base.get("time_embedding_dim") or 4 * base["block_out_channels"][0]
            found["width of the pooled text"] = (self.time_embed_dim, base_width)
        differing = [f"{name}: {own} here, {other} there" for name, (own, other) in found.items() if own != other]
        if differing:
            raise ValueError(
                f"This {type(self).__name__} was made for another U-Net than the one it is used with: "
                f"{'; '.join(differing)}. Take the U-Net that it was made for, or make a branch for this one with "
                "`from_unet`."
            )

    def join(self, *others: AdaGNControlNetModel) -> AdaGNMultiControlNetModel:
        """This branch and others of the same U-Net as one model, for code that does not import its class."""
        return AdaGNMultiControlNetModel([self, *others])

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        controlnet_cond: torch.Tensor | None = None,
        conditioning_scale: float | torch.Tensor = 1.0,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
        *,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): What the U-Net is given.
            timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask, added_cond_kwargs,
                cross_attention_kwargs, encoder_attention_mask: What the U-Net is given; see
                [`AdaGNUNet2DModel.forward`].
            controlnet_cond (`torch.Tensor` of shape `(batch_size, conditioning_channels, factor * height, factor *
                width)`): Conditioning images, in [0, 1].
            conditioning_scale (`float` or `torch.Tensor` of shape `()`, defaults to 1.0): Multiplies all residuals.
            guess_mode (`bool`, defaults to `False`): The residuals count the less the higher their resolution: on a
                logarithmic scale from a tenth for the first skip connection to once for the middle.
            return_dict (`bool`, defaults to `True`): Return a [`~diffusers.models.controlnets.ControlNetOutput`].

        Returns:
            [`~diffusers.models.controlnets.ControlNetOutput`] or `tuple`: `.down_block_res_samples`, a tuple with one
            residual for each skip connection, that of the input convolution first, and `.mid_block_res_sample`. They
            are `down_block_additional_residuals` and `mid_block_additional_residual` of the U-Net.

        Raises:
            ValueError: For a conditioning image that is missing or of another shape, and what the U-Net raises.
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
        controlnet_cond = self._check_conditioning_image(sample, controlnet_cond)
        if self.config.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = controlnet_cond.flip(1)
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0

        # 1. time, class and text
        temb = self._embed(
            expand_timesteps(timestep, sample),
            sample.dtype,
            class_labels=class_labels,
            encoder_hidden_states=encoder_hidden_states,
            added_cond_kwargs=added_cond_kwargs,
            timestep_cond=timestep_cond,
        )
        context = self._text_context(
            sample.dtype, encoder_hidden_states, attention_mask, encoder_attention_mask, cross_attention_kwargs
        )

        # 2. input and conditioning image -> (B, block_out_channels[0], H, W)
        hidden_states = self.conv_in(sample) + self.controlnet_cond_embedding(controlnet_cond.to(sample.dtype))

        # 3. down and middle
        hidden_states, skips = self._encode(hidden_states, temb, context)

        # 4. zero convolutions and scales
        residuals = [zero_conv(skip) for zero_conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        residuals.append(self.controlnet_mid_block(hidden_states))
        if self.config.global_pool_conditions:
            residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]
        if guess_mode and not self.config.global_pool_conditions:
            last = len(residuals) - 1
            scales = [conditioning_scale * GUESS_MODE_FIRST_SCALE ** (1 - i / last) for i in range(last + 1)]
        else:
            scales = [conditioning_scale] * len(residuals)
        *down, mid = (residual * scale for residual, scale in zip(residuals, scales, strict=True))

        if not return_dict:
            return tuple(down), mid
        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=mid)

    def _check_conditioning_image(self, sample: torch.Tensor, controlnet_cond: torch.Tensor | None) -> torch.Tensor:
        batch_size, _, height, width = sample.shape
        factor = self.conditioning_factor
        expected = (batch_size, self.config.conditioning_channels, factor * height, factor * width)
        if controlnet_cond is None:
            raise ValueError(f"`controlnet_cond` is missing: this branch needs conditioning images, {expected}.")
        if tuple(controlnet_cond.shape) != expected:
            raise ValueError(
                f"`controlnet_cond` has shape {tuple(controlnet_cond.shape)}; for a `sample` of "
                f"{tuple(sample.shape)} this branch takes {expected}."
            )
        if not controlnet_cond.is_floating_point():
            raise TypeError(
                f"`controlnet_cond` is {controlnet_cond.dtype}; floating point numbers in [0, 1] are needed. Convert "
                "8-bit images by `images.float() / 255`."
            )
        return controlnet_cond


def _text_width(config: Any, has_text: bool) -> Any:
    return per_level(config.get("encoder_hid_dim") or config["cross_attention_dim"], 1)[0] if has_text else None


def _narrow(unet: AdaGNUNet2DModel, width: float) -> dict[str, Any]:
    """What the arguments of a branch with about `width` times the channels of a U-Net differ in from the U-Net's."""
    config = unet.config
    wide = config.block_out_channels
    # The levels keep their proportions, so that the numbers have large divisors.
    common_of_unet = math.gcd(*wide)
    common = max(1, round(width * common_of_unet))
    if common >= 8:
        common = round(common / 8) * 8
    channels = [number // common_of_unet * common for number in wide]
    # About as many channels in a group as in the U-Net.
    wanted = width * config.norm_num_groups
    groups = min((d for d in range(1, common + 1) if common % d == 0), key=lambda divisor: abs(divisor - wanted))

    def divisors(name: str) -> tuple[int | None, ...]:
        """Of numbers or widths of heads: the same where it divides the fewer channels, else what does."""
        entries = per_level(config[name], len(wide))
        return tuple(None if n is None else math.gcd(n, own) for n, own in zip(entries, channels, strict=True))

    return {
        "block_out_channels": tuple(channels),
        "unet_block_out_channels": tuple(wide),
        "norm_num_groups": groups,
        "attn_norm_num_groups": None if config.attn_norm_num_groups is None else groups,
        "attention_head_dim": divisors("attention_head_dim"),
        "num_attention_heads": divisors("num_attention_heads"),
        "time_embedding_dim": unet.time_embed_dim,
        "time_proj_dim": config.time_proj_dim or wide[0],
    }


class AdaGNMultiControlNetModel(ModelMixin):
    """
    Several branches of one U-Net, whose residuals are added up.

    Args:
        controlnets (sequence of [`AdaGNControlNetModel`]): At least one.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, controlnets: Sequence[AdaGNControlNetModel]):
        super().__init__()
        if not controlnets:
            raise ValueError("`controlnets` is empty; pass at least one `AdaGNControlNetModel`.")
        self.nets = nn.ModuleList(controlnets)

    def check_base(self, unet: ModelMixin) -> None:
        """
        Raises:
            ValueError: As `AdaGNControlNetModel.check_base`.
        """
        for number, net in enumerate(self.nets):
            try:
                net.check_base(unet)
            except ValueError as error:
                raise ValueError(f"Branch {number} of {len(self.nets)}, counted from 0: {error}") from error

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        controlnet_cond: Sequence[torch.Tensor] = (),
        conditioning_scale: Sequence[float | torch.Tensor] = (),
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
        *,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        r"""
        As [`AdaGNControlNetModel.forward`]. A branch whose scale is the number 0 does not run.

        Args:
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask, added_cond_kwargs,
                cross_attention_kwargs, guess_mode, return_dict, encoder_attention_mask: As of
                [`AdaGNControlNetModel.forward`], for all branches.
            controlnet_cond (sequence of `torch.Tensor`): Conditioning images, one tensor a branch.
            conditioning_scale (sequence of `float` or `torch.Tensor`): One a branch.

        Raises:
            ValueError: Unless there is one conditioning image and one scale a branch, or if all scales are 0.
        """
        numbers = (len(self.nets), len(controlnet_cond), len(conditioning_scale))
        if len(set(numbers)) > 1:
            raise ValueError(
                "There are {} branches, {} entries of `controlnet_cond` and {} of `conditioning_scale`. Pass one of "
                "each a branch.".format(*numbers)
            )
        total: list[torch.Tensor] = []
        for net, image, scale in zip(self.nets, controlnet_cond, conditioning_scale, strict=True):
            if not torch.is_tensor(scale) and scale == 0:
                continue
            down, mid = net(
                sample,
                timestep,
                encoder_hidden_states,
                image,
                scale,
                class_labels=class_labels,
                timestep_cond=timestep_cond,
                attention_mask=attention_mask,
                added_cond_kwargs=added_cond_kwargs,
                cross_attention_kwargs=cross_attention_kwargs,
                guess_mode=guess_mode,
                return_dict=False,
                encoder_attention_mask=encoder_attention_mask,
            )
            residuals = [*down, mid]
            total = [a + b for a, b in zip(total, residuals, strict=True)] if total else residuals
        if not total:
            raise ValueError(
                f"`conditioning_scale` is {list(conditioning_scale)}: no branch has anything to add. Leave the "
                "ControlNets out."
            )
        *down, mid = total
        if not return_dict:
            return tuple(down), mid
        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=mid)

    @staticmethod
    def _folder(directory: str | os.PathLike, index: int) -> Path:
        # Below that of the whole, since the Hub's client loads none beside it that model_index.json does not name. With
        # a dot, behind which diffusers looks for a variant in the name of whatever lies in a component's folder.
        return Path(directory) / f"net.{index}"

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Writes each branch to a folder of its own below `save_directory`: `net.0`, `net.1`, ... Arguments are as of one.
        A pipeline hands none of them on, so that it saves several branches without its `variant`, and finds them so.
        Branches that an earlier call has left there are removed.

        Raises:
            ValueError: For `push_to_hub`: each branch would become a repository.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("`push_to_hub` of several branches is done by their pipeline, or by each branch itself.")
        for index, net in enumerate(self.nets):
            net.save_pretrained(str(self._folder(save_directory, index)), **kwargs)
        stale = len(self.nets)
        while (folder := self._folder(save_directory, stale)).is_dir():
            shutil.rmtree(folder)
            stale += 1

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> AdaGNMultiControlNetModel:
        """
        Reads what `save_pretrained` wrote, from a folder. Arguments are those of `AdaGNControlNetModel`.

        Raises:
            ValueError: If there is no such folder `net.0`.
        """
        folders = []
        while (folder := cls._folder(pretrained_model_name_or_path, len(folders))).is_dir():
            folders.append(folder)
        if not folders:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no folder `net.0`, so no `{cls.__name__}` was saved there. A "
                "single ControlNet is loaded with `AdaGNControlNetModel.from_pretrained`."
            )
        return cls([AdaGNControlNetModel.from_pretrained(folder, **kwargs) for folder in folders]).eval()
