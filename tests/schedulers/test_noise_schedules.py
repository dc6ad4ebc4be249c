"""Noise schedules: what a network's config holds, and which schedules count as the same."""

import json
import math
import re
from typing import get_args

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.schedulers.noise_schedules import (
    BETA_SCHEDULE_ALIASES,
    BetaSchedule,
    BetaScheduleName,
    alphas_cumprod_of,
    check_same_noise,
    describe_noise_schedule,
    make_betas,
    noise_schedule_of,
)


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
BETAS = [0.01, 0.02, 0.04, 0.08]


def ours(**config):
    return LearnedVarianceDDPMScheduler(**config)


class TestEntries:
    @pytest.mark.parametrize(
        "config, expected",
        [
            (
                {},
                {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
            ),
            (
                {"num_train_timesteps": 40, "beta_schedule": "sigmoid", "beta_end": 0.3},
                {"num_train_timesteps": 40, "beta_schedule": "sigmoid", "beta_start": 0.0001, "beta_end": 0.3},
            ),
            # First and last beta have no effect here, nor do arguments that do not concern the schedule.
            (
                {"beta_schedule": "cosine", "beta_end": 0.3, "clip_sample": False, "timestep_spacing": "trailing"},
                {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
            ),
            ({"trained_betas": BETAS}, {"num_train_timesteps": 4, "trained_betas": BETAS}),
            ({"trained_betas": np.array(BETAS)}, {"num_train_timesteps": 4, "trained_betas": BETAS}),
            (
                {"trained_betas": BETAS, **ZERO_SNR},
                {"num_train_timesteps": 4, "trained_betas": BETAS, "rescale_betas_zero_snr": True},
            ),
        ],
        ids=str,
    )
    def test_only_what_the_noise_depends_on(self, config, expected):
        schedule = noise_schedule_of(ours(**config))
        assert schedule == expected
        assert json.loads(json.dumps(schedule)) == schedule
        # The same functions in float64, on either side.
        np.testing.assert_allclose(alphas_cumprod_of(schedule), ours(**config).alphas_cumprod.numpy(), rtol=1e-14)

    def test_bar_alpha_is_the_product(self):
        products = [math.prod(1 - beta for beta in BETAS[: t + 1]) for t in range(4)]
        np.testing.assert_allclose(alphas_cumprod_of({"trained_betas": BETAS}), products, rtol=1e-14)

    def test_of_schedulers_of_diffusers(self):
        scheduler = EulerDiscreteScheduler(200, beta_schedule="scaled_linear", beta_end=0.1)
        expected = {"num_train_timesteps": 200, "beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.1}
        assert noise_schedule_of(scheduler) == expected
        # One of theirs without a name here is described by its betas, of which float32 gives six digits.
        scheduler = DDPMScheduler(100, beta_schedule="laplace")
        schedule = noise_schedule_of(scheduler)
        np.testing.assert_allclose(schedule["trained_betas"], scheduler.betas, rtol=1e-3)
        check_same_noise("It", schedule, scheduler)
        with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler, which has no `alphas_cumprod`"):
            noise_schedule_of(FlowMatchEulerDiscreteScheduler())

    @pytest.mark.parametrize(
        "schedule",
        [
            {"beta_schedule": "squaredcos_cap_v2"},
            {"num_train_timesteps": 10, "beta_schedule": "linear"},
            {"num_train_timesteps": 10, "beta_schedule": "cosinus"},
            {"num_train_timesteps": 10, "beta_schedule": "cosine", "steps": 3},
        ],
        ids=str,
    )
    def test_what_is_no_schedule(self, schedule):
        with pytest.raises(ValueError, match=re.escape(f"`noise_schedule` is {schedule}, which is not understood")):
            alphas_cumprod_of(schedule)
        with pytest.raises(TypeError, match="`noise_schedule` is 'cosine'; it must be a dictionary"):
            check_same_noise("It", "cosine", ours())


def test_names():
    """Every alias is an accepted name, stands for a name, and gives its betas."""
    assert set(get_args(BetaScheduleName)) == {*get_args(BetaSchedule), *BETA_SCHEDULE_ALIASES}
    for alias, name in BETA_SCHEDULE_ALIASES.items():
        assert name in get_args(BetaSchedule)
        np.testing.assert_array_equal(make_betas(alias, 10, 1e-4, 0.02), make_betas(name, 10, 1e-4, 0.02))


class TestSame:
    """Tables are compared, not names."""

    COSINE = noise_schedule_of(LearnedVarianceDDPMScheduler(beta_schedule="cosine"))
    LINEAR = noise_schedule_of(LearnedVarianceDDPMScheduler())

    @pytest.mark.parametrize(
        "schedule, scheduler",
        [
            (COSINE, ours(beta_schedule="squaredcos_cap_v2", beta_end=0.5)),
            (COSINE | {"beta_schedule": "cosine", "beta_start": 0.3}, ours(beta_schedule="cosine")),
            (COSINE, ours(trained_betas=ours(beta_schedule="cosine").betas.tolist())),
            (noise_schedule_of(ours(trained_betas=ours(beta_schedule="cosine").betas)), ours(beta_schedule="cosine")),
            (noise_schedule_of(ours(beta_schedule="quadratic")), ours(beta_schedule="scaled_linear")),
            (LINEAR, ours(variance_type="fixed_small", prediction_type="sample", timestep_spacing="trailing")),
            # Tables of float32; and 2**-24 in place of no signal.
            (noise_schedule_of(ours(num_train_timesteps=4000)), DDPMScheduler(4000)),
            (noise_schedule_of(ours(**ZERO_SNR)), DDIMScheduler(**ZERO_SNR)),
            (noise_schedule_of(ours(**ZERO_SNR)), EulerDiscreteScheduler(**ZERO_SNR)),
            (LINEAR, FlowMatchEulerDiscreteScheduler()),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_accepted(self, schedule, scheduler):
        check_same_noise("It", schedule, scheduler)

    def test_respacing_does_not_matter(self):
        scheduler = ours()
        scheduler.set_timesteps(timestep_respacing="ddim50")
        check_same_noise("It", self.LINEAR, scheduler)

    def test_tables_that_have_been_moved(self):
        """`add_noise` of diffusers' schedulers leaves theirs on the device of the samples."""
        scheduler = DDPMScheduler()
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(torch.float64)
        check_same_noise("It", self.LINEAR, scheduler)

    @pytest.mark.parametrize(
        "scheduler, words",
        [
            (ours(), "LearnedVarianceDDPMScheduler, has the noise schedule linear from 0.0001 to 0.02 with 1000"),
            (DDIMScheduler(), "DDIMScheduler, has the noise schedule linear from 0.0001 to 0.02 with 1000 timesteps"),
            (ours(beta_schedule="cosine", num_train_timesteps=999), "squaredcos_cap_v2 with 999 timesteps."),
            (ours(beta_schedule="cosine", **ZERO_SNR), "1000 timesteps, rescaled to zero terminal SNR. At timestep"),
            (ours(trained_betas=[0.01] * 1000), "of 1000 trained betas"),
        ],
        ids=lambda value: None if isinstance(value, str) else type(value).__name__,
    )
    def test_refused_with_both_named(self, scheduler, words):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            check_same_noise("`part`", self.COSINE, scheduler)
        message = "`part` was trained on the noise schedule squaredcos_cap_v2 with 1000 timesteps, but `scheduler`, a "
        assert str(error.value).startswith(message)

    def test_the_message_says_where_they_differ_most(self):
        with pytest.raises(ValueError, match="At timestep") as error:
            check_same_noise("`part`", self.COSINE, ours())
        # By hand: bar alpha of both, without their betas.
        t = np.arange(1000)
        cosine = (np.cos((t / 1000 + 0.009) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
        linear = np.exp(np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000))))
        most = int(np.abs(cosine - linear).argmax())
        expected = f"timestep {most}, `alphas_cumprod` is {cosine[most]:.6g} there and {linear[most]:.6g} here"
        assert expected in str(error.value)

    @pytest.mark.parametrize("change", [{"beta_end": 0.02002}, {"beta_start": 0.00011}, {"num_train_timesteps": 1001}])
    def test_small_differences_are_seen_through_float32(self, change):
        for cls in (LearnedVarianceDDPMScheduler, DDPMScheduler):
            with pytest.raises(ValueError, match="was trained on the noise schedule linear"):
                check_same_noise("It", self.LINEAR, cls(**change))

    def test_clean_images(self):
        with pytest.raises(ValueError, match="`classifier` was trained on clean images"):
            check_same_noise("`classifier`", {}, ours())
        assert describe_noise_schedule({}) == "of clean images"


def test_a_network_without_a_schedule_is_reported_once(caplog):
    parts = [torch.nn.Linear(1, 1) for _ in range(2)]
    for part in (*parts, *parts):
        check_same_noise("`classifier`", None, ours(), part)
    assert caplog.text.count("`classifier` does not say which noise schedule it was trained on") == 2
    assert "record it with `register_to_config(noise_schedule=noise_schedule_of(scheduler))`" in caplog.text


def test_every_diffusers_scheduler_has_a_schedule():
    """By name, or else by its betas, for every scheduler with `alphas_cumprod`."""
    compared = []
    for name in dir(diffusers):
        cls = getattr(diffusers, name)
        if name.endswith("Scheduler") and not name.startswith("Flax") and isinstance(cls, type):
            try:
                scheduler = cls()
            except (ImportError, TypeError):  # a package that is missing, or arguments of its own
                continue
            if torch.is_tensor(getattr(scheduler, "alphas_cumprod", None)) and hasattr(scheduler, "config"):
                check_same_noise(name, noise_schedule_of(scheduler), scheduler)
                compared.append(name)
    assert len(compared) > 20
