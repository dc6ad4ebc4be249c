"""Pipelines, one file each. This folder is installed as `diffusers_adm.pipelines`."""

from .pipeline_adm import ADMPipeline
from .pipeline_adm_controlnet import ADMControlNetPipeline
from .pipeline_adm_inpaint import ADMInpaintPipeline
from .pipeline_adm_super_resolution import ADMSuperResolutionPipeline


__all__ = ["ADMControlNetPipeline", "ADMInpaintPipeline", "ADMPipeline", "ADMSuperResolutionPipeline"]
