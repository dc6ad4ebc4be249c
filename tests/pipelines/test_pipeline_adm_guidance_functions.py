"""
`guidance_fn` of all pipelines: against distributions whose posterior is known, against a loop of DPS that is written by
hand from the paper, and what it refuses.
"""

import inspect
import math
import re

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDIMScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers_samplers import SAMPLERS, as_parameters
from tolerances import NETWORK, SAMPLING, rounding_errors
from toy_models import (
    CONDITIONAL,
    TOY_AUTOENCODER_CONFIG,
    fill_randomly,
    random_classifier,
    random_text_encoder,
    random_text_unet,
    random_unet,
    toy_tokenizer,
)

import diffusers_adm
from diffusers_adm import (
    AdaGNControlNetModel,
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conditioning.guidance import log_probability_gradient
from diffusers_adm.conditioning.guidance_functions import GuidanceFunction
from diffusers_adm.conditioning.image_guidance import MeasurementGuidance, RegionGuidance
from diffusers_adm.conditioning.measurements import DownsamplingOperator, GaussianBlurOperator, MaskOperator


ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), dim=0)
LOG_SIGMAS = ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD).log() / 2
MEAN, STD = 0.1, 0.3  # of the data
MEASURED, NOISE_STD = 0.7, 0.2  # of some pixels
POSTERIOR_VARIANCE = 1 / (1 / STD**2 + 1 / NOISE_STD**2)
POSTERIOR_MEAN = POSTERIOR_VARIANCE * (MEAN / STD**2 + MEASURED / NOISE_STD**2)
CHECKERBOARD = (torch.arange(16) % 2 == 0).reshape(1, 1, 4, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alpha_at(timestep) -> float:
    """bar alpha, also between two timesteps, where solvers of diffusers read log sigma off a line."""
    t = min(max(float(timestep), 0.0), 999.0)
    low = min(math.floor(t), 998)
    log_sigma = (low + 1 - t) * LOG_SIGMAS[low] + (t - low) * LOG_SIGMAS[low + 1]
    return float(1 / (1 + torch.exp(2 * log_sigma)))


class GaussianUNet(ModelMixin, ConfigMixin):
    """The exact network for independent pixels; those of `CHECKERBOARD` may have another mean and deviation."""

    @register_to_config
    def __init__(
        self,
        mean: float = MEAN,
        std: float = STD,
        other_mean: float | None = None,
        other_std: float | None = None,
        sample_size: int = 4,
        in_channels: int = 1,
        out_channels: int = 1,
        block_out_channels: tuple[int, ...] = (1,),
    ):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))
        other_mean, other_std = (mean, std) if other_mean is None else (other_mean, other_std)
        self.mean = torch.where(CHECKERBOARD, other_mean, mean)
        self.std = torch.where(CHECKERBOARD, other_std, std)

    def forward(self, sample, timestep, class_labels=None):
        alpha = alpha_at(timestep)
        gain = alpha**0.5 * self.std**2 / (alpha * self.std**2 + 1 - alpha)
        original = self.mean + gain * (sample - alpha**0.5 * self.mean)
        return UNet2DOutput(sample=(sample - alpha**0.5 * original) / (1 - alpha) ** 0.5)


