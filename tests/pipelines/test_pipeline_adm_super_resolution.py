"""ADMSuperResolutionPipeline: what the network sees, and samples, against loops and formulas written by hand."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from docstrings import check_documented_arguments
from PIL import Image
from tolerances import SAMPLING, rounding_errors
from toy_models import (
    CONDITIONAL,
    random_classifier,
    random_diffusers_unet,
    random_text_encoder,
    random_text_unet,
    random_unet,
    toy_tokenizer,
)

from diffusers_adm import ADMPipeline, ADMSuperResolutionPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.low_resolution import downsample


T = 50
CHANNELS = {"in_channels": 6, "out_channels": 6}
NO_OTHERS = {"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None}
ARGUMENTS = {"num_inference_steps": 3, "eta": 0.0, "output_type": "latent"}


def make_upsampler(unet=None, scheduler=None, **config) -> ADMSuperResolutionPipeline:
    """From 4 to 8 pixels; by class, and told the noise level, unless another network is given."""
    pipe = ADMSuperResolutionPipeline(
        unet=random_unet(**CHANNELS, **CONDITIONAL, time_cond_proj_dim=6) if unet is None else unet,
        scheduler=LearnedVarianceDDPMScheduler(num_train_timesteps=T) if scheduler is None else scheduler,
        **{**NO_OTHERS, **config},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_upsampler(low_res_size=4, max_noise_level=20, id2label=dict(enumerate("abcd")))


@pytest.fixture
def small():
    """Two images, 8-bit values, in [0, 1]."""
    levels = torch.randint(0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(3))
    return levels.float() / 255


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(number: int) -> list[torch.Generator]:
    return [seeded(seed) for seed in range(number)]


def record(module: torch.nn.Module) -> list[tuple]:
    """What a network is called with from now on: `(sample, timestep, keyword arguments)`."""
    calls = []
    module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((*args, kwargs)), with_kwargs=True)
    return calls


def bilinear_matrix(size: int, target: int) -> torch.Tensor:
    """`(target, size)`: weights of the neighbours of each target pixel, whose centre lies between theirs."""
    matrix = torch.zeros(target, size, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * size / target - 0.5
        low = math.floor(centre)
        for neighbour, weight in ((low, 1 - (centre - low)), (low + 1, centre - low)):
            matrix[row, min(max(neighbour, 0), size - 1)] += weight
    return matrix


def enlarged(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Rows, then columns, in float64."""
    rows, cols = bilinear_matrix(images.shape[2], height), bilinear_matrix(images.shape[3], width)
    return torch.einsum("yh,nchw,xw->ncyx", rows, images.double(), cols)


def sinusoid(level: int, dim: int) -> torch.Tensor:
    half = dim // 2
    angles = level * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()])


