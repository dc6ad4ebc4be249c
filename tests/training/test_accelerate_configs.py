"""Accelerate's config files, by its own loader and the checks of its launcher; and engines that it would ignore."""

import importlib.util
import os

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from processes import run_distributed
from runs import CONFIGS, reset_accelerate

from diffusers_adm.training import TrainingArguments
from diffusers_adm.training.setup import start_accelerator


FILES = sorted(CONFIGS.glob("accelerate_*.yaml"))
KINDS = {
    "accelerate_eight_gpus": ("MULTI_GPU", 8),
    "accelerate_fsdp2": ("FSDP", 8),
    "accelerate_one_gpu": ("NO", 1),
    "accelerate_single_process": ("NO", 1),
    "accelerate_two_cpu_processes": ("MULTI_GPU", 2),
    "accelerate_two_nodes": ("MULTI_GPU", 16),
    "accelerate_zero2": ("DEEPSPEED", 8),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_knows_every_key(file):
    loaded = load_config_from_file(str(file))
    assert (loaded.distributed_type.value, loaded.num_processes) == KINDS[file.stem]
    parser = launch_command_parser()
    known = vars(parser.parse_args(["train.py"]))
    for name, section in yaml.safe_load(file.read_text()).items():
        # The launcher would take over the keys of a section without looking at them.
        unknown = [key for key in section if key not in known] if isinstance(section, dict) else []
        assert not unknown, name
    arguments = parser.parse_args(["--config_file", str(file), "train.py"])
    arguments.nondefault = set()
    _validate_launch_command(arguments)
    assert arguments.use_fsdp == (loaded.distributed_type.value == "FSDP")
    assert arguments.num_processes == loaded.num_processes
    if arguments.use_fsdp:
        assert (arguments.fsdp_version, arguments.fsdp_cpu_ram_efficient_loading) == (2, False)
    if arguments.use_deepspeed:
        assert (arguments.zero_stage, arguments.gradient_accumulation_steps) == (2, "auto")


def start(environment, folder):
    os.environ |= environment
    with pytest.raises(ValueError, match="Accelerate is configured for") as caught:
        start_accelerator(TrainingArguments(output_dir=folder, report_to="none"), "test")
    return str(caught.value)


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed, as Accelerate says by itself"
)


@pytest.mark.parametrize("name", ["FSDP", pytest.param("DEEPSPEED", marks=needs_deepspeed)])
def test_without_gpus_the_engine_is_refused_by_name(name, tmp_path):
    """Accelerate 1.15 runs plain data parallelism then, without a word."""
    for message in run_distributed(start, {f"ACCELERATE_USE_{name}": "true"}, str(tmp_path)):
        assert message.startswith(f"Accelerate is configured for {name}, but runs 2 process(es) on cpu without it")
        assert "accelerate_two_cpu_processes.yaml" in message


def test_so_it_is_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    try:
        with pytest.raises(ValueError, match="configured for FSDP, but runs 1 process"):
            start_accelerator(TrainingArguments(output_dir=str(tmp_path), report_to="none"), "test")
    finally:
        reset_accelerate()
