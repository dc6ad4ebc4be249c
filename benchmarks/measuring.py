"""Shared code of the benchmarks: clock, alternating pairs, intervals, peak memory, command line, output, classes."""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
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

# Command line and output


def argument_parser(
    doc: str, pairs: int, batch_size: int | None = None, only: str | None = None
) -> argparse.ArgumentParser:
    """
    The arguments of benchmarks that time pairs. `doc` is the module's docstring, `batch_size` None for those without
    networks of their own, `only` an example for `--only`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if batch_size is not None:
        parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--pairs", type=int, default=pairs, help="Timed pairs per row; 0: skip them.")
    if only is not None:
        parser.add_argument("--only", nargs="*", default=[], help=f"Words that a row must all have, e.g. `{only}`.")
    parser.add_argument("--json", help="Write all numbers to this file.")
    return parser


def describe_machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def print_row(label: str, row: Mapping, unit: str = "ms", limit: float | None = None, extra: str = "") -> None:
    """Prints `label  ours / theirs = ratio [95% interval] (limit)  extra  verdict`; keys of the row end in the unit."""
    ours, theirs = row[f"ours_{unit}"], row[f"theirs_{unit}"]
    digits = 3 if unit == "ms" and theirs < 10 else 1
    interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else ""
    limit_text = "" if limit is None else f" (limit {limit})"
    verdict = {True: "ok", False: "FAILED", None: ""}[row["passed"]]
    numbers = f"{ours:8.{digits}f} / {theirs:8.{digits}f} {'MiB' if unit == 'mib' else unit} = {row['ratio']:.3f}"
    print(f"{label} {numbers}{interval}{limit_text}  {extra}{verdict}", flush=True)


def finish(args: argparse.Namespace, machine: str, **tables: list[dict]) -> int:
    """Writes the tables to `--json`. Returns the exit code: 1 if a row has failed."""
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, **tables}, indent=2), encoding="utf-8")
    return int(any(row["passed"] is False for rows in tables.values() for row in rows))


# Time


def clock(device: str) -> float:
    """Seconds, once the device has finished what was started."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], object], device: str) -> float:
    """Time of one call, until the device has finished it."""
    start = clock(device)
    function()
    return clock(device) - start


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int, device: str
) -> dict[str, list[float]]:
    """Times of `pairs` calls of each, in turn, so that disturbances of the machine affect both."""
    functions, times = {"ours": ours, "theirs": theirs}, {"ours": [], "theirs": []}
    for pair in range(pairs + 1):
        # In alternating order, so that neither always runs on the other's caches; the first pair is the warm-up.
        for which in ("ours", "theirs") if pair % 2 else ("theirs", "ours"):
            elapsed = seconds(functions[which], device)
            if pair:
                times[which].append(elapsed)
    return times


def bootstrap_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(values, size=(10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ratios(times: Mapping[str, list[float]], calls: int = 1) -> dict[str, float]:
    """Median times of one of `calls` calls in ms, the median of the ratios ours / theirs, and its 95% interval."""
    pairwise = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
    low, high = bootstrap_interval(pairwise)
    return {
        "ours_ms": 1000 * statistics.median(times["ours"]) / calls,
        "theirs_ms": 1000 * statistics.median(times["theirs"]) / calls,
        "ratio": statistics.median(pairwise),
        "low": low,
        "high": high,
    }


# Memory


def peak_bytes(device: str) -> int:
    """Peak memory of this process so far: allocated on CUDA, else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`: on Linux a new process starts with the peak of the one that started it.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_python(*arguments: object, env: Mapping[str, str] | None = None) -> str:
    """Returns what a fresh Python process prints."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


def compare_peaks(
    script: str, args: argparse.Namespace, ours: Sequence[str], theirs: Sequence[str]
) -> dict[str, float]:
    """
    Median peaks in MiB, over `--memory_runs` processes each, that a script prints with `--memory_of` and the words
    `ours` or `theirs`; and their ratio.
    """
    options = ("--device", args.device, "--batch_size", args.batch_size, "--threads", torch.get_num_threads())

    def peak(words: Sequence[str]) -> float:
        runs = [run_python(script, *options, "--memory_of", *words) for _ in range(args.memory_runs)]
        return statistics.median(int(output.split()[-1]) for output in runs) / 2**20

    peaks = {"ours_mib": peak(ours), "theirs_mib": peak(theirs)}
    return {**peaks, "ratio": peaks["ours_mib"] / peaks["theirs_mib"]}


# Quality


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def class_labels_for(pipe: ADMPipeline, data: datasets.Dataset, id2label: Mapping[int, str]) -> list[int]:
    """The class of each image, as the pipeline numbers the class of that name."""
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
