"""
Checkpoints of a training run: written atomically, rotated, found and loaded.

A checkpoint is a folder `checkpoint-N` (N optimizer steps) with the state of the run (`Accelerator.save_state`) and the
result that the run would have if it ended there. It is written under another name and renamed when every process has
finished and the bytes are on the disk, so an existing `checkpoint-N` is complete, whenever the run was killed.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import SAFE_MODEL_NAME, SCALER_NAME
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open


logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# Folders that are being written, replaced and deleted. None of them matches CHECKPOINT_NAME.
WRITING_PREFIX, REPLACED_PREFIX, DELETING_PREFIX = ".writing-", ".replaced-", ".deleting-"


@dataclasses.dataclass
class TrainingProgress:
    """
    Counters of a run, to be registered with `accelerator.register_for_checkpointing`.

    Args:
        global_step (`int`): Optimizer steps taken.
        micro_step (`int`): Batches that each process has consumed; the coordinate of `seed_step`.
        epoch (`int`): The current epoch, from 0.
        batch_in_epoch (`int`): Batches of that epoch that each process has consumed, and skips on resume.
    """

    global_step: int = 0
    micro_step: int = 0
    epoch: int = 0
    batch_in_epoch: int = 0

    def count_batch(self) -> None:
        """Counts a batch that each process has consumed."""
        self.micro_step += 1
        self.batch_in_epoch += 1

    def state_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if set(state_dict) != set(vars(self)):
            raise ValueError(f"The checkpoint holds the counters {sorted(state_dict)}, not {sorted(vars(self))}.")
        vars(self).update(state_dict)


def unwrap(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """
    The network inside the wrappers of `accelerator.prepare` and `torch.compile`, which rename weights and class. Its
    weights are the same tensors.
    """
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | os.PathLike,
    global_step: int,
    total_limit: int | None = None,
    save_result: Callable[[str], None] | None = None,
    save_record: Callable[[str], None] | None = None,
) -> str:
    """
    Writes `output_dir/checkpoint-<global_step>` with all that `accelerator` has prepared and registered, deletes old
    checkpoints, and returns its path. Collective.

    Args:
        output_dir (`str` or `os.PathLike`): The folder of the run, the same on every process.
        global_step (`int`): Optimizer steps taken. An existing checkpoint of that step is replaced.
        total_limit (`int`, *optional*): Number of checkpoints to keep, including the new one; at least 1. None keeps
            all. Old ones are deleted when the new one is complete, so for a while there is one more on the disk.
        save_result (function of a folder, *optional*): Writes the result that the run would have if it ended here.
            Called by the process that owns the files, while the others wait.
        save_record (function of a folder, *optional*): Writes the record of the run, likewise.
    """
    if total_limit is not None and total_limit < 1:
        raise ValueError(f"`total_limit` is {total_limit}; it must be at least 1, or None.")
    output_dir = Path(output_dir)
    path = output_dir / f"checkpoint-{global_step}"
    writing = output_dir / f"{WRITING_PREFIX}{path.name}"
    owns_files = _owns_files(accelerator)
    if owns_files:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(writing))
    for save in (save_result, save_record):
        if owns_files and save is not None:
            save(str(writing))
    accelerator.wait_for_everyone()
    if owns_files:
        _flush_to_disk(writing)
        replaced = output_dir / f"{REPLACED_PREFIX}{path.name}"
        if path.exists():
            # A folder cannot be renamed over another. After a kill between these lines, `resume_checkpoint` repairs it.
            os.rename(path, replaced)
        os.rename(writing, path)
        flush_directory(output_dir)
        shutil.rmtree(replaced, ignore_errors=True)
        if total_limit is not None:
            _rotate(output_dir, global_step, total_limit)
    accelerator.wait_for_everyone()
    return str(path)


def find_latest_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The `checkpoint-N` folder of the highest N in `output_dir`; None if there is none, or no such folder."""
    checkpoints = _list_checkpoints(Path(output_dir))
    return str(checkpoints[max(checkpoints)]) if checkpoints else None


def delete_checkpoints(output_dir: str | os.PathLike) -> None:
    """Deletes every `checkpoint-N` in `output_dir`. Call it on one process, while the others wait."""
    for path in _list_checkpoints(Path(output_dir)).values():
        _delete(path)


