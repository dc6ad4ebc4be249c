"""training/train_autoencoder.py: latents of standard scale, runs, other images, and what is refused."""

import importlib.util
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from runs import (
    CONFIGS,
    EMOJI,
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
from toy_models import TOY_AUTOENCODER_CONFIG, fill_randomly, random_classifier

from diffusers_adm.commands.errors import CommandError
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.latents import LatentSpace
from diffusers_adm.data.columns import load_image_dataset
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.ops.frechet import frechet_distance
from diffusers_adm.training import AUTOENCODER_ARGUMENTS, hinge_loss, parse_args
from diffusers_adm.training import run as training_run
from diffusers_adm.training.image_measures import psnr
from diffusers_adm.training.perceptual import features_of
from diffusers_adm.training.run_state import read_state


train_autoencoder = load_script("train_autoencoder")
WEIGHTS = "diffusion_pytorch_model.safetensors"
ADVERSARIAL = {"discriminator_start": 1, "discriminator_channels": 8, "discriminator_layers": 1}


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_autoencoder"):
        yield


def train(**arguments):
    reset_accelerate()
    train_autoencoder.main(flags(**arguments))


def write_config(folder, **changes):
    path = folder / "autoencoder.json"
    config = TOY_AUTOENCODER_CONFIG | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return str(path)


def random_autoencoder(seed=0, **config):
    return fill_randomly(AutoencoderKL(**TOY_AUTOENCODER_CONFIG | config), seed)


@pytest.fixture
def short(tmp_path):
    """Arguments of a run of two steps on some of the embedded emoji."""
    arguments = {k: v for k, v in SHORT_RUN.items() if k != "validation_num_inference_steps"}
    return arguments | {
        "model_config_name_or_path": write_config(tmp_path),
        "data_files": EMOJI,
        "max_train_samples": 16,
        "learning_rate": 1e-3,
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def pretrained(short, tmp_path):
    """The same, to fine-tune an autoencoder; its folder is `tmp_path / "base"`."""
    random_autoencoder(scaling_factor=0.5, shift_factor=0.25).save_pretrained(tmp_path / "base")
    del short["model_config_name_or_path"]
    return short | {"pretrained_model_name_or_path": str(tmp_path / "base")}


# 1. Runs


def latents_of(folder, images):
    """Means and variances of all latents, one image at a time: two arrays `(N, channels, height, width)`."""
    autoencoder = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        found = [autoencoder.encode(image[None]).latent_dist for image in images]
    return tuple(np.concatenate([getattr(d, name).double().numpy() for d in found]) for name in ("mean", "var"))


def emoji():
    """All images, cropped at the centre, in [-1, 1]."""
    dataset = ImageDataset(load_image_dataset(data_files=[EMOJI])[0], 8, center_crop=True)
    return torch.stack([dataset[index]["images"] for index in range(len(dataset))])


def test_the_result(short):
    """It loads with diffusers' class, and its samples are standard: by numpy, over all training images."""
    del short["max_train_samples"]
    train(**short, validation_data_files=EMOJI, max_validation_samples=5)
    folder = Path(short["output_dir"])
    autoencoder, record = AutoencoderKL.from_pretrained(folder), json.loads((folder / "autoencoder.json").read_text())
    mean, variance = latents_of(folder, emoji())
    assert record["latent_mean"] == pytest.approx(mean.mean(axis=(0, 2, 3)), abs=1e-5)
    second = (mean**2 + variance).mean(axis=(0, 2, 3)) - mean.mean(axis=(0, 2, 3)) ** 2
    assert record["latent_std"] == pytest.approx(np.sqrt(second), rel=1e-5)
    assert (record["num_images"], record["resolution"]) == (163, 8)
    assert ImageFormat.from_config(record["image_format"], 3) == ImageFormat()
    shift, scale = autoencoder.config.shift_factor, autoencoder.config.scaling_factor
    assert shift == pytest.approx(np.mean(record["latent_mean"]))
    total = [std**2 + (m - shift) ** 2 for m, std in zip(record["latent_mean"], record["latent_std"], strict=True)]
    assert scale == pytest.approx(1 / np.sqrt(np.mean(total)))
    # Samples with noise; the standard error of the standard deviation is below 1%.
    noise = torch.randn(163, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    space = LatentSpace(autoencoder)
    samples = space.encode(emoji(), noise)
    assert (samples.mean().item(), samples.std().item()) == pytest.approx((0, 1), abs=0.03)
    assert space.decode(samples).shape == (163, 3, 8, 8)
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert {"loss", "reconstruction", "mse", "kl", "lr"} <= rows[0].keys()
    (row,) = (row for row in rows if "validation_scaling_factor" in row)
    assert row["validation_latent_std_1"] == record["latent_std"][1]
    assert row["validation_scaling_factor"] == scale


def test_standard_channels(short):
    del short["max_train_samples"]
    train(**short, standardize_channels=True)
    autoencoder = AutoencoderKL.from_pretrained(short["output_dir"])
    record = json.loads(Path(short["output_dir"], "autoencoder.json").read_text())
    assert autoencoder.config.latents_mean == record["latent_mean"]
    assert autoencoder.config.latents_std == record["latent_std"]
    assert (autoencoder.config.scaling_factor, autoencoder.config.shift_factor) == (1, None)
    noise = torch.randn(163, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    samples = LatentSpace(autoencoder).encode(emoji(), noise)
    # The standard error of a channel's standard deviation is about 1.4%, if its latents were independent.
    assert samples.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0, 0], abs=0.05)
    assert samples.std(dim=(0, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.05)


def test_measures_of_held_out_images(short, tmp_path):
    """PSNR and rFID of the reconstructions, computed here from the saved result."""
    random_classifier(pool="adaptive", sample_size=8).save_pretrained(tmp_path / "judge")
    train(**short, validation_data_files=EMOJI, rfid_network=tmp_path / "judge", reconstruction_loss="l2")
    folder = Path(short["output_dir"])
    measured = json.loads((folder / "reconstruction.json").read_text())
    assert (measured["num_images"], measured["held_out"], measured["step"]) == (163, True, 2)
    space, images = LatentSpace(AutoencoderKL.from_pretrained(folder)), emoji()
    with torch.no_grad():
        decoded = space.decode(space.encode(images))
    levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
    pixels = ((images + 1) * 127.5).round()
    expected = np.mean([psnr(x.numpy(), y.numpy(), 255.0) for x, y in zip(levels, pixels, strict=True)])
    assert measured["psnr"] == pytest.approx(expected, abs=0.01)
    features = [
        features_of(random_classifier(pool="adaptive", sample_size=8), x / 127.5 - 1).double().numpy()
        for x in (pixels, levels)
    ]
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in features]
    assert measured["rfid"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=0.02)
    row = read_metrics(folder)[-1]
    assert row["validation_psnr"] == measured["psnr"]
    with Image.open(folder / "samples-0000002.png") as grid:
        assert grid.width == 2 + 2 * (64 + 2)


class TestDiscriminator:
    def test_resumed_equals_unbroken(self, short, tmp_path):
        """The discriminator starts in the step after the checkpoint, and in the one before."""
        arguments = short | ADVERSARIAL | {"checkpointing_steps": 2, "max_train_steps": 4, "lr_scheduler": "cosine"}
        for start in (1, 2):
            folders = tmp_path / f"unbroken{start}", tmp_path / f"broken{start}"
            train(**arguments | {"output_dir": str(folders[0]), "discriminator_start": start})
            shutil.copytree(folders[0] / "checkpoint-2", folders[1] / "checkpoint-2")
            shutil.copyfile(folders[0] / "metrics.jsonl", folders[1] / "metrics.jsonl")
            train(output_dir=str(folders[1]), resume_from_checkpoint="latest")
            assert_same_checkpoint(folders[0] / "checkpoint-4", folders[1] / "checkpoint-4")
            assert read_metrics(folders[0]) == read_metrics(folders[1])
            states = [read_state(folders[0] / f"checkpoint-{n}", "run_state")["optimizers"][1] for n in (2, 4)]
            assert bool(states[0]["state"]) == (start == 1)
            assert states[1]["state"]
            # Both optimizers have the same learning rate.
            assert states[0]["param_groups"][0]["lr"] == pytest.approx(0.5e-3)

    def test_it_starts_when_it_is_due(self, short):
        train(**short | ADVERSARIAL | {"max_train_steps": 3, "discriminator_start": 2})
        rows = [row for row in read_metrics(short["output_dir"]) if "loss" in row]
        assert ["adaptive_weight" in row for row in rows] == [False, False, True]
        assert {"discriminator_loss", "logits_real", "logits_fake"} <= rows[2].keys()
        assert rows[2]["loss"] != pytest.approx(rows[2]["reconstruction"] + 1e-6 * rows[2]["kl"], rel=1e-4)
        assert rows[1]["loss"] == pytest.approx(rows[1]["reconstruction"] + 1e-6 * rows[1]["kl"], rel=1e-6)

    def test_both_networks_learn(self, short):
        train(**short | ADVERSARIAL | {"checkpointing_steps": 1, "discriminator_start": 1})
        folder = Path(short["output_dir"])
        before, after = (load_file(folder / f"checkpoint-{n}" / "model_1.safetensors") for n in (1, 2))
        # Of biases, both halves of the hinge loss may cancel.
        weights = [name for name in before if before[name].ndim == 4]
        assert len(weights) == 3
        assert all(not torch.equal(before[name], after[name]) for name in weights)

    def test_gradient_accumulation_and_reduced_precision(self, short):
        arguments = {"gradient_accumulation_steps": 2, "train_batch_size": 4, "mixed_precision": "bf16"}
        train(**short | ADVERSARIAL | arguments)
        assert len([row for row in read_metrics(short["output_dir"]) if "loss" in row]) == 2

    @pytest.mark.parametrize("fault", ["not finite", "memory"])
    def test_a_fault_of_its_step_only(self, short, monkeypatch, caplog, fault):
        """The step of the autoencoder has been taken by then; that of the discriminator is left out."""
        sizes = []

        def faulty(real, fake):
            sizes.append(len(real))
            if len(sizes) == 1 and fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return hinge_loss(real, fake) * (float("nan") if len(sizes) == 1 else 1)

        monkeypatch.setattr(train_autoencoder, "hinge_loss", faulty)
        train(**short | ADVERSARIAL | {"max_train_steps": 2, "discriminator_start": 0, "logging_steps": 1})
        assert [row["step"] for row in read_metrics(short["output_dir"]) if "loss" in row] == [2]
        if fault == "memory":
            assert sizes == [8, 4, 4]
            assert "The step 1 of the discriminator is left out" in caplog.text
        else:
            assert sizes == [8, 8]
            assert "The loss of step 1 is not finite; examples row" in caplog.text


def test_two_processes(short, tmp_path):
    """The latents are measured over the images of both, and both end with the same discriminator."""
    arguments = short | ADVERSARIAL | {"train_batch_size": 4, "max_train_samples": 15, "checkpointing_steps": 1}
    arguments |= {"validation_data_files": EMOJI, "max_validation_samples": 4, "validation_steps": 1}
    arguments |= {"discriminator_start": 0}
    output = launch("train_autoencoder", arguments, tmp_path)
    folder = Path(short["output_dir"])
    assert "Num processes: 2" in output
    assert "15 images at 8 x 8, latents of 2 channels at 4 x 4, 4 held-out images, 8 per optimizer step" in output
    record = json.loads((folder / "autoencoder.json").read_text())
    assert record["num_images"] == 15
    train(output_dir=short["output_dir"], resume_from_checkpoint="latest", train_batch_size=8)
    again = json.loads((folder / "autoencoder.json").read_text())
    for name in ("latent_mean", "latent_std"):  # by one process
        assert again[name] == pytest.approx(record[name], rel=1e-4, abs=1e-5)


def test_a_failed_validation_costs_nothing(short, monkeypatch):
    def fail(*args):
        raise RuntimeError("no disk")

    monkeypatch.setattr(train_autoencoder, "validate_reconstructions", fail)
    with pytest.raises(CommandError, match="The last validation has failed.*The result is saved in"):
        train(**short, validation_steps=1)
    config = AutoencoderKL.from_pretrained(short["output_dir"]).config
    assert config.scaling_factor != 0.18215  # the default


class TestFineTuning:
    def test_whole(self, pretrained, tmp_path):
        train(**pretrained)
        before, after = (load_file(folder / WEIGHTS) for folder in (tmp_path / "base", Path(pretrained["output_dir"])))
        assert before.keys() == after.keys()
        assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("conv_in.weight"))
        assert AutoencoderKL.from_pretrained(pretrained["output_dir"]).config.scaling_factor != 0.5

    def test_a_missing_scale_is_measured(self, pretrained, tmp_path):
        del pretrained["max_train_samples"]
        path = tmp_path / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": None}))
        train(**pretrained)
        mean, variance = latents_of(pretrained["output_dir"], emoji())
        total = (mean**2 + variance).mean() - mean.mean() ** 2
        config = AutoencoderKL.from_pretrained(pretrained["output_dir"]).config
        assert config.scaling_factor == pytest.approx(1 / np.sqrt(total), rel=1e-5)

    def test_the_decoder_only(self, pretrained, tmp_path):
        """From a pipeline's subfolder; the encoder, scale and shift stay as they are, bit by bit."""
        shutil.move(tmp_path / "base", tmp_path / "vae")
        (tmp_path / "base").mkdir()
        shutil.move(tmp_path / "vae", tmp_path / "base" / "vae")
        train(**pretrained | ADVERSARIAL, decoder_only=True)
        folder = Path(pretrained["output_dir"])
        before, after = load_file(tmp_path / "base" / "vae" / WEIGHTS), load_file(folder / WEIGHTS)
        kept = [name for name in before if name.startswith(("encoder.", "quant_conv."))]
        assert all(torch.equal(before[name], after[name]) for name in kept)
        assert not any(torch.equal(before[name], after[name]) for name in before if name.startswith("decoder.conv_"))
        config = AutoencoderKL.from_pretrained(folder).config
        assert (config.scaling_factor, config.shift_factor) == (0.5, 0.25)
        record = json.loads((folder / "autoencoder.json").read_text())
        assert len(record["latent_std"]) == 2
        train(output_dir=str(folder), resume_from_checkpoint="latest", max_train_steps=3)
        random_autoencoder(1, scaling_factor=0.5, shift_factor=0.25).save_pretrained(tmp_path / "base" / "vae")
        with pytest.raises(ValueError, match="the hash of the frozen encoder is .*, and was .* for checkpoint-3"):
            train(output_dir=str(folder), resume_from_checkpoint="latest", max_train_steps=4)

    def test_the_format_is_that_of_the_record(self, short, tmp_path):
        """A fine-tuned autoencoder keeps its value range."""
        data = write_images(tmp_path / "data", "grey")
        arguments = {k: v for k, v in short.items() if k not in ("data_files", "max_train_samples")}
        arguments |= {"train_data_dir": data, "train_batch_size": 4}
        train(**arguments, value_range=[100, 4000])
        again = {k: v for k, v in arguments.items() if k != "model_config_name_or_path"}
        again |= {"pretrained_model_name_or_path": short["output_dir"], "output_dir": str(tmp_path / "again")}
        train(**again)
        record = json.loads((tmp_path / "again" / "autoencoder.json").read_text())
        assert record["image_format"]["value_range"] == [100, 4000]
        with pytest.raises(ValueError, match="the encoder was trained on grey images from 100 to 4000.*`decoder_only`"):
            train(**again | {"output_dir": str(tmp_path / "other")}, value_range=[0, 5000], decoder_only=True)


def test_perceptual_loss_of_a_classifier(short, tmp_path):
    random_classifier().save_pretrained(tmp_path / "judge" / "classifier")
    train(**short, perceptual_network=tmp_path / "judge", perceptual_weight=0.5)
    rows = read_metrics(short["output_dir"])
    assert rows[0]["perceptual"] > 0
    random_classifier(1).save_pretrained(tmp_path / "judge" / "classifier")
    with pytest.raises(ValueError, match="the hash of the frozen perceptual network is"):
        train(output_dir=short["output_dir"], resume_from_checkpoint="latest", max_train_steps=3)


# 2. Other images


def write_images(folder, kind, number=8):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(number):
        if kind == "grey":
            Image.fromarray(generator.integers(100, 4001, (8, 8), dtype=np.uint16)).save(folder / f"{index}.png")
        else:
            np.save(folder / f"{index}.npy", generator.uniform(-1.5, 2.5, (8, 16, 5)).astype(np.float32))
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "arguments", "image_format"),
    [
        ("grey", {"value_range": [100, 4000]}, ImageFormat("L", 1, (100, 4000), 3901)),
        (
            "bands",
            {"value_range": [-1.5, 2.5], "resolution": "8x16", "preview_channels": [5, 4, 2]},
            ImageFormat("array", 5, (-1.5, 2.5), None),
        ),
    ],
)
def test_other_images(short, tmp_path, kind, arguments, image_format):
    short = {k: v for k, v in short.items() if k not in ("data_files", "max_train_samples")}
    data = write_images(tmp_path / "data", kind)
    train(**short | ADVERSARIAL | arguments | {"train_data_dir": data, "train_batch_size": 4})
    folder = Path(short["output_dir"])
    autoencoder, record = AutoencoderKL.from_pretrained(folder), json.loads((folder / "autoencoder.json").read_text())
    assert ImageFormat.from_config(record["image_format"], image_format.channels) == image_format
    assert autoencoder.config.in_channels == autoencoder.config.out_channels == image_format.channels
    assert record["resolution"] == ([8, 16] if kind == "bands" else 8)
    images = torch.zeros(1, image_format.channels, 8, 16 if kind == "bands" else 8)
    assert LatentSpace(autoencoder).decode(LatentSpace(autoencoder).encode(images)).shape == images.shape
    assert json.loads((folder / "reconstruction.json").read_text())["psnr"] > 0


