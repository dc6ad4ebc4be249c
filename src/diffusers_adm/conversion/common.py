"""
What conversions of all code bases share: reading their files, and writing folders that `from_pretrained` loads.

A file is mapped into memory and its tensors are written one by one: a model of two gigabytes needs little memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import pickle
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.repositories import check_can_be_written


logger = logging.getLogger(__name__)

# Next to the components: what a file was converted from, so that it can be written back in the same order.
RECORD_NAME = "openai_checkpoint.json"
# First bytes of the archives that `torch.save` has written since version 1.6, which can be mapped into memory.
ZIP_MAGIC = b"PK\x03\x04"
SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# How much of a checkpoint may lie in memory while it is converted.
MAPPED_BYTES = 2**27
# A tensor that U-Nets, upsamplers and classifiers of all these code bases have, and nothing else.
FIRST_TENSOR = "input_blocks.0.0.weight"
# How deep dictionaries in a checkpoint may lie in each other.
MAX_DEPTH = 8


class TensorRule(NamedTuple):
    """One tensor of the checkpoint, and the one, two or three of ours that it holds."""

    source: str
    targets: tuple[str, ...]
    split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]  # theirs -> ours
    join: Callable[..., torch.Tensor]  # ours -> theirs


class LoadedCheckpoint(NamedTuple):
    """A network of a checkpoint."""

    state_dict: dict[str, torch.Tensor]
    key: str  # where it lay: keys of dictionaries and parts of prefixes, joined by dots; "" for the file itself
    left_aside: list[str]  # what else the file holds


class _Place(NamedTuple):
    """Where a network lies in a checkpoint: keys of dictionaries, and a prefix of all names."""

    path: tuple[str, ...]
    prefix: str

    @property
    def key(self) -> str:
        return ".".join([*self.path, *self.prefix.split(".")[:-1]])


def check_output_dir(output_dir: Path) -> None:
    """Raises a `ValueError` if a folder cannot be put there."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` {output_dir} exists and is not empty. Name another folder, or remove it.")
    check_can_be_written("output_dir", output_dir.parent)  # where it is made first, under another name


@contextlib.contextmanager
def new_folder(output_dir: Path) -> Iterator[Path]:
    """A folder next to `output_dir`, which takes its place once all is written, and is deleted if that fails."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output_dir.parent / f".{output_dir.name}.{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.replace(output_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """What the folder was converted from."""
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_weights(file: Path, checkpoint: Path, key: str, rules: list[TensorRule]) -> None:
    """
    Writes the tensors that `rules` make of a checkpoint's network `key`, in the format of safetensors
    (https://github.com/huggingface/safetensors#format). Its own writer wants all tensors at once, and every page read
    stays in memory as long as the checkpoint is mapped: here the mapping is made anew after each `MAPPED_BYTES`.
    """
    state_dict = load_checkpoint(checkpoint, key).state_dict
    # The widest numbers first, so that each tensor begins at a multiple of its numbers' size.
    rules = sorted(rules, key=lambda rule: -state_dict[rule.source].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for rule in rules:
        for name, tensor in zip(rule.targets, rule.split(state_dict[rule.source].to("meta")), strict=True):
            start, end = end, end + tensor.nbytes
            dtype = SAFETENSORS_DTYPES[tensor.dtype]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        mapped = 0
        for rule in rules:
            if mapped > MAPPED_BYTES and _is_mappable(checkpoint):
                del state_dict
                state_dict, mapped = load_checkpoint(checkpoint, key).state_dict, 0
            source = state_dict[rule.source]
            mapped += source.nbytes
            for tensor in rule.split(source):
                stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def load_checkpoint(checkpoint: Path, key: str | None = None) -> LoadedCheckpoint:
    r"""
    Reads the network of a `.pt` file, mapped into memory where its format allows that. Runs no code that it may hold.

    Training loops wrap networks: in a dictionary with an optimizer, in a module whose name becomes a prefix of all
    others (`module.`, `model.`, `_orig_mod.`), or in both. That is taken off where it leads to one network.

    Args:
        checkpoint (`Path`): The file.
        key (`str`, *optional*): Which network, where there are several: as in [`LoadedCheckpoint`], or the beginning.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, holds no network, or several, and `key` names none of them.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"`checkpoint` {checkpoint} is not a file.")
    unreadable = (
        f"{checkpoint} ({checkpoint.stat().st_size:,} bytes) cannot be read as a file of `torch.save` that holds "
        "only tensors. It may be damaged, cut short, or something else."
    )
    try:
        # The arguments of a script: they hold what can be read without them, and making them runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=_is_mappable(checkpoint))
    except pickle.UnpicklingError as error:  # whose words recommend to execute the file
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if found is not None:
            unreadable += (
                f" It names an object of {found[1]}: reading that could run code. If you trust the file, save "
                "only the state dict of the network."
            )
        raise ValueError(unreadable) from None
    except Exception as error:  # whatever the bytes of another file lead to
        raise ValueError(unreadable) from error
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{checkpoint} holds a {type(content).__name__}, not a state dict: names with tensors.")

    places = list(_places(content))
    if not places:
        return LoadedCheckpoint(_tensors(content, checkpoint), "", [])
    place = _choose(places, key, checkpoint)
    entries, beside = content, []
    for part in place.path:
        beside.append({name: value for name, value in entries.items() if name != part})
        entries = entries[part]
    inner = [other.prefix for other in places if other.path == place.path and len(other.prefix) > len(place.prefix)]
    own = {
        name: value
        for name, value in entries.items()
        if str(name).startswith(place.prefix) and not str(name).startswith(tuple(inner))
    }
    beside.append({name: value for name, value in entries.items() if name not in own})
    state_dict = _tensors({str(name)[len(place.prefix) :]: value for name, value in own.items()}, checkpoint)
    if key is None:
        averages = [name for others in beside for name in _averages(others)]
        if averages:
            raise ValueError(
                f"{checkpoint} holds a network as '{place.key}', and averaged weights as '{averages[0]}', in a form "
                f"that cannot be read. Pass `key='{place.key}'` (on the command line `--key {place.key}`) to convert "
                "the former, or save the state dict of the latter."
            )
    return LoadedCheckpoint(state_dict, place.key, [line for others in beside for line in _describe(others)])


