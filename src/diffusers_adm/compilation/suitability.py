"""Which networks can be compiled, in which dtype, and why others cannot."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from ..models.controlnet_adagn import AdaGNControlNetModel, AdaGNMultiControlNetModel
from ..models.unet_2d_adagn import AdaGNUNet2DModel


FastDtype: TypeAlias = Literal["auto"] | torch.dtype | None
UNETS = (AdaGNUNet2DModel, UNet2DModel, UNet2DConditionModel)
# Networks that run once in a call: compiling them takes longer than they ever do.
RUN_ONCE = {"super_res_last"}


def networks_to_compile(components: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The networks of a pipeline that run in every step, by name. (Autoencoders and text encoders run once a call.)"""
    networks = {}
    for name, component in components.items():
        if name in RUN_ONCE:
            continue
        if isinstance(component, (*UNETS, AdaGNControlNetModel)):
            networks[name] = component
        elif isinstance(component, AdaGNMultiControlNetModel):
            networks |= {f"{name}.nets.{i}": net for i, net in enumerate(component.nets)}
    return networks


def check_dtype(dtype: FastDtype) -> None:
    """Raises a `ValueError` unless this is "auto", `None`, or a floating-point dtype."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f'`dtype` is {dtype!r}; pass "auto", a floating-point `torch.dtype` such as `torch.bfloat16`, or `None` '
            "for the dtype of each network."
        )


def choose_dtype(dtype: FastDtype, own: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compile for; "auto" is bfloat16 for float32 networks where the device computes in it."""
    if isinstance(dtype, torch.dtype):
        return dtype
    return torch.bfloat16 if dtype == "auto" and own == torch.float32 and has_fast_bfloat16(device) else own


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16. (All others convert every number, and are slower for it.)"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe is not None and probe() for probe in probes)


def check_network(name: str, network: nn.Module) -> None:
    """
    Check that a network can be compiled.

    Raises:
        ValueError: For offloading and other hooks, also of layers, networks spread over devices, sharded or quantised
            weights, weights of several dtypes, and LoRA adapters that are not fused.
    """
    device_map = getattr(network, "hf_device_map", None)
    if device_map is not None and len(set(device_map.values())) > 1:
        raise ValueError(
            _refusal(name, f"is spread over devices (`device_map`: {device_map})", "Load it on one device")
        )
    for part, module in network.named_modules():
        where = f"{name}.{part}" if part else name
        hooks = _hooks_of(module)
        if hooks:
            raise ValueError(
                _refusal(where, f"has the hook {', '.join(hooks)}", "Remove it (offloading: load the pipeline again)")
            )
        # The hooks of the network itself are looked at in each call, see `FastNetwork`.
        if part and (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)):
            raise ValueError(
                _refusal(where, "has a forward hook or a `forward` of its own, which code would not call", "Remove it")
            )
        adapters = _active_adapters(module)
        if adapters:
            raise ValueError(
                _refusal(where, f"has the LoRA {', '.join(adapters)}, which is not fused", "Call `pipe.fuse_lora()`")
            )
    dtypes: dict[torch.dtype, str] = {}
    for part, tensor in all_tensors(network):
        where = f"{name}.{part}"
        if type(tensor) not in (torch.Tensor, nn.Parameter) and type(tensor) is not getattr(nn, "Buffer", None):
            raise ValueError(
                _refusal(where, f"is a {type(tensor).__name__}: it is sharded or quantised", "Load plain weights")
            )
        if tensor.is_meta:
            raise ValueError(_refusal(where, "is on the device meta: it is offloaded or not loaded", "Load it"))
        if tensor.is_inference():
            raise ValueError(
                _refusal(
                    where,
                    "was made in `torch.inference_mode`, so its changes could not be noticed",
                    "Load the network outside of it",
                )
            )
        if tensor.is_floating_point():
            dtypes.setdefault(tensor.dtype, part)
    if len(dtypes) > 1:  # which were chosen on purpose, while code has one
        (dtype, part), (other, other_part), *_ = dtypes.items()
        raise ValueError(
            _refusal(
                f"{name}.{other_part}",
                f"is {other}, while `{part}` is {dtype}",
                f"Cast all of it (`{name}.to({dtype})`)",
            )
        )


def _refusal(where: str, reason: str, way_out: str) -> str:
    return f"`enable_fast` cannot compile the network: `{where}` {reason}. {way_out}, or call `pipe.disable_fast()`."


def _hooks_of(module: nn.Module) -> list[str]:
    hooks = []
    hook = getattr(module, "_hf_hook", None)  # of accelerate: offloading, device maps
    if hook is not None:
        hooks.append(type(hook).__name__)
    registry = getattr(module, "_diffusers_hook", None)  # group offloading, layerwise casting, caches
    if registry is not None:
        hooks += [type(hook).__name__ for hook in registry.hooks.values()]
    return hooks


def _active_adapters(module: nn.Module) -> list[str]:
    """Adapters of a layer that act and are not fused."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None or not isinstance(module, peft.BaseTunerLayer) or module.disable_adapters:
        return []
    names = {name for kind in module.adapter_layer_names for name in getattr(module, kind, {})}
    return sorted((names & set(module.active_adapters)) - set(module.merged_adapters))


def all_tensors(network: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name."""
    yield from network.named_parameters()
    yield from network.named_buffers()
