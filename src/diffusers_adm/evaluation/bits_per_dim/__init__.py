"""
Bits per dimension: the variational bound of a diffusion model on images, term by term.

A package, because function and command have the same name: `diffusers_adm.evaluation.bits_per_dim` is the function, and
`python -m diffusers_adm.evaluation.bits_per_dim` runs `__main__.py`, which nothing imports.
"""

from ...measures.bound import BitsPerDim, bits_per_dim


__all__ = ["BitsPerDim", "bits_per_dim"]
