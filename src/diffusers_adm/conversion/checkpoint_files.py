"""
Finds and reads the network in a `.pt` file, which training loops wrap in several ways. Runs no code from the file.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


logger = logging.getLogger(__name__)

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# A tensor that the U-Nets, upsamplers and classifiers of all these code bases have, and nothing else in a checkpoint.
FIRST_TENSOR = "input_blocks.0.0.weight"
# Nested dictionaries in a checkpoint are searched down to this depth.
MAX_DEPTH = 8


class LoadedCheckpoint(NamedTuple):
    """
    A network in a checkpoint file.

    Attributes:
        state_dict: Its tensors.
        key: Where it is: dictionary keys and parts of the name prefix, joined by dots; "" for the file itself.
        left_aside: Descriptions of the file's other entries.
    """

    state_dict: dict[str, torch.Tensor]
    key: str
    left_aside: list[str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict.items()}

    @property
    def dtypes(self) -> list[str]:
        """Names without `torch.`, sorted."""
        return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.state_dict.values()})

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.state_dict.values())


class _Place(NamedTuple):
    """Location of a network in a checkpoint: dictionary keys, and the prefix of all its tensor names."""

    path: tuple[str, ...]
    prefix: str

    @property
    def key(self) -> str:
        return ".".join([*self.path, *self.prefix.split(".")[:-1]])


def read_layout(checkpoint: Path, key: str | None) -> LoadedCheckpoint:
    """Loads names, shapes and dtypes as tensors on the meta device, and logs what was unwrapped."""
    loaded = load_checkpoint(checkpoint, key)
    if loaded.key or loaded.left_aside:
        others = f"; left aside: {', '.join(loaded.left_aside)}" if loaded.left_aside else ""
        logger.warning("%s: took the network from '%s'%s.", checkpoint.name, loaded.key, others)
    return loaded._replace(state_dict={name: tensor.to("meta") for name, tensor in loaded.state_dict.items()})


def load_checkpoint(checkpoint: Path, key: str | None = None) -> LoadedCheckpoint:
    """
    Reads the network of a `.pt` file, mapped into memory if its format allows that. Never runs code from the file.

    Training loops wrap networks: in a dictionary with an optimizer, in a module whose name becomes a prefix of all
    tensor names (`module.`, `model.`, `_orig_mod.`), or in both. These are unwrapped if the file holds one network.
    If it holds several, `key` selects one: a `LoadedCheckpoint.key`, or its first parts. A `ValueError` if the file
    cannot be read, or holds no network or several of which `key` does not select one.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"`checkpoint` {checkpoint} is not a file.")
    unreadable = (
        f"{checkpoint} ({checkpoint.stat().st_size:,} bytes) cannot be read as a file of `torch.save` that holds "
        "only tensors. It may be damaged, cut short, or of another format."
    )
    try:
        # Arguments of a script, which many checkpoints hold: creating a namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=is_mappable(checkpoint))
    except pickle.UnpicklingError as error:  # its message recommends executing the file
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            unreadable += f" It names an object of {found[1]}: reading that could run code. If you trust the file, save"
            unreadable += " only the state dict of the network."
        raise ValueError(unreadable) from None
    except Exception as error:  # arbitrary bytes lead to arbitrary errors
        raise ValueError(unreadable) from error
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{checkpoint} holds a {type(content).__name__}, not a state dict: names with tensors.")

    places = list(_find_networks(content))
    if not places:
        return LoadedCheckpoint(_check_state_dict(content, checkpoint), "", [])
    place = _choose(places, key, checkpoint)
    entries, others = content, []
    for part in place.path:
        others.append({name: value for name, value in entries.items() if name != part})
        entries = entries[part]
    # Networks nested in this one by name ("ema." next to names without a prefix) are not part of it.
    inner = tuple(p.prefix for p in places if p.path == place.path and len(p.prefix) > len(place.prefix))
    own = [name for name in entries if str(name).startswith(place.prefix) and not str(name).startswith(inner)]
    others.append({name: value for name, value in entries.items() if name not in own})
    state_dict = _check_state_dict({str(name)[len(place.prefix) :]: entries[name] for name in own}, checkpoint)
    averages = [name for rest in others for name in _averaged_weights(rest)]
    if key is None and averages:
        raise ValueError(
            f"{checkpoint} holds a network as '{place.key}', and averaged weights as '{averages[0]}', in a form that "
            f"cannot be read. Pass `key='{place.key}'` to convert the former, or save the state dict of the latter."
        )
    return LoadedCheckpoint(state_dict, place.key, [line for rest in others for line in _describe(rest)])


