"""
AdaGN as Triton kernels: `silu(group_norm(x) * (1 + scale) + shift)`, forward and backward, for CUDA tensors.

The definition is `adagn_reference` in `adagn.py`, the chooser `adagn` there. Let u be the input of SiLU, x^ the
normalised input, w' = w (1 + scale), b' = b (1 + scale) + shift, g = dL/dy silu'(u), and M the elements of a group:

    u = x^ w' + b',   dL/dx = rstd (g w' - sum(g w') / M - x^ sum(g w' x^) / M)     (sums over the group)

All other gradients follow from the sums of g and of g x^ over the pixels of each example and channel. Two ways:

- **whole**: a program holds a group (channels-last: a few neighbouring groups) of an example on chip. It reads `x` (and
  `dy`) once and writes once.
- **split**: where a group is too large for that, programs take tiles of pixels times channels. The first kernel writes
  partial results of each tile and channel, the second combines them for each group, the third normalises. It reads
  twice and writes once.

Both layouts share the kernels: a tile is a block of pixels times a block of channels, and the layout says which of the
two is contiguous. Statistics are float32: means (of differences from the first value of the group), and sums of squared
differences from the mean, combined by the formula of Chan et al. 1979, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances". There are no atomic operations: the same inputs give the same bits. The backward pass keeps
`x` and the statistics, nothing else of the size of `x`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .adagn_cpu import is_transformed


try:
    import triton
    import triton.language as tl
except ImportError:
    # Torch brings it with CUDA on Linux. Elsewhere this module imports, and `triton_is_usable` says no.
    triton = tl = None

logger = logging.getLogger(__name__)

TRITON_ACTIVATIONS = ("silu", "swish")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter runs kernels on CPU, for tests. Triton reads the variable once, too, as kernels are defined.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"

# Largest tile, in elements, that a program holds: 1024 threads with 32 values each, of the 64 registers that they have;
# the backward pass holds two tensors. A processor has room for one such program, which cannot load while it computes;
# of tiles up to `SMALL_TILE`, several fit.
WHOLE_FORWARD, WHOLE_BACKWARD, SMALL_TILE = 32768, 16384, 8192
# Tiles of the split kernels, in bytes: enough loads in flight for each processor with a few programs at a time.
SPLIT_BYTES = 16384
# The name space of the operators. Code that is exported to the Hub registers its own, under its own name.
_NAMESPACE = __name__.replace(".", "_").replace("-", "_")


def _jit(function: Callable) -> Any:
    """`triton.jit`, where there is Triton."""
    return function if triton is None else triton.jit(function)


# Kernels


@_jit
def _locate_tile(
    pixel_blocks, channel_blocks, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Example, number of the pixel block, first pixel and first channel of this program's tile, in memory's order."""
    program = tl.program_id(0)
    example = program // (pixel_blocks * channel_blocks)
    rest = program % (pixel_blocks * channel_blocks)
    if CHANNELS_LAST:
        pixel_block = rest // channel_blocks
        channel_block = rest % channel_blocks
    else:
        pixel_block = rest % pixel_blocks
        channel_block = rest // pixel_blocks
    return example, pixel_block, pixel_block * BLOCK_P, channel_block * BLOCK_C


@_jit
def _offsets(example, pixel, channel, c, channels, pixels, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """
    Where a tile begins, as 64 bits, and where its elements are from there, `(BLOCK_P, len(c))`: pixels from `pixel` on
    and the channels `channel + c`.
    """
    p = tl.arange(0, BLOCK_P)
    if CHANNELS_LAST:
        start = (example.to(tl.int64) * pixels + pixel) * channels + channel
        return start, p[:, None] * channels + c[None, :]
    start = (example.to(tl.int64) * channels + channel) * pixels + pixel
    return start, c[None, :] * pixels + p[:, None]


@_jit
def _pivots(x_ptr, example, group, channels, pixels, mask, WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """
    The first value of each group. Statistics are those of the differences from it, which costs no digits where all of a
    group lies far from 0: float32 could not even hold its mean precisely enough.
    """
    first = group.to(tl.int64) * WIDTH
    if CHANNELS_LAST:
        offsets = example.to(tl.int64) * pixels * channels + first
    else:
        offsets = (example.to(tl.int64) * channels + first) * pixels
    return tl.load(x_ptr + offsets, mask=mask, other=0).to(tl.float32)


@_jit
def _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, example, c, mask):
    """w' and b' of the channels `c`."""
    weight = tl.load(weight_ptr + c, mask=mask, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=mask, other=0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + example.to(tl.int64) * scale_stride + c, mask=mask, other=0).to(tl.float32)
        shift = tl.load(shift_ptr + example.to(tl.int64) * shift_stride + c, mask=mask, other=0).to(tl.float32)
        weight = weight * (1 + scale)
        bias = bias * (1 + scale) + shift
    return weight, bias


@_jit
def _silu(u):
    return u / (1 + tl.exp(-u))


@_jit
def _times_silu_slope(dy, u):
    sigmoid = 1 / (1 + tl.exp(-u))
    return dy * sigmoid * (1 + u * (1 - sigmoid))


@_jit
def _sum_groups(values, GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """The sum of each group's `PADDED` values, at each of its places."""
    if GROUPS == 1:
        return tl.sum(values, 0) + tl.zeros_like(values)
    sums = tl.sum(tl.reshape(values, (GROUPS, PADDED)), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], (GROUPS, PADDED)), (GROUPS * PADDED,))


