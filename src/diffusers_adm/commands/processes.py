"""Accelerate's processes and their logging."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs


MixedPrecision = Literal["no", "fp16", "bf16"]


def join_processes(mixed_precision: MixedPrecision | None, **kwargs: Any) -> Accelerator:
    """
    Joins the processes that Accelerate launched, if any, and sets up logging: warnings in the main process, errors in
    the others. Further arguments are those of `Accelerator`.
    """
    accelerator = Accelerator(
        # Without this, each of several processes without a GPU would take itself for the only one.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        # One process checks images, generates samples or packs a file while the others wait. NCCL's default is 10
        # minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
        **kwargs,
    )
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        level=logging.WARNING if accelerator.is_main_process else logging.ERROR,
    )
    return accelerator


def gather_interleaved(rows: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """
    Gathers the rows of all processes on the CPU: row k of process p becomes row `k * num_processes + p`. A process may
    have one row more than those after it. Collective: every process must call it; all get the same result.
    """
    counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), rows.shape[1])])
    gathered = accelerator.gather(padded.to(accelerator.device)).cpu()
    return gathered.reshape(len(counts), max(counts), -1).transpose(0, 1).flatten(0, 1)[: sum(counts)]