def _find_networks(entries: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Iterator[_Place]:
    for name, value in entries.items():
        if not isinstance(name, str):
            continue
        if torch.is_tensor(value):
            prefix = name.removesuffix(FIRST_TENSOR)
            if prefix != name and (not prefix or prefix.endswith(".")):
                yield _Place(path, prefix)
        elif isinstance(value, Mapping) and len(path) < MAX_DEPTH:
            yield from _find_networks(value, (*path, name))


def _choose(places: Sequence[_Place], key: str | None, checkpoint: Path) -> _Place:
    """Returns the place that `key` selects, or the only one."""
    chosen = list(places)
    if key is not None:
        chosen = [place for place in places if place.key == key]
        chosen = chosen or [place for place in places if place.key.startswith(f"{key}.")]
    if len(chosen) == 1:
        return chosen[0]
    keys = ", ".join(f"'{place.key}'" for place in chosen or places)
    if not chosen:
        raise ValueError(f"`key` is '{key}', under which {checkpoint} holds no network. It has: {keys}.")
    raise ValueError(
        f"{checkpoint} holds {len(chosen)} networks: {keys}. Name one of them with `key` (`--key` on the command line)."
    )


def _describe(entries: Mapping[Any, Any]) -> list[str]:
    """Describes entries other than the network; tensors are grouped by the first part of their names."""
    lines = [f"{name} ({type(value).__name__})" for name, value in entries.items() if not torch.is_tensor(value)]
    tensors = [str(name) for name, value in entries.items() if torch.is_tensor(value)]
    groups = Counter(name.split(".")[0] for name in tensors)
    lines += [name for name in tensors if groups[name.split(".")[0]] == 1]
    return lines + [f"{first}.* ({number} tensors)" for first, number in groups.items() if number > 1]


def _averaged_weights(entries: Mapping[Any, Any]) -> list[str]:
    """Names of entries that look like an exponential moving average of weights."""
    parts = {str(name).split(".")[0]: value for name, value in entries.items() if _holds_weights(value)}
    return [part for part in parts if "ema" in re.split("[^a-z]+", part.lower())]


def _holds_weights(value: Any) -> bool:
    """Whether `value` holds a tensor of more than one element."""
    if torch.is_tensor(value):
        return value.numel() > 1
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(_holds_weights(entry) for entry in entries)


def _check_state_dict(entries: Mapping[Any, Any], checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns `entries`; raises a `ValueError` unless all of them are plain floating-point tensors."""
    others = [f"{name} ({type(value).__name__})" for name, value in entries.items() if not torch.is_tensor(value)]
    if others:
        raise ValueError(
            f"{checkpoint} is not the state dict of a network: besides tensors it holds {', '.join(others[:4])}. The "
            "scripts save networks as model*.pt and ema_*.pt; opt*.pt is the state of an optimizer."
        )
    odd = [
        str(name)
        for name, tensor in entries.items()
        if tensor.dtype not in SAFETENSORS_DTYPES or tensor.layout != torch.strided or tensor.is_meta
    ]
    if odd:
        raise ValueError(f"{checkpoint} holds tensors that are not plain floating-point: {', '.join(odd[:4])}.")
    return {str(name): tensor.detach() for name, tensor in entries.items()}


def is_mappable(checkpoint: Path) -> bool:
    """Whether torch can map the file into memory, so that only the tensors that are used are read."""
    return zipfile.is_zipfile(checkpoint)


def check_sums(checkpoint: Path) -> None:
    """Raises a `ValueError` if the checksums of an archive, which torch does not verify, do not match its bytes."""
    if not is_mappable(checkpoint):
        return
    with zipfile.ZipFile(checkpoint) as archive:
        has_sums = any(entry.CRC for entry in archive.infolist())  # torch can be configured to write none
        damaged = archive.testzip() if has_sums else None
    if damaged is not None:
        raise ValueError(f"{checkpoint} is damaged in {damaged!r}. Download it again.")