@_jit
def _locate_groups(num_groups, WIDTH: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr):
    """
    Example, first channel, and for each column of this program's tile: the channel from there on, the group, whether
    the column is a channel, and whether it is the first of its group. Groups have `WIDTH` channels in `PADDED` columns.
    """
    blocks = tl.cdiv(num_groups, GROUPS)
    example = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * GROUPS
    column = tl.arange(0, GROUPS * PADDED)
    group = first + column // PADDED
    inside = column % PADDED
    is_channel = (inside < WIDTH) & (group < num_groups)
    return example, first * WIDTH, column // PADDED * WIDTH + inside, group, is_channel, is_channel & (inside == 0)


@_jit
def _whole_forward(
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    scale_stride,
    shift_stride,
    num_groups,
    channels,
    pixels,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    example, channel, c, group, is_channel, is_first = _locate_groups(num_groups, WIDTH, PADDED, GROUPS)
    start, offsets = _offsets(example, 0, channel, c, channels, pixels, BLOCK_P, CHANNELS_LAST)
    mask = (tl.arange(0, BLOCK_P) < pixels)[:, None] & is_channel[None, :]
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0).to(tl.float32)

    pivot = _pivots(x_ptr, example, group, channels, pixels, is_channel, WIDTH, CHANNELS_LAST)
    count = WIDTH * pixels
    x = tl.where(mask, x - pivot[None, :], 0.0)
    mean = _sum_groups(tl.sum(x, 0), GROUPS, PADDED) / count
    x = tl.where(mask, x - mean[None, :], 0.0)
    rstd = 1 / tl.sqrt(_sum_groups(tl.sum(x * x, 0), GROUPS, PADDED) / count + eps)
    tl.store(mean_ptr + example.to(tl.int64) * num_groups + group, mean, mask=is_first)
    tl.store(rstd_ptr + example.to(tl.int64) * num_groups + group, rstd, mask=is_first)

    weight, bias = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, example, channel + c, is_channel
    )
    y = _silu(x * (rstd * weight)[None, :] + bias[None, :])
    tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@_jit
def _split_statistics(
    x_ptr,
    means_ptr,
    squares_ptr,
    channels,
    pixels,
    pixel_blocks,
    channel_blocks,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """
    Mean (minus the pivot) and sum of squared differences from it, of each channel of the tile:
    `(batch, pixel_blocks, channels)`.
    """
    example, pixel_block, pixel, channel = _locate_tile(pixel_blocks, channel_blocks, BLOCK_P, BLOCK_C, CHANNELS_LAST)
    c = tl.arange(0, BLOCK_C)
    start, offsets = _offsets(example, pixel, channel, c, channels, pixels, BLOCK_P, CHANNELS_LAST)
    is_channel = channel + c < channels
    mask = (pixel + tl.arange(0, BLOCK_P) < pixels)[:, None] & is_channel[None, :]
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0).to(tl.float32)

    group = (channel + c) // WIDTH
    pivot = _pivots(x_ptr, example, group, channels, pixels, is_channel, WIDTH, CHANNELS_LAST)
    x = tl.where(mask, x - pivot[None, :], 0.0)
    mean = tl.sum(x, 0) / tl.minimum(BLOCK_P, pixels - pixel)
    x = tl.where(mask, x - mean[None, :], 0.0)
    to = (example.to(tl.int64) * pixel_blocks + pixel_block) * channels + channel
    tl.store(means_ptr + to + c, mean, mask=is_channel)
    tl.store(squares_ptr + to + c, tl.sum(x * x, 0), mask=is_channel)


