"""AdaGN against its formula in float64: the reference, the fast path, the choice between them, and their callers."""

import importlib.util
import inspect
import os
import subprocess
import sys
from typing import get_args

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from tolerances import ONE_LAYER, rounding_errors
from torch import nn
from torch.testing import assert_close
from toy_models import CONDITIONAL, fill_randomly, random_unet

from diffusers_adm.models.unet_2d_adagn import ResBlock
from diffusers_adm.ops.adagn import (
    ADAGN_ACTIVATIONS,
    AdaGNActivation,
    AdaGroupNormAct,
    _adagn_folded,
    adagn,
    adagn_reference,
)


# The package exports the function under the module's name.
adagn_module = sys.modules["diffusers_adm.ops.adagn"]
EPS = 1e-5
# (batch, channels, groups, height, width)
SHAPES = {
    "usual": (3, 12, 4, 5, 7),
    "batch-1": (1, 12, 4, 6, 6),
    "spatial-1x1": (3, 12, 4, 1, 1),
    "one-group": (2, 6, 1, 4, 3),
    "channels-equal-groups": (2, 6, 6, 4, 3),
    "one-channel": (2, 1, 1, 4, 4),
}
LAYOUTS = ("contiguous", "channels_last", "sliced")
ARGUMENTS = ("x", "weight", "bias", "scale", "shift")


