"""Repositories and pipelines in Karlo's layout, against diffusers' own pipelines with the same weights and noise."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UnCLIPScheduler
from hub_server import HubServer
from PIL import Image
from unclip_models import (
    EMBEDDING_WIDTH,
    LARGE_SIZE,
    SIZE,
    generator,
    karlo_pipeline,
    karlo_variation_pipeline,
)

from diffusers_adm import AdaGNUNet2DModel, ADMUnCLIPPipeline, LearnedVarianceDDPMScheduler, UnCLIPProjectionModel


# Measured: 1e-6, rounding of float32. Random networks amplify it, on some processors more.
TOLERANCE = 1e-4
STEPS = {"prior_num_inference_steps": 5, "super_res_num_inference_steps": 4}
PROMPTS = ["a red cat", "the green dog on a mat"]


@pytest.fixture(scope="module")
def theirs():
    return quiet(karlo_pipeline())


@pytest.fixture(scope="module")
def their_variations():
    return quiet(karlo_variation_pipeline())


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("karlo")
    karlo_pipeline().save_pretrained(folder)
    return quiet(ADMUnCLIPPipeline.from_pretrained(folder))


@pytest.fixture(scope="module")
def our_variations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variations")
    karlo_variation_pipeline().save_pretrained(folder)
    return quiet(ADMUnCLIPPipeline.from_pretrained(folder))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(number: int) -> list[Image.Image]:
    pixels = torch.randint(256, (number, 11, 9, 3), generator=generator(7), dtype=torch.uint8).numpy()
    return [Image.fromarray(each) for each in pixels]


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


class TestEqualImages:
    # The first step divides x_0 by 5e-5 and clips it. Seeds differ, so that no pixel is left unclipped: the rounding
    # error of its prediction would be that large in proportion, in both pipelines.
    @pytest.mark.parametrize(("scales", "seed"), [((1.0, 1.0), 0), ((4.0, 1.0), 0), ((1.0, 3.0), 1), ((4.0, 8.0), 0)])
    def test_prompt_with_and_without_guidance(self, theirs, ours, scales, seed):
        prior_scale, scale = scales
        expected = theirs(
            PROMPTS[0],
            decoder_num_inference_steps=6,
            prior_guidance_scale=prior_scale,
            decoder_guidance_scale=scale,
            generator=generator(seed),
            output_type="np",
            **STEPS,
        ).images
        found = ours(
            PROMPTS[0],
            num_inference_steps=6,
            prior_guidance_scale=prior_scale,
            guidance_scale=scale,
            generator=generator(seed),
            output_type="np",
            **STEPS,
        ).images
        assert found.shape == (1, LARGE_SIZE, LARGE_SIZE, 3)
        assert found.std() > 0.05  # not a constant image, for which everything would be equal
        assert difference(found, expected) < TOLERANCE

    @pytest.mark.parametrize("as_list", [False, True])
    def test_several_prompts_and_images_per_prompt(self, theirs, ours, as_list):
        def source():
            return [generator(n) for n in range(4)] if as_list else generator()

        common = {"num_images_per_prompt": 2, "output_type": "np", **STEPS}
        expected = theirs(
            PROMPTS,
            decoder_num_inference_steps=5,
            prior_guidance_scale=2.0,
            decoder_guidance_scale=3.0,
            generator=source(),
            **common,
        ).images
        found = ours(
            PROMPTS, num_inference_steps=5, prior_guidance_scale=2.0, guidance_scale=3.0, generator=source(), **common
        ).images
        assert difference(found, expected) < TOLERANCE

    def test_given_latents(self, theirs, ours):
        prior, decoder, super_res = (
            torch.randn(2, *shape, generator=generator(n))
            for n, shape in enumerate([(EMBEDDING_WIDTH,), (3, SIZE, SIZE), (3, LARGE_SIZE, LARGE_SIZE)])
        )
        common = {"prior_latents": prior, "super_res_latents": super_res, "output_type": "np", **STEPS}
        common["prior_guidance_scale"] = 2.0
        expected = theirs(
            PROMPTS,
            decoder_num_inference_steps=5,
            decoder_latents=decoder,
            decoder_guidance_scale=3.0,
            generator=generator(9),
            **common,
        ).images
        found = ours(
            PROMPTS, num_inference_steps=5, latents=decoder, guidance_scale=3.0, generator=generator(9), **common
        ).images
        assert difference(found, expected) < TOLERANCE
        other = ours(
            PROMPTS, num_inference_steps=5, latents=-decoder, guidance_scale=3.0, generator=generator(9), **common
        ).images
        assert difference(other, expected) > 0.01

    @pytest.mark.parametrize("scale", [1.0, 3.0])
    @pytest.mark.parametrize("number", [1, 2])
    def test_variations(self, their_variations, our_variations, scale, number):
        images = pictures(number)
        common = {"num_images_per_prompt": 2, "super_res_num_inference_steps": 4, "output_type": "np"}
        expected = their_variations(
            images,
            decoder_num_inference_steps=5,
            decoder_guidance_scale=scale,
            generator=generator(),
            **common,
        ).images
        found = our_variations(
            image=images, num_inference_steps=5, guidance_scale=scale, generator=generator(), **common
        ).images
        assert difference(found, expected) < TOLERANCE

    def test_variations_of_embeddings(self, their_variations, our_variations):
        embeds = torch.randn(2, EMBEDDING_WIDTH, generator=generator(3))
        common = {"super_res_num_inference_steps": 4, "output_type": "np"}
        expected = their_variations(
            image_embeddings=embeds,
            decoder_num_inference_steps=5,
            decoder_guidance_scale=2.0,
            generator=generator(),
            **common,
        ).images
        found = our_variations(
            image_embeds=embeds, num_inference_steps=5, guidance_scale=2.0, generator=generator(), **common
        ).images
        assert difference(found, expected) < TOLERANCE

    def test_their_default_numbers_of_steps(self, theirs, ours):
        scales = {"prior_guidance_scale": 4.0, "output_type": "np"}
        expected = theirs(PROMPTS[0], decoder_guidance_scale=8.0, generator=generator(), **scales).images
        found = ours(PROMPTS[0], num_inference_steps=25, guidance_scale=8.0, generator=generator(), **scales).images
        assert difference(found, expected) < TOLERANCE


class TestLayout:
    @pytest.mark.parametrize("library", ["unclip", "diffusers"])
    def test_index_of_any_release(self, library, theirs, tmp_path):
        karlo_pipeline().save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        index["text_proj"] = [library, "UnCLIPTextProjModel"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        pipe = ADMUnCLIPPipeline.from_pretrained(tmp_path)
        assert isinstance(pipe.image_projection, UnCLIPProjectionModel)
        expected = theirs.text_proj.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in pipe.image_projection.state_dict().items())
        assert isinstance(pipe.unet, AdaGNUNet2DModel)
        assert isinstance(pipe.super_res_last, AdaGNUNet2DModel)
        for name in ("scheduler", "prior_scheduler", "super_res_scheduler"):
            scheduler = getattr(pipe, name)
            assert isinstance(scheduler, LearnedVarianceDDPMScheduler)
            assert scheduler.config.timestep_spacing == "linspace"
        assert pipe.image_encoder is None
        assert pipe.prior_text_encoder is None

    CLIENT = """
