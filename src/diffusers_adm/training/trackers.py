"""Trackers of the curves of a run, through Accelerate: which there are, and how a resumed run finds its own again."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from .disk import write_whole


TrackerName = Literal["tensorboard", "wandb", "comet_ml", "mlflow", "none"]
# The runs that the trackers keep elsewhere, in the folder of the run.
TRACKER_RUNS_NAME = "tracker_runs.json"


def check_tracker(report_to: str) -> None:
    """Raises a `ValueError` for a tracker whose package is not installed: Accelerate would go on without it."""
    if report_to != "none" and report_to not in [tracker.value for tracker in get_available_trackers()]:
        raise ValueError(
            f"`report_to` is {report_to!r}, but the package {report_to} is not installed. Install it (`pip install "
            f"{report_to}`), or pass `--report_to none`: `metrics.jsonl` and `loss_curves.png` are written anyway."
        )


def start_tracker(
    accelerator: Accelerator,
    report_to: str,
    project: str,
    output_dir: str | os.PathLike,
    logging_dir: str | os.PathLike,
    config: dict[str, Any],
    global_step: int,
) -> None:
    """
    Starts the tracker of a run. A resumed run (`global_step` above 0) continues the run of Weights & Biases, Comet or
    MLflow that is written in `tracker_runs.json` in its folder; a new run starts one of the name of the folder. Every
    process calls it.
    """
    if report_to == "none":
        accelerator.init_trackers(project, config=config)  # which remembers that there are none
        return
    path, name = Path(output_dir, TRACKER_RUNS_NAME), Path(output_dir).resolve().name
    known: dict[str, str] = {}
    if global_step > 0 and path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
    run_id = known.get(report_to)
    options: dict[str, Any] = {}
    if report_to == "tensorboard":
        options = {"purge_step": global_step + 1}
    elif report_to == "wandb":
        run_id = run_id or uuid.uuid4().hex[:12]
        os.makedirs(logging_dir, exist_ok=True)
        options = {"name": name, "id": run_id, "resume": "allow", "dir": os.fspath(logging_dir)}
    elif report_to == "comet_ml":
        run_id = run_id or uuid.uuid4().hex
        options = {"experiment_key": run_id, "mode": "get_or_create"}
    elif report_to == "mlflow":
        options = {"run_name": name, "run_id": run_id}
    accelerator.init_trackers(project, config=config, init_kwargs={report_to: options})
    if not accelerator.is_main_process:
        return
    if report_to == "mlflow":  # it chooses the name of a new run
        run_id = accelerator.get_tracker("mlflow", unwrap=True).info.run_id
    if run_id is not None and known.get(report_to) != run_id:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**known, report_to: run_id}) + "\n")
