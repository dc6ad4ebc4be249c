"""
How far apart two results may lie that are equal except for rounding.

The last bits of a matrix product, a convolution or a reduction depend on the processor, the number of threads, the
batch size and, on some processors, on the place of the operands in memory, so two calls of one network need not agree
in them (`pytest --jitter` shows which tests rest on that). Copies, files, integers and the same elementwise operations
on the same numbers are equal bit by bit: compare those with `torch.equal`.
"""

from collections.abc import Mapping

import numpy as np
import torch


# Numbers of rounding errors, for `rounding_errors`. In float32, where one is 1.2e-7 of the largest absolute value:
ONE_LAYER = 16  # 2e-6: a convolution, attention or normalization, forward and backward: some 100 terms in another order
NETWORK = 256  # 3e-5: the values or the gradients of a toy network, of some 20 layers
SAMPLING = 4096  # 5e-4: a few steps, which amplify the errors of the network by up to `1 / sqrt(alphas_cumprod)`


def rounding_errors(
    actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray, dtype: torch.dtype | None = None
) -> float:
    """
    The largest difference of two tensors, in rounding errors of the largest absolute value of `expected`.

    A rounding error is the `eps` of `dtype`, in which the numbers were computed (by default, that of the tensors).
    float16 and bfloat16 are summed in float32 and rounded once, so few sums differ at all: one error counts as 16.
    """
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.numel() == 0 or torch.equal(actual, expected):
        return 0.0
    assert actual.is_floating_point(), f"{actual.dtype} is not rounded: compare with `torch.equal`"
    dtype = dtype or actual.dtype
    error = torch.finfo(dtype).eps * expected.double().abs().max()
    if dtype in (torch.float16, torch.bfloat16):
        error /= 16
    # NaN, which compares as false with every bound, where one of them is.
    return ((actual.double() - expected.double()).abs().max() / error).item()


def gradient_errors(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """`rounding_errors` of all gradients together: some, e.g. that of the bias of keys, are 0 except for rounding."""
    assert actual.keys() == expected.keys()
    return rounding_errors(*(torch.cat([each[name].flatten() for name in expected]) for each in (actual, expected)))


def levels_apart(actual, expected) -> int:
    """The largest difference of two 8-bit images: 1 where values lie on both sides of a boundary of rounding."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype == np.uint8
    assert actual.shape == expected.shape
    return int(np.abs(actual.astype(int) - expected.astype(int)).max())