def find_checkpoint(output_dir: str | os.PathLike, resume_from_checkpoint: str) -> Path | None:
    """
    Finds a checkpoint: "latest" (the newest in `output_dir`), a path, or the name of one in `output_dir`.

    Returns:
        `Path`: Its folder; None for "latest" if there is none. If the run was killed while it replaced that checkpoint,
        the folder has another name until `resume_checkpoint` repairs it.

    Raises:
        ValueError: If the checkpoint does not exist, is incomplete, or has a damaged file.
    """
    output_dir = Path(output_dir)
    checkpoints = _list_checkpoints(output_dir, REPLACED_PREFIX) | _list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        if not checkpoints:
            return None
        path = checkpoints[max(checkpoints)]
    else:
        path = Path(resume_from_checkpoint)
        if not path.is_dir():
            path = checkpoints.get(_step(resume_from_checkpoint), output_dir / resume_from_checkpoint)
    others = [step for step in sorted(checkpoints) if step != _step(path.name.removeprefix(REPLACED_PREFIX))]
    fault = None
    if not path.is_dir():
        fault = "which is neither a folder nor a checkpoint there"
    elif path.name.startswith(WRITING_PREFIX) or _count_writers(path) == 0:
        fault = f"but {path} is not a complete checkpoint"
    elif damaged := [file for file in sorted(path.rglob("*")) if file.is_file() and _is_damaged(file)]:
        size = f"{damaged[0].stat().st_size:,} bytes"
        fault = f"but {damaged[0]} ({size}) is damaged. If the checkpoint was copied, copy it again"
    if fault is not None:
        found = ", ".join(f"checkpoint-{step}" for step in others) or "none"
        raise ValueError(
            f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, {fault}. Others found in {output_dir}: {found}."
        )
    return path


