"""What the training of classifiers needs: classes drawn equally often, accuracy by timestep, names of the classes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from ..data.labels import renumber_labels
from ..models.classifier_adagn import AdaGNClassifierModel, AttentionPool2D
from .classes import ClassPlan, change_config, copy_rows, log_plan, plan_classes
from .metrics import smooth


if TYPE_CHECKING:
    # `datasets` comes with the `train` extra; the losses beside this module must be importable without it.
    import datasets


logger = logging.getLogger(__name__)


# 1. Data


# 2. Metrics


def timestep_bin_edges(num_train_timesteps: int, num_bins: int) -> list[int]:
    """
    Cuts `[0, num_train_timesteps)` into bins of equal length (but for rounding): bin b holds the timesteps from
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
    Mean loss, accuracy and balanced accuracy (the mean over classes of the share that was recognised), over all
    timesteps and by bin of them; bin 0 holds the least noise.

    Sums stay on the device until `compute`, so that a step never waits for the device.

    Args:
        num_train_timesteps (`int`): T; timesteps lie in `[0, T)`.
        num_classes (`int`): Labels lie in `[0, num_classes)`.
        num_bins (`int`): See `timestep_bin_edges`; with 1 there are no metrics by bin.
        device (`torch.device` or `str`): Where the logits are.
    """

    def __init__(self, num_train_timesteps: int, num_classes: int, num_bins: int, device: torch.device | str = "cpu"):
        edges = timestep_bin_edges(num_train_timesteps, num_bins)
        self.inner_edges = torch.tensor(edges[1:-1], device=device)
        self.num_bins, self.num_classes = num_bins, num_classes
        # Of losses, of hits, of examples. float32, since not every device has float64; it counts to 2**24.
        self.sums = torch.zeros(3, num_bins * num_classes, device=device)

    def reset(self) -> None:
        """Forgets everything, e.g. after a log."""
        self.sums.zero_()

    @torch.no_grad()
    def update(self, timesteps: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        """
        Adds one batch.

        Args:
            timesteps (`torch.LongTensor` of shape `(batch_size,)`): In `[0, num_train_timesteps)`.
            logits (`torch.Tensor` of shape `(batch_size, num_classes)`): Of the classifier.
            labels (`torch.LongTensor` of shape `(batch_size,)`): The true classes.
            loss (`torch.Tensor` of shape `(batch_size,)`): One value an example.
        """
        bins = torch.bucketize(timesteps, self.inner_edges, right=True)
        hits = logits.argmax(dim=1) == labels
        values = torch.stack([loss.float(), hits.float(), torch.ones_like(loss, dtype=torch.float32)])
        self.sums.index_add_(1, bins * self.num_classes + labels, values)

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Over all processes since the last `reset`. Collective: every process calls it, and gets the same.

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


# 3. Pictures


def plot_accuracy_by_timestep(
    metrics: Mapping[str, float],
    edges: Sequence[int],
    path: str | os.PathLike,
    title: str,
    label_shares: Sequence[float],
) -> str:
    """
    Draws accuracy and loss against the timestep as a PNG, one step of the line a bin.

    Args:
        metrics (mapping): From `ClassificationMetrics.compute`, with more than one bin.
        edges (sequence of `int`): From `timestep_bin_edges`.
        path (`str` or `os.PathLike`): The PNG file to write.
        title (`str`): Which images they are of.
        label_shares (sequence of `float`): The share of each class in these images: what a classifier reaches that
            always answers the most frequent class, or one at random, is drawn beside its accuracy.

    Returns:
        `str`: `path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # as in `plot_loss_curves`
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    shares = [share for share in label_shares if share > 0]
    entropy = -sum(share * math.log(share) for share in shares)
    for axes, names in ((left, ("accuracy", "balanced_accuracy")), (right, ("loss",))):
        for index, name in enumerate(names):
            values = [metrics.get(f"{name}_bin{number}", math.nan) for number in range(len(edges) - 1)]
            axes.stairs(values, edges, baseline=None, linewidth=2, color=f"C{index}", label=name.replace("_", " "))
        axes.set_xlabel("timestep")
        axes.set_xlim(edges[0], edges[-1])
        axes.grid(True, alpha=0.3)
    left.axhline(max(shares), color="C0", linestyle=":", label="always the largest class")
    left.axhline(1 / len(shares), color="C1", linestyle=":", label="balanced accuracy of chance")
    left.set_ylim(0, 1)
    left.set_title(f"Accuracy, {title}")
    right.axhline(entropy, color="C0", linestyle=":", label="entropy of the labels")
    right.set_ylim(bottom=0)
    right.set_title(f"Cross entropy (nats), {title}")
    for axes in (left, right):
        axes.legend(fontsize="small")
    figure.savefig(path, format="png")
    return str(path)


def plot_classifier_curves(history: Sequence[Mapping[str, float]], path: str | os.PathLike) -> str:
    """
    Draws loss and accuracies over the optimizer steps as a PNG, those of training (thin lines, and thick ones averaged
    over a twentieth of the rows) and of held-out images (dots).

    Args:
        history (sequence of mappings): Rows as from `MetricsHistory.rows`.
        path (`str` or `os.PathLike`): The PNG file to write.

    Returns:
        `str`: `path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # as in `plot_loss_curves`
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, names in zip(figure.subplots(1, 2), (("loss",), ("accuracy", "balanced_accuracy")), strict=True):
        for index, name in enumerate(names):
            label, color = name.replace("_", " "), f"C{index}"
            steps, values = _column(history, name)
            axes.plot(steps, values, linewidth=0.8, alpha=0.3, color=color)
            span = max(1.0, len(values) / 20)
            axes.plot(steps, smooth(values, span), linewidth=1.8, color=color, label=f"{label}, training")
            steps, values = _column(history, f"validation_{name}")
            if steps:
                axes.plot(steps, values, "o--", markersize=4, color=f"C{index + 2}", label=f"{label}, held out")
        axes.set_xlabel("optimizer step")
        axes.grid(True, alpha=0.3)
        axes.set_ylim(0, 1 if names != ("loss",) else None)
        axes.legend(fontsize="small")
    figure.savefig(path, format="png")
    return str(path)


