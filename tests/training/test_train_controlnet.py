"""training/train_controlnet.py: the base stays, the ControlNet is trained, resumed and loaded; what is refused."""

import json
import os
import time
from pathlib import Path
from typing import get_args, get_type_hints

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from processes import kill_distributed, run_distributed
from runs import (
    CONFIGS,
    EMOJI,
    SHORT_RUN,
    assert_same_checkpoint,
    assert_same_state,
    flags,
    launch,
    own_process_state,
    read_metrics,
    reset_accelerate,
    save_base,
)
from safetensors.torch import load_file
from scripts import REPOSITORY, load_script
from tolerances import NETWORK, gradient_errors, rounding_errors
from toy_models import fill_randomly, random_diffusers_unet, random_text_unet, random_unet

from diffusers_adm import AdaGNControlNetModel, ADMControlNetPipeline, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.control_images import CONDITIONS, make_condition
from diffusers_adm.schedulers.noise_schedules import noise_schedule_of
from diffusers_adm.training import diffusion, find_latest_checkpoint, parse_args, validation
from diffusers_adm.training import run as training_run
from diffusers_adm.training.run_state import read_state


train_controlnet = load_script("train_controlnet")

CLASSES = {"num_class_embeds": 10, "null_class_id": 9}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_controlnet"):
        yield


@pytest.fixture
def short(tmp_path):
    """Arguments of a run of two steps for a class-conditional model."""
    return SHORT_RUN | {
        "pretrained_model_name_or_path": save_base(tmp_path / "base", random_unet(**CLASSES)),
        "data_files": EMOJI,
        "label_column": "label",
        "condition": "low_resolution",
        "resolution": 8,
        "max_train_samples": 40,
        "output_dir": str(tmp_path / "run"),
        "learning_rate": 1e-2,
    }


def train(**arguments):
    reset_accelerate()
    train_controlnet.main(flags(**arguments))


class Calls:
    """
    What `training_losses` is called with: the base and the branch, images, and keyword arguments of the networks; and
    its losses beside those of the base alone, with the same noise.
    """

    def __init__(self, monkeypatch):
        self.steps, self.losses, self.of_base = [], [], []
        self.training_losses = train_controlnet.training_losses
        monkeypatch.setattr(train_controlnet, "training_losses", self)

    def __call__(self, model, scheduler, images, timesteps, *, model_kwargs, **kwargs):
        self.base, self.branch, _ = model.args
        self.steps.append((images, model_kwargs))
        given = {name: value for name, value in model_kwargs.items() if name != "controlnet_cond"}
        state = torch.get_rng_state()
        with torch.no_grad():
            alone = self.training_losses(self.base, scheduler, images, timesteps, model_kwargs=given, **kwargs)
        torch.set_rng_state(state)
        terms = self.training_losses(model, scheduler, images, timesteps, model_kwargs=model_kwargs, **kwargs)
        self.of_base.append(alone.loss)
        self.losses.append(terms.loss.detach())
        return terms


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def states(folder, component):
    return load_file(next(Path(folder, component).glob("*.safetensors")))


def different(first, second):
    assert set(first) == set(second)
    return {name for name in first if not torch.equal(first[name], second[name])}


def branch_of(folder):
    return AdaGNControlNetModel.from_pretrained(folder)


# 1. What is trained, and what is not