@_jit
def _combine_statistics(
    means_ptr,
    squares_ptr,
    mean_ptr,
    rstd_ptr,
    num_groups,
    channels,
    pixels,
    pixel_blocks,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean (minus the pivot) and 1 / standard deviation of a group, from the results of `_split_statistics`."""
    example = (tl.program_id(0) // num_groups).to(tl.int64)
    c = tl.arange(0, PADDED)
    start = example * pixel_blocks * channels + tl.program_id(0) % num_groups * WIDTH
    total = tl.zeros((BLOCK_K, PADDED), tl.float32)
    for first in range(0, pixel_blocks, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = (k < pixel_blocks)[:, None] & (c < WIDTH)[None, :]
        # The last block may hold fewer pixels.
        count = tl.minimum(BLOCK_P, pixels - k * BLOCK_P).to(tl.float32)[:, None]
        means = tl.load(means_ptr + start + k.to(tl.int64)[:, None] * channels + c[None, :], mask=mask, other=0)
        total += tl.where(mask, count * means, 0.0)
    mean = tl.sum(tl.sum(total, 1), 0) / pixels / WIDTH
    total = tl.zeros((BLOCK_K, PADDED), tl.float32)
    for first in range(0, pixel_blocks, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = (k < pixel_blocks)[:, None] & (c < WIDTH)[None, :]
        count = tl.minimum(BLOCK_P, pixels - k * BLOCK_P).to(tl.float32)[:, None]
        offsets = k.to(tl.int64)[:, None] * channels + c[None, :]
        difference = tl.load(means_ptr + start + offsets, mask=mask, other=0) - mean
        squares = tl.load(squares_ptr + start + offsets, mask=mask, other=0)
        total += tl.where(mask, squares + count * difference * difference, 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / pixels / WIDTH
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), 1 / tl.sqrt(variance + eps))


@_jit
def _split_forward(
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    scale_stride,
    shift_stride,
    num_groups,
    channels,
    pixels,
    pixel_blocks,
    channel_blocks,
    last_example,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    example, pixel_block, pixel, channel = _locate_tile(pixel_blocks, channel_blocks, BLOCK_P, BLOCK_C, CHANNELS_LAST)
    # From the last example to the first: what the statistics have read last is still in the cache.
    example = last_example - example
    c = tl.arange(0, BLOCK_C)
    start, offsets = _offsets(example, pixel, channel, c, channels, pixels, BLOCK_P, CHANNELS_LAST)
    is_channel = channel + c < channels
    mask = (pixel + tl.arange(0, BLOCK_P) < pixels)[:, None] & is_channel[None, :]
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0).to(tl.float32)
    group = (channel + c) // WIDTH
    of_group = example.to(tl.int64) * num_groups + group
    pivot = _pivots(x_ptr, example, group, channels, pixels, is_channel, WIDTH, CHANNELS_LAST)
    mean = tl.load(mean_ptr + of_group, mask=is_channel, other=0)
    rstd = tl.load(rstd_ptr + of_group, mask=is_channel, other=0)
    weight, bias = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, example, channel + c, is_channel
    )
    weight = rstd * weight
    y = _silu((x - pivot[None, :]) * weight[None, :] + (bias - mean * weight)[None, :])
    tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@_jit
def _store_conditioning_gradients(
    sum_g, sum_gx, weight_ptr, bias_ptr, dscale_ptr, dshift_ptr, example, channels, c, mask
):
    """Gradients of scale and shift, contiguous `(batch, channels)`: with u = (x^ w + b) (1 + scale) + shift."""
    weight = tl.load(weight_ptr + c, mask=mask, other=0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=mask, other=0).to(tl.float32)
    to = example.to(tl.int64) * channels + c
    tl.store(dscale_ptr + to, (sum_gx * weight + sum_g * bias).to(dscale_ptr.dtype.element_ty), mask=mask)
    tl.store(dshift_ptr + to, sum_g.to(dshift_ptr.dtype.element_ty), mask=mask)


@_jit
def _whole_backward(
    dy_ptr,
    x_ptr,
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    sum_g_ptr,
    sum_gx_ptr,
    dscale_ptr,
    dshift_ptr,
    scale_stride,
    shift_stride,
    num_groups,
    channels,
    pixels,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    example, channel, c, group, is_channel, _ = _locate_groups(num_groups, WIDTH, PADDED, GROUPS)
    start, offsets = _offsets(example, 0, channel, c, channels, pixels, BLOCK_P, CHANNELS_LAST)
    mask = (tl.arange(0, BLOCK_P) < pixels)[:, None] & is_channel[None, :]
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + start + offsets, mask=mask, other=0).to(tl.float32)
    pivot = _pivots(x_ptr, example, group, channels, pixels, is_channel, WIDTH, CHANNELS_LAST)
    mean = tl.load(mean_ptr + example.to(tl.int64) * num_groups + group, mask=is_channel, other=0)
    rstd = tl.load(rstd_ptr + example.to(tl.int64) * num_groups + group, mask=is_channel, other=0)
    weight, bias = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, example, channel + c, is_channel
    )
    x = (x - pivot[None, :]) * rstd[None, :] - (mean * rstd)[None, :]
    # Zero where `dy` is masked, which keeps the padding out of the sums.
    g = _times_silu_slope(dy, x * weight[None, :] + bias[None, :])
    sum_g = tl.sum(g, 0)
    sum_gx = tl.sum(g * x, 0)
    count = WIDTH * pixels
    mean_g = _sum_groups(sum_g * weight, GROUPS, PADDED) / count
    mean_gx = _sum_groups(sum_gx * weight, GROUPS, PADDED) / count
    dx = rstd[None, :] * (g * weight[None, :] - mean_g[None, :] - x * mean_gx[None, :])
    tl.store(dx_ptr + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    tl.store(sum_g_ptr + example.to(tl.int64) * channels + channel + c, sum_g, mask=is_channel)
    tl.store(sum_gx_ptr + example.to(tl.int64) * channels + channel + c, sum_gx, mask=is_channel)
    if scale_ptr is not None:
        _store_conditioning_gradients(
            sum_g, sum_gx, weight_ptr, bias_ptr, dscale_ptr, dshift_ptr, example, channels, channel + c, is_channel
        )


@_jit
def _split_sums(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    sums_g_ptr,
    sums_gx_ptr,
    scale_stride,
    shift_stride,
    num_groups,
    channels,
    pixels,
    pixel_blocks,
    channel_blocks,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Sums of g and g x^ over the pixels of the tile: `(batch, pixel_blocks, channels)`."""
    example, pixel_block, pixel, channel = _locate_tile(pixel_blocks, channel_blocks, BLOCK_P, BLOCK_C, CHANNELS_LAST)
    c = tl.arange(0, BLOCK_C)
    start, offsets = _offsets(example, pixel, channel, c, channels, pixels, BLOCK_P, CHANNELS_LAST)
    is_channel = channel + c < channels
    mask = (pixel + tl.arange(0, BLOCK_P) < pixels)[:, None] & is_channel[None, :]
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + start + offsets, mask=mask, other=0).to(tl.float32)
    group = (channel + c) // WIDTH
    of_group = example.to(tl.int64) * num_groups + group
    pivot = _pivots(x_ptr, example, group, channels, pixels, is_channel, WIDTH, CHANNELS_LAST)
    mean = tl.load(mean_ptr + of_group, mask=is_channel, other=0)
    rstd = tl.load(rstd_ptr + of_group, mask=is_channel, other=0)
    weight, bias = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, example, channel + c, is_channel
    )
    x = (x - pivot[None, :]) * rstd[None, :] - (mean * rstd)[None, :]
    g = _times_silu_slope(dy, x * weight[None, :] + bias[None, :])
    to = (example.to(tl.int64) * pixel_blocks + pixel_block) * channels + channel
    tl.store(sums_g_ptr + to + c, tl.sum(g, 0), mask=is_channel)
    tl.store(sums_gx_ptr + to + c, tl.sum(g * x, 0), mask=is_channel)


