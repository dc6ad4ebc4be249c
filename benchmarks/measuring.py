"""What the benchmarks share: the clock, alternating pairs, intervals, standard errors, classes of the data."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusers_adm import ADMPipeline
from diffusers_adm.evaluation.data import num_real_classes
from diffusers_adm.training import match_classes


if TYPE_CHECKING:
    import datasets


def seconds(function: Callable[[], object], device: str) -> float:
    """Time of one call, until the device has finished it."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int, device: str
) -> dict[str, list[float]]:
    """Times of `pairs` calls of each, in turn: what disturbs the machine meets both."""
    functions, times = {"ours": ours, "theirs": theirs}, {"ours": [], "theirs": []}
    for pair in range(pairs + 1):
        # Alternating order, so that neither always runs on the caches the other left; the first pair warms up.
        for which in ("ours", "theirs") if pair % 2 else ("theirs", "ours"):
            elapsed = seconds(functions[which], device)
            if pair:
                times[which].append(elapsed)
    return times


def bootstrap_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Of the median."""
    draws = np.random.default_rng(0).choice(values, size=(10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Median times in ms, the median of the pairwise ratios ours / theirs, and its 95% interval."""
    pairwise = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
    low, high = bootstrap_interval(pairwise)
    return {
        "ours_ms": 1000 * statistics.median(times["ours"]),
        "theirs_ms": 1000 * statistics.median(times["theirs"]),
        "ratio": statistics.median(pairwise),
        "low": low,
        "high": high,
    }


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean, and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def describe_machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def class_labels_for(pipe: ADMPipeline, data: datasets.Dataset, id2label: Mapping[int, str]) -> list[int]:
    """The class of each image, by the number that the class of this name has in the pipeline."""
    to_class = match_classes(id2label, pipe.id2label, num_real_classes(pipe.unet.config), by_number=True)
    return [to_class[label] for label in data["label"][:]]
