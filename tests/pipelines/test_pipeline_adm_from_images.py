"""
ADMPipeline that starts from images (SDEdit), in pixels, with each scheduler against a loop written by hand. (In latents
against diffusers' pipeline: test_pipeline_adm_latents.py.)
"""

import inspect
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers_samplers import SAMPLERS, as_parameters
from docstrings import check_documented_arguments
from PIL import Image
from tolerances import SAMPLING, levels_apart, rounding_errors
from toy_models import CONDITIONAL, random_text_encoder, random_text_unet, random_unet, toy_tokenizer

from diffusers_adm import ADMInpaintPipeline, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.schedulers.diffusers_schedulers import SCHEDULERS_WITHOUT_STRENGTH


CHAIN = {"num_train_timesteps": 400, "beta_start": 0.00025, "beta_end": 0.05}


def make_pipeline(unet=None, scheduler=None, cls=ADMPipeline, **components) -> ADMPipeline:
    absent = dict.fromkeys(ADMPipeline._optional_components)
    unet = random_unet() if unet is None else unet
    scheduler = LearnedVarianceDDPMScheduler(**CHAIN) if scheduler is None else scheduler
    pipe = cls(unet, **{"scheduler": scheduler, **absent, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(number: int = 1, channels: int = 3, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand((number, channels, height, width), generator=seeded(1))


def noise(number: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.randn((number, channels, 8, 8), generator=seeded(2))


class TestSteps:
    @torch.no_grad()
    def loop(self, unet, scheduler, image, start_noise, timesteps, **step_kwargs):
        """Written out. `timesteps` are those that are left, after `set_timesteps` and `set_begin_index`."""
        sample = scheduler.add_noise(2 * image - 1, start_noise, timesteps[:1].repeat(len(image)))
        for t in timesteps:
            output = unet(scheduler.scale_model_input(sample, t), t).sample
            output = output if hasattr(scheduler, "has_learned_variance") else output[:, : sample.shape[1]]
            sample = scheduler.step(output, t, sample, **step_kwargs).prev_sample
        return sample

    @pytest.mark.parametrize("name, options", as_parameters(SAMPLERS))
    def test_each_scheduler(self, name, options):
        """As diffusers does it: `int(strength * N)` steps, each of `order` evaluations; `add_noise`."""
        if name.startswith("DDPM"):
            options = {"variance_type": "fixed_small", **options}
        elif "SDE" in name:
            options = {"noise_sampler_seed": 0, **options}
        scheduler = getattr(diffusers, name)(**CHAIN, **options)
        pipe = make_pipeline(random_unet(out_channels=3), scheduler)
        arguments = {"latents": noise(2), "num_inference_steps": 7, "output_type": "latent"}
        if name in SCHEDULERS_WITHOUT_STRENGTH:
            with pytest.raises(ValueError, match=f"`strength` is 0.8, but a {name} cannot start in the middle"):
                pipe(image=images(2), **arguments)
            strength, begin = 1.0, 0
        else:
            strength, begin = 0.5, 4  # int(3.5) steps of 7 are left
        actual = pipe(image=images(2), strength=strength, generator=seeded(), **arguments).images

        other = type(scheduler).from_config(scheduler.config)
        other.set_timesteps(7)
        timesteps = other.timesteps[begin * other.order :]
        if hasattr(other, "set_begin_index"):
            other.set_begin_index(begin * other.order)
        takes_generator = "generator" in inspect.signature(other.step).parameters
        kwargs = {"generator": seeded()} if takes_generator else {}
        expected = self.loop(pipe.unet, other, images(2), noise(2), timesteps, **kwargs)
        assert rounding_errors(actual, expected) <= SAMPLING
        assert pipe.num_timesteps == len(timesteps)

    @pytest.mark.parametrize("eta", [None, 0.0])
    @pytest.mark.parametrize(
        "steps, strength, left",
        [
            ({"num_inference_steps": 10}, 0.3, 3),
            ({"num_inference_steps": 10}, 0.29, 2),
            ({"num_inference_steps": 5}, 1.0, 5),
            ({"num_inference_steps": 5}, None, 4),  # 0.8
            ({"timestep_respacing": "2,3,5"}, 0.75, 7),
            ({"timestep_respacing": "ddim8"}, 0.5, 4),
        ],
    )
    def test_ours(self, eta, steps, strength, left):
        pipe = make_pipeline()
        start = noise()
        arguments = {} if strength is None else {"strength": strength}
        actual = pipe(
            image=images(), latents=start, eta=eta, generator=seeded(), output_type="latent", **steps, **arguments
        ).images
        assert pipe.num_timesteps == left

        scheduler = LearnedVarianceDDPMScheduler(**CHAIN)
        scheduler.set_timesteps(**steps)
        timesteps = scheduler.timesteps[-left:]
        eta_kwargs = {} if eta is None else {"eta": eta}
        expected = self.loop(pipe.unet, scheduler, images(), start, timesteps, generator=seeded(), **eta_kwargs)
        assert rounding_errors(actual, expected) <= SAMPLING

    def test_less_strength_keeps_more(self):
        pipe = make_pipeline()
        arguments = {"num_inference_steps": 20, "eta": 0.0, "output_type": "pt"}
        distances = [
            (pipe(image=images(), strength=strength, generator=seeded(), **arguments).images - images()).abs().mean()
            for strength in (0.05, 0.3, 1.0)
        ]
        assert distances[0] < 0.05
        assert distances[0] < distances[1] < distances[2]

    def test_noise_comes_from_the_generator(self):
        pipe = make_pipeline()
        arguments = {"image": images(), "num_inference_steps": 4, "eta": 0.0, "output_type": "pt"}
        given = torch.randn((1, 3, 8, 8), generator=seeded())
        expected, actual = pipe(latents=given, **arguments).images, pipe(generator=seeded(), **arguments).images
        assert rounding_errors(actual, expected) <= SAMPLING

    def test_as_inpainting_does_where_all_is_masked(self):
        """The two share the steps and the noised image."""
        unet, mask = random_unet(), torch.ones(1, 8, 8)
        arguments = {"strength": 0.6, "num_inference_steps": 5, "output_type": "latent"}
        inpaint = make_pipeline(unet, cls=ADMInpaintPipeline)
        expected = inpaint(images(), mask, generator=seeded(), **arguments).images
        actual = make_pipeline(unet)(image=images(), generator=seeded(), **arguments).images
        assert rounding_errors(actual, expected) <= SAMPLING

    def test_with_conditions(self):
        unet = random_text_unet(**CONDITIONAL)
        pipe = make_pipeline(unet, text_encoder=random_text_encoder(), tokenizer=toy_tokenizer())
        arguments = {"num_inference_steps": 4, "strength": 0.5, "generator": seeded(), "output_type": "pt"}
        one, other = (
            pipe("a cat", 1, image=images(), guidance_scale=scale, **arguments | {"generator": seeded()}).images
            for scale in (1.0, 4.0)
        )
        assert one.shape == (1, 3, 8, 8)
        assert (one - other).abs().max() > 1e-3


class TestNumbers:
    ARGUMENTS = {"num_inference_steps": 2, "output_type": "pt", "eta": 0.0}

    def test_one_for_all(self):
        pipe = make_pipeline(random_unet(**CONDITIONAL))
        together = pipe(class_labels=[0, 1], image=images(), latents=noise(2), **self.ARGUMENTS).images
        for number in range(2):
            alone = pipe(
                class_labels=number, image=images(), latents=noise(2)[number : number + 1], **self.ARGUMENTS
            ).images
            assert rounding_errors(together[number : number + 1], alone) <= SAMPLING

    def test_one_for_each(self):
        pipe = make_pipeline()
        together = pipe(
            image=list(images(2)), num_images_per_prompt=2, generator=[seeded(i) for i in range(4)], **self.ARGUMENTS
        ).images
        assert together.shape == (4, 3, 8, 8)
        alone = pipe(image=images(2)[1], generator=[seeded(3)], **self.ARGUMENTS).images
        assert rounding_errors(together[3:], alone) <= SAMPLING

    def test_size_of_the_image(self):
        """Also where the model was made for another."""
        pipe = make_pipeline()
        arguments = {**self.ARGUMENTS, "generator": seeded()}
        assert pipe(image=images(height=12, width=4), **arguments).images.shape == (1, 3, 12, 4)
        assert pipe(image=images(height=12), height=12, **arguments).images.shape == (1, 3, 12, 8)


class TestFormats:
    def test_pillow(self):
        """8 bits come back where few, small steps are taken."""
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        pipe = make_pipeline()
        forms = (Image.fromarray(pixels), pixels, torch.from_numpy(pixels).permute(2, 0, 1), pixels / 255)
        results = [
            pipe(image=form, strength=0.5, num_inference_steps=2, eta=0.0, generator=seeded()).images[0]
            for form in forms
        ]
        assert all(levels_apart(result, results[0]) <= 1 for result in results[1:])

    def test_values_of_the_data(self):
        image_format = ImageFormat("array", 2, (-300.0, 100.0), None)
        pipe = make_pipeline(random_unet(in_channels=2, out_channels=4), image_format=image_format)
        start = noise(channels=2)
        arguments = {"latents": start, "num_inference_steps": 2, "strength": 0.5, "eta": 0.0}
        fractions = images(channels=2)
        actual = pipe(image=400 * fractions - 300, output_type="pt", **arguments).images
        plain = make_pipeline(pipe.unet)
        expected = plain(image=fractions, output_type="pt", **arguments).images
        assert rounding_errors(actual, 400 * expected - 300) <= SAMPLING


class TestRefusals:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"strength": 0.5}, r"`strength` is 0\.5, but there is no image to start from\. Pass `image`"),
            ({"image": images(), "strength": 0.0}, r"`strength` is 0\.0; it must lie in \(0, 1\]"),
            ({"image": images(), "strength": 1.5}, r"`strength` is 1\.5; it must lie in \(0, 1\]"),
            ({"image": images(), "strength": float("nan")}, r"`strength` is nan; it must lie in \(0, 1\]"),
            ({"image": images(), "strength": "0.5"}, r"`strength` is '0\.5'; it must lie in \(0, 1\]"),
            (
                {"image": images(), "strength": 0.1, "num_inference_steps": 5},
                r"`strength` is 0\.1, which leaves none of 5 steps\. Pass more than 0\.2",
            ),
            (
                {"image": images(), "height": 16},
                r"`image` is 8 x 8 pixels \(width x height\), but 8 x 16 are generated\. Resize the image, or leave "
                r"`height` and `width` out",
            ),
            (
                {"image": images(height=9)},
                r"`height` and `width` are 9 and 8; .* divisible by 2, .* That is the size of the given image",
            ),
            ({"image": images(3), "batch_size": 2}, "`image` holds 3, `batch_size` is 2"),
            ({"image": images(channels=4)}, r"`image` has shape \(1, 4, 8, 8\); .* with 3 channels"),
            ({"image": 2 * images() - 1}, "`image` has values from -.* Divide 0 to 255 by 255"),
            ({"image": images() * float("nan")}, "`image` has values from nan"),
            ({"image": [], "strength": 0.5}, "`image` is empty"),
            ({"image": "a cat"}, "`image` is a str; pass a Pillow image"),
            ({"latents": noise() * float("nan")}, r"`latents` holds NaN or infinity for 1 of 1 images \(numbers 0,"),
        ],
    )
    def test_before_any_work(self, arguments, message):
        pipe = make_pipeline()
        pipe.unet.forward = None  # nothing may call it
        with pytest.raises(ValueError, match=message):
            pipe(**{"num_inference_steps": 2, **arguments})


def test_documented_arguments():
    check_documented_arguments(ADMPipeline.__call__.__doc__, ADMPipeline.__call__)
    names = list(inspect.signature(ADMPipeline.__call__).parameters)
    assert names[-3:] == ["image", "strength", "guidance_fn"]  # behind those that could be passed by position before
    default = inspect.signature(ADMPipeline.__call__).parameters["strength"].default
    assert default is None
    assert re.search(r"strength \(`float`.*`None`: 0\.8", ADMPipeline.__call__.__doc__)
