"""Normalisation of channels-last tensors on CPU: each way through it against the reference in float64."""

import sys
from typing import get_args

import pytest
import torch
from tolerances import ONE_LAYER, rounding_errors
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing import assert_close

from diffusers_adm.ops.adagn import AdaGNActivation, adagn, adagn_reference
from diffusers_adm.ops.adagn_cpu import ACTIVATIONS, _forward_chunk, cpu_is_usable


adagn_cpu_module = sys.modules["diffusers_adm.ops.adagn_cpu"]
SHAPE = (3, 12, 5, 7)
EPS, GROUPS = 1e-5, 4
ALWAYS, NEVER = 0, 2**60
# (numbers of forward chunks, of large 16-bit examples, of large batches, of backward chunks)
WAYS = {
    "whole batch": (NEVER, NEVER, ALWAYS, NEVER),
    "chunks of two": (2 * 12 * 5 * 7, NEVER, ALWAYS, 2 * 12 * 5 * 7),
    "one by one": (1, ALWAYS, ALWAYS, 1),
    "autograd": (NEVER, NEVER, NEVER, NEVER),
}
LAYOUT = torch.channels_last


def take(way, monkeypatch):
    forward_chunk, large_example, large_batch, backward_chunk = WAYS[way]
    monkeypatch.setattr(adagn_cpu_module, "FORWARD_CHUNK", forward_chunk)
    monkeypatch.setattr(adagn_cpu_module, "LARGE_16_BIT_EXAMPLE", large_example)
    monkeypatch.setattr(adagn_cpu_module, "LARGE_BATCH", dict.fromkeys((2, 4, 8), large_batch))
    monkeypatch.setattr(adagn_cpu_module, "BACKWARD_CHUNK", backward_chunk)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    take(request.param, monkeypatch)
    return request.param


