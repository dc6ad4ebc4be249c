"""
Convolutions that need less memory in frozen networks through which gradients flow: to a ControlNet, an adapter or an
image. `torch.nn.functional.conv2d` is the definition; all other code calls `conv2d`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input


class _FrozenConv2d(torch.autograd.Function):
    """`F.conv2d` without gradients of weight and bias, which does not keep its input for the backward pass."""

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
        # Under autocast the product was computed in 16 bits from a float32 weight.
        weight = weight.to(gradient.dtype)
        input_gradient = conv2d_input(ctx.shape, weight, gradient, ctx.stride, ctx.padding)
        return input_gradient.to(ctx.dtype), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> torch.Tensor:
        (weight,) = ctx.saved_tensors
        return F.conv2d(tangent, weight, None, ctx.stride, ctx.padding)


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> torch.Tensor:
    """
    `F.conv2d`, values and gradients. torch keeps the input for the backward pass even if neither weight nor bias needs
    a gradient; this function does not.
    """
    is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if is_frozen and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _FrozenConv2d.apply(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that calls [`conv2d`]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Users set the `padding_mode` of existing layers to make tileable images.
        is_plain = self.padding_mode == "zeros" and self.dilation == (1, 1) and self.groups == 1
        if not is_plain or isinstance(self.padding, str):
            return super().forward(x)
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]
