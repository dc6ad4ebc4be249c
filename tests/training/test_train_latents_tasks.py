"""Inpainting and super-resolution in the latents of an autoencoder: the training scripts with `--vae`."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, LDMSuperResolutionPipeline, VQModel
from PIL import Image
from runs import (
    EMOJI,
    SHORT_RUN,
    assert_same_checkpoint,
    flags,
    own_process_state,
    read_metrics,
    reset_accelerate,
)
from scripts import load_script
from tolerances import NETWORK, rounding_errors
from toy_models import TOY_CONFIG, fill_randomly, random_diffusers_unet, random_unet

from diffusers_adm import ADMInpaintPipeline, ADMPipeline, ADMSuperResolutionPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.data import encode_latents
from diffusers_adm.training import find_latest_checkpoint
from diffusers_adm.training import run as training_run
from diffusers_adm.training.arguments import DataArguments, UNetArguments
from diffusers_adm.training.latents import load_latent_space


train_adm = load_script("train_adm")
train_super_resolution = load_script("train_super_resolution")


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_adm"), own_process_state("train_super_resolution"):
        yield


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """Four latent channels, each for 2 x 2 pixels."""
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.2,
    }
    return fill_randomly(AutoencoderKL(**config))


@pytest.fixture(scope="module")
def vae_folder(vae, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("autoencoder")
    vae.save_pretrained(folder)
    return str(folder)


def model_config(folder: Path, **changes) -> str:
    """Without channels, unless given: they follow from autoencoder and task."""
    config = {k: v for k, v in TOY_CONFIG.items() if k not in ("in_channels", "out_channels", "sample_size")}
    path = folder / "model.json"
    path.write_text(json.dumps({**config, **changes}))
    return str(path)


def save_pipeline(folder: Path, vae, pipeline_class=ADMInpaintPipeline, in_channels=9, **config) -> str:
    unet = random_unet(in_channels=in_channels, out_channels=8, sample_size=4, num_class_embeds=10, null_class_id=9)
    absent = dict.fromkeys(pipeline_class._optional_components)
    pipe = pipeline_class(unet, LearnedVarianceDDPMScheduler(), **{**absent, "vae": vae}, **config)
    pipe.save_pretrained(folder)
    return str(folder)


def samples_of(vae, images: torch.Tensor) -> torch.Tensor:
    """By the formula: scale and shift of the mode of the posterior."""
    with torch.no_grad():
        return (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor


# 1. Inpainting


@pytest.fixture
def short(tmp_path, vae_folder):
    """Arguments of a run of two steps: images of 8 x 8 pixels, latents of 4 x 4."""
    return SHORT_RUN | {
        "task": "inpaint",
        "data_files": EMOJI,
        "resolution": 8,
        "max_train_samples": 24,
        "train_batch_size": 4,
        "output_dir": str(tmp_path / "run"),
        "vae": vae_folder,
    }


def train(**arguments):
    reset_accelerate()
    train_adm.main(flags(**arguments))


@pytest.fixture
def seen(monkeypatch):
    """`(images, keep mask, samples, extra channels)` of each step."""
    steps, batches = [], []
    training_losses, for_training = train_adm.training_losses, train_adm.InpaintingCondition.for_training

    def record(unet, scheduler, samples, timesteps, **kwargs):
        if batches:  # none for other tasks
            steps.append((*batches.pop(), samples, kwargs["extra_channels"]))
        return training_losses(unet, scheduler, samples, timesteps, **kwargs)

    def record_batch(condition, batch):
        batches.append((batch["images"], batch["keep_mask"]))
        return for_training(condition, batch)

    monkeypatch.setattr(train_adm, "training_losses", record)
    monkeypatch.setattr(train_adm.InpaintingCondition, "for_training", record_batch)
    return steps


def check_glide(vae, images, keep, samples, extra):
    """Masked image, then the mask; a latent is kept if all of its pixels are."""
    kept_latents = F.avg_pool2d(keep, 2) == 1
    assert samples.shape == (4, 4, 4, 4)
    assert torch.equal(extra[:, 4:], kept_latents.float())
    assert rounding_errors(extra[:, :4], samples_of(vae, images * keep) * kept_latents) <= NETWORK


def check_stable_diffusion(vae, images, keep, samples, extra):
    """The inverted mask of one pixel for each latent, then the masked image."""
    assert samples.shape == (4, 4, 4, 4)
    assert torch.equal(extra[:, :1], F.interpolate(1 - keep, (4, 4)))
    assert rounding_errors(extra[:, 1:], samples_of(vae, images * keep)) <= NETWORK


class TestInpainting:
    @pytest.mark.parametrize(
        ("layout", "check"), [("glide", check_glide), ("stable-diffusion", check_stable_diffusion)]
    )
    def test_from_scratch(self, layout, check, short, seen, vae, tmp_path):
        asked = {} if layout == "glide" else {"inpainting_layout": layout}
        train(**short, **asked, model_config_name_or_path=model_config(tmp_path))
        assert len(seen) == 2
        for step in seen:
            check(vae, *step)
        pipe = ADMInpaintPipeline.from_pretrained(short["output_dir"])
        assert (pipe.config.inpainting_layout, pipe.unet.config.in_channels) == (layout, 9)
        assert pipe.unet.config.sample_size == 4
        assert pipe.vae is not None
        pipe.set_progress_bar_config(disable=True)
        (image,) = pipe(Image.new("RGB", (8, 8), "red"), Image.new("L", (8, 8), 255), num_inference_steps=2).images
        assert image.size == (8, 8)
        # Two masked images and a sample of each.
        (grid,) = Path(short["output_dir"]).glob("samples-*.png")
        assert Image.open(grid).size == (2 * 66 + 2, 2 * 66 + 2)

    def test_from_an_ordinary_model(self, short, seen, vae, tmp_path):
        """It is widened by a masked image of latents and a mask; at first these do not count."""
        base = save_pipeline(tmp_path / "base", vae, ADMPipeline, in_channels=4)
        short |= {"pretrained_model_name_or_path": base, "label_column": "label", "learning_rate": 1e-2}
        del short["vae"]  # the pipeline has one
        train(**short, checkpointing_steps=1)
        for step in seen:
            check_glide(vae, *step)
        pipe = ADMInpaintPipeline.from_pretrained(short["output_dir"])
        assert (pipe.config.inpainting_layout, pipe.unet.config.in_channels) == ("glide", 9)
        assert pipe.unet.conv_in.weight[:, 4:].abs().min() > 0
        ordinary = {**short, "task": "generate", "output_dir": str(tmp_path / "ordinary"), "max_train_steps": 1}
        train(**ordinary)
        first, second = (read_metrics(folder)[0] for folder in (short["output_dir"], ordinary["output_dir"]))
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)

        # A resumed run is the unbroken one.
        resumed = {**short, "output_dir": short["output_dir"] + "-resumed"}
        train(**{**resumed, "max_train_steps": 1}, lr_scheduler="constant")
        train(**resumed, lr_scheduler="constant", resume_from_checkpoint="latest")
        assert_same_checkpoint(*(find_latest_checkpoint(run["output_dir"]) for run in (short, resumed)))

    def test_a_pretrained_model_keeps_its_layout(self, short, seen, vae, tmp_path):
        base = save_pipeline(tmp_path / "base", vae, inpainting_layout="stable-diffusion")
        short |= {"pretrained_model_name_or_path": base, "label_column": "label", "max_train_steps": 1}
        train(**short)
        check_stable_diffusion(vae, *seen[0])
        pipe = ADMInpaintPipeline.from_pretrained(short["output_dir"])
        assert pipe.config.inpainting_layout == "stable-diffusion"
        with pytest.raises(ValueError, match="is 'glide', but .* takes masks in the layout 'stable-diffusion'"):
            train(**short | {"output_dir": str(tmp_path / "other")}, inpainting_layout="glide")

    def test_an_unknown_layout(self, short, vae, tmp_path):
        base = Path(save_pipeline(tmp_path / "base", vae, inpainting_layout="glide"))
        (base / "model_index.json").unlink()
        short |= {"pretrained_model_name_or_path": str(base), "label_column": "label", "max_train_steps": 1}
        with pytest.raises(ValueError, match="Pass `inpainting_layout`: 'glide' for .* or 'stable-diffusion' for"):
            train(**short)
        train(**short, inpainting_layout="glide")
        assert ADMInpaintPipeline.from_pretrained(short["output_dir"]).inpainting_layout == "glide"

    def test_a_layout_without_inpainting(self, short, tmp_path):
        short |= {"model_config_name_or_path": model_config(tmp_path), "task": "generate"}
        with pytest.raises(ValueError, match="`inpainting_layout` is 'glide', but `task` is generate"):
            train(**short, inpainting_layout="glide")

    def test_stored_latents(self, short, tmp_path):
        folder = store_latents(tmp_path, short["vae"])
        del short["data_files"]
        message = f"`train_data_dir` '{folder}' holds latents (latents.json), but masked images cannot be made"
        with pytest.raises(ValueError, match=re.escape(message)):
            train(**short, train_data_dir=folder, model_config_name_or_path=model_config(tmp_path))


# 2. Super-resolution


@pytest.fixture
def upsampler(tmp_path, short):
    """Arguments of a run of two steps, to images of 8 x 8 pixels in latents of 4 x 4."""
    del short["task"]
    (tmp_path / "upsampler").mkdir()
    config = model_config(tmp_path / "upsampler", time_cond_proj_dim=6)
    return short | {"model_config_name_or_path": config, "low_res_size": 4, "max_noise_level": 5}


def train_upsampler(**arguments):
    reset_accelerate()
    train_super_resolution.main(flags(**arguments))


@pytest.fixture
def upsampled(monkeypatch):
    """`(images, samples, extra channels)` of each step."""
    steps, batches = [], []
    training_losses = train_super_resolution.training_losses
    for_training = train_super_resolution.LowResolutionCondition.for_training

    def record(unet, scheduler, samples, timesteps, **kwargs):
        steps.append((batches.pop(), samples, kwargs["extra_channels"]))
        assert kwargs["num_levels"] is None
        return training_losses(unet, scheduler, samples, timesteps, **kwargs)

    def record_batch(condition, batch):
        batches.append(batch["images"])
        return for_training(condition, batch)

    monkeypatch.setattr(train_super_resolution, "training_losses", record)
    monkeypatch.setattr(train_super_resolution.LowResolutionCondition, "for_training", record_batch)
    return steps


class TestSuperResolution:
    @pytest.mark.parametrize("low_res_size", [4, 2])
    def test_the_image_is_concatenated_to_latents(self, low_res_size, upsampler, upsampled):
        train_upsampler(**upsampler | {"low_res_size": low_res_size, "max_noise_level": 0})
        assert len(upsampled) == 2
        for images, samples, extra in upsampled:
            assert samples.shape == (4, 4, 4, 4)
            # Means of blocks, rounded to 8 bits, and upsampled to the size of the latents if they are smaller.
            small = F.avg_pool2d(((images + 1) * 127.5).round(), 8 // low_res_size).add(0.5).floor() / 127.5 - 1
            expected = F.interpolate(small, (4, 4), mode="bilinear", align_corners=False)
            torch.testing.assert_close(extra, expected)

    def test_a_run_and_its_pipeline(self, upsampler, tmp_path):
        upsampler |= {"label_column": "label"}
        train_upsampler(**upsampler, checkpointing_steps=1)
        pipe = ADMSuperResolutionPipeline.from_pretrained(upsampler["output_dir"])
        assert (pipe.unet.config.in_channels, pipe.unet.config.out_channels) == (7, 8)
        assert (pipe.config.low_res_size, pipe.config.max_noise_level, pipe.unet.config.sample_size) == (4, 5, 4)
        pipe.set_progress_bar_config(disable=True)
        (image,) = pipe(Image.new("RGB", (4, 4), "red"), class_labels=1, noise_level=3, num_inference_steps=2).images
        assert image.size == (8, 8)
        # Small image, sample and large image of two examples.
        (grid,) = Path(upsampler["output_dir"]).glob("samples-*.png")
        assert Image.open(grid).size[0] > 3 * 8

        # A resumed run is the unbroken one.
        resumed = {**upsampler, "output_dir": upsampler["output_dir"] + "-resumed"}
        train_upsampler(**{**resumed, "max_train_steps": 1}, lr_scheduler="constant")
        train_upsampler(**resumed, lr_scheduler="constant", resume_from_checkpoint="latest")
        assert_same_checkpoint(*(find_latest_checkpoint(run["output_dir"]) for run in (upsampler, resumed)))

        # Fine-tuned with the autoencoder and sizes of the pipeline.
        again = {**upsampler, "output_dir": str(tmp_path / "again"), "max_train_steps": 1}
        for name in ("vae", "model_config_name_or_path", "low_res_size", "max_noise_level"):
            del again[name]
        train_upsampler(**again, pretrained_model_name_or_path=upsampler["output_dir"])
        pipe = ADMSuperResolutionPipeline.from_pretrained(again["output_dir"])
        assert (pipe.vae is not None, pipe.config.low_res_size, pipe.config.max_noise_level) == (True, 4, 5)

    def test_a_small_image_larger_than_latents(self, upsampler, tmp_path):
        folder, kinds = tmp_path / "deep", ("DownEncoderBlock2D",) * 3
        config = {"down_block_types": kinds, "up_block_types": ("UpDecoderBlock2D",) * 3, "norm_num_groups": 2}
        AutoencoderKL(**config, block_out_channels=(4, 4, 4), latent_channels=4).save_pretrained(folder)
        message = "`low_res_size` is 8 x 8, but the latents that it is concatenated to are only 4 x 4"
        with pytest.raises(ValueError, match=message):
            train_upsampler(**upsampler | {"low_res_size": 8, "resolution": 16, "vae": str(folder)})

    def test_latents_of_diffusers_upsampler_are_not_scaled(self, tmp_path):
        """Whatever the config of its autoencoder says; see the comparison of pipelines."""
        config = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 3, "num_vq_embeddings": 16}
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        LDMSuperResolutionPipeline(
            VQModel(**config, **blocks), random_diffusers_unet(), DDIMScheduler()
        ).save_pretrained(tmp_path)
        latents = load_latent_space(UNetArguments(pretrained_model_name_or_path=str(tmp_path)), DataArguments())
        assert (latents.space.scale, latents.space.channels) == (1.0, 3)

    def test_other_channels(self, upsampler, tmp_path):
        """Those of an upsampler in pixels."""
        config = model_config(tmp_path / "upsampler", in_channels=6, out_channels=6)
        with pytest.raises(ValueError, match="for samples of 3 channels, but the latents of the autoencoder have 4"):
            train_upsampler(**upsampler | {"model_config_name_or_path": config, "max_noise_level": 0})

    def test_stored_latents(self, upsampler, tmp_path):
        folder = store_latents(tmp_path, upsampler["vae"])
        del upsampler["data_files"]
        with pytest.raises(ValueError, match="holds latents .*, but low-resolution images cannot be made from latents"):
            train_upsampler(**upsampler, train_data_dir=folder)


def store_latents(folder: Path, vae: str) -> str:
    output_dir = str(folder / "latents")
    arguments = {"vae": vae, "data_files": EMOJI, "resolution": 8, "output_dir": output_dir}
    encode_latents.main(flags(**arguments))
    return output_dir
