"""Ablated diffusion models (AdaGN U-Nets with a learned variance) for the Hugging Face ecosystem."""

__version__ = "0.1.0"

# `ModelMixin` and `SchedulerMixin` are not ours: diffusers looks up the base classes of a library's components here.
from diffusers import ModelMixin, SchedulerMixin

from .deprecations import find_moved_modules
from .hub.registration import register_with_diffusers
from .models import (
    AdaGNClassifierModel,
    AdaGNControlNetModel,
    AdaGNMultiControlNetModel,
    AdaGNUNet2DModel,
    GLIDETextModel,
    UnCLIPProjectionModel,
)
from .pipelines import (
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    ADMUnCLIPPipeline,
)
from .schedulers import LearnedVarianceDDPMScheduler


__all__ = [
    "ADMControlNetPipeline",
    "ADMImageToImagePipeline",
    "ADMInpaintPipeline",
    "ADMPipeline",
    "ADMSuperResolutionPipeline",
    "ADMUnCLIPPipeline",
    "AdaGNClassifierModel",
    "AdaGNControlNetModel",
    "AdaGNMultiControlNetModel",
    "AdaGNUNet2DModel",
    "GLIDETextModel",
    "LearnedVarianceDDPMScheduler",
    "ModelMixin",
    "SchedulerMixin",
    "UnCLIPProjectionModel",
]

find_moved_modules()
register_with_diffusers()
