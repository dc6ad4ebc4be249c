"""Numerical operations with a plain reference beside every fast path."""

from .adagn import AdaGroupNormAct, adagn, adagn_reference


__all__ = ["AdaGroupNormAct", "adagn", "adagn_reference"]
