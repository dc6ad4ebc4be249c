"""The networks of the ablated-diffusion family."""

from .classifier_adagn import AdaGNClassifierModel
from .text_encoder_glide import GLIDETextModel
from .unet_2d_adagn import AdaGNUNet2DModel


__all__ = ["AdaGNClassifierModel", "AdaGNUNet2DModel", "GLIDETextModel"]
