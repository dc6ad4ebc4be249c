"""The networks of the ablated-diffusion family."""

from .classifier_adagn import AdaGNClassifierModel
from .controlnet_adagn import AdaGNControlNetModel, AdaGNMultiControlNetModel
from .text_encoder_glide import GLIDETextModel
from .unclip_projection import UnCLIPProjectionModel
from .unet_2d_adagn import AdaGNUNet2DModel


__all__ = [
    "AdaGNClassifierModel",
    "AdaGNControlNetModel",
    "AdaGNMultiControlNetModel",
    "AdaGNUNet2DModel",
    "GLIDETextModel",
    "UnCLIPProjectionModel",
]