class TestWhatTheNetworkSees:
    @pytest.mark.parametrize("height, width", [(8, 8), (16, 8)])
    def test_the_sample_and_the_enlarged_small_image(self, height, width, small):
        """As in `SuperResModel` of guided-diffusion and `SuperResText2ImUNet` of GLIDE."""
        pipe = make_upsampler(random_unet(**CHANNELS))
        calls = record(pipe.unet)
        latents = torch.randn(2, 3, height, width, generator=seeded())
        pipe(small, latents=latents, height=height, width=width, **ARGUMENTS)
        assert len(calls) == 3
        assert torch.equal(calls[0][0][:, :3], latents)
        for sample, _, kwargs in calls:
            torch.testing.assert_close(
                sample[:, 3:].double(), enlarged(2 * small - 1, height, width), rtol=0, atol=1e-6
            )
            assert "timestep_cond" not in kwargs

    def test_its_noise_level(self, pipe, small):
        calls = record(pipe.unet)
        pipe(small, class_labels=0, noise_level=7, guidance_scale=2.0, latents=torch.zeros(2, 3, 8, 8), **ARGUMENTS)
        for sample, _, kwargs in calls:
            expected = sinusoid(7, 6).expand(4, 6)
            torch.testing.assert_close(kwargs["timestep_cond"].double(), expected, rtol=0, atol=1e-6)
            assert torch.equal(*sample[:, 3:].chunk(2))  # with and without the class alike

    def test_noise_of_a_level(self, pipe, small):
        """Seven steps of the chain, one by one: x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, in one draw."""
        betas = np.linspace(1e-4, 0.02, T)
        signal, variance = 1.0, 0.0
        for beta in betas[:7]:
            signal, variance = signal * math.sqrt(1 - beta), (1 - beta) * variance + beta
        noise = torch.randn(2, 3, 4, 4, generator=seeded(5))
        noisy = signal * (2 * small - 1) + math.sqrt(variance) * noise
        calls = record(pipe.unet)
        latents = torch.zeros(2, 3, 8, 8)
        pipe(small, noise_level=np.int64(7), latents=latents, generator=seeded(5), **ARGUMENTS)
        torch.testing.assert_close(calls[0][0][:, 3:].double(), enlarged(noisy, 8, 8), rtol=0, atol=1e-6)

    def test_which_level_a_call_has(self, pipe, small):
        """Its own, or that of the config, or none."""
        of_config = make_upsampler(pipe.unet, noise_level=9)
        calls = record(pipe.unet)
        for upsampler, arguments in ((pipe, {}), (of_config, {}), (of_config, {"noise_level": 3})):
            upsampler(small, generator=seeded(), **arguments, **ARGUMENTS)
        conditions = [kwargs["timestep_cond"][0].double() for _, _, kwargs in calls[::3]]
        for condition, level in zip(conditions, (0, 9, 3), strict=True):
            torch.testing.assert_close(condition, sinusoid(level, 6), rtol=0, atol=1e-6)
        # The samples start from the same noise at every level.
        assert torch.equal(calls[0][0][:, :3], calls[3][0][:, :3])
        assert not torch.equal(calls[0][0][:, 3:], calls[3][0][:, 3:])


