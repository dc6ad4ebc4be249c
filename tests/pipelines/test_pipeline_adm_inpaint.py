"""ADMInpaintPipeline against RePaint's and GLIDE's algorithms written out, a Gaussian solved by hand, and bad input."""

import inspect
import re

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers_samplers import SAMPLERS, STOCHASTIC, as_parameters
from docstrings import check_documented_arguments
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

from diffusers_adm import ADMInpaintPipeline, ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.guidance import exact_prediction
from diffusers_adm.conditioning.inpainting import DEFAULT_JUMP_N_SAMPLE, resampling_walk
from diffusers_adm.pipelines import pipeline_adm
from diffusers_adm.schedulers.diffusers_schedulers import SCHEDULERS_WITHOUT_STRENGTH


OURS = "LearnedVarianceDDPMScheduler"
STATELESS = (OURS, "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler")
EACH = as_parameters([(OURS, {}), *SAMPLERS])
# Of a hundred timesteps: some solvers look at each of them, for seconds.
SHORT_CHAIN = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2}
KINDS = {"ordinary": 3, "trained": 7, "trained to upsample": 10}


def make_pipeline(unet=None, scheduler=None, cls=ADMInpaintPipeline, **components) -> ADMInpaintPipeline:
    pipe = cls(
        unet=random_unet() if unet is None else unet,
        scheduler=LearnedVarianceDDPMScheduler() if scheduler is None else scheduler,
        **{"vae": None, "text_encoder": None, "tokenizer": None, "classifier": None, **components},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bar_alphas_of(schedule: str) -> np.ndarray:
    """Of 1000 timesteps (DDPM, section 4; Improved DDPM, eq. 17)."""
    if schedule == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    signal = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - signal[1:] / signal[:-1], 0.999))


def swap(pipe, name: str, options: dict) -> None:
    if name != OURS:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pixels(number: int = 1, size: int = 8, seed: int = 0) -> torch.Tensor:
    """`(number, 3, size, size)`, uint8."""
    return torch.randint(0, 256, (number, 3, size, size), generator=seeded(seed), dtype=torch.uint8)


def as_pil(pixels: torch.Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())


PIXELS = random_pixels()
IMAGE = as_pil(PIXELS[0])
ORIGINAL = PIXELS.double() / 127.5 - 1
# A part of a row here and there, and a block: neither half nor symmetric.
REPAINTED = torch.zeros(8, 8, dtype=torch.bool)
REPAINTED[2:5, 1:7] = True
REPAINTED[6, 3] = True
KNOWN = ~REPAINTED
MASK = PIL.Image.fromarray(REPAINTED.numpy())
WHITE, BLACK = PIL.Image.new("L", (8, 8), 255), PIL.Image.new("L", (8, 8), 0)


class Recorder:
    """What the network of a pipeline was called with."""

    def __init__(self, pipe):
        self.samples, self.timesteps, self.kwargs = [], [], []
        pipe.unet.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module, args, kwargs):
        self.samples.append(args[0].clone())
        self.timesteps.append(float(args[1]))
        self.kwargs.append(kwargs)


def low_res_of(kind: str) -> dict:
    return {"low_res_image": as_pil(random_pixels(size=4, seed=7)[0])} if kind == "trained to upsample" else {}


# 1. The order of RePaint's steps


def times_of_repaint(num_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """The list of times of the paper's appendix ("jump schedule"): x_t for each t, -1 is the result."""
    jumps = {}
    for j in range(0, num_steps - jump_length, jump_length):
        jumps[j] = jump_n_sample - 1
    t, times = num_steps, []
    while t >= 1:
        t = t - 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] = jumps[t] - 1
            for _ in range(jump_length):
                t = t + 1
                times.append(t)
    return [*times, -1]


class TestWalk:
    @pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 50])
    @pytest.mark.parametrize("jump_length", [1, 3, 10])
    @pytest.mark.parametrize("jump_n_sample", [1, 2, 5])
    def test_equals_the_times_of_the_paper(self, num_steps, jump_length, jump_n_sample):
        times = times_of_repaint(num_steps, jump_length, jump_n_sample)
        denoised = [num_steps - 1 - a for a, b in zip(times[:-1], times[1:], strict=True) if b < a]
        walk = resampling_walk(num_steps, jump_length, jump_n_sample)
        assert walk == denoised
        places = len(range(0, num_steps - jump_length, jump_length))
        assert len(walk) == num_steps + (jump_n_sample - 1) * jump_length * places
        # No jump but over `jump_length`, and none from the result.
        steps_back = {a + 1 - b for a, b in zip(walk[:-1], walk[1:], strict=True)}
        assert steps_back <= {0, jump_length}
        assert num_steps - 1 not in walk[:-1]


# 2. What is known stays; with everything or nothing known