# 3. What is refused, before the first step


class TestBadInput:
    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch):
        monkeypatch.setattr(training_run, "seed_step", lambda *args: pytest.fail("training began"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"discriminator_start": -1}, "`discriminator_start` is -1; it must be an optimizer step from 0 on"),
            ({"discriminator_start": 2}, "`discriminator_start` is 2, but the run ends after 2 .* would never start"),
            (
                {"discriminator_start": 2, "max_train_steps": "none", "num_train_epochs": 1, "discriminator_layers": 1},
                "`discriminator_start` is 2, but the run ends after 2 ",
            ),
            (
                {"discriminator_start": 0},
                "`discriminator_layers` is 3, which needs images of 24 pixels or more; the resolution is 8 x 8",
            ),
            ({"discriminator_start": 0, "discriminator_channels": 48}, "`base_channels` is 48, which"),
            ({"kl_weight": -1}, "`kl_weight` is -1.0; it must be at least 0"),
            ({"perceptual_weight": 1}, "`perceptual_weight` needs a `perceptual_network`"),
            ({"perceptual_network": "lpips"}, "`perceptual_network` was given without `perceptual_weight`"),
            (
                {"perceptual_network": "lpips", "perceptual_weight": 1},
                "`perceptual_network` is 'lpips', but the package lpips is not installed",
            ),
            (
                {"perceptual_network": "absent", "perceptual_weight": 1},
                "`perceptual_network` is 'absent', which is no file or folder here and cannot be read",
            ),
            ({"rfid_network": "absent"}, "`rfid_network` is 'absent', which is no file or folder here"),
            ({"resolution": 9}, "The resolution is 9; this autoencoder downsamples by 2, so it must be divisible by 2"),
            ({"decoder_only": True}, "`decoder_only` needs a trained encoder. Pass `pretrained_model_name_or_path`"),
            ({"replace_classes": True}, "`replace_classes` was given without `pretrained_model_name_or_path`"),
            ({"preview_channels": [4]}, "`preview_channels` is 4, but the images have 3 channels"),
            ({"train_batch_size": 17}, "There are 16 usable images, but one step takes 17"),
            ({"validation_data_files": "absent.parquet"}, "absent.parquet"),
            ({"num_validation_images": 0}, "`num_validation_images` is 0; it must be at least 1"),
        ],
    )
    def test_arguments(self, short, changes, message):
        if "not installed" in message and importlib.util.find_spec("lpips") is not None:
            pytest.skip("it is installed")
        with pytest.raises(ValueError, match=message):
            train(**short | changes)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"_class_name": "AutoencoderTiny"}, "is the config of `AutoencoderTiny`; this script trains"),
            ({"latent_channel": 4}, "'latent_channel', which is no argument of `AutoencoderKL`. Did you mean"),
            ({"in_channels": 3, "out_channels": 1}, "takes 3 channels and decodes 1. Both must be those of the images"),
            ({"in_channels": 1}, "The network has 1 channel.*RGB images.*`--image_mode L`"),
            ({"norm_num_groups": 5}, "`block_out_channels` 8, which is not divisible by `norm_num_groups` 5"),
            ({"down_block_types": ["DownEncoderBlock2D"]}, "has 1 `down_block_types` and 2 `block_out_channels`"),
        ],
    )
    def test_models(self, short, tmp_path, config, message):
        short["model_config_name_or_path"] = write_config(tmp_path, **config)
        with pytest.raises(ValueError, match=message):
            train(**short)

    def test_a_classifier_of_other_images(self, short, tmp_path):
        random_classifier(in_channels=1).save_pretrained(tmp_path / "judge")
        with pytest.raises(ValueError, match="a classifier of grey images .*, but the training data are RGB images"):
            train(**short, rfid_network=tmp_path / "judge")

    def test_a_scale_that_cannot_stay(self, pretrained, tmp_path):
        path = tmp_path / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": None}))
        with pytest.raises(ValueError, match="`scaling_factor` None"):
            train(**pretrained, decoder_only=True)

    def test_weights_that_are_not_finite(self, pretrained, tmp_path):
        autoencoder = AutoencoderKL.from_pretrained(tmp_path / "base")
        autoencoder.encoder.conv_in.bias.data[0] = torch.nan
        autoencoder.save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match="`pretrained_model_name_or_path` are not finite.*encoder.conv_in.bias"):
            train(**pretrained)


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("autoencoder_*.yaml")), ids=lambda path: path.stem)
def test_recipes(recipe, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    model_args, data_args, *_ = parse_args(train_autoencoder.ARGUMENT_TYPES, ["--config", str(recipe)])
    config = json.loads(Path(model_args.model_config_name_or_path).read_text())
    autoencoder = AutoencoderKL.from_config(config)
    assert 1.2e6 < autoencoder.num_parameters() < 1.4e6
    for path in (*data_args.data_files, *data_args.validation_data_files):
        assert Path(path).is_file()


def test_the_log_names_the_latents(short, caplog):
    with caplog.at_level(logging.INFO):
        train(**short)
    assert "Latents of 16 images, by channel:" in caplog.text
    assert "scaling_factor" in caplog.text


def test_the_recipe(monkeypatch):
    """It parses, and its autoencoder has f = 4 and less than 3 MB in float16."""
    monkeypatch.chdir(REPOSITORY)
    recipe = ["--config", "training/configs/autoencoder_emoji_64.yaml"]
    model_args, data_args, *_ = parse_args(AUTOENCODER_ARGUMENTS, recipe)
    assert all(Path(path).is_file() for path in (*data_args.data_files, *data_args.validation_data_files))
    config = json.loads(Path(model_args.model_config_name_or_path).read_text())
    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(config)
    assert LatentSpace(autoencoder).factor == 4
    assert 2 * sum(parameter.numel() for parameter in autoencoder.parameters()) < 3e6
