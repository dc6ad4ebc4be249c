"""The public classes of this package: those that diffusers can look up by name in a saved pipeline or on the Hub."""

from ..models.classifier_adagn import AdaGNClassifierModel
from ..models.controlnet_adagn import AdaGNControlNetModel, AdaGNMultiControlNetModel
from ..models.text_encoder_glide import GLIDETextModel
from ..models.unclip_projection import UnCLIPProjectionModel
from ..models.unet_2d_adagn import AdaGNUNet2DModel
from ..pipelines import (
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMPipeline,
    ADMSuperResolutionPipeline,
    ADMUnCLIPPipeline,
)
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler


PACKAGE = __name__.partition(".")[0]

COMPONENTS = (
    AdaGNUNet2DModel,
    AdaGNClassifierModel,
    AdaGNControlNetModel,
    AdaGNMultiControlNetModel,
    GLIDETextModel,
    UnCLIPProjectionModel,
    LearnedVarianceDDPMScheduler,
)
PIPELINES = (
    ADMPipeline,
    ADMInpaintPipeline,
    ADMSuperResolutionPipeline,
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMUnCLIPPipeline,
)
PUBLIC_CLASSES = (*COMPONENTS, *PIPELINES)
