"""
Inversion of DDIM steps, against closed forms for Gaussian data, against the DDIM steps of this package and of
diffusers, and against diffusers' `DDIMInverseScheduler`.

For Gaussian data the exact network is affine (see `analytic_distributions.py`), so each DDIM step multiplies the
distance from the mean of x_t by a number, and its inverse divides by it.
"""

import math

import pytest
import torch
from analytic_distributions import Gaussian, cumulative_alphas, linear_betas
from diffusers import DDIMInverseScheduler, DDIMScheduler, EulerDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.schedulers.scheduling_ddim_inversion import DDIMInversionScheduler


T = 1000
DATA = Gaussian([0.5, -0.3, 0.0], [0.7, 0.4, 1.0])
# float64 against float64 with about 1000 roundings.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
# diffusers computes its coefficients in float32: roots of 1 - bar alpha, which is 1e-4 at the first timestep and has an
# error of 6e-8 there, divided by the shrinkage of up to 20 steps.
FLOAT32_TABLES = {"rtol": 1e-4, "atol": 1e-4}


def ours(**config) -> LearnedVarianceDDPMScheduler:
    return LearnedVarianceDDPMScheduler(**{"variance_type": "fixed_small", "clip_sample": False, **config})


def network(x: torch.Tensor, alpha: float, prediction_type: str) -> torch.Tensor:
    """The exact network of `DATA` at bar alpha."""
    a, s = math.sqrt(alpha), math.sqrt(1 - alpha)
    x_0, _ = DATA.given_noisy(x, torch.full((len(x), 1), alpha, dtype=torch.float64))
    # epsilon without a division by s, and v from both.
    variance = alpha * DATA.std**2 + 1 - alpha
    epsilon = s / variance * (x - a * DATA.mean)
    return {"epsilon": epsilon, "sample": x_0, "v_prediction": a * epsilon - s * x_0}[prediction_type]


def run(scheduler, x: torch.Tensor, prediction_type: str = "epsilon", **kwargs) -> torch.Tensor:
    alphas = scheduler.alphas_cumprod.double()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(alphas[t]), prediction_type), t, x, **kwargs).prev_sample
    return x


def inversion_of(scheduler, iterations: int, steps: int = 20, **kwargs) -> DDIMInversionScheduler:
    inversion = DDIMInversionScheduler(type(scheduler).from_config(scheduler.config), iterations)
    inversion.set_timesteps(steps, **kwargs)
    return inversion


@pytest.fixture
def x_0() -> torch.Tensor:
    noise = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return DATA.mean + DATA.std * noise


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_many_iterations_give_the_exact_inverse(prediction_type, x_0):
    scheduler = ours(prediction_type=prediction_type)
    noise = run(inversion_of(scheduler, 100), x_0, prediction_type)
    # The closed form: what each of the steps multiplies the distance from the mean of x_t by.
    alphas = cumulative_alphas(linear_betas(T))
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps.tolist()
    factor = torch.ones(3, dtype=torch.float64)
    for t, previous in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha, alpha_prev = alphas[t], 1.0 if previous is None else alphas[previous]
        variance = alpha * DATA.std**2 + 1 - alpha
        noise_part = math.sqrt((1 - alpha) * (1 - alpha_prev))
        factor = factor * (math.sqrt(alpha * alpha_prev) * DATA.std**2 + noise_part) / variance
    expected = math.sqrt(alphas[timesteps[0]]) * DATA.mean + (x_0 - DATA.mean) / factor
    torch.testing.assert_close(noise, expected, **EXACT)
    torch.testing.assert_close(run(scheduler, noise, prediction_type, eta=0.0), x_0, **EXACT)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_a_ddim_step_with_the_same_prediction_leads_back(iterations):
    # Whatever the network predicts in the last evaluation of a timestep.
    generator = torch.Generator().manual_seed(1)
    scheduler = ours()
    inversion = inversion_of(scheduler, iterations, steps=10)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    for index in range(0, len(inversion.timesteps), iterations):
        start = x
        for t in inversion.timesteps[index : index + iterations]:
            prediction = torch.randn(x.shape, dtype=x.dtype, generator=generator)
            x = inversion.step(prediction, t, x).prev_sample
        back = scheduler.step(prediction, inversion.timesteps[index], x, eta=0.0).prev_sample
        torch.testing.assert_close(back, start, **EXACT)