class TestBranch:
    def test_the_base_stays_and_the_branch_is_trained(self, short, calls, caplog):
        base = Path(short["pretrained_model_name_or_path"])
        files = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
        train(**short, seed=1)
        assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == files
        assert not different(states(base, "unet"), calls.base.state_dict())
        assert "The frozen networks are unchanged (hashes: U-Net " in caplog.text
        assert not calls.base.training
        assert calls.branch.training

        # Only the ControlNet, in the root; it samples with the base.
        folder = Path(short["output_dir"])
        assert not (folder / "model_index.json").exists()
        assert [path.parent for path in folder.rglob("*.safetensors") if "checkpoint" not in str(path)] == [folder]
        saved = load_file(folder / WEIGHTS)
        fresh = AdaGNControlNetModel.from_unet(random_unet(**CLASSES)).state_dict()
        # With Adam's first steps all weights move that have a gradient; rows of classes that were not shown have none.
        assert different(fresh, saved) == set(fresh)
        pipe = ADMPipeline.from_pretrained(base)
        pipe = ADMControlNetPipeline(**pipe.components, controlnet=branch_of(folder))
        pipe.set_progress_bar_config(disable=True)
        arguments = {"class_labels": 3, "num_inference_steps": 2, "output_type": "pt"}
        picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        followed, free = (
            pipe(
                image=picture,
                generator=torch.Generator().manual_seed(0),
                controlnet_conditioning_scale=scale,
                **arguments,
            ).images
            for scale in (1.0, 0.0)
        )
        assert (followed - free).abs().max() > 1e-3

    def test_what_checkpoints_hold_and_that_the_result_is_the_average(self, short):
        train(**short)
        folder = Path(short["output_dir"])
        trained, saved = load_file(folder / "checkpoint-2" / "model.safetensors"), load_file(folder / WEIGHTS)
        assert different(trained, saved)
        (optimizer,) = read_state(folder / "checkpoint-2", "run_state")["optimizers"]
        assert len(optimizer["state"]) == len(saved)
        assert not different(load_file(folder / "checkpoint-2" / WEIGHTS), saved)
        assert not different(branch_of(folder / "checkpoint-2").state_dict(), saved)

    def test_at_first_the_base_is_left_alone(self, short, calls):
        train(**short)
        assert rounding_errors(calls.losses[0], calls.of_base[0]) <= NETWORK
        assert rounding_errors(calls.losses[1], calls.of_base[1]) > NETWORK

    @pytest.mark.parametrize("part", ["U-Net", "text encoder"])
    def test_a_base_that_changes_is_not_passed_over(self, short, tmp_path, monkeypatch, part):
        base = save_base(tmp_path / "text", random_text_unet("added_kv", **CLASSES), "clip")
        load_text, training_losses = diffusion.load_text, train_controlnet.training_losses
        networks = {}

        def keep(*args):
            networks["text encoder"], tokenizer = load_text(*args)
            return networks["text encoder"], tokenizer

        def change(model, *args, **kwargs):
            networks["U-Net"] = model.args[0]
            with torch.no_grad():
                next(networks[part].parameters()).view(-1)[0] += 1e-6
            return training_losses(model, *args, **kwargs)

        monkeypatch.setattr(diffusion, "load_text", keep)
        monkeypatch.setattr(train_controlnet, "training_losses", change)
        with pytest.raises(RuntimeError, match=f"Weights of the frozen {part} have changed during training"):
            train(**short | {"pretrained_model_name_or_path": base, "caption_column": "text"})
        assert not Path(short["output_dir"], WEIGHTS).exists()

    def test_a_narrower_branch(self, short, calls):
        train(**short | {"max_train_steps": 1}, controlnet_width=0.5, conditioning_embedding_out_channels=[4, 6])
        branch = branch_of(short["output_dir"])
        assert list(branch.config.block_out_channels) == [4, 8]
        assert list(branch.config.unet_block_out_channels) == [8, 16]
        assert list(branch.config.conditioning_embedding_out_channels) == [4, 6]
        branch.check_base(calls.base)

    def test_going_on_with_a_branch(self, short, tmp_path, calls):
        branch = fill_randomly(AdaGNControlNetModel.from_unet(random_unet(**CLASSES)))
        branch.save_pretrained(tmp_path / "branch")
        train(**short | {"learning_rate": 1e-12}, controlnet_model_name_or_path=str(tmp_path / "branch"))
        weights = load_file(Path(short["output_dir"]) / WEIGHTS)
        for name, value in branch.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
        assert (calls.losses[0] - calls.of_base[0]).abs().min() > 1e-3

    def test_it_carries_the_noise_schedule_of_the_base(self, short, tmp_path, caplog):
        """It is only used with models of the same noise schedule."""
        short["pretrained_model_name_or_path"] = cosine = save_base(
            tmp_path / "cosine", random_unet(**CLASSES), beta_schedule="cosine"
        )
        first = tmp_path / "first"
        train(**short | {"output_dir": str(first), "max_train_steps": 1})
        expected = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
        assert branch_of(first).config.noise_schedule == expected
        ADMControlNetPipeline.from_pretrained(cosine, controlnet=branch_of(first))
        linear = save_base(tmp_path / "linear", random_unet(**CLASSES))
        with pytest.raises(ValueError, match="`controlnet` was trained on the noise schedule squaredcos_cap_v2 with "):
            ADMControlNetPipeline.from_pretrained(linear, controlnet=branch_of(first))
        going_on = short | {"controlnet_model_name_or_path": str(first), "max_train_steps": 1}
        with pytest.raises(ValueError, match="(?s)The ControlNet .*first was trained on the noise schedule squaredcos"):
            train(**going_on | {"pretrained_model_name_or_path": linear})
        assert not Path(short["output_dir"]).exists()

        # A ControlNet without this entry is not compared, with a warning, and gets it.
        config = json.loads((first / "config.json").read_text())
        del config["noise_schedule"]
        (first / "config.json").write_text(json.dumps(config))
        train(**going_on)
        assert "does not say which noise schedule it was trained on" in caplog.text
        assert "this run records that of the pretrained model" in caplog.text
        assert branch_of(short["output_dir"]).config.noise_schedule == expected

    def test_beside_a_pipeline_of_diffusers(self, short, tmp_path, calls):
        """Without a learned variance."""
        unet = random_diffusers_unet(out_channels=3)
        DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(tmp_path / "ddpm")
        del short["label_column"]
        train(**short | {"pretrained_model_name_or_path": str(tmp_path / "ddpm"), "objective": "simple"})
        assert not different(unet.state_dict(), calls.base.state_dict())
        branch_of(short["output_dir"]).check_base(calls.base)
        assert branch_of(short["output_dir"]).config.noise_schedule == noise_schedule_of(DDPMScheduler(100))

    def test_by_caption(self, short, tmp_path, calls):
        base = save_base(tmp_path / "text", random_text_unet("added_kv"), "clip")
        del short["label_column"]
        short |= {"pretrained_model_name_or_path": base, "caption_column": "text", "caption_dropout_prob": 1}
        train(**short, precompute_text_embeddings=True, cache_dir=str(tmp_path / "cache"))
        (_, given), _ = calls.steps
        assert set(given) == {"encoder_hidden_states", "encoder_attention_mask", "controlnet_cond"}
        assert not given["encoder_hidden_states"].requires_grad
        # Both the empty one.
        assert rounding_errors(given["encoder_hidden_states"][0], given["encoder_hidden_states"][1]) <= NETWORK
        assert branch_of(short["output_dir"]).config.cross_attention_dim == 16


