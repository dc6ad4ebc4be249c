"""
What conversions of all code bases share: reading their files, and writing folders that `from_pretrained` loads.

A file is mapped into memory and its tensors are written one by one: a model of two gigabytes needs little memory.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


# Beside the components: what a file was converted from, so that it can be written back in the same order.
RECORD_NAME = "openai_checkpoint.json"
# First bytes of the archives that `torch.save` has written since version 1.6, which can be mapped into memory.
ZIP_MAGIC = b"PK\x03\x04"
SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# How much of a checkpoint may lie in memory while it is converted.
MAPPED_BYTES = 2**27


class TensorRule(NamedTuple):
    """One tensor of the checkpoint, and the one, two or three of ours that it holds."""

    source: str
    targets: tuple[str, ...]
    split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]  # theirs -> ours
    join: Callable[..., torch.Tensor]  # ours -> theirs


def check_output_dir(output_dir: Path) -> None:
    """Raises a `ValueError` if a folder cannot be put there."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` {output_dir} exists and is not empty. Name another folder, or remove it.")


@contextlib.contextmanager
def new_folder(output_dir: Path) -> Iterator[Path]:
    """A folder beside `output_dir`, which takes its place once all is written, and vanishes if that fails."""
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


def write_weights(file: Path, checkpoint: Path, rules: list[TensorRule]) -> None:
    """
    Writes the tensors that `rules` make of a checkpoint, in the format of safetensors
    (https://github.com/huggingface/safetensors#format). Its own writer wants all tensors at once, and every page read
    stays in memory as long as the checkpoint is mapped: here the mapping is made anew after each `MAPPED_BYTES`.
    """
    state_dict = load_state_dict(checkpoint)
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
                state_dict, mapped = load_state_dict(checkpoint), 0
            source = state_dict[rule.source]
            mapped += source.nbytes
            for tensor in rule.split(source):
                stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def load_state_dict(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pt` file, mapped into memory where its format allows that. Runs no code that it may hold."""
    if not checkpoint.is_file():
        raise FileNotFoundError(f"`checkpoint` {checkpoint} is not a file.")
    unreadable = (
        f"{checkpoint} ({checkpoint.stat().st_size:,} bytes) cannot be read as a file of `torch.save` that holds "
        "tensors alone. It may be damaged, cut short, or something else."
    )
    try:
        state_dict = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=_is_mappable(checkpoint))
    except pickle.UnpicklingError:  # whose words recommend to execute the file
        raise ValueError(unreadable) from None
    except Exception as error:  # whatever the bytes of another file lead to
        raise ValueError(unreadable) from error
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ValueError(f"{checkpoint} holds a {type(state_dict).__name__}, not a state dict: names with tensors.")
    others = {str(name): type(value).__name__ for name, value in state_dict.items() if not torch.is_tensor(value)}
    if others:
        names = ", ".join(f"{name} ({kind})" for name, kind in list(others.items())[:4])
        raise ValueError(
            f"{checkpoint} is not the state dict of a network: beside tensors it holds {names}. The scripts save "
            "networks as model*.pt and ema_*.pt; opt*.pt is the state of an optimizer."
        )
    odd = [
        str(name)
        for name, tensor in state_dict.items()
        if tensor.dtype not in SAFETENSORS_DTYPES or tensor.layout != torch.strided or tensor.is_meta
    ]
    if odd:
        raise ValueError(f"{checkpoint} holds tensors that are no plain floating-point numbers: {', '.join(odd[:4])}.")
    return {str(name): tensor.detach() for name, tensor in state_dict.items()}


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
