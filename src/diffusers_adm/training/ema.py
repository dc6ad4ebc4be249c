"""Exponential moving average of the weights: diffusers' `EMAModel`, and a swap that cannot be forgotten."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from diffusers.training_utils import EMAModel


@contextmanager
def ema_weights(ema: EMAModel, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """
    Puts the averaged weights into `parameters` for the duration of a `with` block.

    The trained weights come back when the block ends, exceptions and interrupts included: otherwise a failed validation
    that is caught upstream would let training go on from the averaged weights.

    Args:
        ema (`EMAModel`): Holds one average for each of `parameters`, in their order.
        parameters (iterable of `torch.nn.Parameter`): The parameters to swap; a generator will do.

    Raises:
        RuntimeError: If the averaged weights are already swapped in (`EMAModel` has room for one set of weights).
    """
    if ema.temp_stored_params is not None:
        raise RuntimeError(
            "The averaged weights are already swapped in: `ema_weights` cannot be nested, because the inner block "
            "would overwrite the stored weights. Enter it once, around everything that needs the averaged weights."
        )
    # Read three times below; `model.parameters()` is a generator and would be empty at the second.
    parameters = list(parameters)
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)


@contextmanager
def evaluation_weights(
    model: torch.nn.Module, ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter] | None = None
) -> Iterator[None]:
    """
    `model` in evaluation mode with the averaged weights, if there are any; afterwards as it is trained. The average is
    of `parameters`; None: of all those of `model`.
    """
    model.eval()
    try:
        averaged = model.parameters() if parameters is None else parameters
        with ema_weights(ema, averaged) if ema is not None else nullcontext():
            yield
    finally:
        model.train()
