"""ADMSuperResolutionPipeline with an autoencoder, whose latents the low-resolution image is concatenated to."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, LDMSuperResolutionPipeline, VQModel
from tolerances import NETWORK, ONE_LAYER, SAMPLING, rounding_errors
from toy_models import fill_randomly, random_diffusers_unet, random_unet

from diffusers_adm import ADMImageToImagePipeline, ADMSuperResolutionPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.low_resolution import LowResolutionCondition, downsample


VAE_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
}


def random_vae() -> AutoencoderKL:
    """Four latent channels, each for 2 x 2 pixels."""
    return fill_randomly(AutoencoderKL(**VAE_CONFIG, latent_channels=4, scaling_factor=0.5))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_images(number: int = 1, size: int = 8) -> torch.Tensor:
    return torch.rand(number, 3, size, size, generator=seeded(1))


def make_pipeline(unet=None, vae="random", **config) -> ADMSuperResolutionPipeline:
    absent = dict.fromkeys(ADMSuperResolutionPipeline._optional_components)
    unet = random_unet(in_channels=7, out_channels=8) if unet is None else unet
    components = {**absent, "vae": random_vae() if vae == "random" else vae}
    pipe = ADMSuperResolutionPipeline(unet, LearnedVarianceDDPMScheduler(), **components, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs() -> LDMSuperResolutionPipeline:
    pipe = LDMSuperResolutionPipeline(
        # Its `scaling_factor` is the default, which this pipeline does not use.
        vqvae=fill_randomly(VQModel(**VAE_CONFIG, latent_channels=3, num_vq_embeddings=16)),
        unet=random_diffusers_unet(in_channels=6, out_channels=3, resnet_time_scale_shift="default"),
        scheduler=DDIMScheduler(beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear", clip_sample=False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(theirs) -> ADMSuperResolutionPipeline:
    pipe = ADMSuperResolutionPipeline.from_pipe(theirs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestLatentDiffusion:
    """diffusers' class, which takes an image of the size of the latents."""

    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_same_images(self, theirs, ours, eta):
        images = small_images(2)
        arguments = {"num_inference_steps": 5, "eta": eta, "output_type": "pt"}
        with torch.random.fork_rng():  # theirs draws the noise of its steps from the global generator
            torch.manual_seed(0)
            expected = theirs(2 * images - 1, **arguments).images
            torch.manual_seed(0)
            actual = ours(images, **arguments).images
        assert actual.shape == (2, 3, 16, 16)
        assert expected.std() > 0.03
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        other = ours(1 - images, **arguments).images
        assert (other - expected).abs().max() > 0.01

    def test_the_other_pipeline_stays(self, theirs, ours):
        assert ours.vae.config.scaling_factor == 1.0
        assert theirs.vqvae.config.scaling_factor == 0.18215
        assert next(ours.vae.parameters()) is next(theirs.vqvae.parameters())
        assert ours.unet is theirs.unet

    def test_their_folder(self, theirs, ours, tmp_path):
        theirs.save_pretrained(tmp_path)
        loaded = ADMSuperResolutionPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.vae.config.scaling_factor == 1.0
        arguments = {"num_inference_steps": 3, "output_type": "pt"}
        actual, expected = (pipe(small_images(), generator=seeded(), **arguments).images for pipe in (loaded, ours))
        assert rounding_errors(actual, expected) <= SAMPLING
        scaled = ADMSuperResolutionPipeline.from_pretrained(tmp_path, vae=theirs.vqvae)  # as given
        assert scaled.vae is theirs.vqvae
        assert scaled.vae.config.scaling_factor == 0.18215

    def test_round_trip(self, ours, tmp_path):
        ours.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is ADMSuperResolutionPipeline
        actual, expected = (
            pipe(small_images(), num_inference_steps=3, generator=seeded(), output_type="pt").images
            for pipe in (loaded, ours)
        )
        assert rounding_errors(actual, expected) <= SAMPLING


