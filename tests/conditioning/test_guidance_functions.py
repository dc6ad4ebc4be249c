"""Functions that guide sampling: their contract, their values, and the x_0 that they see."""

import re

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers_samplers import SAMPLERS, as_parameters
from tolerances import NETWORK, ONE_LAYER, rounding_errors
from toy_models import TOY_AUTOENCODER_CONFIG, fill_randomly, toy_tokenizer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.clip_guidance import CLIP_MEAN, CLIP_STD, CLIPGuidance
from diffusers_adm.conditioning.condition import SamplingCall
from diffusers_adm.conditioning.guidance import ClassifierGuidance, signal_and_std
from diffusers_adm.conditioning.guidance_functions import GuidanceFunction, as_guidance_functions
from diffusers_adm.conditioning.image_guidance import ColorGuidance, MeasurementGuidance, RegionGuidance
from diffusers_adm.conditioning.measurements import DownsamplingOperator, MaskOperator
from diffusers_adm.conditioning.steering import UnitGradients, predicted_original_sample


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call_of(number: int = 2, channels: int = 3, size: int = 8, num_prompts: int | None = None) -> SamplingCall:
    noise = torch.zeros(number, channels, size, size)
    scheduler = LearnedVarianceDDPMScheduler()
    return SamplingCall(num_prompts or number, (size, size), scheduler, None, noise, torch.float32, 1.0)


def guide(x_t, t, pred_original_sample, **conditions):
    return pred_original_sample.sum()


