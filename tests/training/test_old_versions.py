"""Files of version 0.1.0-dev (tests/old_versions/README.md) still load, and its runs are resumed to the end."""

import shutil

import pytest
import torch
import yaml
from runs import flags, own_process_state, read_metrics, reset_accelerate
from safetensors.torch import load_file
from scripts import REPOSITORY, load_script

from diffusers_adm import AdaGNControlNetModel, ADMControlNetPipeline, ADMPipeline
from diffusers_adm.training import parse_args
from diffusers_adm.training import run as training_run


OLD = REPOSITORY / "tests" / "old_versions" / "0.1.0-dev"
SCRIPTS = {"adm": "train_adm", "lora": "train_adm", "controlnet": "train_controlnet"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # the paths in the records are relative to it
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere


def generate(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline("a cat", class_labels=1, num_inference_steps=2, generator=generator, **arguments).images
    assert images[0].size == (8, 8)
    return images[0].tobytes()


def test_pipeline_and_adapter_load():
    pipeline = ADMPipeline.from_pretrained(OLD / "adm")
    assert pipeline.id2label[0] == "Activities"
    plain = generate(pipeline, guidance_scale=2.0)
    pipeline.load_lora_weights(OLD / "lora")
    assert pipeline.unet.peft_config["default_0"].r == 1
    assert len(plain) == len(generate(pipeline, guidance_scale=2.0))


def test_controlnet_loads():
    controlnet = AdaGNControlNetModel.from_pretrained(OLD / "controlnet")
    pipeline = ADMControlNetPipeline(**ADMPipeline.from_pretrained(OLD / "adm").components, controlnet=controlnet)
    assert generate(pipeline, image=torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize("folder", SCRIPTS)
def test_recipes_are_read(folder):
    recipe = OLD / folder / "train_args.yaml"
    arguments = parse_args(load_script(SCRIPTS[folder]).ARGUMENT_TYPES, ["--config", str(recipe)])
    values = {name: value for args in arguments for name, value in vars(args).items() if name != "hub_token"}
    expected = yaml.safe_load(recipe.read_text())
    assert {name: value for name, value in values.items() if name in expected} == expected
    assert not any(value for name, value in values.items() if name not in expected)  # newer arguments are None or False


@pytest.mark.parametrize("folder", SCRIPTS)
def test_runs_are_resumed(folder, tmp_path):
    """The step that follows is that of the old version: the same noise, dropout, loss, optimizer and average."""
    name = SCRIPTS[folder]
    shutil.copytree(OLD / folder / "checkpoint-1", tmp_path / "checkpoint-1")
    with own_process_state(name):
        reset_accelerate()
        load_script(name).main(flags(resume_from_checkpoint=tmp_path / "checkpoint-1"))
    (row,) = read_metrics(tmp_path)
    expected = read_metrics(OLD / folder)[-1]
    assert row == {key: pytest.approx(value, rel=1e-4) for key, value in expected.items()}
    close = []
    for path in (OLD / folder).rglob("*.safetensors"):
        if "checkpoint-1" in path.parts:
            continue
        old, new = load_file(path), load_file(tmp_path / path.relative_to(OLD / folder))
        assert list(old) == list(new)
        close += [torch.isclose(new[key], old[key], rtol=0, atol=1e-6).flatten() for key in old]
    # A step is 1e-3 long. Where a gradient is 0 up to rounding, Adam's step goes either way.
    assert torch.cat(close).float().mean() > 0.95
    assert (tmp_path / "checkpoint-2" / "run_record.json").is_file()
