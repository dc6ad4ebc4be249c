"""
Checkpoints of a training run: written atomically, rotated, found again.

A checkpoint is a folder `checkpoint-N` (N optimizer steps) that `Accelerator.save_state` filled. It is written under a
name that no resume looks at and renamed when every process has finished and the bytes are on the disk, so a
`checkpoint-N` that exists is complete, whenever the run was killed.
"""

import dataclasses
import logging
import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard


logger = logging.getLogger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# Folders under construction, set aside for an instant, and being deleted. None of them matches CHECKPOINT_NAME.
WRITING_PREFIX, REPLACED_PREFIX, DELETING_PREFIX = ".writing-", ".replaced-", ".deleting-"


@dataclasses.dataclass
class TrainingProgress:
    """
    Where training stands; register it with `accelerator.register_for_checkpointing`.

    Args:
        global_step (`int`): Optimizer steps taken.
        micro_step (`int`): Batches each process has consumed; the coordinate of `seed_step`.
        epoch (`int`): The epoch under way, from 0.
        batch_in_epoch (`int`): Batches each process has consumed of that epoch: what `accelerate.skip_first_batches`
            skips on resume.
    """

    global_step: int = 0
    micro_step: int = 0
    epoch: int = 0
    batch_in_epoch: int = 0

    def count_batch(self) -> None:
        """Each process has consumed one more."""
        self.micro_step += 1
        self.batch_in_epoch += 1

    def state_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """
        Raises:
            ValueError: If the counters in `state_dict` are not exactly these.
        """
        names = {field.name for field in dataclasses.fields(self)}
        if set(state_dict) != names:
            raise ValueError(
                f"The checkpoint's training progress holds {sorted(state_dict)}, expected {sorted(names)}. It was "
                "written by another version; resume it with that version."
            )
        for name, value in state_dict.items():
            setattr(self, name, value)


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | os.PathLike, global_step: int, total_limit: int | None = None
) -> str:
    """
    Writes `output_dir/checkpoint-<global_step>` and deletes what exceeds `total_limit`. Collective: every process calls
    it.

    Args:
        accelerator (`Accelerator`): Whose prepared and registered objects are saved.
        output_dir (`str` or `os.PathLike`): The folder of the run; must be the same on every process.
        global_step (`int`): Optimizer steps taken. An existing checkpoint of that step is replaced.
        total_limit (`int`, *optional*): Checkpoints to keep, the new one included; at least 1. None keeps all. The old
            ones go after the new one is complete, so for a while there is one more on the disk.

    Returns:
        `str`: The path of the checkpoint.

    Raises:
        ValueError: If `total_limit` is below 1.
    """
    if total_limit is not None and total_limit < 1:
        raise ValueError(
            f"`checkpoints_total_limit` is {total_limit}, but the checkpoint just written must stay. Use 1 or more, or "
            "None to keep all."
        )
    output_dir = Path(output_dir)
    path = output_dir / f"checkpoint-{global_step}"
    writing = output_dir / f"{WRITING_PREFIX}{path.name}"
    if _owns_files(accelerator):
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(writing))
    accelerator.wait_for_everyone()
    if _owns_files(accelerator):
        _flush_to_disk(writing)
        replaced = output_dir / f"{REPLACED_PREFIX}{path.name}"
        if path.exists():
            # A folder cannot be renamed over another. Killed between these two lines, `resume_checkpoint` puts it back.
            os.rename(path, replaced)
        os.rename(writing, path)
        _flush_directory(output_dir)
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
    """Deletes every `checkpoint-N` in `output_dir`. For one process, while the others wait."""
    for path in _list_checkpoints(Path(output_dir)).values():
        _delete(path)


