"""Training losses against the papers' formulas, written again in float64: Bayes' rule and `torch.distributions`."""

import functools
import itertools
import math

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.training_utils import compute_snr
from tolerances import ONE_LAYER, rounding_errors
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close
from toy_models import CONDITIONAL, random_unet

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.training import TrainingLosses, min_snr_weights, training_losses
from diffusers_adm.training.losses import warn_of_range


T = 50
SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.002, "beta_end": 0.4},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
LEARNED, FIXED = ("learned_range", "learned_log"), ("fixed_small", "fixed_large")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
CASES = [
    *itertools.product(("simple", "hybrid", "hybrid_unscaled", "vlb"), LEARNED),
    *itertools.product(("simple", "vlb"), FIXED),
]


# The oracle


def papers_betas(schedule):
    if schedule == "linear":
        return torch.tensor([0.002 + (0.4 - 0.002) * t / (T - 1) for t in range(T)], dtype=torch.float64)
    f = [math.cos((t / T + 0.008) / (1 + 0.008) * math.pi / 2) ** 2 for t in range(T + 1)]
    return torch.tensor([min(1 - f[t + 1] / f[t], 0.999) for t in range(T)], dtype=torch.float64)


def posterior(x_0, x_t, beta, alpha_bar_prev):
    """Mean and variance of q(x_{t-1} | x_t, x_0), which is q(x_t | x_{t-1}) q(x_{t-1} | x_0) up to a constant."""
    if alpha_bar_prev == 1:  # x_{t-1} is x_0
        return x_0, 0.0
    precision = (1 - beta) / beta + 1 / (1 - alpha_bar_prev)
    mean = (1 - beta).sqrt() / beta * x_t + alpha_bar_prev.sqrt() / (1 - alpha_bar_prev) * x_0
    return mean / precision, 1 / precision


def decoder_nats(levels, mean, std):
    """-log of the probability of the bin of each pixel: all 256 bins are computed, and they make up 1."""

    def cdf(x):  # the tanh approximation that the papers' numbers were computed with
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    edges = (2 * torch.arange(255, dtype=torch.float64) + 1) / 255 - 1  # halfway between neighbours
    inner = cdf((edges - mean[..., None]) / std[..., None])
    borders = torch.cat([torch.zeros_like(inner[..., :1]), inner, torch.ones_like(inner[..., :1])], dim=-1)
    probabilities = borders.diff(dim=-1)
    assert_close(probabilities.sum(-1), torch.ones_like(mean), rtol=0, atol=1e-12)
    return -probabilities.gather(-1, levels[..., None])[..., 0].clamp(min=1e-12).log()


def papers_losses(output, levels, noise, timesteps, objective, schedule, variance_type, prediction_type):
    """`(loss, mse, vb)`, one example and one timestep at a time; `levels` are the 8-bit values of x_0."""
    betas = papers_betas(schedule)
    alphas_bar = torch.tensor([math.prod((1 - betas[: t + 1]).tolist()) for t in range(T)], dtype=torch.float64)
    rows = []
    for out, level, eps, t in zip(output.double(), levels, noise.double(), timesteps.tolist(), strict=True):
        channels = level.shape[0]
        prediction, variance_output = out[:channels], out[channels:]
        x_0 = 2 * level.double() / 255 - 1
        beta, alpha_bar = betas[t], alphas_bar[t]
        alpha_bar_prev = alphas_bar[t - 1] if t > 0 else torch.tensor(1.0, dtype=torch.float64)
        signal, std = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x_t = signal * x_0 + std * eps
        target, pred_x_0 = {
            "epsilon": (eps, (x_t - std * prediction) / signal),
            "sample": (x_0, prediction),
            "v_prediction": (signal * eps - std * x_0, signal * x_t - std * prediction),
        }[prediction_type]
        mse = ((prediction - target) ** 2).mean()

        true_mean, beta_tilde = posterior(x_0, x_t, beta, alpha_bar_prev)
        mean, _ = posterior(pred_x_0, x_t, beta, alpha_bar_prev)
        if t == 0:  # beta_tilde is 0; that of the next step stands in
            _, beta_tilde = posterior(x_0, x_t, betas[1], alphas_bar[0])
        fixed_large = beta if t > 0 else beta_tilde
        if variance_type == "learned_range":
            v = (variance_output + 1) / 2
            variance = torch.exp(v * beta.log() + (1 - v) * beta_tilde.log())
        elif variance_type == "learned_log":
            variance = torch.exp(variance_output)
        else:
            variance = (beta_tilde if variance_type == "fixed_small" else fixed_large).expand_as(mean)
        if t == 0:
            nats = decoder_nats(level, mean, variance.sqrt())
        else:
            nats = kl_divergence(Normal(true_mean, beta_tilde.sqrt()), Normal(mean, variance.sqrt()))
        bits = nats.mean() / math.log(2)

        vb = {"simple": 0 * bits, "hybrid": T / 1000 * bits, "hybrid_unscaled": bits, "vlb": T * bits}[objective]
        loss = vb if objective == "vlb" else mse + vb
        rows.append(torch.stack([loss, mse, vb]))
    return torch.stack(rows).unbind(1)


