"""Plots of training curves and of classifiers, as PNG files of two panels."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


LOSS_PANELS = {
    "Loss and its terms": {"loss": "loss", "mse": "mse", "vb": "vb (bound term)"},
    "Loss by quarter of the timesteps": {
        "loss_q0": "1st quarter (least noise)",
        "loss_q1": "2nd quarter",
        "loss_q2": "3rd quarter",
        "loss_q3": "4th quarter (most noise)",
    },
}

AUTOENCODER_PANELS = {
    "Loss and its terms": {
        "loss": "loss",
        "mse": "mse (squared error)",
        "perceptual": "perceptual",
        "discriminator_loss": "loss of the discriminator",
    },
    "KL divergence and weight of the discriminator": {
        "kl": "KL (nats per value)",
        "adaptive_weight": "adaptive weight",
    },
}

PRIOR_PANELS = {
    "Squared error by quarter of the timesteps": {
        "loss": "all timesteps",
        "loss_q0": "1st quarter (least noise)",
        "loss_q1": "2nd quarter",
        "loss_q2": "3rd quarter",
        "loss_q3": "4th quarter (most noise)",
    },
    "Cosine similarity to held-out image embeddings": {
        "validation_similarity": "prior",
        "validation_text_similarity": "text embedding",
        "validation_shuffled_similarity": "prior, another caption",
        "validation_mean_similarity": "mean of the training data",
    },
}


def smooth(values: Sequence[float], span: float) -> list[float]:
    """
    Exponential moving average that starts unbiased: the first value is the first mean, not zero.

    Args:
        values (sequence of `float`): NaN leaves the average as it is.
        span (`float`): Number of values that are averaged, at least 1; 1 changes nothing.
    """
    decay = 1 - 1 / span
    total, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if not math.isnan(value):
            total, weight = decay * total + value, decay * weight + 1
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


@contextmanager
def _two_panels(path: str | os.PathLike, xlabel: str) -> Iterator[tuple[Any, Any]]:
    # Without pyplot, which keeps global state and would choose a window backend on a machine with a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes in panels:
        axes.set_xlabel(xlabel)
        axes.grid(True, alpha=0.3)
    yield panels
    figure.savefig(path, format="png")


def _column(history: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows with a finite value."""
    points = [(row["step"], row[name]) for row in history if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _plot_curve(axes: Any, steps: Sequence[float], values: Sequence[float], color: str, **style: Any) -> None:
    """A thin line of the values, and a thick one of their average over a twentieth of the rows."""
    axes.plot(steps, values, linewidth=0.8, alpha=0.3, color=color)
    axes.plot(steps, smooth(values, span=max(1.0, len(values) / 20)), linewidth=1.8, color=color, **style)


def plot_loss_curves(
    history: Sequence[Mapping[str, float]],
    path: str | os.PathLike,
    panels: Mapping[str, Mapping[str, str]] = LOSS_PANELS,
) -> str:
    """
    Plots the loss with its terms, and the loss by quarter of the timestep range, from rows of `MetricsHistory.rows`
    (metrics may be missing) into a PNG file, whose path is returned. The vertical axis is logarithmic unless a value is
    zero or negative. `panels` names two other panels: the metrics of each, with their labels.
    """
    with _two_panels(path, "optimizer step") as both:
        for axes, (heading, labels) in zip(both, panels.items(), strict=True):
            axes.set_title(heading)
            lowest = []
            for index, (name, label) in enumerate(labels.items()):
                steps, values = _column(history, name)
                if not steps:
                    continue
                lowest.append(min(values))
                # Where the bound term is small, the loss hides the mse below it: dashes let both be seen.
                linestyle = "--" if name == "mse" else "-"
                marker = "o" if len(steps) == 1 else None  # a line through one point is invisible
                _plot_curve(axes, steps, values, f"C{index}", label=label, linestyle=linestyle, marker=marker)
            if lowest:
                axes.legend(fontsize="small")
                if min(lowest) > 0:
                    axes.set_yscale("log")
            else:
                axes.text(0.5, 0.5, "no values yet", ha="center", va="center", transform=axes.transAxes)
    return str(path)


def plot_classifier_curves(history: Sequence[Mapping[str, float]], path: str | os.PathLike) -> str:
    """
    Plots loss and accuracies of a classifier over the optimizer steps, in training (lines) and on held-out images
    (dots). Arguments as for `plot_loss_curves`.
    """
    with _two_panels(path, "optimizer step") as panels:
        for axes, names in zip(panels, (("loss",), ("accuracy", "balanced_accuracy")), strict=True):
            for index, name in enumerate(names):
                label = name.replace("_", " ")
                _plot_curve(axes, *_column(history, name), f"C{index}", label=f"{label}, training")
                steps, values = _column(history, f"validation_{name}")
                if steps:
                    axes.plot(steps, values, "o--", markersize=4, color=f"C{index + 2}", label=f"{label}, held out")
            axes.set_ylim(0, 1 if names != ("loss",) else None)
            axes.legend(fontsize="small")
    return str(path)


def plot_accuracy_by_timestep(
    metrics: Mapping[str, float],
    edges: Sequence[int],
    path: str | os.PathLike,
    title: str,
    label_shares: Sequence[float],
) -> str:
    """
    Plots accuracy and loss of a classifier against the timestep, one step of the line per bin.

    Args:
        metrics (mapping): From `ClassificationMetrics.compute`, with more than one bin.
        edges (sequence of `int`): From `timestep_bin_edges`.
        path (`str` or `os.PathLike`): The PNG file to write, which is returned.
        title (`str`): Name of the images.
        label_shares (sequence of `float`): Share of each class in these images, for the baselines: always the most
            frequent class, and a random one.
    """
    shares = [share for share in label_shares if share > 0]
    entropy = -sum(share * math.log(share) for share in shares)
    with _two_panels(path, "timestep") as (left, right):
        for axes, names in ((left, ("accuracy", "balanced_accuracy")), (right, ("loss",))):
            for index, name in enumerate(names):
                values = [metrics.get(f"{name}_bin{number}", math.nan) for number in range(len(edges) - 1)]
                axes.stairs(values, edges, baseline=None, linewidth=2, color=f"C{index}", label=name.replace("_", " "))
            axes.set_xlim(edges[0], edges[-1])
        left.axhline(max(shares), color="C0", linestyle=":", label="always the largest class")
        left.axhline(1 / len(shares), color="C1", linestyle=":", label="balanced accuracy of chance")
        left.set_ylim(0, 1)
        left.set_title(f"Accuracy, {title}")
        right.axhline(entropy, color="C0", linestyle=":", label="entropy of the labels")
        right.set_ylim(bottom=0)
        right.set_title(f"Cross entropy (nats), {title}")
        for axes in (left, right):
            axes.legend(fontsize="small")
    return str(path)
