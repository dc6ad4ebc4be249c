"""A failure in a validation or a plot costs neither the run nor its weights, in all four scripts."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_distributed
from runs import (
    EMOJI,
    SHORT_RUN,
    assert_same_state,
    bit_by_bit,
    flags,
    own_process_state,
    read_metrics,
    reset_accelerate,
    save_base,
)
from safetensors.torch import load_file
from scripts import load_script
from toy_models import TOY_CLASSIFIER_CONFIG, TOY_CONFIG, random_unet

from diffusers_adm.commands.errors import CommandError, run_command
from diffusers_adm.training import find_latest_checkpoint
from diffusers_adm.training import run as training_run


# The function that makes the validation images, or the measurements; the one that plots; and where the weights go.
SCRIPTS = {
    "train_adm": ("sample_grid", "plot_loss_curves", "unet"),
    "train_classifier": ("evaluate", "plot_classifier_curves", "classifier"),
    "train_controlnet": ("control_grid", "plot_loss_curves", "."),
    "train_super_resolution": ("super_resolution_grid", "plot_loss_curves", "unet"),
}


def plotter(name):
    """The module whose function plots the curves."""
    return LOADED[name] if name == "train_classifier" else training_run


def arguments_of(name, folder):
    """Three steps with validations after the first and the second, and at the end; checkpoints after each."""
    folder.mkdir(exist_ok=True)
    config = folder / "model.json"
    arguments = SHORT_RUN | {
        "data_files": EMOJI,
        "max_train_samples": 16,
        "max_train_steps": 3,
        "validation_steps": 1,
        "checkpointing_steps": 1,
        "learning_rate": 1e-2,
        "use_ema": True,
        "output_dir": str(folder / "run"),
        "resolution": 8,
    }
    if name == "train_classifier":
        config.write_text(json.dumps(TOY_CLASSIFIER_CONFIG | {"num_classes": 9}))
        for argument in ("num_validation_images", "validation_num_inference_steps"):
            del arguments[argument]
        arguments |= {"label_column": "label", "validation_data_files": EMOJI, "max_validation_samples": 8}
    elif name == "train_controlnet":
        base = save_base(folder / "base", random_unet())
        return arguments | {"pretrained_model_name_or_path": base, "condition": "low_resolution"}
    else:
        upsampler = {"in_channels": 6, "low_res_size": 4} if name == "train_super_resolution" else {}
        low_res_size = upsampler.pop("low_res_size", None)
        config.write_text(json.dumps(TOY_CONFIG | upsampler))
        if low_res_size:
            arguments |= {"low_res_size": low_res_size, "min_image_size": 1}
    return arguments | {"model_config_name_or_path": str(config)}


def train(name, **arguments):
    reset_accelerate()
    script = load_script(name) if name not in LOADED else LOADED[name]
    script.main(flags(**arguments))


LOADED = {}


@pytest.fixture(params=SCRIPTS)
def run(request, monkeypatch, tmp_path):
    """Name, module and arguments of each script."""
    name = request.param
    LOADED[name] = load_script(name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if name != "train_classifier":  # where the plots are tested
        monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)
    with own_process_state(name):
        yield name, LOADED[name], arguments_of(name, tmp_path)
    LOADED.clear()


def saved(name, folder):
    return load_file(Path(folder, SCRIPTS[name][2], "diffusion_pytorch_model.safetensors"))


def fail(*args, **kwargs):
    raise ValueError("it cannot be shown")


class TestFailures:
    def test_in_every_validation(self, run, monkeypatch, caplog, tmp_path, capsys):
        """The run goes on, with its own weights and not the averaged ones; the result is saved, and the exit code 1."""
        name, script, arguments = run
        train(name, **arguments)
        folder, other = arguments["output_dir"], str(tmp_path / "other")
        caplog.clear()
        monkeypatch.setattr(script, SCRIPTS[name][0], fail)
        with pytest.raises(CommandError) as caught:
            train(name, **arguments | {"output_dir": other})
        assert "The last validation has failed" in str(caught.value)
        assert f"saved in {other}" in str(caught.value)
        with pytest.raises(SystemExit) as end:
            run_command(lambda: (_ for _ in ()).throw(caught.value))
        assert end.value.code == 1
        capsys.readouterr()
        failures = [record for record in caplog.records if "alidation" in record.message and record.exc_info]
        assert [f"step {step} " in record.message for step, record in enumerate(failures, 1)] == [True] * 3
        assert all("it cannot be shown" in str(record.exc_info[1]) for record in failures)
        with bit_by_bit():  # the same run on the same machine
            assert_same_state(saved(name, folder), saved(name, other))
            assert_same_state(
                load_file(Path(folder, "checkpoint-3", "model.safetensors")),
                load_file(Path(other, "checkpoint-3", "model.safetensors")),
            )
            rows = [[row for row in read_metrics(place) if "loss" in row] for place in (folder, other)]
            assert rows[0] == rows[1]

    def test_in_the_plots(self, run, monkeypatch, caplog):
        name, script, arguments = run
        monkeypatch.setattr(plotter(name), SCRIPTS[name][1], fail)
        with pytest.raises(CommandError, match="saved in"):
            train(name, **arguments | {"max_train_steps": 1})
        assert saved(name, arguments["output_dir"])

    def test_only_before_the_last_one(self, run, monkeypatch):
        """A validation that fails on the way and works at the end is in the log, and the run succeeds."""
        name, script, arguments = run
        works, calls = getattr(script, SCRIPTS[name][0]), []

        def fail_at_first(*args, **kwargs):
            calls.append(None)
            return fail() if len(calls) == 1 else works(*args, **kwargs)

        monkeypatch.setattr(script, SCRIPTS[name][0], fail_at_first)
        train(name, **arguments | {"max_train_steps": 2})
        assert saved(name, arguments["output_dir"])


# The classifier is validated on all processes together.


def validate_with_a_failure(folder):
    """One of two processes fails in the first validation; returns the number of validations of this process."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    script = load_script("train_classifier")
    evaluate, calls = script.evaluate, []

    def fail_at_first(*args, **kwargs):
        calls.append(None)
        if len(calls) == 1 and os.environ["RANK"] == "1":
            fail()
        return evaluate(*args, **kwargs)

    script.evaluate = fail_at_first
    arguments = arguments_of("train_classifier", Path(folder)) | {"max_train_steps": 2}
    script.main(flags(**arguments))
    return len(calls)


