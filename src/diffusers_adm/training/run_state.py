"""
The state of a run on disk as JSON and safetensors, which cannot run code when they are read, unlike a pickle.

A state is what `state_dict()` returns: tensors and plain values (None, bool, int, float, str) in dicts, lists and
tuples. `write_state` writes the plain values to `NAME.json` and the tensors to `NAME.safetensors`. Checkpoints of
earlier versions hold pickles; `read_pickle` reads them without executing anything but the construction of tensors and
arrays.
"""

from __future__ import annotations

import json
import os
import pickle
import random
from _codecs import encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file


STATE_VERSION = 1
# The tensors of a state are written in files of at most about this many bytes, one after the other, because all tensors
# of a file are copied to the memory of the host first.
MAX_FILE_BYTES = 2**30
# Keys of dicts with one entry that stand for what JSON does not have.
TENSOR, TUPLE, ITEMS = "$tensor", "$tuple", "$items"
PICKLE_SUFFIXES = (".bin", ".pkl", ".pt", ".pth", ".ckpt", ".pickle")
# What Accelerate's files of random states need besides tensors: NumPy arrays of numbers.
NUMPY_GLOBALS: list[Any] = [np.zeros(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32)), encode]


# 1. Writing and reading a state


def write_state(folder: str | os.PathLike, name: str, state: Any) -> None:
    """
    Writes a state as `folder/name.json`, and its tensors as `folder/name.safetensors` (further files:
    `name-2.safetensors`, ...).

    Raises:
        TypeError: For a value that is neither a tensor nor plain; its place is named.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain = _encode(state, "", tensors)
    files = 0
    for files, part in enumerate(_parts(tensors), start=1):  # noqa: B007
        save_file(part, _tensor_file(Path(folder), name, files))
    text = json.dumps({"version": STATE_VERSION, "tensor_files": files, "state": plain}, ensure_ascii=False)
    Path(folder, f"{name}.json").write_text(text + "\n", encoding="utf-8")


def read_state(folder: str | os.PathLike, name: str) -> Any:
    """
    Reads a state that `write_state` wrote. Its tensors are on the CPU.

    Raises:
        ValueError: If the file is not such a state, or one of another version.
    """
    file = Path(folder, f"{name}.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, num_files, plain = content["version"], int(content["tensor_files"]), content["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not hold the state of a run ({error}).") from error
    if version != STATE_VERSION:
        raise ValueError(f"{file} was written by another version of diffusers-adm. Resume it with that one.")
    tensors: dict[str, torch.Tensor] = {}
    for number in range(1, num_files + 1):
        tensors |= load_file(_tensor_file(Path(folder), name, number))
    try:
        return _decode(plain, tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not hold the state of a run ({error!r}).") from error


def _tensor_file(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}{f'-{number}' if number > 1 else ''}.safetensors"


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON holds it; its tensors go to `tensors`, by their places."""
    if torch.is_tensor(value):
        tensors[place] = value
        return {TENSOR: place}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(entry, f"{place}.{key}".lstrip("."), tensors) for key, entry in value.items()}
        # For instance the numbers of the parameters in an optimizer.
        pairs = [[key, _encode(entry, f"{place}.{key}".lstrip("."), tensors)] for key, entry in value.items()]
        if all(isinstance(key, (str, int)) for key in value):
            return {ITEMS: pairs}
    elif isinstance(value, (list, tuple)):
        entries = [_encode(entry, f"{place}.{index}".lstrip("."), tensors) for index, entry in enumerate(value)]
        return {TUPLE: entries} if isinstance(value, tuple) else entries
    elif value is None or isinstance(value, (bool, str)):
        return value
    elif isinstance(value, int):
        return int(value)
    elif isinstance(value, float):
        return float(value)
    raise TypeError(
        f"The state of the run holds a {type(value).__name__} at {place!r}. Checkpoints hold tensors and plain values "
        "(None, bool, int, float, str) in dicts, lists and tuples."
    )


def _decode(plain: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(plain, list):
        return [_decode(entry, tensors) for entry in plain]
    if not isinstance(plain, dict):
        return plain
    if TENSOR in plain:
        return tensors[plain[TENSOR]]
    if TUPLE in plain:
        return tuple(_decode(entry, tensors) for entry in plain[TUPLE])
    if ITEMS in plain:
        return {key: _decode(entry, tensors) for key, entry in plain[ITEMS]}
    return {key: _decode(entry, tensors) for key, entry in plain.items()}


def _parts(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors on the CPU, a few at a time."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    memory: set[int] = set()  # of the part: safetensors refuses tensors that share any
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if part and size + tensor.nbytes > MAX_FILE_BYTES:
            yield part
            part, size, memory = {}, 0, set()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in memory:
            tensor = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
        part[name], size = tensor, size + tensor.nbytes
    if part:
        yield part


# 2. Generators of random numbers


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and PyTorch, on the CPU and on devices like `device`."""
    algorithm, keys, *others = np.random.get_state(legacy=True)  # noqa: NPY002
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), *others],
        "torch": torch.get_rng_state(),
    }
    module = _device_module(device)
    if module is not None:
        states[device.type] = module.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restores what `random_states` returned; the states of devices, if there are as many as before."""
    random.setstate(states["python"])
    algorithm, keys, *others = states["numpy"]
    np.random.set_state((algorithm, np.asarray(keys).astype(np.uint32), *others))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    module, devices = _device_module(device), states.get(device.type)
    if module is not None and devices is not None and len(devices) == module.device_count():
        module.set_rng_state_all(devices)


def _device_module(device: torch.device) -> Any:
    """The module of a device with generators for each of several, such as `torch.cuda`; None for others."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state_all") else None


# 3. Pickles of earlier versions


def read_pickle(file: str | os.PathLike) -> Any:
    """
    Reads a file of `torch.save` that holds tensors, NumPy arrays of numbers and plain values. Tensors are on the CPU.

    Raises:
        ValueError: If it holds anything else, which is not executed.
    """
    return _load_restricted(file, mmap=False)


def find_unsafe_pickle(folder: str | os.PathLike) -> Path | None:
    """
    The first file in a checkpoint, subfolders included, that `read_pickle` would refuse; None if there is none. The
    contents of tensors are not read, so it is fast.
    """
    for file in sorted(Path(folder).rglob("*")):
        if file.suffix in PICKLE_SUFFIXES and file.is_file():
            try:
                _load_restricted(file, mmap=True)
            except ValueError:
                return file
    return None


def _load_restricted(file: str | os.PathLike, mmap: bool) -> Any:
    load: Callable[..., Any] = torch.load
    try:
        with torch.serialization.safe_globals(NUMPY_GLOBALS):
            return load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} holds more than tensors and plain values, so reading it could run code: it is not read. "
            "Checkpoints of diffusers-adm have no such files."
        ) from error