# What both are given


def make_scheduler(schedule="linear", **config):
    return LearnedVarianceDDPMScheduler(num_train_timesteps=T, **SCHEDULES[schedule], **config)


def make_batch(timesteps=(0, 1, 2, 25, 48, 49), channels=3, size=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.tensor(timesteps)
    shape = (len(timesteps), channels, size, size)
    levels = torch.randint(0, 256, shape, generator=generator)
    levels[:, :, 0, 0], levels[:, :, 0, 1] = 0, 255  # the outer bins reach to infinity
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (2 * levels.double() / 255 - 1).to(dtype), levels, noise.to(dtype), timesteps


def make_output(original_samples, noise, scheduler, timesteps, size=0.3):
    """Not far from the truth, so that no decoder probability hits its floor; variances around the useful ones."""
    generator = torch.Generator().manual_seed(1)

    def randn():
        return torch.randn(noise.shape, generator=generator, dtype=torch.float64)

    prediction = {
        "epsilon": noise,
        "sample": original_samples,
        "v_prediction": scheduler.get_velocity(original_samples, noise, timesteps),
    }[scheduler.config.prediction_type].double() + size * randn()
    if not scheduler.has_learned_variance:
        return prediction
    variance = randn()
    if scheduler.config.variance_type == "learned_log":
        log_betas = scheduler.betas.log()[timesteps][:, None, None, None]
        variance = log_betas + 0.5 * variance
    return torch.cat([prediction, variance], dim=1)


class Fixed:
    """Answers with a stored tensor and keeps what it was asked."""

    def __init__(self, output):
        self.output, self.calls = output, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.output


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("objective, variance_type", CASES)
def test_losses_are_those_of_the_papers(objective, variance_type, prediction_type, schedule):
    scheduler = make_scheduler(schedule, variance_type=variance_type, prediction_type=prediction_type)
    x_0, levels, noise, timesteps = make_batch()
    output = make_output(x_0, noise, scheduler, timesteps)
    model = Fixed(output)
    losses = training_losses(model, scheduler, x_0, timesteps, noise=noise, objective=objective)
    assert isinstance(losses, TrainingLosses)
    expected = papers_losses(output, levels, noise, timesteps, objective, schedule, variance_type, prediction_type)
    for actual, value, name in zip((losses.loss, losses.mse, losses.vb), expected, ("loss", "mse", "vb"), strict=True):
        assert actual.shape == (6,)
        # 1e-8: at the last step of the cosine schedule bar alpha is 1e-7 (1 - beta was rounded at 1e-16).
        assert_close(actual, value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    if objective != "simple":
        assert (losses.vb > 0).all()

    # The network saw x_t and t, once.
    [(arguments, keywords)] = model.calls
    assert keywords == {}
    assert_close(arguments[0], scheduler.add_noise(x_0, noise, timesteps), rtol=0, atol=0)
    assert torch.equal(arguments[1], timesteps)


@pytest.mark.parametrize("objective", ["simple", "hybrid", "vlb"])
def test_float32_is_near_float64(objective):
    """Relative 1e-5: 1 - tanh cancels at the decoder's step, by 1e-7 / 1e-2."""
    scheduler = make_scheduler("cosine")
    x_0, _, noise, timesteps = make_batch(timesteps=(0, 0, 1, 10, 30, 45))
    output = make_output(x_0, noise, scheduler, timesteps)
    expected = training_losses(Fixed(output), scheduler, x_0, timesteps, noise=noise, objective=objective)
    actual = training_losses(
        Fixed(output.float()), scheduler, x_0.float(), timesteps, noise=noise.float(), objective=objective
    )
    assert actual.loss.dtype == torch.float32
    assert_close(actual.loss.double(), expected.loss, rtol=2e-5, atol=1e-6)


def test_mean_of_vlb_over_all_timesteps_is_the_bound():
    scheduler = make_scheduler("cosine")
    x_0, levels, noise, timesteps = make_batch(timesteps=range(T), size=2)
    output = make_output(x_0, noise, scheduler, timesteps)
    losses = training_losses(Fixed(output), scheduler, x_0, timesteps, noise=noise, objective="vlb")
    arguments = (output, levels, noise, timesteps, "hybrid_unscaled", "cosine", "learned_range", "epsilon")
    bound_terms = papers_losses(*arguments)[2]
    assert_close(losses.loss.mean(), bound_terms.sum(), rtol=1e-8, atol=0)
    noisy = scheduler.add_noise(x_0, noise, timesteps)
    terms = scheduler.variational_bound(output, x_0, noisy, timesteps, clip_sample=False)
    assert_close(terms, bound_terms, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_train_timesteps, factor", [(1000, 1.0), (4000, 4.0), (250, 0.25)])
def test_factors_of_the_bound_term(num_train_timesteps, factor):
    """lambda: T/1000 as published, so that 4000 steps weigh the whole bound by the same 0.001."""
    scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps, beta_schedule="cosine")
    x_0, _, noise, timesteps = make_batch(timesteps=(0, 7, 100, 249))
    output = make_output(x_0, noise, scheduler, timesteps)
    noisy = scheduler.add_noise(x_0, noise, timesteps)
    term = scheduler.variational_bound(output, x_0, noisy, timesteps, clip_sample=False)
    for objective, expected in (("hybrid", factor), ("hybrid_unscaled", 1.0), ("vlb", num_train_timesteps)):
        losses = training_losses(Fixed(output), scheduler, x_0, timesteps, noise=noise, objective=objective)
        assert_close(losses.vb, expected * term)
        assert_close(losses.loss, losses.vb if objective == "vlb" else losses.mse + losses.vb)


# Gradients


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("variance_type", LEARNED)
@pytest.mark.parametrize("objective", ["hybrid", "hybrid_unscaled", "vlb"])
def test_in_a_hybrid_the_bound_does_not_move_the_mean(objective, variance_type, prediction_type):
    scheduler = make_scheduler("cosine", variance_type=variance_type, prediction_type=prediction_type)
    x_0, _, noise, timesteps = make_batch()
    output = make_output(x_0, noise, scheduler, timesteps).requires_grad_()
    losses = training_losses(Fixed(output), scheduler, x_0, timesteps, noise=noise, objective=objective)
    (grad,) = torch.autograd.grad(losses.vb.sum(), output, retain_graph=True)
    per_example = grad.abs().amax((2, 3))
    assert (per_example[:, 3:] > 0).all()
    if objective == "vlb":
        assert (per_example[:, :3] > 0).all()
        assert not losses.mse.requires_grad
        return
    assert torch.equal(grad[:, :3], torch.zeros_like(grad[:, :3]))
    # So the mean has only the gradient of the squared error, and the variance only that of the bound.
    (loss_grad,) = torch.autograd.grad(losses.loss.sum(), output, retain_graph=True)
    (mse_grad,) = torch.autograd.grad(losses.mse.sum(), output)
    assert torch.equal(mse_grad[:, 3:], torch.zeros_like(mse_grad[:, 3:]))
    assert_close(loss_grad[:, :3], mse_grad[:, :3], rtol=0, atol=0)
    assert_close(loss_grad[:, 3:], grad[:, 3:], rtol=0, atol=0)


def test_gradient_of_the_bound_is_that_of_the_papers():
    scheduler = make_scheduler("cosine")
    x_0, levels, noise, timesteps = make_batch()
    output = make_output(x_0, noise, scheduler, timesteps).requires_grad_()
    losses = training_losses(Fixed(output), scheduler, x_0, timesteps, noise=noise, objective="vlb")
    expected = papers_losses(output, levels, noise, timesteps, "vlb", "cosine", "learned_range", "epsilon")[0]
    (actual,) = torch.autograd.grad(losses.loss.sum(), output)
    (expected,) = torch.autograd.grad(expected.sum(), output)
    assert_close(actual, expected, rtol=1e-7, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("objective", ["hybrid", "vlb"])
@pytest.mark.parametrize("config", [{"clip_sample": True}, {"thresholding": True}], ids=str)
def test_predicted_x_0_is_not_clipped_whatever_the_config_says(config, objective):
    scheduler = make_scheduler("cosine", **config)
    x_0, levels, noise, timesteps = make_batch(timesteps=(0, 25, 48))
    output = make_output(x_0, noise, scheduler, timesteps, size=3.0).requires_grad_()
    noisy = scheduler.add_noise(x_0, noise, timesteps)
    _, _, pred_x_0 = scheduler.predicted_distribution(output, timesteps, noisy, clip_sample=False)
    assert (pred_x_0.abs().amax((1, 2, 3)) > 1).all()  # or this would prove nothing
    losses = training_losses(Fixed(output), scheduler, x_0, timesteps, noise=noise, objective=objective)
    expected = papers_losses(output, levels, noise, timesteps, objective, "cosine", "learned_range", "epsilon")
    assert_close(losses.vb, expected[2], rtol=1e-8, atol=1e-10)
    clipped = scheduler.variational_bound(output, x_0, noisy, timesteps) * (T if objective == "vlb" else T / 1000)
    assert ((losses.vb - clipped).abs()[1:] > 1e-3 * losses.vb[1:]).all()
    if objective == "vlb":  # clipped entries would have none
        (grad,) = torch.autograd.grad(losses.loss[1:].sum(), output)
        assert (grad[1:, :3] != 0).all()


# Min-SNR


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("gamma", [1.0, 5.0, 1e9])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_min_snr_weights(prediction_type, gamma, schedule):
    scheduler = make_scheduler(schedule, prediction_type=prediction_type)
    x_0, _, noise, timesteps = make_batch(timesteps=range(0, T, 3))
    output = make_output(x_0, noise, scheduler, timesteps)
    arguments = (Fixed(output), scheduler, x_0, timesteps)
    plain = training_losses(*arguments, noise=noise, objective="hybrid")
    weighted = training_losses(*arguments, noise=noise, objective="hybrid", snr_gamma=gamma)
    snr = compute_snr(scheduler, timesteps).double()
    clamped = snr.clamp(max=gamma)
    # diffusers' training examples; for x_0 the paper's own weight (section 3.4: all three are equivalent).
    weights = {"epsilon": clamped / snr, "sample": clamped, "v_prediction": clamped / (snr + 1)}[prediction_type]
    # Both compute the ratio in float32.
    assert_close(weighted.mse, plain.mse * weights, rtol=1e-5, atol=0)
    assert rounding_errors(weighted.vb, plain.vb) <= ONE_LAYER
    assert_close(weighted.loss, weighted.mse + weighted.vb, rtol=0, atol=0)


def test_min_snr_weighs_the_same_error_alike_for_every_prediction_type():
    """A network with one and the same error in x_0 has the same weighted loss, whatever it predicts."""
    values = []
    for prediction_type in PREDICTIONS:
        scheduler = make_scheduler("cosine", prediction_type=prediction_type, variance_type="fixed_small")
        x_0, _, noise, timesteps = make_batch(timesteps=(1, 10, 25, 40))
        signal = scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
        std = (1 - scheduler.alphas_cumprod[timesteps]).sqrt()[:, None, None, None]
        wrong_x_0 = x_0 + 0.1 * noise.flip(-1)
        noisy = signal * x_0 + std * noise
        wrong_noise = (noisy - signal * wrong_x_0) / std
        output = {
            "epsilon": wrong_noise,
            "sample": wrong_x_0,
            "v_prediction": signal * wrong_noise - std * wrong_x_0,
        }[prediction_type]
        arguments = (Fixed(output), scheduler, x_0, timesteps)
        values.append(training_losses(*arguments, noise=noise, objective="simple", snr_gamma=5.0).loss)
    assert_close(values[0], values[1], rtol=1e-5, atol=0)
    assert_close(values[2], values[1], rtol=1e-5, atol=0)


# The network


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x,), lambda x: [x, "more"], lambda x: UNet2DOutput(sample=x)], ids=range(4)
)
def test_every_form_of_answer(wrap):
    scheduler = make_scheduler()
    x_0, _, noise, timesteps = make_batch()
    output = make_output(x_0, noise, scheduler, timesteps)
    expected = training_losses(Fixed(output), scheduler, x_0, timesteps, noise=noise)
    assert (
        rounding_errors(
            training_losses(Fixed(wrap(output)), scheduler, x_0, timesteps, noise=noise).loss, expected.loss
        )
        <= ONE_LAYER
    )


