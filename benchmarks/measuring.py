"""Shared by the benchmarks: timing of alternating pairs, statistics, samples in batches, tensors of images, reports."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from diffusers_adm import ADMPipeline
from diffusers_adm.evaluation.data import num_real_classes
from diffusers_adm.training import match_classes


if TYPE_CHECKING:
    import datasets


def seconds(function: Callable[[], object], device: str) -> float:
    """Seconds of one call, until the device has finished."""
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
    """Seconds of `pairs` calls of each in turn, so that disturbances of the machine affect both."""
    functions, times = {"ours": ours, "theirs": theirs}, {"ours": [], "theirs": []}
    for pair in range(pairs + 1):
        # In alternating order, so that neither always runs on the other's caches; the first pair is the warm-up.
        for which in ("ours", "theirs") if pair % 2 else ("theirs", "ours"):
            elapsed = seconds(functions[which], device)
            if pair:
                times[which].append(elapsed)
    return times


def bootstrap_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap confidence interval of the median."""
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


def seeded(first_seed: int, number: int) -> list[torch.Generator]:
    """Generators with consecutive seeds, one per image."""
    return [torch.Generator().manual_seed(first_seed + i) for i in range(number)]


def sample_in_batches(
    pipe: ADMPipeline,
    inputs: Mapping[str, Sequence[Any]],
    generators: list[torch.Generator],
    batch_size: int,
    **options: Any,
) -> list[Image.Image]:
    """
    Generates one image per generator.

    Args:
        pipe (`ADMPipeline`): The pipeline.
        inputs (mapping): Arguments of its call with one entry per image.
        generators (list of `torch.Generator`): One per image.
        batch_size (`int`): Images per call.
        **options: Arguments that are the same for all images.
    """
    images: list[Image.Image] = []
    for start in range(0, len(generators), batch_size):
        batch = slice(start, start + batch_size)
        arguments = {name: values[batch] for name, values in inputs.items()}
        images += pipe(**arguments, generator=generators[batch], **options).images
    return images


def pixels_of(images: Sequence[Image.Image]) -> torch.Tensor:
    """`(N, 3, height, width)`, uint8."""
    return torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


def quiet(pipe: ADMPipeline) -> ADMPipeline:
    """Turns off the progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def write_report(path: Path, args: argparse.Namespace, device: str, **content: Any) -> None:
    """Writes settings, machine and results as JSON."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = {"settings": settings, "machine": describe_machine(device), **content}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
