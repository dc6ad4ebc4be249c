"""training/train_super_resolution.py: the inputs of the network, short runs, and what is refused."""

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import (
    CONFIGS,
    SHORT_RUN,
    assert_same_checkpoint,
    flags,
    launch,
    own_process_state,
    read_metrics,
    reset_accelerate,
)
from safetensors.torch import load_file
from scripts import REPOSITORY, load_script
from toy_models import TEXT_CONFIGS, TOY_CONFIG, toy_tokenizer

from diffusers_adm import ADMSuperResolutionPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning import low_resolution
from diffusers_adm.training import build_scheduler, build_unet, load_unet_config, low_res_channels, parse_args
from diffusers_adm.training import run as training_run


RECIPES = sorted(CONFIGS.glob("*upsampler*.yaml"))
train_super_resolution = load_script("train_super_resolution")


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_super_resolution"):
        yield


def train(**arguments):
    reset_accelerate()
    train_super_resolution.main(flags(**arguments))


def write_images(path, number=24, size=8):
    generator = np.random.default_rng(0)
    columns = {
        "image": [Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(number)],
        "text": [("a cat", "the red dog")[index % 2] for index in range(number)],
        "label": [("round", "square")[index % 2] for index in range(number)],
    }
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("string")}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return str(path)


def write_model_config(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps({**TOY_CONFIG, "in_channels": 6, "time_cond_proj_dim": 6, **changes}))
    return str(path)


@pytest.fixture
def short(tmp_path):
    """Arguments of a run of two steps, from 4 to 8 pixels."""
    return SHORT_RUN | {
        "model_config_name_or_path": write_model_config(tmp_path),
        "data_files": write_images(tmp_path / "images.parquet"),
        "low_res_size": 4,
        "max_noise_level": 5,
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def seen(monkeypatch):
    """`(images, extra channels, keyword arguments of the network)` of each step."""
    steps = []
    training_losses = train_super_resolution.training_losses

    def record(unet, scheduler, images, timesteps, *, extra_channels, model_kwargs, **kwargs):
        steps.append((images, extra_channels, model_kwargs))
        arguments = {"extra_channels": extra_channels, "model_kwargs": model_kwargs, **kwargs}
        return training_losses(unet, scheduler, images, timesteps, **arguments)

    monkeypatch.setattr(train_super_resolution, "training_losses", record)
    return steps


def reduced(images: torch.Tensor, factor: int) -> torch.Tensor:
    """By Pillow, as the small emoji were made."""
    pictures = [Image.fromarray(image.numpy()) for image in ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1)]
    small = torch.stack([torch.from_numpy(np.array(picture.reduce(factor))) for picture in pictures])
    return small.permute(0, 3, 1, 2).float() / 127.5 - 1


