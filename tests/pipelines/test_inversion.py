"""
`invert` of all pipelines: the latents against a loop of this file, and round trips, which are exact with enough
fixed-point iterations, because the random networks change little with their input.
"""

import inspect
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from tolerances import SAMPLING, rounding_errors
from toy_models import (
    CONDITIONAL,
    fill_randomly,
    random_classifier,
    random_text_encoder,
    random_text_unet,
    random_unet,
    toy_tokenizer,
)
from unclip_models import CONTEXT_WIDTH, EMBEDDING_WIDTH, random_clip_vision, toy_image_processor

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    ADMUnCLIPPipeline,
    LearnedVarianceDDPMScheduler,
    UnCLIPProjectionModel,
)
from diffusers_adm.conditioning.guidance_functions import GuidanceFunction
from diffusers_adm.conditioning.latents import LatentSpace
from diffusers_adm.models.unet_2d_adagn import AdaGNUNet2DModel


ABSENT = dict.fromkeys(ADMPipeline._optional_components)
CHAIN = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.05, "clip_sample": False}
STEPS = 5
# The network below changes so little with its input that each iteration shrinks the error to a third or less.
ITERATIONS = 8
# Of values in [-1, 1]. One iteration leaves an error of 0.06 (v) or 0.02 (epsilon), 8 leave 1e-5 (v) or rounding
# errors, which the steps multiply by 1 / sqrt(bar alpha_T) = 3.6 at most.
ROUND_TRIP = 1e-4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(seed))


IMAGES = random_images(2, 3, 8, 8, seed=1)


def smooth(unet: AdaGNUNet2DModel) -> AdaGNUNet2DModel:
    """Its output changes little with its input, so that fixed-point iterations converge."""
    unet.conv_out.weight.data *= 0.05
    return unet


