"""
Compiled code in place of the forward pass of a network, which itself stays as it is.

`nn.Module` calls `_compiled_call_impl` where it is set, as by `nn.Module.compile`: this is the only attribute that
changes. So config, `state_dict`, saving and `isinstance` see the plain network, and whoever calls it gets the code.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from torch import nn

from ..models.controlnet_adagn import AdaGNControlNetModel
from ..models.input_checks import check_class_labels
from ..models.unet_2d_adagn import AdaGNUNet2DModel
from . import cpu, gpu
from .code_cache import CodeCache
from .cpu import Compilation, CompiledCode
from .suitability import FastDtype, all_tensors, check_dtype, check_network, choose_dtype, networks_to_compile


logger = logging.getLogger(__name__)
# Compilers that work in the background, of all networks.
_IN_BACKGROUND: weakref.WeakSet[Compilation] = weakref.WeakSet()


class Weights:
    """Notices changes of the weights of a network, and of its layers."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.structure = cpu.describe_structure(network)
        self.hash = cpu.hash_weights(network)
        self._record()

    def _record(self) -> None:
        modules = list(self.network.modules())
        self._dicts: list[dict[str, Any]] = [
            entries
            for module in modules
            for entries in (module._parameters, module._buffers, module._modules)
            if entries
        ]
        self._tensors = [tensor for _, tensor in all_tensors(self.network)]
        self._entries, self._state = self._current()
        self._norms = self._current_norms()

    def _current(self) -> tuple[list[int], list[int]]:
        # Loops in C: this runs before every forward pass. A move of the whole network moves the first tensor, too.
        entries = list(map(id, itertools.chain.from_iterable(map(operator.methodcaller("values"), self._dicts))))
        return entries, [self._tensors[0].data_ptr(), *map(operator.attrgetter("_version"), self._tensors)]

    def _current_norms(self) -> list[torch.Tensor]:
        # Sums in addition: norms do not see signs. At least in float32: in 16 bits small changes would round away.
        tensors = [t.detach() for t in self._tensors if t.is_floating_point() and t.numel()]
        dtypes = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
        norms = [torch.linalg.vector_norm(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
        return norms + [t.sum(dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]

    def seem_unchanged(self) -> bool:
        """
        A check for every forward pass: the same tensors, not written to since. It misses what is written through
        `parameter.data`, which torch does not count.
        """
        return self._current() == (self._entries, self._state)

    def are_unchanged(self) -> bool:
        """A check for every call of a pipeline, which reads all weights once. If they are the same, it notes so."""
        is_same = self.seem_unchanged() and cpu.describe_structure(self.network) == self.structure
        if is_same:
            norms = self._current_norms()
            is_same = all(map(torch.equal, norms, self._norms))
        if is_same:
            return True
        # Moved without a change, for example, or summed up by another number of threads.
        if cpu.describe_structure(self.network) != self.structure or cpu.hash_weights(self.network) != self.hash:
            return False
        self._record()
        return True


class FastNetwork:
    """
    Runs compiled code for the calls of a network: `network._compiled_call_impl`.

    Code is made at the first call with inputs of new shapes. The network itself runs where gradients are needed, in
    training mode, and, with `background`, until the code is ready.

    Args:
        name (`str`): In messages.
        network (`nn.Module`): U-Net or ControlNet.
        dtype (`torch.dtype`, `"auto"` or `None`): See `ADMPipeline.enable_fast`.
        find_cache (`Callable`): Returns the `CodeCache` where code for CPUs is kept. Not called for other devices.
        background (`bool`): Compile while the network itself runs; one shape at a time, over all networks.

    Attributes:
        num_compiled, num_loaded (`int`): Shapes that were compiled, and that were found in the cache.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        dtype: FastDtype,
        find_cache: Callable[[], CodeCache],
        background: bool,
    ):
        self.name, self.network, self.dtype, self.background = name, network, dtype, background
        self._find_cache = find_cache
        self.num_compiled = self.num_loaded = 0
        self._forward = inspect.signature(type(network).forward)
        self._lock = threading.RLock()
        self._warned: set[str] = set()
        self._failed: set[str] = set()
        self._waiting: set[str] = set()  # not in the cache, and another compiler was at work
        self._weights: Weights | None = None
        self._code: dict[str, CompiledCode] = {}
        self._running: dict[str, Compilation] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, as its `forward` returns it."""
        arguments = self._bind(args, kwargs)
        values = None if arguments is None else cpu.flatten(arguments)
        if values is None or self._needs_network(values[0]):
            return self.network._call_impl(*args, **kwargs)
        leaves, spec, places = values
        scale, returns_dict = 1.0, arguments.pop("return_dict", True)
        if isinstance(self.network, AdaGNControlNetModel):
            # A factor of all residuals: code for each of its values would be compiled again and again.
            scale = arguments.pop("conditioning_scale", 1.0)
        leaves, spec, places = cpu.flatten(arguments)
        weight = next(self.network.parameters())  # `network.dtype` looks at all layers
        own, device = weight.dtype, weight.device
        dtype = choose_dtype(self.dtype, own, device)
        for place in places:
            leaves[place] = _as_compiled(leaves[place], own, dtype)
        tensors = [leaves[place] for place in places]
        descriptions = [_describe(leaf) for leaf in leaves]
        itself = functools.partial(self.network._call_impl, *args, **kwargs)
        code = self._find_code(f"{dtype} {device.type} {spec} {descriptions}", leaves, spec, dtype, device, itself)
        if code is None:
            return itself()
        with torch.no_grad():
            outputs = [output.to(own) for output in code(*tensors)]
            if not (isinstance(scale, (int, float)) and scale == 1.0):
                outputs = [output * scale for output in outputs]
        return self._as_output(outputs, returns_dict)

    def refresh(self) -> None:
        """
        Check the network before a call of a pipeline: whether it can still be compiled, and whether its weights are
        those of the code.

        Raises:
            ValueError: For hooks, adapters and weights that cannot be compiled; see `check_network`.
        """
        check_network(self.name, self.network)
        with self._lock:
            if self._weights is not None and not self._weights.are_unchanged():
                self._forget()

    def close(self) -> None:
        """End compilers that are still at work."""
        with self._lock:
            for compilation in self._running.values():
                compilation.cancel()
            self._running.clear()

    def wait(self) -> None:
        """Wait for the compilers that work in the background."""
        with self._lock:
            for signature in list(self._running):
                self._finish(signature)

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call by name without those that are `None`; `None`: `forward` will refuse the call."""
        try:
            bound = self._forward.bind(self.network, *args, **kwargs).arguments
        except TypeError:
            return None
        arguments = {name: value for name, value in bound.items() if value is not None}
        arguments.pop("self", None)
        arguments.update(arguments.pop("kwargs", {}))
        sample, timestep = arguments.get("sample"), arguments.get("timestep")
        if not isinstance(sample, torch.Tensor) or timestep is None:
            return None
        if not isinstance(timestep, torch.Tensor):  # else each number would be compiled anew
            arguments["timestep"] = torch.as_tensor(timestep, device=sample.device)
        labels = arguments.get("class_labels")
        if isinstance(labels, torch.Tensor) and isinstance(self.network, (AdaGNUNet2DModel, AdaGNControlNetModel)):
            check_class_labels(self.network.config, len(sample), labels)  # which the code cannot refuse by name
        return dict(sorted(arguments.items()))

    def _needs_network(self, leaves: Iterable[Any]) -> bool:
        """Whether the network itself must run: for gradients, in training mode, and for what is not compiled."""
        network = self.network
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in itertools.chain(tensors, network.parameters())
        ):
            return True
        if network.training:
            self._warn_once(f"`{self.name}` runs without `enable_fast`: it is in training mode. Call `eval()` of it.")
            return True
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return True
        if torch.autograd.forward_ad._current_level >= 0:
            return True
        reason = None
        if torch.is_autocast_enabled(next(network.parameters()).device.type):
            reason = "autocast is on. Pass `dtype=torch.bfloat16` to `enable_fast` in its place"
        elif network._forward_hooks or network._forward_pre_hooks or "forward" in vars(network):
            reason = "the network has forward hooks, or a `forward` of its own, which compiled code does not call"
        elif any(not isinstance(leaf, (torch.Tensor, str, bool, int, float, type(None))) for leaf in leaves):
            reason = "an argument is neither a tensor nor a plain value"
        if reason is not None:
            self._warn_once(f"`{self.name}` runs without `enable_fast`: {reason}.")
        return reason is not None

    def _find_code(
        self,
        signature: str,
        leaves: list[Any],
        spec: Any,
        dtype: torch.dtype,
        device: torch.device,
        itself: Callable[[], Any],
    ) -> CompiledCode | None:
        """
        The code for a call; `None`: it is not ready, or cannot be made. Before code is made, the network runs `itself`:
        a call that it refuses raises its own error, which names the argument, in place of one of the compiler.
        """
        with self._lock:
            if self._weights is not None and not self._weights.seem_unchanged() and not self._weights.are_unchanged():
                self._forget()
            if self._weights is None:
                check_network(self.name, self.network)
                self._weights = Weights(self.network)
            if signature in self._code:
                return self._code[signature]
            if signature in self._running:
                if self._running[signature].is_done:
                    self._finish(signature)
                return self._code.get(signature)
            if signature in self._failed or (signature in self._waiting and _a_compiler_is_at_work()):
                return None
            arguments = _examples(leaves, spec)
            if device.type == "cpu":
                self._start(signature, arguments, dtype, itself)
            elif device.type == "cuda":
                itself()
                logger.warning(f"{self._title(leaves)} is compiled in the following steps, which take long.")
                self._code[signature] = gpu.compile_network(self.network, arguments, dtype)
                self.num_compiled += 1
            else:
                self._failed.add(signature)
                self._warn_once(f"`{self.name}` runs without `enable_fast`, which has no code for {device.type}.")
            return self._code.get(signature)

    def _start(self, signature: str, arguments: dict[str, Any], dtype: torch.dtype, itself: Callable[[], Any]) -> None:
        """Loads the code for CPUs from the cache, or starts to compile it."""
        key = cpu.cache_key(self._weights.hash, self._weights.structure, self.network, signature, dtype)
        cache = self._find_cache()
        path = cache.get(key)
        if path is not None:
            try:
                self._code[signature] = cpu.load_code(path)
                self.num_loaded += 1
                return
            except Exception as error:
                logger.warning(f"The compiled code in {path.parent} cannot be loaded and is deleted: {error}")
                cache.delete(key)
        if self.background and _a_compiler_is_at_work():
            # Each takes a core and much memory, and calls of many shapes would start many of them.
            self._waiting.add(signature)
            return
        self._waiting.discard(signature)
        itself()
        how = "In the meantime the network itself runs" if self.background else "This takes minutes"
        shape = tuple(arguments["sample"].shape)
        logger.warning(
            f"Compiling `{self.name}` for samples of shape {shape}, {dtype}. {how}. The code is kept in {cache.folder}."
        )
        try:
            self._running[signature] = Compilation(cache, key, self.network, arguments, dtype, self.background)
        except Exception as error:
            self._give_up(signature, error)
            return
        if self.background:
            _IN_BACKGROUND.add(self._running[signature])
        else:
            self._finish(signature)

    def _finish(self, signature: str) -> None:
        """Takes the code of a compiler, for which it waits."""
        compilation = self._running.pop(signature)
        try:
            self._code[signature] = cpu.load_code(compilation.result())
        except Exception as error:
            self._give_up(signature, error)
            return
        self.num_compiled += 1
        logger.warning(f"`{self.name}` is compiled, after {compilation.seconds:.0f} s.")

    def _give_up(self, signature: str, error: Exception) -> None:
        """
        In the background, lets the network itself run for the inputs that could not be compiled, whatever the reason (a
        full disk, for example); else raises the error. To be called where it is handled.
        """
        if not self.background:
            raise error
        self._failed.add(signature)
        logger.warning(f"`{self.name}` stays as it is. {error}")

    def _forget(self) -> None:
        """Drops code of weights that have changed."""
        self.close()
        if self._code:
            logger.warning(f"The weights of `{self.name}` have changed, so it is compiled again.")
        self._weights = None
        self._code.clear()
        self._failed.clear()
        self._waiting.clear()

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _title(self, leaves: list[Any]) -> str:
        return f"`{self.name}`, for inputs {[_describe(leaf) for leaf in leaves]},"

    def _as_output(self, outputs: list[torch.Tensor], returns_dict: bool) -> Any:
        if isinstance(self.network, AdaGNControlNetModel):
            down, mid = tuple(outputs[:-1]), outputs[-1]
            return ControlNetOutput(down, mid) if returns_dict else (down, mid)
        if not returns_dict:
            return (outputs[0],)
        kind = UNet2DConditionOutput if isinstance(self.network, UNet2DConditionModel) else UNet2DOutput
        return kind(sample=outputs[0])


def _a_compiler_is_at_work() -> bool:
    return not all(compilation.is_done for compilation in list(_IN_BACKGROUND))


def _as_compiled(tensor: torch.Tensor, own: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in the layout, and, if it is one of the network's dtype, in the dtype that the code takes."""
    # Not timesteps: bfloat16 has 8 bits, so it would round 999 to 1000.
    if tensor.ndim > 1 and tensor.dtype == own:
        tensor = tensor.to(dtype)
    memory_format = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.detach().contiguous(memory_format=memory_format)


def _describe(leaf: Any) -> str:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    return f"{tuple(leaf.shape)} {leaf.dtype} {leaf.device}"


def _examples(leaves: list[Any], spec: Any) -> dict[str, Any]:
    """Arguments with tensors of zeros: the values do not matter to the compiler."""
    made = [torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return torch.utils._pytree.tree_unflatten(made, spec)


def enable(components: dict[str, Any], dtype: FastDtype, cache_dir: str | os.PathLike | None, background: bool) -> None:
    """
    Let the networks of a pipeline run compiled code; see `ADMPipeline.enable_fast`.

    Raises:
        ValueError: For networks that cannot be compiled, and a folder that cannot be used.
        RuntimeError: Without a C++ compiler and without code in the cache.
    """
    check_dtype(dtype)
    networks = networks_to_compile(components)
    for name, network in networks.items():
        check_network(name, network)
    find_cache = functools.cache(lambda: CodeCache(cache_dir))
    # GPUs need none. (A network that moves to the CPU later finds it then.)
    if any(network.device.type == "cpu" for network in networks.values()) and find_cache().is_empty:
        cpu.check_compiler()
    if not networks:
        raise ValueError(
            "`enable_fast` finds no network that it can compile: the U-Net must be one of this package or of "
            "diffusers, without the wrapper of `torch.compile`."
        )
    disable(components)
    for name, network in networks.items():
        if network._compiled_call_impl is not None:
            raise ValueError(
                f"`{name}` is already compiled by its method `compile()`. Load it again for `enable_fast`."
            )
    for name, network in networks.items():
        network._compiled_call_impl = FastNetwork(name, network, dtype, find_cache, background)


def disable(components: dict[str, Any]) -> None:
    """Let the networks of a pipeline run as they are again."""
    for runner in runners(components):
        runner.close()
        runner.network._compiled_call_impl = None


def runners(components: dict[str, Any]) -> list[FastNetwork]:
    """What runs the compiled code of the networks of a pipeline."""
    calls = (getattr(network, "_compiled_call_impl", None) for network in networks_to_compile(components).values())
    return [call for call in calls if isinstance(call, FastNetwork)]