# 2. Gradients


def gradients(unet, branch, sample, timesteps, target, **given):
    branch.zero_grad()
    accelerator = Accelerator(cpu=True)
    prediction = train_controlnet.predict(unet, branch, accelerator, sample, timesteps, **given)
    ((prediction - target) ** 2).mean().backward()
    return {name: p.grad.clone() for name, p in branch.named_parameters()}


@pytest.mark.parametrize("kind", ["transformer", "added_kv"])
def test_gradients_are_those_beside_a_base_that_is_not_frozen(kind):
    """With and without gradient checkpointing in base and ControlNet."""
    unet = random_text_unet(kind, **CLASSES)
    branch = fill_randomly(AdaGNControlNetModel.from_unet(unet), seed=1).train()
    generator = torch.Generator().manual_seed(0)
    sample, picture = torch.randn(2, 3, 8, 8, generator=generator), torch.rand(2, 3, 8, 8, generator=generator)
    timesteps, labels = torch.tensor([5, 700]), torch.tensor([1, 9])
    given = {"class_labels": labels, "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator)}
    target = torch.randn(2, 6, 8, 8, generator=generator)

    down, middle = branch(sample, timesteps, controlnet_cond=picture, return_dict=False, **given)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    ((unet(sample, timesteps, **given, **residuals).sample - target) ** 2).mean().backward()
    expected = {name: p.grad.clone() for name, p in branch.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in expected.values())

    unet.zero_grad()
    unet.requires_grad_(False)
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
            branch.enable_gradient_checkpointing()
        actual = gradients(unet, branch, sample, timesteps, target, controlnet_cond=picture, **given)
        assert gradient_errors(actual, expected) <= NETWORK
        assert all(parameter.grad is None for parameter in unet.parameters())


def test_checkpointed_gradients_in_bfloat16_channels_last(short, calls):
    """Recomputed activations are the same numbers."""
    short |= {"mixed_precision": "bf16", "channels_last": True, "max_train_steps": 3}
    train(**short)
    other = short["output_dir"] + "-checkpointed"
    train(**short | {"output_dir": other}, gradient_checkpointing=True)
    assert calls.base.is_gradient_checkpointing
    assert calls.branch.is_gradient_checkpointing
    assert_same_checkpoint(Path(short["output_dir"]) / "checkpoint-3", Path(other) / "checkpoint-3")


# 3. Conditioning images


class TestConditions:
    @pytest.mark.parametrize("kind", CONDITIONS)
    def test_made_from_the_images(self, short, calls, kind):
        train(**short | {"condition": kind, "max_train_steps": 1, "resolution": 16}, random_flip=True)
        ((images, given),) = calls.steps
        expected = torch.stack([make_condition(image / 2 + 0.5, kind) for image in images])
        torch.testing.assert_close(given["controlnet_cond"], expected, rtol=0, atol=1e-6)
        assert expected.max() > 0

    def test_read_from_a_column(self, short, calls, tmp_path):
        """Negatives, which stay negatives when both are cropped and flipped alike."""
        generator = np.random.default_rng(0)
        arrays = [generator.integers(0, 256, (8, 11, 3), dtype=np.uint8) for _ in range(16)]
        columns = {
            "image": [Image.fromarray(array) for array in arrays],
            "negative": [Image.fromarray(255 - array) for array in arrays],
        }
        features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "images.parquet")
        for name in ("condition", "label_column"):
            del short[name]
        short |= {"data_files": str(tmp_path / "images.parquet"), "conditioning_image_column": "negative"}
        train(**short, random_flip=True)
        for images, given in calls.steps:
            torch.testing.assert_close(given["controlnet_cond"], 0.5 - images / 2, rtol=0, atol=1e-6)

    def test_dropout_is_independent_of_that_of_classes(self, short, calls):
        short |= {"max_train_steps": 5, "train_batch_size": 40}
        train(**short, condition_dropout_prob=0.5, class_dropout_prob=0.5)
        black, without_class = [], []
        for images, given in calls.steps:
            conditions = torch.stack([make_condition(image / 2 + 0.5, "low_resolution") for image in images])
            is_black = given["controlnet_cond"].flatten(1).amax(dim=1) == 0
            kept = given["controlnet_cond"][~is_black]
            torch.testing.assert_close(kept, conditions[~is_black], rtol=0, atol=1e-6)
            black.append(is_black)
            without_class.append(given["class_labels"] == 9)
        black, without_class = torch.cat(black), torch.cat(without_class)
        # 200 draws; a quarter of them is 50, with a standard deviation of 6.1.
        for first in (black, ~black):
            for second in (without_class, ~without_class):
                assert 22 < int((first & second).sum()) < 78

    def test_strips(self, short, monkeypatch):
        """Condition | sample | target, with the names of the columns above; the images are those of the data."""
        shown = []
        labelled_strips = validation.labelled_strips
        monkeypatch.setattr(
            validation,
            "labelled_strips",
            lambda columns, **kwargs: (shown.append(columns), labelled_strips(columns, **kwargs))[1],
        )
        train(**short | {"num_validation_images": 5, "condition": "edges", "resolution": 16}, validation_steps=1)
        first, second = shown
        assert list(first) == ["condition", "sample", "target"]
        for condition, target in zip(first["condition"], first["target"], strict=True):
            assert np.array_equal(np.asarray(make_condition(target, "edges")), np.asarray(condition))
        for name in ("condition", "target"):  # whatever the step
            assert [image.tobytes() for image in first[name]] == [image.tobytes() for image in second[name]]
        with Image.open(Path(short["output_dir"]) / "samples-0000002.png") as grid:
            # Two strips of three in a row, each of 16 pixels, scaled by four.
            assert grid.width == 2 + 6 * (64 + 2)
            assert grid.height > 2 + 3 * (64 + 2)

    def test_the_names_are_those_of_the_package(self):
        hint = get_type_hints(train_controlnet.ControlArguments)["condition"]
        names = [name for literal in get_args(hint) for name in get_args(literal)]
        assert names == list(CONDITIONS)


