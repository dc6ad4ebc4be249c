"""
Convolutions of networks that are not trained, while gradients flow through them to something that is: to a ControlNet
branch, an adapter, an image.

`torch.nn.functional.conv2d` is the definition; `conv2d` is the one function that everything else calls.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input


class _FrozenConv2d(torch.autograd.Function):
    """`F.conv2d` whose weight and bias get no gradient, so that its input need not be kept for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> torch.Tensor:
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # Under autocast the product was computed in 16 bits, of a float32 weight.
        weight = weight.to(gradient.dtype)
        of_input = conv2d_input(ctx.shape, weight, gradient, ctx.stride, ctx.padding)
        return of_input.to(ctx.dtype), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> torch.Tensor:
        (weight,) = ctx.saved_tensors
        return F.conv2d(tangent, weight, None, ctx.stride, ctx.padding)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    """
    `F.conv2d`, values and gradients. Where neither weight nor bias needs a gradient, torch keeps the input for the
    backward pass all the same; here it does not.
    """
    is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if is_frozen and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _FrozenConv2d.apply(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` by [`conv2d`]: it needs less memory while it is frozen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # For images that tile, users set `padding_mode` of layers that were built without.
        is_plain = self.padding_mode == "zeros" and self.dilation == (1, 1) and self.groups == 1
        if not is_plain or isinstance(self.padding, str):
            return super().forward(x)
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]
