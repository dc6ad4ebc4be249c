"""
Checkpoints of a training run: written atomically, rotated, found and loaded.

A checkpoint is a folder `checkpoint-N` (N optimizer steps) with the state of the run and the result that the run would
have if it ended there. It is written under another name and renamed when every process has finished and the bytes are
on the disk, so an existing `checkpoint-N` is complete, whenever the run was killed. Its manifest (`manifest.py`) shows
whether it was damaged later.

Accelerate's `save_state` and `load_state` are not used: they pickle optimizers and registered objects, and unpickle the
latter without restriction. The files are those of `run_state.py`; weights, and the hooks that replace them, are as
Accelerate has them.
"""

import dataclasses
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import (
    OPTIMIZER_NAME,
    RNG_STATE_NAME,
    SAFE_MODEL_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
    gather_object,
)
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_model, save_model

from ..commands.errors import CommandError
from ..data.streaming import StreamDataset
from .disk import as_disk_error
from .manifest import MANIFEST_NAME, find_damage, write_manifest
from .run_state import (
    find_unsafe_pickle,
    random_states,
    read_pickle,
    read_state,
    restore_random_states,
    write_state,
)
from .sharding import (
    WEIGHTS_NAME,
    check_engine,
    is_sharded,
    load_networks,
    local_tensors,
    networks_apart,
    save_networks,
)


logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# Folders that are being written, replaced and deleted. None of them matches CHECKPOINT_NAME.
WRITING_PREFIX, REPLACED_PREFIX, DELETING_PREFIX = ".writing-", ".replaced-", ".deleting-"
# Of the trained weights in a checkpoint, see `checkpoint_weights_apart`.
TRAINED_FOLDER = "trained"
# Of the state of optimizers and registered objects in a checkpoint.
STATE_NAME = "run_state"