@pytest.mark.parametrize("iterations", [1, 3])
def test_equals_a_plain_loop(iterations, x_0):
    alphas = cumulative_alphas(linear_betas(T))
    x, alpha_prev = x_0, 1.0
    for t in range(0, T, 50):
        alpha, estimate = alphas[t], x
        for _ in range(iterations):
            epsilon = network(estimate, alpha, "epsilon")
            clean = (x - math.sqrt(1 - alpha_prev) * epsilon) / math.sqrt(alpha_prev)
            estimate = math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * epsilon
        x, alpha_prev = estimate, alpha
    inversion = inversion_of(ours(), iterations)
    assert inversion.timesteps.tolist() == [t for t in range(0, T, 50) for _ in range(iterations)]
    torch.testing.assert_close(run(inversion, x_0), x, **EXACT)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_a_network_that_predicts_something_else_gives_the_same(prediction_type, x_0):
    expected = run(inversion_of(ours(), 1), x_0)
    found = run(inversion_of(ours(prediction_type=prediction_type), 1), x_0, prediction_type)
    torch.testing.assert_close(found, expected, **EXACT)


def test_one_iteration_equals_the_inverse_scheduler_of_diffusers_for_predicted_noise(x_0):
    for options in ({}, {"set_alpha_to_one": False}, {"steps_offset": 1}, {"beta_schedule": "squaredcos_cap_v2"}):
        theirs = DDIMInverseScheduler(clip_sample=False, **options)
        theirs.set_timesteps(20)
        inversion = inversion_of(DDIMScheduler(clip_sample=False, **options), 1)
        assert inversion.timesteps.tolist() == theirs.timesteps.tolist()
        torch.testing.assert_close(run(inversion, x_0), run(theirs, x_0), **FLOAT32_TABLES)


def test_differs_from_it_for_other_predictions(x_0):
    # It computes the noise from v with the noise level of x_{i-1}, while the network gets the timestep of x_i.
    theirs = DDIMInverseScheduler(clip_sample=False, prediction_type="v_prediction")
    theirs.set_timesteps(20)
    found = run(inversion_of(ours(prediction_type="v_prediction"), 1), x_0, "v_prediction")
    assert (found - run(theirs, x_0, "v_prediction")).abs().max() > 0.01


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_inverts_the_ddim_steps_of_diffusers(spacing, steps, set_alpha_to_one, x_0):
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing=spacing, set_alpha_to_one=set_alpha_to_one)
    noise = run(inversion_of(scheduler, 100, steps), x_0)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(run(scheduler, noise), x_0, **FLOAT32_TABLES)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_inverts_steps_from_pure_noise(prediction_type, x_0):
    scheduler = ours(prediction_type=prediction_type, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    noise = run(inversion_of(scheduler, 100), x_0, prediction_type)
    scheduler.set_timesteps(20)
    assert float(scheduler.alphas_cumprod[scheduler.timesteps[0]]) == 0
    torch.testing.assert_close(run(scheduler, noise, prediction_type, eta=0.0), x_0, **EXACT)


def test_takes_the_timesteps_of_the_scheduler():
    scheduler = ours()
    inversion = DDIMInversionScheduler(ours(), 1)
    inversion.set_timesteps(timestep_respacing="10,5,2")
    scheduler.set_timesteps(timestep_respacing="10,5,2")
    assert inversion.timesteps.tolist() == scheduler.timesteps.tolist()[::-1]
    # Of other schedulers: fractions are rounded, and what a solver repeats is taken once.
    for scheduler in (EulerDiscreteScheduler(), KDPM2DiscreteScheduler(), PNDMScheduler(skip_prk_steps=True)):
        scheduler.set_timesteps(12)
        expected = sorted(set(scheduler.timesteps.double().round().long().tolist()))
        assert inversion_of(scheduler, 1, 12).timesteps.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeps_the_dtype_of_the_sample(dtype):
    inversion = inversion_of(ours(), 2)
    x = torch.ones(1, 3, 2, 2, dtype=dtype)
    result = inversion.step(0.1 * x, inversion.timesteps[0], x)
    assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype


@pytest.mark.parametrize("iterations", [0, -1, 1.5, "2", None])
def test_refuses_numbers_of_iterations(iterations):
    with pytest.raises(ValueError, match="`num_fixed_point_iterations` is .*integer of at least 1"):
        DDIMInversionScheduler(ours(), iterations)


def test_refuses_steps_past_the_end():
    inversion = DDIMInversionScheduler(ours(), 2)
    x = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="`step` was called 1 times for 0 timesteps. Call `set_timesteps`"):
        inversion.step(x, 0, x)
    inversion.set_timesteps(1)
    for t in inversion.timesteps:
        inversion.step(x, t, x)
    with pytest.raises(ValueError, match="`step` was called 3 times for 2 timesteps"):
        inversion.step(x, 0, x)


def test_refuses_a_single_step_to_pure_noise():
    scheduler = ours(prediction_type="sample", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="carries no signal .* Ask for more steps"):
        inversion_of(scheduler, 1, steps=1)