def test_model_kwargs_reach_the_network():
    scheduler = make_scheduler()
    x_0, _, noise, timesteps = make_batch()
    model = Fixed(make_output(x_0, noise, scheduler, timesteps))
    labels = torch.arange(6)
    training_losses(model, scheduler, x_0, timesteps, noise=noise, model_kwargs={"class_labels": labels})
    [(_, keywords)] = model.calls
    assert keywords == {"class_labels": labels}


@pytest.mark.parametrize("objective", ["simple", "hybrid", "vlb"])
def test_with_the_unet_every_parameter_that_the_loss_reaches_learns(objective):
    unet = random_unet(**CONDITIONAL)
    x_0, _, noise, timesteps = make_batch(size=8, dtype=torch.float32)
    kwargs = {"class_labels": torch.tensor([0, 1, 2, 3, 4, 4])}
    arguments = (unet, make_scheduler("cosine"), x_0, timesteps)
    training_losses(*arguments, noise=noise, objective=objective, model_kwargs=kwargs).loss.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())
    variance_grad = unet.conv_out.weight.grad[3:]
    assert variance_grad.any() == (objective != "simple")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", ["simple", "hybrid", "vlb"])
def test_16_bit_answers_are_upcast(objective, dtype):
    """As under autocast: float32 images, a 16-bit answer, losses of float32."""
    scheduler = make_scheduler("cosine")
    x_0, _, noise, timesteps = make_batch(dtype=torch.float32)
    output = make_output(x_0, noise, scheduler, timesteps).to(dtype)
    losses = training_losses(Fixed(output), scheduler, x_0, timesteps, noise=noise, objective=objective)
    expected = training_losses(Fixed(output.float()), scheduler, x_0, timesteps, noise=noise, objective=objective)
    for name in ("loss", "mse", "vb"):
        assert getattr(losses, name).dtype == torch.float32
        assert rounding_errors(getattr(losses, name), getattr(expected, name)) <= ONE_LAYER


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_images(dtype):
    """The network gets them as they are; the losses are float32, of the very x_t that it saw."""
    scheduler = make_scheduler("cosine")
    x_0, _, noise, timesteps = make_batch(timesteps=(1, 10, 30), dtype=dtype)
    model = Fixed(make_output(x_0, noise, scheduler, timesteps).to(dtype))
    losses = training_losses(model, scheduler, x_0, timesteps, noise=noise)
    [((noisy, _), _)] = model.calls
    assert noisy.dtype == dtype
    assert losses.loss.dtype == torch.float32
    expected = scheduler.variational_bound(
        model.output.float(), x_0.float(), noisy.float(), timesteps, clip_sample=False
    )
    assert_close(losses.vb, T / 1000 * expected)


