"""
Checks of the inputs of U-Net, ControlNet and classifier. A call is refused if it would otherwise broadcast or ignore an
input silently, or fail deep inside the network with an error that names none of the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .config_checks import per_level


def check_shape(name: str, value: torch.Tensor | None, expected: tuple[int | str, ...]) -> None:
    """Check that an input is there and has the expected shape, in which words stand for any size."""
    shape = () if value is None else tuple(value.shape)
    wanted = tuple(given if isinstance(size, str) else size for given, size in zip(shape, expected, strict=False))
    if value is None or len(shape) != len(expected) or shape != wanted:
        given = "is missing" if value is None else f"has shape {shape}"
        raise ValueError(f"`{name}` {given}; this model takes {expected}.".replace("'", ""))


def check_sample(config: Any, sample: torch.Tensor, timestep: torch.Tensor | float | int) -> None:
    """Check images and timesteps against the config of a U-Net, ControlNet or classifier."""
    check_shape("sample", sample, ("batch_size", config.in_channels, "height", "width"))
    if not sample.is_floating_point():
        raise TypeError(
            f"`sample` is {sample.dtype}; it must be floating point, with images scaled to [-1, 1]. Convert 8-bit "
            "images with `images.float() / 127.5 - 1`."
        )
    factor = 2 ** (len(config.block_out_channels) - 1)
    height, width = sample.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"`sample` is {height} x {width}; both must be divisible by {factor}, the total downsampling of this "
            f"model. Pad or crop to {math.ceil(height / factor) * factor} x {math.ceil(width / factor) * factor}."
        )
    if torch.is_tensor(timestep) and timestep.ndim > 0 and timestep.shape != (1,):
        check_shape("timestep", timestep, (sample.shape[0],))


def check_class_labels(config: Any, batch_size: int, class_labels: torch.Tensor | None) -> None:
    """Check class labels, or vectors in their place, against the config of a U-Net or ControlNet."""
    embed_type, num_embeds = config.get("class_embed_type"), config.get("num_class_embeds")
    if embed_type is None and num_embeds is None:
        if class_labels is not None:
            raise ValueError("`class_labels` were passed to a model without class embedding. Leave them out.")
        return
    if class_labels is None and config.get("null_class_id") is not None:
        return
    takes_vectors = embed_type in ("identity", "projection")
    check_shape("class_labels", class_labels, (batch_size, "width") if takes_vectors else (batch_size,))
    # Only on the CPU: reading the numbers would wait for any other device.
    has_table, on_cpu = embed_type is None, class_labels.device.type == "cpu"
    if has_table and on_cpu and not torch.compiler.is_compiling():
        low, high = int(class_labels.min()), int(class_labels.max())
        if low < 0 or high >= num_embeds:
            raise ValueError(
                f"`class_labels` range from {low} to {high}; this model has the classes 0 to {num_embeds - 1}."
            )


def check_conditions(
    config: Any,
    has_cross_attention: bool,
    batch_size: int,
    timestep_cond: torch.Tensor | None,
    encoder_hidden_states: torch.Tensor | None,
    encoder_attention_mask: torch.Tensor | None,
    added_cond_kwargs: dict[str, torch.Tensor] | None,
) -> None:
    """Check the vectors added to the sinusoid, and the text, against the config of a U-Net or ControlNet."""
    if timestep_cond is not None:
        if config.time_cond_proj_dim is None:
            raise ValueError("`timestep_cond` was passed to a model without `time_cond_proj_dim`. Leave it out.")
        check_shape("timestep_cond", timestep_cond, (batch_size, config.time_cond_proj_dim))
    if not has_cross_attention:
        if encoder_hidden_states is not None:
            raise ValueError("`encoder_hidden_states` were passed to a model without cross-attention. Leave them out.")
        return
    widths = set(per_level(config.encoder_hid_dim or config.cross_attention_dim, 1))
    width = widths.pop() if len(widths) == 1 else "width"
    check_shape("encoder_hidden_states", encoder_hidden_states, (batch_size, "length", width))
    if encoder_attention_mask is not None:
        check_shape("encoder_attention_mask", encoder_attention_mask, tuple(encoder_hidden_states.shape[:2]))
    if config.addition_embed_type == "text_embeds":
        pooled = (added_cond_kwargs or {}).get("text_embeds")
        time_embed_dim = config.time_embedding_dim or 4 * config.block_out_channels[0]
        check_shape('added_cond_kwargs["text_embeds"]', pooled, (batch_size, time_embed_dim))


def check_residuals(residuals: Sequence[torch.Tensor], skips: Sequence[torch.Tensor]) -> None:
    """Raises a `ValueError` unless there is one residual for each skip connection."""
    if len(residuals) != len(skips):
        raise ValueError(
            f"`down_block_additional_residuals` holds {len(residuals)} tensors, but this network has {len(skips)} skip "
            "connections. Pass one tensor for each, from a ControlNet that was made for this network."
        )
