"""The training script with `--task inpaint`: from scratch and from an ordinary model, which it starts as."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from runs import (
    CONFIGS,
    EMOJI,
    SHORT_RUN,
    assert_same_checkpoint,
    flags,
    own_process_state,
    read_metrics,
    reset_accelerate,
    save_base,
)
from scripts import load_script
from tolerances import NETWORK, rounding_errors
from toy_models import CONDITIONAL, random_text_unet, random_unet

from diffusers_adm import AdaGNUNet2DModel, ADMInpaintPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.training import diffusion, find_latest_checkpoint, parse_args, training_losses, widen_input
from diffusers_adm.training import run as training_run


train_adm = load_script("train_adm")


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_run, "plot_loss_curves", lambda *args: None)  # slow, and tested elsewhere
    with own_process_state("train_adm"):
        yield


@pytest.fixture
def short(tmp_path):
    """Arguments of a run of two steps from an ordinary model."""
    return SHORT_RUN | {
        "pretrained_model_name_or_path": save_base(
            tmp_path / "base", random_unet(num_class_embeds=10, null_class_id=9)
        ),
        "task": "inpaint",
        "data_files": EMOJI,
        "label_column": "label",
        "resolution": 8,
        "max_train_samples": 40,
        "output_dir": str(tmp_path / "run"),
        "learning_rate": 1e-2,
        "num_validation_images": 4,
        "validation_guidance_scale": 2.0,
    }


def train(**arguments):
    reset_accelerate()
    train_adm.main(flags(**arguments))


class Calls:
    """The arguments of `training_losses`."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(train_adm, "training_losses", self)

    def __call__(self, unet, scheduler, pixels, timesteps, **kwargs):
        self.calls.append((pixels.clone(), kwargs["extra_channels"]))
        return training_losses(unet, scheduler, pixels, timesteps, **kwargs)


class TestWidening:
    @torch.no_grad()
    def test_the_output_stays_what_it_was(self):
        unet, base = random_unet(**CONDITIONAL), random_unet(**CONDITIONAL)
        widen_input(unet, 7)
        assert unet.config.in_channels == 7
        generator = torch.Generator().manual_seed(0)
        sample, extra = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
        labels = torch.tensor([1, 2])
        actual = unet(torch.cat([sample, extra], dim=1), 300, labels).sample
        assert rounding_errors(actual, base(sample, 300, labels).sample) <= NETWORK
        unet.conv_in.weight[:, 3:] = 0.1
        assert rounding_errors(unet(torch.cat([sample, extra], dim=1), 300, labels).sample, actual) > NETWORK

    def test_the_new_weights_are_trained(self):
        unet = random_unet()
        widen_input(unet, 7)
        unet(torch.ones(1, 7, 8, 8), 300).sample.sum().backward()
        assert unet.conv_in.weight.grad[:, 3:].abs().min() > 0

    def test_dtype_and_training_mode(self):
        unet = random_unet().to(torch.float64)
        widen_input(unet, 10)
        assert unet.conv_in.weight.dtype == torch.float64
        assert unet.conv_in.weight.shape[1] == 10