class TestSampling:
    @torch.no_grad()
    def test_ddim_by_hand(self, pipe, small):
        """All of it in float64: noised small images, guidance, DDIM with clipping."""
        labels, scale, level = torch.tensor([1, 3]), 2.5, 4
        latents = torch.randn(2, 3, 8, 8, generator=seeded(1))
        result = pipe(
            small,
            class_labels=labels,
            noise_level=level,
            guidance_scale=scale,
            latents=latents,
            generator=seeded(2),
            timestep_respacing="ddim5",
            eta=0.0,
            output_type="latent",
        ).images
        alphas = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, T))])  # by number of steps of noise
        noise = torch.randn(2, 3, 4, 4, generator=seeded(2)).double()
        noisy = math.sqrt(alphas[level]) * (2 * small.double() - 1) + math.sqrt(1 - alphas[level]) * noise
        beside = enlarged(noisy, 8, 8)
        network = random_unet(**CHANNELS, **CONDITIONAL, time_cond_proj_dim=6).double()
        condition = sinusoid(level, 6).expand(2, 6)
        x = latents.double()
        for t in (40, 30, 20, 10, 0):
            seen = torch.cat([x, beside], dim=1)
            uncond, cond = (
                network(seen, t, class_labels=classes, timestep_cond=condition).sample[:, :3]
                for classes in (torch.full((2,), 4), labels)
            )
            epsilon = uncond + scale * (cond - uncond)
            alpha, alpha_prev = alphas[t + 1], alphas[max(t - 9, 0)]
            x_0 = ((x - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)).clamp(-1, 1)
            epsilon = (x - math.sqrt(alpha) * x_0) / math.sqrt(1 - alpha)
            x = math.sqrt(alpha_prev) * x_0 + math.sqrt(1 - alpha_prev) * epsilon
        assert (result.double() - x).abs().max() < 1e-4

    @torch.no_grad()
    @pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
    def test_a_swapped_scheduler_by_hand(self, scheduler_class, small):
        unet = random_unet(**CHANNELS)
        scheduler = scheduler_class.from_config(LearnedVarianceDDPMScheduler(num_train_timesteps=T).config)
        pipe = make_upsampler(unet, scheduler, low_res_size=4)
        latents = torch.randn(2, 3, 8, 8, generator=seeded())
        result = pipe(small, latents=latents, num_inference_steps=4, output_type="latent").images
        options = {"variance_type": None} if scheduler_class is DPMSolverMultistepScheduler else {}
        scheduler = scheduler_class.from_config(scheduler.config, **options)
        scheduler.set_timesteps(4)
        beside = enlarged(2 * small - 1, 8, 8).float()
        x = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            seen = torch.cat([scheduler.scale_model_input(x, t), beside], dim=1)
            x = scheduler.step(unet(seen, t).sample[:, :3], t, x).prev_sample
        assert (result - x).abs().max() < 1e-4

    def test_a_learned_variance_is_used(self, small):
        """Ancestral steps of a network whose variance channels alone differ."""
        unet, other = random_unet(**CHANNELS), random_unet(**CHANNELS)
        other.conv_out.bias.data[3:] += 2
        results = [
            make_upsampler(network)(small, num_inference_steps=4, generator=seeded(), output_type="latent").images
            for network in (unet, unet, other)
        ]
        assert rounding_errors(results[0], results[1]) <= SAMPLING
        assert (results[0] - results[2]).abs().max() > 1e-3

    def test_networks_of_diffusers(self, small):
        pipe = make_upsampler(random_diffusers_unet(**CHANNELS), low_res_size=4)
        assert pipe(small, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 3)

    @pytest.mark.parametrize("kind", ["clip", "glide"])
    def test_prompts(self, kind, small):
        text_config = {"addition_embed_type": "text_embeds"} if kind == "glide" else {}
        pipe = make_upsampler(
            random_text_unet("added_kv", **CHANNELS, **text_config),
            text_encoder=random_text_encoder(kind),
            tokenizer=toy_tokenizer(kind),
        )
        calls = record(pipe.unet)
        arguments = {"latents": torch.randn(2, 3, 8, 8, generator=seeded()), "guidance_scale": 3.0, **ARGUMENTS}
        both = pipe(small, prompt=["a cat", "the red dog"], **arguments).images
        assert all(len(sample) == 4 and torch.equal(*sample[:, 3:].chunk(2)) for sample, *_ in calls)
        for index, prompt in enumerate(["a cat", "the red dog"]):
            arguments["latents"] = torch.randn(2, 3, 8, 8, generator=seeded())[index : index + 1]
            alone = pipe(small[index], prompt=prompt, **arguments).images
            assert (alone[0] - both[index]).abs().max() < 1e-4
        other = pipe(small[1], prompt="a green hat", **arguments).images
        assert (other[0] - both[1]).abs().max() > 1e-2

    def test_a_classifier_steers(self, small):
        pipe = make_upsampler(random_unet(**CHANNELS), classifier=random_classifier(num_classes=5))
        arguments = {"latents": torch.zeros(2, 3, 8, 8), "class_labels": 1, **ARGUMENTS}
        plain = pipe(small, **arguments).images
        steered = pipe(small, classifier_guidance_scale=20.0, **arguments).images
        assert (plain - steered).abs().max() > 1e-3


