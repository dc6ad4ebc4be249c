"""The machine of a run in its log, with a warning if it cannot resume a run bit for bit."""

import logging
import os
import platform
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from accelerate import Accelerator


logger = logging.getLogger(__name__)

# Environment variables that choose the instructions of torch, oneDNN and MKL.
KERNEL_VARIABLES = ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
# torch allocates tensors at multiples of 64 bytes, which differ between runs. In elements of 4 bytes:
OFFSETS = (16, 32, 64, 128, 256, 512, 1024)


def describe_machine() -> str:
    """Processor, version of torch, its instruction set, threads, and kernel variables, in one line."""
    capability, threads = torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"
    variables = (f"{name}={os.environ[name]}" for name in KERNEL_VARIABLES if name in os.environ)
    return ", ".join([_processor_name(), f"torch {torch.__version__}", capability, threads, *variables])


def depends_on_memory(operation: Callable[..., torch.Tensor], *operands: torch.Tensor) -> bool:
    """
    Whether the last bits of the result of `operation` depend on the memory addresses of the operands (float32, on the
    CPU), which are copied to several ones.
    """
    expected = operation(*(_copy(operand, 0) for operand in operands))
    for i in range(len(OFFSETS)):
        moved = [_copy(operand, OFFSETS[(i + j) % len(OFFSETS)]) for j, operand in enumerate(operands)]
        if not torch.equal(operation(*moved), expected):
            return True
    return False


def operations_that_depend_on_memory() -> list[str]:
    """
    Names of the operations of a U-Net in float32 whose last bits depend on memory addresses, on this machine and in
    this process. It takes some milliseconds.
    """
    return [name for name, operation, operands in _operations() if depends_on_memory(operation, *operands)]


def report_machine(accelerator: Accelerator) -> None:
    """Logs the machine of the main process, and warns if it cannot resume a run bit for bit."""
    if not accelerator.is_main_process:
        return
    logger.info("Machine: %s", describe_machine())
    if accelerator.device.type != "cpu":
        if not torch.are_deterministic_algorithms_enabled():
            logger.info(
                "On this device (%s) a resumed run equals the unbroken one up to rounding: some kernels add in a "
                "varying order. See docs/reproducibility.md.",
                accelerator.device.type,
            )
        return
    found = operations_that_depend_on_memory()
    if found:
        logger.warning(
            "On this processor the last bits of %s depend on memory addresses, so a resumed run equals the unbroken "
            "one only up to rounding. For equal bits, set the environment variable MKL_CBWR=COMPATIBLE for this run "
            "and for those that resume it.",
            ", ".join(found),
        )


def _operations() -> Iterator[tuple[str, Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    # A linear layer and its two gradients.
    yield "matrix products", torch.mm, (random(16, 96), random(96, 200))
    yield "matrix products of transposed factors", lambda x, w: x @ w.T, (random(16, 96), random(200, 96))
    yield "gradients of weights", lambda x, y: y.T @ x, (random(16, 96), random(16, 200))
    yield "attention", F.scaled_dot_product_attention, tuple(random(2, 2, 64, 24) for _ in range(3))
    yield "1x1 convolutions", F.conv2d, (random(2, 48, 8, 8), random(96, 48, 1, 1))
    yield "3x3 convolutions", lambda x, w: F.conv2d(x, w, padding=1), (random(2, 48, 8, 8), random(48, 48, 3, 3))


def _copy(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A contiguous copy, `offset` elements after a multiple of 8 KiB."""
    alignment = 2 * max(OFFSETS)
    memory = torch.empty(tensor.numel() + 2 * alignment, dtype=tensor.dtype)
    start = -(memory.data_ptr() // memory.element_size()) % alignment + offset
    return memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