# 4. Resumed


LAUNCHED = {
    "label_column": "label",
    "caption_column": "text",
    "condition": "edges",
    "condition_dropout_prob": 0.3,
    "resolution": 8,
    "max_train_samples": 40,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 6,
    "checkpointing_steps": 2,
    "logging_steps": 2,
    "lr_warmup_steps": 2,
    "num_validation_images": 4,
    "validation_num_inference_steps": 2,
    "validation_guidance_scale": 2.0,
    "report_to": "none",
}


def train_slowly(argv):
    """The whole run, in a process group of its own."""
    os.setsid()
    script = load_script("train_controlnet")
    seed_step = training_run.seed_step

    def slow_seed_step(*arguments):
        time.sleep(0.2)
        seed_step(*arguments)

    training_run.seed_step = slow_seed_step
    script.main(argv)


def resume(argv):
    load_script("train_controlnet").main(argv)


class TestResuming:
    def test_resumed_exactly(self, short, monkeypatch, tmp_path):
        arguments = short | {"max_train_steps": 5, "checkpointing_steps": 2, "condition_dropout_prob": 0.3}
        train(**arguments)
        seed_step = training_run.seed_step

        def fail_after_step_3(seed, process_index, micro_step):
            if micro_step == 3:
                raise RuntimeError("the machine is gone")
            seed_step(seed, process_index, micro_step)

        monkeypatch.setattr(training_run, "seed_step", fail_after_step_3)
        arguments["output_dir"] = str(tmp_path / "resumed")
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(**arguments)
        monkeypatch.setattr(training_run, "seed_step", seed_step)
        train(**arguments, resume_from_checkpoint="latest")
        first, second = Path(short["output_dir"]), tmp_path / "resumed"
        assert_same_checkpoint(first / "checkpoint-5", second / "checkpoint-5")
        assert read_metrics(first) == read_metrics(second)
        assert_same_state(load_file(first / WEIGHTS), load_file(second / WEIGHTS))
        assert (first / "samples-0000005.png").read_bytes() == (second / "samples-0000005.png").read_bytes()

    def test_beside_another_base(self, short, tmp_path):
        train(**short)
        short["pretrained_model_name_or_path"] = save_base(tmp_path / "other", random_unet(seed=1, **CLASSES))
        with pytest.raises(ValueError, match="trained with the frozen U-Net [0-9a-f]{32}, but this run has U-Net"):
            train(**short | {"max_train_steps": 3}, resume_from_checkpoint="latest")

    @pytest.mark.slow
    def test_killed_in_two_processes_and_resumed(self, tmp_path):
        base = save_base(tmp_path / "base", random_text_unet("added_kv", **CLASSES), "clip")
        arguments = LAUNCHED | {"pretrained_model_name_or_path": base, "data_files": EMOJI}
        folder, other = tmp_path / "run", tmp_path / "resumed"
        output = launch("train_controlnet", arguments | {"output_dir": str(folder)}, tmp_path)
        assert "Num processes: 2" in output
        assert "40 images in 9 classes with 40 captions and edges at 8 x 8, 16 per optimizer step; steps 0" in output
        assert f"Saved the ControlNet to {folder}" in output
        assert (folder / "loss_curves.png").is_file()
        assert "Traceback" not in output

        arguments["output_dir"] = str(other)
        # Eight batches follow the first checkpoint, at 0.2 seconds each.
        kill_distributed(
            train_slowly, flags(**arguments), once=lambda: find_latest_checkpoint(other) is not None, within=1
        )
        assert not (other / WEIGHTS).exists()
        run_distributed(resume, flags(**arguments, resume_from_checkpoint="latest"))
        assert_same_checkpoint(folder / "checkpoint-6", other / "checkpoint-6")
        assert read_metrics(folder) == read_metrics(other)
        assert_same_state(load_file(folder / WEIGHTS), load_file(other / WEIGHTS))