class TestKnownPixels:
    @pytest.mark.parametrize("name, options", EACH)
    def test_stay_with_each_scheduler(self, name, options):
        for kind, channels in KINDS.items():
            pipe = make_pipeline(random_unet(in_channels=channels), LearnedVarianceDDPMScheduler(**SHORT_CHAIN))
            swap(pipe, name, options)
            arguments = {"num_inference_steps": 4, "jump_length": 2, "generator": seeded(1), **low_res_of(kind)}
            (drawn,) = pipe(IMAGE, MASK, **arguments).images
            differs = (np.array(drawn) != np.array(IMAGE)).any(axis=2)
            assert not differs[KNOWN.numpy()].any()
            assert differs[REPAINTED.numpy()].mean() > 0.9
        (same,) = pipe(IMAGE, BLACK, **arguments).images
        assert (np.array(same) == np.array(IMAGE)).all()

    @pytest.mark.parametrize("name, options", EACH)
    def test_none_known_is_plain_sampling(self, name, options):
        inpaint = make_pipeline(scheduler=LearnedVarianceDDPMScheduler(**SHORT_CHAIN))
        plain = make_pipeline(inpaint.unet, inpaint.scheduler, cls=ADMPipeline)
        for pipe in (inpaint, plain):
            swap(pipe, name, options)
        arguments = {"num_inference_steps": 5, "output_type": "pt", "batch_size": 2}
        expected = plain(generator=seeded(3), **arguments).images
        actual = inpaint(IMAGE, WHITE, jump_length=2, generator=seeded(3), **arguments).images
        assert rounding_errors(actual, expected) <= SAMPLING
        assert inpaint.num_timesteps == plain.num_timesteps

    def test_a_trained_network_sees_that_none_is_known(self):
        pipe = make_pipeline(random_unet(in_channels=7))
        recorder = Recorder(pipe)
        pipe(IMAGE, WHITE, num_inference_steps=2, generator=seeded())
        assert all((sample[:, 3:] == 0).all() for sample in recorder.samples)

    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    def test_in_each_form(self, output_type):
        """Of floating point numbers, too, each bit comes back: 0.1 is none that survives `2 * x - 1` and back."""
        generator = np.random.default_rng(0)
        array = generator.random((8, 8, 3), dtype=np.float32)
        array[0, 0] = 0.1
        known = KNOWN.numpy()
        images = make_pipeline()(array, REPAINTED, num_inference_steps=3, output_type=output_type).images
        if output_type == "pil":
            assert (np.array(images[0])[known] == np.round(255 * array).astype(np.uint8)[known]).all()
            return
        drawn = images[0] if output_type == "np" else images[0].permute(1, 2, 0).numpy()
        assert drawn.dtype == np.float32
        assert (drawn[known] == array[known]).all()
        assert ((drawn[~known] >= 0) & (drawn[~known] <= 1)).all()
        round_trip = ((2 * array - 1) * 0.5 + 0.5)[known]
        assert (round_trip != array[known]).any()  # the wrong version

    def test_latents(self):
        drawn = make_pipeline()(IMAGE, MASK, num_inference_steps=3, output_type="latent").images
        torch.testing.assert_close(drawn[0][:, KNOWN], ORIGINAL[0][:, KNOWN].float(), rtol=0, atol=1e-6)

    def test_every_8_bit_value(self):
        values = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
        for image in (values, values + 64):
            drawn = np.array(make_pipeline()(PIL.Image.fromarray(image), MASK, num_inference_steps=2).images[0])
            assert (drawn == image)[KNOWN.numpy()].all()

    def test_grey_of_a_mask(self):
        """127 is kept, 128 is repainted."""
        for grey, expected in ((127, False), (128, True)):
            (drawn,) = make_pipeline()(IMAGE, PIL.Image.new("L", (8, 8), grey), num_inference_steps=2).images
            assert (np.array(drawn) != np.array(IMAGE)).any() == expected


# 3. The two algorithms, written out in float64


@torch.no_grad()
def reverse_step(unet, x, t, previous, bar_alphas, noise, seen=None, correct=None):
    """
    One ancestral step of a chain that keeps `t` and `previous` (-1: the result), with a learned variance: epsilon to
    x_0 to mean (DDPM, eq. 7), the log-variance between beta_tilde and beta (Improved DDPM, eq. 15).
    """
    bar_alpha = bar_alphas[t]
    bar_alpha_previous = bar_alphas[previous] if previous >= 0 else 1.0
    beta = 1 - bar_alpha / bar_alpha_previous
    model_input = x if seen is None else torch.cat([x, seen], dim=1)
    epsilon, fraction = unet(model_input.float(), t).sample.double().chunk(2, dim=1)
    original = (x - (1 - bar_alpha) ** 0.5 * epsilon) / bar_alpha**0.5
    if correct is not None:
        original = correct(original)
    original = original.clamp(-1, 1)
    mean = bar_alpha_previous**0.5 * beta / (1 - bar_alpha) * original
    mean = mean + (1 - bar_alpha_previous) * (1 - beta) ** 0.5 / (1 - bar_alpha) * x
    if previous < 0:
        return mean
    beta_tilde = beta * (1 - bar_alpha_previous) / (1 - bar_alpha)
    fraction = (fraction + 1) / 2
    log_variance = fraction * np.log(beta) + (1 - fraction) * np.log(beta_tilde)
    return mean + torch.exp(log_variance / 2) * noise


# 157 is what an error of the first step is multiplied by, where x_0 is not clipped; float32 gives 1e-7 of it.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


