"""Shared code of the benchmarks: command line, output, alternating pairs, peak memory, samples and their measures."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import diffusers
import numpy as np
import torch
from PIL import Image

from diffusers_adm import AdaGNClassifierModel, ADMPipeline
from diffusers_adm.conditioning.latents import LatentSpace
from diffusers_adm.data.columns import first_caption
from diffusers_adm.evaluation import ClassifierFeatures
from diffusers_adm.evaluation.data import num_real_classes
from diffusers_adm.training import decode_rgb, labelled_grid, load_image_dataset, match_classes
from diffusers_adm.training.reproducibility import describe_machine as describe_cpu


if TYPE_CHECKING:
    import datasets

K = TypeVar("K")
EMOJI = "data/noto-emoji-32"
# Mean squared error of rounding to 8 bits, for images in [0, 1]: a PSNR above 58.9 dB is meaningless.
SMALLEST_MSE = 1 / (12 * 255**2)
# What /proc/cpuinfo calls the instructions of 16-bit arithmetic: x86's, then ARM's.
CPU_FEATURES = ("avx512_bf16", "amx_bf16", "avx512_fp16", "bf16", "asimdhp")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "device": {"choices": ("cpu", "cuda")},
    "pairs": {"type": int, "help": "Timed pairs per row; 0: skip them."},
    "memory_runs": {"type": int, "help": "Processes per peak; the median counts. 0: skip."},
    "threads": {"type": int, "help": "CPU threads of torch; default: its own choice."},
    "json": {"type": Path, "help": "Write all numbers to this file."},
    "models": {"type": Path, "help": "Folder of the demonstration models."},
    "model": {"required": True, "help": "Pipeline: a folder or a Hub repository."},
    "pipeline": {"required": True, "help": "Base pipeline: a folder or a Hub repository."},
    "controlnet": {"required": True, "help": "ControlNet: a folder or a Hub repository."},
    "judge": {"required": True, "help": "Classifier that measures: a folder with the subfolder `classifier`."},
    "data_files": {"required": True, "nargs": "+", "help": "Held-out images: Parquet files."},
    "label_column": {"help": "Column of the classes."},
    "caption_column": {"help": "Column of the captions, for text-conditional models."},
    "output_dir": {"required": True, "type": Path, "help": "Folder of the results."},
    "output": {"required": True, "help": "File of the figure."},
    "num_images": {"type": int, "help": "Number of images, spread over the data; default: all."},
    "num_shown": {"type": int, "help": "Images in the figure."},
    "noise_level": {"type": int, "help": "Noise level of the small image; default: the pipeline's."},
    "seed": {"type": int, "help": "Random seed of the first image; the others follow."},
    "scale": {"type": int, "help": "Magnification."},
}


# Command line and output


def make_parser(doc: str, *names: str, **defaults: Any) -> argparse.ArgumentParser:
    """
    Command line with arguments of `ARGUMENTS`: those of `names`, and those of `defaults` with these defaults. Other
    names in `defaults` become arguments of the type of their default.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (dict.fromkeys(names) | defaults).items():
        parser.add_argument(f"--{name}", default=default, **ARGUMENTS.get(name, {"type": type(default)}))
    return parser


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those of `CPU_FEATURES` that the processor has, as far as the system tells: Linux only, else none."""
    if not cpuinfo.exists():
        return []
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    flags = {flag for key, _, value in lines if key.strip().lower() in ("flags", "features") for flag in value.split()}
    return [feature for feature in CPU_FEATURES if feature in flags]


def describe_machine(device: str = "cpu") -> str:
    """Device, instruction set of torch and of 16-bit arithmetic, threads, and versions, in one line."""
    versions = f"diffusers {diffusers.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; torch {torch.__version__}, {versions}"
    features = ", ".join(cpu_features()) or "none"
    return f"{describe_cpu()}; 16-bit instructions: {features}; {versions}"


def write_report(path: Path | None, args: argparse.Namespace, **content: Any) -> None:
    """Writes settings, machine and results as JSON, if a path is given."""
    if path is not None:
        machine = describe_machine(vars(args).get("device", "cpu"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"settings": vars(args), "machine": machine, **content}, indent=2, default=str) + "\n"
        )


def finish(args: argparse.Namespace, **tables: list[dict]) -> int:
    """Writes the tables to `--json`. Returns the exit code: 1 if a row has failed."""
    write_report(args.json, args, **tables)
    return int(any(row["passed"] is False for rows in tables.values() for row in rows))


def measure_rows(
    columns: Sequence[str],
    cases: Iterable[Sequence[str]],
    measure: Callable[..., dict],
    args: argparse.Namespace,
    unit: str = "ms",
) -> list[dict]:
    """
    Measures a row per case and prints `words ours / theirs = ratio [95% interval] (limit)  note  verdict`.

    Args:
        columns (sequence of `str`): Names of the words of a case in the rows.
        cases (iterable of sequences of `str`): The cases; those that lack a word of `--only` are skipped.
        measure (`Callable`): `measure(args, *words)` returns `ours_UNIT`, `theirs_UNIT`, `ratio`, `limit`, `passed`,
            which may be None, and optionally `low`, `high` and `note`.
    """
    cases = [words for words in cases if set(vars(args).get("only", ())) <= set(words)]
    widths, rows = [max(map(len, words)) for words in zip(*cases, strict=True)], []
    for words in cases:
        row = measure(args, *words)
        note = row.pop("note", "")
        rows.append(dict(zip(columns, words, strict=True)) | row)
        label = " ".join(word.ljust(width) for word, width in zip(words, widths, strict=True))
        digits = 3 if unit == "ms" and row["theirs_ms"] < 10 else 1
        ours, theirs = (f"{row[f'{which}_{unit}']:8.{digits}f}" for which in ("ours", "theirs"))
        interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else ""
        limit = "" if row["limit"] is None else f" (limit {row['limit']})"
        verdict = {True: "ok", False: "FAILED", None: ""}[row["passed"]]
        numbers = f"{ours} / {theirs} {'MiB' if unit == 'mib' else unit} = {row['ratio']:.3f}{interval}{limit}"
        print(f"{label} {numbers}  {note}{verdict}", flush=True)
    return rows


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """
    A table for the documentation.

    Args:
        rows (sequence of `dict`): Its rows.
        columns (`dict`): From the titles to format strings that a row fills, e.g. `"{ratio:.2f}"`. A cell for which a
            row lacks a value is empty.
    """

    def cell(template: str, row: Mapping[str, Any]) -> str:
        try:
            return template.format(**row)
        except (KeyError, TypeError):  # a missing value, or None where a number is formatted
            return ""

    cells = [list(columns), ["---"] * len(columns), *([cell(t, row) for t in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def make_image(seed: int, size: int, channels: int, dtype: type) -> np.ndarray:
    """Waves with noise of 2% of the range, `(size, size, channels)`."""
    generator = np.random.default_rng(seed)
    x = np.linspace(0, 12, size)
    waves = np.sin(x[:, None, None] + x[None, :, None] * generator.random(channels))
    values = 0.5 + 0.45 * waves + 0.02 * generator.standard_normal((size, size, channels))
    high = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    return (values.clip(0, 1) * high).astype(dtype)


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
    """Times of `pairs` calls of each, in turn, after one call of each as the warm-up."""
    functions = {"ours": ours, "theirs": theirs}
    round_robin(functions, 1, device)
    return round_robin(functions, pairs, device)


def round_robin(
    functions: Mapping[K, Callable[[], object]], rounds: int, device: str, max_seconds: float = math.inf
) -> dict[K, list[float]]:
    """
    Times of `rounds` calls of each function, all in turn, so that disturbances of the machine affect all. Every other
    round goes backwards, so that none always runs on the same one's caches. The caller has warmed them up. After
    `max_seconds`, no further round begins.
    """
    times: dict[K, list[float]] = {name: [] for name in functions}
    begun = clock(device)
    for i in range(rounds):
        if clock(device) - begun > max_seconds:
            print(f"stopped after {i} rounds (`--max_seconds`)")
            break
        for name in list(functions)[:: 1 if i % 2 else -1]:
            times[name].append(seconds(functions[name], device))
    return times


def median_with_interval(values: list[float], level: float = 0.95) -> tuple[float, float, float]:
    """Median, and its bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, size=(10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return statistics.median(values), float(low), float(high)


def ratios(times: Mapping[str, list[float]], calls: int = 1) -> dict[str, float]:
    """Median times of one of `calls` calls in ms, the median of the ratios ours / theirs, and its 95% interval."""
    ratio, low, high = median_with_interval([a / b for a, b in zip(times["ours"], times["theirs"], strict=True)])
    medians = {f"{which}_ms": 1000 * statistics.median(values) / calls for which, values in times.items()}
    return {**medians, "ratio": ratio, "low": low, "high": high}


# Memory and processes


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


def in_fresh_process(function: Callable, *arguments: object) -> Any:
    """Calls a function of a module in a new Python process with as many threads of torch as this one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(function, *arguments).result()


def compare_peaks(
    peak: Callable[..., int], args: argparse.Namespace, ours: Sequence[str], theirs: Sequence[str]
) -> dict[str, float]:
    """Medians of `peak(args, *ours)` and `peak(args, *theirs)` over `--memory_runs` processes, in MiB; their ratio."""
    row = {}
    for which, words in (("ours_mib", ours), ("theirs_mib", theirs)):
        peaks = [in_fresh_process(peak, args, *words) for _ in range(args.memory_runs)]
        row[which] = statistics.median(peaks) / 2**20
    return {**row, "ratio": row["ours_mib"] / row["theirs_mib"]}


# Samples


def quiet(pipe: ADMPipeline) -> ADMPipeline:
    """Turns off the progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_held_out(
    args: argparse.Namespace, size: int
) -> tuple[datasets.Dataset, dict[int, str] | None, list[Image.Image]]:
    """`--num_images` examples of `--data_files`, spread over the data, the names of classes, and the resized images."""
    data, id2label = load_image_dataset(
        data_files=args.data_files, label_column=args.label_column, caption_column=args.caption_column
    )
    data = data.select(spread(len(data), args.num_images))
    return data, id2label, [decode_rgb(image).resize((size, size), Image.Resampling.BICUBIC) for image in data["image"]]


def spread(length: int, number: int | None) -> list[int]:
    """At most `number` evenly spaced indices; all for None."""
    number = min(number or length, length)
    return [length * i // number for i in range(number)]


def conditions_of(pipe: ADMPipeline, data: datasets.Dataset, id2label: Mapping[int, str] | None) -> dict[str, list]:
    """Captions of the images and their classes, as the pipeline numbers them, as far as data and pipeline have them."""
    conditions = {}
    if pipe.has_cross_attention and "caption" in data.column_names:
        conditions["prompt"] = [first_caption(caption) for caption in data["caption"][:]]
    if id2label and pipe.unet.config.num_class_embeds is not None:
        to_class = match_classes(id2label, pipe.id2label, num_real_classes(pipe.unet.config), by_number=True)
        conditions["class_labels"] = [to_class[label] for label in data["label"][:]]
    return conditions


def seeded(first_seed: int, number: int) -> list[torch.Generator]:
    """Generators with consecutive seeds, one per image."""
    return [torch.Generator().manual_seed(first_seed + i) for i in range(number)]


def sample(
    pipe: ADMPipeline,
    args: argparse.Namespace,
    inputs: Mapping[str, Sequence[Any]],
    generators: list[torch.Generator] | None = None,
    **options: Any,
) -> list[Image.Image]:
    """
    Generates images, with steps, guidance scale and batch size of the command line, as far as it has them.

    Args:
        pipe (`ADMPipeline`): The pipeline.
        args (`argparse.Namespace`): The command line.
        inputs (mapping): Arguments of the pipeline with one entry per image.
        generators (list of `torch.Generator`, *optional*): One per image; default: consecutive seeds from `--seed`.
        **options: Arguments that are the same for all images.
    """
    settings, number = vars(args), len(next(iter(inputs.values())))
    options = {name: settings[name] for name in ("num_inference_steps", "guidance_scale") if name in settings} | options
    generators, images = generators or seeded(args.seed, number), []
    batch_size = settings.get("batch_size", number)
    for start in range(0, number, batch_size):
        batch = slice(start, start + batch_size)
        arguments = {name: values[batch] for name, values in inputs.items()}
        images += pipe(**arguments, generator=generators[batch], **options).images
    return images


@torch.no_grad()
def reconstruct(pipe: ADMPipeline, images: list[Image.Image]) -> list[Image.Image]:
    """The images encoded and decoded by the autoencoder of a pipeline."""
    space, results = LatentSpace(pipe.vae), []
    for start in range(0, len(images), 50):
        pixels = pipe.image_processor.preprocess(images[start : start + 50])
        results += pipe.image_processor.postprocess(space.decode(space.encode(pixels)), output_type="pil")
    return results


def read_samples(folder: Path, number: int) -> list[Image.Image]:
    """The first images of a folder that `sample_images` has written."""
    return [Image.open(folder / f"{i:06d}.png") for i in range(number)]


def grid_of_columns(
    columns: Iterable[tuple[str, Sequence[Image.Image]]], row_labels: Sequence[str] | None = None, **options: int
) -> Image.Image:
    """Arranges columns of images below their labels; options as for `labelled_grid`."""
    labels, images = zip(*columns, strict=True)
    cells = [image for row in zip(*images, strict=True) for image in row]
    return labelled_grid(cells, len(images[0]), len(labels), row_labels, labels, **options)


# Quality


def mean_and_error(values: Sequence[float] | np.ndarray | torch.Tensor) -> tuple[float, float]:
    """Mean and standard error."""
    values = np.asarray(values)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def with_errors(**values: tuple[float, float]) -> dict[str, float]:
    """`name` and `name_error` of each pair."""
    return {f"{name}{end}": x for name, pair in values.items() for end, x in zip(("", "_error"), pair, strict=True)}


def pixels_of(images: Sequence[Image.Image]) -> torch.Tensor:
    """`(N, 3, height, width)`, uint8."""
    return torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


def to_images(images: torch.Tensor) -> list[Image.Image]:
    """From 8-bit values scaled to [-1, 1]."""
    arrays = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`(N,)` in dB, for values in [0, 1]."""
    mse = ((images - others) ** 2).mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp(min=SMALLEST_MSE))


def load_judge(folder: str, variant: str | None = None) -> ClassifierFeatures:
    return ClassifierFeatures(AdaGNClassifierModel.from_pretrained(folder, subfolder="classifier", variant=variant))


def features_and_classes(judge: ClassifierFeatures, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of images, `(N, channels)`, and the predicted classes, `(N,)`."""
    features, logits = zip(*(judge(batch) for batch in pixels_of(images).split(64)), strict=True)
    return torch.cat(features), torch.cat(logits).argmax(dim=1)