def test_noise_is_drawn_where_none_is_given():
    scheduler = make_scheduler()
    x_0, _, _, timesteps = make_batch(size=32)
    model = Fixed(torch.zeros(6, 6, 32, 32, dtype=torch.float64))
    first = training_losses(model, scheduler, x_0, timesteps, objective="simple")
    second = training_losses(model, scheduler, x_0, timesteps, objective="simple")
    assert rounding_errors(first.mse, second.mse) > ONE_LAYER
    # The prediction is 0, so this is the mean square of 6 x 3072 standard normals: 1 +- 5 sigma.
    assert abs(first.mse.mean().item() - 1) <= 5 * (2 / (6 * 3072)) ** 0.5


@pytest.mark.parametrize("objective", ["hybrid", "vlb"])
def test_extra_channels_reach_the_network_alone(objective):
    """The losses compare the images, as they do without extra channels, for a network that gives the same."""
    scheduler = make_scheduler()
    x_0, _, noise, timesteps = make_batch()
    extra = torch.linspace(-3, 3, 6 * 4 * 16).view(6, 4, 4, 4)  # float32, with images of float64
    model = Fixed(make_output(x_0, noise, scheduler, timesteps))
    options = {"noise": noise, "objective": objective, "model_kwargs": {"class_labels": "labels"}}
    plain = training_losses(model, scheduler, x_0, timesteps, **options)
    losses = training_losses(model, scheduler, x_0, timesteps, extra_channels=extra, **options)
    ((without, _), _), ((with_extra, _), kwargs) = model.calls
    assert torch.equal(with_extra, torch.cat([without, extra.double()], dim=1))
    assert kwargs == {"class_labels": "labels"}
    for name in ("loss", "mse", "vb"):
        assert rounding_errors(getattr(losses, name), getattr(plain, name)) <= ONE_LAYER


