"""ADMPipeline with a classifier, against distributions whose classifier is known and loops written by hand."""

import json
import re
import types

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ModelMixin,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers_samplers import SAMPLERS, as_parameters
from tolerances import SAMPLING, rounding_errors
from toy_models import CONDITIONAL, random_classifier, random_text_encoder, random_text_unet, random_unet, toy_tokenizer

from diffusers_adm import AdaGNClassifierModel, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning import guidance, steering
from diffusers_adm.conditioning.guidance import log_probability_gradient, shift_prediction, signal_and_std


MEANS, STD = (-0.8, 0.1, 0.6), 0.3
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))
LOG_SIGMAS = np.log((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD) / 2


def alpha_at(timestep) -> float:
    """bar alpha, also between two timesteps, where solvers of diffusers read log sigma off a line."""
    return 1 / (1 + np.exp(2 * np.interp(float(timestep), np.arange(1000), LOG_SIGMAS)))


def mixture_logits(sample: torch.Tensor, timestep, means: torch.Tensor) -> torch.Tensor:
    """Of the three equally likely Gaussians, one around each mean, that x_t comes from: `(batch_size, 3)`."""
    alpha = alpha_at(timestep)
    distances = (sample.flatten(1)[:, None] - alpha**0.5 * means[None, :, None]).square().sum(dim=2)
    return -distances / (2 * (alpha * STD**2 + 1 - alpha))


class MixtureUNet(ModelMixin, ConfigMixin):
    """Predicts exactly, for all three Gaussians together or for the one of `component`."""

    @register_to_config
    def __init__(
        self,
        component: int | None = None,
        prediction_type: str = "epsilon",
        sample_size: int = 4,
        in_channels: int = 1,
        out_channels: int = 1,
        block_out_channels: tuple[int, ...] = (1,),
    ):
        super().__init__()
        self.means = torch.nn.Parameter(torch.tensor(MEANS))

    def forward(self, sample, timestep, class_labels=None):
        assert class_labels is None
        alpha = alpha_at(timestep)
        variance = alpha * STD**2 + 1 - alpha
        weights = torch.nn.functional.one_hot(torch.tensor([self.config.component or 0]), 3)
        if self.config.component is None:
            weights = mixture_logits(sample, timestep, self.means).softmax(dim=1)
        means = (weights * self.means).sum(dim=1)[:, None, None, None]
        original = means + alpha**0.5 * STD**2 / variance * (sample - alpha**0.5 * means)
        epsilon = (sample - alpha**0.5 * original) / (1 - alpha) ** 0.5
        prediction = {
            "epsilon": epsilon,
            "sample": original,
            "v_prediction": alpha**0.5 * epsilon - (1 - alpha) ** 0.5 * original,
        }[self.config.prediction_type]
        variance = torch.full_like(prediction, 0.3).repeat(1, self.config.out_channels - 1, 1, 1)
        return UNet2DOutput(sample=torch.cat([prediction, variance], dim=1))


class MixtureClassifier(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, sample_size: int = 4, in_channels: int = 1, num_classes: int = 3):
        super().__init__()
        self.means = torch.nn.Parameter(torch.tensor(MEANS))

    def forward(self, sample, timestep):
        return types.SimpleNamespace(logits=mixture_logits(sample, timestep, self.means))


def make_pipeline(unet=None, classifier=None, scheduler=None, **components) -> ADMPipeline:
    components = {**dict.fromkeys(ADMPipeline._optional_components), "classifier": classifier, **components}
    pipe = ADMPipeline(
        unet=random_unet() if unet is None else unet,
        scheduler=LearnedVarianceDDPMScheduler() if scheduler is None else scheduler,
        **components,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def toy_pipeline(**config) -> ADMPipeline:
    """Five classes; four of them and the null class with `CONDITIONAL`."""
    return make_pipeline(random_unet(**config), random_classifier(num_classes=4 if config else 5))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def count_calls(module: torch.nn.Module) -> list:
    calls = []
    module.register_forward_pre_hook(lambda _, args: calls.append(args))
    return calls


class TestKnownDistributions:
    """With the exact classifier, all Gaussians together are steered to one of them."""

    def compare(self, scheduler, tolerance: float, prediction_type: str = "epsilon", channels: int = 1, **kwargs):
        common = {"prediction_type": prediction_type, "out_channels": channels}
        kwargs = {"num_inference_steps": 8, "batch_size": 3, "output_type": "latent", **kwargs}
        steered, conditional, unsteered = (
            make_pipeline(MixtureUNet(component, **common), classifier, scheduler)(
                generator=[seeded(i) for i in range(3)], **kwargs, **guidance
            ).images
            for component, classifier, guidance in (
                (None, MixtureClassifier(), {"class_labels": [2, 2, 2], "classifier_guidance_scale": 1.0}),
                (2, None, {}),
                (None, None, {}),
            )
        )
        assert (unsteered - conditional).abs().max() > 0.3
        torch.testing.assert_close(steered, conditional, rtol=0, atol=tolerance)

    # Tables of diffusers are float32 and the first step multiplies errors by 157.
    @pytest.mark.parametrize("name, options", as_parameters(SAMPLERS))
    def test_every_scheduler_of_diffusers(self, name, options):
        """The score of all plus the classifier's gradient is the score of one: the same images, from the same noise."""
        config = LearnedVarianceDDPMScheduler(variance_type="fixed_small", clip_sample=False).config
        self.compare(getattr(diffusers, name).from_config(config, timestep_spacing="leading", **options), 2e-3)

    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
    @pytest.mark.parametrize("cls", [DDIMScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler])
    def test_prediction_types(self, cls, prediction_type):
        scheduler = cls(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction_type=prediction_type)
        scheduler.register_to_config(timestep_spacing="leading", clip_sample=False)
        self.compare(scheduler, 2e-3, prediction_type)

    # The solver rounds timesteps that lie between two, and the network sees those.
    @pytest.mark.parametrize(
        "cls, tolerance",
        [(EulerDiscreteScheduler, 2e-3), (HeunDiscreteScheduler, 2e-3), (DPMSolverMultistepScheduler, 0.05)],
    )
    def test_between_timesteps(self, cls, tolerance):
        self.compare(cls.from_config(LearnedVarianceDDPMScheduler().config, use_karras_sigmas=True), tolerance)

    def test_learned_range_of_ddpm(self):
        """The variance channels stay what they were."""
        self.compare(DDPMScheduler(variance_type="learned_range", clip_sample=False), 2e-3, channels=2)

    @pytest.mark.parametrize("eta", [0.0, 0.7])
    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
    def test_our_ddim_steps(self, prediction_type, eta):
        scheduler = LearnedVarianceDDPMScheduler(
            variance_type="fixed_small", prediction_type=prediction_type, clip_sample=False
        )
        self.compare(scheduler, 2e-3, prediction_type, eta=eta)

    def test_our_ancestral_steps(self):
        """No two formulas agree here, but the distributions do: mean and standard deviation of many images."""
        scheduler = LearnedVarianceDDPMScheduler(variance_type="fixed_large", clip_sample=False)
        pipe = make_pipeline(MixtureUNet(), MixtureClassifier(), scheduler)
        arguments = {"num_inference_steps": 100, "batch_size": 64, "output_type": "latent", "generator": seeded()}
        for label in (0, 2):
            images = pipe(class_labels=label, classifier_guidance_scale=1.0, **arguments).images
            # 1024 numbers: a standard error of 0.01, and about as much from 100 steps.
            assert images.mean() == pytest.approx(MEANS[label], abs=0.04)
            assert images.std() == pytest.approx(STD, abs=0.04)

    def test_the_wrong_form_would_show(self, monkeypatch):
        """The score without the factor sqrt(1 - bar alpha)."""
        monkeypatch.setattr(steering, "shift_prediction", lambda prediction, score, *_: prediction - score)
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            self.compare(DDIMScheduler(clip_sample=False), 0.01)


class TestAgainstFormulas:
    """Those of guided-diffusion, in float64, with networks of toy size."""

    def gradient(self, pipe: ADMPipeline, sample: torch.Tensor, t: int, labels: list[int]) -> torch.Tensor:
        with torch.enable_grad():
            sample = sample.clone().requires_grad_()
            log_probabilities = pipe.classifier(sample, t).logits.log_softmax(dim=1)
            chosen = log_probabilities[range(len(labels)), labels].sum()
        return torch.autograd.grad(chosen, sample)[0].double()

    @torch.no_grad()
    def loop(self, pipe: ADMPipeline, labels: list[int], scale: float, guidance_scale: float, eta) -> torch.Tensor:
        """`condition_mean` (ancestral) and `condition_score` (DDIM, eta = 0)."""
        timesteps = [800, 600, 400, 200, 0]
        alphas = [torch.tensor(alpha).double() for alpha in [*ALPHAS_CUMPROD[timesteps], 1.0]]
        generator = seeded()
        sample = torch.randn((2, 3, 8, 8), generator=generator)
        for i, t in enumerate(timesteps):
            output, null = (pipe.unet(sample, t, torch.tensor(chosen)).sample.double() for chosen in (labels, [4, 4]))
            epsilon = null[:, :3] + guidance_scale * (output[:, :3] - null[:, :3])
            score = scale * self.gradient(pipe, sample, t, labels)
            x, alpha, previous = sample.double(), alphas[i], alphas[i + 1]
            original = ((x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()).clamp(-1, 1)
            if eta is None:
                beta = 1 - alpha / previous
                mean = previous.sqrt() * beta * original + (alpha / previous).sqrt() * (1 - previous) * x
                # The posterior variance of the last step is 0; that of the one before it stands in.
                j = min(i, len(timesteps) - 2)
                low = (1 - alphas[j] / alphas[j + 1]) * (1 - alphas[j + 1]) / (1 - alphas[j])
                fraction = (output[:, 3:] + 1) / 2
                variance = (fraction * beta.log() + (1 - fraction) * low.log()).exp()
                noise = torch.randn(sample.shape, generator=generator).double()
                x = mean / (1 - alpha) + variance * score + (t > 0) * variance.sqrt() * noise
            else:
                epsilon = (x - alpha.sqrt() * original) / (1 - alpha).sqrt() - (1 - alpha).sqrt() * score
                original = (x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
                x = previous.sqrt() * original + (1 - previous).sqrt() * epsilon
            sample = x.float()
        return sample

    @pytest.mark.parametrize("eta", [None, 0.0])
    @pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
    def test_alone_and_with_classifier_free_guidance(self, guidance_scale, eta):
        pipe = toy_pipeline(**CONDITIONAL)
        arguments = {"class_labels": [1, 3], "guidance_scale": guidance_scale, "eta": eta, "num_inference_steps": 5}
        actual, unsteered = (
            pipe(classifier_guidance_scale=scale, generator=seeded(), output_type="latent", **arguments).images
            for scale in (1.0, 0.0)
        )
        expected = self.loop(pipe, [1, 3], 1.0, guidance_scale, eta)
        size = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * size)
        assert (unsteered - expected).abs().max() > 0.03 * size

    def test_ddim_of_diffusers_is_ours(self):
        """Without clipping: ours computes the noise from the clipped x_0, adds the score after that, and clips once."""
        pipe = make_pipeline(random_unet(), random_classifier(), LearnedVarianceDDPMScheduler(clip_sample=False))
        arguments = {"class_labels": [1, 3], "classifier_guidance_scale": 0.2, "output_type": "latent"}
        arguments |= {"num_inference_steps": 5, "eta": 0.0}
        ours = pipe(generator=seeded(), **arguments).images
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        theirs = pipe(generator=seeded(), **arguments).images
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * ours.abs().max().item())

    def test_labels_may_only_steer(self):
        """An unconditional U-Net; each image by its own label."""
        pipe = toy_pipeline()
        labels = []
        pipe.unet.register_forward_pre_hook(
            lambda _, args, kwargs: labels.append(kwargs.get("class_labels")), with_kwargs=True
        )
        arguments = {"classifier_guidance_scale": 0.3, "num_inference_steps": 3, "eta": 0.0, "output_type": "latent"}
        both = pipe(class_labels=[1, 4], generator=[seeded(0), seeded(1)], **arguments).images
        assert labels == [None] * 3
        for image, label, seed in zip(both, (1, 4), (0, 1), strict=True):
            single = pipe(class_labels=label, generator=seeded(seed), **arguments).images[0]
            torch.testing.assert_close(image, single, rtol=1e-3, atol=1e-3 * single.abs().max().item())

    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
    def test_shift_prediction(self, prediction_type):
        """All three describe one pair of x_0 and noise."""
        x, score, epsilon = torch.randn(3, 1, 1, 2, 2, dtype=torch.float64)
        signal, std = torch.tensor(0.8).double(), torch.tensor(0.6).double()

        def predictions(noise):
            original = (x - std * noise) / signal
            return {"epsilon": noise, "sample": original, "v_prediction": signal * noise - std * original}

        before, after = predictions(epsilon), predictions(epsilon - std * score)
        actual = shift_prediction(before[prediction_type], score, signal, std, prediction_type)
        torch.testing.assert_close(actual, after[prediction_type])


class TestCost:
    def test_off_costs_nothing(self):
        pipe = toy_pipeline(**CONDITIONAL)
        calls = count_calls(pipe.classifier)
        arguments = {"class_labels": 1, "num_inference_steps": 3, "output_type": "latent"}
        images = pipe(classifier_guidance_scale=0.0, generator=seeded(), **arguments).images
        assert calls == []
        pipe.classifier = None
        assert rounding_errors(pipe(generator=seeded(), **arguments).images, images) <= SAMPLING

    @pytest.mark.parametrize(
        "start, end, guided", [(0.0, 1.0, "yyyyy"), (0.2, 0.8, ".yyy."), (0.0, 0.4, "yy..."), (0.3, 1.0, "..yyy")]
    )
    @pytest.mark.parametrize("cls", [LearnedVarianceDDPMScheduler, EulerDiscreteScheduler])
    def test_interval(self, cls, start, end, guided):
        pipe = toy_pipeline()
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        calls, asked = count_calls(pipe.classifier), count_calls(pipe.unet)
        pipe(
            class_labels=1,
            classifier_guidance_scale=1.0,
            guidance_start=start,
            guidance_end=end,
            num_inference_steps=5,
        )
        assert [t for _, t in calls] == [t for (_, t), mark in zip(asked, guided, strict=True) if mark == "y"]

    @pytest.mark.parametrize("eta", [None, 0.5])
    def test_nothing_in_the_loop_waits_for_the_device(self, eta):
        pipe = toy_pipeline(**CONDITIONAL).to("meta")
        arguments = {"class_labels": [1, 2], "guidance_scale": 2.0, "classifier_guidance_scale": 1.0, "eta": eta}
        images = pipe(num_inference_steps=3, output_type="latent", **arguments).images
        assert images.device.type == "meta"

    @pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
    def test_nor_does_the_noise_level_of_other_schedulers(self, cls):
        scheduler = cls()
        scheduler.set_timesteps(3)
        if cls is not DDIMScheduler:
            scheduler.set_begin_index(0)
        timestep, alphas_cumprod = scheduler.timesteps[0].to("meta"), scheduler.alphas_cumprod.to("meta")
        signal, std = signal_and_std(scheduler, timestep, alphas_cumprod)
        assert signal.shape == std.shape == ()

    def test_no_gradient_is_left(self):
        pipe = toy_pipeline()
        images = pipe(class_labels=1, classifier_guidance_scale=1.0, num_inference_steps=2, output_type="pt").images
        assert not images.requires_grad
        assert all(parameter.grad is None for parameter in pipe.classifier.parameters())


class TestHalfPrecision:
    def relative_errors(self, dtype: torch.dtype, head: float) -> torch.Tensor:
        """Of each example, in the 2-norm, for 32 x 32 samples. `head` scales the gradient."""
        config = {"sample_size": 32, "block_out_channels": (16, 32)}
        wide, half = (random_classifier(**config) for _ in range(2))
        for classifier in (wide, half):
            classifier.head.to_out.weight.data *= head
        sample, labels = torch.randn(4, 3, 32, 32, generator=seeded()), torch.arange(4)
        expected = log_probability_gradient(wide, sample, torch.tensor(300), labels)
        actual = log_probability_gradient(half.to(dtype), sample, torch.tensor(300), labels)
        assert actual.dtype == torch.float32
        return (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)

    # About ten roundings (2**-8, 2**-11) on the way there and back; measured: 0.02 and 0.003.
    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.015)])
    @pytest.mark.parametrize("head", [1.0, 0.01])
    def test_gradients(self, dtype, tolerance, head):
        assert self.relative_errors(dtype, head).max() < tolerance

    def test_what_the_scale_prevents(self, monkeypatch):
        """Small gradients vanish in float16."""
        monkeypatch.setattr(guidance, "GRADIENT_SCALE", 1.0)
        assert self.relative_errors(torch.float16, 0.01).max() > 0.05

    def test_pipeline(self, tmp_path):
        pipe = toy_pipeline(**CONDITIONAL)
        pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
        loaded.set_progress_bar_config(disable=True)
        arguments = {"class_labels": [1, 2], "num_inference_steps": 3, "output_type": "latent"}
        scales = {"classifier_guidance_scale": 30.0}
        steered, expected = (p(generator=seeded(), **scales, **arguments).images for p in (loaded, pipe))
        unsteered, plain = (p(generator=seeded(), **arguments).images for p in (loaded, pipe))
        # What steering adds is seen through the roundings of the network (2**-8).
        effect = expected - plain
        assert (steered - unsteered - effect).norm() < 0.3 * effect.norm()


