"""Floating point operations of a training step, counted once, and the peak of the device to compare them with."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


# Dense peaks of common devices in 10**12 operations per second, by a word of the name that PyTorch reports: matrix
# products of 16 bits with sums of 32 bits (bfloat16; float16 is as fast), TF32, and float32 without tensor cores; None:
# it has none. Data sheets often give twice as much, with structured sparsity. A product and a sum are two operations.
PEAKS: dict[str, tuple[float | None, float | None, float]] = {
    # NVIDIA, data sheet of the HGX B200 (2024): 8 GPUs have 18 PFLOP/s dense in 16 bits.
    "B200": (2250.0, 1125.0, 75.0),
    # NVIDIA, "H100 Tensor Core GPU Architecture" (2022), table 2, and the data sheets of H100 NVL, H200 and GH200.
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100": (989.4, 494.7, 66.9),
    "H200": (989.4, 494.7, 66.9),
    "GH200": (989.4, 494.7, 66.9),
    # NVIDIA, "A100 Tensor Core GPU Architecture" (2020), table 1.
    "A100": (312.0, 156.0, 19.5),
    # NVIDIA, data sheets of A10 and A40 (2021).
    "A10": (125.0, 62.5, 31.2),
    "A40": (149.7, 74.8, 37.4),
    # NVIDIA, data sheets of L4, L40 and L40S (2023).
    "L4": (121.0, 60.0, 30.3),
    "L40": (181.0, 90.5, 90.5),
    "L40S": (362.0, 183.0, 91.6),
    # NVIDIA, "Ada GPU Architecture" (2022), appendix A, and "Ampere GA102 GPU Architecture" (2020), appendix A.
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
    # NVIDIA, data sheets of V100 (2018) and T4 (2019), in float16; neither has tensor cores for bfloat16 or TF32.
    "V100-SXM2": (125.0, None, 15.7),
    "V100-PCIE": (112.0, None, 14.0),
    "T4": (65.0, None, 8.1),
    # AMD, data sheet of the Instinct MI300X (2023).
    "MI300X": (1307.4, 653.7, 163.4),
}
# Of these, the first entry is for float16 only.
WITHOUT_BFLOAT16 = ("V100-SXM2", "V100-PCIE", "T4")


def peak_tflops(device_name: str, mixed_precision: str, allows_tf32: bool) -> float | None:
    """
    The dense peak of a device in 10**12 operations per second; `None`: it is not known.

    Args:
        device_name (`str`): As PyTorch reports it.
        mixed_precision (`str`): "fp16", "bf16" or "no".
        allows_tf32 (`bool`): Whether float32 products, here mostly convolutions, may run in TF32.
    """
    if "MIG" in device_name.split():  # a part of a device
        return None
    # The longest word first: "H100 PCIe" before "H100". And no other device: "RTX 3090 Ti", "A10G".
    known = sorted(PEAKS, key=len, reverse=True)
    name = next(
        (name for name in known if re.search(rf"(?<!\w){name}(?!\w| Ti| SUPER| Laptop| D\b)", device_name)), None
    )
    if name is None or (mixed_precision == "bf16" and name in WITHOUT_BFLOAT16):
        return None
    half, tf32, single = PEAKS[name]
    if mixed_precision in ("fp16", "bf16"):
        return half
    return tf32 if allows_tf32 and tf32 is not None else single


class OperationCounter(TorchDispatchMode):
    """
    Adds up the operations of what runs in a `with` block, by the formulas of `torch.utils.flop_counter`. Unlike its
    `FlopCounterMode`, it runs each kernel as it is called: that one decomposes some of them, which changes the last
    bits of gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


class FlopMeter:
    """
    Counts the operations of the first batch that a process trains on, forward and backward pass: matrix products,
    convolutions and attention, a product and a sum as two operations. What a kernel of Triton does is not counted; with
    gradient checkpointing, what is computed twice counts twice. The numbers of the batch are those without the count.
    Networks that Accelerate compiles (`dynamo_backend`) are not counted; those that `--compile` compiles are counted by
    an image that they see uncompiled before, see `TrainingRun`.

    Attributes:
        flops (`int`, *optional*): Of one batch of one process; `None`: not counted (yet).
        peak (`float`, *optional*): The dense peak of the device in 10**12 operations per second; `None`: not known, as
            that of a CPU.
    """

    def __init__(self, accelerator: Accelerator):
        self.flops: int | None = None
        self.is_off = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        self.peak = None
        if accelerator.device.type == "cuda":
            allows_tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
            name = torch.cuda.get_device_name(accelerator.device)
            self.peak = peak_tflops(name, accelerator.mixed_precision, allows_tf32)

    @contextlib.contextmanager
    def count(self, share: float = 1.0) -> Iterator[None]:
        """
        Counts the operations in a `with` block, unless a batch was counted before. `share` is that of the batch which
        the block trains on, if it is not the whole one.
        """
        if self.flops is not None or self.is_off:
            yield
            return
        with OperationCounter() as counter:
            yield
        if not self.is_off:
            self.flops = round(counter.flops / share)

    def give_up(self) -> None:
        """Counts nothing, not even the batch that a `with` block is counting, whose operations were not all run."""
        self.is_off = True

    def rates(self, batches: int, seconds: float, num_processes: int) -> dict[str, float]:
        """
        The measures of a row of the log: `tflops_per_second`, the rate of all processes in 10**12 operations per
        second, and `mfu`, its share of the peak of their devices. What is not known is absent.

        Args:
            batches (`int`): Batches of each process.
            seconds (`float`): Their time.
            num_processes (`int`): Each has one device.
        """
        if not self.flops or not seconds:
            return {}
        rate = self.flops * batches * num_processes / seconds / 1e12
        return {"tflops_per_second": rate} | ({"mfu": rate / (self.peak * num_processes)} if self.peak else {})
