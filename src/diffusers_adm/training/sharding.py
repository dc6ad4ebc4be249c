"""
Runs whose weights or optimizer states are split over processes: FSDP2 and DeepSpeed's ZeRO, through Accelerate.

With FSDP2, each weight is a `DTensor`, of which a process holds a part. Averages are kept in parts, too; what is saved
or sampled from is gathered before. With ZeRO-2, each process has the whole weights, and a part of optimizer state and
gradients. Whatever gathers is collective: all processes call it, in the same order.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from .run_state import read_state, write_state


if TYPE_CHECKING:
    from .arguments import TrainingArguments


# In a checkpoint, besides the files of runs that are not sharded.
WEIGHTS_NAME, OPTIMIZER_NAME = "sharded_weights.safetensors", "sharded_optimizer"
WHOLE = "Use `multi_gpu` (training/configs/accelerate_eight_gpus.yaml), which keeps the weights whole."


# 1. Engines


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Whether the weights are split (FSDP2)."""
    return accelerator.distributed_type == DistributedType.FSDP


def uses_zero(accelerator: Accelerator) -> bool:
    """Whether optimizer state and gradients are split (DeepSpeed)."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds only a part of what a checkpoint holds."""
    return uses_fsdp(accelerator) or uses_zero(accelerator)


def configure_engine(accelerator: Accelerator, training_args: TrainingArguments) -> None:
    """
    Checks what Accelerate is configured for, and gives FSDP2 and DeepSpeed the arguments of the run. Raises a
    `ValueError` for what cannot work, or was never tried.
    """
    kind = accelerator.distributed_type
    for engine, variable in ((DistributedType.FSDP, "FSDP"), (DistributedType.DEEPSPEED, "DEEPSPEED")):
        if os.environ.get(f"ACCELERATE_USE_{variable}", "false").lower() == "true" and kind != engine:
            raise ValueError(
                f"Accelerate is configured for {engine.value}, but runs {accelerator.num_processes} process(es) on "
                f"{accelerator.device.type} without it, each with the whole weights: Accelerate needs GPUs and "
                "several processes for it, and says nothing otherwise. Use another config file of training/configs, "
                "such as accelerate_two_cpu_processes.yaml."
            )
    if kind == DistributedType.MEGATRON_LM:
        raise ValueError(f"Accelerate is configured for {kind.value}, which trains only networks of its own. {WHOLE}")
    if is_sharded(accelerator) and accelerator.state.dynamo_plugin.backend.value.upper() != "NO":
        raise ValueError(
            f"`dynamo_backend` compiles the network, which was never tried with {kind.value}. Leave it out, or use "
            "`multi_gpu`."
        )
    if is_sharded(accelerator) and accelerator.mixed_precision == "fp16":
        raise ValueError(f"`mixed_precision` fp16 was never tried with {kind.value}. Use bf16 or no.")
    if uses_fsdp(accelerator):
        _configure_fsdp(accelerator)
    elif uses_zero(accelerator):
        _configure_zero(accelerator, training_args)