class TestRePaint:
    @pytest.mark.parametrize("jump_length, jump_n_sample", [(1, 1), (1, 3), (3, 2)])
    def test_equals_algorithm_1(self, jump_length, jump_n_sample):
        pipe = make_pipeline()
        num_steps, shape, generator = 7, (1, 3, 8, 8), seeded(5)
        timesteps = [142 * (num_steps - 1 - i) for i in range(num_steps)]
        bar_alphas = bar_alphas_of("linear")

        def draw():
            return torch.randn(shape, generator=generator).double()

        x, times = draw(), times_of_repaint(num_steps, jump_length, jump_n_sample)
        of = {t: timesteps[num_steps - 1 - t] for t in range(num_steps)} | {-1: -1}
        for number, (t, following) in enumerate(zip(times[:-1], times[1:], strict=True)):
            if following > t:
                continue  # all steps of a jump at once, when it has arrived
            if number and times[number - 1] < t:  # arrived: from where?
                start = number
                while start and times[start - 1] < times[start]:
                    start -= 1
                ratio = bar_alphas[of[t]] / bar_alphas[of[times[start]]]
                x = ratio**0.5 * x + (1 - ratio) ** 0.5 * draw()
            noisy = bar_alphas[of[t]] ** 0.5 * ORIGINAL + (1 - bar_alphas[of[t]]) ** 0.5 * draw()
            x = torch.where(KNOWN, noisy, x)
            x = reverse_step(pipe.unet, x, of[t], of[following], bar_alphas, draw())
        actual = pipe(
            IMAGE,
            MASK,
            num_inference_steps=num_steps,
            jump_length=jump_length,
            jump_n_sample=jump_n_sample,
            generator=seeded(5),
            output_type="latent",
        ).images
        expected = torch.where(KNOWN, ORIGINAL, x)
        assert expected[..., REPAINTED].std() > 0.1
        torch.testing.assert_close(actual.double(), expected, **TOLERANCE)

    def test_defaults(self):
        assert inspect.signature(ADMInpaintPipeline.__call__).parameters["jump_length"].default == 5
        for steps, expected in ((12, 12 + (DEFAULT_JUMP_N_SAMPLE - 1) * 2 * 5), (5, 5)):  # 5 are too few to jump 5
            pipe = make_pipeline()
            recorder = Recorder(pipe)
            pipe(IMAGE, MASK, num_inference_steps=steps)
            assert len(recorder.samples) == pipe.num_timesteps == expected
        for trained, name in ((7, OURS), (3, "DPMSolverMultistepScheduler")):
            pipe = make_pipeline(random_unet(in_channels=trained))
            swap(pipe, name, {})
            pipe(IMAGE, MASK, num_inference_steps=15)
            assert pipe.num_timesteps == 15

    @pytest.mark.parametrize("name, options", EACH)
    def test_who_can_jump(self, name, options):
        pipe = make_pipeline()
        swap(pipe, name, options)
        arguments = {"num_inference_steps": 4, "jump_length": 2, "jump_n_sample": 2}
        if name in STATELESS:
            pipe(IMAGE, MASK, **arguments)
            assert pipe.num_timesteps == 6
        else:
            with pytest.raises(
                ValueError, match=rf"`jump_n_sample` is 2, but a {name} uses its earlier steps, .*Pass `jump_n_"
            ):
                pipe(IMAGE, MASK, **arguments)

    @pytest.mark.parametrize("name, options", EACH)
    def test_the_network_sees_the_noised_image(self, name, options):
        """As it scales it: sqrt(A) x_0 + sqrt(1 - A) e. By regression on x_0, over 3072 known pixels."""
        pixels = random_pixels(size=32, seed=2)
        repainted = torch.zeros(32, 32, dtype=torch.bool)
        repainted[3, 4] = True
        pipe = make_pipeline()
        swap(pipe, name, options)
        recorder = Recorder(pipe)
        pipe(pixels, repainted, height=32, width=32, num_inference_steps=5, jump_n_sample=1, generator=seeded())
        bar_alphas = torch.from_numpy(bar_alphas_of("linear"))
        original = (pixels.double() / 127.5 - 1)[..., ~repainted].flatten()
        for sample, t in zip(recorder.samples, recorder.timesteps, strict=True):
            neighbours = torch.logit(bar_alphas[int(t) : int(t) + 2])
            bar_alpha = torch.sigmoid(torch.lerp(neighbours[0], neighbours[-1], t - int(t)))
            seen = sample.double()[..., ~repainted].flatten()
            signal = (seen @ original) / (original @ original)
            std = (seen - signal * original).std()
            assert abs(signal - bar_alpha.sqrt()) < 4 * std / (original @ original).sqrt() + 2e-3
            assert abs(std / (1 - bar_alpha).sqrt() - 1) < 4 / (2 * len(original)) ** 0.5 + 2e-3


