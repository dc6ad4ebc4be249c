"""
Code of a network for GPUs: `torch.compile` with CUDA graphs, which start all kernels of a call at once.

There is nothing to keep for later processes: Inductor has a cache of its own for code that does not hold the weights.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .cpu import CompiledCode, Flat, flatten


def compile_network(network: nn.Module, arguments: dict[str, Any], dtype: torch.dtype) -> CompiledCode:
    """
    Compiles a copy of a network, for calls with arguments of these shapes.

    Args:
        network (`nn.Module`): Remains unchanged.
        arguments (`dict`): Keyword arguments of a call, with tensors of any values.
        dtype (`torch.dtype`): Data type of the copy.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    nn.Module.to(network, dtype=dtype)
    nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
    leaves, spec, places = flatten(arguments)
    for place in places:
        leaves[place] = None
    flat = Flat(network, leaves, spec, places)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flat(*tensors)

    # Dynamo keeps the graphs of a function with its code object, eight at most, and runs what is beyond uncompiled.
    # So each shape has a code object of its own.
    own = types.FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
    compiled = torch.compile(own, mode="reduce-overhead", dynamic=False)

    def run(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        # The next call of a CUDA graph writes its results to the same memory.
        torch.compiler.cudagraph_mark_step_begin()
        return [output.clone() for output in compiled(*tensors)]

    return run