@dataclasses.dataclass
class TrainingProgress:
    """
    Counters of a run, to be registered with `accelerator.register_for_checkpointing`.

    Args:
        global_step (`int`): Optimizer steps taken.
        micro_step (`int`): Batches that each process has consumed; the coordinate of `seed_step`.
        epoch (`int`): The current epoch, from 0.
        batch_in_epoch (`int`): Batches of that epoch that each process has consumed, and skips on resume.
        skipped_steps (`int`): Optimizer steps of `global_step` that were not taken, see `step_guard.py`.
    """

    global_step: int = 0
    micro_step: int = 0
    epoch: int = 0
    batch_in_epoch: int = 0
    skipped_steps: int = 0

    def count_batch(self) -> None:
        """Counts a batch that each process has consumed."""
        self.micro_step += 1
        self.batch_in_epoch += 1

    def state_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restores the counters. Those that an earlier version did not have start at their defaults."""
        unknown = sorted(set(state_dict) - set(vars(self)))
        if unknown:
            raise ValueError(
                f"The checkpoint holds the counters {unknown}, which this version of diffusers-adm does not have. "
                "Resume it with the version that wrote it."
            )
        vars(self).update(dataclasses.asdict(TrainingProgress()) | state_dict)


def unwrap(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """
    The network inside the wrappers of `accelerator.prepare` and `torch.compile`, which rename weights and class. Its
    weights are the same tensors.
    """
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def checkpoint_weights_apart(accelerator: Accelerator) -> None:
    """
    Makes `save_checkpoint` write the trained weights into a folder of their own in the checkpoint, and
    `resume_checkpoint` read them there. For a result in the root of a checkpoint that is a model of transformers: its
    averaged weights are in a file of the name that Accelerate uses.
    """

    def save(models: list[torch.nn.Module], weights: list, folder: str) -> None:
        weights.clear()  # or they would be written twice
        if _owns_files(accelerator):
            Path(folder, TRAINED_FOLDER).mkdir()
            for index, model in enumerate(models):
                save_model(unwrap(accelerator, model), str(_trained_file(Path(folder), index)))

    def load(models: list[torch.nn.Module], folder: str) -> None:
        while models:  # those that are left would be read from the root
            model = models.pop()
            load_model(unwrap(accelerator, model), _trained_file(Path(folder), len(models)))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _trained_file(checkpoint: Path, index: int) -> Path:
    return checkpoint / TRAINED_FOLDER / _weights_name(index)


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
            Called by the process that owns the files, while the others wait; or by all, if the run is sharded.
        save_record (function of a folder, *optional*): Writes the record of the run, likewise.

    Raises:
        CommandError: If the disk is full, or another process has failed. Any error is raised on every process, so that
            none waits for the others. The half-written folder is deleted, and earlier checkpoints stay.
    """
    if total_limit is not None and total_limit < 1:
        raise ValueError(f"`total_limit` is {total_limit}; it must be at least 1, or None.")
    output_dir = Path(output_dir)
    path = output_dir / f"checkpoint-{global_step}"
    writing = output_dir / f"{WRITING_PREFIX}{path.name}"
    owns_files = _owns_files(accelerator)

    def prepare() -> None:
        if owns_files:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)

    def write() -> None:
        with networks_apart(accelerator):
            _save_state(accelerator, writing)

    def write_networks() -> None:
        save_networks(accelerator, writing)

    def write_result() -> None:
        if save_result is not None and (owns_files or is_sharded(accelerator)):
            save_result(str(writing))

    def write_record() -> None:
        if save_record is not None and (owns_files or is_sharded(accelerator)):
            save_record(str(writing))

    def complete() -> None:
        if not owns_files:
            return
        flush_to_disk(writing)
        write_manifest(writing)
        flush_directory(writing)
        replaced = output_dir / f"{REPLACED_PREFIX}{path.name}"
        if path.exists():
            # A folder cannot be renamed over another. After a kill between these lines, `resume_checkpoint` repairs it.
            os.rename(path, replaced)
        os.rename(writing, path)
        flush_directory(output_dir)
        shutil.rmtree(replaced, ignore_errors=True)
        if total_limit is not None:
            _rotate(output_dir, global_step, total_limit)

    # What is split over processes is gathered at the beginning of a phase, and written afterwards: when one process
    # cannot write, the others do not wait for it in the next gathering.
    for phase in (prepare, write, write_networks, write_result, write_record, complete):
        error: Exception | None = None
        try:
            phase()
        except Exception as caught:
            error = caught
        _fail_together(accelerator, error, writing)
    return str(path)


def _fail_together(accelerator: Accelerator, error: Exception | None, writing: Path) -> None:
    """
    Waits for all processes. If one of them has failed to write `writing`, deletes it and raises the error there, and
    one with its message on the others, which would wait for it otherwise.
    """
    messages = [None if error is None else f"{type(error).__name__}: {error}"]
    if accelerator.num_processes > 1:
        messages = gather_object(messages)
    failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if not failed:
        return
    if _owns_files(accelerator):
        shutil.rmtree(writing, ignore_errors=True)
    if error is None:
        rank, message = failed[0]
        raise CommandError(f"Process {rank} could not write its part of {writing}: {message}", exit_code=1)
    name = writing.name.removeprefix(WRITING_PREFIX)
    latest = find_latest_checkpoint(writing.parent)
    kept = "There are no earlier checkpoints." if latest is None else f"{Path(latest).name} is the newest checkpoint."
    raise as_disk_error(error, writing.parent, f"{name} could not be written", kept)


def _save_state(accelerator: Accelerator, folder: Path) -> None:
    """Writes weights, optimizers, scaler, registered objects and generators. Collective."""
    weights = [accelerator.get_state_dict(model, unwrap=False) for model in accelerator._models]
    for hook in accelerator._save_model_state_pre_hook.values():
        hook(accelerator._models, weights, str(folder))
    for index, tensors in enumerate(weights):
        accelerator.save(tensors, folder / _weights_name(index), safe_serialization=True)
    state = {
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in accelerator._optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in accelerator._schedulers],
        "objects": [obj.state_dict() for obj in accelerator._custom_objects],
    }
    if _owns_files(accelerator):
        write_state(folder, STATE_NAME, state)
    write_state(folder, f"{RNG_STATE_NAME}_{accelerator.process_index}", random_states(accelerator.device))


