"""
Converted networks against a plain forward pass of the same state dict (`openai_forward.py`), over flags of all kinds.

Tolerances: in float64 both sides share nothing but a float32 sinusoid, so rounding alone is left. In float32 the
promised 1e-5 (input gradients of classifiers: 1e-4), relative to the largest entry.
"""

import functools

import pytest
import torch
from diffusers import DiffusionPipeline
from openai_networks import NETWORKS
from torch.testing import assert_close

from diffusers_adm import (
    AdaGNClassifierModel,
    AdaGNUNet2DModel,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    LearnedVarianceDDPMScheduler,
)
from diffusers_adm.conversion import convert_openai, export_openai
from diffusers_adm.schedulers.noise_schedules import noise_schedule_of


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def load(folder, kind):
    if kind == "classifier":
        return AdaGNClassifierModel.from_pretrained(folder, subfolder="classifier")
    if (folder / "model_index.json").is_file():  # as loaded by the pipeline's name alone
        return DiffusionPipeline.from_pretrained(folder).unet
    return AdaGNUNet2DModel.from_pretrained(folder, subfolder="unet")


def run(model, x, t, y=None):
    if isinstance(model, AdaGNClassifierModel):
        return model(x, t).logits
    return model(x, t, class_labels=y).sample


def input_gradient(function, x):
    """Gradient of one class's log-probability with respect to the images: the guidance."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).log_softmax(dim=-1)[:, 3].sum(), x)[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_original_network_and_the_way_back_is_bit_identical(name, tmp_path):
    network = NETWORKS[name]
    file = network.save(tmp_path)
    result = convert_openai(file, tmp_path / "out", model_flags=network.flags, code_base=network.code_base)
    assert result.kind == network.kind
    scheduler = LearnedVarianceDDPMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    if network.kind != "classifier":
        assert scheduler.has_learned_variance == ("--learn_sigma True" in network.flags)

    model = load(tmp_path / "out", network.kind)
    assert not model.training
    if network.kind == "classifier":
        assert model.config.noise_schedule == noise_schedule_of(scheduler)
    if network.kind == "upsampler":
        index = ADMSuperResolutionPipeline.load_config(tmp_path / "out")
        assert index["noise_schedule"] == noise_schedule_of(scheduler)
    weights = network.weights()
    x, *rest = network.inputs()
    for dtype, tolerance, gradient_tolerance in ((torch.float32, 1e-5, 1e-4), (torch.float64, 1e-9, 1e-9)):
        model, x = model.to(dtype), x.to(dtype)
        weights = weights.double() if dtype == torch.float64 else weights
        ours, theirs = functools.partial(run, model), functools.partial(network.forward, weights)
        with torch.no_grad():
            assert relative(ours(x, *rest), theirs(x, *rest)) < tolerance
        if network.kind == "classifier":
            gradients = (input_gradient(lambda x, f=f: f(x, *rest), x) for f in (ours, theirs))
            assert relative(*gradients) < gradient_tolerance

    export_openai(tmp_path / "out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == network.weights().keys()
    for key, tensor in network.weights().items():
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize("name", ["defaults", "new-order", "one-head"])
def test_the_attention_order_matters_from_two_heads_on(name, tmp_path):
    """The wrong order loads without any error and gives other numbers: the file does not tell."""
    network = NETWORKS[name]
    order = not network.spec.qkv_first
    flags = f"{network.flags} --use_new_attention_order {order}"
    convert_openai(network.save(tmp_path), tmp_path / "out", model_flags=flags)
    inputs = network.inputs()
    with torch.no_grad():
        deviation = relative(run(load(tmp_path / "out", "unet"), *inputs), network.forward(network.weights(), *inputs))
    if network.spec.heads == 1:
        assert deviation < 1e-5
    else:
        assert deviation > 1e-2


@pytest.mark.parametrize("flag", ["--num_heads 2", "--num_heads_upsample 1", "--num_head_channels 64"])
def test_the_number_of_heads_matters(flag, tmp_path):
    network = NETWORKS["defaults"]
    convert_openai(network.save(tmp_path), tmp_path / "out", model_flags=f"{network.flags} {flag}")
    inputs = network.inputs()
    with torch.no_grad():
        deviation = relative(run(load(tmp_path / "out", "unet"), *inputs), network.forward(network.weights(), *inputs))
    assert deviation > 1e-2


@pytest.mark.parametrize("t", [0.5, 1234.75])
def test_timesteps_between_whole_numbers(t, tmp_path):
    network = NETWORKS["rescaled-timesteps"]
    convert_openai(network.save(tmp_path), tmp_path / "out", model_flags=network.flags)
    model = load(tmp_path / "out", "unet")
    x, t = network.inputs()[0], torch.full((2,), t)
    with torch.no_grad():
        assert relative(run(model, x, t), network.forward(network.weights(), x, t)) < 1e-5
        assert relative(run(model, x, t + 0.5), network.forward(network.weights(), x, t)) > 1e-5


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_very_small_and_very_large_images(scale, tmp_path):
    network = NETWORKS["residual"]
    convert_openai(network.save(tmp_path), tmp_path / "out", model_flags=network.flags)
    x, t, y = network.inputs()
    with torch.no_grad():
        ours = run(load(tmp_path / "out", "unet"), scale * x, t, y)
        # Where biases are a thousand times the image, their rounding is what the first normalization enlarges.
        tolerance = 1e-3 if scale < 1 else 1e-5
        assert relative(ours, network.forward(network.weights(), scale * x, t, y)) < tolerance


@pytest.mark.parametrize("name", ["residual", "adaptive-pool"])
def test_half_precision_is_kept_and_gives_the_numbers_of_its_weights(name, tmp_path):
    """The fp16 torso that `convert_to_fp16` makes, in a float32 frame: what a file of such a model holds."""
    network = NETWORKS[name]
    torso = ("input_blocks", "middle_block", "output_blocks")
    weights = {key: w.half() if key.startswith(torso) else w for key, w in network.weights().items()}
    torch.save(weights, tmp_path / "model.pt")
    result = convert_openai(tmp_path / "model.pt", tmp_path / "out", model_flags=network.flags)
    assert result.dtypes == ["float16", "float32"]

    rounded = type(network.weights())()
    rounded.update({key: tensor.float() for key, tensor in weights.items()})
    inputs = network.inputs()
    with torch.no_grad():
        ours = run(load(tmp_path / "out", network.kind), *inputs)
        assert relative(ours, network.forward(rounded, *inputs)) < 1e-5

    export_openai(tmp_path / "out", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    for key, tensor in weights.items():
        assert back[key].dtype == tensor.dtype, key
        assert torch.equal(back[key], tensor), key


def test_a_converted_pipeline_draws_the_trajectory_of_the_formula(tmp_path):
    """
    Five ancestral steps of a respaced chain, written out: x0 from epsilon, clipped, the posterior mean, and a
    log-variance between the two bounds, with betas recomputed from the kept steps as in the paper's section 4.
    """
    network = NETWORKS["head-channels"]
    flags = f"{network.flags} --noise_schedule linear --diffusion_steps 100"
    convert_openai(network.save(tmp_path), tmp_path / "out", model_flags=flags)
    pipe = ADMPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    start = network.inputs()[0]
    samples = []
    pipe(
        batch_size=2,
        timestep_respacing="5",
        latents=start.clone(),
        generator=torch.Generator().manual_seed(4),
        output_type="pt",
        callback_on_step_end=lambda pipe, i, t, tensors: samples.append(tensors["latents"]) or {},
    )

    # 100 steps: ten times the betas of 1000. "5" keeps the first step, the last, and three between them.
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.001, 0.2, 100, dtype=torch.float64), dim=0)
    kept = [0, 25, 50, 74, 99]
    bars = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[kept]])
    betas = 1 - bars[1:] / bars[:-1]
    posterior_variances = betas * (1 - bars[:-1]) / (1 - bars[1:])
    posterior_variances[0] = posterior_variances[1]
    weights, generator, x = network.weights().double(), torch.Generator().manual_seed(4), start.double()
    for i, ours in zip(reversed(range(5)), samples, strict=True):
        with torch.no_grad():
            epsilon, fraction = network.forward(weights, x, torch.full((2,), kept[i])).chunk(2, dim=1)
        fraction = (fraction + 1) / 2
        log_variance = fraction * betas[i].log() + (1 - fraction) * posterior_variances[i].log()
        x0 = ((x - (1 - bars[i + 1]).sqrt() * epsilon) / bars[i + 1].sqrt()).clamp(-1, 1)
        of_x0 = betas[i] * bars[i].sqrt() / (1 - bars[i + 1])
        of_x = (1 - bars[i]) * (1 - betas[i]).sqrt() / (1 - bars[i + 1])
        x = of_x0 * x0 + of_x * x
        if i > 0:
            x = x + (log_variance / 2).exp() * torch.randn(start.shape, generator=generator)
        # The first step multiplies the rounding errors of the network by 1 / sqrt(bars[5]), some 200.
        assert_close(ours.double(), x, rtol=0, atol=1e-3 * x.abs().max().item())