def _column(history: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[name]) for row in history if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


# 4. Names of the classes


# 5. Fine-tuning on other classes


def match_classifier_classes(
    classifier: AdaGNClassifierModel,
    images: datasets.Dataset,
    id2label: Mapping[int, str],
    known: Mapping[int, str],
    replaces: bool = False,
) -> tuple[datasets.Dataset, dict[int, str]]:
    """
    Matches the classes of the data with those of a pretrained classifier by name, as `plan_classes` says: new classes
    get rows of the last layer.

    Args:
        classifier ([`AdaGNClassifierModel`]): It is changed in place.
        images (`datasets.Dataset`): From `load_image_dataset`.
        id2label (mapping): Number -> name in the data.
        known (mapping): Number -> name in the classifier; empty where it names no classes.
        replaces (`bool`, defaults to `False`): Keep no other classes than those of the data.

    Returns:
        `tuple` of the dataset, labelled with the numbers of the classifier, and the names of these.

    Raises:
        ValueError: If it is unclear which of the classifier's classes those of the data are.
    """
    plan = plan_classes(id2label, known, classifier.config.num_classes, replaces=replaces, network="classifier")
    log_plan(plan, "classifier")
    if not plan.keeps_rows:
        fit_classifier_head(classifier, plan)
    return renumber_labels(images, plan.to_row), plan.id2label


def fit_classifier_head(classifier: AdaGNClassifierModel, plan: ClassPlan) -> None:
    """
    Gives the last layer of a classifier the rows of a plan, in place and in its config.

    New rows start as the mean of all rows, so that the logit of a new class is the mean of the others. Unlike 0, this
    does not depend on a constant added to all logits, which a softmax ignores. The old classes keep their proportions.
    """
    head = classifier.head
    if isinstance(head, torch.nn.Linear):  # of the pool "adaptive"
        layer = head
    else:
        layer = head.to_out if isinstance(head, AttentionPool2D) else head[-1]
    layer.weight = torch.nn.Parameter(copy_rows(layer.weight, plan.sources, layer.weight.mean(dim=0)))
    layer.bias = torch.nn.Parameter(copy_rows(layer.bias, plan.sources, layer.bias.mean()))
    layer.out_features = len(plan.sources)
    change_config(classifier, num_classes=len(plan.sources))
