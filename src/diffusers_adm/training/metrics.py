"""Metrics of training: means that are summed on the device, and a history file that survives a resume."""

import copy
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator

from ..deprecations import moved
from .losses import Objective, TrainingLosses
from .timestep_samplers import TimestepSampler


logger = logging.getLogger(__name__)

NUM_QUARTERS = 4
METRIC_NAMES = ("loss", "mse", "vb", *(f"loss_q{quarter}" for quarter in range(NUM_QUARTERS)))


class Metrics:
    """Base class of sums that can be set back, for an optimizer step that is not taken or is tried again."""

    summed: tuple[str, ...]  # the attributes

    def mark(self) -> None:
        """Remembers the sums."""
        self._marked = copy.deepcopy({name: getattr(self, name) for name in self.summed})

    def revert(self) -> None:
        """Sets the sums back to those of the last `mark`."""
        vars(self).update(copy.deepcopy(self._marked))


class LossMetrics(Metrics):
    r"""
    Means of the loss, of its terms, and of the loss by quarter of the timestep range (`loss_q0` holds the least noise),
    as improved-diffusion logs them. Nichol & Dhariwal 2021 (https://huggingface.co/papers/2102.09672).

    Sums stay on the device until `compute`, so that a step never waits for the device.

    Args:
        num_train_timesteps (`int`): T; timesteps lie in `[0, T)`.
        device (`torch.device` or `str`): Device of the losses.
    """

    summed = ("sums", "weights")

    def __init__(self, num_train_timesteps: int, device: torch.device | str = "cpu"):
        self.num_train_timesteps = num_train_timesteps
        # float32, since not every device has float64; a row sums some thousands of batches at most.
        self.sums = torch.zeros(len(METRIC_NAMES), device=device)
        self.weights = torch.zeros(len(METRIC_NAMES), device=device)
        self.quarters = torch.arange(NUM_QUARTERS, device=device)

    def reset(self) -> None:
        """Sets all sums to 0."""
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
            loss, mse, vb (`torch.Tensor` of shape `(batch_size,)`): One unweighted value per example; None for a term
                that the objective does not have.
            weights (`torch.Tensor` of shape `(batch_size,)`, *optional*): Importance weights of the timestep sampler.
                With them the means estimate those under uniform timesteps, for any sampler.
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
        Means over all processes since the last `reset`, with the same weight for every example: `loss`, `mse`, `vb`,
        `loss_q0` ... `loss_q3`; a term or quarter that saw no example is absent. Collective: every process calls it and
        gets the same.
        """
        sums, weights = accelerator.reduce(torch.stack([self.sums, self.weights]), reduction="sum").tolist()
        return {name: s / w for name, s, w in zip(METRIC_NAMES, sums, weights, strict=True) if w > 0}


class MeanMetrics(Metrics):
    """
    Means of named scalars over batches of one size.

    Sums stay on the device until `compute`, so that a step never waits for the device.

    Args:
        device (`torch.device` or `str`): Device of the values.
    """

    summed = ("sums", "counts")

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forgets all sums."""
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def update(self, values: Mapping[str, torch.Tensor]) -> None:
        """Adds the scalars of one batch; every process passes the same names."""
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name], self.counts[name] = torch.zeros((), device=self.device), 0
            self.sums[name] += value.float()
            self.counts[name] += 1

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """
        The means over all processes and the batches with a value of this name since the last `reset`. Collective: every
        process calls it and gets the same.
        """
        if not self.sums:
            return {}
        means = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        return dict(zip(self.sums, accelerator.reduce(means, reduction="mean").tolist(), strict=True))


def record_losses(
    terms: TrainingLosses,
    timesteps: torch.Tensor,
    weights: torch.Tensor,
    objective: Objective,
    timestep_sampler: TimestepSampler,
    metrics: LossMetrics,
) -> None:
    """
    Passes the unweighted losses of a batch to sampler and metrics: with weights, the sampler would learn from its own.
    Collective, for samplers that learn.

    Args:
        terms (`TrainingLosses`): From `training_losses` with this `objective`.
        timesteps, weights (`torch.Tensor` of shape `(batch_size,)`): From the sampler.
    """
    timestep_sampler.update(timesteps, terms.loss.detach())
    vb = terms.vb.detach() if objective != "simple" else None
    metrics.update(timesteps, terms.loss.detach(), terms.mse.detach(), vb, weights)