def report_unwrapping(checkpoint: Path, loaded: LoadedCheckpoint) -> None:
    """Logs what was taken off and what was left aside, if anything was."""
    if loaded.key or loaded.left_aside:
        others = f"; left aside: {', '.join(loaded.left_aside)}" if loaded.left_aside else ""
        logger.warning("%s: took the network from '%s'%s.", checkpoint.name, loaded.key, others)


def _places(entries: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Iterator[_Place]:
    """Where a network lies, by a tensor that each has."""
    for name, value in entries.items():
        if not isinstance(name, str):
            continue
        if torch.is_tensor(value):
            prefix = name.removesuffix(FIRST_TENSOR)
            if prefix != name and (not prefix or prefix.endswith(".")):
                yield _Place(path, prefix)
        elif isinstance(value, Mapping) and len(path) < MAX_DEPTH:
            yield from _places(value, (*path, name))


def _choose(places: Sequence[_Place], key: str | None, checkpoint: Path) -> _Place:
    """The place that `key` names, or the only one."""
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
    """What a file holds besides a network, briefly: tensors by the first part of their names."""
    others = [f"{name} ({type(value).__name__})" for name, value in entries.items() if not torch.is_tensor(value)]
    names: dict[str, list[str]] = {}
    for name, value in entries.items():
        if torch.is_tensor(value):
            names.setdefault(str(name).split(".")[0], []).append(str(name))
    tensors = [own[0] if len(own) == 1 else f"{first}.* ({len(own)} tensors)" for first, own in names.items()]
    return others + tensors


def _averages(entries: Mapping[Any, Any]) -> list[str]:
    """Names of averaged weights among what a file holds besides a network."""
    parts = {name: str(name).split(".")[0] for name in entries}
    return [
        part
        for name, part in parts.items()
        if "ema" in re.split("[^a-z]+", part.lower()) and _holds_weights(entries[name])
    ]


def _holds_weights(value: Any) -> bool:
    """Whether there is a tensor of more than one number."""
    if torch.is_tensor(value):
        return value.numel() > 1
    if isinstance(value, Mapping):
        return any(_holds_weights(entry) for entry in value.values())
    return isinstance(value, (list, tuple)) and any(_holds_weights(entry) for entry in value)


def _tensors(entries: Mapping[Any, Any], checkpoint: Path) -> dict[str, torch.Tensor]:
    """`entries`, which must be a state dict."""
    others = {str(name): type(value).__name__ for name, value in entries.items() if not torch.is_tensor(value)}
    if others:
        names = ", ".join(f"{name} ({kind})" for name, kind in list(others.items())[:4])
        raise ValueError(
            f"{checkpoint} is not the state dict of a network: besides tensors it holds {names}. The scripts save "
            "networks as model*.pt and ema_*.pt; opt*.pt is the state of an optimizer."
        )
    odd = [
        str(name)
        for name, tensor in entries.items()
        if tensor.dtype not in SAFETENSORS_DTYPES or tensor.layout != torch.strided or tensor.is_meta
    ]
    if odd:
        raise ValueError(f"{checkpoint} holds tensors that are no plain floating-point numbers: {', '.join(odd[:4])}.")
    return {str(name): tensor.detach() for name, tensor in entries.items()}


def dtypes_of(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the kinds of numbers that there are, without `torch.`."""
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()})


def _is_mappable(checkpoint: Path) -> bool:
    with open(checkpoint, "rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def check_sums(checkpoint: Path) -> None:
    """Raises a `ValueError` if bytes of an archive have changed since it was written, at which torch does not look."""
    if not _is_mappable(checkpoint):
        return
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            for entry in archive.infolist():
                if entry.CRC != 0:  # torch can be told to write no checksums
                    with archive.open(entry) as stream:
                        while stream.read(2**20):
                            pass
    except zipfile.BadZipFile as error:
        raise ValueError(f"{checkpoint} is damaged: {error}. Fetch it anew.") from error
