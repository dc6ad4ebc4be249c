"""Numerical operations, with a plain reference next to every fast path."""

from .adagn import AdaGroupNormAct, adagn, adagn_reference
from .conv import Conv2d, conv2d


__all__ = ["AdaGroupNormAct", "Conv2d", "adagn", "adagn_reference", "conv2d"]