def timestep_bin_edges(num_train_timesteps: int, num_bins: int) -> list[int]:
    """
    Divides `[0, num_train_timesteps)` into bins of equal length (up to rounding): bin b holds the timesteps from
    `edges[b]` to `edges[b + 1] - 1`. Raises a `ValueError` for more bins than timesteps, or none.
    """
    if not 1 <= num_bins <= num_train_timesteps:
        raise ValueError(f"`num_timestep_bins` is {num_bins}; it must lie in [1, {num_train_timesteps}] (timesteps).")
    return [math.ceil(num_train_timesteps * index / num_bins) for index in range(num_bins + 1)]


class ClassificationMetrics(Metrics):
    """
    Mean loss, accuracy and balanced accuracy (the mean accuracy over the classes), over all timesteps and by bin of
    them; bin 0 holds the least noise.

    Sums stay on the device until `compute`, so that a step never waits for the device.

    Args:
        num_train_timesteps (`int`): T; timesteps lie in `[0, T)`.
        num_classes (`int`): Labels lie in `[0, num_classes)`.
        num_bins (`int`): See `timestep_bin_edges`; with 1 there are no metrics by bin.
        device (`torch.device` or `str`): Device of the logits.
    """

    summed = ("sums",)

    def __init__(self, num_train_timesteps: int, num_classes: int, num_bins: int, device: torch.device | str = "cpu"):
        edges = timestep_bin_edges(num_train_timesteps, num_bins)
        self.inner_edges = torch.tensor(edges[1:-1], device=device)
        self.num_bins, self.num_classes = num_bins, num_classes
        # Sums of losses, hits and examples. float32, since not every device has float64; it can count to 2**24.
        self.sums = torch.zeros(3, num_bins * num_classes, device=device)

    def reset(self) -> None:
        """Sets all sums to 0."""
        self.sums.zero_()

    @torch.no_grad()
    def update(self, timesteps: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        """
        Adds one batch.

        Args:
            timesteps (`torch.LongTensor` of shape `(batch_size,)`): In `[0, num_train_timesteps)`.
            logits (`torch.Tensor` of shape `(batch_size, num_classes)`): Outputs of the classifier.
            labels (`torch.LongTensor` of shape `(batch_size,)`): The true classes.
            loss (`torch.Tensor` of shape `(batch_size,)`): One value per example.
        """
        bins = torch.bucketize(timesteps, self.inner_edges, right=True)
        hits = logits.argmax(dim=1) == labels
        values = torch.stack([loss.float(), hits.float(), torch.ones_like(loss, dtype=torch.float32)])
        self.sums.index_add_(1, bins * self.num_classes + labels, values)

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Metrics over all processes since the last `reset`: `loss`, `accuracy`, `balanced_accuracy` and, with more than
        one bin, each of them with `_bin0`, `_bin1` ... for the bins that saw an example. Collective: every process
        calls it and gets the same.
        """
        sums = accelerator.reduce(self.sums, reduction="sum").cpu().double()
        by_bin = sums.view(3, self.num_bins, self.num_classes)
        metrics = _means(by_bin.sum(dim=1), "")
        for index in range(self.num_bins) if self.num_bins > 1 else ():
            metrics |= _means(by_bin[:, index], f"_bin{index}")
        return metrics


def _means(by_class: torch.Tensor, suffix: str) -> dict[str, float]:
    losses, hits, counts = by_class  # (num_classes,) each
    seen = counts > 0
    if not seen.any():
        return {}
    return {
        f"loss{suffix}": float(losses.sum() / counts.sum()),
        f"accuracy{suffix}": float(hits.sum() / counts.sum()),
        f"balanced_accuracy{suffix}": float((hits[seen] / counts[seen]).mean()),
    }


class MetricsHistory:
    """
    A file of metrics, one JSON object per line: `{"step": 100, "loss": 0.25, ...}`, created when first needed. Values
    that are not finite become null. Each row is flushed before `append` returns, so a killed run keeps its curves. Only
    the main process should write.
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
        """All rows, oldest first, with NaN for null. A row cut short by a kill is skipped with a warning."""
        if not self.path.is_file():
            return []
        rows = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                row["step"]
            except (json.JSONDecodeError, KeyError, TypeError):
                logger.warning("%s, line %d is not a row of metrics and is skipped: %.60r", self.path, number, line)
                continue
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
        return rows

    def rewind(self, step: int) -> None:
        """
        Drops the rows after `step`, which a resumed run writes again, and a row that was cut short. Call it at every
        start (with 0 for a new run).
        """
        if not self.path.is_file():
            return
        temporary = self.path.with_name(self.path.name + ".writing")
        temporary.write_bytes(b"")
        for row in self.rows():
            if row["step"] <= step:
                MetricsHistory(temporary).append(int(row.pop("step")), row)
        os.replace(temporary, self.path)


__getattr__ = moved(__name__, {name: f"training.plots.{name}" for name in ("plot_loss_curves", "smooth")})
