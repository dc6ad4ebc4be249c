"""The networks of the ablated-diffusion family."""

from .unet_2d_adagn import AdaGNUNet2DModel


__all__ = ["AdaGNUNet2DModel"]
