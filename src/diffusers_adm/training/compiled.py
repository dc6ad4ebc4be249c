"""The network of a training step, compiled by `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from diffusers.configuration_utils import ConfigMixin

from .sharding import is_sharded


BACKEND = "inductor"
# Inductor's random numbers are others than those of PyTorch's kernels; the dropout must stay that of the run.
OPTIONS: dict[str, Any] = {"fallback_random": True}


def compile_network(network: torch.nn.Module) -> torch.nn.Module:
    """
    Wraps a network so that its calls are compiled. The network itself stays as it is: calls of it, such as those of
    validation, are not compiled, and its weights keep their names. Each shape of the inputs is compiled once; after
    the limit of `torch._dynamo.config.recompile_limit` shapes, further ones run uncompiled.

    Args:
        network (`torch.nn.Module`): As prepared by Accelerate, so that its mixed precision is compiled as well.
    """
    for module in network.modules():
        if isinstance(module, ConfigMixin):
            # Saving writes class and version into the config. A compiled call depends on the config, so that the first
            # checkpoint would cause another compilation; this writes them now.
            module.to_json_string()
    options = OPTIONS if BACKEND == "inductor" else None
    # Not for any size at once: a batch has one size, and its parts, if it does not fit in memory, at most two others.
    return cast(torch.nn.Module, torch.compile(network, backend=BACKEND, dynamic=False, options=options))


def uncompiled() -> AbstractContextManager[None]:
    """In a `with` block, calls of compiled networks run as they would without compilation, and compile nothing."""
    return cast(AbstractContextManager[None], torch.compiler.set_stance("force_eager"))


def check_compile(accelerator: Accelerator) -> None:
    """
    Raises a `ValueError` if networks cannot be compiled here: with an engine of Accelerate that was never tried, in
    addition to its own compilation, or without a compiler, of which a trial tells.
    """
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise ValueError(
            f"`compile` was given, and Accelerate is configured with `dynamo_backend` {backend.value.lower()}: the "
            "network would be compiled twice. Drop one of them."
        )
    if is_sharded(accelerator):
        raise ValueError(
            f"`compile` was never tried with {accelerator.distributed_type.value}. Leave it out, or use `multi_gpu`."
        )
    if BACKEND == "inductor":
        try:
            _find_compiler(accelerator.device)
            _try_to_compile(accelerator.device)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            needed = "a C++ compiler, such as g++" if accelerator.device.type == "cpu" else "Triton and a C compiler"
            raise ValueError(
                f"`compile` was given, but PyTorch cannot compile for {accelerator.device.type} here "
                f"({type(error).__name__}: {reason}). Install {needed} (and name it in $CXX if it is not found), or "
                "leave `--compile` out."
            ) from error


def _find_compiler(device: torch.device) -> None:
    """Raises PyTorch's error if it finds no compiler; a trial could find its result in Inductor's cache."""
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder

    search: Callable[[], Any] | None = getattr(cpp_builder, "get_cpp_compiler", None)
    if search is not None:  # a private function
        search()


def _try_to_compile(device: torch.device) -> None:
    compiled = torch.compile(lambda x: torch.sin(x) + 1, backend=BACKEND, fullgraph=True)
    compiled(torch.zeros(8, device=device))
