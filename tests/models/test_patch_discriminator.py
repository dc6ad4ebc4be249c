"""PatchDiscriminator: the layers of pix2pix with group norm, its patches, independence of the batch, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import NETWORK, rounding_errors

from diffusers_adm.models.patch_discriminator import PatchDiscriminator


def toy(**changes):
    torch.manual_seed(0)
    return PatchDiscriminator(**{"in_channels": 3, "base_channels": 8, "num_layers": 2, "norm_num_groups": 4} | changes)


def test_it_is_the_network_of_the_paper():
    """Written out: C8-C16-C16 of 4x4 convolutions, the last two of stride 1, no norm in the first and the last."""
    network, images = toy(), torch.randn(2, 3, 16, 16)
    weights = network.state_dict()
    convolutions = [name.removesuffix(".weight") for name, value in weights.items() if value.ndim == 4]
    norms = [name.removesuffix(".weight") for name, value in weights.items() if value.ndim == 1 and "weight" in name]
    assert [tuple(weights[f"{name}.weight"].shape) for name in convolutions] == [
        (8, 3, 4, 4),
        (16, 8, 4, 4),
        (32, 16, 4, 4),
        (1, 32, 4, 4),
    ]
    x = images
    for index, (name, stride) in enumerate(zip(convolutions, (2, 2, 1, 1), strict=True)):
        x = F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), stride=stride, padding=1)
        if index in (1, 2):
            norm = norms[index - 1]
            x = F.group_norm(x, 4, weights[f"{norm}.weight"], weights[f"{norm}.bias"])
        if index < 3:
            x = F.leaky_relu(x, 0.2)
    assert rounding_errors(network(images), x) <= NETWORK


@pytest.mark.parametrize(("num_layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_sides_of_the_patches(num_layers, side):
    """By the gradient of one logit in the middle, without norms, whose statistics are those of the whole image."""
    network = toy(num_layers=num_layers, in_channels=1)
    network.layers = torch.nn.Sequential(*(x for x in network.layers if not isinstance(x, torch.nn.GroupNorm)))
    images = torch.randn(1, 1, 128, 128, requires_grad=True)
    logits = network(images)
    assert logits.shape[2:] == (128 // 2**num_layers - 2,) * 2
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = images.grad[0, 0].abs().sum(dim=1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == side


def test_images_do_not_see_each_other():
    network, images = toy(), torch.randn(4, 3, 16, 16)
    alone = torch.cat([network(image[None]) for image in images])
    assert rounding_errors(network(images), alone) <= NETWORK


def test_saved_and_loaded(tmp_path):
    network = toy(in_channels=5)
    network.save_pretrained(tmp_path)
    loaded = PatchDiscriminator.from_pretrained(tmp_path)
    assert loaded.config.base_channels == 8
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())


def test_the_smallest_image():
    for num_layers in (1, 2, 3):
        network = toy(num_layers=num_layers)
        assert network(torch.randn(1, 3, network.min_size, network.min_size)).shape == (1, 1, 1, 1)
        with pytest.raises(RuntimeError):
            network(torch.randn(1, 3, network.min_size - 2, network.min_size - 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "`num_layers` is 0; it must be at least 1"),
        ({"base_channels": 6}, "`base_channels` is 6, which `norm_num_groups` 4 does not divide"),
    ],
)
def test_numbers_that_describe_no_network(changes, message):
    with pytest.raises(ValueError, match=message):
        toy(**changes)


def test_other_channels():
    with pytest.raises(ValueError, match=r"`sample` has shape \(1, 1, 16, 16\); this model takes \(batch_size, 3"):
        toy()(torch.zeros(1, 1, 16, 16))