class TestTrained:
    @pytest.mark.parametrize("kind", ["trained", "trained to upsample"])
    def test_network_input(self, kind):
        """GLIDE's: x_t, what is known of the image, where it is known, and the small image, bilinearly enlarged."""
        pipe = make_pipeline(random_unet(in_channels=KINDS[kind]))
        recorder = Recorder(pipe)
        pipe(IMAGE, MASK, num_inference_steps=3, generator=seeded(2), **low_res_of(kind))
        mask = KNOWN.double()[None, None]
        expected = [ORIGINAL * mask, mask]
        if kind == "trained to upsample":
            low_res = random_pixels(size=4, seed=7).double() / 127.5 - 1
            expected.append(F.interpolate(low_res, (8, 8), mode="bilinear", align_corners=False))
        expected = torch.cat(expected, dim=1)
        for sample in recorder.samples:
            torch.testing.assert_close(sample[:, 3:].double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(recorder.samples[0][:, :3], torch.randn(1, 3, 8, 8, generator=seeded(2)))

    @pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
    def test_equals_sampling_with_a_corrected_x_0(self, guidance_scale):
        """OpenAI's notebook: `p_sample` with a `denoised_fn` that sets the known part of x_0, before it is clipped."""
        unet = random_unet(in_channels=7, **CONDITIONAL)
        pipe = make_pipeline(unet)
        mask = KNOWN.double()
        seen = torch.cat([ORIGINAL * mask, mask[None, None]], dim=1)
        bar_alphas = bar_alphas_of("linear")

        class Guided:
            def __call__(self, x, t):
                cond, uncond = (unet(x, t, torch.tensor([label])).sample for label in (2, 4))
                epsilon = uncond[:, :3] + guidance_scale * (cond[:, :3] - uncond[:, :3])
                return UNet2DOutput(sample=torch.cat([epsilon, cond[:, 3:]], dim=1))

        generator = seeded(4)
        x = torch.randn(1, 3, 8, 8, generator=generator).double()
        timesteps = list(range(875, -1, -125))
        for t, previous in zip(timesteps, [*timesteps[1:], -1], strict=True):
            noise = torch.randn(1, 3, 8, 8, generator=generator).double()
            correct = lambda original: original * (1 - mask) + ORIGINAL * mask  # noqa: E731
            x = reverse_step(Guided(), x, t, previous, bar_alphas, noise, seen, correct)
        actual = pipe(
            IMAGE,
            MASK,
            class_labels=2,
            guidance_scale=guidance_scale,
            num_inference_steps=8,
            generator=seeded(4),
            output_type="latent",
        ).images
        assert x[..., REPAINTED].std() > 0.1
        torch.testing.assert_close(actual.double(), torch.where(KNOWN, ORIGINAL, x), **TOLERANCE)
        # The last step leads to x_0, which is the image where that is known, even without the paste.
        torch.testing.assert_close(x[..., KNOWN], ORIGINAL[..., KNOWN], rtol=0, atol=1e-9)

    @pytest.mark.parametrize("name", [OURS, "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
    def test_x_0_is_the_image_where_that_is_known(self, name, prediction_type, monkeypatch):
        """Of each step, for each kind of prediction, as the scheduler itself understands it."""
        pipe = make_pipeline(
            random_unet(in_channels=7), LearnedVarianceDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
        )
        swap(pipe, name, {})
        found = []
        if name == "DPMSolverMultistepScheduler":  # which tells of x_0 in this way
            convert = pipe.scheduler.__class__.convert_model_output

            def step(self, *args, **kwargs):
                found.append(convert(self, *args, **kwargs))
                return found[-1]

            changed = type("Watched", (pipe.scheduler.__class__,), {"convert_model_output": step})
        else:
            plain = pipe.scheduler.__class__.step

            def step(self, *args, **kwargs):
                output = plain(self, *args, **kwargs)
                found.append(output.pred_original_sample)
                return output

            # Its signature tells the pipeline what it may pass on.
            step.__signature__ = inspect.signature(plain)
            changed = type("Watched", (pipe.scheduler.__class__,), {"step": step})
        pipe.scheduler.__class__ = changed
        monkeypatch.setattr(pipeline_adm, "copy_for_call", lambda scheduler, *_: scheduler)
        monkeypatch.setattr(pipeline_adm, "takes_variance", lambda scheduler: name == OURS)
        if name == "DPMSolverMultistepScheduler":
            pipe.scheduler.register_to_config(variance_type=None)
        pipe(IMAGE, MASK, num_inference_steps=4, generator=seeded())
        assert len(found) == 4
        for original in found:
            torch.testing.assert_close(original[..., KNOWN].double(), ORIGINAL[..., KNOWN], rtol=0, atol=1e-4)

    def test_exact_prediction(self):
        generator = seeded()
        x_0, noise = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        signal, std = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
        sample = signal * x_0 + std * noise
        expected = {"epsilon": noise, "sample": x_0, "v_prediction": signal * noise - std * x_0}
        for prediction_type, prediction in expected.items():
            torch.testing.assert_close(exact_prediction(sample, x_0, signal, std, prediction_type), prediction)


# 4. A Gaussian, for which everything is known


class GaussianUNet(ModelMixin, ConfigMixin):
    """E[e | x_t] for pairs of neighbouring pixels with a covariance, each pair on its own; one channel."""

    @register_to_config
    def __init__(self, in_channels=1, out_channels=1, sample_size=(1, 2), block_out_channels=(1,)):
        super().__init__()
        self.dummy = torch.nn.Parameter(torch.zeros(1))  # tells the pipeline the dtype
        self.covariance, self.bar_alphas = None, None

    def forward(self, sample, timestep, class_labels=None):
        t = float(timestep)
        bar_alpha = self.bar_alphas[int(t)]
        if t != int(t):  # some solvers ask between two timesteps, and expect log(sigma) to be linear there
            bar_alpha = torch.sigmoid(torch.lerp(*torch.logit(self.bar_alphas[int(t) : int(t) + 2]), t - int(t)))
        x = sample.double().reshape(-1, 2)
        noisy = bar_alpha * self.covariance + (1 - bar_alpha) * torch.eye(2, dtype=torch.float64)
        original = bar_alpha.sqrt() * x @ torch.linalg.solve(noisy, self.covariance)
        epsilon = (x - bar_alpha.sqrt() * original) / (1 - bar_alpha).sqrt()
        return UNet2DOutput(sample=epsilon.reshape(sample.shape).to(sample.dtype))


def gaussian_pipeline(covariance, number: int, scheduler=None) -> ADMInpaintPipeline:
    unet = GaussianUNet(sample_size=(number, 2))
    unet.covariance = torch.tensor(covariance, dtype=torch.float64)
    unet.bar_alphas = torch.from_numpy(bar_alphas_of("cosine"))
    config = {"beta_schedule": "cosine", "variance_type": "fixed_small", "clip_sample": False}
    return make_pipeline(unet, scheduler or LearnedVarianceDDPMScheduler(**config))


class TestGaussian:
    def test_resampling_brings_the_known_part_to_bear(self):
        """Given a, b is Gaussian about rho * a with the variance s^2 (1 - rho^2), if both have the variance s^2."""
        number, rho, s = 8192, 0.9, 0.4
        pipe = gaussian_pipeline([[s**2, rho * s**2], [rho * s**2, s**2]], number)
        known = torch.linspace(0.05, 0.95, number, dtype=torch.float32)
        image = torch.stack([known, torch.full_like(known, 0.5)], dim=1)[None]
        mask = torch.tensor([0.0, 1.0]).expand(1, number, 2)
        a = 2 * known.double() - 1
        distances = []
        for jump_n_sample in (1, 3, 10):
            drawn = pipe(
                image,
                mask,
                num_inference_steps=50,
                jump_length=1,
                jump_n_sample=jump_n_sample,
                generator=seeded(),
                output_type="latent",
            ).images
            b = drawn[0, 0, :, 1].double()
            distances.append(rho - float((a @ b) / (a @ a)))
        error = s * (1 - rho**2) ** 0.5 / float((a @ a).sqrt())  # standard error of a slope: 0.0037
        # Replacement alone leaves out a third of the regression. Resampling brings it back, but for the steps' bias.
        assert distances[0] > 0.25
        assert 0.05 < distances[1] < 0.15
        assert abs(distances[2]) < 0.02 + 4 * error

    @pytest.mark.parametrize("name, options", EACH)
    def test_strength(self, name, options):
        """
        All is repainted, from the middle of the chain on. From x_t the deterministic samplers must come to where the
        flow of a Gaussian leads (each quantile to its own); the others to a draw from p(x_0 | x_t).
        """
        number, s, steps = 2048, 0.3, 50 if name == "TCDScheduler" else 60  # which takes no more
        pipe = gaussian_pipeline([[s**2, 0.0], [0.0, s**2]], number)
        options = {**options} or ({"variance_type": "fixed_small"} if name.startswith("DDPM") else {})
        if "variance_type" in options and not name.startswith("DDPM"):
            options.pop("variance_type")
        swap(pipe, name, options)
        image = torch.rand(1, number, 2, generator=seeded(1))
        arguments = {"num_inference_steps": steps, "generator": seeded(2), "output_type": "latent"}
        if name in SCHEDULERS_WITHOUT_STRENGTH:
            with pytest.raises(ValueError, match=f"`strength` is 0.5, but a {name} cannot start in the middle"):
                pipe(image, torch.ones(1, number, 2), strength=0.5, **arguments)
            return
        recorder = Recorder(pipe)
        drawn = pipe(image, torch.ones(1, number, 2), strength=0.5, **arguments).images.double().flatten()
        full = type(pipe.scheduler).from_config(pipe.scheduler.config)
        full.set_timesteps(steps)
        assert recorder.timesteps == full.timesteps[steps // 2 * full.order :].tolist()
        assert pipe.num_timesteps == len(recorder.timesteps)

        x = recorder.samples[0].double().flatten()
        t = recorder.timesteps[0]
        bar_alpha = torch.sigmoid(torch.lerp(*torch.logit(pipe.unet.bar_alphas[int(t) : int(t) + 2]), t - int(t)))
        start = 2 * image.double().flatten() - 1
        expected = bar_alpha.sqrt() * start
        assert abs(((x - expected) / (1 - bar_alpha).sqrt()).std() - 1) < 4 / (4 * number) ** 0.5
        assert abs((x @ start) / (start @ start) - bar_alpha.sqrt()) < 4 * ((1 - bar_alpha) / (start @ start)).sqrt()

        noisy_variance = bar_alpha * s**2 + 1 - bar_alpha
        is_stochastic = name in (*STOCHASTIC, OURS) or options.get("algorithm_type", "").startswith("sde")
        if is_stochastic:
            mean, std = bar_alpha.sqrt() * s**2 / noisy_variance * x, (s**2 * (1 - bar_alpha) / noisy_variance).sqrt()
            rest = drawn - mean
            assert abs(rest.mean()) < 4 * std / (2 * number) ** 0.5
            assert abs(rest.std() / std - 1) < 0.1  # after 30 steps: 0.08 with the variance beta_tilde
        else:
            flow = s / noisy_variance.sqrt() * x
            assert (drawn - flow).square().mean().sqrt() / flow.std() < 0.05  # after 30 steps: 0.04 for Euler and DDIM


# 5. Other parts of the pipeline


class TestCall:
    def test_images_and_masks_are_paired(self):
        pixels = random_pixels(2)
        masks = torch.stack([REPAINTED, REPAINTED.flip(0)])
        arguments = {"num_inference_steps": 3, "jump_n_sample": 1, "output_type": "latent"}
        pipe = make_pipeline(random_unet(in_channels=7, **CONDITIONAL))
        generators = [seeded(i) for i in range(4)]
        batch = pipe(
            pixels, masks, class_labels=[1, 2], num_images_per_prompt=2, generator=generators, **arguments
        ).images
        assert batch.shape == (4, 3, 8, 8)
        for row, seed in enumerate(range(4)):
            single = pipe(
                as_pil(pixels[row // 2]),
                masks[row // 2].numpy(),
                class_labels=1 + row // 2,
                generator=seeded(seed),
                **arguments,
            ).images[0]
            torch.testing.assert_close(single, batch[row], rtol=1e-3, atol=1e-3)

    def test_one_image_for_several_draws(self):
        pipe = make_pipeline(random_unet(**CONDITIONAL))
        images = pipe(IMAGE, MASK, class_labels=[0, 1, 2], num_inference_steps=2).images
        assert len(images) == 3
        assert len(pipe(IMAGE, MASK, batch_size=2, class_labels=1, num_inference_steps=2).images) == 2
        assert len(pipe([IMAGE, IMAGE], MASK, num_inference_steps=2).images) == 2
        assert len(pipe(IMAGE, [MASK, WHITE], num_inference_steps=2).images) == 2

    def test_generators_of_each_image(self):
        pipe = make_pipeline()
        arguments = {"num_inference_steps": 4, "jump_length": 1, "jump_n_sample": 2, "output_type": "latent"}
        batch = pipe(IMAGE, MASK, batch_size=2, generator=[seeded(1), seeded(2)], **arguments).images
        for seed, image in zip((1, 2), batch, strict=True):
            single = pipe(IMAGE, MASK, generator=seeded(seed), **arguments).images[0]
            torch.testing.assert_close(single, image, rtol=1e-3, atol=1e-3)
        state = torch.get_rng_state()
        pipe(IMAGE, MASK, generator=seeded(), **arguments)
        assert torch.equal(torch.get_rng_state(), state)

    def test_callback(self):
        pipe = make_pipeline()
        told = []

        def callback(pipe, index, t, kwargs):
            told.append((index, int(t)))
            if index == 4:
                pipe._interrupt = True
            return {"latents": kwargs["latents"]}

        pipe(IMAGE, MASK, num_inference_steps=4, jump_length=1, jump_n_sample=2, callback_on_step_end=callback)
        walk = resampling_walk(4, 1, 2)
        assert pipe.num_timesteps == len(walk) == 7
        assert told == [(i, [750, 500, 250, 0][index]) for i, index in enumerate(walk[:5])]

    def test_guidance_by_prompt(self):
        pipe = make_pipeline(
            random_text_unet("added_kv", in_channels=7),
            text_encoder=random_text_encoder("t5"),
            tokenizer=toy_tokenizer("t5"),
        )
        recorder = Recorder(pipe)
        arguments = {"num_inference_steps": 2, "output_type": "latent"}
        guided = pipe(IMAGE, MASK, prompt="a red cat", guidance_scale=3.0, generator=seeded(), **arguments).images
        assert all(sample.shape == (2, 7, 8, 8) for sample in recorder.samples)
        assert all(torch.equal(*sample) for sample in recorder.samples)
        other = pipe(
            IMAGE, MASK, "a red cat", guidance_scale=3.0, negative_prompt="green", generator=seeded(), **arguments
        ).images
        assert (guided - other)[..., REPAINTED].abs().max() > 1e-3

    @pytest.mark.parametrize("channels", [3, 7])
    @pytest.mark.parametrize("name", [OURS, "DDIMScheduler", "DPMSolverMultistepScheduler"])
    def test_classifier_guidance(self, channels, name):
        pipe = make_pipeline(random_unet(in_channels=channels), classifier=random_classifier())
        swap(pipe, name, {})
        arguments = {"class_labels": 1, "num_inference_steps": 3, "jump_n_sample": 1, "output_type": "latent"}
        plain, steered = (
            pipe(IMAGE, MASK, classifier_guidance_scale=scale, generator=seeded(), **arguments).images
            for scale in (0.0, 30.0)
        )
        assert (plain - steered)[..., REPAINTED].abs().max() > 1e-3

    def test_known_pixels_are_not_steered(self):
        pipe = make_pipeline(random_unet(in_channels=7), classifier=random_classifier())
        seen = []
        step = LearnedVarianceDDPMScheduler.step
        pipe.scheduler.step = lambda *args, guidance_gradient=None, generator=None: (
            seen.append(guidance_gradient)
            or step(pipe.scheduler, *args, guidance_gradient=guidance_gradient, generator=generator)
        )
        pipe(IMAGE, MASK, class_labels=1, classifier_guidance_scale=5.0, num_inference_steps=2)
        for gradient in seen:
            assert (gradient[..., KNOWN] == 0).all()
            assert gradient[..., REPAINTED].abs().max() > 0

    @pytest.mark.parametrize("channels", [3, 7])
    def test_nothing_in_the_loop_waits_for_the_device(self, channels):
        """On the meta device no number can be read; whatever would stall a GPU raises an error."""
        pipe = make_pipeline(random_unet(in_channels=channels)).to("meta")
        for eta in (None, 0.5):
            images = pipe(IMAGE, MASK, eta=eta, num_inference_steps=4, jump_length=2, output_type="latent").images
            assert images.device.type == "meta"

    def test_half_precision(self):
        """Known pixels come back exactly from a network in bfloat16, too."""
        pipe = make_pipeline(random_unet(in_channels=7).to(torch.bfloat16))
        (drawn,) = pipe(IMAGE, MASK, num_inference_steps=3, output_type="pt").images
        assert drawn.dtype == torch.float32
        assert torch.equal(drawn[:, KNOWN], PIXELS[0].float()[:, KNOWN] / 255)

    def test_one_channel(self):
        pipe = make_pipeline(
            random_unet(in_channels=3, out_channels=1), LearnedVarianceDDPMScheduler(variance_type="fixed_small")
        )
        assert (pipe.sample_channels, pipe.is_trained_to_inpaint) == (1, True)
        grey = IMAGE.convert("L")
        (drawn,) = pipe(grey, MASK, num_inference_steps=2).images
        assert drawn.mode == "L"
        assert (np.array(drawn) == np.array(grey))[KNOWN.numpy()].all()

    def test_another_size(self):
        pixels = random_pixels(size=16)
        mask = torch.ones(16, 16)
        with pytest.raises(ValueError, match=re.escape("`image` is 16 x 16 pixels (width x height), but 8 x 8 are")):
            make_pipeline()(pixels, mask)
        assert make_pipeline()(pixels, mask, height=16, width=16, num_inference_steps=2).images[0].size == (16, 16)
        unsized = make_pipeline(random_unet(sample_size=None))
        assert unsized(pixels, mask, num_inference_steps=2).images[0].size == (16, 16)

    def test_documented_arguments(self):
        check_documented_arguments(ADMInpaintPipeline.__call__.__doc__, ADMInpaintPipeline.__call__)
        added = set(inspect.signature(ADMInpaintPipeline.__call__).parameters)
        assert set(inspect.signature(ADMPipeline.__call__).parameters) <= added


class TestLatents:
    @pytest.fixture
    def vae(self):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            latent_channels=4,
            scaling_factor=0.5,
        )
        return fill_randomly(vae)

    @pytest.mark.parametrize("channels", [4, 9])
    def test_mask_of_latents(self, vae, channels):
        """A latent is known if all of its pixels are; pixels are kept one by one."""
        unet, layout = random_unet(in_channels=channels, out_channels=8), None if channels == 4 else "glide"
        pipe = make_pipeline(unet, vae=vae, inpainting_layout=layout)
        pixels = random_pixels(size=16)
        repainted = torch.zeros(16, 16, dtype=torch.bool)
        repainted[3, 5] = True
        repainted[8:12, 2:9] = True
        recorder = Recorder(pipe)
        arguments = {"num_inference_steps": 3, "jump_n_sample": 1}
        (drawn,) = pipe(pixels, repainted, output_type="pt", generator=seeded(), **arguments).images
        assert torch.equal(drawn[:, ~repainted], (pixels[0].float() / 255)[:, ~repainted])
        assert rounding_errors(drawn[:, repainted], (pixels[0].float() / 255)[:, repainted]) > SAMPLING
        known = torch.ones(8, 8, dtype=torch.bool)
        known[1, 2] = False
        known[4:6, 1:5] = False
        latents = pipe(pixels, repainted, output_type="latent", generator=seeded(), **arguments).images[0]
        with torch.no_grad():
            expected = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mode()[0] * 0.5
        torch.testing.assert_close(latents[:, known], expected[:, known])
        assert (latents - expected)[:, ~known].abs().min() > 0
        if channels == 9:
            sample = recorder.samples[0][0]
            assert torch.equal(sample[8], known.float())
            with torch.no_grad():
                masked = (pixels.float() / 127.5 - 1) * ~repainted
                shown = vae.encode(masked).latent_dist.mode()[0] * 0.5
            torch.testing.assert_close(sample[4:8], shown * known)

    def test_enlarging_is_done_in_pixels(self, vae):
        with pytest.raises(ValueError, match=r"`unet` upsamples and inpaints \(`in_channels=13`\), .*Pass `vae=None`"):
            make_pipeline(random_unet(in_channels=13, out_channels=8), vae=vae)


class TestSaved:
    def test_loads_by_its_name(self, tmp_path):
        pipe = make_pipeline(random_unet(in_channels=7, **CONDITIONAL), id2label={0: "cat"})
        pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert type(loaded) is ADMInpaintPipeline
        assert loaded.id2label == {0: "cat"}
        loaded.set_progress_bar_config(disable=True)
        arguments = {"class_labels": 1, "num_inference_steps": 2, "output_type": "pt"}
        actual, expected = (p(IMAGE, MASK, generator=seeded(), **arguments).images for p in (loaded, pipe))
        assert rounding_errors(actual, expected) <= SAMPLING

    def test_from_a_pipeline_that_draws(self, tmp_path):
        plain = make_pipeline(cls=ADMPipeline)
        plain.save_pretrained(tmp_path)
        for pipe in (
            ADMInpaintPipeline.from_pretrained(tmp_path),
            ADMInpaintPipeline.from_pipe(plain),
            ADMInpaintPipeline(**plain.components),
        ):
            assert type(pipe) is ADMInpaintPipeline
            assert not pipe.is_trained_to_inpaint


# 6. Bad input


class TestRefused:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"strength": 0.0}, r"`strength` is 0\.0; it must lie in \(0, 1\]: 1 starts from noise"),
            ({"strength": 1.5}, r"`strength` is 1\.5; it must lie in"),
            ({"strength": float("nan")}, r"`strength` is nan; it must lie in"),
            ({"strength": 0.1, "num_inference_steps": 5}, r"`strength` is 0\.1, which leaves none of 5 steps.* 0\.2"),
            ({"jump_length": 0}, r"`jump_length` is 0; pass an integer of at least 1"),
            ({"jump_n_sample": 0}, r"`jump_n_sample` is 0; pass an integer of at least 1"),
            ({"jump_n_sample": 2.0}, r"`jump_n_sample` is 2\.0; pass an integer"),
            (
                {"jump_n_sample": 2, "num_inference_steps": 5},
                r"`jump_length` is 5, but there are only 5 steps to jump back over",
            ),
            ({"mask_image": PIL.Image.new("L", (8, 4))}, r"`mask_image` is 8 x 4 pixels .*, but `image` is 8 x 8"),
            ({"image": PIL.Image.new("RGB", (9, 8))}, r"`image` is 9 x 8 pixels .*, but 8 x 8 are generated. Resize"),
            (
                {"image": np.zeros((9, 9, 3)), "mask_image": np.zeros((9, 9)), "height": 9, "width": 9},
                r"`height` and `width` are 9 and 9",
            ),
            (
                {"image": PIL.Image.new("CMYK", (8, 8))},
                r"`image` has mode CMYK, but this model's images have 3 channels",
            ),
            ({"image": PIL.Image.new("RGBA", (8, 8))}, r"`image` has mode RGBA and transparent pixels"),
            ({"image": np.full((8, 8, 3), 1.5)}, r"`image` has values from 1\.5 to 1\.5; they must lie in \[0, 1\]"),
            ({"mask_image": np.full((8, 8), 255.0)}, r"`mask_image` has values from 255 to 255; they must lie in"),
            ({"low_res_image": IMAGE}, r"`low_res_image` was given, but this U-Net does not take one. Leave it out"),
            (
                {"image": [IMAGE] * 2, "mask_image": [MASK] * 3},
                r"different numbers of images, .*`image` holds 2, `mask_image` holds 3",
            ),
            ({"image": [IMAGE] * 2, "batch_size": 3}, r"`image` holds 2, `batch_size` is 3"),
            ({"generator": [seeded()] * 2}, r"`generator` is a list of 2 for 1 images"),
            ({"guidance_scale": 2.0}, r"`guidance_scale` is 2\.0, but this model has no null class"),
            ({"output_type": "jpg"}, r"`output_type` is 'jpg'"),
        ],
    )
    def test_arguments(self, arguments, message):
        pipe = make_pipeline()
        recorder = Recorder(pipe)
        with pytest.raises(ValueError, match=message):
            pipe(**{"image": IMAGE, "mask_image": MASK, **arguments})
        assert not recorder.samples

    def test_numbers_of_classes(self):
        pipe = make_pipeline(random_unet(**CONDITIONAL))
        with pytest.raises(ValueError, match="`class_labels` holds 3, `image` holds 2"):
            pipe([IMAGE] * 2, MASK, class_labels=[0, 1, 2])

    def test_small_images(self):
        pipe = make_pipeline(random_unet(in_channels=10))
        with pytest.raises(ValueError, match="`low_res_image` is missing: this U-Net upsamples and inpaints"):
            pipe(IMAGE, MASK)
        with pytest.raises(ValueError, match="`low_res_image` is 16 x 16 pixels .*, larger than `image` with 8 x 8"):
            pipe(IMAGE, MASK, low_res_image=PIL.Image.new("RGB", (16, 16)))

    @pytest.mark.parametrize("channels", [4, 5, 8])
    def test_other_u_nets(self, channels):
        message = f"`unet` has `in_channels={channels}` and `out_channels=6`. `ADMInpaintPipeline` needs"
        with pytest.raises(ValueError, match=message):
            make_pipeline(random_unet(in_channels=channels))

    def test_a_pipeline_that_draws_refuses_a_network_that_inpaints(self):
        """An `ADMPipeline` knows nothing to show to a network that was trained to inpaint."""
        with pytest.raises(ValueError, match="`in_channels=7`"):
            make_pipeline(random_unet(in_channels=7), DDIMScheduler(), cls=ADMPipeline)