def make_pipeline(unet=None, scheduler=None, cls=ADMPipeline, **components):
    components = {**dict.fromkeys(cls._optional_components), **components}
    scheduler = LearnedVarianceDDPMScheduler() if scheduler is None else scheduler
    pipe = cls(unet=random_unet() if unet is None else unet, scheduler=scheduler, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gaussian_pipeline(name: str = "LearnedVarianceDDPMScheduler", unet=None, **options) -> ADMPipeline:
    config = LearnedVarianceDDPMScheduler(variance_type="fixed_small", clip_sample=False).config
    cls = getattr(diffusers, name, None) or getattr(diffusers_adm, name)
    scheduler = cls.from_config(config, **{"timestep_spacing": "leading", **options})
    return make_pipeline(GaussianUNet() if unet is None else unet, scheduler)


def likelihood(x_t, t, pred_original_sample, **conditions):
    """log p(y | x_t) of the pixels of `CHECKERBOARD`: exact, because x_0 given x_t is Gaussian."""
    alpha = alpha_at(t)
    variance = STD**2 * (1 - alpha) / (alpha * STD**2 + 1 - alpha)
    difference = (MEASURED - pred_original_sample) * CHECKERBOARD
    return -difference.square().flatten(1).sum(dim=1) / (2 * (NOISE_STD**2 + variance))


def distance(x_t, t, pred_original_sample, **conditions):
    return -0.3 * ((MEASURED - pred_original_sample) * CHECKERBOARD).flatten(1).norm(dim=1)


class TestKnownDistributions:
    def sample(self, pipe, **arguments):
        arguments = {"num_inference_steps": 8, "batch_size": 3, **arguments}
        return pipe(generator=[seeded(i) for i in range(3)], output_type="latent", **arguments).images

    # Tables of diffusers are float32 and the first step multiplies errors by 157.
    @pytest.mark.parametrize("name, options", as_parameters(SAMPLERS))
    def test_every_scheduler_of_diffusers(self, name, options):
        """
        The score of the data plus that of the likelihood is the score of the posterior, whose exact network gives the
        same images from the same noise.
        """
        posterior = GaussianUNet(other_mean=POSTERIOR_MEAN, other_std=POSTERIOR_VARIANCE**0.5)
        expected = self.sample(gaussian_pipeline(name, posterior, **options))
        pipe = gaussian_pipeline(name, **options)
        actual = self.sample(pipe, guidance_fn=GuidanceFunction(likelihood, "score", through_unet=True))
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)
        assert (self.sample(pipe) - expected).abs().max() > 0.1
        # The network's Jacobian is not that of standard normal data, so that without it the result is another one.
        other = self.sample(pipe, guidance_fn=GuidanceFunction(likelihood, "score"))
        assert (other - expected).abs().max() > 0.02

    def test_our_ancestral_steps(self):
        """The closed form of the posterior, within the error of its estimate and of the steps."""
        pipe = gaussian_pipeline(variance_type="fixed_large")
        images = pipe(
            batch_size=64,
            num_inference_steps=200,
            generator=seeded(),
            output_type="latent",
            guidance_fn=GuidanceFunction(likelihood, "score", through_unet=True),
        ).images
        measured, others = (images[mask.expand_as(images)] for mask in (CHECKERBOARD, ~CHECKERBOARD))
        # 512 numbers each: standard errors of 0.007 and 0.013; steps of this length add about as much.
        assert measured.mean() == pytest.approx(POSTERIOR_MEAN, abs=0.03)
        assert measured.std() == pytest.approx(POSTERIOR_VARIANCE**0.5, abs=0.03)
        assert others.mean() == pytest.approx(MEAN, abs=0.05)
        assert others.std() == pytest.approx(STD, abs=0.05)

    @pytest.mark.parametrize("kind", ["score", "shift"])
    @pytest.mark.parametrize(
        "name, eta",
        [("LearnedVarianceDDPMScheduler", None), ("LearnedVarianceDDPMScheduler", 0.0), ("DDIMScheduler", None)],
    )
    def test_standard_normal_data_needs_no_backward_pass(self, name, eta, kind):
        """x_0 = sqrt(bar alpha) x_t is then the exact prediction, so both ways give the same gradient."""
        pipe = gaussian_pipeline(name, GaussianUNet(mean=0.0, std=1.0))
        actual, expected, unguided = (
            self.sample(pipe, eta=eta, guidance_fn=guidance_fn)
            for guidance_fn in (
                GuidanceFunction(distance, kind),
                GuidanceFunction(distance, kind, through_unet=True),
                None,
            )
        )
        # The network divides by sqrt(1 - bar alpha) what the scheduler multiplies by it.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        assert (unguided - expected).abs().max() > 0.02

    @pytest.mark.parametrize("through_unet", [True, False])
    @pytest.mark.parametrize("name, options", as_parameters([("LearnedVarianceDDPMScheduler", {}), *SAMPLERS]))
    def test_a_shift_lowers_the_error(self, name, options, through_unet):
        pipe = gaussian_pipeline(name, **options)
        guidance_fn = GuidanceFunction(distance, "shift", through_unet)
        guided, plain = (
            self.sample(pipe, num_inference_steps=25, guidance_fn=guidance) for guidance in (guidance_fn, None)
        )
        errors = [((MEASURED - images) * CHECKERBOARD).flatten(1).norm(dim=1).mean() for images in (guided, plain)]
        assert errors[0] < 0.8 * errors[1]
        # The others are independent of them, in the network and in the measurement. Only without a shift do UniPC and
        # SA-Solver correct their last step in each one, so that they come out a little elsewhere.
        difference = (guided - plain).masked_select(~CHECKERBOARD)
        assert difference.abs().max() < (0.02 if name in ("UniPCMultistepScheduler", "SASolverScheduler") else 1e-4)

    @pytest.mark.parametrize(
        "name, other",
        [("EulerDiscreteScheduler", "DDIMScheduler"), ("EulerAncestralDiscreteScheduler", "DDPMScheduler")],
    )
    def test_shifts_of_scaled_samples(self, name, other):
        """The same method in two scales: x_0 + sigma * noise, and signal * x_0 + std * noise."""
        guidance_fn = GuidanceFunction(distance, "shift", through_unet=True)
        actual, expected = (
            self.sample(gaussian_pipeline(each), num_inference_steps=20, guidance_fn=guidance_fn)
            for each in (name, other)
        )
        # Not closer, because the noise levels of the former are rounded to float32 on another way.
        torch.testing.assert_close(actual, expected, rtol=0, atol=5e-3)

    @pytest.mark.parametrize("cls", [UniPCMultistepScheduler, diffusers.SASolverScheduler])
    def test_a_corrector_would_lose_the_shift(self, cls, monkeypatch):
        """It steps again from the sample before."""
        guidance_fn = GuidanceFunction(lambda x_t, t, x_0, **conditions: torch.full_like(x_t, 0.02), "shift")
        pipe = gaussian_pipeline(cls.__name__)
        plain, shifted = (
            self.sample(pipe, num_inference_steps=20, guidance_fn=guidance) for guidance in (None, guidance_fn)
        )
        step = cls.step

        def keep_last_sample(self, *args, **kwargs):
            self.last_sample = vars(self).get("kept", self.last_sample)
            result = step(self, *args, **kwargs)
            self.kept = self.last_sample
            return result

        monkeypatch.setattr(cls, "step", keep_last_sample)
        wrong = self.sample(pipe, num_inference_steps=20, guidance_fn=guidance_fn)
        assert (wrong - plain).mean().abs() < 0.5 * (shifted - plain).mean()