class TestContract:
    def test_says_what_it_returns(self):
        function = GuidanceFunction(guide, kind="shift", through_unet=True)
        assert (function.kind, function.through_unet, function.name) == ("shift", True, "guide")
        x = torch.randn(1, 3, 4, 4)
        torch.testing.assert_close(function(x, torch.tensor(3), x, class_labels=None), x.sum())
        assert as_guidance_functions(function) == as_guidance_functions([function]) == [function]
        assert as_guidance_functions(None) == []
        assert ClassifierGuidance(None, 1.0).kind == "score"
        assert not ClassifierGuidance(None, 1.0).through_unet

    def test_an_object_of_the_users_own(self):
        class Own:
            kind = "score"

            def __call__(self, x_t, t, pred_original_sample, **conditions):
                return x_t

        own, x_t = Own(), torch.randn(1, 3, 4, 4)
        (function,) = as_guidance_functions(own)
        assert (function.kind, function.through_unet, function.name) == ("score", False, "Own")
        assert function(x_t, torch.tensor(3), x_t) is x_t

    @pytest.mark.parametrize(
        "make, message",
        [
            (
                lambda: GuidanceFunction(guide, "gradient"),
                "`kind` of guide is 'gradient'; it must be one of ['score', ",
            ),
            (lambda: GuidanceFunction(guide, "score", 1), "`through_unet` of guide is 1; pass True or False"),
            (lambda: GuidanceFunction(3, "score"), "`function` is 3; pass a function that takes"),
            (
                lambda: GuidanceFunction(lambda x_t, t, x_0: x_t, "score"),
                "takes `(x_t, t, x_0)`; a function that guides must take `(x_t, t, pred_original_sample, **cond",
            ),
            (
                lambda: GuidanceFunction(lambda x, t, **conditions: x, "score"),
                "takes `(x, t, **conditions)`; a function",
            ),
            (lambda: as_guidance_functions(guide), "guide, which does not say what it returns. Wrap it: `GuidanceFunc"),
            (lambda: as_guidance_functions([None]), "`guidance_fn` is or holds None; pass a function"),
        ],
    )
    def test_refused(self, make, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()


class TestUnitGradients:
    def gradients(self, network, scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """With `UnitGradients` in `dtype`, and in float64."""
        x = torch.randn(4, 16, generator=seeded(), requires_grad=True)
        unit = UnitGradients()
        outputs = unit.leave(network.to(dtype)(unit.enter(x).to(dtype)).float())
        (actual,) = torch.autograd.grad(scale * outputs.square().sum(), x)
        wide = x.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(scale * network.double()(wide).square().sum(), wide)
        return actual, expected.float()

    @pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
    def test_any_size_in_half_precision(self, scale):
        network = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16))
        actual, expected = self.gradients(network, scale, torch.float16)
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 0.01 * expected.norm()  # some roundings of 2**-11

    def test_no_digit_changes(self):
        network = torch.nn.Linear(16, 16)
        x = torch.randn(4, 16, generator=seeded(), requires_grad=True)
        unit = UnitGradients()
        (actual,) = torch.autograd.grad(unit.leave(network(unit.enter(x))).pow(3).sum(), x)
        (expected,) = torch.autograd.grad(network(x).pow(3).sum(), x)
        assert rounding_errors(actual, expected) <= ONE_LAYER

    def test_twice_through_one_graph_and_zero(self):
        network = torch.nn.Linear(16, 16)
        x = torch.randn(4, 16, generator=seeded(), requires_grad=True)
        unit = UnitGradients()
        outputs = unit.leave(network(unit.enter(x)))
        first = torch.autograd.grad(100 * outputs.sum(), x, retain_graph=True)[0]
        second = torch.autograd.grad(outputs.sum(), x, retain_graph=True)[0]
        assert rounding_errors(first, 100 * second) <= ONE_LAYER
        assert not torch.autograd.grad(0 * outputs.sum(), x, retain_graph=True)[0].any()
        # The gradient with respect to the result itself is not scaled.
        assert torch.equal(torch.autograd.grad(3 * outputs.sum(), outputs)[0], torch.full_like(outputs, 3))


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name, options", as_parameters([("LearnedVarianceDDPMScheduler", {}), *SAMPLERS]))
def test_the_predicted_x_0_is_that_of_the_scheduler(name, options, prediction_type, clips):
    """As far as its step tells it."""
    cls = getattr(diffusers, name, LearnedVarianceDDPMScheduler)
    config = {"variance_type": "fixed_small", "clip_sample": clips, "prediction_type": prediction_type}
    scheduler = cls.from_config(LearnedVarianceDDPMScheduler(**config).config, **options)
    scheduler.set_timesteps(10)
    sample, prediction = torch.randn(2, 1, 3, 4, 4, generator=seeded())
    for t in scheduler.timesteps[:1]:
        sample = sample * scheduler.init_noise_sigma
        x_t = scheduler.scale_model_input(sample, t)
        at = signal_and_std(scheduler, t, scheduler.alphas_cumprod)
        actual = predicted_original_sample(scheduler, prediction, x_t, t, *at)
        result = scheduler.step(prediction, t, sample)
        expected = getattr(result, "pred_original_sample", None)
        if expected is None:  # others give x_0 only as an entry of their history
            expected = next(
                (x for x in reversed(getattr(scheduler, "model_outputs", None) or []) if x is not None), None
            )
        if expected is None or options.get("algorithm_type") == "dpmsolver" or name == "DEISMultistepScheduler":
            alpha = scheduler.alphas_cumprod[int(t)]
            signal, std = alpha**0.5, (1 - alpha) ** 0.5
            expected = (
                signal * x_t - std * prediction
                if prediction_type == "v_prediction"
                else (x_t - std * prediction) / signal
            )
        if name == "TCDScheduler" and clips:  # whose steps ignore this entry of its config
            expected = expected.clamp(-1, 1)
        # Both are of float32 tables; epsilon is divided by a signal of down to 0.006.
        torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-3, atol=2e-3)