def formula(x, num_groups, weight, bias, eps, scale, shift, activation):
    """`act(group_norm(x) * (1 + scale) + shift)` from the definition of each part. Also returns the input of `act`."""
    grouped = x.reshape(x.shape[0], num_groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(-1, keepdim=True)
    normed = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    h = normed * weight[None, :, None, None] + bias[None, :, None, None]
    if scale is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    if activation in ("silu", "swish"):
        return h / (1 + torch.exp(-h)), h
    if activation == "mish":
        return h * torch.tanh(torch.log1p(torch.exp(h))), h
    if activation == "gelu":
        return 0.5 * h * (1 + torch.erf(h / 2**0.5)), h
    return h * (h > 0), h


def make_inputs(shape=SHAPES["usual"], dtype=torch.float64, layout="contiguous", conditioned=True, scale_size=0.5):
    """Arguments by name, all of them leaves or views of leaves with gradients. Means far from 0, uneven variances."""
    batch, channels, _, height, width = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = draw(batch, channels, height, width) * torch.linspace(0.5, 2, channels, dtype=torch.float64)[:, None, None] + 1
    inputs = {"x": x, "weight": 1 + 0.3 * draw(channels), "bias": 0.3 * draw(channels)}
    if conditioned:
        inputs |= {"scale": scale_size * draw(batch, channels), "shift": 0.5 * draw(batch, channels)}
    else:
        inputs |= {"scale": None, "shift": None}
    inputs = {name: value if value is None else value.to(dtype) for name, value in inputs.items()}
    if layout == "channels_last":
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":  # every other column of a wider image: neither layout, and not dense
        wide = inputs["x"].new_zeros(batch, channels, height, 2 * width)
        wide[..., ::2] = inputs["x"]
        inputs["x"] = wide[..., ::2]
    return {name: value if value is None else value.detach().requires_grad_() for name, value in inputs.items()}


def outputs_and_grads(function, inputs, num_groups, activation="silu"):
    named = {name: value for name, value in inputs.items() if value is not None}
    output = function(eps=EPS, num_groups=num_groups, activation=activation, **inputs)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((output.double() * cotangent).sum(), list(named.values()))
    return {"output": output, **dict(zip(named, grads, strict=True))}


def in_float64(inputs):
    """The exact numbers of 16-bit inputs, as float64."""
    return {name: v if v is None else v.detach().double().requires_grad_() for name, v in inputs.items()}


def relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def formula_output(**kwargs):
    return formula(**kwargs)[0]


@pytest.mark.parametrize("activation", get_args(AdaGNActivation))
@pytest.mark.parametrize("conditioned", [True, False], ids=["scale-shift", "plain"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_paths_are_the_formula_in_float64(shape, conditioned, activation):
    for layout in LAYOUTS:
        inputs = make_inputs(shape, layout=layout, conditioned=conditioned)
        expected = outputs_and_grads(formula_output, inputs, shape[2], activation)
        for function in (adagn, adagn_reference) + ((_adagn_folded,) if layout == "contiguous" else ()):
            actual = outputs_and_grads(function, inputs, shape[2], activation)
            for name, value in expected.items():
                # Absolute: gradients of x can vanish (a group of one value is constant whatever the value).
                scale = max(1.0, value.abs().max().item())
                assert (actual[name] - value).abs().max() <= 1e-12 * scale, (function.__name__, layout, name)


@pytest.mark.parametrize("conditioned", [True, False], ids=["scale-shift", "plain"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fast_path_and_reference_agree_in_float32(shape, conditioned):
    inputs = make_inputs(shape, torch.float32, conditioned=conditioned)
    expected = outputs_and_grads(adagn_reference, inputs, shape[2])
    actual = outputs_and_grads(_adagn_folded, inputs, shape[2])
    x = inputs["x"].detach().reshape(shape[0], shape[2], -1)
    # Two orders of summation of some 100 terms: about 10 units of rounding (6e-8) of the largest entry, times what
    # the division by a small standard deviation (three near values in a group of 1x1 images) makes of them.
    amplification = (x.abs().amax(-1) / (x.var(-1, correction=0) + EPS).sqrt()).max().item()
    for name, value in expected.items():
        bound = 6e-7 * max(1.0, amplification) * max(1.0, value.abs().max().item())
        assert (actual[name] - value).abs().max() <= bound, (name, amplification)


@pytest.mark.no_jitter("counts roundings to 16 bits, to which the jitter would add")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("activation", get_args(AdaGNActivation))
def test_16_bit_fast_path_is_as_accurate_as_two_roundings(activation, dtype):
    unit = torch.finfo(dtype).eps / 2  # largest relative error of one rounding
    inputs = make_inputs((2, 32, 4, 16, 16), dtype)
    truth, h = formula(num_groups=4, eps=EPS, activation=activation, **in_float64(inputs))
    outputs = {f: f(num_groups=4, eps=EPS, activation=activation, **inputs) for f in (adagn_reference, _adagn_folded)}
    # The kernel computes in float32 and rounds (at h), the activation rounds again; no slope of these activations is
    # above 1.13. The reference rounds once. To both comes float32 arithmetic, which cancels in `gelu` of negative
    # numbers, and the smallest number of the dtype.
    float32 = 8 * torch.finfo(torch.float32).eps * h.abs() + torch.finfo(dtype).tiny
    once = unit * truth.abs() + float32
    bounds = {adagn_reference: once, _adagn_folded: once + 1.13 * unit * h.abs()}
    for function, bound in bounds.items():
        assert outputs[function].dtype == dtype
        assert ((outputs[function].double() - truth).abs() <= bound).all(), function.__name__


@pytest.mark.no_jitter("counts roundings to 16 bits, to which the jitter would add")
@pytest.mark.parametrize("conditioned", [True, False], ids=["scale-shift", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_fast_path_is_as_near_the_truth_as_the_reference(dtype, conditioned):
    inputs = make_inputs((4, 32, 8, 16, 16), dtype, conditioned=conditioned)
    truth = outputs_and_grads(formula_output, in_float64(inputs), 8)
    reference = outputs_and_grads(adagn_reference, inputs, 8)
    fast = outputs_and_grads(_adagn_folded, inputs, 8)
    for name, value in truth.items():
        # One more rounding in the middle of each direction: below three times the error of the reference's only one.
        bound = 3 * max(relative_error(reference[name], value), torch.finfo(dtype).eps / 4)
        assert relative_error(fast[name], value) <= bound, name


@pytest.mark.parametrize("conditioned", [True, False], ids=["scale-shift", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_reference_keeps_its_input_alone_for_the_backward_pass(dtype, conditioned):
    inputs = make_inputs((4, 32, 8, 16, 16), dtype, "sliced", conditioned)
    for name, value in outputs_and_grads(adagn_reference, inputs, 8).items():
        assert rounding_errors(outputs_and_grads(adagn, inputs, 8)[name], value) <= ONE_LAYER, name

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        adagn(num_groups=8, eps=EPS, activation="silu", **inputs)
    assert sum(x.element_size() * x.numel() for x in kept if x.ndim == 4) <= 2 * inputs["x"].numel()


def test_16_bit_activations_with_float32_parameters():
    """As with layerwise casting, and in models loaded in bf16 with norms kept in float32."""
    inputs = make_inputs(dtype=torch.float64)
    inputs = {n: v.detach().to(torch.bfloat16 if n == "x" else torch.float32) for n, v in inputs.items()}
    truth = formula_output(num_groups=4, eps=EPS, activation="silu", **{n: v.double() for n, v in inputs.items()})
    for function in (adagn, adagn_reference):
        output = function(num_groups=4, eps=EPS, **inputs)
        assert output.dtype == torch.bfloat16
        assert relative_error(output, truth) <= 2 * torch.finfo(torch.bfloat16).eps


def test_known_wrong_scale_and_shift_swapped():
    inputs = make_inputs()
    swapped = {**inputs, "scale": inputs["shift"], "shift": inputs["scale"]}
    truth = formula_output(num_groups=4, eps=EPS, activation="silu", **inputs)
    assert relative_error(adagn(num_groups=4, eps=EPS, **inputs), truth) <= 1e-12
    assert relative_error(adagn(num_groups=4, eps=EPS, **swapped), truth) > 0.1


def one_plus_scale_in_its_own_dtype(x, num_groups, weight, bias, eps, scale, shift, activation):
    h = adagn_reference(x, num_groups, weight, bias, eps, activation="relu")  # bias 0, weights > 0: below 0 it is 0
    return h * (1 + scale)[:, :, None, None]


def test_known_wrong_one_plus_scale_in_bf16():
    """Added to 1, a scale of 2**-9 is lost in bf16: the mean error shows what a single error hides."""
    x = make_inputs((4, 32, 8, 16, 16), torch.bfloat16)["x"].detach()
    arguments = {
        "num_groups": 8,
        "weight": torch.ones(32, dtype=torch.bfloat16),
        "bias": torch.zeros(32, dtype=torch.bfloat16),
        "scale": torch.full((4, 32), 2.0**-9, dtype=torch.bfloat16),
        "shift": torch.zeros(4, 32, dtype=torch.bfloat16),
    }
    in_float64 = {n: v.double() if torch.is_tensor(v) else v for n, v in arguments.items()}
    truth = formula_output(x=x.double(), eps=EPS, activation="relu", **in_float64)
    large = truth > 0.1

    def mean_relative_error(function):
        output = function(x=x, eps=EPS, activation="relu", **arguments)
        return ((output.double() - truth)[large] / truth[large]).mean().item()

    # Roundings to nearest, each at most 2**-8, cancel to some 2**-8 / sqrt(3 * 20000) = 1.6e-5 (one sigma).
    assert abs(mean_relative_error(adagn_reference)) <= 1e-4
    assert abs(mean_relative_error(_adagn_folded)) <= 1e-4
    assert mean_relative_error(one_plus_scale_in_its_own_dtype) == pytest.approx(-(2.0**-9), rel=0.1)


@pytest.mark.parametrize("conditioned", [True, False], ids=["scale-shift", "plain"])
@pytest.mark.parametrize(
    "layout, function",
    [("contiguous", _adagn_folded), ("contiguous", adagn_reference), ("channels_last", adagn_reference)],
)
def test_gradcheck(layout, conditioned, function):
    inputs = make_inputs((2, 4, 2, 2, 3), layout=layout, conditioned=conditioned)
    given = [inputs[name] for name in ARGUMENTS if inputs[name] is not None]

    def call(x, weight, bias, scale=None, shift=None):
        return function(x, 2, weight, bias, EPS, scale, shift, "silu")

    # Two backward passes may differ by rounding, of 2.2e-16 times the size of the gradients, about 1.
    assert torch.autograd.gradcheck(call, given, nondet_tol=1e-9)


@pytest.mark.parametrize("activation", get_args(AdaGNActivation))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_result_keeps_the_memory_format(layout, dtype, activation):
    memory_format = getattr(torch, layout if layout == "channels_last" else "contiguous_format")
    for conditioned in (True, False):
        inputs = make_inputs(dtype=dtype, layout=layout, conditioned=conditioned)
        for function in (adagn, adagn_reference):
            output = function(num_groups=4, eps=EPS, activation=activation, **inputs)
            assert output.is_contiguous(memory_format=memory_format), function.__name__
            assert output.shape == inputs["x"].shape


@pytest.mark.parametrize("activation", get_args(AdaGNActivation))
@pytest.mark.parametrize("conditioned", [True, False], ids=["scale-shift", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_never_changed(layout, conditioned, activation):
    """Without gradients the fast path activates in place, and must overwrite only its own tensors."""
    inputs = make_inputs(layout=layout, conditioned=conditioned)
    inputs = {name: value if value is None else value.detach() for name, value in inputs.items()}
    copies = {name: value if value is None else value.clone() for name, value in inputs.items()}
    with_grad = adagn(
        num_groups=4, eps=EPS, activation=activation, **make_inputs(layout=layout, conditioned=conditioned)
    )
    for no_grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with no_grad():
            output = adagn(num_groups=4, eps=EPS, activation=activation, **inputs)
        assert rounding_errors(output, with_grad.detach()) <= ONE_LAYER
    for name, value in copies.items():
        if value is not None:
            assert torch.equal(inputs[name], value), name


PATHS = ("_adagn_folded", "adagn_cpu", "adagn_reference")


def record_calls(monkeypatch):
    calls = []
    for name in PATHS:
        function = getattr(adagn_module, name)
        monkeypatch.setattr(adagn_module, name, lambda *a, n=name, f=function, **k: (calls.append(n), f(*a, **k))[1])
    return calls


@pytest.mark.parametrize(
    "layout, path",
    [("contiguous", "_adagn_folded"), ("channels_last", "adagn_cpu"), ("sliced", "adagn_reference")],
)
def test_layout_decides_the_path(layout, path, monkeypatch):
    calls = record_calls(monkeypatch)
    adagn(num_groups=4, eps=EPS, **make_inputs(layout=layout))
    assert calls == [path]


def test_input_without_two_spatial_dimensions_takes_the_reference(monkeypatch):
    calls = record_calls(monkeypatch)
    x, weight, bias = torch.randn(2, 6, 5), torch.ones(6), torch.zeros(6)
    assert_close(adagn(x, 3, weight, bias, EPS), nn.functional.silu(nn.functional.group_norm(x, 3, weight, bias, EPS)))
    assert calls == ["adagn_reference"]


SWITCH = "DIFFUSERS_ADM_REFERENCE_ADAGN"


def import_adagn_again(file):
    """The module as in a new process: it reads the switch at import."""
    spec = importlib.util.spec_from_file_location("diffusers_adm.ops.adagn_read_again", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_environment_switch_in_a_process_of_its_own():
    program = (
        "import importlib.util, sys, torch\n"
        + inspect.getsource(import_adagn_again)
        + "module = import_adagn_again(sys.argv[1])\n"
        f"for name in {PATHS}:\n"
        "    def record(*args, name=name, function=getattr(module, name)):\n"
        "        print(name)\n"
        "        return function(*args)\n"
        "    setattr(module, name, record)\n"
        "module.AdaGroupNormAct(2, 4)(torch.randn(1, 4, 3, 3), torch.randn(1, 4), torch.randn(1, 4))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", SWITCH: "1"}
    command = [sys.executable, "-c", program, adagn_module.__file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["adagn_reference"]


@pytest.mark.parametrize("value, used", [("1", True), ("0", False), ("", False), (None, False)])
def test_values_of_the_environment_switch(value, used, monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    assert import_adagn_again(adagn_module.__file__).USE_ADAGN_REFERENCE is used


@pytest.mark.parametrize("given", ["scale", "shift"])
def test_scale_or_shift_alone_is_refused(given):
    inputs = make_inputs()
    inputs["shift" if given == "scale" else "scale"] = None
    with pytest.raises(ValueError, match="both `scale` and `shift`, or neither"):
        adagn(num_groups=4, eps=EPS, **inputs)


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="`activation` is 'tanh'; it must be one of .*'silu'.*'relu'"):
        AdaGroupNormAct(2, 4, activation="tanh")
    assert set(ADAGN_ACTIVATIONS) == set(get_args(AdaGNActivation))


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="divisible"):
        AdaGroupNormAct(3, 4)


def test_module_owns_the_parameters_of_group_norm():
    module, plain = AdaGroupNormAct(4, 12, eps=1e-3, activation="gelu"), nn.GroupNorm(4, 12, eps=1e-3)
    fill_randomly(plain)
    module.load_state_dict(plain.state_dict(), strict=True)
    x = make_inputs()["x"].detach().float()
    assert_close(module(x), nn.functional.gelu(plain(x)))
    assert repr(module) == "AdaGroupNormAct(4, 12, eps=0.001, affine=True, activation='gelu')" or "'gelu'" in repr(
        module
    )


@pytest.mark.parametrize("injection", ["scale_shift", "default"])
@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_res_block_keeps_the_order_of_operations_of_diffusers(injection, resample):
    theirs = ResnetBlock2D(
        in_channels=8,
        out_channels=8 if resample else 12,
        temb_channels=16,
        groups=4,
        time_embedding_norm=injection,
        output_scale_factor=1.5,
        up=resample == "up",
        down=resample == "down",
    )
    fill_randomly(theirs).double()
    ours = ResBlock(8, 8 if resample else 12, 16, 4, 1e-6, "swish", injection, 0.0, resample, output_scale_factor=1.5)
    ours.double().load_state_dict(theirs.state_dict(), strict=True)
    x, temb = torch.randn(2, 8, 6, 4, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    # Ours takes the activated embedding, which the U-Net computes once.
    assert_close(ours(x, nn.functional.silu(temb)), theirs(x, temb), rtol=0, atol=1e-12)


@pytest.mark.parametrize("injection", ["scale_shift", "default"])
def test_unet_normalises_by_nothing_else(injection, monkeypatch):
    """Every normalisation is an `AdaGroupNormAct`, which calls `adagn`, except those of diffusers' `Attention`."""
    unet = random_unet(resnet_time_scale_shift=injection, **CONDITIONAL)
    inside_attention = {id(m) for a in unet.modules() if isinstance(a, Attention) for m in a.modules()}
    norms = {
        n: m for n, m in unet.named_modules() if "norm" in type(m).__name__.lower() and id(m) not in inside_attention
    }
    assert norms
    assert all(type(norm) is AdaGroupNormAct for norm in norms.values())
    in_attention = [n for n, m in unet.named_modules() if id(m) in inside_attention and "Norm" in type(m).__name__]
    assert in_attention
    assert all(name.endswith("group_norm") for name in in_attention)

    # And nothing normalises by a function: each kernel runs as often as there are modules.
    calls = record_calls(monkeypatch)
    kernels = []
    for owner, name in ((torch, "group_norm"), (nn.functional, "group_norm")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, f=function, **k: (kernels.append(n), f(*a, **k))[1])
    with torch.no_grad():
        unet(torch.randn(2, 3, 8, 8), 5)
    assert len(calls) == len(norms)
    # `nn.GroupNorm` in attention goes through `nn.functional.group_norm`, which calls `torch.group_norm`.
    assert len(kernels) == len(norms) + 2 * len(in_attention)