def test_set_timesteps_has_no_effect():
    scheduler = make_scheduler()
    x_0, _, noise, timesteps = make_batch()
    model = Fixed(make_output(x_0, noise, scheduler, timesteps))
    before = training_losses(model, scheduler, x_0, timesteps, noise=noise)
    scheduler.set_timesteps(5)
    assert (
        rounding_errors(training_losses(model, scheduler, x_0, timesteps, noise=noise).loss, before.loss) <= ONE_LAYER
    )


# Bad input


@pytest.mark.parametrize(
    "config, kwargs, message",
    [
        ({}, {"objective": "l2"}, "`objective` is 'l2'; it must be one of .*'simple', 'hybrid'"),
        ({}, {"objective": "rescaled_kl"}, "`objective` is 'rescaled_kl'"),
        *[
            ({"variance_type": v}, {"objective": o}, f"`objective='{o}'` .* `variance_type='{v}'` .*'simple'")
            for v in FIXED
            for o in ("hybrid", "hybrid_unscaled")
        ],
        ({}, {"objective": "vlb", "snr_gamma": 5.0}, "`snr_gamma` weights the squared error, which `objective='vlb'`"),
        ({}, {"snr_gamma": -1.0}, r"`snr_gamma` is -1.0; it must be positive \(5.0"),
        ({}, {"snr_gamma": 0}, "`snr_gamma` is 0; it must be positive"),
    ],
)
def test_bad_arguments_are_refused_before_the_network_runs(config, kwargs, message):
    x_0, _, noise, timesteps = make_batch()
    model = Fixed(torch.zeros(6, 6, 4, 4))
    with pytest.raises(ValueError, match=message):
        training_losses(model, make_scheduler(**config), x_0, timesteps, noise=noise, **kwargs)
    assert model.calls == []