class TestAgainstDPS:
    """Diffusion posterior sampling (Chung et al. 2023, algorithm 1), in plain torch and float64."""

    TIMESTEPS = tuple(range(0, 1000, 40))[::-1]

    def loop(self, unet, operator, measured: torch.Tensor, scale: float, generator) -> torch.Tensor:
        """25 ancestral steps with a learned variance and a clipped x_0."""
        x = torch.randn((2, 3, 16, 16), generator=generator, dtype=torch.float64)
        for step, t in enumerate(self.TIMESTEPS):
            x = x.detach().requires_grad_()
            alpha = ALPHAS_CUMPROD[t]
            before = ALPHAS_CUMPROD[t - 40] if t else torch.ones((), dtype=torch.float64)
            epsilon, fraction = unet(x, t).sample.chunk(2, dim=1)
            x_0 = ((x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()).clamp(-1, 1)
            residuals = [(y - operator(x_0[i : i + 1])[0]).square().sum().sqrt() for i, y in enumerate(measured)]
            (gradient,) = torch.autograd.grad(sum(residuals), x)
            with torch.no_grad():
                beta = 1 - alpha / before
                mean = (before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - alpha)
                # The posterior variance of the last step is 0; that of the one before it stands in.
                s = max(step - (t == 0), 0)
                later, earlier = ALPHAS_CUMPROD[self.TIMESTEPS[s]], ALPHAS_CUMPROD[self.TIMESTEPS[s] - 40]
                smallest = (1 - later / earlier) * (1 - earlier) / (1 - later)
                share = (fraction + 1) / 2
                log_variance = share * beta.log() + (1 - share) * smallest.log()
                noise = torch.randn((2, 3, 16, 16), generator=generator, dtype=torch.float64)
                x = mean + (t > 0) * (log_variance / 2).exp() * noise - scale * gradient
        return x

    @pytest.mark.parametrize(
        "operator",
        [
            MaskOperator(torch.rand(16, 16, generator=seeded(2)) < 0.5),
            DownsamplingOperator(4),
            DownsamplingOperator(4, "bicubic"),
            GaussianBlurOperator(7, 1.5),
        ],
        ids=["inpainting", "average", "bicubic", "blur"],
    )
    @pytest.mark.parametrize("scale", [0.3, 1.0])
    def test_25_steps(self, operator, scale):
        # In float64, because these 25 steps of a random network amplify some differences by 10 million.
        pipe = make_pipeline(random_unet(sample_size=16).double())
        truth = F.avg_pool2d(torch.rand(2, 3, 16, 16, generator=seeded(1)), 3, 1, 1)
        measured = operator.measure(truth, 0.05, seeded(3))
        arguments = {"batch_size": 2, "num_inference_steps": 25, "output_type": "latent"}
        actual, unguided = (
            pipe(generator=seeded(), guidance_fn=guidance, **arguments).images
            for guidance in (MeasurementGuidance(operator, measured, scale), None)
        )
        expected = self.loop(pipe.unet, operator, measured.double(), scale, seeded())
        size = expected.abs().max()
        assert actual.dtype == torch.float64
        assert (actual - expected).abs().max() < 1e-4 * size
        assert (unguided - expected).abs().max() > 0.05 * size


class TestEveryPipeline:
    """Each takes functions; they get the conditions of the call, and change nothing outside of their interval."""

    IMAGE = torch.rand(2, 3, 8, 8, generator=seeded(1))
    MASK = torch.zeros(8, 8)
    MASK[2:6, 1:7] = 1

    def case(self, kind: str):
        if kind == "plain":
            pipe = make_pipeline(random_unet(**CONDITIONAL))
            return pipe, {"class_labels": [1, 2], "guidance_scale": 2.5}, {"class_labels"}
        if kind == "text":
            components = {"text_encoder": random_text_encoder(), "tokenizer": toy_tokenizer()}
            pipe = make_pipeline(random_text_unet(), **components)
            return pipe, {"prompt": ["a cat", "a dog"], "guidance_scale": 2.5}, {"prompt"}
        if kind == "controlnet":
            unet = random_unet()
            controlnet = fill_randomly(AdaGNControlNetModel.from_unet(unet), seed=1)
            pipe = make_pipeline(unet, cls=ADMControlNetPipeline, controlnet=controlnet)
            return pipe, {"image": self.IMAGE}, {"control_images"}
        if kind in ("repaint", "inpainter"):
            channels = 3 if kind == "repaint" else 7
            pipe = make_pipeline(random_unet(in_channels=channels), cls=ADMInpaintPipeline)
            steps = {"jump_length": 1, "jump_n_sample": 2} if kind == "repaint" else {}
            return pipe, {"image": self.IMAGE, "mask_image": self.MASK, **steps}, {"keep_mask", "known_sample"}
        if kind == "upsampler":
            pipe = make_pipeline(random_unet(in_channels=6), cls=ADMSuperResolutionPipeline)
            return pipe, {"image": self.IMAGE[:, :, ::2, ::2]}, {"source_image"}
        pipe = make_pipeline(random_unet(in_channels=6), cls=ADMImageToImagePipeline)
        return pipe, {"image": self.IMAGE}, {"source_image"}

    KINDS = ("plain", "text", "controlnet", "repaint", "inpainter", "upsampler", "image to image")

    @pytest.mark.parametrize(
        "function_kind, through_unet, scheduler",
        [
            ("score", False, LearnedVarianceDDPMScheduler),
            ("score", True, DDIMScheduler),
            ("shift", True, LearnedVarianceDDPMScheduler),
            ("shift", False, DDIMScheduler),
        ],
    )
    @pytest.mark.parametrize("kind", KINDS)
    def test_guides(self, kind, function_kind, through_unet, scheduler):
        pipe, arguments, names = self.case(kind)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        seen = []

        def brightness(x_t, t, pred_original_sample, **conditions):
            seen.append((x_t, pred_original_sample, conditions))
            return (1.0 if function_kind == "score" else 0.2) * pred_original_sample.sum()

        arguments = {**arguments, "num_inference_steps": 4, "output_type": "pt"}
        bright, plain = (
            pipe(**arguments, generator=seeded(), guidance_fn=guidance_fn).images
            for guidance_fn in (GuidanceFunction(brightness, function_kind, through_unet), None)
        )
        assert (bright - plain).mean() > 0.003
        number = 2 if names else 1
        for x_t, x_0, conditions in seen:
            assert x_t.shape == x_0.shape == (number, 3, 8, 8)
            assert x_t.requires_grad
            assert set(conditions) == names
            for entry in conditions.values():
                assert len(entry[0] if kind == "controlnet" else entry) == number
        assert not bright.requires_grad
        assert all(parameter.grad is None for parameter in pipe.unet.parameters())
        if kind in ("repaint", "inpainter"):
            kept = (self.MASK == 0).expand_as(bright)
            assert torch.equal(bright[kept], self.IMAGE[kept])

    def test_all_take_it(self):
        for name in dir(diffusers_adm):
            if name.startswith("ADM"):
                parameters = inspect.signature(getattr(diffusers_adm, name).__call__).parameters
                assert parameters["guidance_fn"].default is None, name

    def test_prompts_and_labels_of_several_images_each(self):
        seen = {}

        def look(x_t, t, pred_original_sample, **conditions):
            seen.update(conditions)
            return 0 * x_t

        components = {"text_encoder": random_text_encoder(), "tokenizer": toy_tokenizer()}
        pipe = make_pipeline(random_text_unet(**CONDITIONAL), **components)
        arguments = {
            "num_images_per_prompt": 2,
            "num_inference_steps": 1,
            "guidance_fn": GuidanceFunction(look, "score"),
        }
        pipe(prompt=["a cat", "a dog"], class_labels=[0, 3], **arguments)
        assert seen["prompt"] == ["a cat", "a cat", "a dog", "a dog"]
        assert seen["class_labels"].tolist() == [0, 0, 3, 3]
        embeds = pipe.encode_prompt(["a cat", "a dog"])[0]
        seen.clear()
        pipe(prompt_embeds=embeds, **arguments)
        assert set(seen) == {"prompt_embeds"}
        assert len(seen["prompt_embeds"]) == 4

    def test_inpainting_keeps_its_part_in_each_step(self):
        """A trained inpainter corrects the prediction; the gradient stays out of the kept part."""
        pipe, arguments, _ = self.case("inpainter")
        pushed = GuidanceFunction(lambda x_t, t, x_0, **conditions: torch.full_like(x_t, 0.5), "shift")
        samples = {}

        def keep(pipe, step, t, tensors):
            samples.setdefault(len(samples), tensors["latents"])
            return {}

        for guidance_fn in (pushed, None):
            pipe(
                **arguments,
                num_inference_steps=2,
                generator=seeded(),
                guidance_fn=guidance_fn,
                callback_on_step_end=keep,
            )
        kept = (self.MASK == 0).expand_as(samples[0])
        assert rounding_errors(samples[0][kept], samples[2][kept]) <= NETWORK
        assert (samples[0] - samples[2])[~kept].min() > 0.4

    def test_latents(self):
        """Functions see latents; those of pixels decode them, with a gradient."""
        vae = fill_randomly(AutoencoderKL(**TOY_AUTOENCODER_CONFIG, scaling_factor=0.7))
        unet = random_unet(sample_size=4, in_channels=2, out_channels=4)
        pipe = make_pipeline(unet, LearnedVarianceDDPMScheduler(clip_sample=False), vae=vae)
        target = torch.rand(1, 3, 8, 8, generator=seeded(5))
        arguments = {"num_inference_steps": 6, "output_type": "pt"}
        errors = [
            (pipe(generator=seeded(), guidance_fn=guidance_fn, **arguments).images - target).square().mean()
            for guidance_fn in (RegionGuidance(target, scale=0.3, vae=vae, through_unet=True), None)
        ]
        assert errors[0] < 0.9 * errors[1]
        with pytest.raises(ValueError, match=re.escape("results have (2, 4, 4). Resize it")):
            pipe(**arguments, guidance_fn=RegionGuidance(target))


class TestManner:
    def push(self, value: float, kind: str = "score", **options) -> GuidanceFunction:
        return GuidanceFunction(lambda x_t, t, x_0, **conditions: torch.full_like(x_t, value), kind, **options)

    @pytest.mark.parametrize("eta", [None, 0.0])
    def test_the_classifier_is_one_of_them(self, eta):
        """The same elementwise operations on the same numbers."""
        pipe = make_pipeline(random_unet(**CONDITIONAL), classifier=random_classifier(num_classes=4))

        def classify(x_t, t, pred_original_sample, class_labels, **conditions):
            return 0.5 * log_probability_gradient(pipe.classifier, x_t, t, class_labels)

        arguments = {"class_labels": [1, 3], "num_inference_steps": 3, "eta": eta, "output_type": "latent"}
        own = pipe(**arguments, generator=seeded(), classifier_guidance_scale=0.5).images
        given = pipe(**arguments, generator=seeded(), guidance_fn=GuidanceFunction(classify, "score")).images
        assert rounding_errors(given, own) <= SAMPLING
        both = {
            "classifier_guidance_scale": 0.25,
            "guidance_fn": GuidanceFunction(lambda *a, **c: classify(*a, **c) / 2, "score"),
        }
        assert rounding_errors(pipe(**arguments, generator=seeded(), **both).images, own) <= SAMPLING

    @pytest.mark.parametrize("kind", ["score", "shift"])
    def test_several_add_up(self, kind):
        pipe = make_pipeline()

        def sample(guidance_fn):
            return pipe(num_inference_steps=3, generator=seeded(), output_type="latent", guidance_fn=guidance_fn).images

        values = [
            GuidanceFunction(lambda x_t, t, x_0, s=s, **conditions: s * x_0.square().sum(), kind, True)
            for s in (0.02, 0.03)
        ]
        one = GuidanceFunction(lambda x_t, t, x_0, **conditions: 0.05 * x_0.square().sum(), kind, True)
        assert rounding_errors(sample(values), sample(one)) <= SAMPLING
        assert (
            rounding_errors(sample([self.push(0.1, kind), self.push(0.2, kind)]), sample(self.push(0.3, kind)))
            <= SAMPLING
        )

    def test_a_shift_is_added_to_x_before(self):
        pipe = make_pipeline()
        samples = []

        def keep(pipe, step, t, tensors):
            samples.append(tensors["latents"])
            return {}

        for guidance_fn in (self.push(0.25, "shift"), None):
            pipe(num_inference_steps=1, generator=seeded(), guidance_fn=guidance_fn, callback_on_step_end=keep)
        torch.testing.assert_close(samples[0] - samples[1], torch.full_like(samples[0], 0.25), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("returned", ["scalar", "one an image", "gradient"])
    @pytest.mark.parametrize("through_unet", [False, True])
    def test_forms_of_a_result(self, returned, through_unet):
        """A function may also differentiate by itself."""
        pipe = make_pipeline()

        def function(x_t, t, pred_original_sample, **conditions):
            values = 0.1 * (pred_original_sample.square() + x_t).flatten(1).sum(dim=1)
            if returned == "one an image":
                return values
            return values.sum() if returned == "scalar" else torch.autograd.grad(values.sum(), x_t)[0]

        images = pipe(
            batch_size=2,
            num_inference_steps=2,
            generator=seeded(),
            output_type="latent",
            guidance_fn=GuidanceFunction(function, "score", through_unet),
        ).images

        def expected_gradient(x_t, t, x_0, **conditions):
            (gradient,) = torch.autograd.grad(0.1 * x_0.square().sum(), x_t)
            return gradient + 0.1

        expected = pipe(
            batch_size=2,
            num_inference_steps=2,
            generator=seeded(),
            output_type="latent",
            guidance_fn=GuidanceFunction(expected_gradient, "score", through_unet),
        ).images
        assert rounding_errors(images, expected) <= SAMPLING

    @pytest.mark.parametrize(
        "start, end, guided", [(0.0, 1.0, "yyyyy"), (0.2, 0.8, ".yyy."), (0.0, 0.4, "yy..."), (0.3, 1.0, "..yyy")]
    )
    def test_interval(self, start, end, guided):
        pipe, steps, asked = make_pipeline(), [], []
        pipe.unet.register_forward_pre_hook(lambda _, args: asked.append(int(args[1])))

        def look(x_t, t, pred_original_sample, **conditions):
            steps.append(int(t))
            return 0 * x_t

        interval = {"guidance_start": start, "guidance_end": end}
        pipe(num_inference_steps=5, guidance_fn=GuidanceFunction(look, "score"), **interval)
        assert steps == [t for t, mark in zip(asked, guided, strict=True) if mark == "y"]

    def test_an_interval_without_a_step_is_warned_of(self, caplog):
        pipe = make_pipeline()
        pipe(num_inference_steps=3, guidance_fn=self.push(0.1), guidance_start=0.5, guidance_end=0.6)
        assert "Guidance has no effect: none of the 3 steps" in caplog.text

    def test_without_functions_no_gradient_is_enabled(self):
        pipe, enabled = make_pipeline(), []
        pipe.unet.register_forward_pre_hook(lambda _, args: enabled.append(torch.is_grad_enabled()))
        for guidance_fn, expected in (
            (None, False),
            ([], False),
            (self.push(0.1), False),
            (self.push(0.1, through_unet=True), True),
        ):
            enabled.clear()
            pipe(num_inference_steps=2, guidance_fn=guidance_fn)
            assert enabled == [expected] * 2

    @pytest.mark.parametrize("kind", ["score", "shift"])
    @pytest.mark.parametrize("through_unet", [False, True])
    def test_nothing_in_the_loop_waits_for_the_device(self, kind, through_unet):
        pipe = make_pipeline(random_unet(**CONDITIONAL)).to("meta")
        function = GuidanceFunction(lambda x_t, t, x_0, **conditions: x_0.square().sum(), kind, through_unet)
        arguments = {"class_labels": [1, 2], "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "latent"}
        assert pipe(guidance_fn=function, **arguments).images.device.type == "meta"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_half_precision(self, dtype, scale):
        """The gradient through a U-Net in half precision, whatever its size; 25 roundings of it (2**-8, 2**-11)."""
        gradients = {}

        def function(x_t, t, pred_original_sample, **conditions):
            (gradient,) = torch.autograd.grad(scale * pred_original_sample.square().sum(), x_t)
            gradients.setdefault(pipe.unet.dtype, gradient)
            assert x_t.dtype == pred_original_sample.dtype == gradient.dtype == torch.float32
            return torch.zeros_like(x_t)

        for pipe in (make_pipeline(random_unet(sample_size=16)), make_pipeline(random_unet(sample_size=16).to(dtype))):
            pipe(num_inference_steps=1, generator=seeded(), guidance_fn=GuidanceFunction(function, "shift", True))
        expected, actual = gradients[torch.float32], gradients[dtype]
        assert (actual - expected).norm() < (0.15 if dtype == torch.bfloat16 else 0.02) * expected.norm()

    def test_two_calls_at_once_and_again(self):
        """Nothing of a call stays in the function."""
        truth = torch.rand(1, 3, 8, 8, generator=seeded(1))
        operator = DownsamplingOperator(2)
        guidance_fn = MeasurementGuidance(operator, operator.measure(truth, 0.1, seeded()))
        pipe = make_pipeline()
        first, _, again = (
            pipe(
                num_inference_steps=2, generator=seeded(), batch_size=n, guidance_fn=guidance_fn, output_type="pt"
            ).images
            for n in (1, 3, 1)
        )
        assert rounding_errors(first, again) <= SAMPLING


class TestBadInput:
    def call(self, function, kind="score", through_unet=False, **arguments):
        pipe = make_pipeline()
        guidance_fn = GuidanceFunction(function, kind, through_unet) if kind else function
        return pipe(batch_size=2, num_inference_steps=3, guidance_fn=guidance_fn, **arguments)

    @pytest.mark.parametrize(
        "guidance_fn, message",
        [
            (lambda x_t, t, x_0, **conditions: x_t, 'Wrap it: `GuidanceFunction(fn, kind="score")`'),
            ([lambda x_t, t, x_0, **conditions: x_t], 'Wrap it: `GuidanceFunction(fn, kind="score")`'),
            (3.0, "`guidance_fn` is or holds 3.0; pass a function"),
            ("score", "`guidance_fn` is or holds 'score'; pass a function"),
        ],
    )
    def test_what_does_not_say_what_it_returns(self, guidance_fn, message):
        pipe, calls = make_pipeline(), []
        pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match=re.escape(message)):
            pipe(guidance_fn=guidance_fn)
        assert not calls

    @pytest.mark.parametrize("through_unet", [False, True])
    @pytest.mark.parametrize(
        "function, message",
        [
            (
                lambda x_t, t, x_0: None,
                "in step 1 of 3, returned None. It must return a gradient of shape (2, 3, 8, 8)",
            ),
            (lambda x_t, t, x_0: 1.0, "in step 1 of 3, returned 1.0. It must"),
            (lambda x_t, t, x_0: x_0.sum(dim=(0, 1)), "returned a tensor of shape (8, 8) and type torch.float32"),
            (
                lambda x_t, t, x_0: x_0.flatten(1).sum(dim=1)[:1],
                "returned a tensor of shape (1,) and type torch.float32",
            ),
            (
                lambda x_t, t, x_0: torch.ones(2, dtype=torch.long),
                "returned a tensor of shape (2,) and type torch.int64",
            ),
            (lambda x_t, t, x_0: torch.ones(2), "does not depend on `x_t` or `pred_original_sample`"),
            (lambda x_t, t, x_0: x_0.detach().sum(), "does not depend on `x_t` or `pred_original_sample`"),
            (lambda x_t, t, x_0: torch.ones(2, requires_grad=True).sum(), "does not depend on `x_t`"),
            (lambda x_t, t, x_0: x_0.sum() * math.nan, "in step 1 of 3, returned a value or a gradient that is NaN"),
            (lambda x_t, t, x_0: torch.full_like(x_t, math.inf), "returned a value or a gradient that is NaN or inf"),
            (lambda x_t, t, x_0: (x_0 - x_0.detach()).abs().sqrt().sum(), "returned a value or a gradient that is NaN"),
            (
                lambda x_t, t, x_0: x_0.sum() * (math.nan if t < 100 else 1.0),
                "guidance_fn` guide, in step 3 of 3, returned a value or a gradient that is NaN",
            ),
        ],
    )
    def test_results(self, function, message, through_unet):
        def guide(x_t, t, pred_original_sample, **conditions):
            return function(x_t, t, pred_original_sample)

        with pytest.raises(ValueError, match=re.escape(message)):
            self.call(guide, "score", through_unet)

    def test_inference_mode(self):
        with torch.inference_mode(), pytest.raises(ValueError, match=re.escape("in `torch.inference_mode()`")):
            self.call(lambda x_t, t, x_0, **conditions: x_0.sum())

    def test_a_score_without_a_signal(self):
        config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
        pipe = make_pipeline(scheduler=LearnedVarianceDDPMScheduler(**config))
        functions = {
            kind: GuidanceFunction(lambda x_t, t, x_0, **conditions: 0.1 * x_0.sum(), kind, True)
            for kind in ("score", "shift")
        }
        with pytest.raises(ValueError, match="gives a score, but with `rescale_betas_zero_snr` x_T carries no signal"):
            pipe(guidance_fn=functions["score"], eta=0.0, num_inference_steps=3)
        for options in ({"guidance_fn": functions["score"]}, {"guidance_fn": functions["shift"], "eta": 0.0}):
            assert torch.isfinite(pipe(num_inference_steps=3, output_type="pt", **options).images).all()

    def test_conditions_that_the_call_does_not_have(self):
        def towards(x_t, t, pred_original_sample, *, prompt, **conditions):
            return x_t

        with pytest.raises(
            ValueError, match=re.escape("is conditioned on nothing: missing a required argument: 'prompt'")
        ):
            self.call(towards)

    def test_an_error_of_the_function_itself(self):
        def fails(x_t, t, pred_original_sample, **conditions):
            raise KeyError("prompt")

        with pytest.raises(KeyError, match="prompt"):
            self.call(fails)
