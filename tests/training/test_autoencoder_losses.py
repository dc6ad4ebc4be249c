"""Losses of autoencoders against closed forms, PyTorch's distributions and gradients by brute force."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from tolerances import NETWORK, ONE_LAYER, rounding_errors
from toy_models import TOY_AUTOENCODER_CONFIG, fill_randomly, random_classifier

from diffusers_adm.models.patch_discriminator import PatchDiscriminator
from diffusers_adm.training import (
    MeanMetrics,
    Reconstruction,
    adaptive_weight,
    autoencoder_losses,
    generator_loss,
    hinge_loss,
    kl_per_value,
)
from diffusers_adm.training.autoencoders import AutoencoderArguments
from diffusers_adm.training.perceptual import ClassifierDistance


def posterior(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


def test_kl_divergence():
    """By PyTorch's distributions: summed over an image's latents, per value of the image."""
    mean, log_variance = posterior(3, 2, 4, 4)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3)) / 192
    assert rounding_errors(kl_per_value(mean, log_variance, 192), expected) <= ONE_LAYER
    assert kl_per_value(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), 7).item() == 0


@pytest.mark.parametrize("kind", ["l1", "l2", "l1+l2"])
def test_reconstruction(kind):
    generator = torch.Generator().manual_seed(1)
    samples, images = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2))
    output = Reconstruction(samples, *posterior(2, 2, 4, 4))
    losses = autoencoder_losses(output, images, kind)
    error = (samples - images).double().numpy()
    expected = {"l1": np.abs(error).mean(), "l2": (error**2).mean()}
    expected["l1+l2"] = expected["l1"] + expected["l2"]
    assert losses.fidelity.item() == pytest.approx(expected[kind], rel=1e-6)
    assert losses.mse.item() == pytest.approx(expected["l2"], rel=1e-6)
    assert losses.kl.item() == pytest.approx(kl_per_value(output.mean, output.log_variance, 192).mean().item())
    assert losses.perceptual.item() == 0

    def distance(first, second):
        assert first is samples
        assert second is images
        return torch.tensor([1.0, 3.0])

    losses = autoencoder_losses(output, images, kind, 0.25, distance)
    assert losses.fidelity.item() == pytest.approx(expected[kind] + 0.5, rel=1e-6)
    assert losses.perceptual.item() == 2


def test_hinge():
    real, fake = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(((2 + 0.5 + 0) / 3 + (0 + 1 + 2) / 3) / 2)
    assert hinge_loss(torch.ones(3), -torch.ones(3)).item() == 0


def test_the_generators_loss_trains_no_discriminator():
    discriminator = fill_randomly(PatchDiscriminator(3, 8, 1, 4))
    samples = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = generator_loss(discriminator, samples)
    loss.backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in discriminator.parameters())
    logits = discriminator(samples)
    assert loss.item() == pytest.approx(-logits.mean().item(), rel=1e-5)
    (expected,) = torch.autograd.grad(-logits.mean(), samples)
    assert rounding_errors(samples.grad, expected) <= NETWORK


def test_adaptive_weight():
    """The norms of both gradients, each by a backward pass of its own, and their quotient."""
    discriminator, autoencoder = (
        fill_randomly(PatchDiscriminator(3, 8, 1, 4)),
        fill_randomly(AutoencoderKL(**TOY_AUTOENCODER_CONFIG)),
    )
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    last_layer = autoencoder.decoder.conv_out.weight

    def losses():
        samples = autoencoder(images).sample
        return (samples - images).square().mean(), generator_loss(discriminator, samples)

    norms = []
    for place in range(2):
        autoencoder.zero_grad()
        losses()[place].backward()
        norms.append(last_layer.grad.norm().item())
    autoencoder.zero_grad()
    fidelity, generator = losses()
    weight = adaptive_weight(fidelity, generator, last_layer)
    assert weight.item() == pytest.approx(norms[0] / (norms[1] + 1e-4), rel=1e-4)
    assert not weight.requires_grad
    assert last_layer.grad is None
    (fidelity + weight * generator).backward()  # the graph is still there
    assert (
        adaptive_weight(*(scale * loss for scale, loss in zip((1e9, 1e-9), losses(), strict=True)), last_layer) == 1e4
    )


def test_perceptual_distance():
    """Of the activations after each level, taken from the classifier's own forward pass."""
    classifier = random_classifier(pool="adaptive")
    generator = torch.Generator().manual_seed(0)
    samples, images = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2))
    seen = []
    for block in classifier.down_blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    for batch in (samples, images):
        classifier(batch, 0)
    activations, seen[:] = list(seen), []
    levels = len(classifier.down_blocks)
    expected = torch.zeros(2)
    for x, y in zip(activations[:levels], activations[levels:], strict=True):
        x, y = (z / z.square().sum(dim=1, keepdim=True).sqrt() for z in (x, y))
        expected += (x - y).square().sum(dim=1).mean(dim=(1, 2)) / levels
    distance = ClassifierDistance(classifier)
    assert rounding_errors(distance(samples, images), expected) <= NETWORK
    assert distance(images, images).max().item() < 1e-9
    larger = torch.randn(1, 3, 16, 24, generator=generator)
    assert ClassifierDistance(random_classifier(pool="attention"))(larger, larger.flip(-1)).item() > 0


def test_means_over_batches():
    class Alone:
        @staticmethod
        def reduce(tensor, reduction):
            assert reduction == "mean"
            return tensor

    metrics = MeanMetrics()
    assert metrics.compute(Alone()) == {}
    metrics.update({"loss": torch.tensor(1.0)})
    metrics.update({"loss": torch.tensor(3.0), "late": torch.tensor(5.0)})
    assert metrics.compute(Alone()) == {"loss": 2.0, "late": 5.0}
    metrics.reset()
    assert metrics.compute(Alone()) == {}


def test_float16_is_refused_with_a_discriminator():
    AutoencoderArguments(discriminator_start=0).check_precision("bf16")
    AutoencoderArguments().check_precision("fp16")
    with pytest.raises(ValueError, match="`mixed_precision` is fp16, in which .*Pass bf16 or no, or leave `discr"):
        AutoencoderArguments(discriminator_start=0).check_precision("fp16")