def _configure_fsdp(accelerator: Accelerator) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"`fsdp_version` is {plugin.fsdp_version}, whose weights are flat buffers. Set it to 2.")
    for value, name, instead in (
        (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading", "only one process would load networks"),
        (plugin.activation_checkpointing, "fsdp_activation_checkpointing", "use `--gradient_checkpointing`"),
        (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy", "fsdp_offload_params", "it was never tried"),
    ):
        if value:
            raise ValueError(f"`{name}` is true; set it to false: {instead}.")
    if accelerator.mixed_precision == "bf16":
        # Accelerate would also add up gradients in bf16, and return it from the network.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)


def _configure_zero(accelerator: Accelerator, training_args: TrainingArguments) -> None:
    config = accelerator.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    if zero["stage"] not in (1, 2):
        raise ValueError(f"`zero_stage` is {zero['stage']}; it must be 1 or 2. To split the weights, use FSDP2.")
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise ValueError("`offload_optimizer_device` was never tried. Set it to none.")
    for name, value in (
        ("gradient_accumulation_steps", training_args.gradient_accumulation_steps),
        ("gradient_clipping", training_args.max_grad_norm),
    ):
        if config.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f"`{name}` is {config[name]} in the config of DeepSpeed, and {value} by the arguments of the run. "
                "Leave it out of the former, or set it to auto."
            )
        config[name] = value
    if accelerator.mixed_precision == "bf16":
        # DeepSpeed would cast the weights, in which averages and small steps are lost.
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def check_networks(
    accelerator: Accelerator, networks: Mapping[str, torch.nn.Module], opponent: torch.nn.Module | None = None
) -> None:
    """Raises a `ValueError` for networks that FSDP2 or DeepSpeed cannot train here."""
    if not is_sharded(accelerator):
        return
    engine = accelerator.distributed_type.value
    if len(networks) > 1:
        names = " and ".join(map(repr, networks))
        raise ValueError(f"{engine} trains one network, and this run trains {names}. Freeze all but one. {WHOLE}")
    if opponent is not None:
        raise ValueError(f"{engine} trains one network, without a discriminator. Leave it out. {WHOLE}")
    (network,) = networks.values()
    if uses_fsdp(accelerator) and getattr(network, "peft_config", None):
        raise ValueError(f"{engine} does not train adapters (`lora_rank`). {WHOLE}")
    scalars = [name for name, parameter in network.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ValueError(
            f"{engine} cannot train {type(network).__name__}: its {scalars[0]!r} is a single number, which cannot be "
            f"split, and which is clamped after each step. {WHOLE}"
        )


def wrap_layers(accelerator: Accelerator, network: torch.nn.Module) -> None:
    """Makes FSDP2 gather the network layer by layer; Accelerate takes no names of layers that it does not have."""
    if uses_fsdp(accelerator) and accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in network.modules()}
        layers = [name for name in getattr(network, "_no_split_modules", None) or () if name in present]
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layers


# 2. Parts


def local_tensors(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The part of each tensor that this process has, in the same memory; whole tensors as they are."""
    return [tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def local_parameters(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The same for parameters, which stay parameters: `EMAModel` averages those that require gradients."""
    return [
        torch.nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)
        if isinstance(parameter, DTensor)
        else parameter
        for parameter in parameters
    ]


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers a tensor. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_norm(norm: Any) -> torch.Tensor | None:
    """
    What `accelerator.clip_grad_norm_` returns, as a tensor of this process; None if it is not known. With FSDP2, it is
    split; with DeepSpeed, it is a number, and infinite if DeepSpeed has left out the step, which it takes in the
    backward pass. Collective.
    """
    if isinstance(norm, (int, float)):
        return torch.tensor(float(norm))
    return None if norm is None else whole_tensor(norm)


@torch.no_grad()
def copy_whole(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies a whole tensor, the same on all processes, into one that may be split. Collective."""
    if isinstance(target, DTensor):
        whole = whole.to(target.device, target.dtype)
        whole = distribute_tensor(whole, target.device_mesh, target.placements)
    target.copy_(whole)


def all_finite(accelerator: Accelerator, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all values are finite, on all processes if tensors are split: then collective. Waits for the device."""
    finite = [torch.isfinite(tensor).all() for tensor in local_tensors(tensors)]
    if not finite:
        return True
    result = torch.stack(finite).all()
    if uses_fsdp(accelerator):
        result = accelerator.reduce(result.float(), reduction="sum") == accelerator.num_processes
    return bool(result)


# 3. Whole networks


class WholeNetworks:
    """Whole copies of networks that FSDP2 splits. Made before it does; without FSDP2 there are none."""

    def __init__(self, accelerator: Accelerator, networks: Iterable[torch.nn.Module]):
        self.accelerator = accelerator
        self.networks = list(networks) if uses_fsdp(accelerator) else []
        self._empty = [_without_weights(network) for network in self.networks]

    def gather(self, everywhere: bool) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        """
        Split networks and copies with their present weights, whole and in evaluation mode: `everywhere` for each
        process, on its device; or for the main process, on the CPU, and none for the others. Collective.
        """
        pairs = []
        for network, empty in zip(self.networks, self._empty, strict=True):
            state = whole_state_dict(network, everywhere)
            if everywhere or self.accelerator.is_main_process:
                whole = copy.deepcopy(empty)
                whole.load_state_dict(state, assign=True)
                pairs.append((network, whole.to(self.accelerator.device if everywhere else "cpu").eval()))
        return pairs


@contextmanager
def in_place(pairs: Iterable[tuple[torch.nn.Module, torch.nn.Module]]) -> Iterator[None]:
    """
    Puts the second network of each pair in the place of the first for the duration of a `with` block. The objects stay
    the same, so that whatever holds one of them sees the other network; parameters and layers are others meanwhile.
    """
    for pair in pairs:
        _exchange(*pair)
    try:
        yield
    finally:
        for pair in pairs:
            _exchange(*pair)


def _without_weights(network: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters take no memory."""
    parameters = {
        id(parameter): torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, parameters)


def _exchange(first: torch.nn.Module, second: torch.nn.Module) -> None:
    # FSDP2 changes the class of a network as well.
    for name in ("__dict__", "__class__"):
        former = getattr(first, name)
        object.__setattr__(first, name, getattr(second, name))
        object.__setattr__(second, name, former)


def whole_state_dict(network: torch.nn.Module, everywhere: bool) -> dict[str, torch.Tensor]:
    """
    The weights of a split network, gathered: on the device of each process, or on the CPU of the main one (empty on the
    others). Collective.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
    state: dict[str, Any] = get_model_state_dict(network, options=options)
    return state


def class_of(network: torch.nn.Module) -> type:
    """The class of a network, before FSDP2 changed it."""
    from torch.distributed.fsdp import FSDPModule

    return type(network).__mro__[2] if isinstance(network, FSDPModule) else type(network)


# 4. Checkpoints


@contextmanager
def networks_apart(accelerator: Accelerator) -> Iterator[None]:
    """For a `with` block, `accelerator.save_state` and `load_state` leave out networks and optimizers if sharded."""
    if not is_sharded(accelerator):
        yield
        return
    kept = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = kept


def save_networks(accelerator: Accelerator, folder: str | os.PathLike) -> None:
    """
    Writes trained weights and optimizer state of a sharded run into a checkpoint. They are whole, except for the
    optimizer state of ZeRO, of which each process writes its part. Collective; does nothing for runs that are not
    sharded.
    """
    if not is_sharded(accelerator):
        return
    network, optimizer = _trained(accelerator)
    if uses_fsdp(accelerator):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        found, states = get_state_dict(network, optimizer, options=options)
        weights: dict[str, Any] = dict(found)
        writes_states = accelerator.is_main_process
    else:
        frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
        weights = {name: tensor.cpu() for name, tensor in network.state_dict().items() if name not in frozen}
        states, writes_states = optimizer.state_dict(), True
    if accelerator.is_main_process:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, Path(folder, WEIGHTS_NAME))
    if writes_states:
        write_state(folder, _optimizer_name(accelerator), states)


def check_engine(accelerator: Accelerator, folder: str | os.PathLike) -> None:
    """
    Raises a `ValueError` for the checkpoint of another kind of run, and for ZeRO of another number of processes. Call
    it on every process.
    """
    if not is_sharded(accelerator):
        if Path(folder, WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{folder} was written by a run whose weights or optimizer were split over processes (FSDP2 or ZeRO). "
                "Resume it with the config file of Accelerate that it was written with, or start a new run from its "
                "pipeline."
            )
        return
    name = _optimizer_name(accelerator)
    parts = len(list(Path(folder).glob(f"{OPTIMIZER_NAME}_*.json")))
    if uses_zero(accelerator) and parts not in (0, accelerator.num_processes):
        raise ValueError(
            f"{folder} holds the optimizer state of {parts} processes, of which each of them wrote a part (ZeRO), but "
            f"this run has {accelerator.num_processes}. Resume it with {parts}."
        )
    if not Path(folder, f"{name}.json").is_file():
        raise ValueError(
            f"{folder} was not written by a run with {accelerator.distributed_type.value}. Resume it with the config "
            "file of Accelerate that it was written with, or start a new run from its pipeline."
        )


def load_networks(accelerator: Accelerator, folder: str | os.PathLike) -> None:
    """
    Reads what `save_networks` wrote. Collective.
    """
    if not is_sharded(accelerator):
        return
    name = _optimizer_name(accelerator)
    network, optimizer = _trained(accelerator)
    weights: dict[str, Any] = load_file(Path(folder, WEIGHTS_NAME))
    if uses_fsdp(accelerator):
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        # One after the other: `set_state_dict` would leave out the weights on processes that pass none, and the main
        # process would wait for them.
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        states = read_state(folder, name)
        is_main = accelerator.is_main_process
        set_model_state_dict(network, weights if is_main else {}, options=options)
        set_optimizer_state_dict(network, optimizer, states if is_main else {}, options=options)
        return
    network.load_state_dict(weights, strict=False)
    accelerator._optimizers[0].optimizer.refresh_fp32_params()  # ZeRO's copy of its part of the weights
    optimizer.load_state_dict(read_state(folder, name))


def _trained(accelerator: Accelerator) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    (network,), (optimizer,) = accelerator._models, accelerator._optimizers
    return accelerator.unwrap_model(network), base_optimizer(optimizer)


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch inside the wrappers of Accelerate and DeepSpeed."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _optimizer_name(accelerator: Accelerator) -> str:
    return OPTIMIZER_NAME + (f"_{accelerator.process_index}" if uses_zero(accelerator) else "")