@pytest.mark.parametrize(
    "variance_type, channels, message",
    [
        ("learned_range", 3, r"\(6, 3, 4, 4\).*`variance_type='learned_range'` takes 6 channels.*`out_channels=6`"),
        ("fixed_small", 6, r"\(6, 6, 4, 4\).*`variance_type='fixed_small'` takes 3 channels.*'learned_range'"),
    ],
)
@pytest.mark.parametrize("objective", ["simple", "vlb"])
def test_output_channels_that_do_not_fit_are_refused(objective, variance_type, channels, message):
    x_0, _, noise, timesteps = make_batch()
    arguments = (Fixed(torch.zeros(6, channels, 4, 4)), make_scheduler(variance_type=variance_type), x_0, timesteps)
    with pytest.raises(ValueError, match=message):
        training_losses(*arguments, noise=noise, objective=objective)


def test_an_unknown_prediction_type_has_no_target():
    """The constructor refuses one; `register_to_config` checks nothing."""
    scheduler = make_scheduler()
    x_0, _, noise, timesteps = make_batch()
    model = Fixed(make_output(x_0, noise, scheduler, timesteps))
    scheduler.register_to_config(prediction_type="other")
    with pytest.raises(KeyError, match="other"):
        training_losses(model, scheduler, x_0, timesteps, noise=noise)
    with pytest.raises(KeyError, match="other"):
        min_snr_weights(scheduler, timesteps, 5.0)


def test_unknown_timesteps_are_refused():
    x_0, _, noise, _ = make_batch()
    with pytest.raises(ValueError, match="`timestep` is 50; .* 0 to 49"):
        training_losses(Fixed(None), make_scheduler(), x_0, torch.full((6,), T), noise=noise)


def test_the_default_is_hybrid():
    scheduler = make_scheduler()
    x_0, _, noise, timesteps = make_batch()
    model = Fixed(make_output(x_0, noise, scheduler, timesteps))
    expected = training_losses(model, scheduler, x_0, timesteps, noise=noise, objective="hybrid")
    assert (
        rounding_errors(training_losses(model, scheduler, x_0, timesteps, noise=noise).loss, expected.loss) <= ONE_LAYER
    )