def levels_of(condition: torch.Tensor, highest: int) -> torch.Tensor:
    """The levels whose sinusoids these are."""
    half = condition.shape[1] // 2
    angles = torch.arange(highest + 1)[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    # By differences: `torch.cdist` takes |a|^2 + |b|^2 - 2ab for many rows, which leaves 1e-3 of float32.
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    distances = torch.cdist(condition, expected, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(dim=1).values.max() < 1e-4
    return distances.argmin(dim=1)


# 1. Inputs of the network


@pytest.mark.parametrize("low_res_size", [4, 2])
def test_the_small_image_without_noise(low_res_size, short, seen, tmp_path):
    short |= {"low_res_size": low_res_size, "model_config_name_or_path": write_model_config(tmp_path)}
    train(**short | {"max_noise_level": 0})
    assert len(seen) == 2
    for images, extra_channels, model_kwargs in seen:
        small = reduced(images, 8 // low_res_size)
        torch.testing.assert_close(extra_channels, F.interpolate(small, (8, 8), mode="bilinear", align_corners=False))
        assert set(model_kwargs) == {"timestep_cond"}
        assert (levels_of(model_kwargs["timestep_cond"], 5) == 0).all()


def test_a_network_that_is_told_no_level(short, seen, tmp_path):
    config = write_model_config(tmp_path, time_cond_proj_dim=None)
    train(**short | {"max_noise_level": 0, "model_config_name_or_path": config})
    for images, extra_channels, model_kwargs in seen:
        small = reduced(images, 2)
        torch.testing.assert_close(extra_channels, F.interpolate(small, (8, 8), mode="bilinear", align_corners=False))
        assert model_kwargs == {}
    pipe = ADMSuperResolutionPipeline.from_pretrained(short["output_dir"])
    assert (pipe.config.low_res_size, pipe.config.max_noise_level) == (4, 0)


def test_noise_and_its_level(short, seen, tmp_path, monkeypatch):
    """All levels are equally likely; each has the noise of as many steps, new for each image."""
    noisy = []
    upsample = low_resolution.upsample
    monkeypatch.setattr(
        low_resolution, "upsample", lambda low_res, *size: (noisy.append(low_res), upsample(low_res, *size))[1]
    )
    short |= {"data_files": write_images(tmp_path / "large.parquet", number=40, size=16), "resolution": 16}
    train(
        **short | {"low_res_size": 8, "max_noise_level": 4, "max_train_steps": 5, "train_batch_size": 40},
        ddpm_num_steps=10,
        beta_start=0.1,
        beta_end=0.3,
    )
    clean = torch.cat([reduced(images, 2) for images, *_ in seen]).flatten(1)
    noisy = torch.cat(noisy[: len(seen)]).flatten(1)
    levels = torch.cat([levels_of(model_kwargs["timestep_cond"], 4) for *_, model_kwargs in seen])
    # 200 draws, 40 of each level expected, with a standard deviation of 5.7.
    assert all(15 < int((levels == level).sum()) < 65 for level in range(5))
    assert torch.equal(noisy[levels == 0], clean[levels == 0])
    signals = np.concatenate([[1], np.sqrt(np.cumprod(1 - np.linspace(0.1, 0.3, 10)))])
    for level in range(1, 5):
        signal = signals[level]
        noise = (noisy - signal * clean)[levels == level] / math.sqrt(1 - signal**2)
        # At least 15 x 192 standard normals: their mean and standard deviation within 4.5 sigma.
        assert abs(noise.mean()) < 4.5 / noise.numel() ** 0.5
        assert abs(noise.std() - 1) < 4.5 / (2 * noise.numel()) ** 0.5
        assert abs((noise * clean[levels == level]).mean()) < 4.5 / noise.numel() ** 0.5  # |clean| <= 1
    signal = torch.tensor(signals)[levels][:, None]
    noise = ((noisy - signal * clean) / (1 - signal**2).sqrt())[levels > 0]
    products = noise @ noise.T / noise.shape[1]  # of two images: 0, with a standard deviation of 1 / sqrt(192)
    assert (products - torch.diag(products.diag())).abs().max() < 6 / 192**0.5


# 2. Runs


def test_by_class_resumed_and_fine_tuned(short, tmp_path, capsys):
    by_class = short | {"label_column": "label", "validation_guidance_scale": 2.0, "checkpointing_steps": 2}
    train(**by_class | {"max_train_steps": 4})
    folder = Path(by_class["output_dir"])
    pipe = ADMSuperResolutionPipeline.from_pretrained(folder)
    assert pipe.id2label == {0: "round", 1: "square"}
    assert (pipe.config.low_res_size, pipe.config.max_noise_level) == (4, 5)
    assert pipe.unet.config.sample_size == 8
    arguments = {"class_labels": "round", "noise_level": 3, "num_inference_steps": 2, "output_type": "pt"}
    assert pipe(torch.rand(1, 3, 4, 4), **arguments).images.shape == (1, 3, 8, 8)
    # Two images, each small, sampled and large, with the names of the columns above.
    with Image.open(folder / "samples-0000004.png") as grid:
        assert grid.width == 2 + 3 * (8 + 2)

    other = by_class | {"output_dir": str(tmp_path / "resumed")}
    train(**other)
    train(**other | {"max_train_steps": 4, "resume_from_checkpoint": "latest"})
    # Without warm-up the learning rate is constant, so that two steps of four are two steps.
    assert_same_checkpoint(folder / "checkpoint-4", Path(other["output_dir"]) / "checkpoint-4")
    assert read_metrics(folder) == read_metrics(other["output_dir"])

    # Fine-tuned without arguments that the pipeline has.
    for name in ("model_config_name_or_path", "low_res_size", "max_noise_level"):
        del by_class[name]
    tuned = by_class | {"pretrained_model_name_or_path": str(folder), "output_dir": str(tmp_path / "tuned")}
    train(**tuned | {"max_train_steps": 1, "use_ema": False, "learning_rate": 1e-6})
    before, after = (
        load_file(Path(run, "unet", "diffusion_pytorch_model.safetensors")) for run in (folder, tmp_path / "tuned")
    )
    changes = [(after[name] - before[name]).abs().max() for name in before]
    assert 0 < max(changes) < 2e-6  # one step of Adam
    tuned_config = ADMSuperResolutionPipeline.load_config(tmp_path / "tuned")
    assert (tuned_config["low_res_size"], tuned_config["max_noise_level"]) == (4, 5)
    assert tuned_config["noise_schedule"] == pipe.config.noise_schedule


def test_the_pipeline_carries_the_noise_schedule(short, tmp_path):
    """The noise schedule of the latest training."""
    train(**short | {"max_train_steps": 1})
    linear = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    assert ADMSuperResolutionPipeline.from_pretrained(short["output_dir"]).config.noise_schedule == linear
    del short["model_config_name_or_path"]
    tuned = {"pretrained_model_name_or_path": short["output_dir"], "output_dir": str(tmp_path / "tuned")}
    train(**short | tuned | {"max_train_steps": 1, "ddpm_beta_schedule": "cosine"})
    cosine = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    assert ADMSuperResolutionPipeline.from_pretrained(tmp_path / "tuned").config.noise_schedule == cosine
    with pytest.raises(ValueError, match="This upsampler was trained on the noise schedule squaredcos"):
        ADMSuperResolutionPipeline.from_pretrained(tmp_path / "tuned", scheduler=LearnedVarianceDDPMScheduler())


def test_by_caption(short, seen, tmp_path):
    """The text encoder is trained with the U-Net; validation images use the captions of the data."""
    (tmp_path / "text.json").write_text(
        json.dumps(
            {"model_type": "clip_text_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            | {"num_attention_heads": 2, "max_position_embeddings": 12}
        )
    )
    toy_tokenizer("clip").save_pretrained(tmp_path / "tokenizer")
    train(
        **short | {"model_config_name_or_path": write_model_config(tmp_path, **TEXT_CONFIGS["added_kv"])},
        caption_column="text",
        caption_dropout_prob=0.5,
        text_encoder_config_name_or_path=str(tmp_path / "text.json"),
        tokenizer_name_or_path=str(tmp_path / "tokenizer"),
        train_text_encoder=True,
        validation_guidance_scale=2.0,
    )
    for images, _, model_kwargs in seen:
        assert set(model_kwargs) == {"timestep_cond", "encoder_hidden_states", "encoder_attention_mask"}
        assert model_kwargs["encoder_hidden_states"].requires_grad
        assert len(model_kwargs["encoder_hidden_states"]) == len(images)
    pipe = ADMSuperResolutionPipeline.from_pretrained(short["output_dir"])
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    assert pipe(torch.rand(1, 3, 4, 4), prompt="a cat", **arguments).images.shape == (1, 8, 8, 3)


@pytest.mark.slow
def test_launched_in_two_processes(short, tmp_path):
    launch("train_super_resolution", short | {"label_column": "label", "train_batch_size": 4}, tmp_path)
    assert read_metrics(short["output_dir"])[-1]["step"] == 2
    assert (Path(short["output_dir"]) / "loss_curves.png").is_file()
    ADMSuperResolutionPipeline.from_pretrained(short["output_dir"])


# 3. Recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_parses_and_its_model_builds(recipe, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # their paths are relative to it
    arguments = parse_args(train_super_resolution.ARGUMENT_TYPES, ["--config", str(recipe)])
    model, data, diffusion, _, _, super_resolution = arguments
    scheduler = build_scheduler(model, data, diffusion)
    config, _ = load_unet_config(model, data, scheduler, low_res_channels)
    with torch.device("meta"):
        unet = build_unet(model, data, config, 9 if data.label_column else None)
    super_resolution.check(unet.config.sample_size, scheduler, unet.config.time_cond_proj_dim)
    for path in data.data_files or []:
        assert Path(path).is_file()


# 4. Bad input


class TestBadInput:
    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch):
        def fail(*args, **kwargs):
            raise AssertionError("training began")

        monkeypatch.setattr(train_super_resolution, "training_losses", fail)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"low_res_size": "none"}, "`low_res_size` is missing"),
            ({"low_res_size": 0}, "`low_res_size` is '0'; pass the side of a square"),
            ({"low_res_size": 3}, "`low_res_size` is 3 and the resolution 8 x 8: .*multiple"),
            ({"low_res_size": 8}, "`low_res_size` is 8 and the resolution 8 x 8: .* 2 times as large"),
            ({"max_noise_level": -1}, "`max_noise_level` is -1"),
            (
                {"max_noise_level": 21, "ddpm_num_steps": 20},
                "`max_noise_level` is 21, but the noise .* has 20",
            ),
            ({"label_column": "label", "validation_guidance_scale": 2.0, "class_dropout_prob": 0}, "no null class"),
            ({"validation_guidance_scale": 2.0}, "without a `label_column`"),
        ],
    )
    def test_arguments(self, short, changes, message):
        with pytest.raises(ValueError, match=message):
            train(**short | changes)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"in_channels": 3}, "takes 3 channels .*; this script trains U-Nets of 6"),
            ({"out_channels": 12}, "has 12 output channels"),
            ({"time_cond_proj_dim": None}, "config has no `time_cond_proj_dim`. Set it"),
        ],
    )
    def test_networks(self, short, config, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            train(**short | {"model_config_name_or_path": write_model_config(tmp_path, **config)})
