"""The log of a run: progress bar, throughput, rows of metrics in a file and in trackers, and a watch for divergence."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from .disk import explained_disk_errors
from .flops import FlopMeter
from .metrics import MetricsHistory
from .trackers import start_tracker


logger = get_logger(__name__)

DEFAULT_PROJECT = "train"  # in trackers
# The advice in errors and warnings of a diverged run.
ADVICE = (
    "Resume an earlier checkpoint with a lower `--learning_rate`, or with `--mixed_precision bf16` or `no` instead of "
    "fp16."
)
# A network that always predicts 0 has a squared error of about 1 (images and noise have unit scale), one that guesses
# among a million classes a cross entropy of 14: no network that learns has a mean a hundred times as large.
ABSURD_ERROR = 100.0
# A rise by this factor above the lowest mean over this many rows is more than sampling noise in rows of few images. But
# an overfitted classifier has errors near 0 and single ones far above: below half the error of an untrained network,
# nothing has diverged.
DIVERGED_FACTOR, DIVERGENCE_SPAN, LEAST_DIVERGED_ERROR = 100.0, 20, 0.5


class DivergenceWatch:
    """
    Detects that a run has diverged although its loss is finite: the squared error (a classifier's cross entropy) is
    absurdly large, or has risen far above its lowest mean.
    """

    def __init__(self) -> None:
        self.values: list[float] = []  # of the latest rows, oldest first
        self.lowest = math.inf  # of the means over `DIVERGENCE_SPAN` rows

    def update(self, values: Mapping[str, float]) -> str | None:
        """Checks a row of metrics. Returns what is wrong with it, or None."""
        name = "mse" if "mse" in values else "loss"
        value = values[name]
        if not math.isfinite(value):  # a row of the history that could not be written as a number
            return f"its {name} is {value}"
        if value > ABSURD_ERROR:
            return f"its {name} is {value:.3g}, far above that of an untrained network"
        if value > max(DIVERGED_FACTOR * self.lowest, LEAST_DIVERGED_ERROR):
            return f"its {name} is {value:.3g}, and had fallen to {self.lowest:.3g}"
        self.values = [*self.values, value][-DIVERGENCE_SPAN:]
        if len(self.values) == DIVERGENCE_SPAN:
            self.lowest = min(self.lowest, sum(self.values) / DIVERGENCE_SPAN)
        return None


class TrainingLog:
    """
    Progress bar, throughput, `metrics.jsonl` (the main process writes it) and trackers of a run. Every process has one
    and makes every call.

    Args:
        settings (mapping): The arguments of the run, for the trackers; also which tracker, and where.
        global_step (`int`): Optimizer steps taken before; rows of later steps are dropped and will be written again.
        max_train_steps (`int`): Optimizer steps of the whole run.
        total_batch_size (`int`): Images per optimizer step, over all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str,
        settings: Mapping[str, Any],
        global_step: int,
        max_train_steps: int,
        total_batch_size: int,
    ):
        self.accelerator = accelerator
        self.total_batch_size = total_batch_size
        self.flop_meter = FlopMeter(accelerator)
        self.history = MetricsHistory(os.path.join(output_dir, "metrics.jsonl"))
        self.watch, self.divergence = DivergenceWatch(), None
        # The last validation: its step, and its values by their names in the file.
        self.validation: tuple[int, dict[str, float]] | None = None
        if accelerator.is_main_process:
            with explained_disk_errors(output_dir, f"{self.history.path} could not be rewritten", "It is unchanged."):
                self.history.rewind(global_step)
            for row in self.history.rows():
                if "loss" in row:
                    self.watch.update(row)
                if row["step"] == global_step:
                    self._remember(global_step, {n: v for n, v in row.items() if n.startswith("validation_")})
        # Of a resumed run: what it measured before, and will not write again.
        self._written = (global_step, set(self.validation[1] if self.validation else ()))
        start_tracker(
            accelerator,
            settings.get("report_to") or "none",
            settings.get("tracker_project_name") or DEFAULT_PROJECT,
            output_dir,
            accelerator.logging_dir or output_dir,
            {name: str(value) for name, value in settings.items()},
            global_step,
        )
        self.progress_bar = tqdm(
            total=max_train_steps,
            initial=global_step,
            desc="Training",
            disable=not accelerator.is_local_main_process,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file keeps every update
        )
        self.start_clock(global_step)

    def start_clock(self, global_step: int) -> None:
        """Restarts the measurement of images per second, also after a pause such as validation."""
        self._clock_start, self._clock_step = time.perf_counter(), global_step

    def advance(self) -> None:
        """Counts one optimizer step."""
        self.progress_bar.update()

    def write(self, step: int, values: Mapping[str, float], learning_rate: float) -> None:
        """
        Writes a row of training metrics, including `loss`, with learning rate and throughput since the last row. Raises
        a `RuntimeError` if the loss is not finite, and logs a warning when the run has diverged otherwise.
        """
        if not math.isfinite(values["loss"]):
            raise RuntimeError(f"The loss is {values['loss']} at step {step}. {ADVICE}")
        before, self.divergence = self.divergence, self.watch.update(values)
        if self.divergence is not None and before is None:
            logger.warning(f"The run seems to have diverged at step {step}: {self.divergence}. {ADVICE}")
        steps, seconds = step - self._clock_step, time.perf_counter() - self._clock_start
        images_per_second = steps * self.total_batch_size / seconds
        batches = steps * self.accelerator.gradient_accumulation_steps
        rates = self.flop_meter.rates(batches, seconds, self.accelerator.num_processes)
        self.start_clock(step)
        row = {**values, "lr": learning_rate, "images_per_second": images_per_second, **rates}
        self._write(step, row, "train/", "")
        shown = {"loss": f"{values['loss']:.4f}", "images_per_s": f"{images_per_second:.1f}"}
        self.progress_bar.set_postfix(shown, refresh=False)

    def write_validation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a row whose names begin with `validation_` (in trackers: `validation/`), and remembers it."""
        self._remember(step, {f"validation_{name}": value for name, value in values.items()})
        if self._written[0] == step and self._written[1] >= {f"validation_{name}" for name in values}:
            return  # a run that was resumed only to save its result
        self._write(step, values, "validation/", "validation_")

    def _remember(self, step: int, values: Mapping[str, float]) -> None:
        # A validation may write several rows.
        before = self.validation[1] if self.validation is not None and self.validation[0] == step else {}
        if values:
            self.validation = step, {**before, **values}

    def lacks_validation(self, step: int) -> bool:
        """Whether the log has rows of `step`, but none of the validation after it. Collective."""
        rows = self.history.rows() if self.accelerator.is_main_process else []
        names = {name for row in rows if row["step"] == step for name in row}
        lacks = bool(names) and not any(name.startswith("validation_") for name in names)
        (lacks,) = broadcast_object_list([lacks])  # from the main process, which writes them
        return lacks

    def _write(self, step: int, values: Mapping[str, float], tracker_prefix: str, file_prefix: str) -> None:
        folder, kept = self.history.path.parent, "The checkpoints are unaffected."
        with explained_disk_errors(folder, f"The row of step {step} could not be written to {self.history.path}", kept):
            if self.accelerator.is_main_process:
                self.history.append(step, {f"{file_prefix}{name}": value for name, value in values.items()})
        with explained_disk_errors(folder, f"The metrics of step {step} could not be written to a tracker", kept):
            self.accelerator.log({f"{tracker_prefix}{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Closes the progress bar, and warns once more if the run has diverged."""
        self.progress_bar.close()
        if self.divergence is not None:
            logger.warning(
                f"The run has diverged: {self.divergence}. Its result is saved all the same, but is useless. {ADVICE}"
            )
