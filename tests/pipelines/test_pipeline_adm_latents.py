"""ADMPipeline with an autoencoder: a Stable Diffusion folder of reduced width, and what surrounds latents."""

import re

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from tolerances import SAMPLING, rounding_errors
from toy_models import (
    CONDITIONAL,
    fill_randomly,
    random_classifier,
    random_diffusers_text_unet,
    random_text_encoder,
    random_unet,
    toy_tokenizer,
)

from diffusers_adm import AdaGNUNet2DModel, ADMPipeline, LearnedVarianceDDPMScheduler


def random_vae(**config) -> AutoencoderKL:
    """Four latent channels, each for 2 x 2 pixels."""
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "latent_channels": 4,
        "sample_size": 16,
    }
    return fill_randomly(AutoencoderKL(**{**defaults, **config}))


def make_pipeline(vae=None, unet=None, **components) -> ADMPipeline:
    absent = dict.fromkeys(ADMPipeline._optional_components)
    unet = random_unet(in_channels=4, out_channels=8) if unet is None else unet
    vae = random_vae() if vae is None else vae
    pipe = ADMPipeline(unet, **{"scheduler": LearnedVarianceDDPMScheduler(), **absent, "vae": vae, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pipe = StableDiffusionPipeline(
        vae=random_vae(),
        text_encoder=random_text_encoder("clip"),
        tokenizer=toy_tokenizer("clip"),
        unet=random_diffusers_text_unet(in_channels=4, out_channels=4, resnet_time_scale_shift="default"),
        # As published: no clipping, the last step ends at the first alpha, timesteps start at 1.
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("stable_diffusion")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipelines(folder) -> tuple[StableDiffusionPipeline, ADMPipeline]:
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    components = {name: getattr(theirs, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    unet = AdaGNUNet2DModel.from_pretrained(folder, subfolder="unet")
    return theirs, make_pipeline(unet=unet, **components)


class TestStableDiffusion:
    @pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
    @pytest.mark.parametrize("negative_prompt", [None, "a green mat"])
    def test_same_images(self, pipelines, guidance_scale, negative_prompt):
        arguments = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "num_inference_steps": 8}
        arguments["latents"] = torch.randn(1, 4, 8, 8, generator=seeded())
        expected, actual, other = (
            pipe(prompt, output_type="pt", **arguments).images
            for pipe, prompt in ((pipelines[0], "a red cat"), (pipelines[1], "a red cat"), (pipelines[1], "the dog"))
        )
        assert actual.shape == (1, 3, 16, 16)
        assert expected.std() > 0.03
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        assert (other - actual).abs().max() > 0.01

    def test_same_images_from_the_same_generators(self, pipelines):
        expected, actual = (
            pipe(
                ["a cat", "a dog"],
                num_images_per_prompt=2,
                guidance_scale=3.0,
                generator=[seeded(i) for i in range(4)],
                num_inference_steps=4,
                output_type="pt",
            ).images
            for pipe in pipelines
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)

    def test_from_pipe(self, pipelines):
        """The same components in our pipeline; the network of diffusers serves as it is."""
        theirs, ours = pipelines
        pipe = ADMPipeline.from_pipe(theirs, classifier=None)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.unet is theirs.unet
        expected, actual = (
            p("a cat", guidance_scale=2.0, generator=seeded(), num_inference_steps=3, output_type="pt").images
            for p in (ours, pipe)
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)

    def test_round_trip(self, pipelines, tmp_path):
        ours = pipelines[1]
        ours.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is ADMPipeline
        actual, expected = (
            pipe("a cat", generator=seeded(), num_inference_steps=3, output_type="pt").images for pipe in (loaded, ours)
        )
        assert rounding_errors(actual, expected) <= SAMPLING


class TestLatents:
    ARGUMENTS = {"num_inference_steps": 3, "batch_size": 2}

    @pytest.mark.parametrize("shift", [None, 0.4])
    def test_decoding(self, shift):
        vae = random_vae(scaling_factor=0.5, shift_factor=shift)
        pipe = make_pipeline(vae)
        latents = pipe(generator=seeded(), output_type="latent", **self.ARGUMENTS).images
        assert latents.shape == (2, 4, 8, 8)
        images = pipe(generator=seeded(), output_type="pt", **self.ARGUMENTS).images
        with torch.no_grad():
            expected = vae.decode(2 * latents + (shift or 0.0)).sample
        assert rounding_errors(images, ((expected + 1) / 2).clamp(0, 1)) <= SAMPLING

    def test_sizes_are_pixels(self):
        pipe = make_pipeline()
        assert pipe(output_type="pt", height=24, **self.ARGUMENTS).images.shape == (2, 3, 24, 16)
        assert pipe(output_type="latent", height=24, **self.ARGUMENTS).images.shape == (2, 4, 12, 8)
        (image, _) = pipe(**self.ARGUMENTS).images
        assert (image.mode, image.size) == ("RGB", (16, 16))
        with pytest.raises(ValueError, match="`height` and `width` are 18 and 16; both must be .* divisible by 4"):
            pipe(height=18)
        with pytest.raises(ValueError, match=re.escape("of shape (1, 4, 8, 8)")):
            pipe(latents=torch.zeros(1, 4, 16, 16))

    def test_half_precision(self, tmp_path):
        pipe = make_pipeline()
        pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
        loaded.set_progress_bar_config(disable=True)
        actual, expected = (p(generator=seeded(), output_type="pt", **self.ARGUMENTS).images for p in (loaded, pipe))
        assert (actual - expected).abs().mean() < 0.05

    def test_classes_and_a_classifier_of_latents(self):
        pipe = make_pipeline(
            unet=random_unet(in_channels=4, out_channels=8, **CONDITIONAL),
            classifier=random_classifier(in_channels=4, num_classes=4),
        )
        arguments = {"class_labels": [1, 2], "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "pt"}
        steered, plain = (
            pipe(classifier_guidance_scale=scale, generator=seeded(), **arguments).images for scale in (1.0, 0.0)
        )
        assert steered.shape == (2, 3, 16, 16)
        assert (steered - plain).abs().max() > 1e-3
        with pytest.raises(ValueError, match="on samples of 8 x 8, and `height` and `width` ask for 12 x 8"):
            pipe(class_labels=1, classifier_guidance_scale=1.0, height=24)

    def test_another_number_of_channels(self):
        with pytest.raises(ValueError, match="latents of 4 channels, but `unet` has `in_channels=3`"):
            make_pipeline(unet=random_unet())
