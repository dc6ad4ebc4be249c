"""
AdaGNControlNetModel: conditions a trained ablated diffusion model on an image (edges, colours, ...).

ControlNet (Zhang, Rao & Agrawala 2023, https://huggingface.co/papers/2302.05543), section 3: a copy of the down path
and middle block of a U-Net, with the conditioning image as an additional input. Its activations are added to those of
the U-Net through convolutions that start at zero. The blocks are the U-Net's own; parameter names are those of
diffusers' `ControlNetModel`.
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
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..ops.adagn import AdaGNActivation
from .config_checks import (
    AdditionEmbedType,
    ClassEmbedType,
    CrossAttentionNorm,
    EncoderHidDimType,
    ResampleKind,
    TimeEmbeddingType,
    TimeInjection,
    block_specs,
    check_choice,
    check_encoder,
    check_neutral_arguments,
    has_cross_attention,
    per_level,
    with_defaults_of,
)
from .input_checks import check_shape
from .unet_2d_adagn import AdaGNUNet2DModel, DownBlock, EncoderMixin, Layers, resolve_heads, zero_init


ChannelOrder = Literal["rgb", "bgr"]

# Channels of the first convolutions over the conditioning image, as in diffusers, which halve it three times. A
# ControlNet that halves it less often takes the first of them: at full resolution 256 channels cost more than the rest.
CONDITIONING_CHANNELS = (16, 32, 96, 256)
# Parts that do not depend on the width of the blocks, so that a narrower ControlNet copies them as well.
CONDITION_PARTS = ("time_proj", "time_embedding", "class_embedding", "encoder_hid_proj", "add_embedding")
# In guess mode the residual of the first skip connection has a tenth of the middle block's weight, as in diffusers.
GUESS_MODE_FIRST_SCALE = 0.1
# Keys that must be equal in the configs of ControlNet and U-Net, for both to take the same inputs.
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


GIVEN_TWICE = "Both `controlnet_cond` and `controlnet_cond_embeds` were given. Pass one of them."


def residual_channels(block_out_channels: Sequence[int], layers_per_block: int | Sequence[int]) -> list[int]:
    """Channels of the skip connections of a U-Net, that of the input convolution first, and of its middle block."""
    levels = len(block_out_channels)
    channels = [block_out_channels[0]]
    for level, number in enumerate(per_level(layers_per_block, levels)):
        has_downsampler = level < levels - 1
        channels += [block_out_channels[level]] * (number + has_downsampler)
    return [*channels, block_out_channels[-1]]


def strides_of(factor: int, stages: int) -> list[int]:
    """Strides of `stages` convolutions that downsample an image by `factor`: its prime factors, then ones."""
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"`conditioning_downsampling_factor` is {factor}; it must be a positive integer.")
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
    A small convolutional network from the conditioning image to features of the size of the sample. Its last layer
    starts at zero (ControlNet, section 3.2).

    Args:
        channels (`int`): Channels of the features.
        conditioning_channels (`int`): Channels of the image.
        block_out_channels (`tuple[int]`): Channels of the stages.
        factor (`int`): Height and width of the image, relative to the sample.
    """

    def __init__(self, channels: int, conditioning_channels: int, block_out_channels: tuple[int, ...], factor: int):
        super().__init__()
        self.conv_in = nn.Conv2d(conditioning_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.blocks = nn.ModuleList()
        for stage, stride in enumerate(strides_of(factor, len(block_out_channels) - 1)):
            in_channels, out_channels = block_out_channels[stage], block_out_channels[stage + 1]
            self.blocks.append(nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1))
            # A kernel that is smaller than its stride would skip pixels of the image.
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
    A ControlNet for [`AdaGNUNet2DModel`], [`~diffusers.UNet2DModel`] and [`~diffusers.UNet2DConditionModel`]: for
    pixels or latents, with or without classes, text, a learned variance, and additional input channels.

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
            time_embedding_act_fn, time_cond_proj_dim, num_attention_heads, null_class_id, time_proj_dim,
            timestep_scale: The encoder of the ControlNet, as in [`AdaGNUNet2DModel`].
        conditioning_channels (`int`, defaults to 3): Channels of the conditioning image.
        controlnet_conditioning_channel_order (`str`, defaults to `"rgb"`): `"bgr"` reverses the order of its channels
            first.
        conditioning_embedding_out_channels (`tuple[int]`, defaults to `(16, 32, 96, 256)`): Channels of the layers that
            embed it.
        conditioning_downsampling_factor (`int`, *optional*): Its height and width, relative to the sample: 1 for
            pixels, the downsampling factor of the autoencoder for latents. `None`, as in diffusers: each layer after
            the first halves it. It may have one prime factor for each of these layers.
        global_pool_conditions (`bool`, defaults to `False`): Average the residuals over all positions.
        unet_block_out_channels (`tuple[int]`, *optional*): `block_out_channels` of the U-Net, where the ControlNet is
            narrower than it; `None`: they are the same.
        noise_schedule (`dict`, *optional*): The noise schedule that it was trained with, as returned by
            `diffusers_adm.schedulers.noise_schedules.noise_schedule_of(scheduler)`; pipelines compare it with that of
            their scheduler. It does not change the network. `None`: not known.
        image_format (`dict`, *optional*): Format of the images of the base model that it was trained for, the result of
            `ImageFormat.to_config()`. It does not change the network. `None`: not known.
        condition_format (`dict`, *optional*): Format of the conditioning images, the result of
            `diffusers_adm.conditioning.image_format.ImageFormat.to_config()`; it tells pipelines which values the
            images that they are given have. It does not change the network. `None`: 8-bit images, or numbers in [0, 1].
        neutral_arguments (`Any`): Arguments of `ControlNetModel` for parts that this family lacks. They may only have
            the values in `config_checks.NEUTRAL_ARGUMENTS`.

    Raises:
        ValueError: For a combination of arguments that describes no network of this family.
    """

    _supports_gradient_checkpointing = True
    # A group of its own, as `embed_condition` runs it outside of `forward`.
    _group_offload_block_modules = ["controlnet_cond_embedding"]
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
        image_format: dict[str, Any] | None = None,
        condition_format: dict[str, Any] | None = None,
        **neutral_arguments: Any,
    ):
        super().__init__()
        config, levels = self.config, len(block_out_channels)
        check_neutral_arguments(type(self), neutral_arguments)
        check_encoder(config)
        check_choice(
            "controlnet_conditioning_channel_order", controlnet_conditioning_channel_order, get_args(ChannelOrder)
        )
        wide = unet_block_out_channels or block_out_channels
        if len(wide) != levels:
            raise ValueError(
                f"`unet_block_out_channels` has {len(wide)} entries {tuple(wide)} but `block_out_channels` has "
                f"{levels} {tuple(block_out_channels)}. Give one per level."
            )
        factor = conditioning_downsampling_factor
        if factor is None:
            factor = 2 ** (len(conditioning_embedding_out_channels) - 1)
        self.conditioning_factor = factor

        # 1. input, time, class and text, as in the U-Net
        self._build_embeddings()

        # 2. down path and middle block, as in the U-Net
        layers = Layers(config, self.time_embed_dim)
        num_resnets = per_level(layers_per_block, levels)
        num_layers = per_level(transformer_layers_per_block, levels)
        specs = block_specs(config, "down_block_types")
        heads = resolve_heads(config, [spec.attention for spec in specs])
        self.down_blocks = nn.ModuleList()
        skip_channels = [block_out_channels[0]]
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
        self.mid_block = layers.mid_block()

        # 3. conditioning image
        self.controlnet_cond_embedding = ConditioningEmbedding(
            block_out_channels[0], conditioning_channels, conditioning_embedding_out_channels, factor
        )

        # 4. zero convolutions, to the widths of the U-Net
        *unet_channels, unet_mid_channels = self.residual_channels
        self.controlnet_down_blocks = nn.ModuleList(
            zero_init(nn.Conv2d(own, of_unet, kernel_size=1))
            for own, of_unet in zip(skip_channels, unet_channels, strict=True)
        )
        self.controlnet_mid_block = zero_init(nn.Conv2d(block_out_channels[-1], unet_mid_channels, kernel_size=1))

    @property
    def residual_channels(self) -> list[int]:
        """Channels of the residuals: those of the skip connections and the middle block of the U-Net."""
        wide = self.config.unet_block_out_channels or self.config.block_out_channels
        return residual_channels(wide, self.config.layers_per_block)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """As in `EncoderMixin`; the config of a `ControlNetModel` is completed with the defaults of that class."""
        saved_as = config_dict.get("_class_name")
        if saved_as in ("AdaGNUNet2DModel", "UNet2DModel", "UNet2DConditionModel"):
            raise ValueError(
                f"This is the config of a U-Net (`{saved_as}`). Load it with its class, and make a ControlNet for it "
                "with `AdaGNControlNetModel.from_unet`."
            )
        if saved_as == "ControlNetModel":
            config_dict = with_defaults_of(ControlNetModel, cls, config_dict)
            if not has_cross_attention(config_dict):
                raise ValueError(
                    "This is the config of a `ControlNetModel` without any cross-attention, whose arguments do not "
                    "mean the same as those of an `AdaGNControlNetModel`. Load it with `diffusers.ControlNetModel`."
                )
        return super().extract_init_dict(config_dict, **kwargs)

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
        Make a ControlNet for a U-Net, with a copy of the weights of its down path and middle block. Weights of adapters
        (LoRA) that have not been fused are not copied.

        Args:
            unet ([`AdaGNUNet2DModel`], [`~diffusers.UNet2DModel`] or [`~diffusers.UNet2DConditionModel`]): Remains
                unchanged.
            controlnet_conditioning_channel_order (`str`, defaults to `"rgb"`): `"bgr"` reverses the order of the
                channels of the conditioning image first.
            conditioning_embedding_out_channels (`tuple[int]`, *optional*): Channels of the layers that embed it.
                `None`: as many of 16, 32, 96, 256 as the factor below needs, two at least.
            load_weights_from_unet (`bool`, defaults to `True`): `False` keeps the random weights.
            conditioning_channels (`int`, defaults to 3): Channels of the conditioning image.
            conditioning_downsampling_factor (`int`, defaults to 1): Its height and width, relative to the samples; for
                latents the downsampling factor of the autoencoder, such as 8.
            width (`float`, defaults to 1.0): Channels of the blocks, relative to the U-Net. A ControlNet narrower than
                1 copies only the embeddings of time, class and text; its blocks start at random.

        Raises:
            ValueError: For a `width` outside (0, 1] or a U-Net with cross-attention only in its up path.
        """
        unet = getattr(unet, "_orig_mod", unet)  # below the wrapper of `torch.compile`
        if not 0 < width <= 1:
            raise ValueError(f"`width` is {width}; it must lie in (0, 1], where 1 is the width of the U-Net.")
        # This class gives all arguments, also those of other classes, the meaning that they have here.
        with torch.device("meta"):
            blank = AdaGNUNet2DModel.from_config({**unet.config, "_class_name": type(unet).__name__})
        own = inspect.signature(cls.__init__).parameters
        arguments = {name: value for name, value in blank.config.items() if name in own}
        if blank.has_cross_attention != has_cross_attention(arguments):
            raise ValueError(
                "`unet` has cross-attention only in its up path, which a ControlNet does not have. Use a U-Net with "
                "cross-attention in `down_block_types` or `mid_block_type`."
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
            # PEFT names the layer that it adapts `base_layer`, and one of which it trains a copy `original_module`.
            weights = {
                name.replace(".base_layer.", ".").replace(".original_module.", "."): value
                for name, value in unet.state_dict().items()
                if ".lora_" not in name and ".modules_to_save." not in name
            }
            names = [name for name in controlnet.state_dict() if not name.startswith("controlnet_")]
            if width != 1:
                names = [name for name in names if name.partition(".")[0] in CONDITION_PARTS]
            controlnet.load_state_dict({name: weights[name] for name in names}, strict=False)
        # Not with `ModelMixin.to`, which warns about every dtype.
        return nn.Module.to(controlnet, device=unet.device, dtype=unet.dtype)

    def check_base(self, unet: ModelMixin) -> None:
        """Check that this ControlNet was made for such a U-Net: with the same skip connections and conditions."""
        config, base = self.config, unet.config
        if "up_block_types" not in base:
            raise ValueError(f"A {type(self).__name__} belongs to a U-Net, but this is {type(unet).__name__}.")
        base_channels = residual_channels(base["block_out_channels"], base["layers_per_block"])
        found = {
            "channels of skip connections and middle block": (self.residual_channels, base_channels),
            "width of the text": (_text_width(config), _text_width(base)),
        }
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
                f"{'; '.join(differing)}. Use the U-Net that it was made for, or make a ControlNet for this one with "
                "`from_unet`."
            )

    @apply_forward_hook  # offloading brings the network to the device before its `forward`, or this
    def embed_condition(self, controlnet_cond: torch.Tensor) -> torch.Tensor:
        r"""
        Embed conditioning images. The embedding does not depend on sample, timestep and other conditions, so that
        sampling computes it once for all steps and passes it as `controlnet_cond_embeds`.

        Args:
            controlnet_cond (`torch.Tensor` of shape `(batch_size, conditioning_channels, factor * height, factor *
                width)`): Conditioning images, in [0, 1] and in the dtype of the samples.

        Returns:
            `torch.Tensor` of shape `(batch_size, block_out_channels[0], height, width)`.

        Raises:
            ValueError: For images of another shape.
            TypeError: For images that are not floating point.
        """
        self._check_images(controlnet_cond, ("batch_size", "height", "width"))
        factor, (height, width) = self.conditioning_factor, controlnet_cond.shape[2:]
        if height % factor or width % factor:
            raise ValueError(
                f"`controlnet_cond` is {height} x {width}; both must be divisible by {factor}, the number of its "
                "pixels for each pixel of a sample. Resize it."
            )
        return self._embed_images(controlnet_cond)

    def _check_images(self, controlnet_cond: torch.Tensor | None, expected: tuple[int | str, ...]) -> None:
        batch_size, height, width = expected
        check_shape("controlnet_cond", controlnet_cond, (batch_size, self.config.conditioning_channels, height, width))
        if not controlnet_cond.is_floating_point():
            raise TypeError(
                f"`controlnet_cond` is {controlnet_cond.dtype}; it must be floating point, in [0, 1]. Convert 8-bit "
                "images with `images.float() / 255`."
            )

    def _embed_images(self, controlnet_cond: torch.Tensor) -> torch.Tensor:
        if self.config.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = controlnet_cond.flip(1)
        return self.controlnet_cond_embedding(controlnet_cond)

    def join(self, *others: AdaGNControlNetModel) -> AdaGNMultiControlNetModel:
        """This ControlNet and others of the same U-Net as one model, for code that does not import its class."""
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
        controlnet_cond_embeds: torch.Tensor | None = None,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        r"""
        Compute the residuals that condition a U-Net on images.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Input of the U-Net.
            timestep, encoder_hidden_states, class_labels, timestep_cond, attention_mask, added_cond_kwargs,
                cross_attention_kwargs, encoder_attention_mask: Further inputs of the U-Net; see
                [`AdaGNUNet2DModel.forward`].
            controlnet_cond (`torch.Tensor` of shape `(batch_size, conditioning_channels, factor * height, factor *
                width)`): Conditioning images, in [0, 1].
            conditioning_scale (`float` or `torch.Tensor` of shape `()`, defaults to 1.0): Multiplies all residuals.
            guess_mode (`bool`, defaults to `False`): Weight the residuals by resolution, on a logarithmic scale from
                0.1 for the first skip connection to 1 for the middle block.
            return_dict (`bool`, defaults to `True`): Return a [`~diffusers.models.controlnets.ControlNetOutput`].
            controlnet_cond_embeds (`torch.Tensor` of shape `(rows, block_out_channels[0], height, width)`, *optional*):
                The result of `embed_condition`, in place of `controlnet_cond`. `rows` divides `batch_size`: a batch
                that holds the same images several times, as that of two passes of guidance, takes one copy.

        Returns:
            [`~diffusers.models.controlnets.ControlNetOutput`] or `tuple`: `.down_block_res_samples`, a tuple with one
            residual for each skip connection, that of the input convolution first, and `.mid_block_res_sample`. They
            are `down_block_additional_residuals` and `mid_block_additional_residual` of the U-Net.

        Raises:
            ValueError: For a conditioning image that is missing, of another shape or given in both forms, and for
                inputs that the U-Net would refuse.
            TypeError: For images that are not floating point.
        """
        # 1. time, class and text
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

        # 2. input and conditioning image -> (B, block_out_channels[0], H, W)
        batch_size, _, height, width = sample.shape
        if controlnet_cond_embeds is None:
            factor = self.conditioning_factor
            self._check_images(controlnet_cond, (batch_size, factor * height, factor * width))
            controlnet_cond_embeds = self._embed_images(controlnet_cond.to(sample.dtype))
        elif controlnet_cond is not None:
            raise ValueError(GIVEN_TWICE)
        else:
            expected = ("rows", self.config.block_out_channels[0], height, width)
            check_shape("controlnet_cond_embeds", controlnet_cond_embeds, expected)
        rows = len(controlnet_cond_embeds)
        if not rows or batch_size % rows:
            raise ValueError(
                f"`controlnet_cond_embeds` has {rows} rows, which do not divide the batch of {batch_size} samples. "
                "Embed one image for each sample, or for each of several equal parts of the batch."
            )
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        hidden_states = self.conv_in(sample).unflatten(0, (batch_size // rows, rows))
        hidden_states = (hidden_states + controlnet_cond_embeds).flatten(0, 1)

        # 3. down path and middle block
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


def _text_width(config: Any) -> int | None:
    if not has_cross_attention(config):
        return None
    return per_level(config.get("encoder_hid_dim") or config["cross_attention_dim"], 1)[0]


def _narrow(unet: AdaGNUNet2DModel, width: float) -> dict[str, Any]:
    """Arguments that differ from the U-Net's in a ControlNet with about `width` times its channels."""
    config = unet.config
    wide = config.block_out_channels
    # The levels keep their proportions, so that the numbers have large divisors.
    common_of_unet = math.gcd(*wide)
    common = max(1, round(width * common_of_unet))
    if common >= 8:
        common = round(common / 8) * 8
    channels = [number // common_of_unet * common for number in wide]
    # About as many channels per group as in the U-Net.
    wanted = width * config.norm_num_groups
    groups = min((d for d in range(1, common + 1) if common % d == 0), key=lambda divisor: abs(divisor - wanted))

    def divisors(name: str) -> tuple[int | None, ...]:
        """Numbers or widths of heads: those of the U-Net, or their largest divisors that divide the fewer channels."""
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
    Several ControlNets of one U-Net, whose residuals are added up.

    Args:
        controlnets (sequence of [`AdaGNControlNetModel`]): At least one.
    """

    def __init__(self, controlnets: Sequence[AdaGNControlNetModel]):
        super().__init__()
        if not controlnets:
            raise ValueError("`controlnets` is empty; pass at least one `AdaGNControlNetModel`.")
        self.nets = nn.ModuleList(controlnets)

    def check_base(self, unet: ModelMixin) -> None:
        """Check each ControlNet as `AdaGNControlNetModel.check_base` does."""
        for number, net in enumerate(self.nets):
            try:
                net.check_base(unet)
            except ValueError as error:
                raise ValueError(f"ControlNet {number} of {len(self.nets)}, counted from 0: {error}") from error

    @apply_forward_hook
    def embed_condition(self, controlnet_cond: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """
        Embed the images of each ControlNet as `AdaGNControlNetModel.embed_condition` does.

        Args:
            controlnet_cond (sequence of `torch.Tensor`): Conditioning images, one tensor per ControlNet; `None` for one
                that does not run.

        Raises:
            ValueError: If there is not one entry per ControlNet.
        """
        if len(controlnet_cond) != len(self.nets):
            raise ValueError(
                f"There are {len(self.nets)} ControlNets and {len(controlnet_cond)} entries of `controlnet_cond`."
            )
        pairs = zip(self.nets, controlnet_cond, strict=True)
        return [None if images is None else net.embed_condition(images) for net, images in pairs]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        controlnet_cond: Sequence[torch.Tensor] = (),
        conditioning_scale: Sequence[float | torch.Tensor] = (),
        *args: Any,
        return_dict: bool = True,
        controlnet_cond_embeds: Sequence[torch.Tensor | None] | None = None,
        **kwargs: Any,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        r"""
        Sum the residuals of [`AdaGNControlNetModel.forward`]. A ControlNet whose scale is the number 0 does not run.

        Args:
            sample, timestep, encoder_hidden_states, return_dict, args, kwargs: As in [`AdaGNControlNetModel.forward`],
                for all ControlNets.
            controlnet_cond (sequence of `torch.Tensor`): Conditioning images, one tensor per ControlNet.
            conditioning_scale (sequence of `float` or `torch.Tensor`): One per ControlNet.
            controlnet_cond_embeds (sequence of `torch.Tensor`, *optional*): The result of `embed_condition`, in place
                of `controlnet_cond`.

        Raises:
            ValueError: If there is not one conditioning image and one scale per ControlNet, or if all scales are 0.
        """
        name, given = "controlnet_cond", controlnet_cond
        if controlnet_cond_embeds is not None:
            if len(controlnet_cond):
                raise ValueError(GIVEN_TWICE)
            name, given = "controlnet_cond_embeds", controlnet_cond_embeds
        numbers = (len(self.nets), len(given), len(conditioning_scale))
        if len(set(numbers)) > 1:
            raise ValueError(
                "There are {} ControlNets, {} entries of `{}` and {} of `conditioning_scale`.".format(
                    *numbers[:2], name, numbers[2]
                )
            )
        total: list[torch.Tensor] = []
        for net, entry, scale in zip(self.nets, given, conditioning_scale, strict=True):
            if not torch.is_tensor(scale) and scale == 0:
                continue
            images, embeds = (entry, None) if controlnet_cond_embeds is None else (None, entry)
            down, mid = net(
                sample,
                timestep,
                encoder_hidden_states,
                images,
                scale,
                *args,
                return_dict=False,
                controlnet_cond_embeds=embeds,
                **kwargs,
            )
            residuals = [*down, mid]
            total = [a + b for a, b in zip(total, residuals, strict=True)] if total else residuals
        if not total:
            raise ValueError(
                f"`conditioning_scale` is {list(conditioning_scale)}: no ControlNet has any effect. Leave them out."
            )
        *down, mid = total
        if not return_dict:
            return tuple(down), mid
        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=mid)

    def enable_group_offload(
        self, onload_device: torch.device, *args: Any, offload_to_disk_path: str | None = None, **kwargs: Any
    ) -> None:
        """
        Offload each ControlNet as `AdaGNControlNetModel.enable_group_offload` does, by itself, so that also
        `embed_condition` brings back what it needs; on disk, in folders as those of `save_pretrained`.
        """
        for index, net in enumerate(self.nets):
            folder = None if offload_to_disk_path is None else str(self._folder(offload_to_disk_path, index))
            net.enable_group_offload(onload_device, *args, offload_to_disk_path=folder, **kwargs)

    @staticmethod
    def _folder(directory: str | os.PathLike, index: int) -> Path:
        # Inside the component's folder, since folders next to it that model_index.json does not name are not
        # downloaded. With a dot, because diffusers looks for a variant after the dot in all names in such a folder.
        return Path(directory) / f"net.{index}"

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Save each ControlNet to a folder of its own in `save_directory`: `net.0`, `net.1`, ... `kwargs` are those of
        `AdaGNControlNetModel.save_pretrained`. A pipeline passes none on, so that it saves several ControlNets without
        its `variant`, and finds them so. Folders that an earlier call has left there are removed.

        Raises:
            ValueError: For `push_to_hub`, which would make a repository of each ControlNet.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("`push_to_hub` of several ControlNets is done by their pipeline, or by each of them.")
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
        """Load what `save_pretrained` has saved in a folder. `kwargs` are those of `AdaGNControlNetModel`."""
        folders = []
        while (folder := cls._folder(pretrained_model_name_or_path, len(folders))).is_dir():
            folders.append(folder)
        if not folders:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no folder `net.0`, so no `{cls.__name__}` was saved there. A "
                "single ControlNet is loaded with `AdaGNControlNetModel.from_pretrained`."
            )
        return cls([AdaGNControlNetModel.from_pretrained(folder, **kwargs) for folder in folders]).eval()
