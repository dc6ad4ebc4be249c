"""Helpers for tests of the training scripts: starting runs, reading and comparing their files."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from processes import free_port, run_script
from safetensors.torch import load_file
from scripts import REPOSITORY
from toy_models import random_text_encoder, toy_tokenizer

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.training.reproducibility import operations_that_depend_on_memory


CONFIGS = REPOSITORY / "training" / "configs"
EMOJI = str(REPOSITORY / "data" / "noto-emoji-32" / "test.parquet")  # 163 images in 9 classes
# Two steps, which leave all that a long run leaves.
SHORT_RUN = {
    "max_train_steps": 2,
    "train_batch_size": 8,
    "lr_warmup_steps": 0,
    "logging_steps": 1,
    "num_validation_images": 2,
    "validation_num_inference_steps": 2,
    "report_to": "none",
}


# What a row of metrics says of the speed of the run.
SPEED = ("images_per_second", "tflops_per_second", "mfu")


def flags(**arguments):
    words = []
    for name, value in arguments.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def save_base(folder, unet, kind=None, id2label=None, **scheduler):
    """
    A pipeline to fine-tune, with a toy text encoder of `kind`, or without any; names of its classes; arguments of its
    scheduler.
    """
    ADMPipeline(
        unet=unet,
        scheduler=LearnedVarianceDDPMScheduler(**scheduler),
        vae=None,
        text_encoder=random_text_encoder(kind) if kind else None,
        tokenizer=toy_tokenizer(kind) if kind else None,
        classifier=None,
        id2label=id2label,
    ).save_pretrained(folder)
    return str(folder)


def write_class_folders(root, counts, size=(8, 8), color=None):
    """PNG files of noise, or of one colour, in one folder a class."""
    generator = np.random.default_rng(sum(counts.values()))
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            if color is not None:
                pixels[:] = color[name]
            Image.fromarray(pixels).save(root / name / f"{index:02d}.png")
    return str(root)


def reset_accelerate():
    """A run in this process starts as in a new one, without Accelerate's singletons."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@contextlib.contextmanager
def own_process_state(script):
    """For scripts that run in this process: Accelerate's singletons and the verbosity of libraries are put back."""
    levels = {name: logging.getLogger(name).level for name in (script, "diffusers_adm")}
    verbosity = datasets.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    try:
        yield
    finally:
        reset_accelerate()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        datasets.utils.logging.set_verbosity(verbosity[0])
        transformers.utils.logging.set_verbosity(verbosity[1])


def launch(script, arguments, folder):
    """
    A script in two processes on the CPU, from this folder; what it printed. They are forked from a server, which is
    much faster than `accelerate launch`; `test_train_adm.py` starts that.
    """
    return run_script(script, flags(**arguments), Path(folder) / "printed.log", num_processes=2, folder=folder)


def accelerate_launch(script, arguments, folder, environment=os.environ):
    """The same by `accelerate launch`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    command += ["--config_file", str(CONFIGS / "accelerate_two_cpu_processes.yaml")]
    command += [str(REPOSITORY / "training" / f"{script}.py"), *flags(**arguments)]
    environment = {**environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def read_metrics(folder, without=SPEED):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in without} for row in rows]


def assert_same_state(first, second, path=""):
    """Bit by bit, through dicts and lists."""
    assert type(first) is type(second), path
    if torch.is_tensor(first):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_same_state(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same_state(*pair, f"{path}/{index}")
    else:
        assert first == second, path


@contextlib.contextmanager
def bit_by_bit():
    """A difference fails, except on a machine that cannot keep bits, as a run says in its log: there it skips."""
    try:
        yield
    except AssertionError:
        if found := operations_that_depend_on_memory():
            pytest.skip(f"this machine cannot resume bit by bit: {', '.join(found)} depend on memory addresses")
        raise


@bit_by_bit()
def assert_same_checkpoint(first, second):
    """Two checkpoint folders: weights, optimizer, learning rate, whatever is registered; the result and its average."""
    files = sorted(str(path.relative_to(first)) for path in Path(first).rglob("*") if path.is_file())
    assert files == sorted(str(path.relative_to(second)) for path in Path(second).rglob("*") if path.is_file())
    for name in files:
        # The states of generators do not matter: each micro-step seeds them again.
        if name.startswith("random_states"):
            continue
        if name.endswith(".safetensors"):
            assert_same_state(*(load_file(Path(folder, name)) for folder in (first, second)), name)
        elif name in ("run_record.json", "run_state.json"):
            assert_same_state(*(json.loads(Path(folder, name).read_text()) for folder in (first, second)), name)
