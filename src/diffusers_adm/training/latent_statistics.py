"""Mean and standard deviation of an autoencoder's latents over its data, and the scale that makes them standard."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, Subset

from ..conditioning.latents import LatentSpace
from ..data.images import ImageDataset
from .interruption import keep_to_parent


if TYPE_CHECKING:
    from .autoencoders import Autoencoding
    from .run import TrainingRun

# Images for the scale of the latents in a checkpoint; the result is measured on all.
CHECKPOINT_IMAGES = 1024


@dataclass
class LatentMoments:
    """Mean and standard deviation of latents by channel, before scale and shift."""

    mean: list[float]
    std: list[float]
    num_images: int

    @property
    def shift(self) -> float:
        """The mean of all latents."""
        return sum(self.mean) / len(self.mean)

    @property
    def scale(self) -> float:
        """1 / (the standard deviation of all latents about `shift`): channels have equally many."""
        second = [std**2 + (mean - self.shift) ** 2 for mean, std in zip(self.mean, self.std, strict=True)]
        return 1 / math.sqrt(sum(second) / len(second))

    def is_usable(self, by_channel: bool) -> bool:
        """Whether latents with these moments can be made standard: they are finite, and not all the same."""
        varies = all(std > 0 for std in self.std) if by_channel else any(std > 0 for std in self.std)
        return varies and all(map(math.isfinite, (*self.mean, *self.std)))

    def to_config(self, by_channel: bool) -> dict[str, Any]:
        """Entries of an autoencoder's config that make samples standard, as a whole or by channel (`LatentSpace`)."""
        if by_channel:
            values: dict[str, Any] = {"latents_mean": self.mean, "latents_std": self.std, "scaling_factor": 1.0}
            return {**values, "shift_factor": None}
        return {
            "latents_mean": None,
            "latents_std": None,
            "scaling_factor": self.scale,
            "shift_factor": self.shift,
        }


@torch.no_grad()
def latent_moments(
    autoencoder: AutoencoderKL,
    dataset: ImageDataset,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int = 0,
    max_images: int | None = None,
) -> LatentMoments:
    """
    Measures the latents of images, evenly spaced over the dataset, as they are sampled: the variance is that of the
    posteriors' means plus the mean of their variances, so no noise is drawn. Collective: each process encodes a share.

    Args:
        max_images (`int`, *optional*): Number of images; `None`: all.
    """
    number = min(len(dataset), max_images or len(dataset))
    chosen = [len(dataset) * place // number for place in range(number)]
    own, space = chosen[accelerator.process_index :: accelerator.num_processes], LatentSpace(autoencoder)
    sums = torch.zeros(2, space.channels, dtype=torch.float64)
    count = 0
    loader = DataLoader(Subset(dataset, own), batch_size, num_workers=num_workers, worker_init_fn=keep_to_parent)
    for batch in loader:
        posterior = space.posterior(batch["images"].to(accelerator.device))
        mean, variance = posterior.mean.cpu().double(), posterior.std.cpu().double().square()
        sums += torch.stack([mean.sum(dim=(0, 2, 3)), (mean.square() + variance).sum(dim=(0, 2, 3))])
        count += mean[:, 0].numel()
    # Objects, since not every device has float64.
    shares = gather_object([(sums.tolist(), count)])
    total = sum(share[1] for share in shares)
    first, second = torch.tensor([share[0] for share in shares], dtype=torch.float64).sum(dim=0) / total
    std = (second - first.square()).clamp(min=0).sqrt()
    return LatentMoments(first.tolist(), std.tolist(), number)


def measure_latents(autoencoding: Autoencoding, run: TrainingRun, num_workers: int, max_images: int | None) -> None:
    """
    Measures the latents of the training images, cropped at the centre, with the averaged weights; stores scale and
    shift in the config of the autoencoder (not with `decoder_only`), so that samples are standard; and writes a row of
    the log. Collective.
    """
    autoencoder, dataset = autoencoding.autoencoder, autoencoding.centred_images()
    batch_size = run.training_args.train_batch_size
    with run.evaluation_weights():
        moments = latent_moments(autoencoder, dataset, run.accelerator, batch_size, num_workers, max_images)
    autoencoding.latents = {
        "latent_mean": moments.mean,
        "latent_std": moments.std,
        "num_images": moments.num_images,
    }
    values = {f"latent_mean_{i}": mean for i, mean in enumerate(moments.mean)}
    values |= {f"latent_std_{i}": std for i, std in enumerate(moments.std)}
    if not autoencoding.keeps_scale:
        if not moments.is_usable(autoencoding.standardizes_channels):
            run.logger.warning("The latents are not finite, or all the same: their scale cannot be measured.")
            return
        autoencoder.register_to_config(**moments.to_config(autoencoding.standardizes_channels))
    config = autoencoder.config
    values |= {"scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor or 0.0}
    run.log.write_validation(run.progress.global_step, values)
    described = ", ".join(f"{mean:.3f} ± {std:.3f}" for mean, std in zip(moments.mean, moments.std, strict=True))
    run.logger.info(
        f"Latents of {moments.num_images} images, by channel: {described}; scaling_factor "
        f"{values['scaling_factor']:.4f}, shift_factor {values['shift_factor']:.4f}"
    )
