"""
PatchDiscriminator: tells patches of images from patches of reconstructions, to train an autoencoder.

Isola et al. 2017 (pix2pix, https://huggingface.co/papers/1611.07004, appendix 6.1.2: PatchGAN), as in Esser et al. 2021
(VQGAN, https://huggingface.co/papers/2012.09841) and Rombach et al. 2022 (https://huggingface.co/papers/2112.10752,
appendix G). These have batch norm. Here it is group norm: its statistics are those of one image, so the output does not
depend on the other images of a batch, their number, or the number of processes; images and reconstructions can share a
forward pass; and no running statistics have to be kept in checkpoints or synchronised between processes.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from .config_checks import check_counts
from .input_checks import check_shape
from .loading import WholeModelMixin


KERNEL_SIZE, SLOPE = 4, 0.2  # of convolutions and leaky ReLUs, as in pix2pix
INIT_STD = 0.02
MAX_WIDTH_FACTOR = 8  # of the widest layers


class PatchDiscriminator(WholeModelMixin, ConfigMixin):
    r"""
    Convolutions with one output for each patch of the image: high for patches of images, low for reconstructed ones.

    Args:
        in_channels (`int`, defaults to 3): Channels of the images.
        base_channels (`int`, defaults to 64): Channels of the first layer; they double in each further one, up to 8
            times as many.
        num_layers (`int`, defaults to 3): Convolutions of stride 2. With 1, 2, 3 the patches have sides of 16, 34, 70
            pixels.
        norm_num_groups (`int`, defaults to 32): Groups of the group norms; at most as many as there are channels.

    Raises:
        ValueError: For numbers that describe no such network.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3, norm_num_groups: int = 32):
        super().__init__()
        check_counts(self.config)
        for name in ("in_channels", "base_channels", "num_layers", "norm_num_groups"):
            if self.config[name] < 1:
                raise ValueError(f"`{name}` is {self.config[name]}; it must be at least 1.")
        groups = min(norm_num_groups, base_channels)
        if base_channels % groups:
            raise ValueError(
                f"`base_channels` is {base_channels}, which `norm_num_groups` {norm_num_groups} does not divide. Pass "
                "a multiple of it."
            )
        layers: list[nn.Module] = [nn.Conv2d(in_channels, base_channels, KERNEL_SIZE, stride=2, padding=1)]
        channels = base_channels
        for level in range(1, num_layers + 1):
            before, channels = channels, base_channels * min(2**level, MAX_WIDTH_FACTOR)
            stride = 2 if level < num_layers else 1
            layers += [
                nn.LeakyReLU(SLOPE),
                # A shift follows in the norm.
                nn.Conv2d(before, channels, KERNEL_SIZE, stride=stride, padding=1, bias=False),
                nn.GroupNorm(groups, channels),
            ]
        layers += [nn.LeakyReLU(SLOPE), nn.Conv2d(channels, 1, KERNEL_SIZE, stride=1, padding=1)]
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, INIT_STD)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @property
    def min_size(self) -> int:
        """The shortest side of images in pixels that leaves one patch or more."""
        # Every layer of stride 2 halves it, and each of the two others takes one pixel.
        return 3 * 2**self.config.num_layers

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """
        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(batch_size, 1, rows, columns)`: One logit for each patch. `rows` is
            `height // 2**num_layers - 2`.
        """
        check_shape("sample", sample, ("batch_size", self.config.in_channels, "height", "width"))
        return self.layers(sample)
