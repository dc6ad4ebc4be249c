"""
Adaptive group normalisation of channels-last tensors on CPU, outside of compilers. `adagn_reference` in adagn.py is the
definition, and `adagn` there the only caller.

The reference makes five passes over memory, and with 16-bit inputs casts to float32 and back. torch's kernel for
channels-last normalises with affine parameters that are the same for all examples, so scale s and shift t cannot enter
it as a batch. Two ways around that, by the size of an example:
- large: one example at a time. Its affine parameters include s and t, w' = w (1 + s), b' = b (1 + s) + t, and what the
  kernel wrote is still in the cache when the activation reads it;
- small, where calls cost more than memory: many examples at once, with s and t in one multiply-add of float32 numbers.

Few and small temporary tensors matter as much as few passes: memory that is new to the process costs more time (page
faults) than arithmetic on it.

The backward pass keeps only the input and the statistics of its groups, and computes all else again, in chunks that
stay in the cache. It makes some thirty calls, so small batches leave it to autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad


aten = torch.ops.aten

# Where the times of two ways cross, measured on two cores with AVX2. Numbers are elements of a tensor.
# Numbers of a chunk of examples in the forward pass, and in the backward pass with its three or four temporary tensors.
FORWARD_CHUNK, BACKWARD_CHUNK = 2**20, 2**19
# Numbers of an example of 16 bits from which it is normalised alone, without casts.
LARGE_16_BIT_EXAMPLE = 2**18
# Numbers of a batch, by bytes of each, from which the backward pass is the one below.
LARGE_BATCH = {8: 2**19, 4: 2**19, 2: 2**18}
# Pixels below which torch's kernel for 16 bits takes longer than that for float32 and the two casts: it then goes
# through the few channels of a group at each pixel.
FEW_PIXELS = 1024


class Activation(NamedTuple):
    """
    As part of a graph; of a tensor that may be overwritten; into another tensor; gradient of the input from that of the
    output.
    """

    of_graph: Callable[[torch.Tensor], torch.Tensor]
    of_own: Callable[[torch.Tensor], torch.Tensor]
    into: Callable[..., torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


SILU = Activation(F.silu, functools.partial(F.silu, inplace=True), aten.silu.out, aten.silu_backward.default)
ACTIVATIONS = {
    "silu": SILU,
    "swish": SILU,
    "mish": Activation(F.mish, functools.partial(F.mish, inplace=True), aten.mish.out, aten.mish_backward.default),
    "gelu": Activation(F.gelu, F.gelu, aten.gelu.out, aten.gelu_backward.default),
    "relu": Activation(
        F.relu, torch.relu_, aten.relu.out, lambda gradient, h: aten.threshold_backward.default(gradient, h, 0)
    ),
}


def is_transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether `torch.func` transforms the calling function, or one of the tensors has a forward-mode derivative."""
    if torch._C._are_functorch_transforms_active():
        return True
    # Negative outside of all `dual_level`; `unpack_dual` says the same of each tensor, in 2 us.
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """
    Whether all are ordinary tensors with numbers that are computed now: nothing compiles, traces or transforms them,
    and none is of a class of its own (fake, distributed).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(*tensors):
        return False
    return all(tensor is None or type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)


def cpu_is_usable(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> bool:
    """Whether [`adagn_cpu`] takes these: plain tensors on CPU, `(B, C, H, W)` in channels-last, not empty."""
    return (
        is_plain(x, weight, bias, scale, shift)
        and x.device.type == "cpu"
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
    )


def _affine(
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Affine parameters that include scale and shift, `(B, C)`; without them `(1, C)`."""
    weight, bias = weight.to(dtype), bias.to(dtype)
    if scale is None:
        return weight[None], bias[None]
    gain = 1 + scale.to(dtype)
    return weight * gain, torch.addcmul(shift.to(dtype), bias, gain)