def resume_checkpoint(
    accelerator: Accelerator, output_dir: str | os.PathLike, resume_from_checkpoint: str | None
) -> str | None:
    """
    Clears what an interrupted run left half-written in `output_dir`, then loads a checkpoint into everything
    `accelerator` has prepared and registered. Collective: every process calls it.

    Args:
        accelerator (`Accelerator`): As set up for the run that wrote the checkpoint.
        output_dir (`str` or `os.PathLike`): The folder of the run.
        resume_from_checkpoint (`str`, *optional*): "latest" (the newest in `output_dir`; a fresh start if there is
            none), the path of a checkpoint, or the name of one in `output_dir`. None loads nothing.

    Returns:
        `str` or `None`: The path of the loaded checkpoint, or None for a fresh start.

    Raises:
        ValueError: If the checkpoint does not exist, or is a folder that `save_checkpoint` did not write.
    """
    output_dir = Path(output_dir)
    if _owns_files(accelerator):
        _clean_up(output_dir)
    accelerator.wait_for_everyone()
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        latest = find_latest_checkpoint(output_dir)
        if latest is None:
            logger.warning("There is no checkpoint in %s to resume from: starting a new run.", output_dir)
            return None
        path = Path(latest)
    else:
        path = Path(resume_from_checkpoint)
        if not path.is_dir():
            path = output_dir / resume_from_checkpoint
    found = [checkpoint.name for _, checkpoint in sorted(_list_checkpoints(output_dir).items())]
    if not path.is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, which is neither a folder nor a checkpoint in "
            f"{output_dir}. Found there: {', '.join(found) or 'none'}. Pass one of them, a path, or 'latest'."
        )
    writers = len(list(path.glob("random_states_*.pkl")))
    if path.name.startswith(WRITING_PREFIX) or writers == 0:
        raise ValueError(
            f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, but {path} is not a complete checkpoint. "
            f"Checkpoints are folders `checkpoint-<step>`; found in {output_dir}: {', '.join(found) or 'none'}."
        )
    if writers != accelerator.num_processes and not accelerator.project_configuration.save_on_each_node:
        logger.warning(
            "%s was written by %d processes and is resumed by %d: training goes on, but the order of the data and the "
            "noise differ from those of an unbroken run.",
            path,
            writers,
            accelerator.num_processes,
        )
    accelerator.load_state(str(path))
    later = [name for name in found if path.parent == output_dir and _step(name) > _step(path.name)]
    if later:
        logger.warning(
            "Resumed from %s although %s exist. 'latest' would pick the highest step; move them away if that run is "
            "abandoned.",
            path,
            ", ".join(later),
        )
    return str(path)


def _owns_files(accelerator: Accelerator) -> bool:
    """Whether this process renames and deletes: one per file system."""
    if accelerator.project_configuration.save_on_each_node:
        return accelerator.is_local_main_process
    return accelerator.is_main_process


def _step(name: str) -> int:
    match = CHECKPOINT_NAME.fullmatch(name)
    return int(match.group(1)) if match else -1


def _list_checkpoints(output_dir: Path) -> dict[int, Path]:
    if not output_dir.is_dir():
        return {}
    return {_step(entry.name): entry for entry in output_dir.iterdir() if entry.is_dir() and _step(entry.name) >= 0}


def _rotate(output_dir: Path, global_step: int, total_limit: int) -> None:
    # Steps beyond the one just written belong to a run that was abandoned for an earlier checkpoint; they go first.
    # Deleting by step alone would delete the new checkpoint and keep the abandoned ones.
    by_value = sorted(_list_checkpoints(output_dir), key=lambda step: -step if step > global_step else step)
    for step in by_value[: max(0, len(by_value) - total_limit)]:
        path = output_dir / f"checkpoint-{step}"
        _delete(path)
        logger.info("Deleted %s (checkpoints_total_limit is %d).", path, total_limit)


def _delete(checkpoint: Path) -> None:
    # Renamed first: deleting takes a while, and a half-deleted checkpoint must not look like a whole one.
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
    """Without it, a machine that loses power may keep the rename and lose the contents."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_directory(root)


def _flush_directory(folder: str | os.PathLike) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rest_of_epoch(dataloader: DataLoaderShard, progress: TrainingProgress) -> DataLoaderShard:
    """
    The batches of the epoch under way that are still to come, of a prepared dataloader; a new epoch begins where there
    are none. Its `set_epoch` reaches the dataset, whose shuffling, crops and flips depend on it.
    """
    if progress.batch_in_epoch >= len(dataloader):  # also: resumed with larger batches, or fewer of them
        progress.epoch, progress.batch_in_epoch = progress.epoch + 1, 0
    if progress.batch_in_epoch:
        dataloader = skip_first_batches(dataloader, progress.batch_in_epoch)
    dataloader.set_epoch(progress.epoch)
    return dataloader
