"""`AdaGNUNet2DModel` against diffusers' `UNet2DModel` with the same weights: keys, outputs, gradients, folders."""

import pytest
import torch
from diffusers import UNet2DModel
from tolerances import NETWORK, rounding_errors
from unet_configs import CONFIGS

from diffusers_adm import AdaGNUNet2DModel


# Of the largest entry. float32: two orders of summation apart; float64: the rounding of the sinusoid is shared.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def random_unet2d(config: dict, dtype: torch.dtype = torch.float32) -> UNet2DModel:
    """Every parameter random, norms and biases included: a swap of two of them must show."""
    model = UNet2DModel(**config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "time_proj" in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


def inputs_for(config: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    sample = torch.randn(3, config.get("in_channels", 3), height, width, generator=generator, dtype=torch.float64)
    timestep = torch.tensor([1, 37, 99])
    labels = None
    if config.get("num_class_embeds"):
        labels = torch.tensor([0, 9, 4])
    elif config.get("class_embed_type") == "timestep":
        labels = torch.tensor([5, 7, 11])
    elif config.get("class_embed_type") == "identity":
        labels = torch.randn(3, 4 * config["block_out_channels"][0], generator=generator).to(dtype)
    return sample.to(dtype), timestep, labels


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# diffusers' own class embedding of timesteps is float32 alone: it does not cast the sinusoid.
CASES = [(n, d) for n in CONFIGS for d in TOLERANCE if (n, d) != ("class-embedding-timestep", torch.float64)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["planar", "nhwc"])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_same_weights_same_outputs_and_gradients(name, memory_format, dtype):
    theirs = random_unet2d(CONFIGS[name], dtype)
    ours = AdaGNUNet2DModel(**CONFIGS[name]).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours = ours.to(memory_format=memory_format)
    sample, timestep, labels = inputs_for(CONFIGS[name], dtype)
    theirs_in, ours_in = sample.clone().requires_grad_(), sample.clone().to(memory_format=memory_format)
    ours_in.requires_grad_()

    expected = theirs(theirs_in, timestep, class_labels=labels).sample
    output = ours(ours_in, timestep, class_labels=labels).sample
    assert expected.abs().max() > 0.1
    assert relative_error(output, expected) <= TOLERANCE[dtype]

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (expected * weights).sum().backward()
    (output * weights).sum().backward()
    expected_grads = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert grads.keys() == expected_grads.keys()
    largest = max(grad.abs().max() for grad in expected_grads.values())
    for key, grad in expected_grads.items():
        assert (grads[key] - grad).abs().max() <= TOLERANCE[dtype] * largest, key
    assert relative_error(ours_in.grad, theirs_in.grad) <= 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", CONFIGS)
def test_folder_of_unet2d_loads(name, tmp_path):
    theirs = random_unet2d(CONFIGS[name]).eval()
    theirs.save_pretrained(tmp_path)
    ours, info = AdaGNUNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    sample, timestep, labels = inputs_for(CONFIGS[name], torch.float32)
    with torch.no_grad():
        expected = theirs(sample, timestep, class_labels=labels).sample
        assert relative_error(ours(sample, timestep, class_labels=labels).sample, expected) <= 1e-5


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7])])
def test_every_form_of_timestep(timestep):
    model = AdaGNUNet2DModel(**CONFIGS["one-level-one-channel"])
    torch.nn.init.normal_(model.conv_out.weight)
    sample = torch.randn(3, 1, 12, 12)
    with torch.no_grad():
        found, expected = (model(sample, form).sample for form in (timestep, torch.tensor([7, 7, 7])))
    assert rounding_errors(found, expected) <= NETWORK
