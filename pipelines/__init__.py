"""Pipelines, one file each. This folder is installed as `diffusers_adm.pipelines`."""

from .pipeline_adm import ADMPipeline


__all__ = ["ADMPipeline"]
