"""Pipelines, one file each. This folder is installed as `diffusers_adm.pipelines`."""

from diffusers_adm.pipelines.pipeline_adm import ADMPipeline
from diffusers_adm.pipelines.pipeline_adm_controlnet import ADMControlNetPipeline
from diffusers_adm.pipelines.pipeline_adm_image_to_image import ADMImageToImagePipeline
from diffusers_adm.pipelines.pipeline_adm_inpaint import ADMInpaintPipeline
from diffusers_adm.pipelines.pipeline_adm_super_resolution import ADMSuperResolutionPipeline
from diffusers_adm.pipelines.pipeline_adm_unclip import ADMUnCLIPPipeline


__all__ = [
    "ADMControlNetPipeline",
    "ADMImageToImagePipeline",
    "ADMInpaintPipeline",
    "ADMPipeline",
    "ADMSuperResolutionPipeline",
    "ADMUnCLIPPipeline",
]
