"""
Arbitrary arguments of `LearnedVarianceDDPMScheduler`: the constructor, its timesteps, its steps, noise and bound work,
with finite results, or raise a `ValueError` or `TypeError` that says why.
"""

import functools
import inspect
import warnings
from collections import Counter
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hostile import ANYTHING, REFUSALS, VALUES, all_finite
from hypothesis import strategies as st
from test_pipeline_arguments import SETTINGS

from diffusers_adm import LearnedVarianceDDPMScheduler


pytestmark = pytest.mark.no_jitter("it only asks whether a result is finite")
CONSTRUCTOR = [name for name in inspect.signature(LearnedVarianceDDPMScheduler).parameters if name != "self"]
CHOICES = {
    "num_train_timesteps": st.integers(-2, 60),
    "beta_start": st.floats(),
    "beta_end": st.floats(),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "cosine", "sigmoid", "x"]),
    "trained_betas": st.lists(st.floats(), max_size=4),
    "variance_type": st.sampled_from(["learned_range", "learned_log", "fixed_small", "fixed_large", "learned", None]),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction", "flow"]),
    "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
    **dict.fromkeys(("clip_sample", "thresholding", "rescale_betas_zero_snr", "float32_tables"), st.booleans()),
}
SHAPE = (2, 3, 4, 4)


def outcome(call, *args: Any, **kwargs: Any) -> tuple[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "worked", call(*args, **kwargs)
        except REFUSALS as error:
            message = str(error)
    assert message.strip(), (args, kwargs)
    return "refused", None


def use(scheduler: LearnedVarianceDDPMScheduler) -> None:
    """Noise, all steps of both kinds, and the bound, with ordinary tensors: all results are finite."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    output = torch.cat([noise, noise.clamp(-1, 1)], dim=1) if scheduler.has_learned_variance else noise
    times = sorted({0, len(scheduler) // 2, len(scheduler) - 1})
    images = noise.clamp(-1, 1)
    for t in times:
        assert all_finite(scheduler.add_noise(images, noise, t))
        assert all_finite(scheduler.get_velocity(images, noise, t))
        bound = scheduler.variational_bound(output, images, noise, t)
        # A term of the bound may exceed the range of float32 with a variance that is absurd, but it is no NaN.
        assert not bound.isnan().any()
    result, _ = outcome(scheduler.set_timesteps, min(3, len(scheduler)))
    if result == "refused":  # such as `steps_offset` beyond the last timestep
        return
    for eta in (None, 0.0, 1.0):
        sample = noise
        for t in scheduler.timesteps:
            stepped = scheduler.step(output, t, sample, eta=eta, generator=torch.Generator().manual_seed(0))
            sample = stepped.prev_sample
            assert all_finite(sample), (dict(scheduler.config), eta, int(t))


@st.composite
def configs(draw) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(CONSTRUCTOR), min_size=1, max_size=4, unique=True))
    config: dict[str, Any] = {"num_train_timesteps": 20, "beta_end": 0.3}
    for name in names:
        config[name] = draw(st.one_of(CHOICES.get(name, st.floats()), CHOICES.get(name, ANYTHING), ANYTHING))
    return config


def check_config(config: dict[str, Any]) -> str:
    result, scheduler = outcome(LearnedVarianceDDPMScheduler, **config)
    if result == "worked" and len(scheduler) <= 5000:
        use(scheduler)
    return result


@hypothesis.settings(max_examples=60, **SETTINGS)
@hypothesis.given(config=configs())
def test_any_config(config):
    check_config(config)


@pytest.mark.faults
@hypothesis.settings(max_examples=5000, **SETTINGS)
@hypothesis.given(config=configs())
def test_many_configs(config):
    check_config(config)


@pytest.mark.faults
def test_every_value_of_every_argument():
    counts = Counter(
        check_config({"num_train_timesteps": 20, "beta_end": 0.3, name: value})
        for name in CONSTRUCTOR
        for value in VALUES
    )
    print(dict(counts))
    assert counts["worked"] > 50


@functools.cache
def calls() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Methods and valid arguments."""
    scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps=20, beta_end=0.3)
    x, output = torch.zeros(SHAPE), torch.zeros(2, 6, 4, 4)
    step = {"model_output": output, "timestep": 5, "sample": x}
    optional = {"generator": None, "eta": None, "guidance_gradient": None, "variance_noise": None, "return_dict": True}
    other = LearnedVarianceDDPMScheduler(num_train_timesteps=20)  # whose timesteps change
    return {
        "set_timesteps": (
            other.set_timesteps,
            {"num_inference_steps": 5, "device": None, "timesteps": None, "timestep_respacing": None},
        ),
        "respacing": (
            other.set_timesteps,
            {"timestep_respacing": "2"},
        ),
        "timesteps": (
            other.set_timesteps,
            {"timesteps": [5, 1]},
        ),
        "step": (scheduler.step, {**step, **optional}),
        "add_noise": (scheduler.add_noise, {"original_samples": x, "noise": x, "timesteps": 5}),
        "get_velocity": (scheduler.get_velocity, {"sample": x, "noise": x, "timesteps": 5}),
        "variational_bound": (
            scheduler.variational_bound,
            {"model_output": output, "original_samples": x, "noisy_samples": x, "timesteps": 5},
        ),
        "prior_bits_per_dim": (scheduler.prior_bits_per_dim, {"original_samples": x, "timestep_respacing": None}),
    }