def _read_saved_state(path: Path) -> dict[str, Any]:
    """What `_save_state` wrote, without weights and generators; from the pickles of an earlier version likewise."""
    if (path / f"{STATE_NAME}.json").is_file():
        return read_state(path, STATE_NAME)

    def read_all(name: str, suffix: str) -> list[Any]:
        files = [path / f"{name}{f'_{index}' if index else ''}.{suffix}" for index in range(len(os.listdir(path)))]
        return [read_pickle(file) for file in files if file.is_file()]

    objects = (path / f"custom_checkpoint_{index}.pkl" for index in range(len(os.listdir(path))))
    return {
        "scaler": read_pickle(path / SCALER_NAME) if (path / SCALER_NAME).is_file() else None,
        "optimizers": read_all(OPTIMIZER_NAME, "bin"),
        "schedulers": read_all(SCHEDULER_NAME, "bin"),
        "objects": [read_pickle(file) for file in objects if file.is_file()],
    }


def _weights_name(index: int) -> str:
    return f"{SAFE_MODEL_NAME}{f'_{index}' if index else ''}.safetensors"


def find_latest_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The `checkpoint-N` folder of the highest N in `output_dir`; None if there is none, or no such folder."""
    checkpoints = _list_checkpoints(Path(output_dir))
    return str(checkpoints[max(checkpoints)]) if checkpoints else None


def delete_checkpoints(output_dir: str | os.PathLike) -> None:
    """
    Deletes every `checkpoint-N` in `output_dir`, also one that a killed run was replacing. Call it on one process,
    while the others wait.
    """
    for prefix in ("", REPLACED_PREFIX):
        for path in _list_checkpoints(Path(output_dir), prefix).values():
            _delete(path)


def find_checkpoint(output_dir: str | os.PathLike, resume_from_checkpoint: str) -> Path | None:
    """
    Finds a checkpoint: "latest" (the newest sound one in `output_dir`), a path, or the name of one in `output_dir`. A
    damaged checkpoint that "latest" skips is named in a warning.

    Every process calls it before the processes join, and each looks at all files by itself: sizes, structure and
    hashes. So they decide alike, without waiting for each other. The bytes are read once more than needed, but by
    all processes of a machine at the same time, as they are when they load the checkpoint afterwards, which finds the
    files in memory. `resume_checkpoint` compares the decisions and does not hash again.

    Returns:
        `Path`: Its folder; None for "latest" if there is none. If the run was killed while it replaced that checkpoint,
        the folder has another name until `resume_checkpoint` repairs it.

    Raises:
        ValueError: If the checkpoint does not exist, is incomplete, or has a damaged file; for "latest" if that holds
            for all of them. Also for a file that could run code when it is read.
    """
    output_dir = Path(output_dir)
    checkpoints = _list_checkpoints(output_dir, REPLACED_PREFIX) | _list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        faults = []
        for step in sorted(checkpoints, reverse=True):
            fault = _find_fault(checkpoints[step])
            if fault is None:
                for skipped in faults:
                    _warn_once(
                        f"CHECKPOINT DAMAGED: {skipped}. It is skipped: the run goes on from checkpoint-{step}, the "
                        "newest sound checkpoint before it, and repeats the steps since then."
                    )
                return checkpoints[step]
            faults.append(fault)
        if not faults:
            return None
        raise ValueError(
            f"`resume_from_checkpoint` is 'latest', but no checkpoint in {output_dir} is sound: {'; '.join(faults)}. "
            "If they were copied, copy them again; otherwise start a new run with `--overwrite_output_dir`."
        )
    path, fault = Path(resume_from_checkpoint), None
    if not path.is_dir():
        path = checkpoints.get(_step(resume_from_checkpoint), output_dir / resume_from_checkpoint)
    if not path.is_dir():
        fault = "which is neither a folder nor a checkpoint there"
    elif fault := _find_fault(path):
        fault = f"but {fault}. If the checkpoint was copied, copy it again"
    if fault is not None:
        own = _step(path.name.removeprefix(REPLACED_PREFIX))
        others = [step for step in sorted(checkpoints) if step != own and _find_fault(checkpoints[step], False) is None]
        found = ", ".join(f"checkpoint-{step}" for step in others) or "none"
        raise ValueError(
            f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, {fault}. Others found in {output_dir}: {found}."
        )
    return path


# What was found out about checkpoints, by their files with sizes and times of change: hashing may take minutes.
_faults: dict[tuple[Any, ...], str | None] = {}
_warned: set[str] = set()


def _find_fault(checkpoint: Path, hashes: bool = True) -> str | None:
    """
    The fault of a checkpoint in words, None for a sound one. Raises a `ValueError` for a file that could run code when
    it is read: that is no accident.
    """
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = (hashes, *stats)
    if key not in _faults:
        if (checkpoint / f"{STATE_NAME}.json").is_file() and not (checkpoint / MANIFEST_NAME).is_file():
            fault: str | None = f"{checkpoint / MANIFEST_NAME} is missing"
        else:
            fault = find_damage(checkpoint, hashes)
        if fault is None and (checkpoint.name.startswith(WRITING_PREFIX) or count_writers(checkpoint) == 0):
            fault = f"{checkpoint} is not a complete checkpoint"
        if fault is None and (unsafe := find_unsafe_pickle(checkpoint)):
            raise ValueError(
                f"{unsafe} holds more than tensors and plain values: reading it could run code. {checkpoint} is not "
                "resumed. diffusers-adm does not write such files, so do not trust the source of this checkpoint."
            )
        _faults[key] = fault
    return _faults[key]


def _warn_once(message: str) -> None:
    # Before the processes have joined, logging does not know that only the main process warns.
    if message not in _warned and int(os.environ.get("RANK", 0)) == 0:
        logger.warning(message)
        _warned.add(message)


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
    paths = gather_object([path]) if accelerator.num_processes > 1 else [path]
    other = next((rank for rank, found in enumerate(paths) if found != paths[0]), None)
    if other is not None and not accelerator.project_configuration.save_on_each_node:
        raise ValueError(  # on all processes: none waits for the others
            f"Process {other} has found {paths[other]} to resume, but the main process {paths[0]}. Do all of them see "
            "the same file system? Name the checkpoint instead of 'latest'."
        )
    if path is None:
        logger.warning("There is no checkpoint in %s to resume from: starting a new run.", output_dir)
        return None
    writers = count_writers(path)
    if writers != accelerator.num_processes and not accelerator.project_configuration.save_on_each_node:
        logger.warning(
            "%s was written by %d processes and is resumed by %d: training goes on, but the noise differs from that of "
            "an unbroken run.",
            path,
            writers,
            accelerator.num_processes,
        )
    check_engine(accelerator, path)
    _check_shapes(accelerator, path)
    registered = [] if ema is None or (load_average and load_average(str(path))) else [ema]
    with networks_apart(accelerator):
        _load_state(accelerator, path, registered, not_restored)
    load_networks(accelerator, path)
    later = [f"checkpoint-{step}" for step in sorted(_list_checkpoints(output_dir)) if step > _step(path.name)]
    if later and path.parent == output_dir and resume_from_checkpoint != "latest":
        logger.warning(
            "Resumed from %s although %s exist. 'latest' would pick the highest step; move them away if that run is "
            "abandoned.",
            path,
            ", ".join(later),
        )
    return str(path)


def count_writers(checkpoint: Path) -> int:
    """Number of processes that wrote it: each leaves the state of its generators."""
    files = [*checkpoint.glob(f"{RNG_STATE_NAME}_*.json"), *checkpoint.glob(f"{RNG_STATE_NAME}_*.pkl")]
    return len({file.stem for file in files})


def _check_shapes(accelerator: Accelerator, path: Path) -> None:
    """Raises a `ValueError` of one sentence for weights of another network; torch would list all of them."""
    for index, model in enumerate(accelerator._models):
        file = _trained_file(path, index)
        if not file.is_file():
            file = path / file.name
        if is_sharded(accelerator):
            file = path / WEIGHTS_NAME
        if not file.is_file():  # an adapter, which its own hook reads and checks
            continue
        state = unwrap(accelerator, model).state_dict()
        if is_sharded(accelerator):  # which holds the trained weights
            frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
            state = {name: value for name, value in state.items() if name not in frozen}
        expected = {name: tuple(value.shape) for name, value in state.items()}
        with safe_open(file, "pt") as saved:
            shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
        # Weights with two names are saved under one of them.
        pointers = {tensor.data_ptr() for tensor in local_tensors(state[name] for name in shapes if name in state)}
        differing = [name for name in shapes if shapes[name] != expected.get(name)]
        others = [name for name in state if name not in shapes]
        places = local_tensors(state[name] for name in others)
        differing += [name for name, place in zip(others, places, strict=True) if place.data_ptr() not in pointers]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{path} holds the weights of another network: {len(differing)} of {len(expected)} tensors differ, "
                f"such as {name!r}, of shape {shapes.get(name, 'none')} there and {expected.get(name, 'none')} here. "
                "Resume it with the same config, classes and adapter, or start a new run."
            )


def _load_state(
    accelerator: Accelerator, path: Path, registered: Collection[Any], not_restored: Collection[Any]
) -> None:
    """Loads what `_save_state` wrote; `registered` are objects besides those that `accelerator` knows."""
    state, objects = _read_saved_state(path), [*accelerator._custom_objects, *registered]
    if len(state["objects"]) != len(objects):
        raise ValueError(
            f"{path} holds the state of {len(state['objects'])} objects besides the networks, but this run has "
            f"{len(accelerator._custom_objects)}"
            + (", and an average of the weights (`use_ema`)" if registered else "")
            + ". Resume it with the script and the `use_ema` that it was written with."
        )
    for name, parts in (("optimizers", accelerator._optimizers), ("schedulers", accelerator._schedulers)):
        if len(state[name]) != len(parts):
            raise ValueError(
                f"{path} holds the state of {len(state[name])} {name}, but this run has {len(parts)}. Resume it with "
                "the script that it was written with."
            )
    models = list(accelerator._models)
    for hook in accelerator._load_model_state_pre_hook.values():
        hook(models, str(path))
    for index, model in enumerate(models):
        load_model(model, path / _weights_name(index))
    for part, saved in zip(accelerator._optimizers, state["optimizers"], strict=True):
        for group, own in zip(saved["param_groups"], part.param_groups, strict=False):
            # Which kernels step is a matter of the device, not of the checkpoint.
            group |= {name: own[name] for name in ("foreach", "fused") if name in own}
        part.load_state_dict(saved)
    for part, saved in zip(accelerator._schedulers, state["schedulers"], strict=True):
        part.load_state_dict(saved)
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])  # else the run was not in fp16: a new scaler
    accelerator.step = 0  # batches since the last optimizer step: a checkpoint follows one
    for obj, saved in zip(objects, state["objects"], strict=True):
        if not any(obj is other for other in not_restored):
            obj.load_state_dict(saved)
    name = f"{RNG_STATE_NAME}_{accelerator.process_index}"
    if (path / f"{name}.json").is_file():  # earlier versions: each micro-step seeds the generators anyway
        restore_random_states(read_state(path, name), accelerator.device)


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


def flush_to_disk(folder: Path) -> None:
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
    the dataset, whose shuffling, crops and flips depend on it. Streamed data start at the batch themselves.
    """
    if progress.batch_in_epoch >= len(dataloader):  # also when resumed with larger batches
        progress.epoch, progress.batch_in_epoch = progress.epoch + 1, 0
    if isinstance(dataloader.dataset, StreamDataset):
        dataloader.dataset.first_batch = progress.batch_in_epoch
    elif progress.batch_in_epoch:
        dataloader = skip_first_batches(dataloader, progress.batch_in_epoch)
    dataloader.set_epoch(progress.epoch)
    return dataloader