class TestImages:
    def test_every_kind_of_input(self, pipe, small):
        arguments = {"class_labels": 2, "noise_level": 3, **ARGUMENTS}
        arrays = small.permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray((array * 255).round().astype("uint8")) for array in arrays]
        expected = pipe(small, generator=seeded(), **arguments).images
        for image in (pictures, arrays, list(arrays), list(small), small.double()):
            assert rounding_errors(pipe(image, generator=seeded(), **arguments).images, expected) <= SAMPLING
        first = pipe(small[:1], generator=seeded(), **arguments).images
        for image in (pictures[0], arrays[0], small[0]):
            assert rounding_errors(pipe(image, generator=seeded(), **arguments).images, first) <= SAMPLING

    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    def test_what_the_base_draws_goes_straight_in(self, pipe, output_type):
        base = ADMPipeline(
            random_unet(**CONDITIONAL, sample_size=4), LearnedVarianceDDPMScheduler(num_train_timesteps=T), **NO_OTHERS
        )
        base.set_progress_bar_config(disable=True)
        small = base(class_labels=[0, 1], num_inference_steps=2, generator=seeded(), output_type=output_type).images
        calls = record(pipe.unet)
        images = pipe(small, class_labels=[0, 1], num_inference_steps=2, generator=seeded()).images
        assert [image.size for image in images] == [(8, 8)] * 2
        exact = base(class_labels=[0, 1], num_inference_steps=2, generator=seeded(), output_type="pt").images
        # Pictures are rounded to 8 bits, a step of 2/255 in [-1, 1]; else, two calls differ as by SAMPLING.
        tolerance = 1.1 / 255 if output_type == "pil" else 5e-4
        assert (calls[0][0][:, 3:] - enlarged(2 * exact - 1, 8, 8)).abs().max() < tolerance

    def test_how_many_come_out(self, pipe, small):
        """Each image `num_images_per_prompt` times, one after the other; each by its own generator."""
        arguments = {"num_images_per_prompt": 2, "noise_level": 5, **ARGUMENTS}
        images = pipe(small, class_labels=[1, 2], generator=generators(4), **arguments).images
        assert images.shape == (4, 3, 8, 8)
        for index, (image, label) in enumerate(((0, 1), (0, 1), (1, 2), (1, 2))):
            arguments["num_images_per_prompt"] = 1
            alone = pipe(small[image], class_labels=label, generator=seeded(index), **arguments).images
            assert (alone[0] - images[index]).abs().max() < 1e-4
        # One image for all classes, one class for all images.
        assert len(pipe(small[0], class_labels=["a", "b", "c"], **ARGUMENTS).images) == 3
        assert len(pipe(small, class_labels="a", **ARGUMENTS).images) == 2

    def test_any_smaller_size_where_none_is_known(self):
        pipe = make_upsampler(random_unet(**CHANNELS))
        calls = record(pipe.unet)
        image = torch.rand(1, 3, 3, 7, generator=seeded())
        pipe(image, **ARGUMENTS)
        expected = enlarged(2 * image - 1, 8, 8)
        torch.testing.assert_close(calls[0][0][:, 3:].double(), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("noise_level", [0, 15])
    def test_back_projection(self, pipe, small, noise_level):
        arguments = {"noise_level": noise_level, "num_images_per_prompt": 2, **ARGUMENTS}
        plain, matched = (
            pipe(small, generator=seeded(), back_projection=on, **arguments).images for on in (False, True)
        )
        blocks = matched.view(4, 3, 4, 2, 4, 2)
        wanted = (2 * small - 1).repeat_interleave(2, dim=0)
        torch.testing.assert_close(blocks.mean(dim=(3, 5)), wanted, rtol=0, atol=1e-6)
        # Within a block, the differences stay what they were.
        before = plain.clamp(-1, 1).view(4, 3, 4, 2, 4, 2)
        change = blocks - before
        # Up to the rounding of two calls of the pipeline.
        torch.testing.assert_close(change, change[:, :, :, :1, :, :1].expand_as(change), rtol=0, atol=5e-4)
        assert change.abs().max() > 0.1

    def test_callbacks_and_output_types(self, pipe, small):
        seen = []

        def replace(_, step, timestep, callback_kwargs):
            seen.append((step, int(timestep)))
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

        images = pipe(small, num_inference_steps=2, eta=0.0, output_type="np", callback_on_step_end=replace).images
        assert len(seen) == 2
        assert isinstance(images, np.ndarray)
        assert (images == 0.5).all()
        (images,) = pipe(small, num_inference_steps=2, output_type="pt", return_dict=False)
        assert images.shape == (2, 3, 8, 8)
        assert 0 <= images.min() <= images.max() <= 1


@pytest.mark.parametrize("load", [ADMSuperResolutionPipeline.from_pretrained, DiffusionPipeline.from_pretrained])
def test_saved_and_loaded(load, pipe, small, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is ADMSuperResolutionPipeline
    assert (loaded.config.low_res_size, loaded.config.noise_level, loaded.config.max_noise_level) == (4, None, 20)
    assert loaded.id2label == pipe.id2label
    arguments = {"class_labels": "b", "noise_level": 6, **ARGUMENTS}
    images = [p(small, generator=seeded(), **arguments).images for p in (pipe, loaded)]
    assert rounding_errors(*images) <= SAMPLING


def test_shrink_is_pillows_reduce():
    levels = torch.randint(0, 256, (1, 3, 12, 8), generator=seeded(), dtype=torch.uint8)
    picture = Image.fromarray(levels[0].permute(1, 2, 0).numpy())
    for factor in (1, 2, 4):
        expected = torch.from_numpy(np.array(picture.reduce(factor))).permute(2, 0, 1)
        result = downsample(levels.float() / 127.5 - 1, factor)
        assert torch.equal(((result[0] + 1) * 127.5).round().to(torch.uint8), expected)
        assert torch.equal(result[0], expected.float() / 127.5 - 1)


class TestBadInput:
    @pytest.fixture(autouse=True)
    def no_work(self, pipe, monkeypatch):
        def fail(*args, **kwargs):
            raise AssertionError("the network ran")

        monkeypatch.setattr(pipe.unet, "forward", fail)

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (torch.rand(1, 3, 8, 8), r"8 x 8 pixels .* would become 8 x 8. Pass a smaller one"),
            (torch.rand(1, 3, 4, 16), r"16 x 4 pixels \(width x height\) and would become 8 x 8"),
            (torch.rand(1, 3, 2, 2), "trained to upsample 2 times, from 4 to 8.*`height=4` and `width=4`"),
            (torch.rand(1, 3, 4, 6), "trained to upsample 2 times.*`height=8` and `width=12`"),
            (torch.rand(1, 1, 4, 4), r"\(1, 1, 4, 4\)"),
            (torch.rand(4, 4), r"\(4, 4\)"),
            (2 * torch.rand(1, 3, 4, 4) - 1, r"they must lie in \[0, 1\]"),
            (255 * torch.rand(1, 3, 4, 4), r"they must lie in \[0, 1\]"),
            (torch.full((1, 3, 4, 4), math.nan), r"they must lie in \[0, 1\]"),
            ([], "`image`"),
            ([torch.rand(3, 4, 4), torch.rand(3, 4, 2)], "several sizes"),
            ("image.png", "`image` is a str"),
            (Image.new("RGBA", (4, 4)), "`image`.*transparent"),
            (Image.new("CMYK", (4, 4)), "`image`.*CMYK"),
        ],
    )
    def test_images(self, pipe, image, message):
        with pytest.raises(ValueError, match=message):
            pipe(image, class_labels=0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"noise_level": 21}, "`noise_level` is 21; .* from 0 .* to 20, the highest level of the training"),
            ({"noise_level": -1}, "`noise_level` is -1"),
            ({"noise_level": 0.5}, "`noise_level` is 0.5; pass an integer"),
            ({"class_labels": [0, 1, 2]}, "`class_labels` holds 3, `image` holds 2"),
            ({"prompt": ["a", "b", "c"]}, "`prompt` was given, but this model is not conditioned on text"),
            ({"height": 4, "width": 4}, "4 x 4 pixels .* would become 4 x 4"),
            ({"height": 16}, "would become 8 x 16, but this model was trained to upsample 2 times"),
            ({"generator": generators(3)}, "list of 3 for 2 images"),
            ({"guidance_scale": 2.0}, "no `class_labels`"),
        ],
    )
    def test_calls(self, pipe, small, arguments, message):
        with pytest.raises(ValueError, match=message):
            pipe(small, **arguments)

    def test_a_level_for_a_network_that_is_not_told(self, small):
        with pytest.raises(ValueError, match="`noise_level` is 3, but this U-Net has no `time_cond_proj_dim`"):
            make_upsampler(random_unet(**CHANNELS))(small, noise_level=3)
        with pytest.raises(ValueError, match="to 50, the number of timesteps"):
            make_upsampler()(small, noise_level=51)

    def test_back_projection_by_a_broken_factor(self):
        upsampler = make_upsampler(random_unet(**CHANNELS))
        for size in ((3, 3), (4, 2)):
            with pytest.raises(ValueError, match="`back_projection` needs a whole factor"):
                upsampler(torch.rand(1, 3, *size), back_projection=True)

    def test_an_output_size_is_needed(self, small):
        unet = random_unet(**CHANNELS, sample_size=None)
        with pytest.raises(ValueError, match="Pass `height` and `width`"):
            make_upsampler(unet)(small)
        assert make_upsampler(unet)(small, height=8, width=8, **ARGUMENTS).images.shape == (2, 3, 8, 8)

    @pytest.mark.parametrize(
        ("unet", "config", "message"),
        [
            ({"in_channels": 3}, {}, "`in_channels=3` and `out_channels=6`"),
            ({"in_channels": 10}, {}, "`in_channels=10` and `out_channels=6`"),
        ],
    )
    def test_components(self, unet, config, message):
        with pytest.raises(ValueError, match=message):
            make_upsampler(random_unet(**unet), **config)