def is_ordinary(value: Any) -> bool:
    """Not an array of numbers that are NaN, infinite or absurd themselves: such of a network pass through."""
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided:
        return bool(value.isfinite().all()) and (
            value.numel() == 0 or float(value.to(torch.complex128).abs().max()) <= 100
        )
    return not isinstance(value, torch.Tensor) or value.device.type == "cpu"


def check_call(method: str, **arguments: Any) -> str:
    call, valid = calls()[method]
    result, value = outcome(call, **{**valid, **arguments})
    if result == "worked":
        assert all_finite(list(value.values()) if isinstance(value, dict) else value), (method, arguments)
    return result


@st.composite
def method_calls(draw) -> tuple[str, dict[str, Any]]:
    method = draw(st.sampled_from(sorted(calls())))
    names = draw(st.lists(st.sampled_from(sorted(calls()[method][1])), min_size=1, max_size=2, unique=True))
    return method, {name: draw(ANYTHING.filter(is_ordinary)) for name in names}


@hypothesis.settings(max_examples=120, **SETTINGS)
@hypothesis.given(call=method_calls())
def test_any_call(call):
    method, arguments = call
    check_call(method, **arguments)


@pytest.mark.faults
def test_every_value_of_every_call():
    counts = Counter(
        check_call(method, **{name: value})
        for method, (_, valid) in calls().items()
        for name in valid
        for value in VALUES
        if is_ordinary(value)
    )
    print(dict(counts))
    assert counts["worked"] > 50


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_train_timesteps": 10**9}, "`num_train_timesteps` is 1000000000; pass an integer of at most"),
        ({"num_train_timesteps": 2.5}, "`num_train_timesteps` is 2.5"),
        ({"beta_start": 1e-30, "beta_end": 1e-30}, "share of 1 of the signal in the first"),
        ({"beta_start": 0.9, "beta_end": 0.99}, "of the signal in the first of 1000 timesteps, and of 0 in the last"),
        ({"beta_end": float("nan")}, "`beta_end` is nan"),
        ({"trained_betas": "x"}, "`trained_betas` is 'x'"),
        ({"trained_betas": [None, {}]}, "`trained_betas` is"),
        ({"clip_sample_range": float("nan")}, "`clip_sample_range` is nan"),
        ({"sample_max_value": 0, "thresholding": True}, "`sample_max_value` is 0;"),
        ({"dynamic_thresholding_ratio": 2.0}, "`dynamic_thresholding_ratio` is 2.0"),
        ({"clip_sample": "no"}, "`clip_sample` is 'no'"),
        ({"beta_schedule": ["linear"]}, r"`beta_schedule` is \['linear'\]"),
    ],
)
def test_messages(arguments, words):
    with pytest.raises(ValueError, match=words):
        LearnedVarianceDDPMScheduler(**arguments)


def test_steps_beyond_the_chain_are_refused_at_once():
    scheduler = LearnedVarianceDDPMScheduler()
    for number in (10**9, 10**30, float("inf"), float("nan"), 1e300, -1, 0, 2.5, "5", None, np.float64("nan")):
        with pytest.raises(ValueError, match="num_inference_steps"):
            scheduler.set_timesteps(number)
