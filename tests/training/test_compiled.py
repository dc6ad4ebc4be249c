"""Runs with compiled networks write the same files as others, and can be resumed with or without compilation."""

from pathlib import Path

import pytest
from runs import own_process_state, reset_accelerate, save_base
from safetensors.torch import load_file
from scripts import load_script
from test_failed_validation import SCRIPTS, arguments_of
from toy_models import random_unet

from diffusers_adm import ADMPipeline
from diffusers_adm.training import run as training_run


def names(folder):
    return {str(file.relative_to(folder)): sorted(load_file(file)) for file in Path(folder).rglob("*.safetensors")}


@pytest.mark.parametrize("case", ["train_adm", "train_classifier", "lora"])
def test_the_same_files_and_resumed(case, tmp_path, monkeypatch):
    name = "train_adm" if case == "lora" else case
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with own_process_state(name):
        script = load_script(name)
        plotter = script if name == "train_classifier" else training_run
        monkeypatch.setattr(plotter, SCRIPTS[name][1], lambda *args, **kwargs: None)  # slow, and tested elsewhere

        def train(folder, **changes):
            reset_accelerate()
            arguments = arguments_of(name, tmp_path / "files") | {"output_dir": str(tmp_path / folder)} | changes
            if case == "lora":
                base = save_base(tmp_path / "base", random_unet())
                arguments |= {"pretrained_model_name_or_path": base, "lora_rank": 2}
                del arguments["model_config_name_or_path"]
            words = [f"--{key}={value}" for key, value in arguments.items()]
            script.main(words)

        train("plain", max_train_steps=2)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # what `accelerate launch --dynamo_backend` sets
        train("compiled", max_train_steps=2)
        assert names(tmp_path / "compiled") == names(tmp_path / "plain")
        train("compiled", max_train_steps=3, resume_from_checkpoint="latest")
        if case == "lora":
            monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
            train("compiled", max_train_steps=4, resume_from_checkpoint="latest")
            pipe = ADMPipeline.from_pretrained(tmp_path / "base")
            pipe.load_lora_weights(str(tmp_path / "compiled"))
            assert pipe.unet.down_blocks[1].attentions[0].to_q.lora_B["default_0"].weight.abs().max() > 0
