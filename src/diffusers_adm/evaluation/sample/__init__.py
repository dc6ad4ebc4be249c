"""Generates many images with one pipeline: `sample_images`, and `python -m diffusers_adm.evaluation.sample`."""

from .images import sample_images


__all__ = ["sample_images"]
