"""The processes that Accelerate has launched, and what each of them logs."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs


def join_processes(mixed_precision: str | None, **kwargs: Any) -> Accelerator:
    """
    Joins the processes that Accelerate has launched, or the only one, and sets up logging: warnings of the main
    process, errors of the others. Further arguments are those of `Accelerator`.
    """
    accelerator = Accelerator(
        # Unless told so, Accelerate takes each of several processes without a GPU for the only one.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        # One process checks images, draws a grid or packs a file while the others wait; NCCL would give up after 10
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
