"""
`LearnedVarianceDDPMScheduler` against formulas written out from the papers, in float64 and plain Python where possible,
`torch.distributions`, and diffusers' own schedulers. What it does with a perfect network: `test_analytic_sampling.py`.
"""

import inspect
import math
import re
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from analytic_distributions import cosine_betas, cumulative_alphas, linear_betas
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.schedulers import respaced_timesteps
from diffusers_adm.schedulers.noise_schedules import BetaSchedule, make_betas
from diffusers_adm.schedulers.scheduling_ddpm_learned_variance import (
    PredictionType,
    VarianceType,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from diffusers_adm.schedulers.timestep_spacing import TimestepSpacing, spaced_timesteps


T = 1000
SHAPE = (4, 3, 5, 2)
# The first and the last timestep, the ones next to them, and the middle.
TIMESTEPS = [0, 1, T // 2, T - 1]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def full(value):
    return torch.full(SHAPE, value, dtype=torch.float64)


def process(betas=None, kept=range(T)):
    """bar alpha, beta and beta_tilde of the process that keeps the timesteps `kept`, as dictionaries by timestep."""
    products = cumulative_alphas(linear_betas(T) if betas is None else betas)
    bar_alpha, beta, tilde, previous = {}, {}, {}, 1.0
    for t in kept:
        bar_alpha[t] = products[t]
        beta[t] = 1 - products[t] / previous
        tilde[t] = (1 - previous) / (1 - products[t]) * beta[t]
        previous = products[t]
    return bar_alpha, beta, tilde


class TestSchedules:
    def test_linear(self):
        assert_close(LearnedVarianceDDPMScheduler().betas.tolist(), linear_betas(T), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("name", ["scaled_linear", "quadratic"])
    def test_linear_in_the_square_root(self, name):
        low, high = math.sqrt(0.00085), math.sqrt(0.012)
        expected = [(low + (high - low) * i / 499) ** 2 for i in range(500)]
        scheduler = LearnedVarianceDDPMScheduler(500, beta_start=0.00085, beta_end=0.012, beta_schedule=name)
        assert_close(scheduler.betas.tolist(), expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("steps", [10, 1000, 4000])
    def test_cosine(self, steps):
        scheduler = LearnedVarianceDDPMScheduler(steps, beta_schedule="squaredcos_cap_v2")
        assert_close(scheduler.betas.tolist(), cosine_betas(steps), rtol=1e-10, atol=1e-14)
        # Improved DDPM, eq. 17, wherever the cap on beta does not reach: bar alpha_t = f(t) / f(0).
        f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps)]
        assert_close(scheduler.alphas_cumprod[:-1].tolist(), [x / f[0] for x in f[1:]], rtol=1e-9, atol=0)
        assert scheduler.betas[-1].item() == pytest.approx(0.999, abs=1e-15)

    def test_sigmoid(self):
        scheduler = LearnedVarianceDDPMScheduler(beta_schedule="sigmoid")
        expected = [1e-4 + 0.0199 / (1 + math.exp(6 - 12 * i / (T - 1))) for i in range(T)]
        assert_close(scheduler.betas.tolist(), expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
    def test_as_diffusers(self, name):
        """Its tables are float32: betas as small as 4e-5 come from a difference of numbers near 1 (6e-8)."""
        theirs = DDPMScheduler(beta_schedule=name)
        assert_close(LearnedVarianceDDPMScheduler(beta_schedule=name).betas.float(), theirs.betas, rtol=1e-5, atol=2e-7)

    def test_trained_betas(self):
        betas = [0.1, 0.3, 0.2]
        scheduler = LearnedVarianceDDPMScheduler(3, trained_betas=betas)
        assert scheduler.betas.tolist() == betas
        assert_close(scheduler.alphas_cumprod.tolist(), [0.9, 0.9 * 0.7, 0.9 * 0.7 * 0.8], rtol=1e-15, atol=0)

    def test_number_of_trained_betas_is_that_of_the_timesteps(self):
        """diffusers' schedulers accept any number of them next to the default of 1000 timesteps, too."""
        scheduler = LearnedVarianceDDPMScheduler(trained_betas=np.array([0.1, 0.3]))
        assert len(scheduler) == scheduler.config.num_train_timesteps == 2
        assert scheduler.timesteps.tolist() == [1, 0]
        scheduler.set_timesteps(2)
        with pytest.raises(ValueError, match="`timestep` is 2; training timesteps go from 0 to 1"):
            scheduler.add_noise(randn(*SHAPE), randn(*SHAPE), 2)

    @pytest.mark.parametrize("betas", [0.1, [], [[0.1, 0.2]]])
    def test_trained_betas_that_are_no_list(self, betas):
        with pytest.raises(ValueError, match=r"The betas are .*; they must be a list .*`trained_betas`"):
            LearnedVarianceDDPMScheduler(trained_betas=betas)

    @pytest.mark.parametrize("bad", [0.0, -0.1, 1.0, 1.5, math.nan])
    def test_betas_that_are_no_variances(self, bad):
        """1 among them: all later tables would be 0 / 0."""
        with pytest.raises(ValueError, match=r"The betas are \[.*; they must be .* between 0 and 1"):
            LearnedVarianceDDPMScheduler(3, trained_betas=[0.1, bad, 0.2])

    @pytest.mark.parametrize("name", get_args(BetaSchedule))
    def test_alphas_cumprod(self, name):
        scheduler = LearnedVarianceDDPMScheduler(beta_schedule=name)
        assert scheduler.alphas_cumprod.dtype == torch.float64
        expected = cumulative_alphas(make_betas(name, T, 1e-4, 0.02).tolist())
        assert_close(scheduler.alphas_cumprod.tolist(), expected, rtol=1e-12, atol=0)

    def test_zero_terminal_snr(self):
        """Lin et al. 2023, section 3.1: sqrt(bar alpha) shifted and scaled, first value kept, last one 0."""
        scheduler = LearnedVarianceDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
        old = [math.sqrt(a) for a in cumulative_alphas(linear_betas(T))]
        new = [(a - old[-1]) / (old[0] - old[-1]) * old[0] for a in old]
        assert_close(scheduler.alphas_cumprod.sqrt().tolist(), new, rtol=1e-9, atol=1e-12)
        assert scheduler.alphas_cumprod[-1].item() == 0
        # The first step of sampling sees x_T without a signal and still gives numbers.
        x, output = randn(*SHAPE), randn(4, 6, 5, 2, seed=1)
        scheduler.set_timesteps(timestep_respacing="10")
        for eta in (None, 0.0, 1.0):
            step = scheduler.step(output, T - 1, x, eta=eta)
            assert step.prev_sample.isfinite().all()
            assert_close(step.pred_original_sample, (-output[:, :3]).clamp(-1, 1))

    def test_zero_terminal_snr_has_no_epsilon(self):
        with pytest.raises(ValueError, match=r"`rescale_betas_zero_snr`.*v_prediction"):
            LearnedVarianceDDPMScheduler(rescale_betas_zero_snr=True)


class TestConstruction:
    @pytest.mark.parametrize(
        ("name", "choices"),
        [
            ("beta_schedule", BetaSchedule),
            ("variance_type", VarianceType),
            ("prediction_type", PredictionType),
            ("timestep_spacing", TimestepSpacing),
        ],
    )
    def test_unknown_choices(self, name, choices):
        for value in get_args(choices):
            assert LearnedVarianceDDPMScheduler(**{name: value}).config[name] == value
        with pytest.raises(ValueError, match=f"`{name}` is 'other'; it must be one of .*{get_args(choices)[0]}"):
            LearnedVarianceDDPMScheduler(**{name: "other"})

    @pytest.mark.parametrize("name", ["cosin", "other", None])
    def test_unknown_choices_below_the_constructor(self, name):
        """An unknown schedule was once taken for the cosine, an unknown prediction for the velocity."""
        with pytest.raises(ValueError, match=rf"`beta_schedule` is {name!r}; it must be one of .*'sigmoid', 'cosine'"):
            make_betas(name, 10, 1e-4, 0.02)
        with pytest.raises(ValueError, match=rf"`timestep_spacing` is {name!r}; it must be one of .*'leading'"):
            spaced_timesteps(1000, 10, name)
        scheduler, sample = LearnedVarianceDDPMScheduler(), torch.zeros(2, 3, 4, 4)
        scheduler.register_to_config(prediction_type=name)  # which checks nothing
        with pytest.raises(ValueError, match=rf"`prediction_type` is {name!r}; it must be one of .*'v_prediction'"):
            scheduler.step(torch.zeros(2, 6, 4, 4), 3, sample)
        scheduler = LearnedVarianceDDPMScheduler(variance_type="fixed_small")
        scheduler.register_to_config(variance_type=name)
        with pytest.raises(ValueError, match=rf"`variance_type` is {name!r}; it must be one of .*'fixed_large'"):
            scheduler.step(sample, 3, sample)

    def test_learned_is_refused_because_it_has_two_meanings(self):
        with pytest.raises(ValueError, match=r"log-variance.*'learned_log'.*'learned_range'"):
            LearnedVarianceDDPMScheduler(variance_type="learned")

    def test_aliases_are_stored_under_one_name(self):
        assert LearnedVarianceDDPMScheduler(variance_type="fixed_small_log").config.variance_type == "fixed_small"
        assert LearnedVarianceDDPMScheduler(variance_type="fixed_large_log").config.variance_type == "fixed_large"
        assert LearnedVarianceDDPMScheduler(beta_schedule="cosine").config.beta_schedule == "squaredcos_cap_v2"

    @pytest.mark.parametrize(
        "method",
        [None, "set_timesteps", "add_noise", "posterior_distribution", "predicted_distribution"]
        + ["step", "variational_bound"],
    )
    def test_documented_arguments_are_the_real_ones(self, method):
        documented = LearnedVarianceDDPMScheduler if method is None else getattr(LearnedVarianceDDPMScheduler, method)
        signature = inspect.signature(documented.__init__ if method is None else documented)
        section = re.split(r"\n *(?:Returns|Raises):", documented.__doc__.split("Args:")[1])[0]
        names = [name for group in re.findall(r"([\w, ]+) \((?:list of )?`", section) for name in group.split(",")]
        assert [name.strip() for name in names if name.strip()] == [n for n in signature.parameters if n != "self"]

    def test_what_pipelines_read(self):
        scheduler = LearnedVarianceDDPMScheduler(20)
        assert len(scheduler) == 20
        assert scheduler.order == 1
        assert scheduler.init_noise_sigma == 1.0
        assert {DDPMScheduler, DDIMScheduler, LearnedVarianceDDPMScheduler} <= set(scheduler.compatibles)
        x = randn(*SHAPE)
        assert scheduler.scale_model_input(x, 3) is x
        # Usable before `set_timesteps`: all timesteps.
        assert scheduler.timesteps.tolist() == list(range(19, -1, -1))
        assert scheduler.previous_timestep(5) == 4
        assert scheduler.step(randn(4, 6, 5, 2), scheduler.timesteps[0], x).prev_sample.shape == SHAPE


class TestConfigs:
    def test_from_and_to_default_ddpm(self):
        """The two classes' defaults of `variance_type` differ; each object's own one must survive."""
        ours = LearnedVarianceDDPMScheduler.from_config(DDPMScheduler().config)
        assert ours.config.variance_type == "fixed_small"
        theirs = DDPMScheduler.from_config(LearnedVarianceDDPMScheduler().config)
        assert theirs.config.variance_type == "learned_range"
        assert theirs.variance_type == "learned_range"
        assert LearnedVarianceDDPMScheduler.from_config(theirs.config).config.variance_type == "learned_range"
        assert DDPMScheduler.from_config(ours.config).config.variance_type == "fixed_small"

    def test_every_shared_key(self):
        values = {
            "num_train_timesteps": 50,
            "beta_start": 0.001,
            "beta_end": 0.03,
            "beta_schedule": "scaled_linear",
            "variance_type": "fixed_large",
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.9,
            "clip_sample_range": 2.0,
            "sample_max_value": 3.0,
            "timestep_spacing": "trailing",
            "steps_offset": 1,
            "rescale_betas_zero_snr": True,
        }
        signatures = [inspect.signature(c).parameters for c in (LearnedVarianceDDPMScheduler, DDPMScheduler)]
        assert set(signatures[0]) - {"float32_tables"} == set(signatures[1]) == {*values, "trained_betas"}
        assert {k: p.default for k, p in signatures[0].items() if k not in ("variance_type", "float32_tables")} == {
            k: p.default for k, p in signatures[1].items() if k != "variance_type"
        }
        for first, second in [
            (DDPMScheduler, LearnedVarianceDDPMScheduler),
            (LearnedVarianceDDPMScheduler, DDPMScheduler),
        ]:
            config = second.from_config(first(**values).config).config
            assert {k: config[k] for k in values} == values

    @pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
    @pytest.mark.parametrize("other", [DDIMScheduler, DPMSolverMultistepScheduler])
    def test_there_and_back(self, other, variance_type):
        """`DDIMScheduler` has no `variance_type` and carries it along; the other one has its own."""
        ours = LearnedVarianceDDPMScheduler(variance_type=variance_type, beta_schedule="squaredcos_cap_v2")
        swapped = other.from_config(ours.config)
        assert_close(swapped.alphas_cumprod.double(), ours.alphas_cumprod, rtol=1e-3, atol=1e-6)
        back = LearnedVarianceDDPMScheduler.from_config(swapped.config)
        assert back.config.variance_type == variance_type
        assert back.betas.tolist() == ours.betas.tolist()
        default = other.from_config(LearnedVarianceDDPMScheduler().config)
        assert LearnedVarianceDDPMScheduler.from_config(default.config).config.variance_type == "learned_range"

    def test_variance_type_none_of_other_schedulers_needs_an_answer(self):
        """What a pipeline's scheduler swap leaves: `None` says nothing about this class's choices."""
        config = DPMSolverMultistepScheduler(variance_type=None).config
        with pytest.raises(ValueError, match=r"`variance_type` is None; it must be one of"):
            LearnedVarianceDDPMScheduler.from_config(config)
        answered = LearnedVarianceDDPMScheduler.from_config(config, variance_type="learned_range")
        assert answered.config.variance_type == "learned_range"

    @pytest.mark.parametrize("values", [{}, {"variance_type": "fixed_small", "clip_sample": False}], ids=str)
    def test_config_is_equal_after_each_compatible_class(self, values):
        ours = LearnedVarianceDDPMScheduler(**values)
        for other in ours.compatibles:
            back = LearnedVarianceDDPMScheduler.from_config(other.from_config(ours.config).config)
            assert {k: v for k, v in back.config.items() if k in ours.config} == dict(ours.config), other

    @pytest.mark.parametrize("betas", [None, [0.1, 0.2, 0.3], np.array([0.1, 0.2, 0.3])])
    def test_saved_and_loaded(self, tmp_path, betas):
        scheduler = LearnedVarianceDDPMScheduler(
            3, trained_betas=betas, beta_schedule="cosine", variance_type="learned_log", clip_sample=False
        )
        scheduler.save_pretrained(tmp_path)
        loaded = LearnedVarianceDDPMScheduler.from_pretrained(tmp_path)
        assert loaded.betas.tolist() == scheduler.betas.tolist()
        # What is loaded was given, all of it: nothing is left for another class's defaults.
        assert "_use_default_values" not in loaded.config
        assert loaded.config.beta_schedule == "squaredcos_cap_v2"
        assert loaded.config.variance_type == "learned_log"
        assert loaded.config.clip_sample is False

    def test_a_folder_of_diffusers(self, tmp_path):
        DDPMScheduler(variance_type="fixed_large", beta_schedule="scaled_linear").save_pretrained(tmp_path / "theirs")
        loaded = LearnedVarianceDDPMScheduler.from_pretrained(tmp_path / "theirs")
        assert (loaded.config.variance_type, loaded.config.beta_schedule) == ("fixed_large", "scaled_linear")
        LearnedVarianceDDPMScheduler().save_pretrained(tmp_path / "ours")
        assert DDPMScheduler.from_pretrained(tmp_path / "ours").config.variance_type == "learned_range"


class TestTimesteps:
    @pytest.mark.parametrize(
        ("total", "respacing", "expected"),
        # By hand. 25 of 1000: steps of 999 / 24 = 41.625 from 0; 8 of them are 333, so the pattern repeats, and the
        # halves (166.5, 499.5, 832.5) go to the even neighbour. Three sections are 334, 333 and 333 long.
        [
            (1000, "ddim50", [20 * i for i in range(50)]),
            (1000, "ddim25", [40 * i for i in range(25)]),
            (1000, "ddim250", [4 * i for i in range(250)]),
            (1000, "ddim1000", list(range(1000))),
            (1000, "ddim3", [0, 334, 668]),  # ceil(1000 / 334) = 3, and 333 gives four
            (1000, "1", [0]),
            (1000, "2", [0, 999]),
            (
                1000,
                "25",
                [0, 42, 83, 125, 166, 208, 250, 291]
                + [333, 375, 416, 458, 500, 541, 583, 624]
                + [666, 708, 749, 791, 832, 874, 916, 957]
                + [999],
            ),
            (10, "4", [0, 3, 6, 9]),
            (10, "2,3", [0, 4, 5, 7, 9]),
            (11, "2,3", [0, 5, 6, 8, 10]),
            (12, "0,3,1", [4, 6, 7, 8]),  # (7 - 4) / 2 = 1.5, a half, to the even position 2
            (300, "10,15,20", None),
            (1000, "10,10,15", None),
            (4000, "250", None),
        ],
    )
    def test_published_forms(self, total, respacing, expected):
        kept = respaced_timesteps(total, respacing)
        scheduler = LearnedVarianceDDPMScheduler(total, beta_schedule="cosine")
        scheduler.set_timesteps(timestep_respacing=respacing)
        assert scheduler.timesteps.tolist() == kept[::-1]
        assert scheduler.num_inference_steps == len(kept)
        if expected is not None:
            assert kept == expected
        if not respacing.startswith("ddim"):
            self.check_in_words(total, [int(count) for count in respacing.split(",")], kept)

    @staticmethod
    def check_in_words(total, counts, kept):
        """
        Sections as equal as possible, longer ones first; in each, so many whole numbers, first and last included, none
        further than a half from even spacing. Exact, in fractions.
        """
        start = 0
        for i, count in enumerate(counts):
            length = len([t for t in range(total) if t % len(counts) == i])  # dealt out one by one
            section = [t for t in kept if start <= t < start + length]
            assert len(section) == count
            for position, t in enumerate(section):
                spacing = Fraction(length - 1, count - 1) if count > 1 else 0
                assert abs(t - start - position * spacing) <= Fraction(1, 2)
            start += length
        assert start == total
        assert kept == sorted(set(kept))
        assert len(kept) == sum(counts)

    def test_even_spacing_for_every_number(self):
        for total in (7, 97, 1000):
            for count in range(1, total + 1, 1 if total < 1000 else 13):
                self.check_in_words(total, [count], respaced_timesteps(total, str(count)))

    def test_strides_in_words(self):
        """ddimN: the multiples of k, for the smallest k with N of them below T; where there is none, an error."""
        for total in (10, 97):
            for count in range(1, total + 1):
                fitting = [k for k in range(1, total) if len([t for t in range(total) if t % k == 0]) == count]
                if fitting:
                    expected = [t for t in range(total) if t % fitting[0] == 0]
                    assert respaced_timesteps(total, f"ddim{count}") == expected
                else:
                    with pytest.raises(ValueError, match=f"'ddim{count}', but no integer stride through {total}"):
                        respaced_timesteps(total, f"ddim{count}")

    @pytest.mark.parametrize(("total", "third_section"), [(1000, [400, 500, 599]), (4000, [1600, 2000, 2399])])
    def test_fast27(self, total, third_section):
        """GLIDE's: five sections, and not the last timestep but the one two before it."""
        kept = respaced_timesteps(total, "fast27")
        assert kept[20:23] == third_section
        assert kept[23:] == [3 * total // 5, 4 * total // 5 - 1, 4 * total // 5, total - 3]
        self.check_in_words(total, [10, 10, 3, 2, 2], [*kept[:-1], total - 1])
        scheduler = LearnedVarianceDDPMScheduler(total, beta_schedule="linear")
        scheduler.set_timesteps(timestep_respacing="fast27")
        assert scheduler.timesteps.tolist() == kept[::-1]
        assert len(kept) == 27
        with pytest.raises(ValueError, match="'fast27': section 1 of 5 holds 8 of the 40 timesteps, so 10 cannot"):
            respaced_timesteps(40, "fast27")

    def test_numbers_and_lists(self):
        assert respaced_timesteps(1000, 25) == respaced_timesteps(1000, [25]) == respaced_timesteps(1000, "25")
        assert respaced_timesteps(1000, (10, 10, 15)) == respaced_timesteps(1000, "10,10,15")
        assert respaced_timesteps(1000, np.int64(25)) == respaced_timesteps(1000, "25")

    def test_errors_name_the_value_and_the_way_out(self):
        # Strides through 1000 that come nearest to 37: 28 gives 36, 27 gives 38, 29 gives 35, 26 gives 39.
        with pytest.raises(ValueError, match=r"'ddim37'.* ddim35, ddim36, ddim38, ddim39;.*'ddim' for uneven"):
            respaced_timesteps(1000, "ddim37")
        with pytest.raises(ValueError, match=r"'ddimfast'.*Possible here: ddim"):
            respaced_timesteps(1000, "ddimfast")
        with pytest.raises(ValueError, match=r"takes that many") as error:
            respaced_timesteps(10, "ddim")
        for nearest in re.findall(r"ddim(\d+)", str(error.value)):
            assert len(respaced_timesteps(10, f"ddim{nearest}")) == int(nearest)
        with pytest.raises(ValueError, match=r"'1001': section 1 of 1 holds 1000 .* so 1001 cannot"):
            respaced_timesteps(1000, "1001")
        with pytest.raises(ValueError, match=r"section 2 of 3 holds 333 .* so 334 cannot .* Ask for 333 at most"):
            respaced_timesteps(1000, "334,334,1")
        for nonsense in ("", "fast", "250,", "2.5", "-5", "0", "0,0", [], [2.5], 2.5):
            with pytest.raises(ValueError, match=r"`timestep_respacing` is .*Pass a number of steps"):
                respaced_timesteps(1000, nonsense)

    @pytest.mark.parametrize("spacing", get_args(TimestepSpacing))
    def test_numbers_of_steps_as_diffusers(self, spacing):
        ours = LearnedVarianceDDPMScheduler(timestep_spacing=spacing)
        theirs = DDPMScheduler(timestep_spacing=spacing)
        for steps in [*range(1, 130), 250, 333, 500, 999, 1000]:
            ours.set_timesteps(steps)
            theirs.set_timesteps(steps)
            # `DDPMScheduler` rounds the "trailing" stride and then gives one too many for some numbers: -1.
            expected = [t for t in theirs.timesteps.tolist() if t >= 0]
            assert ours.timesteps.tolist() == expected
            assert len(expected) == ours.num_inference_steps == steps

    def test_steps_offset(self):
        scheduler = LearnedVarianceDDPMScheduler(steps_offset=1)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps.tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
        assert scheduler.previous_timestep(101) == 1
        assert scheduler.previous_timestep(1) == -1
        with pytest.raises(ValueError, match=r"within 0 and 999"):
            scheduler.set_timesteps(1000)

    def test_custom_timesteps(self):
        scheduler = LearnedVarianceDDPMScheduler()
        scheduler.set_timesteps(timesteps=[900, 77, 3])
        assert scheduler.timesteps.tolist() == [900, 77, 3]
        assert [scheduler.previous_timestep(t) for t in (900, 77, 3)] == [77, 3, -1]
        previous = [scheduler.previous_timestep(t) for t in scheduler.timesteps]
        assert [t.item() for t in previous] == [77, 3, -1]
        assert all(t.dtype == torch.int64 and t.shape == () for t in previous)
        scheduler.set_timesteps(timesteps=torch.tensor([5, 2]))
        assert scheduler.timesteps.tolist() == [5, 2]
        for bad in ([3, 77], [3, 3], [1000, 3], [3, -1], []):
            with pytest.raises(ValueError, match=r"`timesteps` asks for the timesteps \["):
                scheduler.set_timesteps(timesteps=bad)

    def test_one_of_three(self):
        scheduler = LearnedVarianceDDPMScheduler()
        with pytest.raises(ValueError, match=r"exactly one of .*got none"):
            scheduler.set_timesteps()
        with pytest.raises(ValueError, match=r"exactly one of .*'num_inference_steps', 'timestep_respacing'"):
            scheduler.set_timesteps(10, timestep_respacing="10")
        for steps in (0, 1001, -3, 2.5):
            with pytest.raises(ValueError, match=rf"`num_inference_steps` is {steps}; .* between 1 and .* 1000"):
                scheduler.set_timesteps(steps)

        with pytest.raises(ValueError, match=r"`timesteps` asks for the timesteps \[2.5, 1.0\]; they must be integers"):
            scheduler.set_timesteps(timesteps=[2.5, 1])
        scheduler.set_timesteps(10.0)
        assert (type(scheduler.num_inference_steps), scheduler.num_inference_steps) == (int, 10)

    def test_set_timesteps_leaves_training_alone(self):
        scheduler, untouched = LearnedVarianceDDPMScheduler(), LearnedVarianceDDPMScheduler()
        scheduler.set_timesteps(timestep_respacing="25")
        x, noise, output = randn(*SHAPE), randn(*SHAPE, seed=1), randn(4, 6, 5, 2, seed=2)
        t = torch.tensor([1, 2, 3, 998])  # none of them among the 25
        for method, arguments in [
            ("add_noise", (x, noise, t)),
            ("get_velocity", (x, noise, t)),
            ("posterior_distribution", (x, noise, t)),
            ("predicted_distribution", (output, t, x)),
            ("variational_bound", (output, x, noise, t)),
        ]:
            actual, expected = (getattr(each, method)(*arguments) for each in (scheduler, untouched))
            assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class TestForwardProcess:
    @pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
    def test_add_noise_is_noising_step_by_step(self, schedule):
        """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, 1000 times: the mean's factor, and the variance."""
        scheduler = LearnedVarianceDDPMScheduler(beta_schedule=schedule)
        t = torch.arange(T)
        ones, zeros = torch.ones(T, 1, dtype=torch.float64), torch.zeros(T, 1, dtype=torch.float64)
        signal, std = scheduler.add_noise(ones, zeros, t), scheduler.add_noise(zeros, ones, t)
        factor, variance = 1.0, 0.0
        for step, beta in enumerate(linear_betas(T) if schedule == "linear" else cosine_betas(T)):
            factor *= math.sqrt(1 - beta)
            variance = (1 - beta) * variance + beta
            assert signal[step].item() == pytest.approx(factor, rel=1e-9)
            assert std[step].item() ** 2 == pytest.approx(variance, rel=1e-9)

    def test_add_noise_by_monte_carlo(self):
        number, last = 40_000, 299
        generator = torch.Generator().manual_seed(0)
        x = torch.full((number,), 0.8)
        for beta in linear_betas(T)[: last + 1]:
            x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(number, generator=generator)
        clean = torch.full((number, 1), 0.8)
        at_once = LearnedVarianceDDPMScheduler().add_noise(clean, torch.randn(clean.shape, generator=generator), last)
        # 5 standard errors of the difference of two means, and of two variances, for a variance of about 0.6.
        assert abs(x.mean() - at_once.mean()).item() < 5 * math.sqrt(2 / number)
        assert abs(x.var() - at_once.var()).item() < 5 * math.sqrt(2 * 2 / number)

    @pytest.mark.parametrize("t", TIMESTEPS)
    def test_velocity(self, t):
        """Salimans & Ho 2022, app. D: x_t = cos(a) x_0 + sin(a) eps, and v is its derivative by the angle a."""
        x, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
        scheduler = LearnedVarianceDDPMScheduler()
        angle = math.acos(math.sqrt(process()[0][t]))
        v = scheduler.get_velocity(x, noise, t)
        assert_close(v, math.cos(angle) * noise - math.sin(angle) * x, rtol=0, atol=1e-12)
        # What it is for: x_0 and the noise come back from x_t and v.
        noisy = scheduler.add_noise(x, noise, t)
        assert_close(math.cos(angle) * noisy - math.sin(angle) * v, x, rtol=0, atol=1e-12)
        assert_close(math.sin(angle) * noisy + math.cos(angle) * v, noise, rtol=0, atol=1e-12)

    def test_signal_to_noise_ratio(self):
        scheduler = LearnedVarianceDDPMScheduler()
        scheduler.set_timesteps(timestep_respacing="25")  # has no effect here
        bar_alpha = process()[0]
        expected = torch.tensor([bar_alpha[t] / (1 - bar_alpha[t]) for t in TIMESTEPS])
        assert_close(scheduler.signal_to_noise_ratio(torch.tensor(TIMESTEPS)), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("respacing", [None, "25", "ddim50"])
    def test_posterior_is_the_conditional_of_a_gaussian(self, respacing):
        """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add."""
        scheduler = LearnedVarianceDDPMScheduler()
        kept = respaced_timesteps(T, respacing or "1000")
        bar_alpha, beta, _ = process(kept=kept)
        x_0, x_t = randn(*SHAPE), randn(*SHAPE, seed=1)
        for position in (1, 2, len(kept) // 2, len(kept) - 1):
            t, previous = kept[position], kept[position - 1]
            alpha = 1 - beta[t]
            precision = alpha / beta[t] + 1 / (1 - bar_alpha[previous])
            expected = x_t * math.sqrt(alpha) / beta[t] + x_0 * math.sqrt(bar_alpha[previous]) / (
                1 - bar_alpha[previous]
            )
            mean, log_variance = scheduler.posterior_distribution(x_0, x_t, t, timestep_respacing=respacing)
            assert_close(mean, expected / precision, rtol=0, atol=1e-11)
            assert_close(log_variance, full(-math.log(precision)), rtol=0, atol=1e-9)

    def test_posterior_at_the_first_timestep(self):
        """x_0 itself; the log-variance would be -infinity and is the second timestep's."""
        x_0, x_t = randn(*SHAPE), randn(*SHAPE, seed=1)
        mean, log_variance = LearnedVarianceDDPMScheduler().posterior_distribution(x_0, x_t, 0)
        assert_close(mean, x_0, rtol=0, atol=1e-15)
        assert_close(log_variance, full(math.log(process()[2][1])), rtol=0, atol=1e-10)


class TestReverseDistribution:
    @pytest.mark.parametrize("respacing", [None, "25"])
    @pytest.mark.parametrize("position", [0, 1, 12, -1])
    @pytest.mark.parametrize("variance_type", [*get_args(VarianceType), "fixed_small_log", "fixed_large_log"])
    def test_log_variance(self, variance_type, position, respacing):
        kept = respaced_timesteps(T, respacing or "1000")
        t = kept[position]
        _, beta, tilde = process(kept=kept)
        smallest = math.log(tilde[t] if t > 0 else tilde[kept[1]])
        scheduler = LearnedVarianceDDPMScheduler(variance_type=variance_type)
        x, output = randn(*SHAPE), randn(4, 6, 5, 2, seed=1)
        values = 1.5 * output[:, 3:]  # beyond +-1, too: not clamped
        output = torch.cat([output[:, :3], values], dim=1)
        expected = {
            "learned_range": (values + 1) / 2 * math.log(beta[t]) + (1 - values) / 2 * smallest,
            "learned_log": values,
            "fixed_small": full(smallest),
            # At the first timestep that too is the second beta_tilde, as in the papers' code.
            "fixed_large": full(math.log(beta[t]) if t > 0 else smallest),
        }[variance_type.removesuffix("_log") if variance_type != "learned_log" else variance_type]
        output = output if scheduler.has_learned_variance else output[:, :3]
        _, log_variance, _ = scheduler.predicted_distribution(output, t, x, timestep_respacing=respacing)
        assert_close(log_variance, expected, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("respacing", [None, "25"])
    @pytest.mark.parametrize("t", [0, 1, 500, 999])
    def test_mean(self, t, respacing):
        """The posterior's mean at the predicted x_0, x_0 = (x_t - sqrt(1 - bar alpha) eps) / sqrt(bar alpha)."""
        scheduler = LearnedVarianceDDPMScheduler(variance_type="fixed_small", clip_sample=False)
        if respacing and t == 1:
            t = 42
        x, eps = randn(*SHAPE), randn(*SHAPE, seed=1)
        bar_alpha = process()[0][t]
        x_0 = (x - math.sqrt(1 - bar_alpha) * eps) / math.sqrt(bar_alpha)
        mean, _, predicted = scheduler.predicted_distribution(eps, t, x, timestep_respacing=respacing)
        assert_close(predicted, x_0, rtol=1e-9, atol=1e-9)
        expected, _ = scheduler.posterior_distribution(x_0, x, t, timestep_respacing=respacing)
        assert_close(mean, expected, rtol=1e-9, atol=1e-9)
        if respacing is None and t > 0:  # DDPM, eq. 11: (x - beta / sqrt(1 - bar alpha) eps) / sqrt(alpha)
            beta = linear_betas(T)[t]
            assert_close(mean, (x - beta / math.sqrt(1 - bar_alpha) * eps) / math.sqrt(1 - beta), rtol=0, atol=1e-9)

    @pytest.mark.parametrize("t", TIMESTEPS)
    def test_prediction_types_agree(self, t):
        x_0, eps = randn(*SHAPE), randn(*SHAPE, seed=1)
        angle = math.acos(math.sqrt(process()[0][t]))
        x = math.cos(angle) * x_0 + math.sin(angle) * eps
        outputs = {"epsilon": eps, "sample": x_0, "v_prediction": math.cos(angle) * eps - math.sin(angle) * x_0}
        values = randn(*SHAPE, seed=2)
        results = []
        for prediction_type, output in outputs.items():
            scheduler = LearnedVarianceDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
            output = torch.cat([output, values], dim=1)
            noise = randn(*SHAPE, seed=3)
            results.append(
                (
                    *scheduler.predicted_distribution(output, t, x),
                    scheduler.step(output, t, x, variance_noise=noise).prev_sample,
                    scheduler.step(output, t, x, eta=0.5, variance_noise=noise).prev_sample,
                )
            )
            assert_close(results[-1][2], x_0, rtol=0, atol=1e-10)
        assert_close(results[1], results[0], rtol=0, atol=1e-10)
        assert_close(results[2], results[0], rtol=0, atol=1e-10)

    def test_clipping(self):
        x, x_0 = randn(*SHAPE), 3 * randn(*SHAPE, seed=1)

        def predicted(clip_sample=None, **config):
            scheduler = LearnedVarianceDDPMScheduler(variance_type="fixed_small", prediction_type="sample", **config)
            return scheduler.predicted_distribution(x_0, 500, x, clip_sample=clip_sample)

        assert_close(predicted()[2], x_0.clamp(-1, 1), rtol=0, atol=0)
        assert_close(predicted(clip_sample_range=0.5)[2], x_0.clamp(-0.5, 0.5), rtol=0, atol=0)
        assert_close(predicted(clip_sample=False)[2], x_0, rtol=0, atol=0)
        assert_close(predicted(False, thresholding=True)[2], x_0, rtol=0, atol=0)
        config = {"clip_sample": False}
        scheduler = LearnedVarianceDDPMScheduler(variance_type="fixed_small", prediction_type="sample", **config)
        assert_close(scheduler.predicted_distribution(x_0, 500, x)[2], x_0, rtol=0, atol=0)
        assert_close(
            scheduler.predicted_distribution(x_0, 500, x, clip_sample=True)[2], x_0.clamp(-1, 1), rtol=0, atol=0
        )
        # The mean is that of the clipped x_0.
        expected, _ = scheduler.posterior_distribution(x_0.clamp(-1, 1), x, 500)
        assert_close(predicted()[0], expected, rtol=0, atol=1e-12)

    def test_dynamic_thresholding(self):
        """Imagen, section 2.3: per example, the quantile of |x_0|, if above 1, becomes 1."""
        config = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 2.5}
        # Within [-1, 1]; a threshold between 1 and the maximum; one above the maximum.
        x_0 = randn(3, 3, 5, 2) * torch.tensor([0.2, 1.5, 9.0]).reshape(3, 1, 1, 1)
        config |= {"prediction_type": "sample", "variance_type": "fixed_small"}
        result = LearnedVarianceDDPMScheduler(**config).step(x_0, 500, randn(3, 3, 5, 2, seed=1)).pred_original_sample
        for example, clean in zip(result, x_0, strict=True):
            s = min(max(np.quantile(clean.abs().numpy(), 0.8), 1.0), 2.5)
            assert_close(example, clean.clamp(-s, s) / s, rtol=0, atol=1e-12)
        theirs = DDPMScheduler(**config).step(x_0, 500, randn(3, 3, 5, 2, seed=1)).pred_original_sample
        assert_close(result, theirs, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("variance_type", "channels", "advice"),
        [
            ("learned_range", 3, r"takes 6 channels.*'fixed_small'.*out_channels=6"),
            ("learned_log", 3, r"takes 6 channels.*'fixed_small'.*out_channels=6"),
            ("fixed_small", 6, r"takes 3 channels.*'learned_range'"),
            ("fixed_large", 6, r"takes 3 channels.*'learned_range'"),
            ("learned_range", 4, r"takes 6 channels"),
        ],
    )
    def test_wrong_channels(self, variance_type, channels, advice):
        """diffusers takes a plain output for learned variance, and stops in the middle with a TypeError."""
        scheduler = LearnedVarianceDDPMScheduler(variance_type=variance_type)
        x, output = randn(*SHAPE), randn(4, channels, 5, 2)
        match = rf"\(4, {channels}, 5, 2\).*\(4, 3, 5, 2\).*`variance_type='{variance_type}'` {advice}"
        for call in (
            lambda: scheduler.step(output, 3, x),
            lambda: scheduler.predicted_distribution(output, 3, x),
            lambda: scheduler.variational_bound(output, x, x, 3),
        ):
            with pytest.raises(ValueError, match=match):
                call()


def outputs_for(scheduler, dtype=torch.float64, seed=1):
    """A network's output: mean channels, and variance channels within +-1 where it has them."""
    output = randn(*SHAPE, seed=seed, dtype=dtype)
    if scheduler.has_learned_variance:
        output = torch.cat([output, randn(*SHAPE, seed=seed + 1, dtype=dtype).tanh()], dim=1)
    return output


class TestStep:
    @pytest.mark.parametrize("variance_type", get_args(VarianceType))
    def test_ancestral(self, variance_type):
        scheduler = LearnedVarianceDDPMScheduler(variance_type=variance_type)
        scheduler.set_timesteps(timestep_respacing="25")
        x, output = randn(*SHAPE), outputs_for(scheduler)
        for t in (999, 500, 42, 0):
            mean, log_variance, x_0 = scheduler.predicted_distribution(output, t, x, timestep_respacing="25")
            noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            step = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(5))
            expected = mean + torch.exp(0.5 * log_variance) * noise if t > 0 else mean
            assert_close(step.prev_sample, expected, rtol=0, atol=1e-12)
            assert_close(step.pred_original_sample, x_0, rtol=0, atol=0)
            given = scheduler.step(output, t, x, variance_noise=noise, return_dict=False)
            assert_close(given, (step.prev_sample, x_0), rtol=0, atol=0)

    @pytest.mark.parametrize("eta", [None, 1.0])
    def test_last_step_adds_no_noise_but_draws_it(self, eta):
        """On a device the host does not know which step is the last; the generator must end in one state either way."""
        scheduler = LearnedVarianceDDPMScheduler()
        x, output = randn(*SHAPE), outputs_for(scheduler)
        states, samples = [], []
        for timestep in (0, torch.zeros(len(x), dtype=torch.long)):  # known to the host, and looked up in tensors
            for seed in (0, 1):
                generator = torch.Generator().manual_seed(seed)
                samples.append(scheduler.step(output, timestep, x, generator=generator, eta=eta).prev_sample)
                states.append(generator.get_state())
        assert torch.equal(samples[0], samples[1])
        assert torch.equal(samples[2], samples[3])
        assert torch.equal(states[0], states[2])
        assert not torch.equal(states[0], torch.Generator().manual_seed(0).get_state())

    def test_deterministic_ddim_draws_nothing(self):
        scheduler = LearnedVarianceDDPMScheduler()
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        scheduler.step(outputs_for(scheduler), 500, randn(*SHAPE), generator=generator, eta=0.0)
        assert torch.equal(generator.get_state(), before)

    def test_last_timestep_need_not_be_0(self):
        scheduler = LearnedVarianceDDPMScheduler()
        x, output = randn(*SHAPE), outputs_for(scheduler)
        scheduler.set_timesteps(timesteps=[500, 100])
        samples = [
            scheduler.step(output, 100, x, generator=torch.Generator().manual_seed(seed)).prev_sample for seed in (0, 1)
        ]
        assert torch.equal(*samples)

    @pytest.mark.parametrize("clip_sample", [True, False])
    @pytest.mark.parametrize("prediction_type", get_args(PredictionType))
    @pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small", "fixed_large"])
    @pytest.mark.parametrize("steps", [T, 50, 25])
    def test_as_ddpm_scheduler(self, steps, variance_type, prediction_type, clip_sample):
        """
        1e-4: diffusers computes its tables in float32, where the log of beta_tilde is off by up to 4e-4 at small t; x_0
        from epsilon at the last timestep, magnified by sqrt(1 / bar alpha) = 157, is compared relative to its size.
        """
        config = {"variance_type": variance_type, "prediction_type": prediction_type, "clip_sample": clip_sample}
        ours, theirs = LearnedVarianceDDPMScheduler(**config), DDPMScheduler(**config)
        kept = respaced_timesteps(T, str(steps))[::-1]
        ours.set_timesteps(timestep_respacing=str(steps))
        theirs.set_timesteps(timesteps=kept)
        x, output = randn(*SHAPE, dtype=torch.float32), outputs_for(ours, torch.float32)
        for t in kept[:: max(1, steps // 25)] + kept[-2:]:
            mine = ours.step(output, t, x, generator=torch.Generator().manual_seed(t))
            other = theirs.step(output, t, x, generator=torch.Generator().manual_seed(t))
            assert_close(mine.prev_sample, other.prev_sample, rtol=1e-4, atol=1e-4)
            assert_close(mine.pred_original_sample, other.pred_original_sample, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("prediction_type", get_args(PredictionType))
    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("clip_sample", [True, False])
    def test_as_ddim_scheduler(self, clip_sample, eta, prediction_type):
        """
        With `use_clipped_model_output=True`, which is what guided-diffusion does. 1e-4 as above: float32 tables, and
        eps = (x - sqrt(bar alpha) x_0) / sqrt(1 - bar alpha) magnifies rounding by 100 at t = 0.
        """
        config = {"prediction_type": prediction_type, "clip_sample": clip_sample}
        ours = LearnedVarianceDDPMScheduler(variance_type="learned_range", **config)
        theirs = DDIMScheduler(**config)
        x, output = randn(*SHAPE, dtype=torch.float32), outputs_for(ours, torch.float32)
        for steps in (50, 1000):
            ours.set_timesteps(steps)
            theirs.set_timesteps(steps)
            for t in theirs.timesteps.tolist()[:: steps // 25] + [0]:
                noise = randn(*SHAPE, seed=t, dtype=torch.float32)
                mine = ours.step(output, t, x, eta=eta, variance_noise=noise)
                other = theirs.step(output[:, :3], t, x, eta=eta, use_clipped_model_output=True, variance_noise=noise)
                assert_close(mine.prev_sample, other.prev_sample, rtol=1e-4, atol=1e-4)
                assert_close(mine.pred_original_sample, other.pred_original_sample, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
    def test_ddim_formula(self, eta):
        """DDIM, eqs. 12 and 16, in float64, with uneven timesteps."""
        scheduler = LearnedVarianceDDPMScheduler(variance_type="learned_range")
        scheduler.set_timesteps(timesteps=[999, 400, 30])
        bar_alpha = process()[0] | {-1: 1.0}
        x, output, noise = randn(*SHAPE), outputs_for(scheduler), randn(*SHAPE, seed=9)
        for t, previous in ((999, 400), (400, 30), (30, -1)):
            a, b = bar_alpha[t], bar_alpha[previous]
            x_0 = ((x - math.sqrt(1 - a) * output[:, :3]) / math.sqrt(a)).clamp(-1, 1)
            eps = (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)
            sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
            expected = math.sqrt(b) * x_0 + math.sqrt(1 - b - sigma**2) * eps + sigma * noise
            step = scheduler.step(output, t, x, eta=eta, variance_noise=noise)
            assert_close(step.prev_sample, expected, rtol=0, atol=1e-11)

    def test_negative_eta(self):
        scheduler = LearnedVarianceDDPMScheduler()
        with pytest.raises(ValueError, match="`eta` is -0.1"):
            scheduler.step(outputs_for(scheduler), 3, randn(*SHAPE), eta=-0.1)

    @pytest.mark.parametrize("variance_type", get_args(VarianceType))
    def test_guidance_gradient_ancestral(self, variance_type):
        """
        ADM, algorithm 1: the mean moves by Sigma g; x_0 as the network said. The variance of `fixed_small`, beta_tilde,
        is 0 at the last step; `log_variance`, whose exponential was once taken for it, is that of the step before.
        """
        scheduler = LearnedVarianceDDPMScheduler(variance_type=variance_type)
        x, output, gradient = randn(*SHAPE), outputs_for(scheduler), randn(*SHAPE, seed=7)
        noise = randn(*SHAPE, seed=8)
        for t in TIMESTEPS:
            mean, log_variance, x_0 = scheduler.predicted_distribution(output, t, x)
            variance = full(process()[2][t]) if variance_type == "fixed_small" else log_variance.exp()
            expected = mean + variance * gradient + (t > 0) * (0.5 * log_variance).exp() * noise
            step = scheduler.step(output, t, x, guidance_gradient=gradient, variance_noise=noise)
            assert_close(step.prev_sample, expected, rtol=0, atol=1e-12)
            assert_close(step.pred_original_sample, x_0, rtol=0, atol=0)

    @pytest.mark.parametrize("eta", [0.0, 0.5])
    def test_guidance_gradient_ddim(self, eta):
        """ADM, algorithm 2: eps - sqrt(1 - bar alpha) g, after clipping, and no second clip."""
        scheduler = LearnedVarianceDDPMScheduler()
        scheduler.set_timesteps(timesteps=[600, 400, 30])
        x, output, gradient = randn(*SHAPE), outputs_for(scheduler), randn(*SHAPE, seed=7)
        noise = randn(*SHAPE, seed=8)
        bar_alpha = process()[0] | {-1: 1.0}
        for t, previous in ((600, 400), (400, 30), (30, -1)):
            a, b = bar_alpha[t], bar_alpha[previous]
            clipped = ((x - math.sqrt(1 - a) * output[:, :3]) / math.sqrt(a)).clamp(-1, 1)
            eps = (x - math.sqrt(a) * clipped) / math.sqrt(1 - a) - math.sqrt(1 - a) * gradient
            x_0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            assert (x_0.abs() > 1).any()
            sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
            expected = math.sqrt(b) * x_0 + math.sqrt(1 - b - sigma**2) * eps + sigma * noise
            step = scheduler.step(output, t, x, eta=eta, guidance_gradient=gradient, variance_noise=noise)
            assert_close(step.prev_sample, expected, rtol=0, atol=1e-10)
            assert_close(step.pred_original_sample, x_0, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("form", ["int", "per example"])
    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    def test_guided_ddim_rounds_like_the_formulas_in_float32(self, eta, form):
        """
        ADM, algorithm 2, and DDIM, eqs. 12 and 16, word by word in float32, as the papers' code computes them. At the
        end of a long cosine schedule 1 - bar alpha has few digits left in float32. Coefficients computed in float64 and
        rounded afterwards are nearer to the truth and end far from the samples of that code: known wrong.
        """
        scheduler = LearnedVarianceDDPMScheduler(4000, beta_schedule="cosine", prediction_type="sample")
        scheduler.set_timesteps(timestep_respacing="25")
        kept = scheduler.timesteps.tolist()
        bar_alpha = process(cosine_betas(4000), range(4000))[0] | {-1: 1.0}
        variance_output = randn(*SHAPE, seed=1, dtype=torch.float32)

        def network(x):
            return 0.5 * torch.tanh(x), torch.sin(1.7 * x) - 0.4 * x  # x_0 and the gradient

        def formulas(x, x_0, gradient, t, previous, noise, precision):
            a, b = (torch.tensor(bar_alpha[s], dtype=torch.float64) for s in (t, previous))
            recip, recipm1 = (1 / a).sqrt().float(), (1 / a - 1).sqrt().float()
            a, b = a.to(precision), b.to(precision)
            sigma = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
            coefficients = b.sqrt(), (1 - b - sigma**2).clamp(min=0).sqrt(), sigma, (1 - a).sqrt()
            signal, direction, sigma, std = (coefficient.float() for coefficient in coefficients)
            eps = (recip * x - x_0) / recipm1 - std * gradient
            x_0 = recip * x - recipm1 * eps
            eps = (recip * x - x_0) / recipm1
            return x_0 * signal + direction * eps + sigma * noise

        sample, largest = randn(*SHAPE, dtype=torch.float32), 0.0
        for t, previous in zip(kept, [*kept[1:], -1], strict=True):
            noise = randn(*SHAPE, seed=t, dtype=torch.float32)
            x_0, gradient = network(sample)
            timestep = t if form == "int" else torch.full((len(sample),), t)
            ours = scheduler.step(
                torch.cat([x_0, variance_output], dim=1),
                timestep,
                sample,
                eta=eta,
                guidance_gradient=gradient,
                variance_noise=noise,
            ).prev_sample
            expected, wrong = (
                formulas(sample, x_0, gradient, t, previous, noise, precision)
                for precision in (torch.float32, torch.float64)
            )
            scale = expected.abs().max().item()
            # Each step from the same sample: the last digits of one step would grow a hundredfold in the later ones.
            # Where `sigma`, which comes from square roots and quotients of vectors here and of scalars there, differs
            # by a rounding error, 1 - bar alpha - sigma ** 2 cancels and the step differs by up to 4e-6.
            assert_close(ours, expected, rtol=0, atol=1e-5 * scale)
            largest = max(largest, ((wrong - expected).abs().max() / scale).item())
            sample = expected
        assert largest > 3e-5

    def test_eta_and_dtype_may_change_from_step_to_step(self):
        """The tables of an eta are kept for the next step; no other eta must get them, and no other dtype."""
        scheduler, x, noise = LearnedVarianceDDPMScheduler(), randn(*SHAPE), randn(*SHAPE, seed=9)
        output = outputs_for(scheduler)
        for eta in (0.5, 0.0, 1.0, 0.5):
            for dtype in (torch.float32, torch.float64):
                arguments = output.to(dtype), 500, x.to(dtype)
                step = scheduler.step(*arguments, eta=eta, variance_noise=noise)
                alone = LearnedVarianceDDPMScheduler().step(*arguments, eta=eta, variance_noise=noise)
                assert torch.equal(step.prev_sample, alone.prev_sample)

    def test_list_of_generators(self):
        """One per example: each gets what it would get alone."""
        scheduler = LearnedVarianceDDPMScheduler()
        x, output = randn(*SHAPE), outputs_for(scheduler)
        together = scheduler.step(
            output, 500, x, generator=[torch.Generator().manual_seed(i) for i in range(4)]
        ).prev_sample
        for i in range(4):
            alone = scheduler.step(output[i : i + 1], 500, x[i : i + 1], generator=torch.Generator().manual_seed(i))
            assert_close(together[i : i + 1], alone.prev_sample, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("eta", [None, 0.0, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtypes(self, dtype, eta):
        """Out comes what went in; inside, half precision is float32, rounded once at the end."""
        scheduler = LearnedVarianceDDPMScheduler()
        x, output = randn(*SHAPE, dtype=dtype), outputs_for(scheduler, dtype)
        gradient, noise = randn(*SHAPE, seed=4, dtype=dtype), randn(*SHAPE, seed=5, dtype=dtype)
        inside = torch.promote_types(dtype, torch.float32)
        for t in (500, torch.tensor([0, 1, 500, 999])):
            options = {"eta": eta, "guidance_gradient": gradient, "variance_noise": noise}
            step = scheduler.step(output, t, x, **options)
            assert step.prev_sample.dtype == step.pred_original_sample.dtype == dtype
            options |= {"guidance_gradient": gradient.to(inside), "variance_noise": noise.to(inside)}
            wide = scheduler.step(output.to(inside), t, x.to(inside), **options)
            assert_close(step.prev_sample, wide.prev_sample.to(dtype), rtol=0, atol=0)
            assert_close(step.pred_original_sample, wide.pred_original_sample.to(dtype), rtol=0, atol=0)
            for value in scheduler.predicted_distribution(output, t, x):
                assert value.dtype == inside
            for value in scheduler.posterior_distribution(x, noise, t):
                assert value.dtype == inside
            assert scheduler.variational_bound(output, x, noise, t).dtype == inside
            assert scheduler.prior_bits_per_dim(x).dtype == inside
            assert scheduler.add_noise(x, noise, t).dtype == dtype
            assert scheduler.get_velocity(x, noise, t).dtype == dtype


class TestTimestepForms:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("variance_type", get_args(VarianceType))
    def test_per_example_is_one_by_one(self, variance_type, dtype):
        """float32: a number computed by Python in float64 against the same one computed by torch in float32."""
        atol = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
        scheduler = LearnedVarianceDDPMScheduler(variance_type=variance_type)
        x, x_0, noise = (
            randn(*SHAPE, dtype=dtype),
            randn(*SHAPE, seed=3, dtype=dtype),
            randn(*SHAPE, seed=4, dtype=dtype),
        )
        output = outputs_for(scheduler, dtype)

        def call_all(i, t):
            x_i, x_0_i, noise_i, output_i = (tensor[i] for tensor in (x, x_0, noise, output))
            options = {"variance_noise": noise_i, "guidance_gradient": 0.1 * x_0_i, "return_dict": False}
            return [
                scheduler.add_noise(x_0_i, noise_i, t),
                scheduler.get_velocity(x_0_i, noise_i, t),
                *scheduler.posterior_distribution(x_0_i, x_i, t),
                *scheduler.predicted_distribution(output_i, t, x_i),
                scheduler.variational_bound(output_i, x_0_i, x_i, t),
                *scheduler.step(output_i, t, x_i, **options),
                *scheduler.step(output_i, t, x_i, eta=0.0, **options),
                *scheduler.step(output_i, t, x_i, eta=1.0, **options),
            ]

        together = call_all(slice(None), torch.tensor(TIMESTEPS))
        for i, t in enumerate(TIMESTEPS):
            for alone, of_all in zip(call_all(slice(i, i + 1), t), together, strict=True):
                scale = alone.abs().max().clamp(min=1).item()
                assert_close(of_all[i : i + 1], alone, rtol=0, atol=atol * scale)

    def test_forms_of_one_timestep(self):
        scheduler = LearnedVarianceDDPMScheduler()
        x, output, noise = randn(*SHAPE), outputs_for(scheduler), randn(*SHAPE, seed=4)
        expected = scheduler.step(output, 500, x, variance_noise=noise).prev_sample
        forms = [torch.tensor(500), torch.tensor([500]), np.int64(500), torch.full((4,), 500), torch.tensor(500).int()]
        for t in forms:
            assert_close(scheduler.step(output, t, x, variance_noise=noise).prev_sample, expected, rtol=0, atol=1e-12)
            assert_close(scheduler.add_noise(x, noise, t), scheduler.add_noise(x, noise, 500), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("t", [-1, 1000, 1, torch.tensor(1), torch.tensor([0, 999, 1, 0])])
    def test_not_among_the_timesteps(self, t):
        scheduler = LearnedVarianceDDPMScheduler()
        scheduler.set_timesteps(timestep_respacing="25")
        x, output = randn(*SHAPE), outputs_for(scheduler)
        match = r"`timestep` is (-1|1000); .* 0 to 999|`timestep` is 1, which is not one of the 25 timesteps"
        with pytest.raises(ValueError, match=match):
            scheduler.step(output, t, x)
        with pytest.raises(ValueError, match=match):
            scheduler.predicted_distribution(output, t, x, timestep_respacing="25")
        with pytest.raises(ValueError, match=match):
            scheduler.variational_bound(output, x, x, t, timestep_respacing="25")
        if not torch.is_tensor(t) and t != 1:
            with pytest.raises(ValueError, match=match):
                scheduler.add_noise(x, x, t)

    @pytest.mark.parametrize("t", [torch.tensor([1, 2]), torch.zeros(4, 1, dtype=torch.long)])
    def test_wrong_number(self, t):
        scheduler = LearnedVarianceDDPMScheduler()
        with pytest.raises(ValueError, match=r"`timestep` has shape \(.*for 4 examples"):
            scheduler.step(outputs_for(scheduler), t, randn(*SHAPE))
        with pytest.raises(ValueError, match=r"`timestep` has shape \(.*for 4 examples"):
            scheduler.add_noise(randn(*SHAPE), randn(*SHAPE), t)


class CopiesToDevice(TorchDispatchMode):
    """Counts tensors that go from the CPU to another device."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sources = [a.device.type for a in args if isinstance(a, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.device.type != "cpu" and "cpu" in sources:
            self.number += 1
        return result


class TestNoSynchronisation:
    """
    On the "meta" device there are shapes and no numbers, so whatever would have to wait for an accelerator (`.item()`,
    `.cpu()`, `nonzero`, `if tensor`) raises there.
    """

    @pytest.mark.parametrize("options", [{}, {"thresholding": True}, {"prediction_type": "v_prediction"}])
    @pytest.mark.parametrize("eta", [None, 0.0, 0.5])
    @pytest.mark.parametrize("variance_type", get_args(VarianceType))
    def test_step(self, variance_type, eta, options):
        scheduler = LearnedVarianceDDPMScheduler(variance_type=variance_type, **options)
        scheduler.set_timesteps(10, device="meta")
        x = torch.empty(SHAPE, device="meta")
        output = torch.empty(4, 6 if scheduler.has_learned_variance else 3, 5, 2, device="meta")
        for t in (scheduler.timesteps[0], scheduler.timesteps[:4], scheduler.timesteps[:1]):
            step = scheduler.step(output, t, x, eta=eta, guidance_gradient=x)
            assert step.prev_sample.shape == step.pred_original_sample.shape == SHAPE
        with CopiesToDevice() as copies:  # the tables are there now
            scheduler.step(output, t, x, eta=eta, guidance_gradient=x)
        assert copies.number == 0

    def test_training(self):
        scheduler = LearnedVarianceDDPMScheduler()
        x, output = torch.empty(SHAPE, device="meta"), torch.empty(4, 6, 5, 2, device="meta")
        t = torch.empty(4, dtype=torch.long, device="meta")
        for _ in range(2):
            with CopiesToDevice() as copies:
                assert scheduler.add_noise(x, x, t).shape == SHAPE
                assert scheduler.get_velocity(x, x, t).shape == SHAPE
                assert all(value.shape == SHAPE for value in scheduler.predicted_distribution(output, t, x))
                assert scheduler.variational_bound(output, x, x, t).shape == (4,)
                assert scheduler.prior_bits_per_dim(x).shape == (4,)
                assert scheduler.signal_to_noise_ratio(t).shape == (4,)
        assert copies.number == 0

    def test_the_check_itself(self):
        """Known wrong: reading a timestep does raise there, and an upload is counted."""
        with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
            LearnedVarianceDDPMScheduler().previous_timestep(torch.empty((), dtype=torch.long, device="meta"))
        with CopiesToDevice() as copies:
            torch.ones(3).to("meta")
        assert copies.number == 1

    def test_a_timestep_that_cannot_be_checked_gives_nan(self):
        """What a device does with a timestep that is not kept, here on the CPU, after the check."""
        scheduler = LearnedVarianceDDPMScheduler()
        scheduler.set_timesteps(timestep_respacing="25")
        for values in scheduler._process.lookup(torch.tensor([0, 1, 999, 2]), randn(*SHAPE)):
            assert values.shape == (4, 1, 1, 1)
            assert values.flatten().isnan().tolist() == [False, True, False, True]


class TestBound:
    def test_kl(self):
        means, log_variances = randn(2, 50), randn(2, 50, seed=1)
        p, q = (Normal(m, (0.5 * v).exp()) for m, v in zip(means, log_variances, strict=True))
        ours = normal_kl(means[0], log_variances[0], means[1], log_variances[1])
        assert_close(ours, kl_divergence(p, q), rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("std", [1e-3, 0.01, 0.3, 5.0])
    @pytest.mark.parametrize("mean", [-1.2, -1.0, 0.003, 0.7, 1.0])
    def test_decoder_sums_to_one(self, mean, std):
        """Over the 256 levels; a level's probability is not allowed below 1e-12, hence the tolerance."""
        levels = torch.tensor([2 * k / 255 - 1 for k in range(256)], dtype=torch.float64)
        mean, log_std = torch.full_like(levels, mean), torch.full_like(levels, math.log(std))
        probabilities = discretized_gaussian_log_likelihood(levels, mean, log_std).exp()
        assert probabilities.sum().item() == pytest.approx(1, abs=256e-12)
        # Against the exact normal distribution: its cdf is approximated to 2e-4, each bin has two ends.
        edges = torch.cat([levels[:1] - math.inf, levels[:-1] + 1 / 255, levels[-1:] + math.inf])
        exact = Normal(mean[0], std).cdf(edges.nan_to_num(neginf=-1e9, posinf=1e9)).diff()
        assert_close(probabilities, exact, rtol=0, atol=4e-4)

    def test_decoder_in_float32(self):
        levels = torch.tensor([2 * k / 255 - 1 for k in range(256)], dtype=torch.float64).float()
        total = discretized_gaussian_log_likelihood(levels, torch.zeros(256), torch.full((256,), -3.0)).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-5)
        # Probabilities too small for a number have a finite logarithm, and no gradient of NaN.
        mean = torch.zeros(256, requires_grad=True)
        log_std = torch.full((256,), -9.0, requires_grad=True)
        likelihood = discretized_gaussian_log_likelihood(levels, mean, log_std)
        assert likelihood.min().item() == pytest.approx(math.log(1e-12), rel=1e-5)
        likelihood.sum().backward()
        assert mean.grad.isfinite().all()
        assert log_std.grad.isfinite().all()

    @pytest.mark.parametrize("respacing", [None, "25"])
    @pytest.mark.parametrize("variance_type", get_args(VarianceType))
    def test_terms(self, variance_type, respacing):
        """Bits: nats / log 2; dimensions: the mean over channels and pixels; one value an example."""
        scheduler = LearnedVarianceDDPMScheduler(variance_type=variance_type)
        x_0 = (randn(*SHAPE).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
        output, t = outputs_for(scheduler), torch.tensor([0, 42 if respacing else 1, 500, 999])
        x_t = scheduler.add_noise(x_0, randn(*SHAPE, seed=5), t)
        bound = scheduler.variational_bound(output, x_0, x_t, t, timestep_respacing=respacing)
        assert bound.shape == (4,)
        true = scheduler.posterior_distribution(x_0, x_t, t, timestep_respacing=respacing)
        predicted = scheduler.predicted_distribution(output, t, x_t, timestep_respacing=respacing)[:2]
        q, p = (Normal(mean, (0.5 * log_variance).exp()) for mean, log_variance in (true, predicted))
        kl = kl_divergence(q, p).mean(dim=(1, 2, 3)) / math.log(2)
        assert_close(bound[1:], kl[1:], rtol=1e-9, atol=1e-9)
        decoder = -discretized_gaussian_log_likelihood(x_0, predicted[0], 0.5 * predicted[1]) / math.log(2)
        assert_close(bound[0], decoder.mean(dim=(1, 2, 3))[0], rtol=1e-9, atol=0)

    def test_perfect_prediction_costs_nothing(self):
        scheduler = LearnedVarianceDDPMScheduler(variance_type="fixed_small", prediction_type="sample")
        x_0, t = randn(*SHAPE).clamp(-1, 1), torch.tensor([1, 2, 500, 999])
        x_t = scheduler.add_noise(x_0, randn(*SHAPE, seed=5), t)
        bound = scheduler.variational_bound(x_0, x_0, x_t, t)
        assert_close(bound, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)

    def test_clipping_is_a_choice(self):
        scheduler = LearnedVarianceDDPMScheduler()
        unclipped = LearnedVarianceDDPMScheduler(clip_sample=False)
        x_0, output = randn(*SHAPE).clamp(-1, 1), outputs_for(scheduler)
        x_t = scheduler.add_noise(x_0, randn(*SHAPE, seed=5), 900)
        default = scheduler.variational_bound(output, x_0, x_t, 900)
        off = scheduler.variational_bound(output, x_0, x_t, 900, clip_sample=False)
        assert (off > default + 1e-3).all()
        assert_close(unclipped.variational_bound(output, x_0, x_t, 900), off, rtol=1e-12, atol=0)
        assert_close(unclipped.variational_bound(output, x_0, x_t, 900, clip_sample=True), default, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
    def test_prior(self, schedule):
        x_0 = randn(*SHAPE)
        scheduler = LearnedVarianceDDPMScheduler(100, beta_schedule=schedule)
        bar_alpha = cumulative_alphas(linear_betas(100) if schedule == "linear" else cosine_betas(100))[-1]
        q = Normal(math.sqrt(bar_alpha) * x_0, math.sqrt(1 - bar_alpha))
        expected = kl_divergence(q, Normal(torch.zeros_like(x_0), 1.0)).mean(dim=(1, 2, 3)) / math.log(2)
        assert_close(scheduler.prior_bits_per_dim(x_0), expected, rtol=1e-9, atol=1e-12)

    def test_gradients_reach_mean_and_variance(self):
        """Every term trains both; none is NaN, not even where `torch.where` took the other value."""
        scheduler = LearnedVarianceDDPMScheduler()
        x_0, t = randn(*SHAPE, dtype=torch.float32).clamp(-1, 1), torch.tensor(TIMESTEPS)
        x_t = scheduler.add_noise(x_0, randn(*SHAPE, seed=5, dtype=torch.float32), t)
        output = outputs_for(scheduler, torch.float32).requires_grad_()
        scheduler.variational_bound(output, x_0, x_t, t, clip_sample=False).sum().backward()
        assert output.grad.isfinite().all()
        assert (output.grad[:, :3].abs().flatten(1).amax(dim=1) > 0).all()
        assert (output.grad[:, 3:].abs().flatten(1).amax(dim=1) > 0).all()


def test_values_that_are_no_timesteps_is_refused():
    scheduler = LearnedVarianceDDPMScheduler()
    sample, output = torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 4, 4)
    for timestep in (3.7, torch.tensor(3.0), torch.tensor([3.0, 4.0])):
        with pytest.raises(ValueError, match="integers"):
            scheduler.step(output, timestep, sample)
    assert torch.equal(scheduler.predicted_distribution(output, 3.0, sample)[0], torch.zeros_like(sample))
    with pytest.raises(ValueError, match=r"The betas are \[\]; .*`num_train_timesteps`"):
        LearnedVarianceDDPMScheduler(num_train_timesteps=0)


def test_guided_ddim_is_refused_where_it_has_no_x0():
    scheduler = LearnedVarianceDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    sample, output = torch.zeros(1, 3, 4, 4), torch.zeros(1, 6, 4, 4)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        scheduler.step(output, 999, sample, eta=0.0, guidance_gradient=sample)
    assert scheduler.step(output, 999, sample, guidance_gradient=sample).prev_sample.isfinite().all()


def test_prior_of_respaced_timesteps_is_that_of_the_last_one():
    scheduler = LearnedVarianceDDPMScheduler()
    original = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(1, 3, 4, 4)
    last = 980  # of "ddim50" out of 1000: every twentieth timestep
    q = torch.distributions.Normal(
        scheduler.alphas_cumprod[last].sqrt() * original, (1 - scheduler.alphas_cumprod[last]).sqrt()
    )
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean() / np.log(2)
    assert torch.allclose(scheduler.prior_bits_per_dim(original, timestep_respacing="ddim50"), expected, rtol=1e-10)


def test_ddim_with_betas_that_vanish_in_float32():
    """1 - bar alpha is 0 in float32 at the first timesteps; 0 / 0 must not reach the sample."""
    scheduler = LearnedVarianceDDPMScheduler(trained_betas=[1e-9, 1e-9, 0.1, 0.2], variance_type="fixed_small")
    sample = torch.full((1, 1, 2, 2), 0.5)
    for timestep in (3, 2, 1, 0):
        sample = scheduler.step(torch.zeros_like(sample), timestep, sample, eta=1.0).prev_sample
    assert sample.isfinite().all()
