"""ADMImageToImagePipeline: what the network sees, and samples, against loops and formulas written by hand."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers_samplers import SAMPLERS, as_parameters
from docstrings import check_documented_arguments
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

from diffusers_adm import (
    AdaGNControlNetModel,
    ADMImageToImagePipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.conditioning.low_resolution import LowResolutionCondition
from diffusers_adm.conditioning.source_image import (
    ConcatenatedImageCondition,
    SourceImageCondition,
    mean_channels_of,
)


T = 50
CHANNELS = {"in_channels": 4, "out_channels": 6}  # a grey source, RGB results
NO_OTHERS = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None}
ARGUMENTS = {"num_inference_steps": 3, "eta": 0.0, "output_type": "latent"}


def make_translator(unet=None, scheduler=None, **config) -> ADMImageToImagePipeline:
    pipe = ADMImageToImagePipeline(
        unet=random_unet(**CHANNELS) if unet is None else unet,
        scheduler=LearnedVarianceDDPMScheduler(num_train_timesteps=T) if scheduler is None else scheduler,
        **{**NO_OTHERS, **config},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    """By class, with sources that were dropped in training."""
    unet = random_unet(**CHANNELS, **CONDITIONAL)
    return make_translator(unet, source_dropout_prob=0.1, id2label=dict(enumerate("abcd")))


@pytest.fixture
def source():
    """Two grey images, 8-bit values, in [0, 1]."""
    return torch.randint(0, 256, (2, 1, 8, 8), generator=seeded(3)).float() / 255


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def record(module: torch.nn.Module) -> list[tuple]:
    """What a network is called with from now on: `(sample, timestep, keyword arguments)`."""
    calls = []
    module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((*args, kwargs)), with_kwargs=True)
    return calls


class TestWhatTheNetworkSees:
    @pytest.mark.parametrize("size", [(8, 8), (16, 32), (4, 12)])
    @pytest.mark.parametrize(("target", "channels"), [(1, 4), (3, 1), (3, 3), (2, 5)])
    def test_the_sample_and_after_it_the_source(self, target, channels, size):
        """The size is that of the source, whatever that of the training."""
        pipe = make_translator(random_unet(in_channels=target + channels, out_channels=2 * target))
        calls = record(pipe.unet)
        source, latents = torch.rand(1, channels, *size, generator=seeded(1)), torch.randn(1, target, *size)
        result = pipe(source, latents=latents, **ARGUMENTS).images
        assert result.shape == latents.shape
        assert len(calls) == 3
        assert torch.equal(calls[0][0][:, :target], latents)
        for sample, *_ in calls:
            torch.testing.assert_close(sample[:, target:], 2 * source - 1, rtol=0, atol=1e-6)

    def test_the_source_is_dropped_in_the_unconditional_pass(self, pipe, source):
        calls = record(pipe.unet)
        pipe(source, class_labels=1, guidance_scale=2.0, **ARGUMENTS)
        for sample, _, kwargs in calls:
            uncond, cond = sample[:, 3:].chunk(2)
            assert not uncond.any()
            torch.testing.assert_close(cond, 2 * source - 1, rtol=0, atol=1e-6)
            assert kwargs["class_labels"].tolist() == [4, 4, 1, 1]

    @pytest.mark.parametrize("known", [0.0, None])
    def test_it_is_in_both_passes_if_it_was_never_dropped(self, known, source):
        pipe = make_translator(random_unet(**CHANNELS, **CONDITIONAL), source_dropout_prob=known)
        calls = record(pipe.unet)
        pipe(source, class_labels=1, guidance_scale=2.0, **ARGUMENTS)
        for sample, *_ in calls:
            assert torch.equal(*sample[:, 3:].chunk(2))


class TestSampling:
    @torch.no_grad()
    @pytest.mark.parametrize("height_width", [(8, 8), (16, 32)])
    def test_ddim_by_hand(self, height_width):
        """All of it in float64: guidance towards class and source, DDIM with clipping."""
        pipe = make_translator(random_unet(**CHANNELS, **CONDITIONAL), source_dropout_prob=0.5)
        labels, scale = torch.tensor([1, 3]), 2.5
        source = torch.rand(2, 1, *height_width, generator=seeded(4))
        latents = torch.randn(2, 3, *height_width, generator=seeded(1))
        result = pipe(
            source,
            class_labels=labels,
            guidance_scale=scale,
            latents=latents,
            timestep_respacing="ddim5",
            eta=0.0,
            output_type="latent",
        ).images
        alphas = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, T))])
        network = random_unet(**CHANNELS, **CONDITIONAL).double()
        beside = 2 * source.double() - 1
        x = latents.double()
        for t in (40, 30, 20, 10, 0):
            uncond, cond = (
                network(torch.cat([x, given], dim=1), t, class_labels=classes).sample[:, :3]
                for classes, given in ((torch.full((2,), 4), torch.zeros_like(beside)), (labels, beside))
            )
            epsilon = uncond + scale * (cond - uncond)
            alpha, alpha_prev = alphas[t + 1], alphas[max(t - 9, 0)]
            x_0 = ((x - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)).clamp(-1, 1)
            epsilon = (x - math.sqrt(alpha) * x_0) / math.sqrt(1 - alpha)
            x = math.sqrt(alpha_prev) * x_0 + math.sqrt(1 - alpha_prev) * epsilon
        assert (result.double() - x).abs().max() < 1e-4

    @pytest.mark.parametrize(("name", "options"), as_parameters(SAMPLERS))
    @pytest.mark.parametrize("target", [1, 5])
    def test_every_scheduler(self, name, options, target, source):
        """With fewer and more channels than colours."""
        own = LearnedVarianceDDPMScheduler(num_train_timesteps=T).config
        scheduler = getattr(diffusers, name).from_config(own, **options)
        unet = random_unet(in_channels=target + 1, out_channels=2 * target)
        image_format = ImageFormat.of_channels(1).to_config()
        pipe = make_translator(unet, scheduler, source_format=image_format, source_dropout_prob=0.1)
        calls = record(unet)
        images = pipe(source, num_inference_steps=4, guidance_scale=1.5, generator=seeded(), output_type="pt").images
        assert images.shape == (2, target, 8, 8)
        assert images.isfinite().all()
        assert all(torch.equal(sample[2:, target:], 2 * source - 1) for sample, *_ in calls)

    @torch.no_grad()
    @pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DPMSolverMultistepScheduler])
    def test_a_swapped_scheduler_by_hand(self, scheduler_class, source):
        unet = random_unet(**CHANNELS)
        scheduler = scheduler_class.from_config(LearnedVarianceDDPMScheduler(num_train_timesteps=T).config)
        pipe = make_translator(unet, scheduler)
        latents = torch.randn(2, 3, 8, 8, generator=seeded())
        result = pipe(source, latents=latents, num_inference_steps=4, output_type="latent").images
        options = {"variance_type": None} if scheduler_class is DPMSolverMultistepScheduler else {}
        scheduler = scheduler_class.from_config(scheduler.config, **options)
        scheduler.set_timesteps(4)
        x = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            seen = torch.cat([scheduler.scale_model_input(x, t), 2 * source - 1], dim=1)
            x = scheduler.step(unet(seen, t).sample[:, :3], t, x).prev_sample
        assert (result - x).abs().max() < 1e-4

    def test_guidance_moves_along_the_difference(self, source):
        """At a scale of 0 the sample is that of a dropped source."""
        pipe = make_translator(source_dropout_prob=0.1)
        latents = torch.randn(2, 3, 8, 8, generator=seeded())
        unguided = pipe(source, latents=latents, guidance_scale=0.0, **ARGUMENTS).images
        grey = torch.full_like(source, 0.5)
        assert (unguided - pipe(grey, latents=latents, **ARGUMENTS).images).abs().max() < 1e-4
        assert (unguided - pipe(source, latents=latents, **ARGUMENTS).images).abs().max() > 1e-2

    def test_prompts(self, source):
        unet = random_text_unet("added_kv", **CHANNELS)
        encoder = {"text_encoder": random_text_encoder("clip"), "tokenizer": toy_tokenizer("clip")}
        pipe = make_translator(unet, source_dropout_prob=0.1, **encoder)
        latents = torch.randn(2, 3, 8, 8, generator=seeded())
        both = pipe(source, prompt=["a cat", "the red dog"], guidance_scale=3.0, latents=latents, **ARGUMENTS).images
        for index, prompt in enumerate(["a cat", "the red dog"]):
            own = latents[index : index + 1]
            alone = pipe(source[index], prompt=prompt, guidance_scale=3.0, latents=own, **ARGUMENTS).images
            assert (alone[0] - both[index]).abs().max() < 1e-4

    def test_a_classifier_steers(self, source):
        pipe = make_translator(classifier=random_classifier(num_classes=5))
        arguments = {"latents": torch.zeros(2, 3, 8, 8), "class_labels": 1, **ARGUMENTS}
        plain = pipe(source, **arguments).images
        steered = pipe(source, classifier_guidance_scale=20.0, **arguments).images
        assert (plain - steered).abs().max() > 1e-3

    def test_a_controlnet(self, source):
        unet = random_unet(**CHANNELS)
        controlnet = fill_randomly(AdaGNControlNetModel.from_unet(unet))
        pipe = make_translator(unet, controlnet=controlnet)
        latents = torch.randn(2, 3, 8, 8, generator=seeded())
        control = torch.rand(2, 3, 8, 8, generator=seeded(2))
        calls = record(controlnet)
        plain = pipe(source, latents=latents, **ARGUMENTS).images
        assert calls == []
        steered = pipe(source, latents=latents, control_image=control, **ARGUMENTS).images
        assert len(calls) == 3
        assert torch.equal(calls[0][0][:, 3:], 2 * source - 1)
        assert (plain - steered).abs().max() > 1e-3

    def test_lora(self, source, tmp_path):
        from peft import LoraConfig

        pipe = make_translator()
        latents = torch.randn(2, 3, 8, 8, generator=seeded())
        plain = pipe(source, latents=latents, **ARGUMENTS).images
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        adapted = pipe(source, latents=latents, **ARGUMENTS).images
        assert (plain - adapted).abs().max() > 1e-4
        pipe.unet.disable_adapters()
        assert rounding_errors(pipe(source, latents=latents, **ARGUMENTS).images, plain) <= SAMPLING


class TestImages:
    def test_every_kind_of_input(self, pipe, source):
        arrays = source.permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray((array[..., 0] * 255).round().astype("uint8")) for array in arrays]
        expected = pipe(source, generator=seeded(), **ARGUMENTS).images
        for image in (pictures, arrays, list(arrays), list(source), source.double()):
            assert rounding_errors(pipe(image, generator=seeded(), **ARGUMENTS).images, expected) <= SAMPLING

    def test_pictures_come_out(self, pipe, source):
        images = pipe(source, num_inference_steps=2, generator=seeded()).images
        assert [(image.mode, image.size) for image in images] == [("RGB", (8, 8))] * 2

    def test_how_many_come_out(self, pipe, source):
        generators = [seeded(seed) for seed in range(4)]
        images = pipe(source, num_images_per_prompt=2, generator=generators, **ARGUMENTS).images
        assert images.shape == (4, 3, 8, 8)
        for index, image in enumerate((0, 0, 1, 1)):
            alone = pipe(source[image], generator=seeded(index), **ARGUMENTS).images
            assert (alone[0] - images[index]).abs().max() < 1e-4
        assert len(pipe(source[0], class_labels=["a", "b", "c"], **ARGUMENTS).images) == 3


class TestChannels:
    @pytest.mark.parametrize(
        ("channels", "variance_type", "expected"),
        [
            ((5, 2), "learned_range", 1),
            ((5, 2), "fixed_large", 2),
            ((6, 6), "learned_range", 3),
            ((6, 6), "learned_log", 3),
            ((4, 3), "fixed_small", 3),
            ((4, 3), None, 3),  # 3 is no even number
            ((6, 6), None, 3),  # with 6, nothing would be left
        ],
    )
    def test_are_those_of_the_mean(self, channels, variance_type, expected):
        unet = dict(zip(("in_channels", "out_channels"), channels, strict=True))
        scheduler = {} if variance_type is None else {"variance_type": variance_type}
        assert mean_channels_of(unet, scheduler) == expected

    def test_are_asked_for_if_nothing_tells(self):
        unet = {"in_channels": 5, "out_channels": 2}
        with pytest.raises(ValueError, match="has no `variance_type`, so a sample can have 2 or 1 channels"):
            mean_channels_of(unet, {})
        assert mean_channels_of(unet, {}, source_channels=4) == 1
        assert mean_channels_of(unet, {}, source_channels=3) == 2

    def test_of_the_source_must_be_those_that_are_left(self):
        message = "`source_format` has 2 channels, which leaves 3 for a sample"
        with pytest.raises(ValueError, match=message):
            mean_channels_of({"in_channels": 5, "out_channels": 2}, {}, source_channels=2)
        source_format = ImageFormat("array", 2, (0, 1), None).to_config()
        with pytest.raises(ValueError, match="`source_format` has 2 channels, which leaves 2"):
            make_translator(source_format=source_format)

    @pytest.mark.parametrize("source_format", [{"mode": "L"}, "L"])
    def test_no_format(self, source_format):
        with pytest.raises(ValueError, match="`source_format` is .*; it must be a dict with the entries mode, "):
            make_translator(source_format=source_format)

    @pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
    def test_leave_some_for_the_source(self, variance_type):
        unet = random_unet(in_channels=3, out_channels=6 if variance_type == "learned_range" else 3)
        scheduler = LearnedVarianceDDPMScheduler(variance_type=variance_type)
        with pytest.raises(ValueError, match="its input has no channels for a source image.*`ADMPipeline`"):
            make_translator(unet, scheduler)

    def test_that_other_pipelines_do_not_take(self):
        unet = random_unet(**CHANNELS)
        with pytest.raises(ValueError, match="those of an image to start from, load it with `ADMImageToImagePipeline`"):
            ADMPipeline(unet, LearnedVarianceDDPMScheduler(), **NO_OTHERS)


class TestBadInput:
    @pytest.fixture(autouse=True)
    def no_work(self, pipe, monkeypatch):
        def fail(*args, **kwargs):
            raise AssertionError("the network ran")

        monkeypatch.setattr(pipe.unet, "forward", fail)

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (torch.rand(1, 1, 9, 8), "`height` and `width` are 9 and 8; both must be positive and divisible by 2"),
            (torch.rand(1, 3, 8, 8), r"\(1, 3, 8, 8\).* with 1 channels"),
            (2 * torch.rand(1, 1, 8, 8) - 1, r"they must lie in \[0, 1\]"),
            (torch.full((1, 1, 8, 8), math.nan), "`image`"),
            ([], "`image`"),
            ([torch.rand(1, 8, 8), torch.rand(1, 8, 4)], "several sizes"),
            ("image.png", "`image` is a str"),
            (Image.new("RGB", (8, 8)), "`image` has mode RGB"),
        ],
    )
    def test_images(self, pipe, image, message):
        with pytest.raises(ValueError, match=message):
            pipe(image)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"class_labels": [0, 1, 2]}, "`class_labels` holds 3, `image` holds 2"),
            ({"latents": torch.randn(2, 3, 4, 4)}, "`latents` has shape"),
            ({"control_image": torch.rand(1, 3, 8, 8)}, "this pipeline has no `controlnet`"),
            ({"guidance_scale": math.nan}, "`guidance_scale` is nan"),
        ],
    )
    def test_calls(self, pipe, source, arguments, message):
        with pytest.raises(ValueError, match=message):
            pipe(source, **arguments)

    @pytest.mark.parametrize(
        ("known", "message"),
        [(0.0, "never dropped in training.*`--source_dropout_prob 0.1`"), (None, "it is not known whether")],
    )
    def test_guidance_without_dropout(self, known, message, source):
        pipe = make_translator(source_dropout_prob=known)
        with pytest.raises(ValueError, match=f"`guidance_scale` is 3.0, but there is nothing to guide.*{message}"):
            pipe(source, guidance_scale=3.0)
        assert pipe(source, **ARGUMENTS).images.shape == (2, 3, 8, 8)

    def test_an_autoencoder(self):
        with pytest.raises(ValueError, match="`vae` was given, but ADMImageToImagePipeline concatenates images in pix"):
            make_translator(vae=torch.nn.Module())


@pytest.mark.parametrize("load", [ADMImageToImagePipeline.from_pretrained, DiffusionPipeline.from_pretrained])
def test_saved_and_loaded(load, source, tmp_path):
    source_format = ImageFormat.of_channels(1)
    pipe = make_translator(source_format=source_format.to_config(), source_dropout_prob=0.25)
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is ADMImageToImagePipeline
    assert loaded.source_format == source_format
    assert loaded.config.source_dropout_prob == 0.25
    latents = torch.randn(2, 3, 8, 8, generator=seeded())
    images = [p(source, latents=latents, guidance_scale=2.0, **ARGUMENTS).images for p in (pipe, loaded)]
    assert rounding_errors(*images) <= SAMPLING


def test_super_resolution_is_a_special_case():
    """A U-Net that upsamples gives the same numbers with the upsampled image as the source."""
    unet = random_unet(in_channels=6, out_channels=6)
    scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps=T)
    small = torch.rand(2, 3, 4, 4, generator=seeded(5))
    upsampled = torch.nn.functional.interpolate(small, (8, 8), mode="bilinear", align_corners=False)
    latents = torch.randn(2, 3, 8, 8, generator=seeded())
    upsampler = ADMSuperResolutionPipeline(unet, scheduler, **NO_OTHERS)
    upsampler.set_progress_bar_config(disable=True)
    expected = upsampler(small, latents=latents, **ARGUMENTS).images
    result = make_translator(unet, scheduler)(upsampled, latents=latents, **ARGUMENTS).images
    assert rounding_errors(result, expected) <= SAMPLING
    assert issubclass(LowResolutionCondition, ConcatenatedImageCondition)


class TestTraining:
    def test_sources_are_dropped_at_their_share(self):
        conditions = torch.rand(4000, 2, 1, 2) + 0.001
        condition = SourceImageCondition(dropout_prob=0.25)
        channels = condition.for_training({"conditions": conditions}).extra_channels
        dropped = (channels == 0).flatten(1).all(dim=1)
        # Four standard deviations of a binomial distribution.
        assert abs(dropped.float().mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
        assert torch.equal(channels[~dropped], 2 * conditions[~dropped] - 1)

    @pytest.mark.parametrize("dropout_prob", [0.0, None])
    def test_none_are_dropped(self, dropout_prob):
        conditions = torch.rand(64, 3, 2, 2)
        condition = SourceImageCondition(dropout_prob=dropout_prob)
        assert torch.equal(condition.for_training({"conditions": conditions}).extra_channels, 2 * conditions - 1)


@pytest.mark.parametrize(
    ("docstring", "function"),
    [
        (ADMImageToImagePipeline.__doc__, ADMImageToImagePipeline.__init__),
        (ADMImageToImagePipeline.__call__.__doc__, ADMImageToImagePipeline.__call__),
    ],
)
def test_docstring_documents_the_arguments(docstring, function):
    check_documented_arguments(docstring, function)
