"""
Bits per dimension: against the truth for Gaussian data, against the papers' equations written out in float64, over
batches and processes, and as the command that people run.
"""

import importlib
import inspect
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from analytic_distributions import BETAS, Gaussian, OptimalNetwork, cumulative_alphas
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from processes import run_distributed
from tolerances import NETWORK, rounding_errors
from torch.testing import assert_close
from toy_models import CONDITIONAL, random_diffusers_unet, random_unet

from diffusers_adm import ADMPipeline, LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.evaluation import BitsPerDim, bits_per_dim
from diffusers_adm.evaluation.bits_per_dim.__main__ import main
from diffusers_adm.measures import bound
from diffusers_adm.training import ImageDataset, load_image_dataset


REPOSITORY = Path(__file__).resolve().parents[2]
EMOJI = str(REPOSITORY / "data" / "noto-emoji-32" / "test.parquet")  # 163 images in 9 classes
LEVELS = 2 * torch.arange(256, dtype=torch.float64) / 255 - 1


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch):
    """Accelerate's singletons are put back."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def random_images(number, size=8, seed=0, dtype=torch.float32):
    levels = torch.randint(0, 256, (number, 3, size, size), generator=torch.Generator().manual_seed(seed))
    return levels.to(dtype) / 127.5 - 1


def evaluate(unet, scheduler, data, **options):
    return bits_per_dim(unet, scheduler, data, progress_bar=False, **options)


def short_scheduler(steps=6, **config):
    return LearnedVarianceDDPMScheduler(**{"num_train_timesteps": steps, "beta_end": 0.2, **config})


def pairs(images, labels):
    return torch.utils.data.TensorDataset(images, torch.tensor(labels))


# 1. The truth


class TestGaussian:
    """
    Gaussian data snapped to 256 or more levels, or not at all, and the network that is optimal for them: the bound is
    the true number of bits (see tests/schedulers/test_analytic_sampling.py). A "channel" is a pixel of its own.
    """

    pixels = 2**12

    @staticmethod
    def true_bits(std, num_levels=256):
        """Entropy of N(0, std^2) whose mass is collected in bins, the outer ones reaching to infinity."""
        if num_levels is None:
            return math.log2(std * math.sqrt(2 * math.pi * math.e))
        infinity = torch.tensor([math.inf], dtype=torch.float64)
        levels = torch.linspace(-1, 1, num_levels, dtype=torch.float64)
        edges = torch.cat([-infinity, levels[:-1] + 1 / (num_levels - 1), infinity])
        probabilities = torch.special.ndtr(edges / std).diff()
        return -torch.xlogy(probabilities, probabilities).sum().item() / math.log(2)

    @staticmethod
    def snapped(std, normal, num_levels=256):
        half = (num_levels - 1) / 2
        return (((std * normal).clamp(-1, 1) + 1) * half).round() / half - 1

    @staticmethod
    def network(std, kept, num_levels=256):
        # Snapping adds the variance of a uniform bin to the data; the decoder's bins add it again to the last step.
        bin_variance = 0 if num_levels is None else (2 / (num_levels - 1)) ** 2 / 12
        data = Gaussian(mean=[0.0], std=[math.sqrt(std**2 + bin_variance)])
        return OptimalNetwork(data, BETAS["linear"](1000), kept, first_variance_offset=-bin_variance)

    @pytest.mark.parametrize(
        "std,num_levels", [(0.25, 256), (0.1, 256), (0.25, 4096), (0.25, 65536), (0.25, None), (0.1, None)]
    )
    def test_full_chain_equals_the_entropy(self, std, num_levels, monkeypatch):
        """Of continuous data, the differential entropy, which is negative for the narrower ones."""
        # A low-discrepancy set of pairs (x_0, noise), its noise shifted at each timestep: 4096 pixels then tell the
        # bound to 0.003 bits, where random numbers leave 0.02.
        points = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(self.pixels, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        shifts = torch.rand(1000, generator=generator, dtype=torch.float64)

        def noise(shape, seed, places, device):
            shifted = torch.stack([(points[:, 1] + shifts[timestep]) % 1 for _, timestep in places])
            return torch.special.ndtri(shifted.clamp(1e-9, 1 - 1e-9)).reshape(len(places), *shape).float()

        monkeypatch.setattr(bound, "_draw_noise", noise)
        normal = torch.special.ndtri(points[:, 0])
        values = (std * normal).clamp(-1, 1) if num_levels is None else self.snapped(std, normal, num_levels)
        images = values.float().reshape(1, self.pixels, 1, 1)
        scheduler = LearnedVarianceDDPMScheduler(clip_sample=False)
        network = self.network(std, range(1000), num_levels)
        result = evaluate(network, scheduler, images, num_levels=num_levels)
        assert result.bits_per_dim == pytest.approx(self.true_bits(std, num_levels), abs=0.01)
        if num_levels is None:
            return
        # Known wrong: without the last tenth of the chain's terms, or with one twice.
        assert result.terms[0, 900:].sum() < 0.01  # the truth has no bits there ...
        assert result.decoder.item() > 0.5  # ... but here

    def test_respaced_chain_with_its_own_noise_within_its_own_standard_errors(self):
        std, generator = 0.25, torch.Generator().manual_seed(0)
        images = self.snapped(std, torch.randn(64, 256, 1, 1, generator=generator))
        scheduler = LearnedVarianceDDPMScheduler(clip_sample=False)
        scheduler.set_timesteps(timestep_respacing="50")
        network = self.network(std, scheduler.timesteps.tolist()[::-1])
        result = evaluate(network, scheduler, images, timestep_respacing="50")
        # The entropy of one pixel's code is about one bit in standard deviation, over 64 * 256 pixels.
        assert 0.004 < result.standard_error < 0.02
        assert abs(result.bits_per_dim - self.true_bits(std)) < 4 * result.standard_error


# 2. The equations


class Recorder:
    """A class-conditional network that notes what it is called with. Labels tell which image a row belongs to."""

    def __init__(self, unet):
        self.unet, self.config, self.dtype = unet, unet.config, unet.dtype
        self.calls = {}
        self.batches = []

    def __call__(self, sample, timestep, class_labels):
        output = self.unet(sample, timestep, class_labels=class_labels).sample
        self.batches.append(len(sample))
        for row, key in enumerate(zip(class_labels.tolist(), timestep.tolist(), strict=True)):
            assert key not in self.calls, "an image was evaluated twice at one timestep"
            self.calls[key] = sample[row], output[row]
        return output


def term_by_hand(image, noisy, output, kept_alphas_cumprod, i, variance_type, prediction_type, clip):
    """Improved DDPM, eqs. 4 to 7, with DDPM's eqs. 7 and 13, for one image at the i-th timestep of a chain."""
    previous = [1.0, *kept_alphas_cumprod]
    betas = [1 - now / before for before, now in zip(previous, kept_alphas_cumprod, strict=False)]
    tildes = [
        beta * (1 - before) / (1 - now) for beta, before, now in zip(betas, previous, kept_alphas_cumprod, strict=False)
    ]
    now, before, beta = kept_alphas_cumprod[i], previous[i], betas[i]
    tilde = tildes[max(i, 1)]
    prediction, variance_output = output[:3], output[3:]
    x_0 = {
        "epsilon": lambda: (noisy - math.sqrt(1 - now) * prediction) / math.sqrt(now),
        "sample": lambda: prediction,
        "v_prediction": lambda: math.sqrt(now) * noisy - math.sqrt(1 - now) * prediction,
    }[prediction_type]()
    if clip:
        x_0 = x_0.clamp(-1, 1)
    log_variance = {
        "learned_range": lambda: (
            (variance_output + 1) / 2 * math.log(beta) + (1 - variance_output) / 2 * math.log(tilde)
        ),
        "learned_log": lambda: variance_output,
        "fixed_small": lambda: torch.full_like(x_0, math.log(tilde)),
        "fixed_large": lambda: torch.full_like(x_0, math.log(beta if i > 0 else tilde)),
    }[variance_type]()

    def posterior_mean(x):
        return math.sqrt(before) * beta / (1 - now) * x + math.sqrt(1 - beta) * (1 - before) / (1 - now) * noisy

    if i > 0:
        variance = log_variance.exp()
        squares = (posterior_mean(image) - posterior_mean(x_0)) ** 2
        nats = 0.5 * (tilde / variance - 1 + squares / variance + log_variance - math.log(tilde))
    else:

        def cdf(x):  # the approximation that published numbers are computed with
            z = (x - posterior_mean(x_0)) / (0.5 * log_variance).exp()
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

        upper = torch.where(image > 0.999, torch.ones_like(image), cdf(image + 1 / 255))
        lower = torch.where(image < -0.999, torch.zeros_like(image), cdf(image - 1 / 255))
        nats = -torch.log((upper - lower).clamp(min=1e-12))
    error = ((image - x_0) ** 2).mean()
    predicted_noise = (noisy - math.sqrt(now) * x_0) / math.sqrt(1 - now)
    noise = (noisy - math.sqrt(now) * image) / math.sqrt(1 - now)
    return nats.mean() / math.log(2), error, ((noise - predicted_noise) ** 2).mean()


