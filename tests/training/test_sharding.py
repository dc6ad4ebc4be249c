"""
Runs with FSDP2 and ZeRO-2: the same losses, averages, checkpoints and results as with whole weights.

Without GPUs, Accelerate is told that it is configured for them (`sharded.py`), and runs its own code on two processes;
its own path from the config files needs two GPUs.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sharded
import torch
from processes import run_distributed
from runs import CONFIGS, EMOJI, SHORT_RUN, flags, read_metrics
from safetensors.torch import load_file
from scripts import REPOSITORY
from toy_clips import TOY_CLIP_CONFIG
from toy_models import TOY_CONFIG

from diffusers_adm import ADMPipeline
from diffusers_adm.training.run_state import read_state


RUN = SHORT_RUN | {"data_files": EMOJI, "power_ema_stds": 0.1, "learning_rate": 1e-3, "checkpointing_steps": 2}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (`pip install deepspeed`)"
)
ENGINES = ["join_fsdp2", pytest.param("join_zero2", marks=[needs_deepspeed, pytest.mark.slow])]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "model.json"
    path.write_text(json.dumps(TOY_CONFIG))
    return {"model_config_name_or_path": str(path)}


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a run of three steps in two processes with whole weights."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = RUN | config | {"max_train_steps": 3, "output_dir": folder}
    run_distributed(sharded.train, sharded.join_plain, "train_adm", flags(**arguments), timeout=300)
    return folder


def losses_of(folder):
    return [row["loss"] for row in read_metrics(folder)]


def assert_close(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    for name in first:
        # The gradients are added up in another order, and AdamW divides them by their size.
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_is_resumed_ends_like_one_with_whole_weights(engine, whole, config, tmp_path):
    arguments = RUN | config | {"output_dir": tmp_path, "resume_from_checkpoint": "latest"}
    for steps in (2, 3):
        join = getattr(sharded, engine)
        run_distributed(sharded.train, join, "train_adm", flags(**arguments | {"max_train_steps": steps}), timeout=300)
    assert losses_of(tmp_path) == pytest.approx(losses_of(whole), abs=1e-5)
    # The average, the power-function averages and their snapshots.
    names = ["unet/diffusion_pytorch_model.safetensors", "checkpoint-3/power_ema.safetensors"]
    names += [f"power_ema/step-{step:08d}-std-0.1.safetensors" for step in (2, 3)]
    for name in names:
        assert_close(tmp_path / name, whole / name)
    assert_close(tmp_path / "checkpoint-3/sharded_weights.safetensors", whole / "checkpoint-3/model.safetensors")
    # The result is a pipeline of this package, and loads in one process.
    for name in ("model_index.json", "unet/config.json"):
        assert (tmp_path / name).read_text() == (whole / name).read_text()
    pipe = ADMPipeline.from_pretrained(tmp_path)
    assert type(pipe.unet).__name__ == "AdaGNUNet2DModel"
    assert (tmp_path / "samples-0000003.png").is_file()
    if engine == "join_fsdp2":  # the optimizer state is whole, by the names of the weights
        states = read_state(tmp_path / "checkpoint-3", "sharded_optimizer")["state"]
        weights = load_file(tmp_path / "checkpoint-3/sharded_weights.safetensors")
        assert {name: state["exp_avg"].shape for name, state in states.items()} == {
            name: weight.shape for name, weight in weights.items()
        }


def refusal(join, script, argv):
    try:
        sharded.train(join, script, argv)
    except ValueError as error:
        return str(error)
    return None


def test_networks_that_cannot_be_split(config, tmp_path):
    clip = tmp_path / "clip.json"
    clip.write_text(json.dumps(TOY_CLIP_CONFIG))
    arguments = {"model_config_name_or_path": clip, "data_files": EMOJI, "caption_column": "text", "report_to": "none"}
    arguments |= {"tokenizer_name_or_path": REPOSITORY / "spaces" / "model" / "base", "output_dir": tmp_path / "run"}
    arguments |= {"max_train_steps": 1, "train_batch_size": 8}
    messages = run_distributed(refusal, sharded.join_fsdp2, "train_clip", flags(**arguments), timeout=300)
    assert all(re.search("FSDP cannot train CLIPModel: its 'logit_scale'", message) for message in messages)


def test_fp16_is_refused(config, tmp_path):
    arguments = RUN | config | {"output_dir": tmp_path, "mixed_precision": "fp16"}
    messages = run_distributed(refusal, sharded.join_fsdp2, "train_adm", flags(**arguments), timeout=300)
    assert all("fp16 was never tried with FSDP" in message for message in messages)


def test_a_checkpoint_of_another_engine_is_refused(whole, config, tmp_path):
    arguments = RUN | config | {"output_dir": tmp_path, "resume_from_checkpoint": whole / "checkpoint-3"}
    messages = run_distributed(
        refusal, sharded.join_fsdp2, "train_adm", flags(**arguments | {"max_train_steps": 4}), timeout=300
    )
    assert all("was not written by a run with FSDP" in message for message in messages)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="Accelerate splits weights on GPUs only; this needs two")
@pytest.mark.parametrize("name", ["accelerate_fsdp2", pytest.param("accelerate_zero2", marks=needs_deepspeed)])
def test_the_config_files_on_gpus(name, whole, config, tmp_path):
    arguments = RUN | config | {"output_dir": tmp_path, "max_train_steps": 3, "mixed_precision": "no"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    command += ["--num_processes", "2", str(REPOSITORY / "training" / "train_adm.py"), *flags(**arguments)]
    subprocess.run(command, check=True, timeout=600)
    assert losses_of(tmp_path) == pytest.approx(losses_of(whole), abs=1e-3)
    ADMPipeline.from_pretrained(tmp_path)
    assert Path(tmp_path, "checkpoint-3", "sharded_weights.safetensors").is_file()
