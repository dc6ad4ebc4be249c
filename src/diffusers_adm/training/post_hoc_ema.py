"""
Writes the result of a run with an average of the weights of another length, reconstructed from the snapshots of
power-function averages in its folder (`--power_ema_stds` in training).

    python -m diffusers_adm.training.post_hoc_ema --run_dir runs/mine --std 0.08 --output_dir runs/mine-0.08

`output_dir` gets the layout of the run's result: a pipeline, a ControlNet, a classifier, an autoencoder, a CLIP, a
prior or an adapter. The run may still be going on; its newest checkpoint then provides everything except the averaged
weights.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..commands.arguments import arg, parse_args
from ..commands.errors import run_command
from ..data.clip_models import CLIP_FILES
from ..data.repositories import check_can_be_written, reading
from .checkpoints import CHECKPOINT_NAME, find_latest_checkpoint
from .lora import PREFIX as LORA_PREFIX
from .lora import WEIGHTS_NAME as LORA_NAME
from .power_ema import (
    MAX_PROFILE_ERROR,
    SNAPSHOT_FOLDER,
    ReconstructionPlan,
    combine,
    find_snapshots,
    plan_reconstruction,
)


RECORD_NAME = "post_hoc_ema.json"
# Of the root of a result. Curves, samples, measurements and the model card are those of other weights.
ROOT_FILES = ("model_index.json", "config.json", "id2label.json", "autoencoder.json", "train_args.yaml", *CLIP_FILES)
WEIGHTS_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


@dataclass
class Arguments:
    run_dir: str = field(metadata={"help": "Folder of a run that was trained with `--power_ema_stds`."})
    std: float = field(
        metadata={
            "help": "Relative standard deviation of the average, above 0 and at most 0.28867; usually 0.05 to 0.15."
        }
    )
    output_dir: str = field(metadata={"help": "Folder for the result; must be new or empty."})
    step: int | None = arg(
        None, "Optimizer step after which the average is taken, one with a snapshot; none: the last."
    )
    max_error: float = arg(
        MAX_PROFILE_ERROR,
        "Largest accepted error of the reconstruction's profile, relative to the norm of the profile of the average.",
    )

    def __post_init__(self):
        if not self.max_error > 0:
            raise ValueError(f"`max_error` is {self.max_error}; it must be positive.")


def write_average(run_dir: str, std: float, output_dir: str, step: int | None, max_error: float) -> ReconstructionPlan:
    """
    Writes the result of a run with a reconstructed average into `output_dir`, completely or not at all. Raises a
    `ValueError` for a run without a result or without suitable snapshots, and for a folder that is not empty.
    """
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`output_dir` {target} exists and is not empty. Name another folder, or remove it.")
    check_can_be_written("output_dir", target.absolute().parent)
    if not Path(run_dir).is_dir():
        raise ValueError(f"`run_dir` is {run_dir!r}, which is not a folder.")
    snapshots = find_snapshots(run_dir)
    if not snapshots:
        raise ValueError(
            f"`run_dir` {run_dir!r} holds no snapshots of power-function averages in {SNAPSHOT_FOLDER}. Train with "
            "`--power_ema_stds`."
        )
    plan = plan_reconstruction(snapshots, std, step, max_error)
    with safe_open(plan.snapshots[-1].path, "pt") as file:
        networks = json.loads(file.metadata()["networks"])
    source = find_result(run_dir, networks)
    weights = combine(plan)

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.absolute().parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        _copy_result(source, unfinished, networks)
        for network in networks:
            prefix = f"{network}/" if network else ""
            names = [name for name in weights if name.startswith(prefix) and (network or "/" not in name)]
            averages = {name.removeprefix(prefix): weights[name] for name in names}
            if (source / LORA_NAME).is_file():
                _write_adapter(source, unfinished, averages)
            else:
                _write_network(source, unfinished, network, averages)
        record = {"std": plan.std, "step": plan.step, "profile_error": plan.error, "num_snapshots": len(plan.snapshots)}
        record["tracked_stds"] = sorted({snapshot.std for snapshot in plan.snapshots})
        (unfinished / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return plan


def find_result(run_dir: str, networks: Sequence[str]) -> Path:
    """The folder that holds the result of a run: its own, or that of its newest checkpoint. Else a `ValueError`."""
    latest = find_latest_checkpoint(run_dir)
    for folder in (Path(run_dir), *([Path(latest)] if latest is not None else [])):
        if (folder / LORA_NAME).is_file() or all((folder / name / "config.json").is_file() for name in networks):
            return folder
    raise ValueError(
        f"`run_dir` {run_dir!r} holds neither a result nor a checkpoint with the networks of its snapshots "
        f"({', '.join(name or 'in the root' for name in networks)}). Wait for the first checkpoint of the run."
    )


def _copy_result(source: Path, target: Path, networks: Sequence[str]) -> None:
    """Copies a result without the weights of `networks`. Its parts are the subfolders that hold a config."""
    for name in ROOT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for folder in source.iterdir():
        if folder.is_dir() and not CHECKPOINT_NAME.fullmatch(folder.name) and any(folder.glob("*config.json")):
            ignored = shutil.ignore_patterns(*WEIGHTS_PATTERNS) if folder.name in networks else None
            shutil.copytree(folder, target / folder.name, ignore=ignored)


def _write_network(source: Path, target: Path, network: str, averages: Mapping[str, torch.Tensor]) -> None:
    model = _load_network(source, network)
    parameters = dict(model.named_parameters())
    _check_names(source / network, averages, {name: tuple(value.shape) for name, value in parameters.items()})
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)
    model.save_pretrained(target / network)
    # Saving would add the path of the run to the config.
    shutil.copyfile(source / network / "config.json", target / network / "config.json")


def _load_network(source: Path, network: str) -> Any:
    """
    A network of a result in float32: a component of a pipeline, or a model of this package, of diffusers or of
    transformers.
    """
    with reading("run_dir", str(source)):
        if (source / "model_index.json").is_file():
            return getattr(DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32), network)
        config = json.loads((source / network / "config.json").read_text(encoding="utf-8"))
        if "model_type" in config:
            model_class = getattr(transformers, config["architectures"][0])
            return model_class.from_pretrained(source / network, dtype=torch.float32)
        name = config.get("_class_name", "")
        model_class = getattr(diffusers, name, None)  # where the models of this package are registered
        if model_class is None:
            raise ValueError(f"{source / network / 'config.json'} is of {name!r}, which is no model of diffusers.")
        return model_class.from_pretrained(source / network, torch_dtype=torch.float32)


def _write_adapter(source: Path, target: Path, averages: Mapping[str, torch.Tensor]) -> None:
    with safe_open(source / LORA_NAME, "pt") as file:
        metadata = file.metadata()
    saved = load_file(source / LORA_NAME)
    # PEFT's name of the adapter is not in the file.
    averages = {f"{LORA_PREFIX}.{name.replace('.default.', '.')}": average for name, average in averages.items()}
    _check_names(source / LORA_NAME, averages, {name: tuple(value.shape) for name, value in saved.items()})
    tensors = {name: averages.get(name, value).to(value.dtype) for name, value in saved.items()}
    save_file(tensors, target / LORA_NAME, metadata)


def _check_names(path: Path, averages: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    differing = [name for name, average in averages.items() if shapes.get(name) != tuple(average.shape)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"The snapshots are of another network than {path}: {len(differing)} tensors differ, such as {name!r}, of "
            f"shape {tuple(averages[name].shape)} and {shapes.get(name, 'none')}. Pass the folder of the run that "
            "wrote the snapshots."
        )


def main(argv: Sequence[str] | None = None) -> None:
    (args,) = parse_args(Arguments, argv, description=__doc__)
    plan = write_average(args.run_dir, args.std, args.output_dir, args.step, args.max_error)
    print(
        f"Wrote {args.output_dir}: the average of std {plan.std} after step {plan.step}, from {len(plan.snapshots)} "
        f"snapshots; its profile is met within {plan.error:.2%}."
    )


if __name__ == "__main__":
    run_command(main)