class TestSaveAndLoad:
    @pytest.mark.parametrize("cls", [ADMPipeline, DiffusionPipeline])
    def test_round_trip(self, tmp_path, cls):
        pipe = toy_pipeline(**CONDITIONAL)
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["classifier"] == ["diffusers_adm", "AdaGNClassifierModel"]
        loaded = cls.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.classifier) is AdaGNClassifierModel
        arguments = {"class_labels": [1, 2], "classifier_guidance_scale": 0.5, "num_inference_steps": 3}
        actual, expected = (p(generator=seeded(), output_type="pt", **arguments).images for p in (loaded, pipe))
        assert rounding_errors(actual, expected) <= SAMPLING

    def test_from_pipe(self):
        pipe = toy_pipeline(**CONDITIONAL)
        assert ADMPipeline.from_pipe(pipe).classifier is pipe.classifier


class TestBadInput:
    @pytest.mark.parametrize(
        "unet, classifier, message",
        [
            ({}, {"sample_size": 16}, "`sample_size=16`, but `unet` has `sample_size=8`"),
            (CONDITIONAL, {"num_classes": 5}, "`num_classes=5`, but `unet` has 4 classes"),
            ({"num_class_embeds": 5}, {"num_classes": 4}, "`num_classes=4`, but `unet` has 5 classes"),
            (
                {"num_class_embeds": 5, "null_class_id": 0},
                {"num_classes": 4},
                "`null_class_id=0`, but with a `classifier` it must be the last one, 4",
            ),
        ],
    )
    def test_components(self, unet, classifier, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_pipeline(random_unet(**unet), random_classifier(**classifier))

    @pytest.mark.parametrize(
        "config, kwargs, message",
        [
            (CONDITIONAL, {"class_labels": None}, "there are no `class_labels` to guide towards"),
            (CONDITIONAL, {"class_labels": 4}, "hold 4, and the classifier has the classes 0 to 3"),
            ({}, {"class_labels": 5}, "range from 5 to 5; this model has the classes 0 to 4"),
            (
                {},
                {"class_labels": 1, "width": 16},
                "trained on samples of 8 x 8, and `height` and `width` ask for 8 x 16",
            ),
            ({"class_embed_type": "timestep"}, {"class_labels": 1}, "are not class numbers"),
        ],
        ids=str,
    )
    def test_arguments(self, config, kwargs, message):
        pipe = toy_pipeline(**config)
        calls = count_calls(pipe.unet)
        with pytest.raises(ValueError, match=re.escape(message)):
            pipe(classifier_guidance_scale=1.0, **kwargs)
        assert calls == []

    @pytest.mark.parametrize(
        "cls, eta", [(LearnedVarianceDDPMScheduler, 0.0), (DDIMScheduler, None), (LearnedVarianceDDPMScheduler, None)]
    )
    def test_zero_terminal_snr(self, cls, eta):
        """Only the mean can be shifted there."""
        pipe = toy_pipeline()
        pipe.scheduler = cls.from_config(
            pipe.scheduler.config,
            rescale_betas_zero_snr=True,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
        )
        arguments = {"class_labels": 1, "classifier_guidance_scale": 1.0, "num_inference_steps": 3, "eta": eta}
        if cls is LearnedVarianceDDPMScheduler and eta is None:
            assert torch.isfinite(pipe(output_type="pt", **arguments).images).all()
        else:
            with pytest.raises(ValueError, match="a changed score gives no x_0"):
                pipe(**arguments)


def test_with_prompts():
    """Text, classes and classifier together: each of them changes the image."""
    pipe = make_pipeline(
        random_text_unet(**CONDITIONAL),
        random_classifier(num_classes=4),
        text_encoder=random_text_encoder(),
        tokenizer=toy_tokenizer(),
    )
    arguments = {"prompt": "a cat", "class_labels": 1, "guidance_scale": 2.0, "classifier_guidance_scale": 0.5}
    changes = [{}, {"prompt": "a dog"}, {"class_labels": 2}, {"classifier_guidance_scale": 0.0}]
    images = [
        pipe(**{**arguments, **change}, num_inference_steps=3, generator=seeded(), output_type="pt").images
        for change in changes
    ]
    for other in images[1:]:
        assert (other - images[0]).abs().max() > 0.01


def test_an_unconditional_unet_of_diffusers_with_a_classifier():
    unet = random_unet()
    theirs = UNet2DModel.from_config(unet.config).eval()
    theirs.load_state_dict(unet.state_dict())
    arguments = {"class_labels": 1, "classifier_guidance_scale": 0.3, "num_inference_steps": 3, "eta": 0.0}
    actual, expected = (
        make_pipeline(u, random_classifier())(generator=seeded(), output_type="latent", **arguments).images
        for u in (theirs, unet)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


class TestNoiseSchedule:
    """The classifier's, against that of the scheduler. (`tests/test_noise_schedules.py`: which ones are the same.)"""

    COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    GUIDED = {"class_labels": 1, "classifier_guidance_scale": 1.0, "num_inference_steps": 4, "output_type": "latent"}
    LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    REFUSED = "`classifier` was trained on the noise schedule squaredcos_cap_v2 with 1000 timesteps, but `scheduler`"

    def pipeline(self, noise_schedule, **scheduler) -> ADMPipeline:
        scheduler = LearnedVarianceDDPMScheduler(**{"beta_schedule": "cosine", **scheduler})
        return make_pipeline(classifier=random_classifier(noise_schedule=noise_schedule), scheduler=scheduler)

    @pytest.mark.parametrize("name, options", as_parameters(SAMPLERS))
    def test_with_each_scheduler_of_diffusers(self, name, options):
        pipe = self.pipeline(self.LINEAR, beta_schedule="linear")
        own, cls = pipe.scheduler.config, getattr(diffusers, name)
        pipe.scheduler = cls.from_config(own, **options)
        assert torch.isfinite(pipe(**self.GUIDED).images).all()
        pipe.scheduler = cls.from_config(own, **options, beta_schedule="squaredcos_cap_v2")
        message = f"linear from 0.0001 to 0.02 with 1000 timesteps, but `scheduler`, a {name}, has .* squaredcos_cap_v2"
        with pytest.raises(ValueError, match=message):
            pipe(**self.GUIDED)

    def test_respacing_and_other_names_do_not_matter(self):
        pipe = self.pipeline(self.COSINE, timestep_spacing="trailing")
        pipe(**{**self.GUIDED, "num_inference_steps": 50, "timestep_respacing": "4"})
        pipe.scheduler = LearnedVarianceDDPMScheduler(trained_betas=pipe.scheduler.betas.tolist())
        pipe(**self.GUIDED)

    def test_refused_before_any_work_and_only_where_it_steers(self):
        with pytest.raises(ValueError, match=f"{self.REFUSED}, a LearnedVarianceDDPMScheduler, has .* linear"):
            self.pipeline(self.COSINE, beta_schedule="linear")
        pipe = self.pipeline(self.COSINE)
        calls = count_calls(pipe.unet)
        pipe.scheduler = LearnedVarianceDDPMScheduler()
        with pytest.raises(ValueError, match=self.REFUSED):
            pipe(**self.GUIDED)
        assert calls == []
        pipe(**{**self.GUIDED, "classifier_guidance_scale": 0.0, "class_labels": None})
        pipe.scheduler = LearnedVarianceDDPMScheduler(beta_schedule="cosine")
        pipe.classifier = random_classifier(noise_schedule=self.COSINE | {"num_train_timesteps": 999})
        with pytest.raises(ValueError, match="squaredcos_cap_v2 with 999 timesteps, but .* with 1000 timesteps"):
            pipe(**self.GUIDED)

    @pytest.mark.parametrize("cls", [ADMPipeline, DiffusionPipeline])
    def test_saved_and_loaded(self, tmp_path, cls):
        self.pipeline(self.COSINE).save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        assert loaded.classifier.config.noise_schedule == self.COSINE
        with pytest.raises(ValueError, match=self.REFUSED):
            cls.from_pretrained(tmp_path, scheduler=DDIMScheduler())

    def test_of_clean_images(self):
        with pytest.raises(ValueError, match="`classifier` was trained on clean images"):
            self.pipeline({})

    @pytest.mark.parametrize("is_foreign", [False, True])
    def test_a_classifier_that_does_not_say_it(self, caplog, is_foreign):
        scheduler = LearnedVarianceDDPMScheduler(variance_type="fixed_small")
        pipe = make_pipeline(MixtureUNet(), MixtureClassifier(), scheduler) if is_foreign else self.pipeline(None)
        for _ in range(2):
            pipe(**self.GUIDED)
            pipe = ADMPipeline(**pipe.components)
            pipe.set_progress_bar_config(disable=True)
        assert caplog.text.count("`classifier` does not say which noise schedule it was trained on") == 1