def make_inputs(shape=SHAPE, dtype=torch.float64, conditioned=True, mean=1.0, deviation=2.0):
    """x, weight, bias and, where conditioned, scale and shift, all with gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    channels = shape[1]
    tensors = [
        (mean + deviation * draw(*shape)).contiguous(memory_format=LAYOUT),
        1 + 0.3 * draw(channels),
        0.3 * draw(channels),
    ]
    if conditioned:
        tensors += [0.5 * draw(*shape[:2]), 0.5 * draw(*shape[:2])]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def call(function, inputs, activation="silu", groups=GROUPS):
    return function(inputs[0], groups, *inputs[1:3], EPS, *inputs[3:], activation=activation)


def results(function, inputs, activation="silu", groups=GROUPS):
    """The result and the gradients of a weighted sum of it."""
    output = call(function, inputs, activation, groups)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad((output.double() * cotangent).sum(), inputs)]


def in_float64(inputs):
    return [tensor.detach().double().requires_grad_() for tensor in inputs]


def relative_errors(actual, expected):
    return [((a.double() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("conditioned", [True, False], ids=["scale-shift", "plain"])
@pytest.mark.parametrize("activation", get_args(AdaGNActivation))
def test_values_and_gradients_in_float64(way, activation, conditioned):
    for shape, groups in ((SHAPE, 4), ((1, *SHAPE[1:]), 4), (SHAPE, 12), ((9, 12, 2, 1), 1)):
        inputs = make_inputs(shape, conditioned=conditioned)
        expected = results(adagn_reference, inputs, activation, groups)
        actual = results(adagn, inputs, activation, groups)
        assert max(relative_errors(actual, expected)) <= 1e-12, shape
        assert actual[0].is_contiguous(memory_format=LAYOUT)
        with torch.no_grad():
            assert rounding_errors(call(adagn, inputs, activation, groups), expected[0]) <= ONE_LAYER, shape


@pytest.mark.parametrize("conditioned", [True, False], ids=["scale-shift", "plain"])
def test_second_gradients_in_float64(way, conditioned):
    inputs = make_inputs((3, 4, 2, 3), conditioned=conditioned)
    assert torch.autograd.gradgradcheck(lambda *i: call(adagn, i, groups=2), inputs, nondet_tol=1e-9)


def test_gradients_where_scale_depends_on_the_input(way):
    """The gradient of x along scale must be counted once, in second derivatives as well."""

    def gradients(function):
        x, weight, bias, _, shift = make_inputs()
        output = call(function, [x, weight, bias, x.mean((2, 3)), shift])
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return [first, *torch.autograd.grad(first.square().sum(), [x, weight])]

    assert max(relative_errors(gradients(adagn), gradients(adagn_reference))) <= 1e-12


def test_only_the_gradients_that_are_asked_for(way):
    whole = results(adagn_reference, make_inputs())[1:]
    for asked in ([0], [1, 2], [3], [0, 4]):
        inputs = [t.requires_grad_(i in asked) for i, t in enumerate(make_inputs())]
        output = call(adagn, inputs)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        # In no layout of its own, as the gradient of a sum or of a contiguous layer is.
        (output * cotangent.contiguous()).sum().backward()
        for number, tensor in enumerate(inputs):
            assert (tensor.grad is not None) == (number in asked)
            if number in asked:
                assert relative_errors([tensor.grad], [whole[number]])[0] <= 1e-12
    inputs = make_inputs()
    grads = [torch.autograd.grad(call(f, inputs).sum(), inputs) for f in (adagn, adagn_reference)]
    assert max(relative_errors(*grads)) <= 1e-12


@pytest.mark.no_jitter("counts roundings to 16 bits, to which the jitter would add")
@pytest.mark.parametrize("conditioned", [True, False], ids=["scale-shift", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [8, 32], ids=["few-pixels", "many-pixels"])
def test_16_bits_are_as_near_the_truth_as_the_reference(way, dtype, conditioned, size):
    inputs = make_inputs((3, 16, size, size), dtype, conditioned)
    truth = results(adagn_reference, in_float64(inputs))
    unit = torch.finfo(dtype).eps
    actual = results(adagn, inputs)
    assert all(a.dtype == dtype for a in actual)
    allowed = [3 * max(error, unit / 4) for error in relative_errors(results(adagn_reference, inputs), truth)]
    # One more rounding, before the activation, where examples are normalised without casts.
    assert all(e <= a for e, a in zip(relative_errors(actual, truth), allowed, strict=True))


@pytest.mark.parametrize("mean, deviation", [(1e3, 1e-2), (-30.0, 1e-3), (0.0, 1e-4)])
def test_large_offsets_in_float32(way, mean, deviation):
    """What is left of x after its mean has few digits, in the reference as well."""
    inputs = make_inputs((3, 16, 8, 8), torch.float32, mean=mean, deviation=deviation)
    truth = results(adagn_reference, in_float64(inputs))
    reference = relative_errors(results(adagn_reference, inputs), truth)
    actual = relative_errors(results(adagn, inputs), truth)
    assert all(a <= 4 * r + 1e-6 for a, r in zip(actual, reference, strict=True)), (actual, reference)


def test_mixed_types_and_autocast(way):
    """Under autocast x, scale and shift have 16 bits and the parameters 32."""
    inputs = [t.detach().bfloat16() for t in make_inputs()]
    inputs[1:3] = [t.float() for t in inputs[1:3]]
    truth = results(adagn_reference, in_float64(inputs))
    inputs = [t.requires_grad_() for t in inputs]
    outside = results(adagn, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(adagn, inputs)
    for actual in (outside, inside):
        assert [t.dtype for t in actual[1:]] == [t.dtype for t in inputs]
        assert actual[0].dtype == torch.bfloat16
        assert max(relative_errors(actual, truth)) <= 4 * torch.finfo(torch.bfloat16).eps
    for a, b in zip(inside, outside, strict=True):
        assert rounding_errors(a, b) <= ONE_LAYER


def test_transforms_of_functions(way):
    x, weight, bias, scale, shift = (t.detach() for t in make_inputs())
    tangent = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))

    def of(function):
        def f(x, scale):
            # Of transformed channels-last tensors, torch's group normalisation has no derivative.
            plain = x.contiguous() if function is adagn_reference else x
            output = call(function, [plain, weight, bias, scale, shift])
            assert (output.stride(1) == 1) == (plain.stride(1) == 1)  # channels-last or not
            return output

        found = [*torch.func.jvp(f, (x, scale), (tangent, scale.flip(0)))]
        several = torch.stack([x, tangent]).transpose(1, 2).contiguous().transpose(1, 2)
        found.append(torch.func.vmap(f, in_dims=(0, None))(several, scale))
        found += torch.func.grad(lambda x, s: f(x, s).square().sum(), argnums=(0, 1))(x, scale)
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent), scale)).tangent)
            found.append(forward_ad.unpack_dual(f(x, forward_ad.make_dual(scale, scale))).tangent)
        return found

    assert max(relative_errors(of(adagn), of(adagn_reference))) <= 1e-12


@pytest.mark.no_jitter("torch compiles nothing inside a dispatch mode")
def test_what_is_not_computed_now_is_left_to_the_reference():
    inputs = [t.detach() for t in make_inputs(dtype=torch.float32)]
    assert cpu_is_usable(inputs[0], *inputs[1:])
    assert cpu_is_usable(inputs[0], *map(nn.Parameter, inputs[1:3]), None, None)

    class Own(torch.Tensor):
        pass

    assert not cpu_is_usable(inputs[0], inputs[1].as_subclass(Own), *inputs[2:])
    assert not cpu_is_usable(inputs[0].contiguous(), *inputs[1:])
    assert not cpu_is_usable(inputs[0].to("meta"), *inputs[1:])
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in inputs]
        assert not cpu_is_usable(fake[0], *fake[1:])
        assert call(adagn, fake).shape == inputs[0].shape
    expected = call(adagn, inputs)
    compiled = torch.compile(lambda *i: call(adagn, i), backend="eager", fullgraph=True)
    assert_close(compiled(*inputs), expected)
    # A trace must not hold the number of examples.
    traced = torch.jit.trace(lambda *i: call(adagn, i), inputs, check_trace=False)
    one = [inputs[0][:1], *inputs[1:3], inputs[3][:1], inputs[4][:1]]
    assert_close(traced(*one), expected[:1])
    empty = [inputs[0][:0], *inputs[1:3], inputs[3][:0], inputs[4][:0]]
    assert call(adagn, empty).shape == (0, *SHAPE[1:])


def test_inputs_are_never_changed(way):
    for conditioned in (True, False):
        inputs = [t.detach() for t in make_inputs(dtype=torch.float32, conditioned=conditioned)]
        copies = [t.clone() for t in inputs]
        for activation in ACTIVATIONS:
            call(adagn, inputs, activation)
            results(adagn, [t.requires_grad_() for t in inputs], activation)
            assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True)), activation


@pytest.mark.parametrize(
    "dtype, shape, examples",
    [
        (torch.float32, (4, 64, 64, 64), 4),
        (torch.float32, (16, 64, 64, 64), 4),
        (torch.float32, (4, 192, 64, 64), 1),
        (torch.float32, (4, 256, 8, 8), 64),
        (torch.bfloat16, (4, 64, 64, 64), 1),
        (torch.bfloat16, (4, 128, 32, 32), 8),
    ],
)
def test_how_many_examples_are_normalised_at_once(dtype, shape, examples):
    assert _forward_chunk(torch.empty(shape, dtype=dtype)) == examples


def numbers_kept(inputs, groups=32):
    """Bytes that the graph keeps of tensors as large as x."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.setdefault(t.data_ptr(), t), t)[1], lambda t: t):
        output = call(adagn, inputs, groups=groups)
    size = sum(t.numel() * t.element_size() for t in kept.values() if t.numel() >= inputs[0].numel())
    return size / (inputs[0].numel() * inputs[0].element_size()), type(output.grad_fn).__name__


@pytest.mark.parametrize("conditioned", [True, False], ids=["scale-shift", "plain"])
@pytest.mark.parametrize(
    "dtype, shape",
    [(torch.float32, (2, 64, 64, 64)), (torch.bfloat16, (2, 128, 32, 32)), (torch.float16, (1, 64, 64, 64))],
)
def test_large_batches_keep_their_input_alone_for_the_backward_pass(dtype, shape, conditioned):
    inputs = make_inputs(shape, dtype, conditioned)
    assert numbers_kept(inputs) == (1, "_AdaGNBackward")
    assert numbers_kept([t[: shape[0], :, :16, :16] if t.ndim == 4 else t for t in inputs])[1] != "_AdaGNBackward"