def _is_damaged(file: Path) -> bool:
    """Whether a file of a checkpoint was cut short or emptied, by the structure of its format."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # compares the size of the file with that of its tensors
                return False
        if file.suffix == ".json":
            json.loads(file.read_bytes())
    except (SafetensorError, ValueError):  # ValueError also for bytes that are not text
        return True
    if file.suffix in (".bin", ".pkl", ".pt"):
        return not zipfile.is_zipfile(file)  # `torch.save` writes zip files, whose directory is at the end
    return file.suffix == ".yaml" and file.stat().st_size == 0


def resume_checkpoint(
    accelerator: Accelerator,
    output_dir: str | os.PathLike,
    resume_from_checkpoint: str | None,
    ema: EMAModel | None = None,
    load_average: Callable[[str], bool] | None = None,
    not_restored: Collection[Any] = (),
) -> str | None:
    """
    Removes half-written folders of an interrupted run from `output_dir`, then loads a checkpoint into everything that
    `accelerator` has prepared and registered. Collective.

    Args:
        resume_from_checkpoint (`str`, *optional*): As for `find_checkpoint`; None loads nothing.
        ema (`EMAModel`, *optional*): The average, which is not registered. It is read by `load_average`, or, from a
            checkpoint of an earlier version, from the objects that were registered there.
        load_average (function of a folder, *optional*): Reads the average of a checkpoint into `ema`, and returns
            whether it was there. It may overwrite the trained weights, which are loaded afterwards.
        not_restored (collection, *optional*): Registered objects that keep their state.

    Returns:
        `str` or `None`: The path of the loaded checkpoint; None for a new run.

    Raises:
        ValueError: As `find_checkpoint`; or if the checkpoint belongs to another network, or has no average.
    """
    output_dir = Path(output_dir)
    if _owns_files(accelerator):
        _clean_up(output_dir)
    accelerator.wait_for_everyone()
    if resume_from_checkpoint is None:
        return None
    path = find_checkpoint(output_dir, resume_from_checkpoint)
    if path is None:
        logger.warning("There is no checkpoint in %s to resume from: starting a new run.", output_dir)
        return None
    writers = _count_writers(path)
    if writers != accelerator.num_processes and not accelerator.project_configuration.save_on_each_node:
        logger.warning(
            "%s was written by %d processes and is resumed by %d: training goes on, but the order of the data and the "
            "noise differ from those of an unbroken run.",
            path,
            writers,
            accelerator.num_processes,
        )
    _check_shapes(accelerator, path)
    registered = [] if ema is None or (load_average and load_average(str(path))) else [ema]
    with _restorable(accelerator, path, registered, not_restored):
        accelerator.load_state(str(path))
    later = [f"checkpoint-{step}" for step in sorted(_list_checkpoints(output_dir)) if step > _step(path.name)]
    if later and path.parent == output_dir:
        logger.warning(
            "Resumed from %s although %s exist. 'latest' would pick the highest step; move them away if that run is "
            "abandoned.",
            path,
            ", ".join(later),
        )
    return str(path)


def _count_writers(checkpoint: Path) -> int:
    """Number of processes that wrote it: each leaves the state of its generators."""
    return len(list(checkpoint.glob("random_states_*.pkl")))


def _check_shapes(accelerator: Accelerator, path: Path) -> None:
    """Raises a `ValueError` of one sentence for weights of another network; torch would list all of them."""
    for index, model in enumerate(accelerator._models):
        file = path / f"{SAFE_MODEL_NAME}{f'_{index}' if index else ''}.safetensors"
        if not file.is_file():  # an adapter, which its own hook reads and checks
            continue
        state = unwrap(accelerator, model).state_dict()
        expected = {name: tuple(value.shape) for name, value in state.items()}
        with safe_open(file, "pt") as saved:
            shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
        # Weights with two names are saved under one of them.
        pointers = {state[name].data_ptr() for name in shapes if name in state}
        differing = [name for name in shapes if shapes[name] != expected.get(name)]
        differing += [name for name in state if name not in shapes and state[name].data_ptr() not in pointers]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{path} holds the weights of another network: {len(differing)} of {len(expected)} tensors differ, "
                f"such as {name!r}, of shape {shapes.get(name, 'none')} there and {expected.get(name, 'none')} here. "
                "Resume it with the same config, classes and adapter, or start a new run."
            )


@contextmanager
def _restorable(
    accelerator: Accelerator, path: Path, registered: Collection[Any], not_restored: Collection[Any]
) -> Iterator[None]:
    """Restricts `accelerator` to the objects that the checkpoint holds, for the duration of a `with` block."""
    objects, scaler = accelerator._custom_objects, accelerator.scaler
    ignored = [_Ignored() if any(obj is other for other in not_restored) else obj for obj in objects]
    saved = len(list(path.glob("custom_checkpoint_*.pkl")))
    if saved != len([*ignored, *registered]):
        raise ValueError(
            f"{path} holds the state of {saved} objects besides the networks, but this run has {len(ignored)}"
            + (", and an average of the weights (`use_ema`)" if registered else "")
            + ". Resume it with the script and the `use_ema` that it was written with."
        )
    accelerator._custom_objects = [*ignored, *registered]
    if scaler is not None and not (path / SCALER_NAME).is_file():
        accelerator.scaler = None  # the run was not in fp16 so far: the scaler starts as a new one
    try:
        yield
    finally:
        accelerator._custom_objects, accelerator.scaler = objects, scaler


class _Ignored:
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _owns_files(accelerator: Accelerator) -> bool:
    """Whether this process renames and deletes folders: one per file system."""
    if accelerator.project_configuration.save_on_each_node:
        return accelerator.is_local_main_process
    return accelerator.is_main_process


def _step(name: str) -> int:
    match = CHECKPOINT_NAME.fullmatch(name)
    return int(match.group(1)) if match else -1


def _list_checkpoints(output_dir: Path, prefix: str = "") -> dict[int, Path]:
    if not output_dir.is_dir():
        return {}
    steps = {entry: _step(entry.name.removeprefix(prefix)) for entry in output_dir.iterdir() if entry.is_dir()}
    return {step: entry for entry, step in steps.items() if step >= 0 and entry.name.startswith(prefix)}


def _rotate(output_dir: Path, global_step: int, total_limit: int) -> None:
    # Steps beyond the new one belong to a run that was abandoned for an earlier checkpoint, and are deleted first.
    by_value = sorted(_list_checkpoints(output_dir), key=lambda step: -step if step > global_step else step)
    for step in by_value[: max(0, len(by_value) - total_limit)]:
        path = output_dir / f"checkpoint-{step}"
        _delete(path)
        logger.info("Deleted %s (checkpoints_total_limit is %d).", path, total_limit)


def _delete(checkpoint: Path) -> None:
    # Renamed first: a half-deleted checkpoint must not look like a whole one.
    deleting = checkpoint.with_name(f"{DELETING_PREFIX}{checkpoint.name}")
    shutil.rmtree(deleting, ignore_errors=True)
    os.rename(checkpoint, deleting)
    shutil.rmtree(deleting)


def _clean_up(output_dir: Path) -> None:
    if not output_dir.is_dir():
        return
    for entry in list(output_dir.iterdir()):
        if entry.name.startswith(REPLACED_PREFIX):
            original = output_dir / entry.name.removeprefix(REPLACED_PREFIX)
            if not original.exists():
                os.rename(entry, original)
                continue
        if entry.name.startswith((WRITING_PREFIX, REPLACED_PREFIX, DELETING_PREFIX)):
            logger.warning("Deleting %s, which an interrupted run left behind.", entry)
            shutil.rmtree(entry)


def _flush_to_disk(folder: Path) -> None:
    """Writes the contents to the disk: a machine that loses power could keep the rename only."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        flush_directory(root)


def flush_directory(folder: str | os.PathLike) -> None:
    """Writes the entries of a folder to the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rest_of_epoch(dataloader: DataLoaderShard, progress: TrainingProgress) -> DataLoaderShard:
    """
    The remaining batches of the current epoch of a prepared dataloader, or all of the next one. Its `set_epoch` reaches
    the dataset, whose shuffling, crops and flips depend on it.
    """
    if progress.batch_in_epoch >= len(dataloader):  # also when resumed with larger batches
        progress.epoch, progress.batch_in_epoch = progress.epoch + 1, 0
    if progress.batch_in_epoch:
        dataloader = skip_first_batches(dataloader, progress.batch_in_epoch)
    dataloader.set_epoch(progress.epoch)
    return dataloader
