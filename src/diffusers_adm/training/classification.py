"""Metrics of a classifier: loss and accuracy by timestep."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from ..deprecations import moved


def timestep_bin_edges(num_train_timesteps: int, num_bins: int) -> list[int]:
    """
    Divides `[0, num_train_timesteps)` into bins of equal length (up to rounding): bin b holds the timesteps from
    `edges[b]` to `edges[b + 1] - 1`.

    Raises:
        ValueError: If there are more bins than timesteps, or none.
    """
    if not 1 <= num_bins <= num_train_timesteps:
        raise ValueError(
            f"`num_timestep_bins` is {num_bins}; it must lie between 1 and the number of timesteps, "
            f"{num_train_timesteps}."
        )
    return [math.ceil(num_train_timesteps * index / num_bins) for index in range(num_bins + 1)]


class ClassificationMetrics:
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
        Metrics over all processes since the last `reset`. Collective: every process calls it and gets the same.

        Returns:
            `dict[str, float]`: `loss`, `accuracy`, `balanced_accuracy` and, with more than one bin, each of them with
            `_bin0`, `_bin1` ... for the bins that saw an example.
        """
        sums = accelerator.reduce(self.sums, reduction="sum").cpu().double()
        by_bin = sums.view(3, self.num_bins, self.num_classes)
        metrics = _means(by_bin.sum(dim=1), "")
        if self.num_bins > 1:
            for index in range(self.num_bins):
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


__getattr__ = moved(
    __name__,
    {name: f"training.classifiers.{name}" for name in ("fit_classifier_head", "match_classifier_classes")}
    | {name: f"training.plots.{name}" for name in ("plot_accuracy_by_timestep", "plot_classifier_curves")},
)
