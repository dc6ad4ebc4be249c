"""What the training of classifiers needs: classes drawn equally often, accuracy by timestep, names of the classes."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..models.classifier_adagn import AdaGNClassifierModel, AttentionPool2D
from .classes import ClassPlan, change_config, copy_rows, log_plan, match_names, plan_classes
from .data import ImageDataset, renumber_labels
from .metrics import smooth
from .seeding import derive_seed


if TYPE_CHECKING:
    # `datasets` comes with the `train` extra; the losses beside this module must be importable without it.
    import datasets


logger = logging.getLogger(__name__)

ID2LABEL_NAME = "id2label.json"


# 1. Data


class BalancedClassSampler(torch.utils.data.Sampler[int]):
    """
    Draws the classes equally often (their numbers differ by 1 at most), however many images they have: an epoch is as
    long as the dataset, holds each image of a small class several times and a random choice of a large one.

    Like `EpochShuffleSampler`, it depends on the seed and the epoch of an `ImageDataset` alone.

    Args:
        dataset (`ImageDataset`): Whose epoch and seed are used.
        labels (sequence of `int`): The class of each example; classes without examples are not drawn.
    """

    def __init__(self, dataset: ImageDataset, labels: Sequence[int]):
        if len(labels) != len(dataset):
            raise ValueError(f"Got {len(labels)} labels for {len(dataset)} examples. Pass one for each.")
        self.dataset = dataset
        ids = torch.as_tensor(labels)
        self.members = [torch.nonzero(ids == label)[:, 0] for label in ids.unique()]

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        seed = derive_seed(self.dataset.seed, "balanced shuffle", self.dataset.epoch)
        generator = torch.Generator().manual_seed(seed)
        share, rest = divmod(len(self.dataset), len(self.members))
        with_one_more = set(torch.randperm(len(self.members), generator=generator)[:rest].tolist())
        drawn = []
        for number, members in enumerate(self.members):
            wanted = share + (number in with_one_more)
            rounds = math.ceil(wanted / len(members))
            # Every image once before any of them comes again.
            order = [torch.randperm(len(members), generator=generator) for _ in range(rounds)]
            drawn += [members[torch.cat(order)[:wanted]]] if wanted else []
        indices = torch.cat(drawn)
        yield from indices[torch.randperm(len(indices), generator=generator)].tolist()


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


def save_id2label(folder: str | os.PathLike, id2label: Mapping[int, str]) -> None:
    """
    Writes `id2label.json` (class number -> name) beside the weights in `folder`.

    It is a file of its own, since the config of a network holds the arguments of its constructor and nothing else.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps({str(number): name for number, name in id2label.items()}, indent=2, ensure_ascii=False)
    Path(folder, ID2LABEL_NAME).write_text(text + "\n", encoding="utf-8")


def load_id2label(repository: str | os.PathLike, subfolder: str | None = None, **kwargs: Any) -> dict[int, str] | None:
    """
    The names of the classes of a classifier saved by `save_id2label`.

    Args:
        repository (`str` or `os.PathLike`): A folder, or a repository on the Hub.
        subfolder (`str`, *optional*): Where in it the classifier is.
        kwargs: For a repository on the Hub: `revision`, `cache_dir` and others of `hf_hub_download`.

    Returns:
        `dict[int, str]`: Class number -> name; None if there is no such file.
    """
    if os.path.isdir(repository):
        path = Path(repository, subfolder or "", ID2LABEL_NAME)
        if not path.is_file():
            return None
    else:
        try:
            path = Path(hf_hub_download(str(repository), ID2LABEL_NAME, subfolder=subfolder, **kwargs))
        except EntryNotFoundError:
            return None
    return {int(number): name for number, name in json.loads(path.read_text(encoding="utf-8")).items()}


def match_classes(
    id2label: Mapping[int, str],
    known: Mapping[int, str] | Mapping[str, str] | None,
    num_classes: int | None = None,
    *,
    by_number: bool = False,
) -> dict[int, int]:
    """
    For each class of some data, the number that the training data or a network gives the class of the same name. A set
    that lacks a class may give those after it other numbers, and each image would be taken for one of its neighbour's
    class.

    Args:
        id2label (mapping): Number -> name in the data.
        known (mapping, *optional*): The same of the training data or the network; its numbers may be text, as in JSON.
        num_classes (`int`, *optional*): Of the network, for `by_number`.
        by_number (`bool`, defaults to `False`): Where no name is known, but there are as many classes, all numbers are
            taken for the same classes, with a warning. `False`: such a name is refused.

    Returns:
        `dict[int, int]`: A known number for each number of `id2label`.

    Raises:
        ValueError: If a name is not known, or belongs to several classes; with `by_number`, a set without any known
            name is refused only if it does not have `num_classes` classes.
    """
    known = {int(number): name for number, name in (known or {}).items()}
    found = match_names(id2label, known)
    unknown = [name for number, name in id2label.items() if number not in found]
    if not unknown:
        return found
    if not by_number:
        raise ValueError(
            f"The validation data has the class {unknown[0]!r}, which the training data has not (its classes: "
            f"{', '.join(map(repr, known.values()))}). Use the same `label_column` values in both."
        )
    if found or (num_classes is not None and len(id2label) != num_classes):
        raise ValueError(
            f"The data has {len(id2label)} classes and the network {num_classes}, and they cannot be matched by name: "
            "the "
            + (f"model does not know {unknown[0]!r}." if known else "model names no classes.")
            + " Give the data the names, or all of the classes, that the model was trained with."
        )
    if known:
        first, learned = next(iter(id2label.values())), next(iter(known.values()))
        logger.warning(
            f"The data's class names are not the model's ({first!r}, {learned!r}, ...). Their numbers are taken for "
            "the same classes."
        )
    else:
        logger.warning(
            "The model names no classes. It has as many as the data, so equal numbers are taken for equal classes."
        )
    return {number: number for number in id2label}


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
