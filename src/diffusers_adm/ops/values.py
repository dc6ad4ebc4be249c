"""Checks of single arguments: numbers, switches and tensors from a user, before anything is computed with them."""

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from .finiteness import count_not_finite


# Far above every scale, noise or embedding in use. Products of such numbers still lie within the range of float32, so
# that what is finite stays finite in a step.
LARGEST = 1e6
# Convolutions of torch index with 32 bits on most devices; in float32, such a tensor fills 8 GiB.
MAX_ELEMENTS = 2**31 - 1


def as_number(value: Any) -> Any:
    """The number in a tensor or array without dimensions; anything else as it is."""
    if isinstance(value, torch.Tensor) and (value.device.type == "meta" or value.layout != torch.strided):
        return value
    return value.item() if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0 else value


def check_number(name: str, value: Any, low: float = -LARGEST, high: float = LARGEST) -> None:
    """Raises a `ValueError` unless a value is a finite real number within two limits. Truth values are not numbers."""
    value = as_number(value)
    is_number = isinstance(value, Real) and not isinstance(value, (bool, np.bool_))
    if is_number and isinstance(value, Integral):
        value = int(value)  # of any size; those of NumPy have a fixed one
    if not is_number or not low <= value <= high:  # in this form, NaN is refused as well
        raise ValueError(f"`{name}` is {describe(value)}; it must be a finite number from {low:g} to {high:g}.")


def check_flag(name: str, value: Any) -> None:
    """Raises a `ValueError` unless a value is `True` or `False`."""
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, Integral) and value in (0, 1)):
        raise ValueError(f"`{name}` is {describe(value)}; pass True or False.")


def check_plain_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raises a `ValueError` for tensors without values, sparse ones and complex ones."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
        kind = "on the device meta, without values" if tensor.device.type == "meta" else f"of type {tensor.dtype}"
        kind = kind if tensor.layout == torch.strided else f"sparse ({tensor.layout})"
        raise ValueError(f"`{name}` is a tensor {kind}; pass a dense tensor of real numbers.")


def check_tensor(name: str, value: Any, ndim: int | None = None) -> None:
    """
    Raises a `ValueError` unless a value is a dense tensor of real numbers, none of them NaN, infinite or larger than
    `LARGEST`, with so many dimensions, none of them empty. Waits for the device.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` is {describe(value)}; pass a `torch.Tensor`.")
    check_plain_tensor(name, value)
    if value.numel() == 0 or (ndim is not None and value.ndim != ndim):
        dimensions = "" if ndim is None else f" {ndim} dimensions,"
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}; pass{dimensions} none of them empty.")


def check_magnitude(name: str, tensor: torch.Tensor, kind: str = "rows") -> None:
    """
    Raises a `ValueError` for floating point numbers that are NaN, infinite or beyond `LARGEST`. `kind`: what a row is,
    in the plural. Waits for the device.
    """
    if not tensor.is_floating_point():
        return
    highest = float(tensor.detach().abs().max())
    if highest <= LARGEST:
        return
    bad = count_not_finite(tensor, kind) if tensor.ndim > 1 else f"{tensor.numel()} {kind}"
    if bad is not None and not highest < float("inf"):
        raise ValueError(f"`{name}` holds NaN or infinity for {bad}. Pass finite numbers.")
    raise ValueError(f"`{name}` holds numbers up to {highest:g}; they must lie within +-{LARGEST:g}.")


def check_generator(generator: object) -> None:
    """Raises a `ValueError` unless the argument `generator` is a generator, a list of them, or `None`."""
    for each in generator if isinstance(generator, list) else [generator]:
        if not isinstance(each, torch.Generator) and generator is not None:
            raise ValueError(
                f"`generator` is or holds {describe(each)}; pass a `torch.Generator`, such as "
                "`torch.Generator().manual_seed(0)`, or a list with one for each image."
            )


def check_elements(what: str, number: int) -> None:
    """Raises a `ValueError` for tensors that no device could hold. `what`: the arguments that ask for them."""
    if number > MAX_ELEMENTS:
        raise ValueError(
            f"{what} ask for {number} numbers at once; the limit is {MAX_ELEMENTS}. Ask for smaller images, or for "
            "fewer in one call."
        )


def describe(value: Any, limit: int = 80) -> str:
    """A value in a message: briefly, and by its type if it is no number or text."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and type {value.dtype}"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({type(value).__name__})"
