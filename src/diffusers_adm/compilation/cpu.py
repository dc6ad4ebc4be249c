"""
Code of a network for CPUs: `torch.export`, then AOTInductor with frozen weights, which are packed for the convolutions
of oneDNN once instead of in every call.

The compiler runs in a process of its own, which the caller may wait for or not: it changes settings of the whole
process while it works, and would hold up all other threads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils import _pytree as pytree

from .code_cache import CODE, CodeCache
from .suitability import all_tensors


CompiledCode = Callable[..., Sequence[torch.Tensor]]
REQUEST, LOG = "request.pt", "log.txt"
INDUCTOR = "inductor"  # folder of what Inductor writes on the way
LOG_END = 2000  # characters of the compiler's messages in an error
PACKAGE = Path(__file__).parents[1]
# Folders of this package whose code is compiled, or decides how.
COMPILED_FOLDERS = ("models", "ops", "compilation")
COMPILERS = {"win32": "cl", "darwin": "clang++"}  # Inductor's choice; g++ elsewhere


def find_compiler() -> str | None:
    """The C++ compiler that Inductor uses: that of the variable CXX, or the usual one of the system."""
    return shutil.which(os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++"))


def check_compiler() -> None:
    """Raises a `RuntimeError` without a C++ compiler, and in exported code, which lacks the process that compiles."""
    if importlib.util.find_spec(f"{__package__}.compiler_process") is None:
        raise RuntimeError(
            "`enable_fast` compiles in another process, which the code of this repository lacks. Install "
            "diffusers-adm, and load the pipeline without `trust_remote_code`."
        )
    if find_compiler() is None:
        name = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
        raise RuntimeError(
            f"`enable_fast` compiles C++, but there is no compiler: `{name}` was not found. Install it (Debian and "
            "Ubuntu: `apt-get install g++`; macOS: `xcode-select --install`; Windows: the Build Tools of Visual "
            "Studio), or set the variable CXX to another one. Without it, call `pipe.disable_fast()`: the pipeline "
            "then runs as before."
        )


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in all_tensors(network):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings(thing: Any) -> list[tuple[str, str]]:
    """Plain public attributes, such as those that FreeU sets on blocks."""
    plain = (bool, int, float, str, tuple, type(None))
    values = {name: value for name, value in vars(thing).items() if isinstance(value, plain) and name[0] != "_"}
    return sorted((name, repr(values[name])) for name in values.keys() - {"training", "gradient_checkpointing"})


def describe_structure(network: nn.Module) -> str:
    """What decides on the code, apart from weights: class, config, layers and attention processors with settings."""
    public = {name: value for name, value in getattr(network, "config", {}).items() if name[0] != "_"}
    config = json.dumps(public, sort_keys=True, default=repr)  # tuples are lists once they are loaded
    parts = []
    for name, module in network.named_modules():
        parts.append((name, _settings(module)))
        processor = getattr(module, "processor", None)
        if processor is not None:
            kind = f"{type(processor).__module__}.{type(processor).__qualname__}"
            parts.append((kind, _settings(processor) if hasattr(processor, "__dict__") else []))
    return f"{type(network).__module__}.{type(network).__qualname__}\n{config}\n{parts}\n{network}"


def cache_key(weights: str, structure: str, network: nn.Module, signature: str, dtype: torch.dtype) -> str:
    """
    The key of code in the cache: a hash of everything that it depends on. `weights` is that of [`hash_weights`],
    `structure` that of [`describe_structure`].
    """
    parts = [weights, structure, signature, str(dtype), _hash_sources(network), f"{torch.get_num_threads()} threads"]
    parts += [torch.__version__, str(torch.version.git_version), diffusers.__version__, *_processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def _hash_sources(network: nn.Module) -> str:
    files = {path for folder in COMPILED_FOLDERS for path in (PACKAGE / folder).glob("*.py")}
    own = inspect.getsourcefile(type(network))  # of a class of the user
    if own is not None:
        files.add(Path(own))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _processor() -> list[str]:
    """The instructions that the code may contain: the compiler takes all that the processor has."""
    lines = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    lines += [
        f"{name}={os.environ.get(name)}"
        for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "DIFFUSERS_ADM_REFERENCE_ADAGN")
    ]
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            wanted = ("model name", "flags", "Features", "CPU part")
            lines += sorted({line.strip() for line in file if line.startswith(wanted)})
    except OSError:
        pass  # not Linux
    return lines


class Flat(nn.Module):
    """
    A network as a function of tensors alone, which returns a tuple of tensors.

    Args:
        network (`nn.Module`): Called with `return_dict=False`.
        leaves (list): All values of its arguments, with `None` in the places of tensors.
        spec (`TreeSpec`): How they form the keyword arguments.
        places (list of `int`): The places of the tensors.
    """

    def __init__(self, network: nn.Module, leaves: list[Any], spec: pytree.TreeSpec, places: list[int]):
        super().__init__()
        self.network, self.leaves, self.spec, self.places = network, leaves, spec, places

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        arguments = pytree.tree_unflatten(leaves, self.spec)
        return tuple(pytree.tree_leaves(self.network(**arguments, return_dict=False)))


class Compilation:
    """
    A compiler at work in another process.

    Args:
        cache (`CodeCache`), key (`str`): Where the code is kept.
        network (`nn.Module`): Remains unchanged; the process gets a copy.
        arguments (`dict`): Keyword arguments of a call, with tensors of any values.
        dtype (`torch.dtype`): Data type of the weights in the compiled code.
        in_background (`bool`): Whether other work has precedence.

    `cancel()` ends the compiler and deletes what it has written.

    Raises:
        RuntimeError: Without a C++ compiler, or if the network cannot be sent to another process.
    """

    def __init__(
        self,
        cache: CodeCache,
        key: str,
        network: nn.Module,
        arguments: dict[str, Any],
        dtype: torch.dtype,
        in_background: bool,
    ):
        check_compiler()
        self.cache, self.key, self.start = cache, key, time.perf_counter()
        self.folder = cache.new_folder()
        request = {
            "network": network,
            "arguments": arguments,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "in_background": in_background,
        }
        try:
            torch.save(request, self.folder / REQUEST)
        except Exception as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise RuntimeError(
                f"`enable_fast` cannot send {type(network).__name__} to the process that compiles: {error}. Call "
                "`pipe.disable_fast()`."
            ) from error
        paths = [path or os.getcwd() for path in sys.path]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            # As safe as our cache, and deleted with the folder: sources, objects and a copy of the weights. The default
            # is in the folder for temporary files, and stays.
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / INDUCTOR),
            "CXX": find_compiler() or "",
        }
        with open(self.folder / LOG, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.compiler_process", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        self.cancel = weakref.finalize(self, _clean_up, self.process, self.folder)  # also at the end of Python

    @property
    def is_done(self) -> bool:
        """Whether the compiler has ended."""
        return self.process.poll() is not None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    def result(self) -> Path:
        """Waits for the compiler; returns the file of the code. Raises a `RuntimeError` if it failed."""
        try:
            status = self.process.wait()
        except BaseException:  # such as Ctrl-C
            self.cancel()
            raise
        log = (self.folder / LOG).read_text(encoding="utf-8", errors="replace")
        if status != 0:
            self.cancel()
            raise RuntimeError(
                f"The network could not be compiled. Call `pipe.disable_fast()` to sample without. The end of the "
                f"compiler's messages:\n{log[-LOG_END:]}"
            )
        for name in (REQUEST, LOG):
            (self.folder / name).unlink()
        shutil.rmtree(self.folder / INDUCTOR, ignore_errors=True)
        return self.cache.put(self.key, self.folder)


def _clean_up(process: subprocess.Popen, folder: Path) -> None:
    """Ends a compiler and deletes what it has written."""
    if process.poll() is None:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def flatten(arguments: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec, list[int]]:
    """The values of keyword arguments, how they form the arguments, and the places of the tensors among them."""
    leaves, spec = pytree.tree_flatten(arguments)
    return leaves, spec, [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]


def compile_request(folder: Path) -> None:
    """The work of the other process: compiles what `Compilation` has written to a folder."""
    # Written by the parent process, in a folder of the user's own.
    request = torch.load(folder / REQUEST, weights_only=False)
    if request["in_background"] and hasattr(os, "nice"):
        os.nice(10)
    torch.set_num_threads(request["threads"])  # which the code will use
    network = request["network"].eval().requires_grad_(False)
    # Not with `ModelMixin.to`, which warns about every dtype.
    nn.Module.to(network, dtype=request["dtype"])
    nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
    leaves, spec, places = flatten(request["arguments"])
    tensors = tuple(leaves[place] for place in places)
    for place in places:
        leaves[place] = None
    with torch.no_grad():
        program = torch.export.export(Flat(network, leaves, spec, places), tensors, strict=False)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(folder / CODE),
            inductor_configs={
                "freezing": True,
                # The function that calls the kernels one after the other: half of the compiler's time at -O1, and
                # hardly any of the computation.
                "aot_inductor.compile_wrapper_opt_level": "O0",
            },
        )


def load_code(path: Path) -> CompiledCode:
    """Loads compiled code: a function of the tensors of a call, in order. It keeps its own copy of the weights."""
    return torch._inductor.aoti_load_package(str(path))