def test_on_one_of_two_processes(tmp_path):
    assert run_distributed(validate_with_a_failure, str(tmp_path)) == [2, 2]
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "validation_loss" in row] == [2]
    assert saved("train_classifier", tmp_path / "run")


def test_a_run_killed_between_checkpoint_and_validation_catches_up(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    name = "train_classifier"
    with own_process_state(name):
        LOADED[name] = script = load_script(name)
        arguments = arguments_of(name, tmp_path)
        train(name, **arguments)

        def die(*args, **kwargs):
            raise KeyboardInterrupt

        evaluate, other = script.evaluate, str(tmp_path / "other")
        monkeypatch.setattr(script, "evaluate", die)
        with pytest.raises(KeyboardInterrupt):
            train(name, **arguments | {"output_dir": other})
        assert find_latest_checkpoint(other) == str(Path(other, "checkpoint-1"))
        monkeypatch.setattr(script, "evaluate", evaluate)
        train(name, **arguments | {"output_dir": other}, resume_from_checkpoint="latest")
        rows = read_metrics(other)
        with bit_by_bit():
            assert rows == read_metrics(arguments["output_dir"])
        # A validation that is in the log is not repeated.
        train(name, **arguments | {"output_dir": other}, resume_from_checkpoint="latest")
        assert read_metrics(other) == rows
        LOADED.clear()


# The original failure: conditioning images of 0 and 1 in 8 bits.


def test_conditions_of_zeros_and_ones(tmp_path, monkeypatch, caplog):
    import datasets

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    generator = np.random.default_rng(0)
    pictures = {
        column: [Image.fromarray(generator.integers(0, top, (8, 8, 3), dtype=np.uint8)) for _ in range(8)]
        for column, top in (("image", 256), ("mask", 2))
    }
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict(pictures, features=features).to_parquet(tmp_path / "images.parquet")
    name = "train_controlnet"
    with own_process_state(name):
        LOADED[name] = load_script(name)
        monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)
        arguments = arguments_of(name, tmp_path) | {"data_files": str(tmp_path / "images.parquet")}
        del arguments["condition"]
        train(name, **arguments | {"conditioning_image_column": "mask", "max_train_steps": 1})
        # Nearly black images are no error, even if all values are below 2.
        arguments |= {"image_column": "mask", "condition": "color_blocks", "output_dir": str(tmp_path / "dark")}
        train(name, **arguments | {"max_train_steps": 1})
        LOADED.clear()
    assert saved(name, tmp_path / "run")
    assert saved(name, tmp_path / "dark")
    assert "The conditioning images range from 0 to 1 and fill 0.4% of 0 to 255" in caplog.text
    assert "pass `--condition_value_range auto` or `--condition_value_range 0 1`" in caplog.text
    assert "pass `--value_range auto` or `--value_range 0 1`" in caplog.text  # in the second run


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_that_cannot_be_made_is_told_before_the_work(name, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = arguments_of(name, tmp_path / "run") | {"output_dir": str(tmp_path / "file" / "run")}
    with pytest.raises(ValueError, match="`output_dir` is .*file is not a directory. Name another folder"):
        train(name, **arguments)