# 5. Recipes


class TestRecipe:
    def test_the_text_encoder_is_that_of_the_model(self, tmp_path):
        index = {
            "_class_name": "ADMPipeline",
            "text_encoder": ["diffusers_adm", "GLIDETextModel"],
            "tokenizer": [None] * 2,
        }
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        model, data, _, _, text, _ = parse_args(
            train_controlnet.ARGUMENT_TYPES,
            ["--pretrained_model_name_or_path", str(tmp_path), "--caption_column", "text", "--condition", "edges"]
            + ["--tokenizer_name_or_path", "some/tokenizer", "--data_files", "a.parquet"],
        )
        train_controlnet.check_text_stays(model, data, text)  # it has no tokenizer of its own
        text.text_encoder_name_or_path = "some/encoder"
        with pytest.raises(ValueError, match=r"`text_encoder_name_or_path` is 'some/encoder', .* \(GLIDETextModel\)"):
            train_controlnet.check_text_stays(model, data, text)

    def test_it_parses_and_fits_the_model_it_is_for(self, monkeypatch):
        monkeypatch.chdir(REPOSITORY)  # its paths are relative to it
        recipe = CONFIGS / "emoji_32_edges.yaml"
        model, data, diffusion, _, text, control = parse_args(
            train_controlnet.ARGUMENT_TYPES, ["--config", str(recipe)]
        )
        train_controlnet.check_base_stays(model, diffusion, text)
        assert control.condition == "edges"
        of_base = yaml.safe_load((CONFIGS / "emoji_32_glide.yaml").read_text())
        for arguments in (model, data, text):
            for name in ("class_dropout_prob", "caption_dropout_prob", "data_files", "label_column", "caption_column"):
                if hasattr(arguments, name):
                    value = getattr(arguments, name)
                    assert (value[0] if name == "data_files" else value) == of_base[name]
        assert Path(data.data_files[0]).is_file()