# What the images are


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_images_that_are_no_floating_point_numbers(dtype):
    """Integers would be noised with the noise rounded to integers."""
    images, noise = (255 * IMAGES).to(dtype), torch.randn(2, 3, 8, 8)
    scheduler, timesteps = LearnedVarianceDDPMScheduler(), torch.tensor([1, 2])
    message = f"is {dtype}.*`images.float\\(\\) / 127.5 - 1`|of type {dtype}; pass a dense tensor of real numbers"
    for call in (
        lambda: training_losses(lambda *_: pytest.fail("the network ran"), scheduler, images, timesteps),
        lambda: training_losses(random_unet(), scheduler, 2 * IMAGES - 1, timesteps, noise=images),
        lambda: scheduler.add_noise(images, noise, timesteps),
        lambda: scheduler.add_noise(noise, images, timesteps),
        lambda: scheduler.get_velocity(images, noise, timesteps),
        lambda: scheduler.posterior_distribution(images, noise, timesteps),
        lambda: scheduler.predicted_distribution(torch.randn(2, 6, 8, 8), timesteps, images),
        lambda: scheduler.variational_bound(torch.randn(2, 6, 8, 8), images, noise, timesteps),
        lambda: scheduler.variational_bound(torch.randn(2, 6, 8, 8), noise, images, timesteps),
        lambda: scheduler.prior_bits_per_dim(images),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


class TestRange:
    def losses(self, scheduler, images):
        return training_losses(random_unet(), scheduler, images, torch.tensor([1, 2]))

    def test_0_to_255(self, caplog):
        scheduler = LearnedVarianceDDPMScheduler()
        for _ in range(6):
            self.losses(scheduler, 255 * IMAGES)
        (record,) = caplog.records
        assert "look like numbers from 0 to 255" in record.message
        assert "`images / 127.5 - 1`" in record.message

    def test_0_to_1(self, caplog):
        """Once, and not for the first bright batch; another scheduler is another training."""
        for _ in range(2):
            scheduler = LearnedVarianceDDPMScheduler()
            caplog.clear()
            self.losses(scheduler, IMAGES)
            assert not caplog.records
            for _ in range(6):
                self.losses(scheduler, IMAGES)
            (record,) = caplog.records
            assert "look like numbers from 0 to 1" in record.message
            assert "`2 * images - 1`" in record.message

    @pytest.mark.parametrize("images", [2 * IMAGES - 1, 300 * (IMAGES - 0.5), IMAGES - 0.01, 0 * IMAGES])
    def test_other_data_is_not_accused(self, images, caplog):
        """Images in [-1, 1], latents, whatever reaches below 0; and nothing but zeros."""
        scheduler = LearnedVarianceDDPMScheduler()
        for _ in range(6):
            self.losses(scheduler, images)
        self.losses(scheduler, IMAGES)  # once seen below 0, bright batches are just that
        assert not caplog.records

    def test_a_bright_batch_among_others(self, caplog):
        scheduler = LearnedVarianceDDPMScheduler()
        for images in (IMAGES, IMAGES, 2 * IMAGES - 1, *[IMAGES] * 6):
            self.losses(scheduler, images)
        assert not caplog.records

    def test_it_is_looked_at_a_few_times_only(self, monkeypatch):
        """Each look waits for the device."""
        looks, aminmax = [], torch.Tensor.aminmax
        monkeypatch.setattr(
            torch.Tensor, "aminmax", lambda *args, **kwargs: looks.append(1) or aminmax(*args, **kwargs)
        )
        for images, number in ((2 * IMAGES - 1, 1), (255 * IMAGES, 1), (IMAGES, 4)):
            looks.clear()
            scheduler = LearnedVarianceDDPMScheduler()
            for _ in range(8):
                self.losses(scheduler, images)
            assert len(looks) == number

    @pytest.mark.no_jitter("torch compiles nothing inside a dispatch mode")
    def test_compiled_in_one_graph(self):
        """Looking would break the graph: whoever compiles the whole loss is not warned."""
        scheduler = LearnedVarianceDDPMScheduler()

        @functools.partial(torch.compile, fullgraph=True, backend="eager")
        def twice(images):
            warn_of_range(scheduler, images)
            return 2 * images

        assert_close(twice(IMAGES), 2 * IMAGES)
