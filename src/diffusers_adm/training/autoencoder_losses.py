"""
Losses of an autoencoder: reconstruction, KL divergence, perceptual distance, and those against a discriminator.

Rombach et al. 2022 (https://huggingface.co/papers/2112.10752, appendix G) and Esser et al. 2021 (VQGAN,
https://huggingface.co/papers/2012.09841, eqs. 5 to 7). The code of the former sums over the values of an image; here
each term is divided by their number, so that losses and gradients do not depend on the size of the images. The
proportions of the terms, and so the meaning of the weights, are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F


ReconstructionLoss = Literal["l1", "l2", "l1+l2"]
# Of the adaptive weight, as in VQGAN's code.
ADAPTIVE_EPSILON, MAX_ADAPTIVE_WEIGHT = 1e-4, 1e4


class Reconstruction(NamedTuple):
    """
    What an autoencoder makes of images, for the loss.

    Attributes:
        sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The images, decoded from a sample of
            the posterior.
        mean, log_variance (`torch.Tensor` of shape `(batch_size, latent channels, height, width)`): The posterior.
    """

    sample: torch.Tensor
    mean: torch.Tensor
    log_variance: torch.Tensor


class AutoencoderLosses(NamedTuple):
    """
    Losses of a batch: scalars, means over its images.

    Attributes:
        fidelity: The reconstruction loss, plus the weighted perceptual distance: what the discriminator is weighed
            against.
        mse: Mean squared error, whatever the reconstruction loss.
        kl: In nats per value of an image.
        perceptual: 0 without a perceptual network.
    """

    fidelity: torch.Tensor
    mse: torch.Tensor
    kl: torch.Tensor
    perceptual: torch.Tensor


def kl_per_value(mean: torch.Tensor, log_variance: torch.Tensor, num_values: int) -> torch.Tensor:
    """
    KL divergence of the posterior of each image from the standard normal distribution, summed over all its latents and
    divided by `num_values`, the number of values of the image (channels times pixels): `(batch_size,)`, in nats.
    """
    mean, log_variance = mean.float(), log_variance.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return kl.flatten(1).sum(dim=1) / num_values


def autoencoder_losses(
    output: Reconstruction,
    images: torch.Tensor,
    reconstruction_loss: ReconstructionLoss,
    perceptual_weight: float = 0.0,
    perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> AutoencoderLosses:
    """
    The losses of a batch that need no discriminator.

    Args:
        output (`Reconstruction`): Of the `images`.
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): In [-1, 1].
        reconstruction_loss (`str`): Mean absolute error ("l1"), mean squared error ("l2") or their sum ("l1+l2").
        perceptual (callable, *optional*): From two batches of images to one distance for each pair, `(batch_size,)`.
    """
    error = output.sample.float() - images.float()
    mse = error.square().mean()
    if reconstruction_loss == "l1":
        fidelity = error.abs().mean()
    elif reconstruction_loss == "l2":
        fidelity = mse
    elif reconstruction_loss == "l1+l2":
        fidelity = error.abs().mean() + mse
    else:
        raise ValueError(f"`reconstruction_loss` is {reconstruction_loss!r}; it must be l1, l2 or l1+l2.")
    distance = torch.zeros((), device=images.device)
    if perceptual is not None:
        distance = perceptual(output.sample, images).float().mean()
        fidelity = fidelity + perceptual_weight * distance
    kl = kl_per_value(output.mean, output.log_variance, images[0].numel()).mean()
    return AutoencoderLosses(fidelity, mse.detach(), kl, distance.detach())


# Against a discriminator


def generator_loss(discriminator: torch.nn.Module, samples: torch.Tensor) -> torch.Tensor:
    """
    `-mean(D(samples))`: low if the discriminator takes the samples for images. Its weights get no gradient. Pass a
    network that is not wrapped for distribution, which would wait for that gradient.
    """
    discriminator.requires_grad_(False)
    try:
        return -discriminator(samples).float().mean()
    finally:
        discriminator.requires_grad_(True)


def adaptive_weight(fidelity: torch.Tensor, generator: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """
    The weight of the generator's loss at which both losses have gradients of about the same norm at the last layer of
    the decoder (VQGAN, eq. 7), at most `MAX_ADAPTIVE_WEIGHT`. No gradient flows through it.
    """
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm() for loss in (fidelity, generator)
    ]
    return (norms[0] / (norms[1] + ADAPTIVE_EPSILON)).clamp(0, MAX_ADAPTIVE_WEIGHT).detach()


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss from its logits: `mean(relu(1 - D(images)) + relu(1 + D(reconstructions))) / 2`."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2