class TestLatents:
    ARGUMENTS = {"num_inference_steps": 2, "output_type": "pt"}

    @pytest.mark.parametrize("size", [4, 8])
    def test_channels(self, size):
        """The image itself after the latents, upsampled to their size if it is smaller."""
        pipe = make_pipeline(low_res_size=size)
        seen = []
        pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 4:]))
        image = small_images(2, size)
        assert pipe(image, **self.ARGUMENTS).images.shape == (2, 3, 16, 16)
        expected = F.interpolate(2 * image - 1, (8, 8), mode="bilinear", align_corners=False)
        assert rounding_errors(seen[0], expected) <= NETWORK
        if size == 8:
            assert rounding_errors(seen[0], 2 * image - 1) <= ONE_LAYER

    @torch.no_grad()
    def test_training_and_sampling_agree(self):
        large = 2 * small_images(2, 16) - 1
        pipe = make_pipeline(low_res_size=4)
        seen = []
        pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 4:]))
        pipe((downsample(large, 4) + 1) / 2, **self.ARGUMENTS)
        condition = LowResolutionCondition(
            pipe.unet.config, pipe.scheduler, low_res_size=4, max_noise_level=0, factor=2
        )
        expected = condition.for_training({"images": large}).extra_channels
        assert expected.shape == (2, 3, 8, 8)
        assert rounding_errors(seen[0], expected) <= NETWORK

    def test_back_projection(self):
        """In pixels: the means of their blocks are the small image, except where values are clipped."""
        pipe = make_pipeline(low_res_size=8)
        image = 0.3 + 0.4 * small_images()
        result = pipe(image, back_projection=True, generator=seeded(), **self.ARGUMENTS).images
        inside = F.avg_pool2d(((result > 0) & (result < 1)).float(), 2) == 1
        assert inside.sum() > 10
        assert (F.avg_pool2d(result, 2) - image)[inside].abs().max() < 1e-5
        plain = pipe(image, generator=seeded(), **self.ARGUMENTS).images
        assert (F.avg_pool2d(plain, 2) - image)[inside].abs().max() > 0.05
        with pytest.raises(ValueError, match="`back_projection` changes pixels, but `output_type` is 'latent'"):
            pipe(image, back_projection=True, output_type="latent")

    def test_latents(self):
        pipe = make_pipeline()
        latents = pipe(small_images(), generator=seeded(), num_inference_steps=2, output_type="latent").images
        assert latents.shape == (1, 4, 8, 8)
        image = pipe(small_images(), generator=seeded(), **self.ARGUMENTS).images
        with torch.no_grad():
            expected = pipe.vae.decode(latents / 0.5).sample
        assert rounding_errors(image, (expected / 2 + 0.5).clamp(0, 1)) <= SAMPLING

    def test_another_size(self):
        pipe = make_pipeline(low_res_size=8)
        assert pipe(small_images(1, 12), height=24, width=24, **self.ARGUMENTS).images.shape == (1, 3, 24, 24)
        with pytest.raises(ValueError, match=re.escape("to upsample 2 times, from 8 to 16. Resize the image, or pass")):
            pipe(small_images(1, 4))

    def test_images_larger_than_latents(self):
        with pytest.raises(ValueError, match="`image` is 12 x 12, but the latents that it is concatenated to are only"):
            make_pipeline()(small_images(1, 12))
        with pytest.raises(ValueError, match="`low_res_size` is 16 x 16, but the latents .* are only 8 x 8"):
            make_pipeline(low_res_size=16)
        with pytest.raises(ValueError, match=re.escape("the images are 16 x 16 (`sample_size` of the U-Net, times 2")):
            make_pipeline(low_res_size=[4, 8])

    @pytest.mark.parametrize("in_channels", [8, 6, 4])
    def test_other_channels(self, in_channels):
        message = (
            f"`unet` has `in_channels={in_channels}`, but an upsampler in the latents of this `vae` takes 4 channels"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            make_pipeline(random_unet(in_channels=in_channels, out_channels=8))


def test_translation_in_latents_is_refused():
    absent = dict.fromkeys(ADMImageToImagePipeline._optional_components)
    with pytest.raises(ValueError, match="ADMImageToImagePipeline concatenates images in pixels"):
        ADMImageToImagePipeline(
            random_unet(in_channels=6), LearnedVarianceDDPMScheduler(), **{**absent, "vae": random_vae()}
        )