class TestRun:
    def test_from_an_ordinary_model(self, short, monkeypatch):
        calls = Calls(monkeypatch)
        train(**short, checkpointing_steps=1)
        for pixels, extra in calls.calls:
            known = extra[:, 3:]
            assert extra.shape == (8, 4, 8, 8)
            assert set(known.unique().tolist()) == {0.0, 1.0}
            assert torch.equal(extra[:, :3], pixels * known)
            assert len({tuple(mask.flatten().tolist()) for mask in known}) > 4

        pipe = ADMInpaintPipeline.from_pretrained(short["output_dir"])
        assert pipe.unet.config.in_channels == 7
        assert pipe.is_trained_to_inpaint
        assert pipe.id2label[0]
        new = pipe.unet.conv_in.weight[:, 3:]
        assert new.abs().min() > 0
        pipe.set_progress_bar_config(disable=True)
        (image,) = pipe(
            Image.new("RGB", (8, 8), "red"), Image.new("L", (8, 8), 255), class_labels=1, guidance_scale=2.0
        )[0]
        assert image.size == (8, 8)

        # Two rows of a masked image and two samples.
        (grid,) = Path(short["output_dir"]).glob("samples-*.png")
        assert Image.open(grid).size == (3 * 66 + 2, 2 * 66 + 2)

        # A resumed run is the unbroken one.
        resumed = {**short, "output_dir": short["output_dir"] + "-resumed"}
        train(**{**resumed, "max_train_steps": 1}, lr_scheduler="constant")
        train(**resumed, lr_scheduler="constant", resume_from_checkpoint="latest")
        assert_same_checkpoint(*(find_latest_checkpoint(run["output_dir"]) for run in (short, resumed)))

    def test_the_first_loss_is_that_of_the_base(self, short):
        """The new channels count for nothing yet; timesteps, noise and images are the same."""
        run = {**short, "max_train_steps": 1}
        train(**run)
        ordinary = {**run, "task": "generate", "output_dir": short["output_dir"] + "-ordinary"}
        train(**ordinary)
        (first,), (second,) = (read_metrics(r["output_dir"]) for r in (run, ordinary))
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)

    def test_from_scratch_and_on(self, tmp_path, short):
        config = dict(random_unet(in_channels=7).config)
        (tmp_path / "model.json").write_text(json.dumps(config))
        del short["pretrained_model_name_or_path"], short["label_column"], short["validation_guidance_scale"]
        train(**short, model_config_name_or_path=str(tmp_path / "model.json"))
        again = {**short, "output_dir": str(tmp_path / "again")}
        train(**again, pretrained_model_name_or_path=short["output_dir"], lora_rank=2)  # it takes masks already
        base = AdaGNUNet2DModel.from_pretrained(short["output_dir"], subfolder="unet")
        assert base.config.in_channels == 7
        assert (tmp_path / "again" / "pytorch_lora_weights.safetensors").is_file()

    def test_with_captions(self, tmp_path, short):
        base = save_base(tmp_path / "text", random_text_unet("added_kv", num_class_embeds=10, null_class_id=9), "t5")
        train(**{**short, "pretrained_model_name_or_path": base, "max_train_steps": 1}, caption_column="text")
        assert ADMInpaintPipeline.from_pretrained(short["output_dir"]).text_encoder is not None


class TestRefused:
    @pytest.fixture(autouse=True)
    def no_data(self, monkeypatch):
        monkeypatch.setattr(diffusion, "load_image_dataset", lambda **_: pytest.fail("data were read"))

    def check(self, message, arguments):
        with pytest.raises(ValueError, match=re.escape(message)):
            train(**arguments)

    def test_an_adapter_for_a_model_without_masks(self, short):
        self.check(
            "takes no masks, and `lora_rank` leaves",
            {**short, "lora_rank": 2},
        )

    def test_prompts_for_grids(self, short):
        self.check("own captions", {**short, "caption_column": "text", "validation_prompts": ["a cat"]})

    def test_other_channels(self, tmp_path, short):
        upsampler = save_base_unet(tmp_path / "upsampler", in_channels=6)
        self.check(
            "The U-Net takes 6 channels and has 6 output channels; this script trains U-Nets of 7",
            {**short, "pretrained_model_name_or_path": upsampler},
        )
        inpainter = save_base_unet(tmp_path / "inpainter", in_channels=7)
        self.check(
            "Those of 7 are trained by train_adm.py --task inpaint.",
            {**short, "pretrained_model_name_or_path": inpainter, "task": "generate"},
        )

    def test_a_config_for_scratch_is_not_widened(self, tmp_path, short):
        path = tmp_path / "model.json"
        random_unet().save_config(tmp_path / "unet")
        path.write_text((tmp_path / "unet" / "config.json").read_text())
        del short["pretrained_model_name_or_path"]
        self.check(
            "The U-Net takes 3 channels and has 6 output channels; this script trains U-Nets of 7",
            {**short, "model_config_name_or_path": str(path)},
        )


def save_base_unet(folder, **config):
    random_unet(**config).save_pretrained(folder / "unet")
    LearnedVarianceDDPMScheduler().save_pretrained(folder / "scheduler")
    return str(folder)


def test_the_recipe_parses():
    path = CONFIGS / "emoji_32_inpaint.yaml"
    model, data, *_, text, task, lora, _ = parse_args(train_adm.ARGUMENT_TYPES, ["--config", str(path)])
    recipe = yaml.safe_load(path.read_text())
    assert (task.task, lora.lora_rank) == ("inpaint", None)
    assert model.pretrained_model_name_or_path == recipe["pretrained_model_name_or_path"]
    assert (data.label_column, text.caption_column) == ("label", "text")
