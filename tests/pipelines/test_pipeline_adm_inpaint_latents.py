"""ADMInpaintPipeline with an autoencoder: both layouts of the channels, told apart by config."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionInpaintPipeline
from tolerances import NETWORK, rounding_errors
from toy_models import (
    fill_randomly,
    random_diffusers_text_unet,
    random_text_encoder,
    random_unet,
    toy_tokenizer,
)

from diffusers_adm import ADMInpaintPipeline, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.inpainting import InpaintingCondition, downsample_keep_mask, inpainting_channels
from diffusers_adm.conditioning.latents import LatentSpace


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


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(number: int = 1) -> torch.Tensor:
    """In [0, 1], blocks of one colour."""
    coarse = torch.rand(number, 3, 4, 4, generator=seeded(1))
    return coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def odd_mask() -> torch.Tensor:
    """White pixels to inpaint, whose borders cut through latents."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3:10, 5:14] = 1
    return mask


def make_pipeline(unet=None, vae="random", **config) -> ADMInpaintPipeline:
    absent = dict.fromkeys(ADMInpaintPipeline._optional_components)
    components = {"scheduler": LearnedVarianceDDPMScheduler(), **absent}
    components["vae"] = random_vae() if vae == "random" else vae
    unet = random_unet(in_channels=9, out_channels=8) if unet is None else unet
    pipe = ADMInpaintPipeline(unet, **{**components, **config})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reduced copy of Stable Diffusion's inpainting pipeline."""
    pipe = StableDiffusionInpaintPipeline(
        vae=random_vae(),
        text_encoder=random_text_encoder("clip"),
        tokenizer=toy_tokenizer("clip"),
        unet=random_diffusers_text_unet(in_channels=9, out_channels=4, resnet_time_scale_shift="default"),
        # As published.
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
    folder = tmp_path_factory.mktemp("stable_diffusion_inpainting")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipelines(folder) -> tuple[StableDiffusionInpaintPipeline, ADMInpaintPipeline]:
    pair = (StableDiffusionInpaintPipeline.from_pretrained(folder), ADMInpaintPipeline.from_pretrained(folder))
    for pipe in pair:
        pipe.set_progress_bar_config(disable=True)
    return pair


class LastLatents:
    """A callback that keeps the sample."""

    def __call__(self, pipe, index, timestep, tensors):
        self.latents = tensors["latents"]
        return tensors


@torch.no_grad()
def encode(vae, image, keep_mask=1.0) -> torch.Tensor:
    return vae.config.scaling_factor * vae.encode((2 * image - 1) * keep_mask).latent_dist.mode()


def inpaint(pipe, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The last sample, and the image."""
    samples = []

    def keep_sample(pipe, index, timestep, tensors):
        samples.append(tensors["latents"])
        return tensors

    given = {"image": random_images(), "guidance_scale": 1.0, "generator": seeded()}
    image = pipe(
        **{**given, **arguments},
        mask_image=odd_mask(),
        prompt="a red cat",
        num_inference_steps=6,
        output_type="pt",
        callback_on_step_end=keep_sample,
    ).images
    return samples[-1], image


def inpaint_with_diffusers(pipe, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """It draws latents from the posterior; ours are its mode, which it accepts in place of an image."""
    original, visible = (encode(pipe.vae, random_images(), keep) for keep in (1.0, 1 - odd_mask()))
    return inpaint(pipe, image=original, masked_image_latents=visible, height=16, width=16, **arguments)


class TestStableDiffusion:
    @pytest.mark.parametrize("strength", [1.0, 0.6])
    @pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
    def test_same_samples(self, pipelines, strength, guidance_scale):
        theirs, ours = pipelines
        arguments = {"strength": strength, "guidance_scale": guidance_scale}
        expected, expected_image = inpaint_with_diffusers(theirs, **arguments)
        sample, image = inpaint(ours, **arguments)
        assert expected.std() > 0.1
        torch.testing.assert_close(sample, expected, rtol=0, atol=1e-4)
        white = odd_mask().bool().expand_as(image)
        torch.testing.assert_close(image[white], expected_image[white], rtol=0, atol=1e-4)
        # Theirs returns the kept pixels as decoded, ours as given.
        assert torch.equal(image[~white], random_images()[~white])
        assert (expected_image - image)[~white].abs().max() > 0.01

    def test_the_other_layout_gives_other_samples(self, pipelines):
        theirs, ours = pipelines
        other = ADMInpaintPipeline.from_pipe(ours, inpainting_layout="glide")
        other.set_progress_bar_config(disable=True)
        sample, _ = inpaint(other, correct_kept=False)
        assert (sample - inpaint_with_diffusers(theirs)[0]).abs().max() > 0.1

    def test_corrected_predictions(self, pipelines):
        _, ours = pipelines
        keep = downsample_keep_mask(1 - odd_mask(), 2).expand(1, 4, 8, 8)
        original = encode(ours.vae, random_images())
        free, corrected = (inpaint(ours, correct_kept=corrects)[0] for corrects in (None, True))
        # The last step of this scheduler leads to its first noise level, 0.03, and not to x_0.
        assert (corrected - original)[keep].std() < 0.06
        assert (free - original)[keep].std() > 0.3
        assert (corrected - free)[~keep].abs().max() > 0.01

    def test_channels(self, pipelines):
        """What the network sees: the mask of one pixel for each latent, then the latents of the masked image."""
        _, ours = pipelines
        channels = inpainting_channels(
            2 * random_images() - 1, 1 - odd_mask(), LatentSpace(ours.vae), "stable-diffusion"
        )
        assert channels.shape == (1, 5, 8, 8)
        assert torch.equal(channels[:, :1], F.interpolate(odd_mask(), (8, 8)))  # as diffusers does
        assert rounding_errors(channels[:, 1:], encode(ours.vae, random_images(), 1 - odd_mask())) <= NETWORK


class TestLayout:
    """Which layout a pipeline has is told by config."""

    def test_of_a_stable_diffusion_folder(self, folder, pipelines, tmp_path):
        theirs, ours = pipelines
        assert ours.inpainting_layout == "stable-diffusion"
        pipe = ADMInpaintPipeline.from_pipe(theirs)
        assert pipe.unet is theirs.unet
        assert pipe.inpainting_layout == "stable-diffusion"
        pipe = ADMInpaintPipeline.from_pretrained(folder, inpainting_layout="glide")  # as asked for
        assert pipe.inpainting_layout == "glide"
        ours.save_pretrained(tmp_path)
        assert DiffusionPipeline.from_pretrained(tmp_path).inpainting_layout == "stable-diffusion"
        assert ADMInpaintPipeline.from_pretrained(tmp_path).inpainting_layout == "stable-diffusion"

    def test_another_unet_in_such_a_folder(self, folder):
        """Whose layout the folder does not tell."""
        unet = random_diffusers_text_unet(in_channels=9, out_channels=4)
        with pytest.raises(ValueError, match=r"Pass `inpainting_layout`: 'glide' for .* or 'stable-diffusion' for"):
            ADMInpaintPipeline.from_pretrained(folder, unet=unet)

    def test_a_folder_of_nine_channels_in_pixels(self, tmp_path):
        """Images of four channels."""
        pipe = make_pipeline(vae=None)
        assert pipe.inpainting_layout == "glide"
        pipe.save_pretrained(tmp_path)
        assert DiffusionPipeline.from_pretrained(tmp_path).inpainting_layout == "glide"

    def test_unknown(self):
        with pytest.raises(ValueError, match="their order is not recorded. Pass `inpainting_layout`: 'glide' for"):
            make_pipeline()
        pipe = make_pipeline(vae=None)
        pipe.vae = random_vae()
        with pytest.raises(ValueError, match="their order is not recorded"):
            pipe(random_images(), odd_mask())

    def test_of_earlier_pipelines(self, tmp_path):
        """GLIDE's was the only layout."""
        make_pipeline(inpainting_layout="glide").save_pretrained(tmp_path)
        index = tmp_path / "model_index.json"
        index.write_text(index.read_text().replace('"inpainting_layout": "glide",', ""))
        assert "inpainting_layout" not in index.read_text()
        assert ADMInpaintPipeline.from_pretrained(tmp_path).inpainting_layout == "glide"

    def test_survives_another_pipeline(self):
        pipe = make_pipeline(
            random_unet(in_channels=9, out_channels=8), inpainting_layout="stable-diffusion", id2label={0: "a"}
        )
        again = ADMInpaintPipeline.from_pipe(pipe)
        assert again.inpainting_layout == "stable-diffusion"

    @pytest.mark.parametrize(
        ("in_channels", "layout", "message"),
        [
            (9, "sd", "`inpainting_layout` is 'sd'; it must be one of ['glide', 'stable-diffusion']."),
            (
                4,
                "glide",
                "`inpainting_layout` is 'glide', but the U-Net (`in_channels=4`) takes no mask. Leave it out.",
            ),
        ],
    )
    def test_refused(self, in_channels, layout, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_pipeline(random_unet(in_channels=in_channels, out_channels=8), inpainting_layout=layout)

    def test_an_upsampler_has_that_of_glide(self):
        unet = random_unet(in_channels=10)
        assert make_pipeline(unet, vae=None).inpainting_layout == "glide"
        with pytest.raises(ValueError, match="upsamples as well, which only GLIDE's do"):
            make_pipeline(unet, vae=None, inpainting_layout="stable-diffusion")

    def test_correcting_is_not_for_any_model(self):
        pipe = make_pipeline(random_unet(in_channels=4, out_channels=8))
        assert pipe.inpainting_layout is None
        with pytest.raises(ValueError, match="`correct_kept` is False, but this U-Net takes no mask"):
            pipe(random_images(), odd_mask(), correct_kept=False)


class TestGlide:
    @torch.no_grad()
    @pytest.mark.parametrize("layout", ["glide", "stable-diffusion"])
    @pytest.mark.parametrize("in_latents", [False, True])
    def test_training_and_sampling_agree(self, layout, in_latents):
        """The channels of training are those that the first step of sampling passes to the network."""
        vae = random_vae() if in_latents else None
        channels = 4 if in_latents else 3
        unet = random_unet(in_channels=2 * channels + 1, out_channels=2 * channels)
        pipe = make_pipeline(unet, vae, inpainting_layout=layout)
        seen = []
        unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, channels:]))
        images, keep = random_images(2), torch.cat([1 - odd_mask(), torch.ones(1, 1, 16, 16)])
        pipe(images, 1 - keep, num_inference_steps=1, height=16, width=16)
        batch = {"images": 2 * images - 1, "keep_mask": keep}
        expected = InpaintingCondition(vae=vae, layout=layout).for_training(batch).extra_channels
        assert expected.shape[1] == channels + 1
        assert rounding_errors(seen[0], expected) <= NETWORK

    def test_a_latent_is_kept_if_all_of_its_pixels_are(self):
        keep = 1 - odd_mask()
        latents = inpainting_channels(2 * random_images() - 1, keep, LatentSpace(random_vae()), "glide")
        by_hand = torch.tensor(
            [[float(keep[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].min()) for j in range(8)] for i in range(8)]
        )
        assert 0 < by_hand.sum() < 64
        assert torch.equal(latents[0, 4], by_hand)
        visible = encode(random_vae(), random_images(), keep)
        assert rounding_errors(latents[:, :4], visible * by_hand) <= NETWORK

    @pytest.mark.parametrize("layout", ["glide", "stable-diffusion"])
    def test_masked_pixels_do_not_leak(self, layout):
        first, second = random_images(), random_images()
        second[odd_mask().bool().expand_as(second)] = 0.5
        seen = [
            inpainting_channels(2 * images - 1, 1 - odd_mask(), LatentSpace(random_vae()), layout)
            for images in (first, second)
        ]
        assert rounding_errors(*seen) <= NETWORK

    def test_kept_latents_and_pixels(self):
        pipe = make_pipeline(inpainting_layout="glide")
        arguments = {"image": random_images(), "mask_image": odd_mask(), "num_inference_steps": 3}
        latents = pipe(**arguments, generator=seeded(), output_type="latent").images
        keep = downsample_keep_mask(1 - odd_mask(), 2).expand_as(latents)
        assert rounding_errors(latents[keep], encode(pipe.vae, random_images())[keep]) <= NETWORK
        image = pipe(**arguments, generator=seeded(), output_type="pt").images
        black = ~odd_mask().bool().expand_as(image)
        assert torch.equal(image[black], random_images()[black])


def test_an_ordinary_pipeline_refuses_masks():
    with pytest.raises(ValueError, match="load it with `ADMInpaintPipeline`"):
        ADMPipeline(
            random_unet(in_channels=9, out_channels=8),
            LearnedVarianceDDPMScheduler(),
            **{**dict.fromkeys(ADMPipeline._optional_components), "vae": random_vae()},
        )
