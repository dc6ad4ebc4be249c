"""
Adaptive group normalisation (AdaGN) with its activation: `act(group_norm(x) * (1 + scale) + shift)`.

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (https://huggingface.co/papers/2105.05233),
section 3.1. `adagn_reference` is the definition; all other code calls `adagn`, the only place that chooses a faster way
to the same numbers.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .adagn_cpu import adagn_cpu, cpu_is_usable, is_transformed
from .adagn_triton import TRITON_ACTIVATIONS, adagn_triton, triton_is_usable


AdaGNActivation = Literal["silu", "swish", "mish", "gelu", "relu"]
ADAGN_ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu}

# The variable, set to 1 before the import, sends every call through the reference, e.g. to find out whether a fast path
# causes a difference. Read once: a look-up at every call would break graphs under `torch.compile`.
USE_ADAGN_REFERENCE = os.environ.get("DIFFUSERS_ADM_REFERENCE_ADAGN") == "1"


def adagn_reference(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: AdaGNActivation = "silu",
) -> torch.Tensor:
    r"""
    `act(group_norm(x) * (1 + scale) + shift)`, written plainly. Every fast path must match it, gradients included.

    Args:
        x (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Any floating dtype, any memory format.
        num_groups (`int`): Number of groups; divides `channels`.
        weight, bias (`torch.Tensor` of shape `(channels,)`): Affine parameters of the normalisation.
        eps (`float`): Added to the variance of a group.
        scale, shift (`torch.Tensor` of shape `(batch_size, channels)`, *optional*): Conditioning. Both or neither;
            without them this is a plain group normalisation with an activation.
        activation (`str`, defaults to `"silu"`): One of `"silu"` (also called `"swish"`), `"mish"`, `"gelu"`, `"relu"`.

    Returns:
        `torch.Tensor`: Same shape, dtype and memory format as `x`.
    """
    # At least float32 until the last cast: just above 1, bfloat16 steps by 2**-7, so `1 + scale` would lose small
    # scales. float64 stays float64, so that oracle tests mean something.
    dtype = torch.promote_types(x.dtype, torch.float32)
    h = F.group_norm(x.to(dtype), num_groups, weight.to(dtype), bias.to(dtype), eps)
    if scale is not None:
        h = h * (1 + scale.to(dtype)[:, :, None, None]) + shift.to(dtype)[:, :, None, None]
    return ADAGN_ACTIVATIONS[activation](h).to(x.dtype)


def _adagn_folded(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    activation: AdaGNActivation,
) -> torch.Tensor:
    """
    The same in one normalisation kernel: the batch moves into the channels, so that the affine parameters of the kernel
    can differ by example and include scale s and shift t: w' = w (1 + s), b' = b (1 + s) + t.
    """
    batch_size, channels, height, width = x.shape
    # With 16-bit activations the kernel computes in float32 and takes float32 parameters, so `1 + scale` keeps its
    # precision here as well.
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if scale is None:
        h = torch.group_norm(x, num_groups, weight, bias, eps)
    else:
        gain = 1 + scale.to(dtype)
        h = torch.group_norm(
            x.view(1, batch_size * channels, height, width),
            batch_size * num_groups,
            (weight * gain).flatten(),
            torch.addcmul(shift.to(dtype), bias, gain).flatten(),
            eps,
        ).view(batch_size, channels, height, width)
    if activation in ("silu", "swish"):
        return F.silu(h, inplace=not h.requires_grad)
    return ADAGN_ACTIVATIONS[activation](h)


def adagn(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: AdaGNActivation = "silu",
) -> torch.Tensor:
    """
    `act(group_norm(x) * (1 + scale) + shift)` by the fastest way that is known to be right for this input.

    Arguments and result are those of [`adagn_reference`], which is the definition. On CUDA, SiLU takes
    [`adagn_triton`]. On CPU, contiguous inputs use one normalisation kernel, and channels-last inputs, outside of
    compilers and transforms, [`adagn_cpu`]; all other inputs, and all inputs if the environment variable
    `DIFFUSERS_ADM_REFERENCE_ADAGN` is `1`, use the reference. With 16-bit inputs the reference is computed again in the
    backward pass, to save memory.
    """
    if (scale is None) != (shift is None):
        raise ValueError("`adagn` takes both `scale` and `shift`, or neither.")
    arguments = (x, num_groups, weight, bias, eps, scale, shift, activation)
    if activation in TRITON_ACTIVATIONS and not USE_ADAGN_REFERENCE and triton_is_usable(x, weight, bias, scale, shift):
        return adagn_triton(*arguments)
    if x.device.type == "cpu" and x.ndim == 4 and not USE_ADAGN_REFERENCE:
        # Not for channels-last: there the batch cannot move into the channels without a transposition, which costs
        # more than it saves.
        if x.is_contiguous() and len(x) > 0:
            return _adagn_folded(*arguments)
        if not torch.compiler.is_compiling() and is_transformed(x, weight, bias, scale, shift):
            # There torch's group normalisation takes no channels-last tensors, and `vmap` knows no memory formats.
            h = adagn_reference(x.contiguous(), *arguments[1:])
            return h.movedim(1, -1).contiguous().movedim(-1, 1) if x.stride(1) == 1 else h
        if cpu_is_usable(x, weight, bias, scale, shift):
            return adagn_cpu(adagn_reference, *arguments)
    if x.element_size() < 4 and x.requires_grad and not torch.compiler.is_compiling():
        # The reference would keep several float32 copies of a 16-bit `x` for the backward pass; computed again there,
        # it keeps only `x`. (A compiler fuses them by itself.)
        return checkpoint(adagn_reference, *arguments, use_reentrant=False, preserve_rng_state=False)
    return adagn_reference(*arguments)


class AdaGroupNormAct(nn.GroupNorm):
    r"""
    Group normalisation, optional scale and shift by example and channel, activation. It owns the affine parameters
    (named as in `nn.GroupNorm`) and calls [`adagn`], whose `num_groups`, `eps` and `activation` it takes.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, activation: AdaGNActivation = "silu"):
        if activation not in get_args(AdaGNActivation):
            raise ValueError(f"`activation` is {activation!r}; it must be one of {list(get_args(AdaGNActivation))}.")
        super().__init__(num_groups, num_channels, eps=eps)
        self.activation = activation

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        return adagn(x, self.num_groups, self.weight, self.bias, self.eps, scale, shift, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