# 6. Bad input


class TestBadInput:
    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch):
        def fail(*args, **kwargs):
            raise AssertionError("training began")

        monkeypatch.setattr(train_controlnet, "training_losses", fail)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"conditioning_image_column": "text"}, "`condition` is 'low_.*_column` 'text'. Pass exactly one"),
            ({"condition": "none"}, "`condition` is None and `conditioning_image_column` None. Pass exactly one"),
            (
                {"condition": "none", "conditioning_image_column": "label"},
                "`label_column` and `conditioning_image_column` are both 'label'",
            ),
            (
                {"condition": "none", "conditioning_image_column": "sketch"},
                "`conditioning_image_column` is 'sketch', but .* has the columns image, text, label",
            ),
            ({"condition_dropout_prob": 1.5}, "`condition_dropout_prob` is 1.5; it must lie in"),
            ({"controlnet_width": 0}, "`controlnet_width` is 0.0; it must lie in"),
            ({"controlnet_width": 1.5}, "`controlnet_width` is 1.5; it must lie in"),
            (
                {"controlnet_width": 0.5, "controlnet_model_name_or_path": "some/where"},
                "shape a new ControlNet, but `controlnet_model_name_or_path` is 'some/where'",
            ),
            (
                {"conditioning_embedding_out_channels": [4], "controlnet_model_name_or_path": "some/where"},
                "shape a new ControlNet, but `controlnet_model_name_or_path` is 'some/where'",
            ),
            ({"controlnet_model_name_or_path": "no/folder"}, "`controlnet_model_name_or_path` is 'no/folder', which"),
            ({"pretrained_model_name_or_path": "none"}, "is trained for a pretrained model. Name it with"),
            ({"model_config_name_or_path": "unet.json"}, "and leave `model_config_name_or_path` out"),
            ({"pretrained_model_name_or_path": "no/folder"}, "`pretrained_model_name_or_path` is 'no/folder', which"),
            (
                {"prediction_type": "sample", "ddpm_num_steps": 10},
                "leaves its base model as it is: drop `ddpm_num_steps`, `prediction_type`",
            ),
            ({"variance_type": "learned_log"}, "leaves its base model as it is: drop `variance_type`"),
            (
                {"caption_column": "text", "train_text_encoder": True},
                "leaves its base model as it is: drop `train_text_encoder`",
            ),
            ({"caption_column": "text"}, "the U-Net has no cross-attention"),
            ({"train_data_dir": "pictures"}, "Got `train_data_dir` and `data_files`"),
            ({"label_column": "none", "validation_guidance_scale": 2.0}, "without a `label_column`"),
            ({"validation_num_inference_steps": 1001}, "the noise schedule .* allows 1000 at most"),
            ({"objective": "vlb", "snr_gamma": 5.0}, "`snr_gamma` weights the squared error"),
            ({"train_batch_size": 41}, "There are 40 usable images, but one step takes 41"),
            ({"resolution": 9}, "The resolution is 9; .* divisible by 2"),
        ],
    )
    def test_arguments(self, short, changes, message):
        with pytest.raises(ValueError, match=message):
            train(**short | changes)

    def test_an_unknown_kind_of_condition(self, short, capsys):
        with pytest.raises(SystemExit):
            train(**short | {"condition": "depth"})
        assert "argument --condition: invalid choice: 'depth'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"in_channels": 6}, "takes 6 channels .* Those of 6 are trained by train_super_resolution.py"),
            ({"in_channels": 7}, "takes 7 channels .* Those of 7 are trained by train_adm.py --task inpaint"),
            ({"in_channels": 4, "out_channels": 8}, "The network has 4 channel.*RGB images.*`--image_mode RGBA`"),
            ({"out_channels": 3}, "has 3 output channels. .*`variance_type` 'learned_range' need 6"),
            ({"num_class_embeds": 9, "null_class_id": None}, "`class_dropout_prob` is 0.1, but the U-Net has no null"),
        ],
    )
    def test_other_bases(self, short, tmp_path, config, message):
        base = tmp_path / "other"
        random_unet(**CLASSES | config).save_pretrained(base / "unet")
        LearnedVarianceDDPMScheduler().save_pretrained(base / "scheduler")
        with pytest.raises(ValueError, match=message):
            train(**short | {"pretrained_model_name_or_path": str(base)})

    def test_a_branch_of_another_base(self, short, tmp_path):
        AdaGNControlNetModel.from_unet(random_unet()).save_pretrained(tmp_path / "branch")
        with pytest.raises(ValueError, match="num_class_embeds"):
            train(**short, controlnet_model_name_or_path=str(tmp_path / "branch"))

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ({"conditioning_channels": 1}, "images of 1 channels, 1 times as large as the samples"),
            (
                {"conditioning_downsampling_factor": 2},
                "images of 3 channels, 2 times as large as the samples",
            ),
        ],
    )
    def test_a_branch_that_is_shown_other_pictures(self, short, tmp_path, shape, message):
        AdaGNControlNetModel.from_unet(random_unet(**CLASSES), **shape).save_pretrained(tmp_path / "branch")
        with pytest.raises(ValueError, match=message):
            train(**short, controlnet_model_name_or_path=str(tmp_path / "branch"))