@pytest.mark.parametrize(
    ("docstring", "function"),
    [
        (ADMSuperResolutionPipeline.__doc__, ADMSuperResolutionPipeline.__init__),
        (ADMSuperResolutionPipeline.__call__.__doc__, ADMSuperResolutionPipeline.__call__),
    ],
)
def test_docstring_documents_the_arguments(docstring, function):
    check_documented_arguments(docstring, function)


class TestNoiseSchedule:
    """That of the training, for the large image and the levels of the small one."""

    COSINE = {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2"}
    REFUSED = f"This upsampler was trained on the noise schedule squaredcos_cap_v2 with {T} timesteps, but `scheduler`"

    @pytest.fixture
    def upsampler(self):
        scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps=T, beta_schedule="cosine")
        return make_upsampler(scheduler=scheduler, low_res_size=4, noise_schedule=self.COSINE)

    @pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
    def test_another_scheduler(self, upsampler, small, cls):
        own = upsampler.scheduler.config
        upsampler.scheduler = cls.from_config(own)
        upsampler(small, num_inference_steps=2, output_type="pt")
        upsampler.scheduler = cls.from_config(own, beta_schedule="linear")
        calls = []
        upsampler.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match=f"{self.REFUSED}, a {cls.__name__}, has the noise schedule linear"):
            upsampler(small, num_inference_steps=2, output_type="pt")
        assert calls == []

    def test_saved_and_loaded(self, upsampler, tmp_path):
        upsampler.save_pretrained(tmp_path)
        for loaded in (DiffusionPipeline.from_pretrained(tmp_path), ADMSuperResolutionPipeline.from_pipe(upsampler)):
            assert loaded.config.noise_schedule == self.COSINE
        with pytest.raises(ValueError, match=self.REFUSED):
            ADMSuperResolutionPipeline.from_pretrained(tmp_path, scheduler=LearnedVarianceDDPMScheduler(T))

    def test_one_that_does_not_say_it(self, small, caplog):
        upsampler = make_upsampler()
        for _ in range(2):
            upsampler(small, num_inference_steps=2, output_type="pt")
        assert caplog.text.count("This upsampler does not say which noise schedule it was trained on") == 1
