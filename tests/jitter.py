"""
Perturbs the last bits of the results that differ between machines: matrix products, convolutions, attention,
normalization, reductions.

Such a result depends on the kind of processor, on the number of threads, on the batch size and, on some processors, on
the place of the operands in memory. One machine shows only one of the possible results. `pytest --jitter` adds noise of
the size of these differences, so that a test that compares last bits fails on every machine. Elementwise operations,
copies and integers remain unchanged.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode


# Names of operators (`aten::...`), including those of backward passes.
SUMS = frozenset({"sum", "mean"})
# The terms of these results may cancel.
PRODUCTS = frozenset(
    {
        *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "addr", "_cdist_forward"),
        *("convolution", "convolution_backward", "native_group_norm", "native_group_norm_backward"),
        *("native_layer_norm", "native_layer_norm_backward", "native_batch_norm", "native_batch_norm_backward"),
        *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
        *("_softmax_backward_data", "_log_softmax_backward_data"),
    }
)
# The terms of these cannot.
MEANS = frozenset(
    {
        *("_softmax", "_log_softmax", "logsumexp", "var", "std", "var_mean", "std_mean", "linalg_vector_norm"),
        *("avg_pool2d", "avg_pool2d_backward", "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward"),
        *("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    }
)


class Jitter(TorchDispatchMode):
    """
    Adds -1, 0 or 1 rounding errors to each element that one of the operators above returns, differently at each call.

    In float32 and float64, a rounding error of a sum is relative to the sum of the absolute values; for products it is
    relative to the absolute value of the result or the root mean square of all results, whichever is larger. Narrower
    types are summed in float32 and rounded once: an error is relative to the result, and 1 element in 64 has one.
    What is exact on every machine remains: zeros (e.g. the output of weights that are 0) and sums of whole numbers.

    Args:
        seed (`int`): Of the noise.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._opname
        if name in SUMS:
            if self._can_be_perturbed(result):
                self.perturb(result, function(args[0].abs(), *args[1:], **kwargs))
        elif name in PRODUCTS or name in MEANS:
            for tensor in (result,) if isinstance(result, torch.Tensor) else result:
                if self._can_be_perturbed(tensor):
                    size = tensor.abs()
                    if name in PRODUCTS and tensor.dtype in (torch.float32, torch.float64):
                        root_mean_square = size.norm().item() / math.sqrt(tensor.numel())
                        if math.isfinite(root_mean_square):
                            size.clamp_(min=root_mean_square)
                    self.perturb(tensor, size)
        return result

    @staticmethod
    def _can_be_perturbed(tensor: torch.Tensor | None) -> bool:
        if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or not tensor.is_floating_point():
            return False
        return tensor.numel() > 0 and not _is_exact(tensor)

    def perturb(self, tensor: torch.Tensor, size: torch.Tensor) -> None:
        rarity = 1 if tensor.dtype in (torch.float32, torch.float64) else 64
        steps = torch.randint(-rarity, rarity + 1, tensor.shape, generator=self.generator, dtype=torch.int8)
        steps.div_(rarity, rounding_mode="trunc").mul_(tensor != 0)
        tensor.add_(size.nan_to_num_(0, 0, 0).mul_(steps), alpha=torch.finfo(tensor.dtype).eps)


def _is_exact(tensor: torch.Tensor) -> bool:
    """Whether all elements are whole multiples of 1/256, as sums of such numbers are."""
    if (tensor.flatten()[0].item() * 256) % 1:  # mostly so
        return False
    scaled = tensor.double() * 256
    return torch.equal(scaled, scaled.round())