def _forward_chunk(x: torch.Tensor) -> int:
    """How many examples with scale and shift are normalised at once; 1: without casts."""
    _, channels, height, width = x.shape
    numbers = channels * height * width
    if x.element_size() == 2 and numbers >= LARGE_16_BIT_EXAMPLE:
        return 1
    return max(1, FORWARD_CHUNK // numbers)


def _forward(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, and mean and 1 / standard deviation of the groups, `(B, num_groups)`, at least in float32."""
    # Parameters of the kernel in float32, also where x has 16 bits: `1 + scale` keeps its precision.
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch_size, channels, height, width = x.shape
    pixels, act = height * width, ACTIVATIONS[activation]

    if scale is None or batch_size == 1:
        if scale is None:
            weight, bias = weight.to(dtype), bias.to(dtype)
        else:
            weight, bias = (each[0] for each in _affine(weight, bias, scale, shift, dtype))
        own = x.to(dtype) if pixels < FEW_PIXELS else x
        h, mean, rstd = torch.native_group_norm(own, weight, bias, batch_size, channels, pixels, num_groups, eps)
        return act.of_own(h).to(x.dtype), mean, rstd

    size = _forward_chunk(x)
    if size >= batch_size:
        h, mean, rstd = torch.native_group_norm(
            x.to(dtype), weight.to(dtype), bias.to(dtype), batch_size, channels, pixels, num_groups, eps
        )
        gain, offset = 1 + scale.to(dtype), shift.to(dtype)  # type: ignore[union-attr]
        torch.addcmul(offset[:, :, None, None], h, gain[:, :, None, None], out=h)
        return act.of_own(h).to(x.dtype), mean, rstd

    output = torch.empty_like(x)
    mean, rstd = x.new_empty(2, batch_size, num_groups, dtype=dtype)
    affine_weight, affine_bias = _affine(weight, bias, scale, shift, dtype)
    for start in range(0, batch_size, size):
        chunk = slice(start, min(start + size, batch_size))
        if size == 1:
            h, mean[chunk], rstd[chunk] = torch.native_group_norm(
                x[chunk], affine_weight[start], affine_bias[start], 1, channels, pixels, num_groups, eps
            )
            act.into(h, out=output[chunk])
        else:
            output[chunk], mean[chunk], rstd[chunk] = _forward(
                x[chunk],
                num_groups,
                weight,
                bias,
                eps,
                scale[chunk],
                shift[chunk],
                activation,  # type: ignore[index]
            )
        # The next example finds its memory.
        h = None
    return output, mean, rstd


def _composed(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """For autograd: the reference with one multiply-add."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    h = torch.group_norm(x.to(dtype), num_groups, weight.to(dtype), bias.to(dtype), eps)
    if scale is not None:
        gain, offset = 1 + scale.to(dtype), shift.to(dtype)  # type: ignore[union-attr]
        h = torch.addcmul(offset[:, :, None, None], h, gain[:, :, None, None])
    return ACTIVATIONS[activation].of_graph(h).to(x.dtype)


def _backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    activation: str,
    needs_x: bool,
) -> tuple[torch.Tensor | None, ...]:
    """
    Gradients of x, weight, bias, scale and shift, from those of the result.

    With n numbers in a group, r = rstd and g = w' r, the input of the activation is h = g x + o. For its gradient d,
    sums over height and width S = sum d, X = sum d (x - mean), and sums over the channels of a group P = sum g X / -n,
    Q = sum g S / -n:
        dw' = r X,  db' = S,  dx = g d + a x + c  with  a = r^2 P,  c = Q - a mean.
    """
    dtype, (batch_size, channels, height, width) = mean.dtype, x.shape
    groups = mean.shape[1]
    width_of_group = channels // groups
    grouped, per_channel = (batch_size, groups, width_of_group), (batch_size, channels, 1, 1)
    backward = ACTIVATIONS[activation].backward
    gradient = gradient.contiguous(memory_format=torch.channels_last)

    affine_weight, affine_bias = (
        each.expand(batch_size, -1).view(grouped) for each in _affine(weight, bias, scale, shift, dtype)
    )
    mean, rstd = mean[:, :, None], rstd[:, :, None]
    slope = affine_weight * rstd  # g
    slope_of_x, offset = slope.view(per_channel), torch.addcmul(affine_bias, slope, mean, value=-1).view(per_channel)
    slope_of_mean, variance = slope / -(width_of_group * height * width), rstd.square()  # g / -n, r^2

    x_gradient = torch.empty_like(x) if needs_x else None
    sums = mean.new_empty(2, *grouped)  # X, S
    size = max(1, BACKWARD_CHUNK // (channels * height * width))
    for start in range(0, batch_size, size):
        chunk = slice(start, start + size) if size < batch_size else slice(None)
        x_chunk, d = x[chunk].to(dtype), gradient[chunk].to(dtype)
        d = backward(d, torch.addcmul(offset[chunk], x_chunk, slope_of_x[chunk]))
        product = d * x_chunk
        x_sums, d_sums = sums[0, chunk], sums[1, chunk]
        x_sums.view(-1, channels).copy_(product.sum((2, 3)))
        d_sums.view(-1, channels).copy_(d.sum((2, 3)))
        x_sums.addcmul_(d_sums, mean[chunk], value=-1)
        if x_gradient is None:
            continue
        a, c = (sums[:, chunk] * slope_of_mean[chunk]).sum(-1, keepdim=True)
        a = a * variance[chunk]
        c = torch.addcmul(c, a, mean[chunk], value=-1)
        a, c = (each.expand(-1, -1, width_of_group).reshape(-1, channels, 1, 1) for each in (a, c))
        own = x_gradient[chunk] if x.dtype == dtype else product
        torch.addcmul(c, x_chunk, a, out=own).addcmul_(d, slope_of_x[chunk])
        if x.dtype != dtype:
            x_gradient[chunk] = own

    sums[0].mul_(rstd)
    sums = sums.view(2, batch_size, channels)  # gradients of w' and b'
    if scale is None:
        weight_gradient, bias_gradient = sums.sum(1)
        return x_gradient, weight_gradient.to(weight.dtype), bias_gradient.to(bias.dtype), None, None
    weight_gradient, bias_gradient = (sums * (1 + scale.to(dtype))).sum(1)
    scale_gradient = torch.addcmul(sums[0] * weight.to(dtype), sums[1], bias.to(dtype))
    return (
        x_gradient,
        weight_gradient.to(weight.dtype),
        bias_gradient.to(bias.dtype),
        scale_gradient.to(scale.dtype),
        sums[1].to(shift.dtype),  # type: ignore[union-attr]
    )


class _AdaGN(torch.autograd.Function):
    """Keeps x and two numbers for each of its groups."""

    @staticmethod
    def forward(
        ctx: Any,
        reference: Callable[..., torch.Tensor],
        x: torch.Tensor,
        num_groups: int,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        activation: str,
    ) -> torch.Tensor:
        output, mean, rstd = _forward(x, num_groups, weight, bias, eps, scale, shift, activation)
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        ctx.reference, ctx.num_groups, ctx.eps, ctx.activation = reference, num_groups, eps, activation
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(gradient, *tensors):  # second derivatives
            gradients = _differentiable_backward(ctx, gradient, tensors)
        else:
            x, weight, bias, scale, shift = tensors
            needs_x = ctx.needs_input_grad[1]
            gradients = _backward(gradient, x, weight, bias, scale, shift, mean, rstd, ctx.activation, needs_x)
        x, weight, bias, scale, shift = gradients
        return None, x, None, weight, bias, None, scale, shift, None


def _differentiable_backward(
    ctx: Any, gradient: torch.Tensor, tensors: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """The backward pass of the reference, which can itself be differentiated and transformed."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: scale may be a function of x, and only x itself is asked for here.
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        x, weight, bias, scale, shift = inputs
        if not x.requires_grad:  # asked for in any case: see `adagn_cpu`
            x = inputs[0] = x.detach().requires_grad_()
        output = ctx.reference(x, ctx.num_groups, weight, bias, ctx.eps, scale, shift, ctx.activation)
    asked = [number for number, tensor in enumerate(inputs) if tensor is not None and tensor.requires_grad]
    gradients = torch.autograd.grad(output, [inputs[n] for n in asked], gradient, create_graph=create_graph)
    results: list[torch.Tensor | None] = [None] * len(inputs)
    for number, result in zip(asked, gradients, strict=True):
        results[number] = result
    return results


def adagn_cpu(reference: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """`reference(*arguments)`, where `reference` is [`adagn_reference`], for arguments that [`cpu_is_usable`] takes."""
    x, _, weight, bias, _, scale, shift, _ = arguments
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, scale, shift)
    ):
        # torch's backward kernel for channels-last writes the gradient of x even if it is not asked for, and crashes.
        if x.requires_grad and x.numel() < LARGE_BATCH[x.element_size()]:
            return _composed(*arguments)
        return _AdaGN.apply(reference, *arguments)
    return _forward(*arguments)[0]