class TestImages:
    X = torch.rand(2, 3, 8, 8, generator=seeded(1)) * 2 - 1

    def test_region(self):
        target, mask = torch.rand(3, 8, 8, generator=seeded(2)), torch.zeros(8, 8)
        mask[:4] = 1
        guidance = RegionGuidance(target, mask, scale=5.0).for_call(call_of(), {})
        x = self.X.clone().requires_grad_()
        values = guidance(x, None, x)
        torch.testing.assert_close(values, -2.5 * (x - (2 * target - 1))[:, :, :4].square().sum(dim=(1, 2, 3)))
        (gradient,) = torch.autograd.grad(values.sum(), x)
        expected = torch.where(mask == 1, 5.0 * (2 * target - 1 - x), 0.0)
        torch.testing.assert_close(gradient, expected)
        everywhere = RegionGuidance([target, target], scale=5.0).for_call(call_of(), {})
        torch.testing.assert_close(everywhere(x, None, x)[1], -2.5 * (x[1] - (2 * target - 1)).square().sum())

    def test_color(self):
        mask = torch.zeros(8, 8)
        mask[2:4, 3:8] = 1
        color = (1.0, 0.5, 0.0)
        guidance = ColorGuidance(color, mask, scale=3.0).for_call(call_of(), {})
        x = self.X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(guidance(x, None, x).sum(), x)
        difference = torch.tensor([1.0, 0.0, -1.0]) - x[:, :, 2:4, 3:8].mean(dim=(2, 3))
        expected = torch.where(mask == 1, 3.0 * difference[:, :, None, None], 0.0)
        torch.testing.assert_close(gradient, expected)

    def test_measurement(self):
        operator = DownsamplingOperator(4)
        y = torch.randn(2, 3, 2, 2, generator=seeded(3))
        guidance = MeasurementGuidance(operator, y, scale=0.7)
        assert (guidance.kind, guidance.through_unet) == ("shift", True)
        values = guidance.for_call(call_of(), {})(None, None, self.X)
        expected = [-0.7 * torch.linalg.vector_norm(y[i] - operator(self.X)[i]) for i in range(2)]
        torch.testing.assert_close(values, torch.stack(expected))
        # One for each prompt, of which there are two images each.
        rows = guidance.for_call(call_of(4, num_prompts=2), {}).measurement
        assert torch.equal(rows, y[[0, 0, 1, 1]])

    def test_a_perfect_fit_has_no_gradient(self):
        """The gradient of a norm is not defined at 0."""
        # A mask, because two results of a sum may differ in their last bits.
        operator = MaskOperator(torch.ones(self.X.shape[-2:]).tril())
        guidance = MeasurementGuidance(operator, operator(self.X)).for_call(call_of(), {})
        x = self.X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(guidance(x, None, x).sum(), x)
        assert not gradient.any()

    def test_latents(self):
        vae = fill_randomly(AutoencoderKL(**TOY_AUTOENCODER_CONFIG, scaling_factor=0.5))
        latents = torch.randn(2, 2, 4, 4, generator=seeded(), requires_grad=True)
        guidance = RegionGuidance(torch.full((3, 8, 8), 0.5), scale=2.0, vae=vae)
        own = guidance.for_call(call_of(channels=2, size=4), {})
        expected = -vae.decode(latents / 0.5).sample.square().sum(dim=(1, 2, 3))
        torch.testing.assert_close(own(latents, None, latents), expected)
        assert torch.autograd.grad(own(latents, None, latents).sum(), latents)[0].abs().max() > 0
        with pytest.raises(
            ValueError, match="`vae` of RegionGuidance has latents of 2 channels, but the samples have 3"
        ):
            guidance.for_call(call_of(), {})

    def test_an_autoencoder_that_upcasts(self):
        vae = AutoencoderKL(**TOY_AUTOENCODER_CONFIG, force_upcast=True)
        ColorGuidance((0, 0, 0), vae=vae)
        with pytest.raises(ValueError, match="no gradient flows back through it"):
            ColorGuidance((0, 0, 0), vae=vae.half())

    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: ColorGuidance((0, 0, 0), scale=float("nan")), "`scale` is nan; it must be a finite number"),
            (lambda: ColorGuidance((0, 0, 255)), "`color` is (0, 0, 255); pass one number in [0, 1]"),
            (lambda: ColorGuidance("red"), "`color` is 'red'; pass one number in [0, 1]"),
            (lambda: ColorGuidance((0, 0, 0), torch.zeros(8, 8)), "`mask_image` is black everywhere"),
            (lambda: ColorGuidance((0.5,)).for_call(call_of(), {}), "has 1 numbers, but the images have 3 channels"),
            (
                lambda: ColorGuidance((0, 0, 0), torch.ones(4, 8)).for_call(call_of(), {}),
                "`mask_image` of ColorGuidance is 8 x 4 pixels (width x height), but the results are 8 x 8",
            ),
            (
                lambda: RegionGuidance(torch.zeros(3, 3, 8, 8)).for_call(call_of(), {}),
                "`image` of RegionGuidance holds 3 entries for 2 images",
            ),
            (
                lambda: RegionGuidance(torch.zeros(3, 4, 8)).for_call(call_of(), {}),
                "the results have (3, 8, 8). Resize",
            ),
            (lambda: MeasurementGuidance(None, torch.zeros(1, 3)), "`operator` is None; pass a function of images"),
            (lambda: MeasurementGuidance(torch.sum, [0.0]), "`measurement` is of type list; pass a floating point"),
            (
                lambda: MeasurementGuidance(torch.sum, torch.tensor([[0.0], [float("nan")]])),
                "`measurement` holds NaN or infinity in 1 of 2 entries",
            ),
            (
                lambda: MeasurementGuidance(DownsamplingOperator(2), torch.zeros(1, 3, 2, 2)).for_call(call_of(), {}),
                "`measurement` has shape (1, 3, 2, 2), but `operator` measures images of shape (2, 3, 8, 8) as",
            ),
            (
                lambda: MeasurementGuidance(MaskOperator(torch.ones(4, 4)), torch.zeros(1, 3, 8, 8)).for_call(
                    call_of(), {}
                ),
                "`keep_mask` has shape (1, 1, 4, 4), but the images have (2, 3, 8, 8)",
            ),
            (
                lambda: MeasurementGuidance(DownsamplingOperator(2), torch.zeros(3, 3, 4, 4)).for_call(call_of(), {}),
                "`measurement` of MeasurementGuidance holds 3 entries for 2 images",
            ),
        ],
    )
    def test_refused(self, make, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()


def random_clip(seed: int = 0) -> CLIPModel:
    width = {
        "projection_dim": 12,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    size = len(toy_tokenizer())
    text = {**width, "vocab_size": size, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 0}
    config = CLIPConfig(
        text_config={**text, "pad_token_id": 0},
        vision_config={**width, "image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    model = CLIPModel(config)
    model.logit_scale.data = model.logit_scale.data[None]  # as the others have a dimension
    fill_randomly(model, seed)
    model.logit_scale.data = torch.tensor(2.0)
    return model


class TestCLIP:
    X = torch.rand(2, 3, 8, 8, generator=seeded(1)) * 2 - 1
    PROMPTS = ("a red cat", "a dog")

    def similarities(self, model: CLIPModel, images: torch.Tensor, prompts) -> torch.Tensor:
        """Of each image with its prompt, by the model's own `forward`."""
        tokens = toy_tokenizer()(list(prompts), return_tensors="pt", padding="max_length")
        mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        inputs = ((images + 1) / 2 - mean) / std
        outputs = model(pixel_values=inputs, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return (outputs.logits_per_image / model.logit_scale.exp()).diagonal()

    @pytest.mark.parametrize("given", ["in the call", "in the function"])
    @pytest.mark.parametrize("towers", ["model", "pair"])
    def test_similarity(self, given, towers, tmp_path):
        model, clip = random_clip(), random_clip()
        if towers == "pair":
            model.save_pretrained(tmp_path)
            clip = tuple(
                cls.from_pretrained(tmp_path) for cls in (CLIPTextModelWithProjection, CLIPVisionModelWithProjection)
            )
        prompt = list(self.PROMPTS) if given == "in the function" else None
        conditions = {} if prompt else {"prompt": list(self.PROMPTS)}
        guidance = CLIPGuidance(clip, toy_tokenizer(), prompt, scale=20.0).for_call(call_of(), conditions)
        assert (guidance.kind, guidance.through_unet) == ("score", False)
        x = self.X.clone().requires_grad_()
        actual, expected = guidance(x, None, x), 20.0 * self.similarities(model, x, self.PROMPTS)
        assert rounding_errors(actual, expected) <= NETWORK
        gradients = [torch.autograd.grad(values.sum(), x)[0] for values in (actual, expected)]
        assert rounding_errors(*gradients) <= NETWORK
        assert gradients[0].abs().max() > 0.01

    def test_cutouts(self):
        """The mean over parts of the image; the same in each call, and others in each step."""
        model = random_clip()
        guidance = CLIPGuidance(model, toy_tokenizer(), "a cat", scale=1.0, num_cutouts=4)
        first, again = (guidance.for_call(call_of(), {}) for _ in range(2))
        values = first(None, None, self.X)
        assert values.shape == (2,)
        assert rounding_errors(again(None, None, self.X), values) <= NETWORK
        assert (first(None, None, self.X) - values).abs().max() > 1e-4
        sizes = {cutout.shape[2:] for cutout in first._cutouts(torch.zeros(1, 3, 8, 8)) for _ in range(3)}
        assert all(4 <= height == width <= 8 for height, width in sizes)
        flat = torch.full((2, 3, 8, 8), 0.3)  # whose parts look like the whole
        whole = CLIPGuidance(model, toy_tokenizer(), "a cat", scale=1.0).for_call(call_of(), {})
        assert rounding_errors(first(None, None, flat), whole(None, None, flat)) <= NETWORK

    def test_grey_images_of_another_size(self):
        guidance = CLIPGuidance(random_clip(), toy_tokenizer(), "a cat").for_call(call_of(1, channels=1, size=32), {})
        x = torch.rand(1, 1, 32, 32, requires_grad=True)
        assert torch.autograd.grad(guidance(x, None, x).sum(), x)[0].abs().max() > 0

    def test_half_precision(self):
        wide, half = (
            CLIPGuidance(clip, toy_tokenizer(), "a cat", scale=1e6).for_call(call_of(), {})
            for clip in (random_clip(), random_clip().bfloat16())
        )
        x = self.X.clone().requires_grad_()
        expected, actual = (torch.autograd.grad(guidance(x, None, x).sum(), x)[0] for guidance in (wide, half))
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 0.15 * expected.norm()  # some roundings of 2**-8

    @pytest.mark.parametrize(
        "make, message",
        [
            (
                lambda: CLIPGuidance(CLIPVisionModel(CLIPVisionConfig(hidden_size=12, num_hidden_layers=1)), None),
                "`clip_model` is CLIPVisionModel, which does not project text and image to one space",
            ),
            (lambda: CLIPGuidance(random_clip(), None, num_cutouts=-1), "`num_cutouts` is -1; pass an integer"),
            (lambda: CLIPGuidance(random_clip(), None, image_std=(1, 1, 0)), "pass three numbers each"),
            (
                lambda: CLIPGuidance(random_clip(), toy_tokenizer()).for_call(call_of(), {}),
                "CLIPGuidance has no `prompt`, and the call has none either",
            ),
            (
                lambda: CLIPGuidance(random_clip(), toy_tokenizer(), "a cat").for_call(call_of(channels=4), {}),
                "looks at grey or RGB images, but these have 4 channels. If the samples are latents, pass `vae=",
            ),
            (
                lambda: CLIPGuidance(random_clip(), toy_tokenizer(), ["a cat"] * 3).for_call(call_of(), {}),
                "`prompt` of CLIPGuidance holds 3 entries for 2 images",
            ),
            (
                lambda: CLIPGuidance(random_clip().to("meta"), toy_tokenizer(), "a cat").for_call(call_of(), {}),
                'The CLIP of CLIPGuidance is on meta, but the pipeline on cpu. Move it: `clip_model.to("cpu")`',
            ),
        ],
    )
    def test_refused(self, make, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()