import sys, torch
from diffusers_adm import ADMUnCLIPPipeline
pipe = ADMUnCLIPPipeline.from_pretrained("alice/karlo")
pipe.set_progress_bar_config(disable=True)
arguments = {"num_inference_steps": 3, "prior_num_inference_steps": 2, "super_res_num_inference_steps": 2}
source = torch.Generator().manual_seed(0)
torch.save(pipe("a cat", generator=source, output_type="pt", **arguments).images, sys.argv[1])
"""

    def test_from_the_hub(self, ours, tmp_path):
        karlo_pipeline().save_pretrained(tmp_path / "karlo")
        index = json.loads((tmp_path / "karlo" / "model_index.json").read_text())
        index["text_proj"] = ["unclip", "UnCLIPTextProjModel"]
        (tmp_path / "karlo" / "model_index.json").write_text(json.dumps(index))
        with HubServer({"alice/karlo": tmp_path / "karlo"}) as hub:
            hub.run_client(self.CLIENT, tmp_path / "images.pt", cache=tmp_path / "cache")
        arguments = {"num_inference_steps": 3, "prior_num_inference_steps": 2, "super_res_num_inference_steps": 2}
        expected = ours("a cat", generator=generator(), output_type="pt", **arguments).images
        assert float((torch.load(tmp_path / "images.pt") - expected).abs().max()) < TOLERANCE

    def test_components_in_place_of_saved_ones(self, ours, tmp_path):
        karlo_pipeline().save_pretrained(tmp_path)
        pipe = ADMUnCLIPPipeline.from_pretrained(tmp_path, unet=ours.unet, prior=None, prior_scheduler=None)
        assert pipe.unet is ours.unet
        assert pipe.prior is None

    def test_from_pipe(self, ours, our_variations):
        pipe = quiet(ADMUnCLIPPipeline.from_pipe(karlo_pipeline()))
        arguments = {"num_inference_steps": 3, "output_type": "np", **STEPS}
        expected = ours("a cat", generator=generator(), **arguments).images
        assert difference(pipe("a cat", generator=generator(), **arguments).images, expected) < TOLERANCE
        both = ADMUnCLIPPipeline.from_pipe(
            karlo_pipeline(),
            image_encoder=our_variations.image_encoder,
            feature_extractor=our_variations.feature_extractor,
        )
        assert both.prior is not None
        assert both.image_encoder is not None

    def test_saved_again_it_has_our_layout(self, ours, tmp_path):
        ours.save_pretrained(tmp_path)
        pipe = quiet(ADMUnCLIPPipeline.from_pretrained(tmp_path))
        arguments = {"num_inference_steps": 3, "output_type": "np", **STEPS}
        expected, found = (each("a cat", generator=generator(), **arguments).images for each in (ours, pipe))
        assert difference(found, expected) < TOLERANCE


class TestSchedulers:
    @pytest.mark.parametrize("other", [DDIMScheduler, DPMSolverMultistepScheduler])
    @pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small_log"])
    def test_swapping_and_back_keeps_the_process(self, other, variance_type):
        prediction_type = "epsilon" if variance_type == "learned_range" else "sample"
        unclip = UnCLIPScheduler(variance_type=variance_type, prediction_type=prediction_type, clip_sample_range=5.0)
        first = LearnedVarianceDDPMScheduler.from_config(unclip.config)
        back = LearnedVarianceDDPMScheduler.from_config(other.from_config(first.config).config)
        assert {name: back.config[name] for name in first.config if name[0] != "_"} == {
            name: value for name, value in first.config.items() if name[0] != "_"
        }
        assert first.config.variance_type == variance_type.removesuffix("_log")
        assert first.config.prediction_type == prediction_type
        unclip.set_timesteps(7)
        back.set_timesteps(7)
        assert back.timesteps.tolist() == unclip.timesteps.tolist()

    @pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small_log"])
    def test_each_step_is_that_of_unclip_scheduler(self, variance_type):
        unclip = UnCLIPScheduler(variance_type=variance_type, prediction_type="epsilon")
        scheduler = LearnedVarianceDDPMScheduler.from_config(unclip.config)
        for each in (unclip, scheduler):
            each.set_timesteps(6)
        channels = 6 if variance_type == "learned_range" else 3
        timesteps = unclip.timesteps.tolist()
        for t, previous in zip(timesteps, [*timesteps[1:], None], strict=True):
            x, output = torch.randn(2, 3, 4, 4, generator=generator(t)), torch.randn(2, channels, 4, 4)
            expected = unclip.step(output, t, x, previous, generator(1)).prev_sample
            found = scheduler.step(output, t, x, generator=generator(1)).prev_sample
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("other", [DDIMScheduler, DPMSolverMultistepScheduler])
    def test_other_schedulers_for_the_decoder(self, ours, other):
        arguments = {"num_inference_steps": 4, "output_type": "np", **STEPS}
        before = ours("a cat", generator=generator(), **arguments).images
        first = ours.scheduler
        try:
            ours.scheduler = other.from_config(first.config)
            assert np.isfinite(ours("a cat", generator=generator(), guidance_scale=2.0, **arguments).images).all()
            ours.scheduler = LearnedVarianceDDPMScheduler.from_config(ours.scheduler.config)
            assert difference(ours("a cat", generator=generator(), **arguments).images, before) < TOLERANCE
        finally:
            ours.scheduler = first