def make(cls=ADMPipeline, unet=None, scheduler=None, **components) -> ADMPipeline:
    unet = smooth(random_unet()) if unet is None else unet
    scheduler = LearnedVarianceDDPMScheduler(**CHAIN) if scheduler is None else scheduler
    pipe = cls(unet, scheduler, **{**ABSENT, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def round_trip(pipe, images=IMAGES, iterations=ITERATIONS, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the images, and what they lead to, in [-1, 1] or as latents."""
    arguments = {"num_inference_steps": STEPS, **arguments}
    latents = pipe.invert(images, num_fixed_point_iterations=iterations, **arguments)
    arguments.setdefault("batch_size", len(images))
    if "batch_size" not in inspect.signature(pipe.__call__).parameters:
        del arguments["batch_size"]
    return latents, pipe(**arguments, latents=latents, eta=0.0, output_type="latent").images


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


def ddim_loop(unet, scheduler, x, iterations=1, **kwargs) -> torch.Tensor:
    """DDIM inversion of networks that predict noise, and maybe a variance."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(STEPS)
    signal_prev, std_prev = 1.0, 0.0
    for t in scheduler.timesteps.flip(0):
        alpha = float(scheduler.alphas_cumprod[t])
        signal, std = alpha**0.5, (1 - alpha) ** 0.5
        estimate = x
        for _ in range(iterations):
            epsilon = unet(estimate, t, **kwargs).sample[:, : x.shape[1]]
            x_0 = (x - std_prev * epsilon) / signal_prev
            estimate = signal * x_0 + std * epsilon
        x, signal_prev, std_prev = estimate, signal, std
    return x


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class TestLatents:
    @pytest.mark.parametrize("iterations", [1, 3])
    @pytest.mark.parametrize("scheduler", [None, DDIMScheduler(**CHAIN)], ids=["ours", "diffusers"])
    def test_against_a_loop(self, iterations, scheduler):
        pipe = make(scheduler=scheduler)
        found = pipe.invert(IMAGES, STEPS, iterations)
        expected = ddim_loop(pipe.unet, pipe.scheduler, 2 * IMAGES - 1, iterations)
        assert rounding_errors(found, expected) <= SAMPLING

    def test_by_class(self):
        pipe = make(unet=smooth(random_unet(**CONDITIONAL)))
        found = pipe.invert(IMAGES, STEPS, 1, class_labels=[1, 2])
        expected = ddim_loop(pipe.unet, pipe.scheduler, 2 * IMAGES - 1, class_labels=torch.tensor([1, 2]))
        assert rounding_errors(found, expected) <= SAMPLING
        assert distance(found, pipe.invert(IMAGES, STEPS, 1, class_labels=[2, 1])) > 0.01

    def test_takes_the_forms_of_images(self):
        pipe = make()
        pictures = [
            Image.fromarray(np.random.default_rng(i).integers(256, size=(8, 8, 3), dtype=np.uint8)) for i in (0, 1)
        ]
        arrays = np.stack([np.asarray(picture) for picture in pictures])
        tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
        expected = pipe.invert(tensors, STEPS)
        for images in (pictures, arrays, list(tensors)):
            assert rounding_errors(pipe.invert(images, STEPS), expected) <= SAMPLING
        assert rounding_errors(pipe.invert(pictures[0], STEPS), expected[:1]) <= SAMPLING

    def test_changes_nothing_of_the_pipeline(self):
        pipe = make()
        scheduler, config, timesteps = pipe.scheduler, dict(pipe.config), pipe.scheduler.timesteps.clone()
        pipe.invert(IMAGES, STEPS)
        assert pipe.scheduler is scheduler
        assert dict(pipe.config) == config
        assert torch.equal(scheduler.timesteps, timesteps)

    def test_a_callback_sees_each_evaluation(self):
        seen = []

        def note(pipe, index, timestep, tensors):
            seen.append((index, int(timestep), pipe.num_timesteps))
            return tensors

        make().invert(IMAGES, STEPS, 2, callback_on_step_end=note)
        assert seen == [(i, 20 * (i // 2), 2 * STEPS) for i in range(2 * STEPS)]


class TestRoundTrip:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    @pytest.mark.parametrize("cls", [LearnedVarianceDDPMScheduler, DDIMScheduler])
    def test_is_exact(self, prediction_type, cls):
        pipe = make(scheduler=cls(**CHAIN, prediction_type=prediction_type))
        _, found = round_trip(pipe)
        assert distance(found, 2 * IMAGES - 1) < ROUND_TRIP

    def test_improves_with_iterations(self):
        pipe = make()
        errors = [distance(round_trip(pipe, iterations=n)[1], 2 * IMAGES - 1) for n in (1, 2, 4)]
        assert errors[0] > 2 * errors[1] > 4 * errors[2]

    def test_without_a_learned_variance(self):
        unet = smooth(random_unet(out_channels=3))
        pipe = make(unet=unet, scheduler=LearnedVarianceDDPMScheduler(**CHAIN, variance_type="fixed_small"))
        assert distance(round_trip(pipe)[1], 2 * IMAGES - 1) < ROUND_TRIP

    def test_respacing(self):
        arguments = {"num_inference_steps": 50, "timestep_respacing": "3,1,1"}
        assert distance(round_trip(make(), **arguments)[1], 2 * IMAGES - 1) < ROUND_TRIP

    @pytest.mark.parametrize("interval", [{}, {"guidance_end": 0.5}, {"guidance_start": 0.33, "guidance_end": 0.87}])
    def test_guidance(self, interval):
        pipe = make(unet=smooth(random_unet(**CONDITIONAL)))
        guided = {"class_labels": [1, 2], "guidance_scale": 2.0, **interval}
        latents, found = round_trip(pipe, **guided)
        assert distance(found, 2 * IMAGES - 1) < ROUND_TRIP
        assert distance(latents, round_trip(pipe, class_labels=[1, 2])[0]) > 0.01

    @pytest.mark.parametrize("cls", [LearnedVarianceDDPMScheduler, DDIMScheduler])
    def test_classifier_guidance(self, cls):
        pipe = make(scheduler=cls(**CHAIN), classifier=random_classifier(num_classes=4))
        guided = {"class_labels": [1, 2], "classifier_guidance_scale": 0.05, "guidance_end": 0.7}
        latents, found = round_trip(pipe, **guided)
        assert distance(found, 2 * IMAGES - 1) < ROUND_TRIP
        assert distance(latents, round_trip(pipe)[0]) > 0.001

    def test_guidance_by_a_score(self):
        pipe = make()
        target = GuidanceFunction(lambda x_t, t, x_0, **_: -0.1 * x_0.square().flatten(1).sum(dim=1), "score")
        latents, found = round_trip(pipe, guidance_fn=target)
        assert distance(found, 2 * IMAGES - 1) < ROUND_TRIP
        assert distance(latents, round_trip(pipe)[0]) > 0.001

    def test_prompts(self):
        pipe = make(
            unet=smooth(random_text_unet()), text_encoder=random_text_encoder("clip"), tokenizer=toy_tokenizer("clip")
        )
        guided = {"prompt": ["a red cat", "the dog"], "negative_prompt": "a hat", "guidance_scale": 1.5}
        latents, found = round_trip(pipe, **guided)
        assert distance(found, 2 * IMAGES - 1) < ROUND_TRIP
        # One prompt for all images.
        for index, prompt in enumerate(guided["prompt"]):
            alone = pipe.invert(IMAGES, STEPS, ITERATIONS, **{**guided, "prompt": prompt})[index]
            assert rounding_errors(latents[index], alone) <= SAMPLING

    def test_latents_of_an_autoencoder(self):
        config = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = fill_randomly(
            AutoencoderKL(**config, block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, scaling_factor=0.7)
        )
        pipe = make(unet=smooth(random_unet(in_channels=4, out_channels=8)), vae=vae)
        images = random_images(2, 3, 16, 16, seed=2)
        latents, found = round_trip(pipe, images)
        expected = 0.7 * vae.encode(2 * images - 1).latent_dist.mean
        assert distance(found, expected) < ROUND_TRIP * expected.abs().max()
        arguments = {"batch_size": 2, "num_inference_steps": STEPS, "latents": latents, "eta": 0.0, "output_type": "pt"}
        decoded = (LatentSpace(vae).decode(expected) / 2 + 0.5).clamp(0, 1)
        assert distance(pipe(**arguments).images, decoded) < 10 * ROUND_TRIP

    def test_another_size_than_that_of_training(self):
        images = random_images(1, 3, 12, 16, seed=2)
        _, found = round_trip(make(), images, height=12, width=16)
        assert distance(found, 2 * images - 1) < ROUND_TRIP

    @pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
    def test_other_solvers_come_close_with_many_steps(self, cls):
        config = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.005, "clip_sample": False}
        own = LearnedVarianceDDPMScheduler(**config)
        pipe = make(scheduler=own)
        # The solver has other timesteps, so inverting with ours ends at another noise level.
        for inverts, bound in (("ours", 0.2), ("the solver", 0.05)):
            errors = []
            for steps in (8, 32):
                pipe.scheduler = own if inverts == "ours" else cls.from_config(own.config)
                latents = pipe.invert(IMAGES, steps, 2)
                pipe.scheduler = cls.from_config(own.config)
                arguments = {"batch_size": 2, "num_inference_steps": steps, "output_type": "latent"}
                errors.append(distance(pipe(**arguments, latents=latents).images, 2 * IMAGES - 1))
            assert errors[1] < min(errors[0] / 2, bound)


class TestEveryPipeline:
    def test_controlnet(self):
        unet = smooth(random_unet(**CONDITIONAL))
        controlnet = fill_randomly(AdaGNControlNetModel.from_unet(unet), seed=1)
        pipe = make(ADMControlNetPipeline, unet, controlnet=controlnet)
        arguments = {"image": random_images(2, 3, 8, 8, seed=3), "class_labels": [1, 2], "guidance_scale": 1.5}
        for interval in ({}, {"control_guidance_start": 0.25, "control_guidance_end": 0.75}):
            latents, found = round_trip(pipe, **arguments, **interval)
            assert distance(found, 2 * IMAGES - 1) < ROUND_TRIP
        assert distance(latents, round_trip(pipe, **arguments)[0]) > 0.001

    def test_super_resolution(self):
        unet = smooth(random_unet(in_channels=6, time_cond_proj_dim=8))
        pipe = make(ADMSuperResolutionPipeline, unet)
        small = random_images(2, 3, 4, 4, seed=3)
        # The noise of the small image is drawn from the generator, by both calls.
        arguments = {"image": small, "noise_level": 30, "num_inference_steps": STEPS}
        latents = pipe.invert(IMAGES, **arguments, num_fixed_point_iterations=ITERATIONS, generator=seeded())
        found = pipe(**arguments, latents=latents, eta=0.0, output_type="latent", generator=seeded()).images
        assert distance(found, 2 * IMAGES - 1) < ROUND_TRIP

    def test_image_to_image(self):
        pipe = make(ADMImageToImagePipeline, smooth(random_unet(in_channels=6)))
        _, found = round_trip(pipe, image=random_images(2, 3, 8, 8, seed=3))
        assert distance(found, 2 * IMAGES - 1) < ROUND_TRIP

    def test_inpainting_with_a_network_that_takes_masks(self):
        pipe = make(ADMInpaintPipeline, smooth(random_unet(in_channels=7)))
        mask = torch.zeros(8, 8)
        mask[2:6, 1:7] = 1
        # Another image than the one to invert: what is inpainted is reproduced, the rest is that of `image`.
        other = random_images(2, 3, 8, 8, seed=3)
        arguments = {"image": other, "mask_image": mask, "correct_kept": False}
        latents, found = round_trip(pipe, **arguments)
        inpainted = mask.bool().expand_as(found)
        assert distance(found[inpainted], (2 * IMAGES - 1)[inpainted]) < ROUND_TRIP
        assert distance(latents, 2 * other - 1) > 0.1
        assert torch.equal(found[~inpainted], (2 * other - 1)[~inpainted])

    def test_unclip(self):
        unet = smooth(random_text_unet("added_kv", cross_attention_dim=CONTEXT_WIDTH, class_embed_type="identity"))
        projection = UnCLIPProjectionModel(
            clip_embeddings_dim=EMBEDDING_WIDTH,
            time_embed_dim=4 * unet.config.block_out_channels[0],
            cross_attention_dim=CONTEXT_WIDTH,
            text_conditioning=None,
        )
        components = dict.fromkeys(ADMUnCLIPPipeline._optional_components)
        components |= {"image_encoder": random_clip_vision(), "feature_extractor": toy_image_processor()}
        components["image_projection"] = fill_randomly(projection, seed=1)
        pipe = make(ADMUnCLIPPipeline, unet, **components)
        arguments = {"image": IMAGES, "guidance_scale": 1.5}
        latents, found = round_trip(pipe, **arguments)
        assert distance(found, 2 * IMAGES - 1) < ROUND_TRIP
        # The embedding is that of `image`, and the same as a vector.
        assert (
            distance(latents, pipe.invert(IMAGES, STEPS, ITERATIONS, image=IMAGES.flip(0), guidance_scale=1.5)) > 0.001
        )
        embeds = pipe.encode_image(IMAGES)
        found = pipe.invert(IMAGES, STEPS, ITERATIONS, image_embeds=embeds, guidance_scale=1.5)
        assert rounding_errors(found, latents) <= SAMPLING
        # Both ends of a path through the noise of both images.
        path = pipe.interpolate(
            *IMAGES,
            weights=[0.0, 0.5, 1.0],
            latents=latents,
            eta=0.0,
            num_inference_steps=STEPS,
            guidance_scale=1.5,
            output_type="pt",
        ).images
        assert distance(path[[0, 2]], IMAGES) < ROUND_TRIP
        assert min(distance(path[1], image) for image in IMAGES) > 0.1

    def test_refuses_inpainting_by_replacement(self):
        with pytest.raises(
            ValueError, match="not trained to inpaint.*cannot be inverted. Invert the image with `ADMPip"
        ):
            make(ADMInpaintPipeline).invert(IMAGES, STEPS, image=IMAGES, mask_image=torch.eye(8))


class TestBadInput:
    @pytest.mark.parametrize(
        "name",
        ["latents", "output_type", "return_dict", "num_images_per_prompt", "strength", "jump_length", "jump_n_sample"],
    )
    def test_arguments_without_a_meaning(self, name):
        with pytest.raises(ValueError, match=f"`invert` does not take `{name}`: .* Leave `{name}` out"):
            make().invert(IMAGES, STEPS, **{name: 1})

    def test_noise(self):
        with pytest.raises(ValueError, match=re.escape("`eta` is 0.5, but only sampling without new noise")):
            make().invert(IMAGES, STEPS, eta=0.5)
        pipe = make()
        torch.testing.assert_close(pipe.invert(IMAGES, STEPS, eta=0.0), pipe.invert(IMAGES, STEPS), rtol=0, atol=1e-4)

    def test_an_image_to_start_from(self):
        with pytest.raises(
            ValueError, match="inversion takes all steps.* Leave out `strength`, and the image to start"
        ):
            make().invert(IMAGES, STEPS, image=IMAGES)

    def test_guidance_that_shifts(self):
        function = GuidanceFunction(lambda x_t, t, x_0, **_: x_0, "shift")
        with pytest.raises(ValueError, match=re.escape("kind 'shift': it changes x_{t-1} after the step")):
            make().invert(IMAGES, STEPS, guidance_fn=function)

    @pytest.mark.parametrize("iterations", [0, -1, 1.5])
    def test_iterations(self, iterations):
        with pytest.raises(ValueError, match="`num_fixed_point_iterations` is .*integer of at least 1"):
            make().invert(IMAGES, STEPS, iterations)

    @pytest.mark.parametrize("steps", [0, 2.5])
    def test_steps(self, steps):
        with pytest.raises(ValueError, match="`num_inference_steps` is"):
            make().invert(IMAGES, steps)

    def test_images(self):
        pipe = make()
        with pytest.raises(ValueError, match="divisible by 2, .* That is the size of the given image"):
            pipe.invert(random_images(1, 3, 9, 8, seed=0))
        with pytest.raises(ValueError, match="`image` has values from nan to nan"):
            pipe.invert(torch.full((1, 3, 8, 8), torch.nan))
        with pytest.raises(ValueError, match=r"`image` has values from -1 to .*take `x / 2 \+ 0.5`"):
            pipe.invert(2 * IMAGES.round() - 1)
        with pytest.raises(ValueError, match="`image` has shape .* with 3 channels"):
            pipe.invert(random_images(1, 1, 8, 8, seed=0))
        with pytest.raises(ValueError, match="The image to invert is None"):
            make().invert(None, STEPS)
        with pytest.raises(ValueError, match="`image` is a str"):
            pipe.invert("a red cat")

    def test_a_number_of_images_that_does_not_match(self):
        pipe = make(unet=random_unet(**CONDITIONAL))
        with pytest.raises(ValueError, match="different numbers of images"):
            pipe.invert(IMAGES, STEPS, class_labels=[1, 2, 3])
        message = "gives samples of shape (1, 3, 8, 8), but the other arguments ask for (2, 3, 8, 8). Pass one image"
        with pytest.raises(ValueError, match=re.escape(message)):
            pipe.invert(IMAGES[:1], STEPS, class_labels=[1, 2])
        with pytest.raises(ValueError, match=re.escape("but the other arguments ask for (2, 3, 16, 16)")):
            pipe.invert(IMAGES, STEPS, height=16, width=16)

    def test_an_argument_that_the_call_does_not_take(self):
        with pytest.raises(TypeError, match="promt"):
            make().invert(IMAGES, STEPS, promt="a red cat")

    def test_an_autoencoder_that_overflows(self):
        config = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = fill_randomly(AutoencoderKL(**config, block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4))
        vae.encoder.conv_in.weight.data[0] = torch.nan
        pipe = make(unet=random_unet(in_channels=4, out_channels=8), vae=vae)
        with pytest.raises(ValueError, match="latents that are not finite .* Weights of `vae` are not finite"):
            pipe.invert(random_images(1, 3, 16, 16, seed=0), STEPS)

    @pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
    def test_warns_of_clipping(self, option, caplog):
        options = {**CHAIN, "clip_sample": False, option: True}
        pipe = make(scheduler=LearnedVarianceDDPMScheduler(**options))
        for _ in range(2):
            pipe.invert(IMAGES, STEPS)
        (message,) = [record.message for record in caplog.records if "clips the predicted x_0" in record.message]
        assert f"from_config(pipe.scheduler.config, {option}=False)" in message
        # The advice removes it.
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{option: False})
        caplog.clear()
        pipe._warned.clear()
        pipe.invert(IMAGES, STEPS)
        assert not caplog.records