@_jit
def _combine_sums(
    sums_g_ptr,
    sums_gx_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    sum_g_ptr,
    sum_gx_ptr,
    mean_g_ptr,
    mean_gx_ptr,
    dscale_ptr,
    dshift_ptr,
    scale_stride,
    shift_stride,
    num_groups,
    channels,
    pixels,
    pixel_blocks,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of all pixel blocks, for each channel of a group, and the means of g w' and g w' x^ over the group."""
    example = tl.program_id(0) // num_groups
    i = tl.arange(0, PADDED)
    is_channel = i < WIDTH
    c = tl.program_id(0) % num_groups * WIDTH + i
    start = example.to(tl.int64) * pixel_blocks * channels
    total_g = tl.zeros((BLOCK_K, PADDED), tl.float32)
    total_gx = tl.zeros((BLOCK_K, PADDED), tl.float32)
    for first in range(0, pixel_blocks, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = (k < pixel_blocks)[:, None] & is_channel[None, :]
        offsets = k.to(tl.int64)[:, None] * channels + c[None, :]
        total_g += tl.load(sums_g_ptr + start + offsets, mask=mask, other=0)
        total_gx += tl.load(sums_gx_ptr + start + offsets, mask=mask, other=0)
    sum_g = tl.sum(total_g, 0)
    sum_gx = tl.sum(total_gx, 0)
    weight, _ = _affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, example, c, is_channel)
    tl.store(mean_g_ptr + tl.program_id(0), tl.sum(sum_g * weight, 0) / pixels / WIDTH)
    tl.store(mean_gx_ptr + tl.program_id(0), tl.sum(sum_gx * weight, 0) / pixels / WIDTH)
    tl.store(sum_g_ptr + example.to(tl.int64) * channels + c, sum_g, mask=is_channel)
    tl.store(sum_gx_ptr + example.to(tl.int64) * channels + c, sum_gx, mask=is_channel)
    if scale_ptr is not None:
        _store_conditioning_gradients(
            sum_g, sum_gx, weight_ptr, bias_ptr, dscale_ptr, dshift_ptr, example, channels, c, is_channel
        )


@_jit
def _split_backward(
    dy_ptr,
    x_ptr,
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    mean_g_ptr,
    mean_gx_ptr,
    scale_stride,
    shift_stride,
    num_groups,
    channels,
    pixels,
    pixel_blocks,
    channel_blocks,
    last_example,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    example, pixel_block, pixel, channel = _locate_tile(pixel_blocks, channel_blocks, BLOCK_P, BLOCK_C, CHANNELS_LAST)
    example = last_example - example  # as in the forward pass
    c = tl.arange(0, BLOCK_C)
    start, offsets = _offsets(example, pixel, channel, c, channels, pixels, BLOCK_P, CHANNELS_LAST)
    is_channel = channel + c < channels
    mask = (pixel + tl.arange(0, BLOCK_P) < pixels)[:, None] & is_channel[None, :]
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + start + offsets, mask=mask, other=0).to(tl.float32)
    group = (channel + c) // WIDTH
    of_group = example.to(tl.int64) * num_groups + group
    pivot = _pivots(x_ptr, example, group, channels, pixels, is_channel, WIDTH, CHANNELS_LAST)
    mean = tl.load(mean_ptr + of_group, mask=is_channel, other=0)
    rstd = tl.load(rstd_ptr + of_group, mask=is_channel, other=0)
    mean_g = tl.load(mean_g_ptr + of_group, mask=is_channel, other=0)
    mean_gx = tl.load(mean_gx_ptr + of_group, mask=is_channel, other=0)
    weight, bias = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, example, channel + c, is_channel
    )
    x = (x - pivot[None, :]) * rstd[None, :] - (mean * rstd)[None, :]
    g = _times_silu_slope(dy, x * weight[None, :] + bias[None, :])
    dx = rstd[None, :] * (g * weight[None, :] - mean_g[None, :] - x * mean_gx[None, :])
    tl.store(dx_ptr + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@_jit
def _parameter_gradients(
    sum_g_ptr,
    sum_gx_ptr,
    scale_ptr,
    dweight_ptr,
    dbias_ptr,
    scale_stride,
    batch_size,
    channels,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of weight and bias: sums over the examples, in a fixed order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, batch_size, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (n < batch_size)[:, None] & (c < channels)[None, :]
        offsets = n[:, None] * channels + c[None, :]
        sum_g = tl.load(sum_g_ptr + offsets, mask=mask, other=0)
        sum_gx = tl.load(sum_gx_ptr + offsets, mask=mask, other=0)
        if scale_ptr is not None:
            gain = 1 + tl.load(scale_ptr + n[:, None] * scale_stride + c[None, :], mask=mask, other=0).to(tl.float32)
            sum_g *= gain
            sum_gx *= gain
        dweight += sum_gx
        dbias += sum_g
    tl.store(dweight_ptr + c, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=c < channels)
    tl.store(dbias_ptr + c, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=c < channels)


# Launch parameters


class Plan(NamedTuple):
    """
    How a pass is computed: `groups` at a time as a whole, or, with `groups` 0, split into tiles of `block_p` pixels
    times `block_c` channels. `warps` of 32 threads for each program.
    """

    groups: int
    block_p: int
    block_c: int
    warps: int


def _power_of_two(number: int) -> int:
    """The smallest one that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def whole_plan(width: int, pixels: int, num_groups: int, itemsize: int, channels_last: bool, limit: int) -> Plan | None:
    """
    A plan with whole groups of `width` channels, at most `limit` elements a program; None if a group is too large.

    Memory is read in sectors of 32 bytes, so in channels-last layout a program takes at least as many groups as one
    sector of a pixel needs, and as many as two need, where its tile stays small.
    """
    block_p, block_c, groups = _power_of_two(pixels), _power_of_two(width), 1
    tile = block_p * block_c
    if channels_last:
        while groups < num_groups and groups * width * itemsize < (64 if 2 * groups * tile <= SMALL_TILE else 32):
            groups *= 2
    # Offsets within an example are 32 bits here.
    if groups * tile > limit or width * num_groups * pixels >= 2**31:
        return None
    # 16 elements a thread, so that few are idle; at most 1024 threads.
    warps = min(max(_power_of_two(groups * tile // 512), 1), 32)
    return Plan(groups, block_p, block_c, warps)


def split_plan(
    batch_size: int, channels: int, pixels: int, itemsize: int, channels_last: bool, processors: int
) -> Plan:
    """
    A plan with tiles along the contiguous axis, first of `SPLIT_BYTES`, smaller where there are fewer than four
    programs for each of the `processors`.
    """
    elements = SPLIT_BYTES // itemsize
    while elements > 1024 and batch_size * channels * pixels < 4 * processors * elements:
        elements //= 2
    if channels_last:
        # The largest power of two that divides the channels, unless rows would be too short.
        block_c = min(channels & -channels, 128)
        if block_c * itemsize < 64:
            block_c = min(_power_of_two(channels), 64)
        block_p = min(_power_of_two(pixels), elements // block_c)
    else:
        block_p = min(_power_of_two(pixels), elements)
        # Smaller where more than an eighth of the last block would be idle.
        while block_p > 64 and -pixels % block_p > pixels // 8:
            block_p //= 2
        block_c = min(_power_of_two(channels), elements // block_p)
        while block_c > 1 and block_c * pixels >= 2**31:
            block_c //= 2
    return Plan(0, block_p, block_c, min(max(block_p * block_c // 1024, 1), 8))


@functools.cache
def _processors(index: int | None) -> int:
    """Multiprocessors of a GPU; for the interpreter those of an H100."""
    return 132 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def _is_channels_last(x: torch.Tensor) -> bool:
    """Whether the kernels treat `x` as channels-last: all that is neither this nor contiguous is copied."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def find_plan(x: torch.Tensor, num_groups: int, backward: bool = False) -> Plan:
    """The plan that [`adagn_triton`] takes: a rule, not a search (which `benchmarks/bench_kernels.py --search` is)."""
    batch_size, channels = x.shape[:2]
    pixels, itemsize, channels_last = x.shape[2] * x.shape[3], x.element_size(), _is_channels_last(x)
    processors, limit = _processors(x.device.index), WHOLE_BACKWARD if backward else WHOLE_FORWARD
    plan = whole_plan(channels // num_groups, pixels, num_groups, itemsize, channels_last, limit)
    if plan is not None:
        programs, tile = batch_size * -(-num_groups // plan.groups), plan.groups * plan.block_p * plan.block_c
        # Large tiles only where all run at once. There a single launch takes less time than those of the split way.
        if tile <= SMALL_TILE or programs <= processors:
            return plan
    return split_plan(batch_size, channels, pixels, itemsize, channels_last, processors)


# Launches


def _same_layout(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor like `x` in the layout of the kernels."""
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)


def _by_row(values: torch.Tensor | None) -> torch.Tensor | None:
    """Scale and shift are often halves of the rows of one tensor, which the kernels can read as they are."""
    return values if values is None or values.stride(1) == 1 else values.contiguous()


def _stride(values: torch.Tensor | None) -> int:
    return 0 if values is None else values.stride(0)


def run_forward(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    plan: Plan | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The forward pass by the plan given, by default that of [`find_plan`].

    Returns:
        `(y, mean, rstd)`: the output, and for each group the mean minus the first value, and 1 / standard deviation,
        float32 `(batch, num_groups)`.
    """
    batch_size, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    channels_last, width = _is_channels_last(x), channels // num_groups
    y = _same_layout(x)
    # Outputs of an operator must not share memory.
    mean, rstd = (torch.empty(batch_size, num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    x = x if channels_last else x.contiguous()
    weight, bias, scale, shift = weight.contiguous(), bias.contiguous(), _by_row(scale), _by_row(shift)
    plan = plan or find_plan(x, num_groups)
    padded = _power_of_two(width)
    parameters = (weight, bias, scale, shift, _stride(scale), _stride(shift))
    with torch.cuda.device_of(x):
        if plan.groups:
            _whole_forward[(batch_size * triton.cdiv(num_groups, plan.groups),)](
                *(x, y, mean, rstd, *parameters, num_groups, channels, pixels, eps),
                *(width, padded, plan.groups, plan.block_p, channels_last),
                num_warps=plan.warps,
            )
            return y, mean, rstd
        blocks = triton.cdiv(pixels, plan.block_p), triton.cdiv(channels, plan.block_c)
        grid, tile = (batch_size * blocks[0] * blocks[1],), (plan.block_p, plan.block_c, channels_last)
        means, squares = torch.empty(2, batch_size, blocks[0], channels, dtype=torch.float32, device=x.device).unbind()
        _split_statistics[grid](x, means, squares, channels, pixels, *blocks, width, *tile, num_warps=plan.warps)
        _combine_statistics[(batch_size * num_groups,)](
            *(means, squares, mean, rstd, num_groups, channels, pixels, blocks[0], eps),
            *(width, padded, plan.block_p, min(_power_of_two(blocks[0]), max(1024 // padded, 1))),
        )
        _split_forward[grid](
            *(x, y, mean, rstd, *parameters, num_groups, channels, pixels, *blocks, batch_size - 1, width, *tile),
            num_warps=plan.warps,
        )
    return y, mean, rstd


def run_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    plan: Plan | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The backward pass by the plan given, by default that of [`find_plan`].

    Returns:
        Gradients of x, weight, bias, scale and shift. Without scale and shift the last two are empty.
    """
    batch_size, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    channels_last, width = _is_channels_last(x), channels // num_groups
    dx, dweight, dbias, dscale, dshift = _empty_gradients(x, weight, bias, scale, shift)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dscale.zero_(), dshift.zero_()
    x = x if channels_last else x.contiguous()
    dy = dy.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    weight, bias, scale, shift = weight.contiguous(), bias.contiguous(), _by_row(scale), _by_row(shift)
    plan = plan or find_plan(x, num_groups, backward=True)
    padded = _power_of_two(width)
    sum_g, sum_gx = torch.empty(2, batch_size, channels, dtype=torch.float32, device=x.device).unbind()
    strides, gradients = (_stride(scale), _stride(shift)), (dscale, dshift)
    with torch.cuda.device_of(x):
        if plan.groups:
            _whole_backward[(batch_size * triton.cdiv(num_groups, plan.groups),)](
                *(dy, x, dx, mean, rstd, weight, bias, scale, shift, sum_g, sum_gx, *gradients, *strides),
                *(num_groups, channels, pixels, width, padded, plan.groups, plan.block_p, channels_last),
                num_warps=plan.warps,
            )
        else:
            blocks = triton.cdiv(pixels, plan.block_p), triton.cdiv(channels, plan.block_c)
            grid, tile = (batch_size * blocks[0] * blocks[1],), (plan.block_p, plan.block_c, channels_last)
            sizes = batch_size, blocks[0], channels
            sums_g, sums_gx = torch.empty(2, *sizes, dtype=torch.float32, device=x.device).unbind()
            mean_g, mean_gx = torch.empty(2, batch_size, num_groups, dtype=torch.float32, device=x.device).unbind()
            _split_sums[grid](
                *(dy, x, mean, rstd, weight, bias, scale, shift, sums_g, sums_gx, *strides),
                *(num_groups, channels, pixels, *blocks, width, *tile),
                num_warps=plan.warps,
            )
            _combine_sums[(batch_size * num_groups,)](
                *(sums_g, sums_gx, weight, bias, scale, shift, sum_g, sum_gx, mean_g, mean_gx, *gradients, *strides),
                *(num_groups, channels, pixels, blocks[0]),
                *(width, padded, min(_power_of_two(blocks[0]), max(1024 // padded, 1))),
            )
            _split_backward[grid](
                *(dy, x, dx, mean, rstd, weight, bias, scale, shift, mean_g, mean_gx, *strides),
                *(num_groups, channels, pixels, *blocks, batch_size - 1, width, *tile),
                num_warps=plan.warps,
            )
        _parameter_gradients[(triton.cdiv(channels, 32),)](
            *(sum_g, sum_gx, scale, dweight, dbias, strides[0], batch_size, channels),
            *(min(_power_of_two(batch_size), 32), 32),
        )
    return dx, dweight, dbias, dscale, dshift


def _empty_gradients(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # An operator cannot return None.
    dscale, dshift = (x.new_empty(0) if each is None else each.new_empty(each.shape) for each in (scale, shift))
    return _same_layout(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape), dscale, dshift


# Operators, which compilers keep as they are


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return run_forward(x, num_groups, weight, bias, eps, scale, shift)


@_forward.register_fake
def _(x, num_groups, weight, bias, eps, scale, shift):
    statistics = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    return _same_layout(x), statistics, torch.empty_like(statistics)


# `eps` is for the gradient of the gradient.
@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return run_backward(dy, x, num_groups, mean, rstd, weight, bias, scale, shift)


@_backward.register_fake
def _(dy, x, num_groups, mean, rstd, weight, bias, eps, scale, shift):
    return _empty_gradients(x, weight, bias, scale, shift)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps, scale, shift = inputs
    ctx.save_for_backward(x, *output[1:], weight, bias, scale, shift)
    ctx.set_materialize_grads(False)


def _call_backward(ctx: Any, dy: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
    arguments = (dy, x, ctx.num_groups, mean, rstd, weight, bias, ctx.eps, scale, shift)
    dx, dweight, dbias, dscale, dshift = _backward(*arguments)
    conditioning = (None, None) if scale is None else (dscale, dshift)
    return dx, None, dweight, dbias, None, *conditioning


def _save_for_double_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    dy, x, ctx.num_groups, _, _, weight, bias, ctx.eps, scale, shift = inputs
    ctx.save_for_backward(dy, x, weight, bias, scale, shift)


def _double_backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradient of the gradient, through the reference: it is rare."""
    from .adagn import adagn_reference

    saved = ctx.saved_tensors
    with torch.enable_grad():
        # The inputs themselves, where they are part of a graph, so that it can be differentiated again.
        leaves = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in saved
        ]
        dy, x, weight, bias, scale, shift = leaves
        inputs = [each for each in leaves[1:] if each is not None]
        y = adagn_reference(x, ctx.num_groups, weight, bias, ctx.eps, scale, shift)
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    second = torch.autograd.grad(
        first, [dy, *inputs], gradients[: len(inputs)], allow_unused=True, create_graph=torch.is_grad_enabled()
    )
    ddy, dx, dweight, dbias, dscale, dshift = (*second, None, None)[:6]
    return ddy, dx, None, None, None, dweight, dbias, None, dscale, dshift


_forward.register_autograd(_call_backward, setup_context=_save_for_backward)
_backward.register_autograd(_double_backward, setup_context=_save_for_double_backward)


# Use


@functools.cache
def _warn_that_triton_is_missing() -> None:
    logger.warning(
        "Adaptive group normalisation on this GPU takes the reference path, which moves several times as much memory: "
        "the package `triton` cannot be imported. On Linux, `pip install triton` brings it."
    )


@functools.cache
def _kernels_run(index: int, dtype: torch.dtype) -> bool:
    """Tries a kernel on a device, with a warning if it fails: Triton needs a C compiler, and not too old a GPU."""
    x = torch.zeros(1, 1, 1, 1, device=torch.device("cuda", index), dtype=dtype)
    try:
        run_forward(x, 1, x.flatten(), x.flatten(), 1e-5, None, None)
    except Exception as error:
        logger.warning(
            f"Adaptive group normalisation in {dtype} on this GPU takes the reference path, as Triton fails: {error}"
        )
        return False
    return True


def triton_is_usable(x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    """
    Whether [`adagn_triton`] can take these tensors: `x` of four dimensions, in float32, bfloat16 or float16, on CUDA
    (or anywhere, if Triton's interpreter is switched on by `TRITON_INTERPRET=1`), without transformations of
    `torch.func` and forward-mode differentiation. Warns once if only Triton is missing or fails.
    """
    if x.ndim != 4 or x.dtype not in TRITON_DTYPES or not (x.is_cuda or INTERPRETED):
        return False
    if torch.version.hip is not None:  # groups of 64 threads; the numbers of warps here are for 32
        return False
    if torch.compiler.is_compiling():
        return triton is not None
    if triton is None:
        _warn_that_triton_is_missing()
        return False
    if x.is_cuda and not _kernels_run(x.device.index, x.dtype):
        return False
    return not is_transformed(x, *parameters)  # for which the operators have no rules


def adagn_triton(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """
    `adagn_reference` by the kernels of this module, for inputs for which [`triton_is_usable`] is true.

    Arguments and result are those of the reference, except that the activation must be SiLU. Parameters of any floating
    dtype. Inputs that are neither contiguous nor channels-last are copied. Gradients of gradients go through the
    reference.

    Raises:
        ValueError: For another activation, and for parameters of other shapes.
    """
    if activation not in TRITON_ACTIVATIONS:
        raise ValueError(f"`activation` is {activation!r}; the kernels have {list(TRITON_ACTIVATIONS)}.")
    # The kernels read memory by these sizes.
    channels = x.shape[1]
    if channels % num_groups or not weight.shape == bias.shape == (channels,):
        raise ValueError(
            f"`num_groups` is {num_groups}, `weight` has shape {tuple(weight.shape)} and `bias` {tuple(bias.shape)}; "
            f"for {channels} channels, the groups must divide them, and both must have shape ({channels},)."
        )
    if scale is not None and not scale.shape == shift.shape == x.shape[:2]:
        raise ValueError(
            f"`scale` has shape {tuple(scale.shape)} and `shift` {tuple(shift.shape)}; both must have shape "
            f"{tuple(x.shape[:2])}."
        )
    return _forward(x, num_groups, weight, bias, eps, scale, shift)[0]