CASES = [
    # variance, prediction, schedule, respacing, clipping
    ("learned_range", "epsilon", "linear", None, True),
    ("learned_range", "v_prediction", "squaredcos_cap_v2", "5", False),
    ("learned_log", "sample", "linear", "3,3", True),
    ("fixed_small", "epsilon", "linear", "ddim6", False),
    ("fixed_large", "v_prediction", "squaredcos_cap_v2", None, True),
]


class TestEquations:
    @pytest.fixture(params=CASES, ids=["-".join(map(str, case)) for case in CASES])
    def evaluated(self, request):
        variance_type, prediction_type, schedule, respacing, clip = request.param
        steps = 12
        betas = [0.01 * 20**0.5 ** (i / 5.5) for i in range(steps)] if schedule == "linear" else BETAS[schedule](steps)
        scheduler = LearnedVarianceDDPMScheduler(
            num_train_timesteps=steps,
            **({"trained_betas": betas} if schedule == "linear" else {"beta_schedule": schedule}),
            variance_type=variance_type,
            prediction_type=prediction_type,
            clip_sample=not clip,  # the argument wins
        )
        learned = variance_type.startswith("learned")
        unet = random_unet(num_class_embeds=5, out_channels=6 if learned else 3).double()
        images = random_images(5, dtype=torch.float64)
        images[0, 0] = -1  # the outer bins
        images[1, 1] = 1
        network = Recorder(unet)
        options = {"timestep_respacing": respacing, "clip_sample": clip, "batch_size": 7}
        return (
            request.param,
            cumulative_alphas(betas),
            images,
            network,
            evaluate(network, scheduler, pairs(images, list(range(5))), **options),
        )

    def test_every_term(self, evaluated):
        (variance_type, prediction_type, _, respacing, clip), alphas_cumprod, images, network, result = evaluated
        kept = {
            None: list(range(12)),
            "5": [0, 3, 6, 8, 11],
            "3,3": [0, 2, 5, 6, 8, 11],
            "ddim6": list(range(0, 12, 2)),
        }
        kept = kept[respacing]
        assert result.timesteps.tolist() == kept
        assert set(network.calls) == set(itertools.product(range(5), kept))
        # Full batches although there are fewer images: only the last one holds the rest.
        assert network.batches == [7] * (5 * len(kept) // 7) + [5 * len(kept) % 7] * (5 * len(kept) % 7 > 0)

        kept_alphas_cumprod = [alphas_cumprod[t] for t in kept]
        expected = torch.empty(3, 5, len(kept), dtype=torch.float64)
        for n, i in itertools.product(range(5), range(len(kept))):
            noisy, output = network.calls[n, kept[i]]
            expected[:, n, i] = torch.stack(
                term_by_hand(images[n], noisy, output, kept_alphas_cumprod, i, variance_type, prediction_type, clip)
            )
        for name, values in zip(("terms", "x0_mse", "epsilon_mse"), expected, strict=True):
            assert_close(getattr(result, name), values, rtol=1e-9, atol=1e-12)

        last = kept_alphas_cumprod[-1]
        prior = 0.5 * (last * images**2 + (1 - last) - 1 - math.log(1 - last)).mean(dim=(1, 2, 3)) / math.log(2)
        assert_close(result.prior, prior, rtol=1e-9, atol=0)
        assert_close(result.total, prior + expected[0].sum(dim=1), rtol=1e-9, atol=0)

    def test_noise_is_standard_normal_and_independent(self, evaluated):
        _, alphas_cumprod, images, network, _ = evaluated
        noise = torch.stack(
            [
                (noisy - math.sqrt(alphas_cumprod[t]) * images[n]) / math.sqrt(1 - alphas_cumprod[t])
                for (n, t), (noisy, _) in network.calls.items()
            ]
        ).flatten(1)  # one row a pair, 192 columns
        count = noise.numel()
        assert noise.mean().abs() < 5 / math.sqrt(count)
        assert (noise.var() - 1).abs() < 5 * math.sqrt(2 / count)
        correlations = noise @ noise.T / noise.shape[1] - torch.eye(len(noise))
        off_diagonal = correlations[~torch.eye(len(noise), dtype=torch.bool)]
        assert off_diagonal.abs().max() < 5.5 / math.sqrt(noise.shape[1])

    def test_a_seed_selects_the_noise(self):
        unet, scheduler, images = random_unet().double(), short_scheduler(), random_images(2, dtype=torch.float64)
        first, again, other = (evaluate(unet, scheduler, images, seed=seed).terms for seed in (0, 0, 1))
        assert_close(first, again, rtol=1e-10, atol=0)
        assert ((first - other).abs() > 1e-6 * first.abs()).all()

    def test_a_chain_within_the_chain_sees_the_same_noise(self):
        unet, scheduler, images = random_unet().double(), short_scheduler(12), random_images(2, dtype=torch.float64)
        full, short = (evaluate(unet, scheduler, images, timestep_respacing=r) for r in (None, "ddim4"))
        assert_close(short.x0_mse, full.x0_mse[:, ::3], rtol=1e-10, atol=0)

    def test_zero_terminal_snr(self):
        scheduler = short_scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
        result = evaluate(random_unet(), scheduler, random_images(2))
        assert torch.isfinite(result.total).all()
        assert result.prior.abs().max() == 0
        assert result.epsilon_mse[:, -1].abs().max() == 0


# 3. Batches and processes


IMAGES = random_images(5, dtype=torch.float64)
LABELS = [0, 3, -1, 1, 2]
FIELDS = ("prior", "terms", "x0_mse", "epsilon_mse")


def assert_same(first, second, rtol=1e-10):
    assert torch.equal(first.timesteps, second.timesteps)
    for name in FIELDS:
        assert_close(getattr(first, name), getattr(second, name), rtol=rtol, atol=1e-12)


def reference(**options):
    """One process, the same for every test below. In float64, so that only an error can make a difference."""
    return evaluate(random_unet(**CONDITIONAL).double(), short_scheduler(), pairs(IMAGES, LABELS), **options)


def evaluate_in_process(number, loader, num_images):
    """The result, as lists, and for which images the network was run in this process."""
    unet = Recorder(random_unet(num_class_embeds=16).double())
    data = pairs(random_images(number, dtype=torch.float64), list(range(number)))
    if loader:
        data = torch.utils.data.DataLoader(data, batch_size=2)
    accelerator = Accelerator(cpu=True)
    result = evaluate(unet, short_scheduler(), data, accelerator=accelerator, batch_size=4, num_images=num_images)
    return {name: getattr(result, name).tolist() for name in FIELDS}, sorted({n for n, _ in unet.calls})


def evaluate_prepared():
    """A network, and then data too, after `accelerator.prepare`: the totals, the mode afterwards, and the error."""
    accelerator = Accelerator(cpu=True)
    unet = accelerator.prepare(random_unet(**CONDITIONAL, dropout=0.5).double().train())
    loader = torch.utils.data.DataLoader(pairs(IMAGES, LABELS), batch_size=2)
    total = evaluate(unet, short_scheduler(), loader, accelerator=accelerator, batch_size=4).total
    error = None
    if accelerator.num_processes > 1:
        with pytest.raises(ValueError, match="prepared data loader") as error:
            evaluate(unet, short_scheduler(), accelerator.prepare(loader), accelerator=accelerator)
    return total.tolist(), unet.training, str(error)


# Uneven shares of a dataset and of a loader; and fewer images than processes.
PROCESS_CASES = [(5, False, None), (7, True, 4), (1, False, None)]


def evaluate_everything():
    return [evaluate_in_process(*case) for case in PROCESS_CASES], evaluate_prepared()


class TestBatchesAndProcesses:
    @pytest.mark.parametrize("batch_size", [1, 3, 5, 1000])
    def test_batch_size_does_not_matter(self, batch_size):
        assert_same(reference(batch_size=batch_size), reference())

    def test_kinds_of_data_do_not_matter(self):
        unet, scheduler = random_unet(**CONDITIONAL).double(), short_scheduler()
        dicts = [{"images": i, "class_labels": label} for i, label in zip(IMAGES, LABELS, strict=True)]
        for data in (
            dicts,
            torch.utils.data.DataLoader(dicts, batch_size=2),
            torch.utils.data.DataLoader(pairs(IMAGES, LABELS), batch_size=3),
            ((IMAGES[i : i + 2], LABELS[i : i + 2]) for i in range(0, 5, 2)),
        ):
            assert_same(evaluate(unet, scheduler, data), reference())

    def test_processes_do_not_matter_and_share_the_work(self):
        alone, (total, training, _) = evaluate_everything()
        assert_close(total, reference().total.tolist())  # dropout was off ...
        assert training  # ... and the network is in training mode again
        everywhere = run_distributed(evaluate_everything, num_processes=3)
        for case, (expected, evaluated) in enumerate(alone):
            for results, _ in everywhere:
                assert_close(results[case][0], expected, rtol=1e-10, atol=1e-12)
            shares = [results[case][1] for results, _ in everywhere]
            assert sorted(itertools.chain(*shares)) == evaluated
            number, _, num_images = PROCESS_CASES[case]
            assert evaluated == list(range(num_images or number))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for _, prepared in everywhere:
            assert_close(prepared[0], total, rtol=1e-10, atol=0)
            assert prepared[1]
            assert "repeats examples" in prepared[2]

    def test_number_of_images(self):
        unet, scheduler, images = random_unet().double(), short_scheduler(2), random_images(20, dtype=torch.float64)
        everything = evaluate(unet, scheduler, images)
        some = evaluate(unet, scheduler, images, num_images=6)
        chosen = [int((everything.prior - prior).abs().argmin()) for prior in some.prior]
        assert_close(some.prior, everything.prior[chosen], rtol=1e-9, atol=0)
        assert chosen == sorted(set(chosen))
        assert chosen != list(range(6))
        # Noise by the position in the data: an image costs what it cost before.
        assert_close(some.total, everything.total[chosen], rtol=1e-10, atol=0)
        assert len(evaluate(unet, scheduler, images, num_images=100).total) == 20
        batches = torch.utils.data.DataLoader(images, batch_size=4)
        assert_close(evaluate(unet, scheduler, batches, num_images=6).prior, everything.prior[:6])

    def test_mixed_precision(self):
        unet, scheduler, images = random_unet(), short_scheduler(), random_images(4)
        exact = evaluate(unet, scheduler, images)
        mixed = evaluate(unet, scheduler, images, accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
        half = evaluate(random_unet().to(torch.bfloat16), scheduler, images)
        for rough in (mixed, half):
            assert rounding_errors(rough.terms, exact.terms.to(rough.terms.dtype)) > NETWORK
            assert_close(rough.terms, exact.terms, rtol=0.05, atol=0.05)
            assert_close(rough.prior, exact.prior, rtol=1e-5, atol=0)

    def test_the_loop_over_timesteps_does_not_wait_for_the_device(self):
        """The "meta" device has no numbers, so whatever waits for them raises: here, the end of the first chunk."""
        calls = []

        class Network:
            device, dtype, config = torch.device("meta"), torch.bfloat16, {"num_class_embeds": 5}

            def __call__(self, sample, timestep, class_labels):
                assert {x.device.type for x in (sample, timestep, class_labels)} == {"meta"}
                assert sample.dtype == torch.bfloat16
                calls.append(len(sample))
                return torch.cat([sample, sample], dim=1)

        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            evaluate(Network(), short_scheduler(), pairs(random_images(4), [0, 1, 2, 3]), batch_size=3)
        assert calls == [3] * 6  # all timesteps of the first three images

    def test_progress_bar(self, capsys):
        bits_per_dim(random_unet(), short_scheduler(), random_images(3))
        assert "18.0/18.0" in capsys.readouterr().err
        bits_per_dim(random_unet(), short_scheduler(), random_images(3), progress_bar=False)
        assert capsys.readouterr().err == ""


# 4. Classes, schedulers, networks


class TestClassesAndNetworks:
    def labels_seen(self, labels, **config):
        unet = random_unet(**config)
        seen = []

        def note(module, args, kwargs):
            seen.append(kwargs.get("class_labels"))

        unet.register_forward_pre_hook(note, with_kwargs=True)
        images = random_images(2)
        evaluate(unet, short_scheduler(1), images if labels is None else pairs(images, labels))
        return None if seen[0] is None else seen[0].tolist()

    def test_labels_reach_the_network(self):
        assert self.labels_seen([3, 0], num_class_embeds=5) == [3, 0]
        assert self.labels_seen([3, -1], **CONDITIONAL) == [3, 4]
        assert self.labels_seen(None, **CONDITIONAL) == [4, 4]
        assert self.labels_seen([3, 0]) is None

    def test_diffusers_unet_with_classes(self):
        unet, images = random_diffusers_unet(num_class_embeds=3).double(), IMAGES[:2]
        ours = random_unet(num_class_embeds=3).double()
        ours.load_state_dict(unet.state_dict())
        data = pairs(images, [2, 1])
        assert_same(
            evaluate(unet, short_scheduler(), data), evaluate(ours, short_scheduler(), data), rtol=1e-6
        )  # their sinusoid is float32
        with pytest.raises(ValueError, match="without a null class"):
            evaluate(unet, short_scheduler(), images)

    def test_a_plain_function_and_a_tuple(self):
        unet, images = random_unet(), random_images(2)
        expected = evaluate(unet, short_scheduler(), images)
        assert_same(evaluate(lambda x, t: unet(x, t).sample, short_scheduler(), images), expected, rtol=1e-4)
        assert_same(
            evaluate(lambda x, t: unet(x, t, return_dict=False), short_scheduler(), images), expected, rtol=1e-4
        )

    @pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
    def test_diffusers_schedulers_are_converted(self, variance_type):
        config = {"num_train_timesteps": 6, "beta_end": 0.2, "variance_type": variance_type}
        unet = random_unet(out_channels=6 if variance_type == "learned_range" else 3).double()
        expected = evaluate(unet, LearnedVarianceDDPMScheduler(**config), IMAGES[:2])
        assert_same(evaluate(unet, DDPMScheduler(**config), IMAGES[:2]), expected)

    def test_ddim_scheduler_has_the_same_process(self):
        unet = random_unet().double()
        expected = evaluate(unet, short_scheduler(clip_sample=False), IMAGES[:2])
        ddim = DDIMScheduler(num_train_timesteps=6, beta_end=0.2, clip_sample=False)
        assert_same(evaluate(unet, ddim, IMAGES[:2]), expected)

    def test_clipping_follows_the_scheduler(self):
        unet, images = random_unet().double(), IMAGES[:2]
        clipped, free = (evaluate(unet, short_scheduler(clip_sample=clip), images) for clip in (True, False))
        assert not torch.allclose(clipped.terms, free.terms, rtol=1e-3)
        assert_same(evaluate(unet, short_scheduler(clip_sample=False), images, clip_sample=True), clipped)
        assert_same(evaluate(unet, short_scheduler(), images, clip_sample=False), free)


# 5. The result


def result_of(terms, prior=None, x0_mse=None):
    terms = torch.tensor(terms, dtype=torch.float64)
    x0_mse = terms + 1 if x0_mse is None else x0_mse
    return BitsPerDim(
        timesteps=torch.arange(terms.shape[1]) * 10,
        prior=torch.zeros(len(terms), dtype=torch.float64) if prior is None else torch.tensor(prior).double(),
        terms=terms,
        x0_mse=x0_mse,
        epsilon_mse=x0_mse / 2,
    )


class TestResult:
    def test_means_and_standard_errors(self):
        terms, prior = np.random.default_rng(0).random((7, 4)), np.arange(7.0)
        result = result_of(terms, prior)
        content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        total = prior + terms.sum(axis=1)
        parts = {"bits_per_dim": total, "prior": prior, "decoder": terms[:, 0], "kl": terms[:, 1:].sum(axis=1)}
        for name, values in parts.items():
            assert content[name] == pytest.approx(values.mean(), rel=1e-12)
            assert content[f"{name}_standard_error"] == pytest.approx(values.std(ddof=1) / 7**0.5, rel=1e-12)
        assert content["bits_per_dim"] == pytest.approx(result.bits_per_dim, rel=1e-12)
        assert content["bits_per_dim_standard_error"] == pytest.approx(result.standard_error, rel=1e-12)
        assert content["bits_per_dim"] == pytest.approx(content["prior"] + content["decoder"] + content["kl"])
        by_timestep = content["by_timestep"]
        assert by_timestep["timestep"] == [0, 10, 20, 30]
        for name, values in (("terms", terms), ("x0_mse", terms + 1), ("epsilon_mse", (terms + 1) / 2)):
            assert by_timestep[name] == pytest.approx(values.mean(axis=0), rel=1e-12)
            assert by_timestep[f"{name}_standard_error"] == pytest.approx(values.std(axis=0, ddof=1) / 7**0.5)
        assert content["num_images"] == 7
        assert content["num_timesteps"] == 4
        assert content["prior"] + sum(by_timestep["terms"]) == pytest.approx(content["bits_per_dim"])

    def test_one_image_has_no_standard_error(self):
        content = json.loads(json.dumps(result_of([[1.0, 2.0]]).to_dict(), allow_nan=False))
        assert content["bits_per_dim"] == 3.0
        assert content["bits_per_dim_standard_error"] is None
        assert content["by_timestep"]["terms_standard_error"] == [None, None]

    @pytest.mark.parametrize(
        "result",
        [
            result_of(np.geomspace(1, 1e-4, 60).reshape(1, -1) * np.random.default_rng(0).random((5, 60))),
            result_of([[1.0, 0.5]]),
            result_of([[1.0], [2.0]]),
            result_of(np.zeros((3, 4)), x0_mse=torch.zeros(3, 4, dtype=torch.float64)),  # nothing for a log axis
        ],
        ids=["many", "one image", "one timestep", "zeros"],
    )
    @pytest.mark.draws
    def test_plot(self, result, tmp_path):
        import matplotlib.pyplot  # here, since the processes above import this file

        path = tmp_path / "bits.png"
        assert result.plot(path) == str(path)
        with Image.open(path) as image:
            assert image.format == "PNG"
            image.load()
            colours = image.convert("RGB").getcolors(maxcolors=2**20)
        assert len(colours) > 20
        assert not matplotlib.pyplot.get_fignums()

    def test_str(self):
        text = str(result_of([[1.0, 2.0], [2.0, 2.0]], prior=[0.5, 0.5]))
        assert text == "4.0000 ± 0.5000 bits/dim (prior 0.500, decoder 1.500, kl 2.000; 2 images, 2 timesteps)"


# 6. Wrong input


class TestErrors:
    @pytest.mark.parametrize("factor,offset", [(127.5, 127.5), (1.01, 0), (math.nan, 0)])
    def test_values_out_of_range(self, factor, offset):
        with pytest.raises(ValueError, match=r"hold values from .* \[-1, 1\]"):
            evaluate(random_unet(), short_scheduler(), random_images(2) * factor + offset)

    def test_values_between_the_levels_are_warned_of(self, caplog):
        evaluate(random_unet(), short_scheduler(1), random_images(2))
        assert not caplog.records
        evaluate(random_unet(), short_scheduler(1), 0.7 * random_images(2))
        assert "256 levels" in caplog.text

    @pytest.mark.parametrize("num_levels", [2, 4096, 65536])
    def test_values_between_other_levels_are_warned_of(self, num_levels, caplog):
        half = (num_levels - 1) / 2
        images = ((random_images(2) + 1) * half).round() / half - 1
        evaluate(random_unet(), short_scheduler(1), images, num_levels=num_levels)
        assert not caplog.records
        evaluate(random_unet(), short_scheduler(1), images * 0.9, num_levels=num_levels)
        assert f"not on the {num_levels} levels 2 * k / {num_levels - 1} - 1" in caplog.text

    @pytest.mark.draws
    def test_continuous_values_have_no_levels(self, caplog, tmp_path):
        result = evaluate(random_unet(), short_scheduler(1), 0.7 * random_images(2), num_levels=None)
        assert not caplog.records
        result.terms[:, 0] = -3  # a density may be that high
        assert str(result.plot(tmp_path / "plot.png")).endswith("plot.png")

    @pytest.mark.parametrize(
        "options,message",
        [
            ({"batch_size": 0}, "`batch_size` is 0"),
            ({"num_images": 0}, "`num_images` is 0"),
            ({"timestep_respacing": "7"}, "holds 6 of the 6 timesteps"),
            ({"scheduler": FlowMatchEulerDiscreteScheduler()}, "FlowMatchEulerDiscreteScheduler"),
            ({"scheduler": short_scheduler(variance_type="fixed_small")}, "takes 3 channels"),
            ({"data": random_images(0)}, "no images"),
            ({"data": iter([])}, "no images"),
            ({"data": [random_images(2)]}, r"shape \(2, 3, 8, 8\)"),
            ({"data": iter(random_images(2))}, r"shape \(3, 8, 8\)"),
            ({"data": [np.zeros((3, 8, 8))]}, "type ndarray"),
            ({"unet": random_unet(num_class_embeds=5)}, "no labels"),
            ({"unet": random_unet(num_class_embeds=5), "data": pairs(random_images(2), [1, -1])}, "range from -1 to 1"),
            ({"unet": random_unet(**CONDITIONAL), "data": pairs(random_images(2), [1, 5])}, "range from 1 to 5"),
        ],
    )
    def test_bad_arguments(self, options, message):
        arguments = {"unet": random_unet(), "scheduler": short_scheduler(), "data": random_images(2), **options}
        with pytest.raises(ValueError, match=message):
            bits_per_dim(**arguments, progress_bar=False)

    def test_sharded_weights_are_refused(self):
        class Sharded:
            process_index, num_processes, distributed_type = 0, 2, bound.SHARDED_TYPES[0]

        with pytest.raises(ValueError, match="FSDP"):
            evaluate(random_unet(), short_scheduler(), random_images(2), accelerator=Sharded())


# 7. The command


def save_model(folder, unet, scheduler=None, id2label=None, **config):
    ADMPipeline(
        unet=unet,
        scheduler=scheduler or short_scheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        classifier=None,
        id2label=id2label,
        **config,
    ).save_pretrained(folder)
    return str(folder)


DEEP = ImageFormat("L", 1, (0, 4095), 4096)


def wide_grey_unet():
    return random_unet(sample_size=(8, 16), in_channels=1, out_channels=2)


def write_arrays(folder, arrays):
    folder.mkdir()
    for index, array in enumerate(arrays):
        np.save(folder / f"{index}.npy", array)
    return str(folder)


def write_images(folder, classes, size=8):
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return str(folder)


def flags(**arguments):
    words = []
    for name, value in arguments.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(tmp_path, **arguments):
    """The command in this process; what it wrote."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    main(flags(**{"output_dir": tmp_path / "out", **arguments}))
    return json.loads((tmp_path / "out" / "bits_per_dim.json").read_text())


NAMES = {0: "a", 1: "b", 2: "c", 3: "d"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Models and images to pick wrong combinations from."""
    path = tmp_path_factory.mktemp("stock")
    save_model(path / "model", random_unet())
    save_model(path / "conditional", random_unet(num_class_embeds=5))
    save_model(path / "grey", random_unet(in_channels=1, out_channels=2))
    random_unet().save_pretrained(path / "flow" / "unet")
    FlowMatchEulerDiscreteScheduler().save_pretrained(path / "flow" / "scheduler")
    write_images(path / "images", {"a": 1, "b": 1})
    write_images(path / "splits", {"train": 1, "test": 1})
    save_model(path / "deep", wide_grey_unet(), image_format=DEEP.to_config())
    save_model(path / "field", wide_grey_unet(), image_format=ImageFormat("array", 1, (-3, 5), None).to_config())
    write_arrays(path / "wide", [np.zeros((8, 16), np.uint16)] * 2 + [np.full((8, 16), 5000, np.uint16)])
    write_arrays(path / "floats", [np.zeros((8, 16), np.float32)] * 2)
    (path / "empty").mkdir()
    return path


class TestCommand:
    @pytest.mark.draws
    def test_folder_of_images(self, tmp_path, capsys):
        unet = random_unet(**CONDITIONAL)
        model = save_model(tmp_path / "model", unet, id2label=NAMES)
        folder = write_images(tmp_path / "images", {"a": 2, "b": 1, "c": 3, "d": 1})
        content = run(tmp_path, model=model, dataset=folder, label_column="label", seed=3, timestep_respacing=4)

        images, _ = load_image_dataset(train_data_dir=folder, label_column="label")
        data = ImageDataset(images, 8, center_crop=True)
        expected = evaluate(unet, short_scheduler(), data, seed=3, timestep_respacing="4").to_dict()
        settings = content.pop("settings")
        assert set(content.pop("versions")) == {"diffusers_adm", "diffusers", "torch"}
        assert content.pop("by_timestep")["terms"] == pytest.approx(expected.pop("by_timestep")["terms"], rel=1e-4)
        assert content == pytest.approx(expected, rel=1e-4)  # float32, as in the next tests
        assert settings["seed"] == 3
        assert settings["resolution"] == 8
        assert settings["variance_type"] == "learned_range"
        assert settings["clip_sample"] is True
        assert settings["timestep_respacing"] == "4"
        printed = capsys.readouterr().out
        assert f"{content['bits_per_dim']:.4f} ±" in printed
        with Image.open(tmp_path / "out" / "bits_per_dim.png") as image:
            image.verify()

    def test_parquet_and_a_subset_of_a_diffusers_model(self, tmp_path, caplog):
        random_diffusers_unet(sample_size=32, out_channels=3).save_pretrained(tmp_path / "model" / "unet")
        scheduler = DDPMScheduler(num_train_timesteps=3, beta_end=0.2, variance_type="fixed_large")
        scheduler.save_pretrained(tmp_path / "model" / "scheduler")
        content = run(tmp_path, model=tmp_path / "model", dataset=EMOJI, num_images=5, resolution=16)
        assert content["num_images"] == 5
        assert content["num_timesteps"] == 3
        assert content["settings"]["variance_type"] == "fixed_large"
        assert "trained at 32" in caplog.text
        other = run(
            tmp_path,
            model=tmp_path / "model",
            dataset=[EMOJI],
            num_images=5,
            resolution=16,
            variance_type="fixed_small",
            clip_sample="false",
        )
        assert other["settings"]["clip_sample"] is False
        assert other["bits_per_dim"] != content["bits_per_dim"]

    def test_classes_are_matched_by_name(self, tmp_path):
        """Without class b, the folder names alone would make c the second class."""
        unet = random_unet(**CONDITIONAL)
        model = save_model(tmp_path / "model", unet, id2label=NAMES)
        folder = write_images(tmp_path / "images", {"a": 1, "c": 1, "d": 1})
        content = run(tmp_path, model=model, dataset=folder, label_column="label")
        images = torch.stack(
            [ImageDataset(load_image_dataset(train_data_dir=folder)[0], 8)[i]["images"] for i in range(3)]
        )
        right, wrong = (evaluate(unet, short_scheduler(), pairs(images, ids)) for ids in ([0, 2, 3], [0, 1, 2]))
        assert content["bits_per_dim"] == pytest.approx(right.bits_per_dim, rel=1e-5)
        assert content["bits_per_dim"] != pytest.approx(wrong.bits_per_dim, rel=1e-3)

    def test_other_names_for_all_of_the_classes(self, tmp_path, caplog):
        model = save_model(tmp_path / "model", random_unet(**CONDITIONAL), id2label=NAMES)
        folder = write_images(tmp_path / "images", {"n0": 1, "n1": 1, "n2": 1, "n3": 1})
        run(tmp_path, model=model, dataset=folder, label_column="label")
        assert "The data has the classes 'n0'" in caplog.text

    def test_without_labels_the_null_class_is_evaluated(self, tmp_path, caplog):
        model = save_model(tmp_path / "model", random_unet(**CONDITIONAL))
        run(tmp_path, model=model, dataset=write_images(tmp_path / "images", {"a": 2}))
        assert "null class" in caplog.text

    def test_a_size_that_is_none(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            run(tmp_path, model="nowhere", dataset="nowhere", resolution="8y8")
        assert "`resolution` is '8y8'; pass the side of a square in pixels" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "image_format,arguments",
        [
            (DEEP, {}),
            (DEEP, {"value_range": [0, 4095]}),
            (None, {"image_mode": "L", "value_range": [0, 4095]}),
            (None, {"value_range": "auto"}),
            (None, {}),
        ],
    )
    def test_levels_and_shape_of_the_data(self, image_format, arguments, tmp_path, caplog):
        """12-bit grey images that are not square, in files of 16 bits."""
        config = {} if image_format is None else {"image_format": image_format.to_config()}
        model = save_model(tmp_path / "model", wide_grey_unet(), **config)
        values = np.random.default_rng(0).integers(0, 4096, (3, 8, 16), dtype=np.uint16)
        values[0, 0, :2] = 0, 4095
        (tmp_path / "images").mkdir()
        for index, pixels in enumerate(values):
            Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        content = run(tmp_path, model=model, dataset=tmp_path / "images", seed=3, **arguments)
        num_levels = 65536 if image_format is None and not arguments else 4096
        assert content["settings"]["image_format"]["num_levels"] == num_levels
        assert content["settings"]["resolution"] == [8, 16]
        samples = torch.from_numpy(2 * values.astype(np.float64) / (num_levels - 1) - 1).float()[:, None]
        expected = evaluate(wide_grey_unet(), short_scheduler(), samples, seed=3, num_levels=num_levels)
        assert content["bits_per_dim"] == pytest.approx(expected.bits_per_dim, rel=1e-4)
        coarse = evaluate(wide_grey_unet(), short_scheduler(), samples, seed=3)
        assert content["decoder"] > coarse.decoder.mean() + 1
        assert ("fill 6%" in caplog.text) == (num_levels == 65536)

        content = run(tmp_path, model=model, dataset=tmp_path / "images", resolution="4x8", **arguments)
        assert content["settings"]["resolution"] == [4, 8]
        assert "The resolution is 4 x 8, but the model was trained at 8 x 16" in caplog.text

    @pytest.mark.parametrize(
        "arguments,message",
        [
            ({"model": "nowhere"}, "`model` is 'nowhere', which is no file or folder here"),
            ({"dataset": "nowhere/at/all"}, "nowhere/at/all"),
            ({"dataset": "{path}/empty"}, "holds no images"),
            ({"dataset": [EMOJI, "{path}/images"]}, "cannot be read as parquet: Unable to find"),
            ({"dataset": ["{path}/images", "{path}/images"]}, "Several are only allowed if they are parquet"),
            ({"dataset": "{path}/splits"}, "has the splits test, train"),
            ({"split": "test"}, "has no such split"),
            ({"resolution": 9}, "divisible by 2"),
            ({"batch_size": 0}, "`batch_size` is 0"),
            ({"variance_type": "fixed_small"}, "'fixed_small'` takes 3 channels"),
            ({"timestep_respacing": "ddim5"}, "no integer stride"),
            ({"timestep_respacing": "ddim5", "dataset": "nowhere/at/all"}, "no integer stride"),
            (
                {"output_dir": "{path}/model/model_index.json/out", "model": "nowhere"},
                "`output_dir` is .* is not a directory",
            ),
            ({"model": "{path}/conditional", "label_column": "colour"}, "`label_column` is 'colour'"),
            ({"label_column": "label"}, "no class embedding"),
            ({"model": "{path}/conditional"}, "the data have no labels"),
            (
                {"model": "{path}/conditional", "label_column": "label"},
                "2 classes and the network 5, .* names no classes",
            ),
            ({"model": "{path}/grey"}, "network has 1 channel, .* others: RGB images"),
            ({"value_range": ["0", "many"]}, "`value_range` is '0 many'; pass two numbers"),
            ({"image_mode": "L"}, "`--image_mode` L has 1 channel, but the network has 3"),
            ({"model": "{path}/deep", "dataset": "{path}/wide"}, "outside of it: .*/2.npy"),
            (
                {"model": "{path}/deep", "dataset": "nowhere", "value_range": ["0", "5000"]},
                "`--value_range` is 0 5000, but .* grey images from 0 to 4095 .* leave `--value_range` out",
            ),
            (
                {"model": "{path}/deep", "dataset": "{path}/wide", "value_range": ["auto"]},
                "leave `--value_range` out, and convert",
            ),
            ({"model": "{path}/field", "dataset": "{path}/floats"}, "density, whose bits depend on the unit"),
            ({"model": "{path}/deep", "dataset": "{path}/floats"}, "floating point numbers"),
            ({"model": "{path}/deep", "dataset": "{path}/images"}, "others: RGB images"),
            ({"model": "{path}/flow"}, "FlowMatchEulerDiscreteScheduler"),
        ],
    )
    def test_wrong_arguments(self, stock, tmp_path, arguments, message):
        arguments = {"model": "{path}/model", "dataset": "{path}/images", **arguments}
        for name, value in arguments.items():
            if isinstance(value, (str, list)):
                items = [item.format(path=stock) for item in ([value] if isinstance(value, str) else value)]
                arguments[name] = items
        with pytest.raises(ValueError, match=message):
            run(tmp_path, **arguments)
        assert not (tmp_path / "out" / "bits_per_dim.json").exists()

    def test_latent_models_are_refused(self, tmp_path):
        model = Path(save_model(tmp_path / "model", random_unet()))
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
        with pytest.raises(ValueError, match="autoencoder"):
            run(tmp_path, model=model, dataset=write_images(tmp_path / "images", {"a": 1}))

    def test_launched_in_two_processes(self, tmp_path):
        model = save_model(tmp_path / "model", random_unet(**CONDITIONAL), id2label=NAMES)
        folder = write_images(tmp_path / "images", {"a": 2, "b": 1, "c": 3, "d": 1})
        arguments = {"model": model, "dataset": folder, "label_column": "label", "batch_size": 5}
        alone = run(tmp_path, **arguments)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port)]
        config = REPOSITORY / "training" / "configs" / "accelerate_two_cpu_processes.yaml"
        command += ["--config_file", str(config), "-m", "diffusers_adm.evaluation.bits_per_dim"]
        command += flags(**arguments, output_dir=tmp_path / "launched")
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "RuntimeWarning" not in result.stderr  # of runpy, for a module that is run and imported
        assert result.stdout.count("bits/dim") == 1
        bars = [line for line in result.stderr.replace("\r", "\n").splitlines() if "Bits per dimension" in line]
        assert all("/24.0" in line for line in bars), bars  # one bar, of the 4 images of 7 that the first process has
        assert bars

        launched = json.loads((tmp_path / "launched" / "bits_per_dim.json").read_text())
        assert launched["num_images"] == 7
        for name in ("terms", "x0_mse", "epsilon_mse", "terms_standard_error"):
            assert launched["by_timestep"][name] == pytest.approx(alone["by_timestep"][name], rel=1e-4)
        for name in ("bits_per_dim", "bits_per_dim_standard_error", "prior", "decoder", "kl"):
            assert launched[name] == pytest.approx(alone[name], rel=1e-4)

    def test_the_name_is_the_function_whatever_was_imported(self):
        importlib.import_module("diffusers_adm.evaluation.bits_per_dim")
        importlib.import_module("diffusers_adm.evaluation.bits_per_dim.__main__")
        from diffusers_adm.evaluation import bits_per_dim as again

        assert inspect.isfunction(again)
        assert again is bits_per_dim
        import diffusers_adm.evaluation

        assert diffusers_adm.evaluation.bits_per_dim is bits_per_dim
