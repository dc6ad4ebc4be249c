"""Convolutions that are not trained, against `F.conv2d`: values, gradients, and what is kept for them."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import NETWORK, ONE_LAYER, rounding_errors
from torch.autograd.graph import saved_tensors_hooks
from toy_models import random_unet

from diffusers_adm.ops.conv import Conv2d, conv2d


CASES = {
    "3x3": ((3, 3), (1, 1), (1, 1), (8, 8)),
    "1x1": ((1, 1), (1, 1), (0, 0), (8, 8)),
    "halving": ((3, 3), (2, 2), (1, 1), (8, 6)),
    "halving-unpadded": ((3, 3), (2, 2), (0, 0), (9, 7)),
    "halving-odd-size": ((3, 3), (2, 2), (1, 1), (7, 5)),
}


def random_case(name, dtype=torch.float64):
    kernel, stride, padding, size = CASES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, *size), (6, 4, *kernel), (6,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, weight, bias, stride, padding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["planar", "nhwc"])
@pytest.mark.parametrize("name", CASES)
def test_same_values_and_gradients(name, memory_format, dtype):
    x, weight, bias, stride, padding = random_case(name, dtype)
    weight = weight.contiguous(memory_format=memory_format)  # as `model.to(memory_format=...)` does
    results = []
    for function in (conv2d, F.conv2d):
        own = x.clone(memory_format=memory_format).requires_grad_()
        output = function(own, weight, bias, stride, padding)
        (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append((output, own.grad))
    (output, gradient), (expected, expected_gradient) = results
    # In bfloat16, an error is up to 16 of these.
    number = ONE_LAYER * (4 if dtype == torch.bfloat16 else 1)
    assert rounding_errors(output, expected) <= number
    assert rounding_errors(gradient, expected_gradient) <= number
    assert gradient.dtype == dtype


def test_gradients_of_gradients():
    """For second derivatives of a guided sample."""
    x, weight, bias, stride, padding = random_case("halving")
    results = []
    for function in (conv2d, F.conv2d):
        own = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            function(own, weight, bias, stride, padding).pow(3).sum(), own, create_graph=True
        )
        (second,) = torch.autograd.grad(gradient.square().sum(), own)
        results.append(second)
    assert rounding_errors(*results) <= ONE_LAYER


def test_under_autocast():
    x, weight, bias, stride, padding = random_case("3x3", torch.float32)
    results = []
    for function in (conv2d, F.conv2d):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = function(own, weight, bias, stride, padding)
        (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append((output, own.grad))
    assert results[0][0].dtype == torch.bfloat16
    assert rounding_errors(results[0][0], results[1][0]) <= 4 * ONE_LAYER
    assert results[0][1].dtype == torch.float32
    assert rounding_errors(results[0][1], results[1][1], dtype=torch.bfloat16) <= 4 * ONE_LAYER


def test_functional_transforms():
    x, weight, bias, stride, padding = random_case("3x3")

    def value(one):
        return conv2d(one[None], weight, bias, stride, padding).cos().sum()

    def expected(one):
        return F.conv2d(one[None], weight, bias, stride, padding).cos().sum()

    torch.testing.assert_close(torch.vmap(torch.func.grad(value))(x), torch.vmap(torch.func.grad(expected))(x))


def test_forward_mode_and_products_with_the_hessian():
    x, weight, bias, stride, padding = random_case("halving")
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    results = []
    for function in (conv2d, F.conv2d):

        def value(x, function=function):
            return function(x, weight, bias, stride, padding).cos().sum()

        results.append(torch.func.jvp(torch.func.grad(value), (x,), (tangent,))[1])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), tangent)
            results.append(torch.autograd.forward_ad.unpack_dual(value(dual)).tangent)
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


@pytest.mark.parametrize(
    "changes", [{"padding_mode": "circular"}, {"dilation": (2, 2)}, {"groups": 2}, {"padding": "same"}], ids=str
)
def test_what_else_layers_of_torch_do(changes):
    """Also if set after construction: `padding_mode = "circular"` makes images tileable."""
    torch.manual_seed(0)
    ours = Conv2d(4, 6, kernel_size=3, **{"padding": 1, **changes}).requires_grad_(False)
    theirs = torch.nn.Conv2d(4, 6, kernel_size=3, **{"padding": 1, **changes}).requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    assert rounding_errors(ours(x), theirs(x)) <= ONE_LAYER


@torch.no_grad()
def test_images_that_tile():
    """A network whose convolutions are circular shifts its output with its input."""
    unet = random_unet(add_attention=False, down_block_types=("ResnetDownsampleBlock2D",) * 2).requires_grad_(False)
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [1] * 4
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    shifted = unet(image.roll((4, 6), (2, 3)), 5).sample
    torch.testing.assert_close(shifted, unet(image, 5).sample.roll((4, 6), (2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", ["weight", "bias", "both", "neither"])
def test_keeps_the_input_only_for_what_is_trained(trained):
    x, *_ = random_case("3x3", torch.float32)
    layer = Conv2d(4, 6, kernel_size=3, padding=1)
    layer.weight.requires_grad_(trained in ("weight", "both"))
    layer.bias.requires_grad_(trained in ("bias", "both"))
    kept = []
    own = x.requires_grad_() * 1.0
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(own).sum().backward()
    assert any(tensor is own or tensor.shape == own.shape for tensor in kept) == (trained != "neither")
    assert (layer.weight.grad is not None) == (trained in ("weight", "both"))
    assert (layer.bias.grad is not None) == (trained in ("bias", "both"))


def test_a_network_that_is_not_trained():
    """The gradient with respect to the image is the same, with less memory."""
    unet, found = random_unet(), {}
    for is_trained in (True, False):
        unet.requires_grad_(is_trained)
        image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        kept = []
        with saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor):
            unet(image, 5).sample.square().sum().backward()
        found[is_trained] = image.grad, sum(kept)
    assert rounding_errors(found[True][0], found[False][0]) <= NETWORK
    assert found[False][1] < 0.9 * found[True][1]
