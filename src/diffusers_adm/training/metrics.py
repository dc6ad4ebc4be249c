"""Training curves: means gathered on the device, a history file that survives a resume, and a plot of it."""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator


logger = logging.getLogger(__name__)

NUM_QUARTERS = 4
METRIC_NAMES = ("loss", "mse", "vb", *(f"loss_q{quarter}" for quarter in range(NUM_QUARTERS)))


class LossMetrics:
    r"""
    Means of the loss, of its terms, and of the loss by quarter of the timestep range (`loss_q0` holds the least noise),
    as improved-diffusion logs them. Nichol & Dhariwal 2021 (https://huggingface.co/papers/2102.09672).

    Sums stay on the device until `compute`, so that a step never waits for the device.

    Args:
        num_train_timesteps (`int`): T; timesteps lie in `[0, T)`.
        device (`torch.device` or `str`): Where the losses are.
    """

    def __init__(self, num_train_timesteps: int, device: torch.device | str = "cpu"):
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` must be at least 1, got {num_train_timesteps}.")
        self.num_train_timesteps = num_train_timesteps
        # float32, since not every device has float64; a window between two logs adds some thousands of batches at most.
        self.sums = torch.zeros(len(METRIC_NAMES), device=device)
        self.weights = torch.zeros(len(METRIC_NAMES), device=device)
        self.quarters = torch.arange(NUM_QUARTERS, device=device)

    def reset(self) -> None:
        """Forgets everything, e.g. after a log."""
        self.sums.zero_()
        self.weights.zero_()

    @torch.no_grad()
    def update(
        self,
        timesteps: torch.Tensor,
        loss: torch.Tensor,
        mse: torch.Tensor | None = None,
        vb: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """
        Adds one batch.

        Args:
            timesteps (`torch.LongTensor` of shape `(batch_size,)`): In `[0, num_train_timesteps)`.
            loss, mse, vb (`torch.Tensor` of shape `(batch_size,)`): One value an example, not yet weighted. Pass None
                for a term that the objective does not have.
            weights (`torch.Tensor` of shape `(batch_size,)`, *optional*): The importance weights of the timestep
                sampler. With them the means estimate those under uniform timesteps, and stay comparable between
                samplers.
        """
        weights = torch.ones_like(loss, dtype=torch.float32) if weights is None else weights.float()
        in_quarter = (timesteps * NUM_QUARTERS // self.num_train_timesteps)[:, None] == self.quarters  # (B, 4)
        for index, values in enumerate((loss, mse, vb)):
            if values is not None:
                self.sums[index] += (weights * values.float()).sum()
                self.weights[index] += weights.sum()
        # `where` rather than a product with the mask: 0 * NaN is NaN, and would spread to the other quarters.
        zero = torch.zeros((), device=loss.device)
        self.sums[3:] += torch.where(in_quarter, (weights * loss.float())[:, None], zero).sum(dim=0)
        self.weights[3:] += torch.where(in_quarter, weights[:, None], zero).sum(dim=0)

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """
        The means over all processes since the last `reset`. Collective: every process calls it, and gets the same.

        Sums and weights are added up separately, so every example counts the same wherever it was processed.

        Returns:
            `dict[str, float]`: `loss`, `mse`, `vb`, `loss_q0` ... `loss_q3`; a term or quarter that saw no example is
            absent.
        """
        sums, weights = accelerator.reduce(torch.stack([self.sums, self.weights]), reduction="sum").tolist()
        return {name: s / w for name, s, w in zip(METRIC_NAMES, sums, weights, strict=True) if w > 0}


class MetricsHistory:
    """
    A file of metrics, one JSON object a line: `{"step": 100, "loss": 0.25, ...}`. Values that are not finite become
    null.

    Each row is on its way to the disk before `append` returns, so a killed run keeps its curves.

    Args:
        path (`str` or `os.PathLike`): The file, e.g. `metrics.jsonl` in the output folder; created when first needed.
            On several processes, only the main one should write.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the row of optimizer step `step`."""
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")

    def rows(self) -> list[dict[str, float]]:
        """All rows, oldest first; null is read as NaN. A row cut short by a kill is left out, with a warning."""
        if not self.path.is_file():
            return []
        rows = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                row["step"]
            except (json.JSONDecodeError, KeyError, TypeError):
                logger.warning("%s, line %d is not a row of metrics and is left out: %.60r", self.path, number, line)
                continue
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
        return rows

    def rewind(self, step: int) -> None:
        """
        Drops the rows after `step`: a run resumed there will write them again.

        Call it at every start (with 0 for a fresh one), also because it repairs a last row that was cut short.
        """
        rows = [row for row in self.rows() if row["step"] <= step]
        if not self.path.is_file():
            return
        temporary = self.path.with_name(self.path.name + ".writing")
        temporary.unlink(missing_ok=True)
        rewritten = MetricsHistory(temporary)
        temporary.touch()
        for row in rows:
            rewritten.append(int(row.pop("step")), row)
        os.replace(temporary, self.path)


def smooth(values: Sequence[float], span: float) -> list[float]:
    """
    Exponential moving average that starts unbiased: the first value is the first mean, not zero.

    Args:
        values (sequence of `float`): NaN leaves the average as it is.
        span (`float`): Values that the average looks back on, at least 1; 1 changes nothing.
    """
    decay = 1 - 1 / span
    total, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if not math.isnan(value):
            total, weight = decay * total + value, decay * weight + 1
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def plot_loss_curves(history: Sequence[Mapping[str, float]], path: str | os.PathLike) -> str:
    """
    Draws the loss with its terms, and the loss by quarter of the timestep range, as a PNG.

    Thin lines are the values, thick ones an exponential average over a twentieth of the rows. The vertical axis is
    logarithmic unless a value is zero or negative.

    Args:
        history (sequence of mappings): Rows as from `MetricsHistory.rows`; any metric may be missing in any row.
        path (`str` or `os.PathLike`): The PNG file to write.

    Returns:
        `str`: `path`.

    Raises:
        ValueError: If no row holds any of the metrics.
    """
    # matplotlib comes with the `train` extra. Figure and canvas are used directly: pyplot keeps global state, and would
    # choose a window backend where there is a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(name in row for row in history for name in METRIC_NAMES):
        raise ValueError(f"There is nothing to plot: none of {', '.join(METRIC_NAMES)} is in the {len(history)} rows.")
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("Loss and its terms", {"loss": "loss", "mse": "mse", "vb": "vb (bound term)"}),
        (
            "Loss by quarter of the timesteps",
            {
                "loss_q0": "1st quarter (least noise)",
                "loss_q1": "2nd quarter",
                "loss_q2": "3rd quarter",
                "loss_q3": "4th quarter (most noise)",
            },
        ),
    )
    for axes, (heading, labels) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.set_title(heading)
        axes.set_xlabel("optimizer step")
        axes.grid(True, which="major", alpha=0.3)
        drawn = []
        for index, (name, label) in enumerate(labels.items()):
            points = [(row["step"], row[name]) for row in history if name in row and math.isfinite(row[name])]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            drawn += values
            # Where the bound term is small, the loss hides the mse below it: dashes let both be seen.
            style = {"color": f"C{index}", "linestyle": "--" if name == "mse" else "-"}
            marker = "o" if len(points) == 1 else None  # a line through one point is invisible
            axes.plot(steps, values, linewidth=0.8, alpha=0.3, color=f"C{index}")
            smoothed = smooth(values, span=max(1.0, len(values) / 20))
            axes.plot(steps, smoothed, linewidth=1.8, label=label, marker=marker, **style)
        if drawn:
            axes.legend(fontsize="small")
            if min(drawn) > 0:
                axes.set_yscale("log")
        else:
            axes.text(0.5, 0.5, "no values yet", ha="center", va="center", transform=axes.transAxes)
    figure.savefig(path, format="png")
    return str(path)
